"""Replace the weights of running LLM inference engines in place, exactly and safely."""

"""Plugin that maps vLLM onto the hooks of ckpt_core."""

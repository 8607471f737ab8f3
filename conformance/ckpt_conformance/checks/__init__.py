"""The checks, one topic a file. `registry.load_all()` imports them."""

"""Plugin that maps SGLang onto the hooks of ckpt_core."""

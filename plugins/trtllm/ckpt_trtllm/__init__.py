"""Plugin that maps TensorRT-LLM onto the hooks of ckpt_core."""

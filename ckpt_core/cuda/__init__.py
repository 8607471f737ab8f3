"""NVIDIA GPUs, through the driver alone: agents need neither torch nor a CUDA toolkit."""

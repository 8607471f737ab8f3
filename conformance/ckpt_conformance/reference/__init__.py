"""A small inference engine, complete enough to be updated.

Tensor parallel, fused and quantised weights, caches. In the manner of nano-vllm (https://github.com/GeeeekExplorer/nano-vllm):
sharding is a weight loader on the parameter.
"""

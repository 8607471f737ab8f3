"""A stand-in for TensorRT-LLM, of the shape that its sources show, with tiny models: what the plugin is tested on.

It cannot be installed where this project is developed. Nothing here is taken from its code, and nothing proven here is proven of
it. Where its sources leave a choice, the stand-in takes the one that is harder on a plugin: names that it does not know are
dropped in silence, types are cast, modules that are rebuilt hold NaN until they are loaded, what is processed twice or loaded in
its processed form raises, and a mapper keeps what it was given.
"""

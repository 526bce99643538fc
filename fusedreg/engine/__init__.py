"""A step by kernels: what is watched, how it is laid out, and what is launched."""

"""Device code, installed as `fusedreg.kernels`; imports torch and triton, never fusedreg.

There is no device code yet: every optimizer runs on the reference path (`fusedreg/reference.py`).
"""

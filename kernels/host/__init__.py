"""The device code for the host: the same rules and penalties, compiled by LLVM.

Imports torch and llvmlite, and triton only through fusedreg.kernels.language, which does without.
Start with engine.py.
"""

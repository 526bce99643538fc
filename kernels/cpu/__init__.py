"""The device code for the host: the same rules and penalties, compiled by LLVM.

Imports torch and llvmlite; fusedreg.kernels.device.language imports triton only where it is there.
Start with backend.py.
"""

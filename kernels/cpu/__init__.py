"""The kernels of a CPU: the same rules and penalties, compiled by LLVM.

It imports torch and llvmlite, and triton only if it is installed. Start with backend.py.
"""

"""Device code, installed as `fusedreg.kernels`; imports torch and triton, never fusedreg.

Start with rules.py; README.md beside this file says what is where.
"""

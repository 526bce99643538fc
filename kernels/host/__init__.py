"""The device code for the host: the same rules and penalties, compiled by numba.

Imports torch and numba, and of triton only what fusedreg.kernels.language lets it do without.
"""

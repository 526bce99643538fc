"""Triton's kernels. Start with backend.py."""

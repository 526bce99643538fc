"""Where a rule of one's own finds `tl` and `triton`; see device/language.py."""

from fusedreg.kernels.device.language import tl, triton

__all__ = ["tl", "triton"]

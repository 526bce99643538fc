"""Where a rule of one's own finds `Rule` and the words that it may call; see device/rules.py."""

from fusedreg.kernels.device.rules import *  # noqa: F403

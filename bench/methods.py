"""What is computed: the methods, and the bytes that a step of each has to move."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

import fusedreg

LR, L1, DECAY = 0.1, 0.3, 0.5
"""Large, so that a formula with a factor too many or too few is found before anything is timed.
No operation takes longer or shorter for it."""

CLIP_SHARE = 0.5
"""max_grad_norm over the norm of the gradients: clipping halves them."""

SCALE = 1024.0
"""The loss scale where there is one; a power of two, so that scaling rounds nothing."""

ADAM = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": DECAY}
"""torch's defaults but for the decay, given to all, because other libraries have others."""


@dataclass(frozen=True, eq=False)
class Method:
    """One update rule with its penalties."""

    cls: str
    """A name, as another commit may not have the class."""
    kwargs: dict[str, Any]
    states: int
    """Tensors of state that are read and written."""
    foreach: int | None = None
    """Numbers for each parameter that torch's foreach operations read and write."""

    @property
    def l1(self) -> float:
        return float(self.kwargs.get("l1", 0.0))

    @property
    def layerwise(self) -> bool:
        """Whether a norm of each tensor's update must be known before it is applied."""
        return bool(getattr(getattr(fusedreg, self.cls), "layerwise", False))

    @cached_property
    def case(self) -> Any:
        """The same for the oracle."""
        from fusedreg.cases import Case  # noqa: PLC0415  # another commit may lack it

        return Case(self.cls, "bench", getattr(fusedreg, self.cls), self.kwargs)

    @property
    def ways_of_torch(self) -> tuple[str, ...]:
        """How torch.optim computes it; () where it does not.

        >>> METHODS["RMSprop"].ways_of_torch, METHODS["Lion"].ways_of_torch
        (('foreach', 'for-loop'), ())
        """
        cls = getattr(torch.optim, self.cls, None)
        fused = cls is not None and "fused" in inspect.signature(cls).parameters
        return (*["fused"] * fused, *["foreach", "for-loop"] * (cls is not None))


# The first of each are the most important. What foreach moves in AdamW: decay 2, lerp 3, mul 2,
# addcmul 3, sqrt 2, div 2, add 2, addcdiv 4. Adam with L2 has an add of 3 in the place of the
# decay; SGD has mul 2, add 3, add 3. RMSprop has add 3, mul 2, addcmul 3, sqrt 2, add 2, and of the
# momentum mul 2, addcdiv 4, add 3; Adagrad add 3, addcmul 3, sqrt 2, add 2, mul 2, addcdiv 4.
#
# RMSprop is that of the mobile networks; the decay of LAMB makes the trust ratio about 0.4, because
# at 1 nobody would see that it was left out.
RMSPROP = {"alpha": 0.9, "eps": 1e-8, "momentum": 0.9, "weight_decay": DECAY}
METHODS = {
    "AdamW": Method("AdamW", ADAM, 2, 20),
    "SGD momentum": Method("SGD", {"momentum": 0.9}, 1, 8),
    "AdamW + L1": Method("AdamW", {**ADAM, "l1": L1}, 2, 20),
    "Adam + L2": Method("Adam", ADAM, 2, 21),
    "RMSprop": Method("RMSprop", RMSPROP, 2, 21),
    "Adagrad": Method("Adagrad", {"eps": 1e-10, "weight_decay": DECAY}, 1, 16),
    "Lion": Method("Lion", {"betas": (0.9, 0.99), "weight_decay": DECAY}, 1),
    "LAMB": Method("LAMB", {**ADAM, "eps": 1e-6, "weight_decay": 4 * DECAY}, 2),
}
USUAL = tuple(METHODS)[:4]
"""What a quick run compares; the others come later."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

THRESHOLD = 19
"""What torch operations move for the soft-threshold: see `contenders.soft_threshold_`."""


def needed_numbers(method: Method, clip: bool) -> int:
    """What a step cannot do without: gradient, parameter and states, the gradient again to clip.

    The norm must be known before the first gradient is used, so all are read twice. Dividing by a
    loss scale costs nothing, where it is done in the same reading. Where the norm of an update must
    be known, parameter and states are read once more, if the states were already advanced.
    """
    again = 1 + method.states if method.layerwise else 0
    return 3 + 2 * method.states + clip + again


def moved_numbers(method: Method, clip: bool, scaled: bool, implementation: str) -> dict[str, int]:
    """Numbers read and written for each parameter, by part; {} where nobody has counted.

    For the norm of an update fusedreg stores no states, but forms them twice, which takes the
    gradient once more.

    >>> moved_numbers(METHODS["AdamW"], True, True, "torch fused")
    {'unscale': 2, 'clip': 3, 'step': 7}
    >>> moved_numbers(METHODS["LAMB"], True, True, "fusedreg (llvm)")  # 1 + 4 + 4 + 3
    {'step': 12}
    """
    if implementation in {"fusedreg kernels", "fusedreg (triton)", "fusedreg (llvm)"}:
        return {"step": needed_numbers(method, clip) + method.layerwise}
    who, _, way = implementation.partition(" ")
    step = {"fused": 3 + 2 * method.states, "foreach": method.foreach}.get(way)
    if who != "torch" or way not in method.ways_of_torch or step is None:
        return {}
    parts = {"unscale": 2 * scaled, "clip": 3 * clip, "step": step}
    parts["threshold"] = THRESHOLD * bool(method.l1)
    return {part: numbers for part, numbers in parts.items() if numbers}

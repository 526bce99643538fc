"""What is compared, in the order of importance."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

from methods import DTYPES, METHODS, USUAL
from shapes import MODELS, SIZES, TENSORS, TINY, TINY_SWEEP, Groups, count

COMPILED = {
    "gpu": ("ResNet-50", "GPT-2 124M"),
    "cpu": (f"{2**23} in 16 tensors",),  # 161 tensors take 40 s to compile
    "dry": ("tiny",),
}
"""The models for which torch.compile's optimizers are timed."""


LONG = 2**24
"""Parameters; a CPU steps more in seconds."""


@dataclass(frozen=True)
class Job:
    """One comparison."""

    kind: str
    """model, size, tensors (the two sweeps), parts or compiled."""
    model: str
    method: str = "AdamW"
    dtype: str = "float32"
    clip: bool = True
    compiled: str = ""
    """Which of torch's is compiled: one at a time, as they share code and its compiled forms."""

    @property
    def scaled(self) -> bool:
        """The parts are timed of a step with a loss scale, which has most of them."""
        return self.kind == "parts"

    def __str__(self) -> str:
        parts = [self.model, self.method, self.dtype]
        parts += ["clipped"] * self.clip + ["scaled"] * self.scaled
        return ", ".join(parts + [f"compiled {self.compiled}"] * bool(self.compiled))


def shapes(dry: bool) -> dict[str, dict[str, Groups]]:
    """Of the models and the two sweeps."""
    if dry:
        return {"model": TINY, "size": TINY_SWEEP, "tensors": TINY_SWEEP}
    return {"model": MODELS, "size": SIZES, "tensors": TENSORS}


def all_shapes(dry: bool) -> dict[str, Groups]:
    """The same under one name each."""
    return {name: groups for kind in shapes(dry).values() for name, groups in kind.items()}


def jobs(dry: bool, quick: bool, gpu: bool) -> list[Job]:
    """One model, its parts, the sweeps; then what differs from that in one thing, in two, ...

    The long ends of the sweeps come after what differs in method, dtype and clipping, and after the
    next model. So do the methods that are not among the usual, in as few comparisons as there can
    be; what else there is of them comes at the very end.
    """
    of = shapes(dry)
    first, *_ = of["model"]
    sweeps = [Job(kind, name) for kind in ("size", "tensors") for name in of[kind]]
    long = [job for job in sweeps if count(of[job.kind][job.model]) > LONG]
    sweeps = [job for job in sweeps if job not in long]
    axes = [list(of["model"]), list(METHODS), list(DTYPES), [True, False]]
    others = [method for method in METHODS if method not in USUAL]

    def rank(values: tuple[Any, ...]) -> tuple[int, ...]:
        places = [axis.index(value) for axis, value in zip(axes, values, strict=True)]
        return sum(place > 0 for place in places), *places

    every = [Job("model", *values) for values in sorted(product(*axes), key=rank)]
    models = [job for job in every if job.method in USUAL]
    near = 1 + sum(len(axis) - 1 for axis in (USUAL, *axes[2:]))  # of the first model
    rare = [job for job in every if job.method in others]
    compiled = [
        Job("compiled", model, clip=clip, compiled=how)
        for how in ("foreach", "fused")
        for clip in (True, False)
        for model in COMPILED["dry" if dry else "gpu" if gpu else "cpu"]
    ]
    if quick or not (gpu or dry):
        compiled = compiled[:1]
    found = [models[0], Job("parts", first), *sweeps, *models[1:near], *compiled[:1]]
    if quick:
        return found
    few = len(others)
    return [
        *[*found, models[near], *rare[:few]],
        *[*long, *compiled[1:], *models[near + 1 :], *rare[few:]],
    ]

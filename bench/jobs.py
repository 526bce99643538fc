"""What is computed: methods, the bytes that a step of each moves, and models as lists of shapes."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, product
from math import prod
from typing import Any

import torch

import fusedreg
from fusedreg.cases import Case

LR, L1, DECAY = 0.1, 0.3, 0.5  # large, so that a wrong factor is found before anything is timed
CLIP_SHARE = 0.5  # max_grad_norm over the norm of the gradients: clipping halves them
SCALE = 1024.0  # the loss scale where there is one; a power of two, so that scaling rounds nothing
# torch's defaults but for the decay, given to all, because other libraries have others.
ADAM = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": DECAY}


@dataclass(frozen=True, eq=False)
class Method:
    """One update rule with its penalties."""

    cls: str  # a name, as another commit may not have the class
    kwargs: dict[str, Any]
    states: int  # tensors that are read and written
    foreach: int | None = None  # numbers per parameter that torch's foreach reads and writes
    layerwise: bool = False  # an update is applied when its norm is known

    @property
    def l1(self) -> float:
        return float(self.kwargs.get("l1", 0.0))

    @cached_property
    def case(self) -> Case:
        """The same for the oracle."""
        return Case(self.cls, "bench", getattr(fusedreg, self.cls), self.kwargs)

    @property
    def ways_of_torch(self) -> tuple[str, ...]:
        """How torch.optim computes it; () where it does not."""
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
    "LAMB": Method("LAMB", {**ADAM, "eps": 1e-6, "weight_decay": 4 * DECAY}, 2, layerwise=True),
}
USUAL = tuple(METHODS)[:4]  # what a quick run compares; the others come later
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
THRESHOLD = 19  # what torch operations move in `contenders.soft_threshold_`


def needed_numbers(method: Method, clip: bool) -> int:
    """What a step cannot do without: gradient, parameter and states, the gradient again to clip,
    parameter and states again where the norm of an update must be known."""
    return 3 + 2 * method.states + clip + method.layerwise * (1 + method.states)


def moved_numbers(method: Method, clip: bool, scaled: bool, implementation: str) -> dict[str, int]:
    """Numbers read and written for each parameter, by part; {} where nobody has counted.

    >>> moved_numbers(METHODS["AdamW"], True, True, "torch fused")
    {'unscale': 2, 'clip': 3, 'step': 7}
    >>> moved_numbers(METHODS["LAMB"], True, True, "fusedreg (llvm)")  # 1 + 4 + 4 + 3
    {'step': 12}
    """
    if implementation in {"fusedreg kernels", "fusedreg (triton)", "fusedreg (llvm)"}:
        # A layerwise method stores no states before it has the norm: it forms them twice.
        return {"step": needed_numbers(method, clip) + method.layerwise}
    who, _, way = implementation.partition(" ")
    step = {"fused": 3 + 2 * method.states, "foreach": method.foreach}.get(way)
    if who != "torch" or way not in method.ways_of_torch or step is None:
        return {}
    parts = {"unscale": 2 * scaled, "clip": 3 * clip, "step": step}
    parts["threshold"] = THRESHOLD * bool(method.l1)
    return {part: numbers for part, numbers in parts.items() if numbers}


Shape = tuple[int, ...]
Groups = list[list[Shape]]


def transformer(layers: int, width: int, *inputs: Shape) -> list[Shape]:
    """A stack of blocks behind its embeddings; weights as torch's Linear has them."""
    norm, vector, wide = [(width,), (width,)], (width,), 4 * width
    attention = [(3 * width, width), (3 * width,), (width, width), vector]
    block = [*norm, *attention, *norm, (wide, width), (wide,), (width, wide), vector]
    return [*inputs, *block * layers, *norm]


def resnet50() -> list[Shape]:
    """With 1000 classes; every convolution has a batch norm in the place of a bias."""
    sizes, channels = [(64, 3, 7)], 64
    for width, blocks in [(64, 3), (128, 4), (256, 6), (512, 3)]:
        for block in range(blocks):
            sizes += [(width, channels, 1), (width, width, 3), (4 * width, width, 1)]
            sizes += [(4 * width, channels, 1)] * (block == 0)
            channels = 4 * width
    shapes = [[(out, into, size, size), (out,), (out,)] for out, into, size in sizes]
    return [*chain.from_iterable(shapes), (1000, channels), (1000,)]


def even(numel: int, tensors: int) -> Groups:
    """One group of equal vectors."""
    return [[(numel // tensors,)] * tensors]


def count(groups: Groups) -> int:
    return sum(prod(shape) for group in groups for shape in group)


# The output layer is the embedding. The first models are the most important.
GPT2 = transformer(12, 768, (50257, 768), (1024, 768))
VIT = transformer(12, 768, (1, 1, 768), (1, 197, 768), (768, 3, 16, 16), (768,))
MODELS: dict[str, Groups] = {
    "ResNet-50": [resnet50()],
    "GPT-2 124M": [GPT2],
    "3000 tensors of 3500": even(3000 * 3500, 3000),
    "ViT-B": [[*VIT, (1000, 768), (1000,)]],
    "GPT-2 124M in 50 groups": [GPT2[first::50] for first in range(50)],
    "GPT 1.3B": [transformer(24, 2048, (50257, 2048), (2048, 2048))],
}
SIZES = {f"{2**power} in 16 tensors": even(2**power, 16) for power in (14, 17, 20, 23, 26, 28)}
TENSORS = {f"2**22 in {count} tensors": even(2**22, count) for count in (1, 8, 64, 512, 4096)}
SMALL: dict[str, Groups] = {  # for pytest-benchmark
    "1 M in 26 tensors": [[(256, 256), (256,)] * 12 + [(1000, 256), (1000,)]],
    "1 M in 500 tensors": even(2**20, 500),
}
# A small one, whose step is overhead, one of many tensors, and two that are large.
EVEN = ((10, 1000), (3000, 3500), (144, 264000))
OF_TARGETS = {**{f"{n} tensors of {x}": even(n * x, n) for n, x in EVEN}, "GPT-2 124M": [GPT2]}
# Two models and two sizes for a dry run.
TINY: dict[str, Groups] = {"tiny": [[(40, 30), (3,)]], "tiny in 2 groups": [[(40, 30)], [(3,)]]}
TINY |= {f"{numel} in 2 tensors": even(numel, 2) for numel in (300, 600)}
SHAPES = {**MODELS, **SIZES, **TENSORS, **OF_TARGETS, **TINY}


@dataclass(frozen=True)
class Job:
    """One comparison."""

    kind: str  # model, size, tensors (the two sweeps) or parts
    model: str
    method: str = "AdamW"
    dtype: str = "float32"
    clip: bool = True

    @property
    def scaled(self) -> bool:
        return self.kind == "parts"  # the step that has most of them

    def __str__(self) -> str:
        parts = [self.model, self.method, self.dtype]
        return ", ".join(parts + ["clipped"] * self.clip + ["scaled"] * self.scaled)


def jobs(dry: bool, quick: bool) -> list[Job]:
    """One model, its parts, the sweeps, and what differs from the first in one thing; then all."""
    (model, other, *_), sizes, tensors = MODELS, list(SIZES), list(TENSORS)
    if dry:
        model, other, *sizes = TINY
        tensors = sizes
    found = [Job("model", model), Job("parts", model)]
    found += [Job("size", name) for name in sizes[:4]]
    found += [Job("tensors", name) for name in tensors]
    found += [Job("model", model, clip=False), Job("model", model, dtype="bfloat16")]
    found += [Job("model", model, method) for method in USUAL]
    if not quick:
        found += [Job("model", model, method) for method in METHODS]
        found += [Job("model", other), *(Job("size", name) for name in sizes[4:])]
        models = (model, other) if dry else MODELS
        every = product((True, False), DTYPES, METHODS, models)
        found += [Job("model", name, method, dtype, clip) for clip, dtype, method, name in every]
    return list(dict.fromkeys(found))  # each once, where it came first

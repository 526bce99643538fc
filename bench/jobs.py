"""What is compared, in the order of importance: methods on models, which are lists of shapes."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain, product
from math import prod
from typing import Any

from methods import DTYPES, METHODS, USUAL

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


# The output layer is the embedding.
GPT2 = transformer(12, 768, (50257, 768), (1024, 768))
VIT = transformer(12, 768, (1, 1, 768), (1, 197, 768), (768, 3, 16, 16), (768,))

# The first are the most important.
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
SMALL: dict[str, Groups] = {
    "1 M in 26 tensors": [[(256, 256), (256,)] * 12 + [(1000, 256), (1000,)]],
    "1 M in 500 tensors": even(2**20, 500),
}
OF_TARGETS: dict[str, Groups] = {
    "GPT-2 124M": [GPT2],
    "144 tensors of 264000": even(144 * 264000, 144),
    "3000 tensors of 3500": MODELS["3000 tensors of 3500"],
    "10 tensors of 1000": even(10 * 1000, 10),
}
"""Two that are large, one of many tensors, and a small one, of which a step is overhead."""
TINY: dict[str, Groups] = {"tiny": [[(40, 30), (3,)]], "tiny in 2 groups": [[(40, 30)], [(3,)]]}
TINY |= {f"{numel} in 2 tensors": even(numel, 2) for numel in (300, 600)}
"""Two models and two sizes for a dry run."""
SHAPES = {**MODELS, **SIZES, **TENSORS, **OF_TARGETS, **TINY}

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


def jobs(dry: bool, quick: bool, gpu: bool) -> list[Job]:
    """One model, its parts, the sweeps; then what differs from that in one thing, in two, ...

    The long ends of the sweeps come after what differs in method, dtype and clipping, and after the
    next model. So do the methods that are not among the usual, in as few comparisons as there can
    be; what else there is of them comes at the very end.
    """
    tiny = list(TINY)
    models, sizes, tensors = list(MODELS), list(SIZES), list(TENSORS)
    if dry:
        models, sizes, tensors = tiny[:2], tiny[2:], tiny[2:]
    sweeps = [Job("size", name) for name in sizes] + [Job("tensors", name) for name in tensors]
    long = [job for job in sweeps if count(SHAPES[job.model]) > LONG]
    axes: list[list[Any]] = [models, list(METHODS), list(DTYPES), [True, False]]

    def rank(values: tuple[Any, ...]) -> tuple[int, ...]:
        places = [axis.index(value) for axis, value in zip(axes, values, strict=True)]
        return sum(place > 0 for place in places), *places

    every = [Job("model", *values) for values in sorted(product(*axes), key=rank)]
    usual = [job for job in every if job.method in USUAL]
    near = 1 + sum(len(axis) - 1 for axis in (USUAL, *axes[2:]))  # of the first model
    rare, few = [job for job in every if job.method not in USUAL], len(METHODS) - len(USUAL)
    # A CPU compiles for 40 s where there are 161 tensors.
    ways = product(("foreach", "fused"), (True, False), models[:2])
    compiled = [Job("compiled", model, clip=clip, compiled=how) for how, clip, model in ways]
    if not (gpu or dry):
        compiled = [Job("compiled", f"{2**23} in 16 tensors", compiled="foreach")]
    short = [job for job in sweeps if job not in long]
    found = [usual[0], Job("parts", models[0]), *short, *usual[1:near], *compiled[:1]]
    if quick:
        return found
    found += [usual[near], *rare[:few]]
    return [*found, *long, *compiled[1:], *usual[near + 1 :], *rare[few:]]

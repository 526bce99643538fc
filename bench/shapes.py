"""Shapes of the parameters of known models, and of two sweeps, as lists of param groups."""

from __future__ import annotations

from math import prod

Shape = tuple[int, ...]
Groups = list[list[Shape]]


def gpt(layers: int, width: int, context: int, vocabulary: int = 50257) -> list[Shape]:
    """GPT-2 with any depth and width; the output layer is the embedding."""
    block = [
        *[(width,), (width,)],  # norm
        *[(width, 3 * width), (3 * width,), (width, width), (width,)],  # attention
        *[(width,), (width,)],
        *[(width, 4 * width), (4 * width,), (4 * width, width), (width,)],
    ]
    return [(vocabulary, width), (context, width), *block * layers, (width,), (width,)]


def vit(layers: int, width: int, patch: int, image: int, classes: int = 1000) -> list[Shape]:
    """A vision transformer of square images."""
    block = [
        *[(width,), (width,)],  # norm
        *[(3 * width, width), (3 * width,), (width, width), (width,)],  # attention
        *[(width,), (width,)],
        *[(4 * width, width), (4 * width,), (width, 4 * width), (width,)],
    ]
    tokens = (image // patch) ** 2 + 1
    inputs = [(1, 1, width), (1, tokens, width), (width, 3, patch, patch), (width,)]
    return [*inputs, *block * layers, (width,), (width,), (classes, width), (classes,)]


def resnet50() -> list[Shape]:
    """ResNet-50 with 1000 classes."""
    shapes = _convolution(3, 64, 7)
    channels = 64
    for width, blocks in [(64, 3), (128, 4), (256, 6), (512, 3)]:
        for block in range(blocks):
            shapes += _convolution(channels, width, 1)
            shapes += _convolution(width, width, 3)
            shapes += _convolution(width, 4 * width, 1)
            if block == 0:
                shapes += _convolution(channels, 4 * width, 1)
            channels = 4 * width
    return [*shapes, (1000, channels), (1000,)]


def _convolution(inputs: int, outputs: int, size: int) -> list[Shape]:
    """A convolution without bias and its batch norm."""
    return [(outputs, inputs, size, size), (outputs,), (outputs,)]


def split(shapes: list[Shape], groups: int) -> Groups:
    """The same tensors dealt to some groups."""
    return [shapes[first::groups] for first in range(groups)]


def even(numel: int, tensors: int) -> Groups:
    """One group of equal vectors."""
    return [[(numel // tensors,)] * tensors]


def count(groups: Groups) -> int:
    """Parameters."""
    return sum(prod(shape) for group in groups for shape in group)


GPT2 = gpt(layers=12, width=768, context=1024)

# The first are the most important.
MODELS: dict[str, Groups] = {
    "ResNet-50": [resnet50()],
    "GPT-2 124M": [GPT2],
    "3000 tensors of 3500": even(3000 * 3500, 3000),
    "ViT-B": [vit(layers=12, width=768, patch=16, image=224)],
    "GPT-2 124M in 50 groups": split(GPT2, 50),
    "GPT 1.3B": [gpt(layers=24, width=2048, context=2048)],
}
SIZES: dict[str, Groups] = {
    f"{2**power} in 16 tensors": even(2**power, 16) for power in (14, 17, 20, 23, 26, 28)
}
TENSORS: dict[str, Groups] = {
    f"2**22 in {count} tensors": even(2**22, count) for count in (1, 8, 64, 512, 4096)
}
SMALL: dict[str, Groups] = {
    "1 M in 26 tensors": [[(256, 256), (256,)] * 12 + [(1000, 256), (1000,)]],
    "1 M in 500 tensors": even(2**20, 500),
}
OF_TARGETS: dict[str, Groups] = {
    "GPT-2 124M": [GPT2],
    "144 tensors of 264000": even(144 * 264000, 144),
    "3000 tensors of 3500": even(3000 * 3500, 3000),
    "10 tensors of 1000": even(10 * 1000, 10),
}
TINY: dict[str, Groups] = {
    "tiny": [[(40, 30), (3,)]],
    "tiny in 2 groups": [[(40, 30)], [(3,)]],
}
TINY_SWEEP: dict[str, Groups] = {"300 in 2 tensors": even(300, 2), "600 in 2 tensors": even(600, 2)}


def of_targets(dry: bool) -> dict[str, Groups]:
    """Models that are large, one of many tensors, and a small one, of which a step is overhead."""
    return {**TINY, **TINY_SWEEP} if dry else OF_TARGETS

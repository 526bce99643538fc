"""Shapes of the parameters of known models, as lists of param groups."""

from __future__ import annotations

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


GPT2 = gpt(layers=12, width=768, context=1024)

# The first are the most important.
MODELS: dict[str, Groups] = {
    "GPT-2 124M": [GPT2],
    "GPT-2 124M in 50 groups": split(GPT2, 50),
    "3000 tensors of 3500": [[(3500,)] * 3000],
    "GPT 1.3B": [gpt(layers=24, width=2048, context=2048)],
    "ResNet-50": [resnet50()],
}
TINY: dict[str, Groups] = {
    "tiny": [[(40, 30), (30,), (3,)]],
    "tiny in 2 groups": [[(40, 30)], [(30,), (3,)]],
}

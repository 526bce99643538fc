"""A regression to train in a moment, the loop that is the oracle, and how close is equal.

Everything is float64, also under mixed precision, whose autocast leaves float64 alone: what is
tested is who unscales, clips, skips and steps in which order, and a small tolerance sees it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ExponentialLR, LRScheduler
from torch.utils.data import DataLoader, TensorDataset

import fusedreg

Make = Callable[[Iterable[Any]], Optimizer]
"""What makes an optimizer of parameters or groups."""

# With Adam's own eps, 1e-8, a step hardly depends on the size of the gradients, and a clip or an
# unscaling that is missing or done twice would not show.
OPTIONS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 1e-3, "momentum": 0.9, "weight_decay": 0.1},
    "Adam": {"lr": 1e-3, "eps": 0.1, "weight_decay": 0.1},
    "AdamW": {"lr": 1e-3, "eps": 0.1, "weight_decay": 0.1},
}
CLIP = 0.25
"""Far below the gradient norm of every step, so that every step is clipped; `by_hand` checks it."""

STEPS = 8
OVERFLOW = 3
"""The batch that overflows in the tests with a GradScaler."""

TOLERANCE = 1e-10
"""By how much a parameter may differ after STEPS.

One step of fusedreg and one of torch.optim differ by at most 4 ulp of a parameter, which is below
2: 1.8e-15. From step to step a difference e grows to at most 3.6 e: it moves the gradient by L e,
with the curvature L at most 64 (measured: 9 for the regression here, 58 for the BERT), and that the
step by at most 4 lr / eps = 0.04 times as much in Adam, lr / (1 - momentum) = 0.01 times in SGD.
So 1.8e-15 * (1 + 3.6 + ... + 3.6^8) = 7e-11. A step too many, too few, unclipped or scaled twice
moves some parameter by more than 1e-4.
"""


def ours(name: str, **more: Any) -> Make:
    return partial(getattr(fusedreg, name), **OPTIONS[name], **more)


def torchs(name: str, **more: Any) -> Make:
    return partial(getattr(torch.optim, name), **OPTIONS[name], **more)


def regression() -> nn.Module:
    """The same network in every call."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()


def loader(overflow: bool = False) -> DataLoader[tuple[Tensor, ...]]:
    """STEPS batches of inputs and targets; with `overflow`, one makes infinite gradients."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(STEPS, 5, 4, dtype=torch.float64, generator=generator)
    y = 1 + x.sum(dim=-1, keepdim=True)
    if overflow:
        y[OVERFLOW] = torch.inf
    return DataLoader(TensorDataset(x.flatten(0, 1), y.flatten(0, 1)), batch_size=5)


def loss_of(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    x, y = batch
    return nn.functional.mse_loss(model(x), y)


def decay(optimizer: Optimizer) -> LRScheduler:
    """A schedule that changes the learning rate in every step."""
    return ExponentialLR(optimizer, 0.9)


def by_hand(
    make: Make, *, clip: float | None = None, accumulate: int = 1, overflow: bool = False
) -> nn.Module:
    """The regression, trained by the loop that the trainers wrap, without the overflow."""
    model = regression()
    optimizer = make(model.parameters())
    scheduler = decay(optimizer)
    for index, batch in enumerate(loader()):
        (loss_of(model, batch) / accumulate).backward()
        if (index + 1) % accumulate == 0:
            if clip is not None:
                assert nn.utils.clip_grad_norm_(model.parameters(), clip) > 2 * clip
            if not (overflow and index == OVERFLOW):
                optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return model


def assert_same_training(
    actual: nn.Module, expected: nn.Module, tolerance: float = TOLERANCE
) -> None:
    """Equal parameters after training, each within `tolerance`; 0 means bit for bit."""
    pairs = zip(actual.state_dict().items(), expected.state_dict().values(), strict=True)
    for (name, a), e in pairs:
        torch.testing.assert_close(a, e, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")

"""A small network on the digits data, trained by torch.optim and by fusedreg side by side.

Both start from the same weights and see the same batches and dropout masks, in float64. There a
step rounds each parameter by about 1e-16, so over about a thousand steps two right implementations
stay together to many digits, while a wrong formula parts them by far more than the tolerance. How
much the training itself amplifies a rounding is measured, not assumed: torch.optim is run a second
time from initial weights that differ in their last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_, parameters_to_vector

import fusedreg
from fusedreg.demo.comparison import Comparison
from fusedreg.demo.progress import Track

SEED = 0
BATCH = 64
PATIENCE = 10
"""Epochs without a better validation loss after which training stops."""

PARAMETER_TOLERANCE = 1e-9
"""Rounding alone accumulates to steps * 1e-16 < 1e-12; the rest is room for its amplification."""

ACCURACY_FLOOR = 0.95
ZERO_SHARE_FLOOR = 0.25
"""Share of the weights that a proximal run makes exactly 0; every other run makes none."""

CLIPPED_SHARE_FLOOR = 0.25
"""Share of the steps that clipping must shorten, or its comparison would be empty."""


class Recipe(NamedTuple):
    """One way to train: an optimizer, which is a class name of both libraries, and penalties."""

    name: str
    optimizer: str
    settings: Mapping[str, float]
    weight_decay: float = 0.0
    l1: float = 0.0
    l1_mode: str = "prox"
    max_grad_norm: float | None = None

    @property
    def is_prox(self) -> bool:
        """Whether it must make exact zeros; torch.optim has no equal then."""
        return self.l1 > 0 and self.l1_mode == "prox"


ADAM = {"lr": 3e-3}
SGD = {"lr": 0.1, "momentum": 0.9}

# L1 in the loss is trained by SGD. Under Adam its jumps of sign at 0 make training chaotic: torch's
# own result then moves by 0.03 if the last bit of the initial weights does, and there would be
# nothing to compare.
RECIPES = (
    Recipe("no penalty", "Adam", ADAM),
    Recipe("L2, coupled", "Adam", ADAM, weight_decay=1e-3),
    Recipe("decoupled decay", "AdamW", ADAM, weight_decay=0.1),
    Recipe("gradient clipping", "SGD", SGD, max_grad_norm=0.25),
    Recipe("L1 in the loss", "SGD", SGD, l1=1e-3, l1_mode="subgradient"),
    Recipe("L1, prox", "SGD", SGD, l1=1e-3),
    Recipe("elastic net, prox", "Adam", ADAM, l1=1e-3, weight_decay=1e-3),
)


class Data(NamedTuple):
    """Images (n x 64, from 0 to 1) and labels of each split."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


class Run(NamedTuple):
    """What training gave, at the epoch with the best validation loss."""

    parameters: Tensor
    weights: Tensor
    accuracy: float
    epochs: int
    clipped_share: float

    @property
    def zeros(self) -> int:
        """Number of weights that are exactly 0."""
        return int((self.weights == 0).sum())


class Pair(NamedTuple):
    """One recipe by fusedreg, and by torch.optim where it has an equal."""

    recipe: Recipe
    ours: Run
    torch: Run | None = None
    torch_last_bit: Run | None = None

    @property
    def difference(self) -> float | None:
        """Largest difference of a parameter between fusedreg and torch.optim."""
        return _difference(self.torch, self.ours)

    @property
    def last_bit_difference(self) -> float | None:
        """Largest difference of torch.optim to itself, from initial weights one bit apart."""
        return _difference(self.torch, self.torch_last_bit)


def _difference(one: Run | None, other: Run | None) -> float | None:
    if one is None or other is None:
        return None
    return (one.parameters - other.parameters).abs().max().item()


def load() -> Data:
    """1797 images of 8 x 8 pixels: 60 % to train on, 20 % to stop by, 20 % to report."""
    bunch = load_digits()
    images, labels = torch.from_numpy(bunch.data / 16), torch.from_numpy(bunch.target)
    rest, test = train_test_split(
        range(len(labels)), test_size=360, stratify=labels, random_state=SEED
    )
    train, validation = train_test_split(
        rest, test_size=360, stratify=labels[rest], random_state=SEED
    )
    return Data(*((images[rows], labels[rows]) for rows in (train, validation, test)))


def network() -> nn.Sequential:
    """64 pixels, 64 hidden units with dropout, 10 classes; biases start at 0."""
    hidden, output = nn.Linear(64, 64), nn.Linear(64, 10)
    for layer in (hidden, output):
        nn.init.zeros_(layer.bias)
    return nn.Sequential(hidden, nn.ReLU(), nn.Dropout(0.2), output).double()


Step = Callable[[Tensor], Tensor | None]
"""From the loss to updated parameters; returns the gradient norm where it clips."""


def by_torch(recipe: Recipe, model: nn.Module) -> Step:
    """A step of torch.optim, with what it leaves to the training loop."""
    groups = fusedreg.param_groups(model, weight_decay=recipe.weight_decay)
    optimizer = getattr(torch.optim, recipe.optimizer)(groups, **recipe.settings)

    def step(loss: Tensor) -> Tensor | None:
        optimizer.zero_grad()
        if recipe.l1:
            loss = loss + recipe.l1 * sum(weight.abs().sum() for weight in weights_of(model))
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        norm = None
        if recipe.max_grad_norm is not None:
            norm = clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
        optimizer.step()
        return norm

    return step


def by_fusedreg(recipe: Recipe, model: nn.Module) -> Step:
    """The same step of fusedreg."""
    optimizer = getattr(fusedreg, recipe.optimizer)(
        fusedreg.param_groups(model, weight_decay=recipe.weight_decay, l1=recipe.l1),
        **recipe.settings,
        l1_mode=recipe.l1_mode,
        max_grad_norm=recipe.max_grad_norm,
    )

    def step(loss: Tensor) -> Tensor | None:
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        optimizer.step()
        norm: Tensor | None = optimizer.grad_norm
        return norm

    return step


def weights_of(model: nn.Module) -> list[Tensor]:
    """The parameters that are penalised: all but the biases."""
    return [param for param in model.parameters() if param.dim() > 1]


def train(
    data: Data,
    recipe: Recipe,
    make_step: Callable[[Recipe, nn.Module], Step],
    epochs: Iterable[int],
    *,
    flip_last_bit: bool = False,
) -> Run:
    """Train with dropout until the validation loss has not improved for PATIENCE epochs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)  # weights, batches and dropout masks all follow from it
        model = network()
        if flip_last_bit:
            with torch.no_grad():
                for weight in weights_of(model):
                    weight.copy_(torch.nextafter(weight, torch.full_like(weight, torch.inf)))
        step = make_step(recipe, model)
        norms: list[Tensor] = []
        best = (float("inf"), 0, model.state_dict())
        for epoch in epochs:
            norms += train_epoch(model, step, *data.train)
            loss, _ = evaluate(model, *data.validation)
            if loss < best[0]:
                best = (loss, epoch, deepcopy(model.state_dict()))
            elif epoch - best[1] >= PATIENCE:
                break
    model.load_state_dict(best[2])
    limit = float("inf") if recipe.max_grad_norm is None else recipe.max_grad_norm
    clipped = sum(bool(norm > limit) for norm in norms)
    return Run(
        parameters=parameters_to_vector(model.parameters()).detach(),
        weights=parameters_to_vector(weights_of(model)).detach(),
        accuracy=evaluate(model, *data.test)[1],
        epochs=epoch + 1,
        clipped_share=clipped / max(len(norms), 1),
    )


def train_epoch(model: nn.Module, step: Step, images: Tensor, labels: Tensor) -> list[Tensor]:
    """One pass over the shuffled data; the gradient norms, where the step computes them."""
    model.train()
    norms = []
    for batch in torch.split(torch.randperm(len(labels)), BATCH):
        norm = step(cross_entropy(model(images[batch]), labels[batch]))
        if norm is not None:
            norms.append(norm)
    return norms


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Mean loss and accuracy, without dropout."""
    model.eval()
    scores = model(images)
    accuracy = (scores.argmax(1) == labels).double().mean()
    return cross_entropy(scores, labels).item(), accuracy.item()


def compare(data: Data, recipe: Recipe, max_epochs: int, track: Track) -> Pair:
    """Train one recipe by fusedreg, and twice by torch.optim if that can follow it."""

    def epochs(library: str) -> Iterable[int]:
        return track(range(max_epochs), f"digits: {recipe.name}, {library}")

    ours = train(data, recipe, by_fusedreg, epochs("fusedreg"))
    if recipe.is_prox:
        return Pair(recipe, ours)
    theirs = train(data, recipe, by_torch, epochs("torch"))
    again = train(data, recipe, by_torch, epochs("torch, last bit"), flip_last_bit=True)
    return Pair(recipe, ours, theirs, again)


def training_count() -> int:
    """How many trainings it takes to compare every recipe."""
    return sum(1 if recipe.is_prox else 3 for recipe in RECIPES)


def comparisons(pairs: Sequence[Pair]) -> list[Comparison]:
    """What must hold of every recipe."""
    return [comparison for pair in pairs for comparison in _comparisons(pair)]


def _comparisons(pair: Pair) -> Iterator[Comparison]:
    recipe, ours = pair.recipe, pair.ours

    def must(what: str, value: float, relation: str, bound: float) -> Comparison:
        return Comparison(f"digits, {recipe.name}: {what}", value, relation, bound)

    yield must("test accuracy", ours.accuracy, ">=", ACCURACY_FLOOR)
    if recipe.is_prox:
        share = ours.zeros / ours.weights.numel()
        yield must("share of weights exactly 0", share, ">=", ZERO_SHARE_FLOOR)
    else:
        yield must("weights exactly 0", ours.zeros, "<=", 0)
    if recipe.max_grad_norm is not None:
        yield must("share of steps clipped", ours.clipped_share, ">=", CLIPPED_SHARE_FLOOR)
    if pair.torch is not None and pair.difference is not None:
        apart = abs(ours.epochs - pair.torch.epochs)
        yield must("largest difference to torch", pair.difference, "<=", PARAMETER_TOLERANCE)
        yield must("epochs trained more or less than torch", apart, "<=", 0)

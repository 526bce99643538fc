"""docs/misconceptions.md, every number of its tables measured anew: one test for each table.

Those of the newer classes and options are in test_misconceptions_of_others.py.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable

import pytest
import torch
from sklearn.linear_model import LassoCV, lasso_path
from sklearn.model_selection import KFold
from torch import Tensor, nn
from torch.nn.functional import layer_norm, mse_loss
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

import fusedreg
from fusedreg.demo import diabetes

from claims import (
    MEASURED,
    PAGE,
    Numbers,
    agrees,
    descend,
    distance,
    gradient,
    lasso,
    measures,
    ridge,
    tables,
    towards,
    weight,
    zeros,
)


def test_every_table_has_its_test_and_every_test_its_table() -> None:
    importlib.import_module("test_misconceptions_of_others")
    page = PAGE.read_text()
    assert set(tables()) == MEASURED
    assert page.count("\n|---") == page.count("\n### ") == len(MEASURED)


@pytest.mark.parametrize(
    ("printed", "measured", "same"),
    [
        ("0.25", 0.2549, True),
        ("0.25", 0.2551, False),
        ("1.5e-5", 1.54e-5, True),
        ("1.5e-5", 1.56e-5, False),
        ("< 1e-12", 9e-13, True),
        ("< 1e-12", 2e-12, False),
        ("< 1e-12", math.nan, False),
        ("3", 3, True),
        ("3", 3.01, False),
        ("NaN", "NaN", True),
    ],
)
def test_a_cell_agrees_within_its_digits(printed: str, measured: float | str, same: bool) -> None:
    assert agrees(printed, measured) is same


# ---- L2 and weight decay ------------------------------------------------------------------------


@measures
def test_factor_two() -> Numbers:
    def with_square(w: Tensor) -> Tensor:
        w = w.requires_grad_()
        (square,) = torch.autograd.grad(0.1 * w.pow(2).sum(), w)
        return gradient(w.detach()) + square

    in_loss = descend(torch.optim.SGD([weight()], lr=0.3), 1000, with_square)
    return {
        f"0.1 ‖w‖² in the loss, and `weight_decay={decay}`": distance(
            in_loss, descend(torch.optim.SGD([weight()], lr=0.3, weight_decay=decay), 1000)
        )
        for decay in (0.1, 0.2)
    }


@measures
def test_factor_of_a_step() -> Numbers:
    def after_one_step(cls: Callable[..., Optimizer], weight_decay: float) -> float:
        optimizer = cls([weight(1.0)], lr=0.1, weight_decay=weight_decay)
        return descend(optimizer, 1, torch.zeros_like).item()

    cases = [
        (torch.optim.SGD, 0.01),
        (torch.optim.AdamW, 0.01),
        (torch.optim.Adam, 0.01),
        (torch.optim.Adam, 0.0001),
    ]
    return {
        f"`{cls.__name__}`, `weight_decay={decay}`": after_one_step(cls, decay)
        for cls, decay in cases
    }


@measures
def test_decoupled_momentum() -> Numbers:
    def solve(momentum: float) -> Tensor:
        optimizer = fusedreg.SGD(
            [weight()], lr=0.2, momentum=momentum, weight_decay=0.1, decoupled_weight_decay=True
        )
        return descend(optimizer, 2000)

    return {
        "momentum 0, from ridge of 0.1": distance(solve(0), ridge(0.1)),
        "momentum 0.9, from ridge of 0.1": distance(solve(0.9), ridge(0.1)),
        "momentum 0.9, from ridge of 0.01": distance(solve(0.9), ridge(0.01)),
    }


@measures
def test_decay_that_grows() -> Numbers:
    def after(cls: Callable[..., Optimizer], steps: int) -> float:
        optimizer = cls([weight(1.0)], lr=1.0, weight_decay=2.5)
        return descend(optimizer, steps, torch.zeros_like).item()

    return {
        "`SGD`, after 1 step": after(torch.optim.SGD, 1),
        **{f"`SGD`, after {steps} steps": after(torch.optim.SGD, steps) for steps in (2, 3, 4)},
        "`AdamW`, after 4 steps": after(torch.optim.AdamW, 4),
    }


@measures
def test_mse_has_no_half() -> Numbers:
    X, y, _ = diabetes.load()

    def mse_gradient(w: Tensor) -> Tensor:
        w = w.requires_grad_()
        return torch.autograd.grad(mse_loss(X @ w, y), w)[0]

    def solve(**penalty: float) -> Tensor:
        return descend(
            fusedreg.SGD([weight()], lr=0.1, momentum=0.9, **penalty), 1000, mse_gradient
        )

    return {
        "`Lasso(0.1)` from `l1=0.1`": distance(lasso(0.1), solve(l1=0.1)),
        "`Lasso(0.1)` from `l1=0.2`": distance(lasso(0.1), solve(l1=0.2)),
        "`Ridge(0.1 * n)` from `weight_decay=0.1`": distance(ridge(0.1), solve(weight_decay=0.1)),
        "`Ridge(0.1 * n)` from `weight_decay=0.2`": distance(ridge(0.1), solve(weight_decay=0.2)),
    }


@measures
def test_who_is_decayed() -> Numbers:
    unused, frozen_out, bias = weight(1.0), weight(1.0), weight(1.0)
    groups = [{"params": [unused, frozen_out]}, {"params": [bias], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.1, weight_decay=0.1)
    for _ in range(10):
        frozen_out.grad, bias.grad = torch.zeros_like(frozen_out), torch.zeros_like(bias)
        optimizer.step()
    return {
        "`.grad` is None": unused.item(),
        "`.grad` is 0": frozen_out.item(),
        "in a group with `weight_decay=0`": bias.item(),
    }


@measures
def test_before_a_norm_layer() -> Numbers:
    X = torch.randn(64, 8, dtype=torch.float64)
    y = torch.randn(64, 4, dtype=torch.float64)
    w = torch.randn(4, 8, dtype=torch.float64)

    def loss_and_gradient(w: Tensor) -> tuple[Tensor, Tensor]:
        w = w.clone().requires_grad_()
        loss = mse_loss(layer_norm(X @ w.T, [4], eps=0), y)
        return loss.detach(), torch.autograd.grad(loss, w)[0]

    (loss, grad), (same_loss, small_grad) = loss_and_gradient(w), loss_and_gradient(10 * w)
    return {
        "change of the loss": (same_loss - loss).abs().item(),
        "norm of the gradient at W over that at 10 W": (grad.norm() / small_grad.norm()).item(),
    }


@measures
def test_low_precision() -> Numbers:
    def changed(dtype: torch.dtype) -> int:
        start = torch.linspace(0.01, 1, 1000).to(dtype)
        optimizer = torch.optim.AdamW([nn.Parameter(start.clone())], lr=1e-3, weight_decay=1e-2)
        return int((descend(optimizer, 2000, torch.zeros_like) != start).sum())

    return {str(dtype)[6:]: changed(dtype) for dtype in (torch.float32, torch.bfloat16)}


# ---- Adam and AdamW -----------------------------------------------------------------------------


@measures
def test_noise_and_decay() -> Numbers:
    def left(cls: Callable[..., Optimizer], size: float) -> float:
        generator = torch.Generator().manual_seed(0)

        def noise(w: Tensor) -> Tensor:
            half = size * torch.randn(len(w) // 2, dtype=w.dtype, generator=generator)
            return torch.cat((half, -half))  # so that the mean shows the decay alone

        optimizer = cls([weight(*[1.0] * 2000)], lr=0.01, weight_decay=0.05)
        return descend(optimizer, 1000, noise).mean().item()

    return {
        f"`{cls.__name__}`, noise {size}": left(cls, size)
        for cls in (torch.optim.SGD, torch.optim.AdamW, torch.optim.Adam)
        for size in (0.1, 10)
    }


@measures
def test_box() -> Numbers:
    measured = {}
    for cls in (torch.optim.Adam, torch.optim.AdamW):
        optimizer = cls([weight(0.0, 0.0)], lr=0.01, betas=(0.9, 0.99), weight_decay=1.0)
        w = descend(optimizer, 3000, towards(3.0, 0.5), cosine=True)
        for best, found in zip(("3", "0.5"), w.tolist(), strict=True):
            measured[f"`{cls.__name__}`, best at {best}"] = found
    return measured


@measures
def test_schedule_of_decay() -> Numbers:
    def left(cosine: bool) -> float:
        optimizer = torch.optim.AdamW([weight(1.0)], lr=0.01, weight_decay=0.1)
        return descend(optimizer, 1000, torch.zeros_like, cosine).item()

    return {"constant lr": left(False), "cosine to 0": left(True)}


@measures
def test_loss_scale() -> Numbers:
    def solve(cls: Callable[..., Optimizer], scale: float) -> Tensor:
        optimizer = cls([weight()], lr=0.01, weight_decay=0.1)
        return descend(optimizer, 1000, lambda w: scale * gradient(w), cosine=True)

    return {
        f"`{cls.__name__}`": distance(solve(cls, 1), solve(cls, 1000))
        for cls in (torch.optim.AdamW, torch.optim.Adam)
    }


@measures
def test_sparse_gradients() -> Numbers:
    def outcome(module: object, name: str) -> str:
        table = nn.Embedding(4, 2, sparse=True)
        table(torch.tensor([1])).sum().backward()
        try:
            getattr(module, name)(table.parameters()).step()
        except RuntimeError:
            return "RuntimeError"
        return "a step"

    return {
        "`torch.optim.Adam`": outcome(torch.optim, "Adam"),
        "`fusedreg.Adam`": outcome(fusedreg, "Adam"),
        "`torch.optim.SparseAdam`": outcome(torch.optim, "SparseAdam"),
    }


# ---- L1 -----------------------------------------------------------------------------------------


@measures
def test_l1_in_the_loss() -> Numbers:
    def in_loss(w: Tensor) -> Tensor:
        return gradient(w) + 0.1 * w.sign()

    return {
        "`torch.optim.SGD`, in the loss": zeros(
            descend(torch.optim.SGD([weight()], lr=0.1), 5000, in_loss)
        ),
        "`torch.optim.Adam`, in the loss": zeros(
            descend(torch.optim.Adam([weight()], lr=1e-3), 5000, in_loss)
        ),
        "`fusedreg.SGD(l1=0.1)`": zeros(
            descend(fusedreg.SGD([weight()], lr=0.2, momentum=0.9, l1=0.1), 1000)
        ),
        "`fusedreg.Adam(l1=0.1)`": zeros(
            descend(fusedreg.Adam([weight()], lr=0.01, betas=(0.9, 0.99), l1=0.1), 2000)
        ),
        "`Lasso(0.1)`": zeros(lasso(0.1)),
    }


@measures
def test_oscillation() -> Numbers:
    def largest(**options: object) -> float:
        optimizer = fusedreg.SGD([weight(1.0)], l1=0.1, **options)  # type: ignore[arg-type]
        descend(optimizer, 2000, towards(0.05))
        return max(descend(optimizer, 1, towards(0.05)).abs().item() for _ in range(100))

    return {
        "in the loss, lr 0.1": largest(lr=0.1, l1_mode="subgradient"),
        "in the loss, lr 0.01": largest(lr=0.01, l1_mode="subgradient"),
        "prox, lr 0.1": largest(lr=0.1),
    }


@measures
def test_threshold_and_momentum() -> Numbers:
    def solve(l1_mode: str) -> Tensor:
        return descend(
            fusedreg.SGD([weight()], lr=0.2, momentum=0.9, l1=0.1, l1_mode=l1_mode), 2000
        )

    plain, right = solve("decoupled"), solve("prox")
    return {
        "threshold lr · 0.1, from `Lasso(0.1)`": distance(plain, lasso(0.1)),
        "threshold lr · 0.1, from `Lasso(0.01)`": distance(plain, lasso(0.01)),
        'threshold of `l1_mode="prox"`, from `Lasso(0.1)`': distance(right, lasso(0.1)),
    }


@measures
def test_threshold_and_adam() -> Numbers:
    def solve(l1: float, l1_mode: str) -> Tensor:
        optimizer = fusedreg.Adam([weight()], lr=0.01, betas=(0.9, 0.99), l1=l1, l1_mode=l1_mode)
        return descend(optimizer, 3000, cosine=True)

    plain = solve(0.1, "decoupled")
    return {
        "threshold lr · 0.1, from `Lasso(0.1)`": distance(plain, lasso(0.1)),
        "threshold lr · 0.1, from least squares": distance(plain, ridge(0)),
        "threshold lr · 1.01, nonzeros": 10 - zeros(solve(1.01, "decoupled")),
        'threshold of `l1_mode="prox"`, from `Lasso(0.1)`': distance(
            solve(0.1, "prox"), lasso(0.1)
        ),
    }


@measures
def test_what_becomes_zero() -> Numbers:
    w = lasso(0.1)
    return {
        "zeros without penalty": zeros(ridge(0)),
        "zeros with `l1=0.1`": zeros(w),
        "largest gradient of a zero": gradient(w)[w == 0].abs().max().item(),
        "smallest gradient of the others": gradient(w)[w != 0].abs().min().item(),
    }


@measures
def test_average_of_sparse_weights() -> Numbers:
    X, y, _ = diabetes.load()
    generator = torch.Generator().manual_seed(0)

    def of_a_batch(w: Tensor) -> Tensor:
        rows = torch.randint(len(y), (64,), generator=generator)
        return X[rows].T @ (X[rows] @ w - y[rows]) / len(rows)

    optimizer = fusedreg.SGD([weight()], lr=0.05, l1=0.1)
    descend(optimizer, 1000, of_a_batch)
    iterates = torch.stack([descend(optimizer, 1, of_a_batch).clone() for _ in range(500)])
    return {
        "zeros of an iterate, in the mean": (iterates == 0).sum(1).double().mean().item(),
        "zeros of the average": zeros(iterates.mean(0)),
    }


# ---- clipping -----------------------------------------------------------------------------------


@measures
def test_clipping_and_penalties() -> Numbers:
    def solve(**options: float) -> float:
        optimizer = fusedreg.SGD([weight(4.0, 3.0)], lr=0.1, **options)
        return descend(optimizer, 1000, towards(4.0, 3.0))[0].item()

    return {
        "`weight_decay=0.5`": solve(weight_decay=0.5),
        "`weight_decay=0.5`, clipped at 1": solve(weight_decay=0.5, max_grad_norm=1.0),
        "`l1=1.5`": solve(l1=1.5),
        "`l1=1.5`, clipped at 1": solve(l1=1.5, max_grad_norm=1.0),
    }


@measures
def test_one_norm() -> Numbers:
    def layers() -> list[nn.Parameter]:
        pair = [weight(0.0, 0.0), weight(0.0, 0.0)]
        for param, values in zip(pair, ([3.0, 0.0], [0.0, 0.4]), strict=True):
            param.grad = torch.tensor(values, dtype=param.dtype)
        return pair

    together, apart = layers(), layers()
    returned = clip_grad_norm_(together, 1.0)
    for param in apart:
        clip_grad_norm_([param], 1.0)
    return {
        "returned": returned.item(),
        "second gradient, one call for both": together[1].grad.norm().item(),
        "second gradient, a call for each": apart[1].grad.norm().item(),
    }


@measures
def test_clipping_and_infinity() -> Numbers:
    def not_finite(values: list[float]) -> int:
        param = weight(0.0, 0.0, 0.0)
        param.grad = torch.tensor(values, dtype=param.dtype)
        clip_grad_norm_([param], 1.0)
        return int(param.grad.isnan().sum())

    optimizer = fusedreg.SGD([weight(0.0, 0.0, 0.0)], max_grad_norm=1.0, skip_nonfinite=True)
    stepped = descend(optimizer, 1, lambda w: torch.tensor([math.inf, 1.0, 1.0], dtype=w.dtype))
    return {
        "NaN gradients of ∞, 1, 1": not_finite([math.inf, 1.0, 1.0]),
        "NaN gradients of NaN, 1, 1": not_finite([math.nan, 1.0, 1.0]),
        "NaN weights with `skip_nonfinite=True`": int(stepped.isnan().sum()),
    }


@measures
def test_clipping_and_loss_scale() -> Numbers:
    def norm(unscale_first: bool) -> float:
        scale = 65536.0
        param = weight(0.0, 0.0)
        param.grad = torch.tensor([1.2, 1.6], dtype=param.dtype) * scale
        if unscale_first:
            param.grad /= scale
        clip_grad_norm_([param], 1.0)
        if not unscale_first:
            param.grad /= scale
        return param.grad.norm().item()

    return {"clipped, then unscaled": norm(False), "unscaled, then clipped": norm(True)}


@measures
def test_clipping_and_adam() -> Numbers:
    def solve(make: Callable[[nn.Parameter], Optimizer], scale: float) -> Tensor:
        return descend(make(weight()), 100, lambda w: scale * gradient(w))

    makes: dict[str, Callable[[nn.Parameter], Optimizer]] = {
        "`SGD`": lambda w: torch.optim.SGD([w], lr=0.1),
        "`Adam`": lambda w: torch.optim.Adam([w], lr=0.01, eps=0),
    }
    return {name: distance(solve(make, 1), solve(make, 1e-3)) for name, make in makes.items()}


@measures
def test_clipping_and_float16() -> Numbers:
    def huge() -> nn.Parameter:
        param = nn.Parameter(torch.zeros(100, dtype=torch.float16))
        param.grad = torch.full_like(param, 6e4)
        return param

    param = huge()
    clip_grad_norm_([param], 1.0)
    optimizer = fusedreg.SGD([huge()], max_grad_norm=1.0)
    optimizer.step()
    return {
        "largest gradient after `clip_grad_norm_`": param.grad.max().item(),
        "`grad_norm` of `fusedreg.SGD`": optimizer.grad_norm.item(),
    }


# ---- beside the optimizer -----------------------------------------------------------------------


@measures
def test_dropped_units() -> Numbers:
    def second_step(make: Callable[[nn.Parameter], Optimizer]) -> float:
        optimizer = make(weight(0.0))
        first = descend(optimizer, 1, torch.ones_like).item()
        return descend(optimizer, 1, torch.zeros_like).item() - first

    makes: dict[str, Callable[[nn.Parameter], Optimizer]] = {
        "`SGD`": lambda w: torch.optim.SGD([w], lr=0.1),
        "`SGD`, momentum 0.9": lambda w: torch.optim.SGD([w], lr=0.1, momentum=0.9),
        "`Adam`": lambda w: torch.optim.Adam([w], lr=0.1),
    }
    return {name: second_step(make) for name, make in makes.items()}


@measures
def test_choosing_by_training_error() -> Numbers:
    X, y, _ = diabetes.load()
    X, y = X.numpy(), y.numpy()
    l1s = torch.logspace(-3, 0, 13, dtype=torch.float64).numpy()
    alphas, coefficients, _ = lasso_path(X, y, alphas=l1s, tol=1e-8)
    training = ((y[:, None] - X @ coefficients) ** 2).mean(0)
    folds = KFold(5, shuffle=True, random_state=0)
    return {
        "smallest training error": float(alphas[training.argmin()]),
        "smallest cross-validated error": LassoCV(alphas=l1s, cv=folds, tol=1e-8).fit(X, y).alpha_,
    }

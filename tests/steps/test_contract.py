"""Optimizers as users write them, of kinds that the package does not have: NAdam and Adadelta.

NAdam keeps a product for each parameter, which begins at 1. Adadelta's gain depends on its old
state. Each is written three times: for kernels, in torch operations, and below as the paper states
it, in float64.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import fusedreg
from fusedreg.cases import shrink
from fusedreg.check.oracle import clip
from fusedreg.kernels.device.language import tl, triton
from fusedreg.kernels.device.rules import (
    Rule,
    adam_moments,
    divide,
    power,
    reciprocal,
    square_root,
)
from fusedreg.optimizers.momentum import average as average_of
from fusedreg.scalars import Count

from cases import PATHS, parameters, run, set_grads
from compare import assert_close, assert_rounds_once, frozen, parameters_of, refused, results

SHAPES = [(5, 3), (), (0,), (67,)]


# ---- NAdam: Dozat (2016), algorithm 2, with torch's schedule of the momentum ---------------------


@triton.jit
def nadam_momentum(beta1, t, momentum_decay):
    base = 0.0 * t + 0.96  # a number alone has no dtype
    return beta1 * (1.0 - 0.5 * power(base, t * momentum_decay))


@triton.jit
def nadam_scalars(options, counts):
    beta1, beta2, eps, momentum_decay = options
    t = counts[0] + 1.0
    mu = nadam_momentum(beta1, t, momentum_decay)
    mu_next = nadam_momentum(beta1, t + 1.0, momentum_decay)
    product = counts[1] * mu
    of_grad = divide(1.0 - mu, 1.0 - product)
    of_moment = divide(mu_next, 1.0 - product * mu_next)
    correction = square_root(1.0 - power(beta2, t))
    scalars = (1.0 - beta1, beta2, 1.0 - beta2, of_grad, of_moment, correction, eps)
    # A constant gradient is its own first moment but for the correction.
    return of_grad + of_moment * (1.0 - power(beta1, t)), scalars, (t, product)


@triton.jit
def nadam(g, states, scalars):
    m, v = adam_moments(g, states[0], states[1], scalars)
    d = divide(square_root(v), scalars[5]) + scalars[6]
    direction = divide(scalars[3] * g + scalars[4] * m, d)
    gain = tl.where(v == 0.0, 0.0, reciprocal(d))
    return tl.where(d == 0.0, 0.0, direction), gain, (m, v)


class OwnNAdam(fusedreg.FusedOptimizer):
    tensor_states = ("exp_avg", "exp_avg_sq")
    counts = MappingProxyType({"step": Count(), "mu_product": Count(1.0, wide=True)})
    device_options = ("betas", "eps", "momentum_decay")

    def __init__(
        self, params, lr=2e-3, betas=(0.9, 0.999), eps=1e-8, momentum_decay=4e-3, **options
    ):
        defaults = {"lr": lr, "betas": betas, "eps": eps, "momentum_decay": momentum_decay}
        super().__init__(params, defaults, **options)

    def device_rule(self, group):
        return Rule(nadam_scalars, nadam, width=7)

    def update(self, settings, state, grad):
        (beta1, beta2), decay = settings["betas"], settings["momentum_decay"]
        step = state["step"] + 1
        mu, mu_next = (beta1 * (1 - 0.5 * 0.96 ** (t * decay)) for t in (step, step + 1))
        product = state["mu_product"] * mu
        of_grad, of_moment = (1 - mu) / (1 - product), mu_next / (1 - product * mu_next)
        m = average_of(state["exp_avg"], grad, 1 - beta1)
        v = beta2 * state["exp_avg_sq"] + (1 - beta2) * grad * grad
        d = v.sqrt() / (1 - beta2**step) ** 0.5 + settings["eps"]
        direction = torch.where(d == 0, 0.0, (of_grad * grad + of_moment * m) / d)
        gain = torch.where(v == 0, 0.0, (of_grad + of_moment * (1 - beta1**step)) / d)
        new = {"step": step, "mu_product": product, "exp_avg": m, "exp_avg_sq": v}
        return direction, gain, new


def nadam_formula(s: Any, g: Tensor, options: Any) -> tuple[Tensor, Tensor]:
    (b1, b2), eps, psi = options["betas"], options["eps"], options["momentum_decay"]
    s["step"] += 1
    mu = [b1 * (1 - 0.96 ** (t * psi) / 2) for t in range(1, int(s["step"]) + 2)]
    s["mu_product"] = float(torch.tensor(mu[:-1], dtype=torch.float64).prod())
    s["exp_avg"] = b1 * s["exp_avg"] + (1 - b1) * g
    s["exp_avg_sq"] = b2 * s["exp_avg_sq"] + (1 - b2) * g**2
    root = torch.sqrt(s["exp_avg_sq"] / (1 - b2 ** s["step"])) + eps
    along_g = (1 - mu[-2]) / (1 - s["mu_product"])
    along_m = mu[-1] / (1 - s["mu_product"] * mu[-1])
    per_unit = (along_g + along_m * (1 - b1 ** s["step"])) / root
    moved = (along_g * g + along_m * s["exp_avg"]) / root
    return moved, torch.where(s["exp_avg_sq"] == 0, 0.0, per_unit)


# ---- Adadelta: Zeiler (2012), algorithm 1, with torch's lr ---------------------------------------


@triton.jit
def adadelta_scalars(options, counts):
    rho, eps = options
    return 1.0, (rho, 1.0 - rho, eps), (counts[0] + 1.0,)


@triton.jit
def adadelta(g, states, scalars):
    rho, rest, eps = scalars
    square = rho * states[0] + rest * g * g
    # The old mean of squared moves: this one is not known yet.
    gain = divide(square_root(states[1] + eps), square_root(square + eps))
    direction = g * gain
    gain = tl.where(square == 0.0, 0.0, gain)
    return direction, gain, (square, rho * states[1] + rest * direction * direction)


class OwnAdadelta(fusedreg.FusedOptimizer):
    tensor_states = ("square_avg", "acc_delta")
    counts = MappingProxyType({"step": Count()})
    device_options = ("rho", "eps")

    def __init__(self, params, lr=1.0, rho=0.9, eps=1e-6, **options):
        super().__init__(params, {"lr": lr, "rho": rho, "eps": eps}, **options)

    def device_rule(self, group):
        return Rule(adadelta_scalars, adadelta, width=3)

    def update(self, settings, state, grad):
        rho, eps = settings["rho"], settings["eps"]
        square = rho * state["square_avg"] + (1 - rho) * grad * grad
        gain = (state["acc_delta"] + eps).sqrt() / (square + eps).sqrt()
        direction = grad * gain
        delta = rho * state["acc_delta"] + (1 - rho) * direction * direction
        new = {"step": state["step"] + 1, "square_avg": square, "acc_delta": delta}
        return direction, torch.where(square == 0, 0.0, gain), new


def adadelta_formula(s: Any, g: Tensor, options: Any) -> tuple[Tensor, Tensor]:
    rho, eps = options["rho"], options["eps"]
    s["square_avg"] = rho * s["square_avg"] + (1 - rho) * g**2
    old = torch.as_tensor(s["acc_delta"], dtype=g.dtype)
    rate = torch.sqrt(old + eps) / torch.sqrt(s["square_avg"] + eps)
    s["acc_delta"] = rho * old + (1 - rho) * (rate * g) ** 2
    return rate * g, torch.where(s["square_avg"] == 0, 0.0, rate)


# ---- both ----------------------------------------------------------------------------------------


class Own(NamedTuple):
    cls: Any
    torch_cls: Any
    options: dict[str, Any]
    formula: Callable[..., tuple[Tensor, Tensor]]

    def make(self, params: Any, path: str, **more: Any) -> Any:
        return self.cls(params, **{**self.options, **PATHS[path], **more})


OWN = {
    # Betas of which few steps show the corrections, and rates at which a misplaced factor shows.
    "nadam": Own(
        OwnNAdam, torch.optim.NAdam, {"lr": 0.05, "betas": (0.8, 0.9), "eps": 1e-3}, nadam_formula
    ),
    "adadelta": Own(
        OwnAdadelta, torch.optim.Adadelta, {"lr": 0.5, "rho": 0.8, "eps": 1e-2}, adadelta_formula
    ),
}
BACKENDS = {"reference": "reference", "device": "reference", "fused": "triton"}

# In each step. About ten operations lead to the direction, then come the penalties and the move: at
# most half an ulp each, and hardly ever all in one direction. Kernels form beta**t to 2 ulp of 1.
# Divided by 1 - beta, at least 0.1, and times a rate of 0.05, that is 1 ulp of a weight.
ULPS = 4


@pytest.fixture(params=OWN)
def own(request: pytest.FixtureRequest) -> Own:
    return OWN[request.param]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("name", "decoupled"), [("nadam", False), ("nadam", True), ("adadelta", False)]
)
def test_steps_as_torch_and_as_the_formula(
    name: str, decoupled: bool, dtype: torch.dtype, path: str
) -> None:
    """With decay and clipping. torch's Adadelta has no decoupled decay."""
    own = OWN[name]
    params, others = (parameters(dtype=dtype, shapes=SHAPES) for _ in range(2))
    more: dict[str, Any] = {"weight_decay": 0.5}
    if decoupled:
        more["decoupled_weight_decay"] = True
    optimizer = own.make(params, path, max_grad_norm=1.0, **more)
    twin = own.torch_cls(others, **own.options, **more, foreach=False)
    expected = stepped_by_formula(own, optimizer, params, steps=5)
    for seed in range(5):
        set_grads(others, seed)
        torch.nn.utils.clip_grad_norm_(others, 1.0, foreach=False)
        twin.step()
    assert optimizer.backend == BACKENDS.get(path, "llvm")
    assert_close(params, expected, ulps=5 * ULPS)
    # torch keeps the product in float32, whose ulp is then that of the direction.
    in_float32 = {"atol": 5 * ULPS * 2.0**-23 * 0.05, "rtol": 0}
    for param, other in zip(params, others, strict=True):
        if own.cls is OwnNAdam and dtype == torch.float64:
            torch.testing.assert_close(param, other, **in_float32)
        else:
            assert_close([param], [other], ulps=5 * 2 * ULPS)
        assert optimizer.state[param].keys() == twin.state[other].keys()


def stepped_by_formula(own: Own, optimizer: Any, params: list[Any], steps: int) -> list[Tensor]:
    """Step `params` by an optimizer, and return what the formula makes of float64 copies."""
    options = optimizer.param_groups[0]
    values = [param.detach().double() for param in params]
    histories: list[Any] = [defaultdict(float) for _ in params]
    for seed in range(steps):
        set_grads(params, seed)
        grads = clip([param.grad.double() for param in params], optimizer.max_grad_norm)
        for index, grad in enumerate(grads):
            values[index] = _one_step(own.formula, values[index], grad, histories[index], options)
        optimizer.step()
    return [value.to(param.dtype) for value, param in zip(values, params, strict=True)]


def _one_step(formula: Any, w: Tensor, g: Tensor, history: Any, options: Any) -> Tensor:
    lr, decay = options["lr"], options["weight_decay"]
    decoupled = options["decoupled_weight_decay"]
    moved, per_unit = formula(history, g if decoupled else g + decay * w, options)
    w = w - lr * (moved + decay * w if decoupled else moved)
    return shrink(w, lr * options["l1"] * per_unit)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_threshold_is_that_of_the_formula(own: Own, dtype: torch.dtype, path: str) -> None:
    params = parameters(dtype=dtype, shapes=SHAPES)
    optimizer = own.make(params, path, l1=0.3, max_grad_norm=2.0)
    expected = stepped_by_formula(own, optimizer, params, steps=5)
    assert optimizer.backend == BACKENDS.get(path, "llvm")
    assert_close(params, expected, ulps=5 * ULPS)
    assert any((param == 0).any() for param in params)


@pytest.mark.parametrize("path", ["reference", "default"])
def test_threshold_solves_the_lasso(own: Own, path: str) -> None:
    """Of |w - c|^2 / 2, whose solution is c moved towards 0 by l1; without a gradient, no zero."""
    c = torch.tensor([3.0, -1.0, 0.31, 0.29, -0.1, 0.0], dtype=torch.float64)
    w = torch.nn.Parameter(torch.ones_like(c))
    optimizer = own.make([w], path, l1=0.3)
    for _ in range(2000):
        w.grad = w.detach() - c
        optimizer.step()
    expected = c.sign() * torch.relu(c.abs() - 0.3)
    torch.testing.assert_close(w.detach(), expected, rtol=0, atol=1e-12)
    assert torch.equal(w == 0, expected == 0)

    unused = torch.nn.Parameter(torch.ones(3))
    optimizer = own.make([unused], path, l1=0.3)
    unused.grad = torch.zeros(3)
    optimizer.step()
    assert unused.tolist() == [1.0] * 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_rounded_once(own: Own, dtype: torch.dtype, path: str) -> None:
    params = parameters(dtype=dtype, shapes=SHAPES)
    optimizer = own.make(params, path, l1=0.05, weight_decay=0.5)
    run(optimizer, steps=2)
    assert_rounds_once(optimizer, lambda wide: own.make(wide, path, l1=0.05, weight_decay=0.5))


def test_a_checkpoint_goes_on_with_the_same_bits(own: Own, path: str) -> None:
    params, others = parameters(shapes=SHAPES), parameters(shapes=SHAPES)
    optimizer, resumed = own.make(params, path, l1=0.1), own.make(others, path)
    run(optimizer, steps=3)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for param, other in zip(params, others, strict=True):
        other.data.copy_(param)
    for each in (optimizer, resumed):
        run(each, steps=3, first_seed=2000)
    assert results(resumed) == results(optimizer)


def test_a_file_of_torchs_goes_on(own: Own, path: str) -> None:
    params, others = parameters(shapes=SHAPES), parameters(shapes=SHAPES)
    twin = own.torch_cls(others, **own.options, foreach=False)
    run(twin, steps=2)
    optimizer = own.make(params, path)
    optimizer.load_state_dict(copy.deepcopy(twin.state_dict()))
    for param, other in zip(params, others, strict=True):
        param.data.copy_(other)
    for param, other in zip(params, others, strict=True):
        for name, value in twin.state[other].items():
            assert optimizer.state[param][name] == value.double() if value.dim() == 0 else True
    run(optimizer, steps=1, first_seed=2000)
    run(twin, steps=1, first_seed=2000)
    for param, other in zip(params, others, strict=True):
        torch.testing.assert_close(param, other, rtol=0, atol=ULPS * 2.0**-23 * 0.05)


def test_counts_begin_at_their_first_value_and_dtype(path: str) -> None:
    """Also where nothing has moved them yet: a step that is skipped."""
    params = parameters(dtype=torch.bfloat16, shapes=SHAPES)
    optimizer = OWN["nadam"].make(params, path, skip_nonfinite=True)
    set_grads(params, 0)
    params[0].grad[0, 0] = torch.inf
    optimizer.step()
    for param in params:
        state = optimizer.state[param]
        assert frozen(state["step"]) == frozen(torch.tensor(0.0))
        assert frozen(state["mu_product"]) == frozen(torch.tensor(1.0, dtype=torch.float64))
    optimizer.state[params[1]]["mu_product"] = 1  # a number that a user writes
    run(optimizer, steps=1)
    assert {optimizer.state[param]["mu_product"].dtype for param in params} == {torch.float64}
    products = {float(optimizer.state[param]["mu_product"]) for param in params}
    assert len(products) == 1


def test_a_count_below_its_least_is_refused() -> None:
    optimizer = OWN["nadam"].make(parameters(shapes=SHAPES), "reference")
    run(optimizer, steps=1)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][1]["mu_product"] = torch.tensor(-0.5)
    with refused(optimizer, ValueError, "'mu_product' -0.5 for parameter 1, .* >= 0$"):
        optimizer.load_state_dict(saved)


def test_files_of_two_classes_that_differ_by_a_count_are_told_apart() -> None:
    nadam = OWN["nadam"].make(parameters(shapes=SHAPES), "reference")
    adam = fusedreg.Adam(parameters(shapes=SHAPES))
    for each in (nadam, adam):
        run(each, steps=1)
    with refused(adam, ValueError, "contains 'mu_product' .* Adam does not keep"):
        adam.load_state_dict(nadam.state_dict())
    with refused(nadam, ValueError, "lacks 'mu_product'"):
        nadam.load_state_dict(adam.state_dict())
    assert parameters_of(nadam)


def test_a_count_that_a_file_has_as_a_number_keeps_its_digits(path: str) -> None:
    own = OWN["nadam"]
    params, others = parameters(shapes=SHAPES), parameters(shapes=SHAPES)
    optimizer, resumed = own.make(params, path), own.make(others, path)
    run(optimizer, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["mu_product"] = state["mu_product"].item()
    resumed.load_state_dict(saved)
    for param, other in zip(params, others, strict=True):
        assert torch.equal(optimizer.state[param]["mu_product"], resumed.state[other]["mu_product"])

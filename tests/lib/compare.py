"""Comparisons shared by the tests of drop-in behaviour."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from cases import Case, run, ulp


def frozen(value: Any) -> Any:
    """`value` with every tensor as its dtype, shape and bytes, so that `==` compares every bit."""
    if isinstance(value, torch.Tensor):
        value = value.detach().resolve_conj()
        kind = (value.dtype, tuple(value.shape))
        if value.is_meta:
            return kind
        dense = value.to_dense() if value.is_sparse else value
        packed = dense.clone(memory_format=torch.contiguous_format).flatten()
        return (*kind, packed.view(torch.uint8).cpu().numpy().tobytes())
    if isinstance(value, dict):
        return {key: frozen(element) for key, element in value.items()}
    if isinstance(value, (list, tuple)):
        return [frozen(element) for element in value]
    return value


def snapshot(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Everything that a step may change, and the gradients that it may not."""
    params = parameters_of(optimizer)
    own = ("max_grad_norm", "skip_nonfinite", "grad_norm", "skipped_steps")
    return frozen(
        {
            "params": params,
            "grads": [param.grad for param in params],
            "state": [optimizer.state.get(param) for param in params],
            "groups": [
                {name: value for name, value in group.items() if name != "params"}
                for group in optimizer.param_groups
            ],
            "own": {name: getattr(optimizer, name, None) for name in own},
        }
    )


def parameters_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


@contextmanager
def refused(
    optimizer: torch.optim.Optimizer, error: type[Exception], *words: str
) -> Iterator[None]:
    """The block raises exactly `error`, saying `words`, and every bit stays as it was."""
    before = snapshot(optimizer)
    with pytest.raises(error) as raised:
        yield
    assert raised.type is error
    for word in words:
        assert re.search(word, str(raised.value)), f"{word!r} is not in: {raised.value}"
    assert snapshot(optimizer) == before


def assert_close(
    actual: Iterable[torch.Tensor], expected: Iterable[torch.Tensor], ulps: float
) -> None:
    """Every entry within `ulps` of the largest one (at least 1.0) of its tensor."""
    for a, e in zip(actual, expected, strict=True):
        real = e.dtype.to_real() if e.is_complex() else e.dtype
        largest = max(1.0, e.abs().max().item()) if e.numel() else 1.0
        torch.testing.assert_close(a.detach(), e.detach(), rtol=0, atol=ulps * ulp(real, largest))


def assert_rounds_once(optimizer: torch.optim.Optimizer, make: Callable[..., Any]) -> None:
    """A step of low-precision parameters is a float32 step, rounded when it is stored.

    `make` makes an optimizer of the same options for other parameters.
    """
    params = parameters_of(optimizer)
    wide = [torch.nn.Parameter(param.detach().float()) for param in params]
    twin = make(wide)
    twin.load_state_dict(optimizer.state_dict())  # which widens the states
    for param, single in zip(params, wide, strict=True):
        assert param.grad is not None
        single.grad = param.grad.float()
    optimizer.step()
    twin.step()
    for param, single in zip(params, wide, strict=True):
        assert frozen(param) == frozen(single.to(param.dtype))
        exact = twin.state.get(single, {})
        for name, state in optimizer.state.get(param, {}).items():
            assert frozen(state) == frozen(exact[name].to(state.dtype))


def neighbours_apart(actual: torch.Tensor, expected: torch.Tensor) -> int:
    """By how many representable numbers two float16 or bfloat16 tensors differ at most."""
    assert actual.dtype == expected.dtype
    assert actual.itemsize == 2
    assert torch.isfinite(actual).all()
    assert torch.isfinite(expected).all()
    # The bits of a float, read as sign and magnitude, number the floats in order.
    first, second = (x.detach().view(torch.int16).int() for x in (actual, expected))
    first, second = (torch.where(x < 0, -(x & 0x7FFF), x) for x in (first, second))
    return int((first - second).abs().max()) if actual.numel() else 0


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """The block runs under another `torch.get_default_dtype()`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def results(optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
    """Parameters and state, bit by bit."""
    seen = snapshot(optimizer)
    return seen["params"], seen["state"]


def beyond_torch(cls: Any) -> set[str]:
    """The counts of a class that torch's lacks: those that exist only where an option needs them.

    The momentum mass is one, which also exists where a first step may be skipped.
    """
    return {*getattr(cls, "counts", ())} & {*getattr(cls, "late_states", ())}


def torchs_state(optimizer: Any) -> list[Any]:
    """The state without what torch lacks."""
    states = [optimizer.state.get(param, {}) for param in parameters_of(optimizer)]
    more = beyond_torch(optimizer)
    return [frozen({n: s for n, s in each.items() if n not in more}) for each in states]


def pair(case: Case, make: Any, **options: Any) -> tuple[Any, Any]:
    """The case through kernels and by the reference, on equal parameters."""
    return case.make(make(), "fused", **options), case.make(make(), "reference", **options)


def assert_steps_agree(fused: Any, reference: Any, steps: int = 2, ulps: float = 8) -> None:
    """Some more steps of both give the same, up to `ulps` of the stored dtype.

    Both take the same operations in the same order but for the global norm (another order of
    float64 additions), beta**t (within 2 ulp of float64) and sums of two products that one writes
    the other way round: at most half an ulp for each of about ten operations, hardly ever more than
    half of them in one direction.
    """
    for optimizer in (fused, reference):
        run(optimizer, steps)
    assert fused.backend == "triton"
    assert reference.backend == "reference"
    assert_close(parameters_of(fused), parameters_of(reference), ulps)
    for mine, other in zip(parameters_of(fused), parameters_of(reference), strict=True):
        assert fused.state.get(mine, {}).keys() == reference.state.get(other, {}).keys()
        states = (
            optimizer.state.get(p, {}) for optimizer, p in [(fused, mine), (reference, other)]
        )
        first, second = (list(state.values()) for state in states)
        assert_close(first, second, ulps)

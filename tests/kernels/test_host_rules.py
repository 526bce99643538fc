"""Device rules of one's own, compiled by LLVM: what they may use, and what is refused."""

from __future__ import annotations

import importlib
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

from fusedreg.scalars import Count

from cases import (
    parameters,
    run,
    set_grads,
)
from compare import assert_close, frozen, parameters_of, results

llvm: Any = importlib.import_module("fusedreg.kernels.cpu.backend")
compiler: Any = importlib.import_module("fusedreg.kernels.cpu.compiler")
language: Any = importlib.import_module("fusedreg.kernels.device.language")
rules: Any = importlib.import_module("fusedreg.kernels.device.rules")
own: Any = importlib.import_module("own")
words: Any = importlib.import_module("words")
tl: Any = importlib.import_module("triton.language")
where: Any = tl.where


# ---- rules of one's own --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_rule_of_another_module_runs_everywhere(dtype: torch.dtype) -> None:
    """With functions called as those of the package, and with the package's own."""
    ends = []
    for fused in (None, True, False):
        optimizer = own.Own(parameters(dtype=dtype), weight_decay=0.1, l1=0.1, fused=fused)
        run(optimizer, 3)
        ends.append(optimizer)
    assert [optimizer.backend for optimizer in ends] == ["llvm", "triton", "reference"]
    assert results(ends[0]) == results(ends[1])
    # As in assert_steps_agree, for three steps.
    assert_close(parameters_of(ends[0]), parameters_of(ends[2]), 12)


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_every_word_takes_computed_and_plain_numbers(
    dtype: torch.dtype, fused: bool | None
) -> None:
    """For each tensor in float64, and for each element in the dtype of the arithmetic."""
    param = nn.Parameter(torch.zeros(3, dtype=dtype))
    param.grad = torch.tensor([0.3, 1.7, 3.1], dtype=dtype)
    optimizer = words.Words([param], x=3.1, fused=fused)
    optimizer.step()
    assert optimizer.backend == ("triton" if fused else "llvm")
    x, state = torch.tensor(3.1, dtype=torch.float64), optimizer.state[param]
    for name, meaning in words.WORDS.items():
        # Both round at most three times. A power is exp(y), whose y is below 3.6: two roundings of
        # y move it by 3.6 ulp, and exp and the product by one each.
        ulps = 6 if "power" in name else 3
        assert_close([state[name]], [meaning(param.grad)], ulps)
        assert_close([state[f"{name} of x"]], [meaning(x)], ulps)


@language.triton.jit
def wide_scalars(options, counts):
    beta, eps = options
    ten = beta, eps, beta, eps, beta, eps, beta, eps, beta, eps
    return 1.0, ten + ten + ten + ten + ten + ten + ten, counts


@language.triton.jit
def last_of_many(g, states, scalars):
    return scalars[69] * g, 1.0, states


@pytest.mark.parametrize("fused", [None, True])
def test_a_rule_may_have_any_number_of_scalars(
    fused: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own.Own, "rule", rules.Rule(wide_scalars, last_of_many, 70))
    param = nn.Parameter(torch.zeros(3))
    param.grad = torch.ones(3)
    own.Own([param], lr=0.5, fused=fused).step()
    assert param.tolist() == [-0.5 * 0.125] * 3


def without_triton(source: str) -> None:
    code = "import sys; sys.modules['triton'] = None\n" + source
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_a_rule_of_another_module_needs_no_triton() -> None:
    without_triton("""
import torch, fusedreg
from fusedreg.kernels.device.language import tl, triton
from fusedreg.kernels.device.rules import Rule, divide as quotient

@triton.jit
def divide(a, b):
    return quotient(a, b) + triton.language.where(b > tl.constexpr(0.0), 1.0, b * 0.0)

@triton.jit
def scalars(options, counts):
    return 1.0, (), counts

@triton.jit
def tile(g, states, scalars):
    return divide(g, g), 1.0, states

class Own(fusedreg.FusedOptimizer):
    def device_rule(self, group):
        return Rule(scalars, tile, 0)

w = torch.nn.Parameter(torch.zeros(2))
w.grad = torch.tensor([3.0, -3.0])
optimizer = Own([w], {"lr": 1.0})
optimizer.step()
assert optimizer.backend == "llvm" and w.tolist() == [-2.0, -1.0]
""")


def test_a_rule_may_be_written_inside_a_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """As triton compiles it; its own interpreter does not find what is around it."""
    factor = tl.constexpr(3.0)

    @language.triton.jit
    def tripled(x):
        return factor * x

    @language.triton.jit
    def tile(g, states, scalars):
        return tripled(g), 3.0, states

    monkeypatch.setattr(own.Own, "rule", rules.RULES["sgd"]._replace(tile=tile))
    for name, nothing in {"tensor_states": (), "counts": {}, "device_options": ()}.items():
        monkeypatch.setattr(own.Own, name, nothing)
    param = nn.Parameter(torch.ones(1))
    param.grad = torch.ones(1)
    own.Own([param], lr=0.25).step()
    assert param.item() == 0.25


@language.triton.jit
def positive(x):
    return where(x > 0.0, x, 0.0)


def test_a_rule_may_call_what_it_imported_from_triton() -> None:
    """Which triton's own interpreter does not take."""

    def kernel(work: Any) -> None:
        compiler.device(positive)(work.constant(1.0))

    assert "select" in str(compiler.module_of(kernel))


@language.triton.jit
def two_things(g, states, scalars):
    return g, states


@language.triton.jit
def branch(g, states, scalars):
    return (g if g > 0.0 else -g), 1.0, states


@language.triton.jit
def unknown_word(g, states, scalars):
    return language.tl.sigmoid(g), 1.0, states


def with_tile(tile: Any) -> dict[str, Any]:
    return {"rule": own.Own.rule._replace(tile=tile)}


WRONG: dict[str, tuple[dict[str, Any], str, str | None]] = {
    "width": (
        {"rule": own.Own.rule._replace(width=3)},
        r"own_scalars returns 4 scalars, but the width of the Rule says 3",
        "more or fewer scalars than its width",
    ),
    "counts": (
        {"counts": {"step": Count(), "mass": Count()}, "late_states": ("mass",)},
        r"own_scalars returns 1 counts, but `counts` says 2",
        "more or fewer counts than `counts` lists",
    ),
    "states": (
        with_tile(rules.rmsprop),
        r"rmsprop returns 1 states, but states\(group\) says 2",
        "more or fewer states than states",
    ),
    "two things": (with_tile(two_things), "two_things does not return three things", None),
    "branch": (with_tile(branch), "cannot branch in Python .* use tl.where", None),
    "word": (
        with_tile(unknown_word),
        r"unknown_word calls tl\.sigmoid, but .* has no such word",
        None,
    ),
}
"""What is wrong with a class: its attributes, and what a CPU says of it, and triton."""


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_rule_is_refused_before_anything_changes(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong, words, _ = WRONG[what]
    for name, value in wrong.items():
        monkeypatch.setattr(own.Own, name, value)
    optimizer = own.Own(parameters(shapes=[(3,)]), fused=False)
    run(optimizer, 1)  # by the reference, which does not know them; creates state
    optimizer.param_groups[0]["fused"] = None
    error = AttributeError if what == "word" else ValueError
    error = TypeError if what in ("two things", "branch") else error
    set_grads(parameters_of(optimizer), 0)
    before = [frozen([param, dict(optimizer.state[param])]) for param in parameters_of(optimizer)]
    with pytest.raises(error, match=words):
        optimizer.step()
    after = [frozen([param, dict(optimizer.state[param])]) for param in parameters_of(optimizer)]
    assert after == before


def test_a_rule_of_a_negative_width_is_refused() -> None:
    with pytest.raises(ValueError, match="Invalid width value: -1"):
        rules.resolve(own.Own.rule._replace(width=-1))


@pytest.mark.parametrize("what", [what for what, (*_, words) in WRONG.items() if words])
def test_triton_says_what_is_wrong_with_a_rule(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong, _, words = WRONG[what]
    for name, value in wrong.items():
        monkeypatch.setattr(own.Own, name, value)
    with pytest.raises(Exception, match=words):
        run(own.Own(parameters(shapes=[(3,)]), fused=True), 1)


def test_rules_can_be_read_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    try:
        importlib.reload(language)

        def double(x: Any) -> Any:
            return x + x

        assert language.triton.jit(double).fn(3) == 6
        assert language.tl.constexpr(3).value == 3
    finally:
        monkeypatch.undo()
        importlib.reload(language)

"""What the benchmark accepts as right: contenders within the bounds, other formulas far outside."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fusedreg.check.oracle import Slot, one_step

from cases import CASES

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a module of the folder, which is on sys.path only where a script of it runs."""
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("method", "wrong"),
    [
        ("AdamW + L1", {"l1": 0.0}),
        *(
            (method, wrong)
            for method in ("AdamW", "Adam + L2", "AdamW + L1")
            for wrong in ({"weight_decay": 0.0}, {"betas": (0.9, 0.99)})
        ),
    ],
)
def test_bounds_tell_other_formulas(bench: Any, method: str, dtype: str, wrong: Any) -> None:
    """In float32 every other formula is refused; in bfloat16 those that roundings do not hide."""
    contenders, methods, verify = bench("contenders"), bench("jobs"), bench("verify")
    right = methods.METHODS[method]
    setting = verify.Setting([[(64, 64)]], methods.DTYPES[dtype], torch.device("cpu"))
    task = setting.task(right, clip=False)
    other = replace(task, method=replace(right, kwargs={**right.kwargs, **wrong}))
    for make in contenders.TORCH.values():
        assert setting.check(make(setting.groups, task), task).matches
        refused = not setting.check(make(setting.groups, other), task).matches
        hidden = dtype == "bfloat16" and (
            "betas" in wrong or (right.l1 and "weight_decay" in wrong)
        )
        assert refused or hidden


RARE: dict[str, list[dict[str, Any]]] = {
    "RMSprop": [{"momentum": 0.0}, {"alpha": 0.99}, {"centered": True}],
    "Adagrad": [{"lr_decay": 0.1}, {"initial_accumulator_value": 0.1}],
    "Lion": [{"betas": (0.9, 0.9)}, {"betas": (0.5, 0.99)}],
    "LAMB": [{"cls": "AdamW"}],  # the same without the trust ratio
}
"""Other formulas, beside those in which the decay is left out or coupled otherwise."""


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("method", RARE)
def test_bounds_tell_other_formulas_of_rare_methods(bench: Any, method: str, clip: bool) -> None:
    """In float32 what is wrong is out by a hundred bounds, and what is right within one."""
    contenders, methods, verify = bench("contenders"), bench("jobs"), bench("verify")
    right = methods.METHODS[method]
    setting = verify.Setting([[(64, 64), (300,)]], torch.float32, torch.device("cpu"))
    task = setting.task(right, clip)

    def of_bound(other: Any, max_norm: float | None, **options: Any) -> float:
        made = contenders.own(setting.groups, contenders.Task(other, max_norm), **options)
        return setting.check(made, task).of_bound

    for options in ({}, {"fused": False}):
        assert of_bound(right, task.max_norm, **options) <= 1
    decoupled = right.case.options["decoupled_weight_decay"]
    for wrong in ({"weight_decay": 0.0}, {"decoupled_weight_decay": not decoupled}, *RARE[method]):
        cls = wrong.get("cls", right.cls)
        kwargs = {**right.kwargs, **{k: v for k, v in wrong.items() if k != "cls"}}
        other = replace(right, cls=cls, kwargs=kwargs)
        assert of_bound(other, task.max_norm) > 100, wrong
    if clip:
        assert of_bound(right, None) > 100


def test_few_signs_are_in_doubt(bench: Any) -> None:
    """Where they are, either is right: lr to both sides of the middle. The norm may be off by 1e-4,
    and so may the number whose sign is taken, which has a density of about 1 there, in three
    steps."""
    methods = bench("jobs")
    setting = bench("verify").Setting([[(1000, 1000)]], torch.float32, torch.device("cpu"))
    _, bound = setting.expected(setting.task(methods.METHODS["Lion"], clip=True))
    in_doubt = bound > methods.LR
    assert 0 < in_doubt.double().mean() < 1e-3
    assert bound[~in_doubt].max() < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", [*RARE, "AdamW", "SGD momentum", "AdamW + L1", "Adam + L2"])
def test_few_elements_are_out_of_bounds(bench: Any, method: str, dtype: str) -> None:
    """Where a coupled decay cancels a first gradient up to its roundings, the quotient may be
    anything: within an error of 1.6 % in bfloat16, in three steps, whose sum has a density of at
    most 0.4 at 0."""
    methods = bench("jobs")
    setting = bench("verify").Setting([[(300, 300)]], methods.DTYPES[dtype], torch.device("cpu"))
    _, bound = setting.expected(setting.task(methods.METHODS[method], clip=True))
    assert bound.isinf().double().mean() < (1e-3 if dtype == "float32" else 0.05)


@pytest.mark.parametrize("case", [c for c in CASES if c.penalty in ("decay", "elastic_net")])
def test_bounds_hold_for_every_formula(bench: Any, case: Any) -> None:
    """Steps of gradients that are off by half an ulp stay within the errors, which are infinite
    only where terms cancel."""
    verify, unit = bench("verify"), torch.finfo(torch.float32).eps / 2
    generator = torch.Generator().manual_seed(0)
    w, *grads = torch.randn(4, 500, generator=generator, dtype=torch.float64)
    slots = Slot(w), Slot(verify.around(w, 0.0, torch.float32))
    lr = verify.around(torch.full_like(w, case.options["lr"]), 0.0, torch.float32)
    method = SimpleNamespace(case=case, layerwise=case.cls.layerwise)
    for grad in grads:
        one_step(slots[0], grad * (1 + unit * torch.sign(w)), case)
        read = verify.around(grad, unit * grad.abs(), torch.float32)
        verify.one_step(slots[1], read, lr, method)
    bound = verify.error(slots[1].w)
    off = torch.where(bound.isinf(), 0.0, (slots[0].w - verify.middle(slots[1].w)).abs())
    assert (off <= bound).all()
    assert bound.isfinite().double().mean() > 0.9


def test_a_layerwise_sample_has_whole_tensors(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    contenders, methods, verify = bench("contenders"), bench("jobs"), bench("verify")
    monkeypatch.setattr(verify, "SAMPLE", 100)
    shapes = [[(90,), (50, 50)], [(2000,), (7,)]]
    setting = verify.Setting(shapes, torch.float32, torch.device("cpu"))
    task = setting.task(methods.METHODS["LAMB"], clip=True)
    assert setting.expected(task)[0].numel() == 97
    assert setting.check(contenders.own(setting.groups, task), task).matches
    other = replace(task, method=replace(task.method, cls="AdamW"))
    assert not setting.check(contenders.own(setting.groups, other), task).matches

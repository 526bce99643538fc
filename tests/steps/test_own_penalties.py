"""What penalties may do beyond one hook that is always there: kernels equal the reference."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, TypedDict

import pytest
import torch
from torch import Tensor

import fusedreg
from fusedreg.kernels.language import tl, triton
from fusedreg.options import Option
from fusedreg.penalties import L1, L2, PENALTIES, Penalty, Term
from fusedreg.penalty import soft_threshold
from fusedreg.scalars import Number

from cases import CLASSES, FULL, PATHS, parameters, run

KERNELS = ["default", "fused"]


@triton.jit
def plus(w, rate, mass, gain, numbers):
    return tl.where(numbers[0] == 0.0, w, w + numbers[0].to(w.dtype))


@triton.jit
def times(w, rate, mass, gain, numbers):
    return tl.where(numbers[0] == 0.0, w, w * numbers[0].to(w.dtype))


FUNCTIONS = {"+": plus, "*": times}


class ChangeOptions(TypedDict, total=False):
    shrink: Annotated[float, Option(0.0)]
    changes: Annotated[tuple[Any, ...], Option(())]


class Change(Penalty):
    """A decoupled L1 of its own, then sums and products with numbers, in any order."""

    options = ChangeOptions

    def terms(self, group: Mapping[str, Any]) -> Iterable[Term]:
        if group["shrink"]:
            yield Term("prox", "l1_shrink", (group["shrink"],), uses_gain=False)
        for sign, *numbers in group["changes"]:
            yield Term("prox", FUNCTIONS[sign], tuple(numbers), uses_gain=False)

    def prox(self, settings: Mapping[str, Any], w: Tensor, rate: Number, gain: Number) -> Tensor:
        w = soft_threshold(w, rate * settings["shrink"])
        for sign, number, *_ in settings["changes"]:
            w = w + number if sign == "+" else w * number
        return w


class Before(fusedreg.SGD):
    penalties = (Change(), *PENALTIES)


class After(fusedreg.SGD):
    penalties = (*PENALTIES, Change())


DECOUPLED = {"l1": 1.0, "l1_mode": "decoupled"}


@pytest.mark.parametrize("path", KERNELS)
@pytest.mark.parametrize("cls", [Before, After])
@pytest.mark.parametrize(
    "groups",
    [
        [{**DECOUPLED, "shrink": 2.0}],
        [{"changes": (("+", 2.0), ("+", 0.5))}],
        [{"changes": (("+", 2.0), ("*", 3.0))}, {"changes": (("*", 3.0), ("+", 2.0))}],
        [{"changes": (("+", 1.0),), **DECOUPLED}, {"changes": (("+", 1.0, 7.0),)}],
        [{"changes": (("*", 3.0),)}, {"changes": (("+", 2.0), ("*", 3.0))}, {**DECOUPLED}],
    ],
    ids=["hook_of_another", "hook_twice", "other_order", "more_numbers", "one_more_in_front"],
)
def test_each_term_has_its_own_numbers_and_its_place(
    groups: list[dict[str, Any]], cls: type, path: str
) -> None:
    results = []
    for options in ({"fused": False}, PATHS[path]):
        params = parameters(shapes=[(7,)] * len(groups))
        optimizer = cls(
            [{"params": [p], **group} for p, group in zip(params, groups, strict=True)],
            lr=0.125,
            **options,
        )
        run(optimizer, 2)
        results.append([param.tolist() for param in params])
    assert optimizer.backend == {"default": "llvm", "fused": "triton"}[path]
    assert results[0] == results[1]


@pytest.mark.parametrize("path", KERNELS)
def test_a_group_on_the_reference_path_takes_no_slot(path: str) -> None:
    params = parameters(shapes=[(4,), (4,)])
    many = {"changes": (("+", 1.0), ("+", 2.0), ("+", 3.0)), "fused": False}
    groups = [{"params": params[:1]}, {"params": params[1:], **many}]
    optimizer = After(groups, lr=0.0625, **PATHS[path])
    twins = parameters(shapes=[(4,), (4,)])
    twin = After([{"params": twins[:1]}, {"params": twins[1:], **many}], lr=0.0625, fused=False)
    for each in (optimizer, twin):
        run(each, 2)
    assert optimizer.backend == {"default": "llvm", "fused": "triton"}[path] + " and reference"
    assert all(torch.equal(*pair) for pair in zip(params, twins, strict=True))
    optimizer.param_groups[1]["fused"] = None if path == "default" else True
    with pytest.raises(ValueError, match=r"slots for penalties .* pass fused=False"):
        run(optimizer, 1)


# ---- penalties without device functions ----------------------------------------------------------


def test_a_penalty_that_kernels_would_leave_out_is_refused() -> None:
    with pytest.raises(TypeError, match="Cap overrides prox but not terms, so kernels would"):
        type("Cap", (Penalty,), {"prox": lambda self, settings, w, rate, gain: w})
    with pytest.raises(TypeError, match="Half overrides gradient but not terms"):
        type("Half", (L1,), {"gradient": lambda self, settings, grad, w: grad})
    type("Named", (L1,), {"value": lambda self, settings, w: w.sum()})  # kernels do not ask for it
    type(
        "Other", (Row,), {"prox": lambda self, settings, w, rate, gain: w}
    )  # is on_kernels' matter


class RowOptions(TypedDict, total=False):
    norm: Annotated[float, Option(0.0)]


class Row(Penalty):
    """The norm of a tensor, which no hook can compute: a hook sees one element."""

    options = RowOptions

    def on_kernels(self, group: Mapping[str, Any]) -> bool:
        return not group["norm"]

    def prox(self, settings: Mapping[str, Any], w: Tensor, rate: Number, gain: Number) -> Tensor:
        norm = torch.linalg.vector_norm(w)
        return w * (1 - rate * settings["norm"] / norm).clamp(min=0) if settings["norm"] else w


def test_a_penalty_may_leave_its_groups_to_the_reference_path(path: str) -> None:
    """It gets whole tensors there, however large they are."""
    cls: Any = type("Rows", (fusedreg.SGD,), {"penalties": (*PENALTIES, Row())})
    large = torch.nn.Parameter(torch.ones(400_000))
    small = torch.nn.Parameter(torch.ones(3))
    groups = [{"params": [large], "norm": 1.0}, {"params": [small]}]
    optimizer = cls(groups, lr=0.5, **PATHS.get(path, {}))
    for param in (large, small):
        param.grad = torch.zeros_like(param)
    optimizer.step()
    expected = 1 - 0.5 / torch.linalg.vector_norm(torch.ones(400_000))
    assert torch.equal(large.detach(), expected.expand(400_000))
    assert small.tolist() == [1.0] * 3
    kernels = {"default": "llvm and ", "foreach": "llvm and ", "fused": "triton and "}
    assert optimizer.backend == kernels.get(path, "") + "reference"


def test_a_gradient_that_kernels_cannot_compute_needs_no_gain(path: str) -> None:
    class Pull(Penalty):
        def on_kernels(self, group: Mapping[str, Any]) -> bool:
            return False

        def gradient(self, settings: Mapping[str, Any], grad: Tensor, w: Tensor) -> Tensor:
            return grad + w.mean()

    cls: Any = type("Pulled", (fusedreg.SGD,), {"penalties": (*PENALTIES, Pull())})
    w = torch.nn.Parameter(torch.tensor([1.0, 3.0]))
    optimizer = cls([w], lr=0.5, momentum=1.0, **PATHS.get(path, {}))
    w.grad = torch.zeros(2)
    optimizer.step()
    assert w.tolist() == [0.0, 2.0]
    assert {*optimizer.state[w]} == {"momentum_buffer"}


def test_a_term_without_a_number_is_refused() -> None:
    """Zeros stand for a group without it, so it would act on groups that do not ask for it."""

    class Always(Penalty):
        def terms(self, group: Mapping[str, Any]) -> Iterable[Term]:
            yield Term("prox", plus, ())

    cls: Any = type("Uncounted", (fusedreg.SGD,), {"penalties": (Always(),)})
    optimizer = cls(parameters())
    with pytest.raises(ValueError, match=r"Always\.terms yields a Term without numbers"):
        run(optimizer, 1)


@pytest.mark.parametrize("kind", ["complex", "strided", "frozen"])
def test_a_group_that_only_the_reference_can_step_takes_no_slot(kind: str) -> None:
    odd = {
        "complex": torch.zeros(3, dtype=torch.complex64),
        "strided": torch.zeros(6)[::2],
        "frozen": torch.zeros(3),
    }[kind]
    params = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(odd)]
    many = {"changes": (("+", 1.0), ("+", 2.0), ("+", 3.0))}
    optimizer = After([{"params": params[:1]}, {"params": params[1:], **many}], lr=0.5)
    for turn in range(2):
        for param in params[: 1 if kind == "frozen" else 2]:
            param.grad = torch.ones_like(param)
        optimizer.step()
        assert params[0].tolist() == [0.5 - 0.5 * turn] * 3
    assert optimizer.launches == 2


# ---- the gain, for other penalties than L1 -------------------------------------------------------


@triton.jit
def own_l1(w, rate, mass, gain, numbers):
    threshold = (rate * numbers[0] * mass).to(w.dtype) * gain
    inside = tl.where(w == w, 0.0, w)  # noqa: PLR0124  # only NaN is not itself
    moved = tl.where(w > threshold, w - threshold, tl.where(w < -threshold, w + threshold, inside))
    return tl.where(numbers[0] == 0.0, w, moved)


class OwnL1Options(TypedDict, total=False):
    own: Annotated[float, Option(0.0)]


class OwnL1(Penalty):
    options = OwnL1Options

    def terms(self, group: Mapping[str, Any]) -> Iterable[Term]:
        if group["own"]:
            yield Term("prox", own_l1, (group["own"],))

    def prox(self, settings: Mapping[str, Any], w: Tensor, rate: Number, gain: Number) -> Tensor:
        return soft_threshold(w, rate * settings["own"] * gain) if settings["own"] else w


@pytest.mark.parametrize("path", ["reference", *KERNELS])
@pytest.mark.parametrize("cls", [cls for cls in CLASSES if cls is not fusedreg.Lion])
def test_a_penalty_of_ones_own_gets_the_gain_that_l1_gets(cls: Any, path: str) -> None:
    """With momentum it takes a mass, which nothing else would ask for."""
    options = {name: x for name, x in FULL[cls].kwargs.items() if not name.startswith("l1")}
    own_cls: Any = type("Own", (cls,), {"penalties": (OwnL1(), L2())})
    ours, others = parameters(), parameters()
    optimizer = own_cls(ours, own=0.25, **options, **PATHS[path])
    twin = cls(others, l1=0.25, **options, **PATHS[path])
    for each in (optimizer, twin):
        run(each, 3)
    assert all(torch.equal(*pair) for pair in zip(ours, others, strict=True))
    assert {*optimizer.state[ours[0]]} == {*twin.state[others[0]]}


# ---- classes without one of the penalties --------------------------------------------------------


def torch_class(cls: type) -> type:
    """Its namesake in torch.optim, or the common base."""
    return next(base for base in cls.__mro__ if base.__module__.startswith("torch.optim."))


@pytest.mark.sampled(4)
@pytest.mark.parametrize("path", ["reference", *KERNELS])
@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("kept", [(L1(),), (L2(),), ()], ids=["l1", "l2", "none"])
def test_a_class_may_leave_out_penalties(kept: tuple[Penalty, ...], cls: Any, path: str) -> None:
    penalised = {name for penalty in PENALTIES for name in penalty.options.__annotations__}
    penalised -= {*inspect.signature(torch_class(cls)).parameters}  # which the constructor has
    options = {
        name: value
        for name, value in FULL[cls].kwargs.items()
        if name not in {*penalised, "weight_decay"}
    }
    less: Any = type("Less", (cls,), {"penalties": kept})
    ours, others = parameters(), parameters()
    optimizer = less(ours, weight_decay=0, **options, **PATHS[path])
    twin = cls(others, weight_decay=0, **options, **PATHS[path])
    for each in (optimizer, twin):
        run(each, 2)
    assert all(torch.equal(*pair) for pair in zip(ours, others, strict=True))
    taken = {name for penalty in kept for name in penalty.options.__annotations__}
    assert penalised & optimizer.param_groups[0].keys() == penalised & taken

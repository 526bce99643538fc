"""Files of every kind go in and out; one that cannot be right is refused and changes nothing."""

from __future__ import annotations

import copy
import math
import re
from collections import OrderedDict, UserDict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

import fusedreg
from fusedreg.scalars import Count

from cases import (
    CASES,
    CLASSES,
    FULL,
    KERNEL_CASES,
    PLAIN,
    RULES,
    SOME,
    TORCH_CASES,
    TORCH_CLASSES,
    Case,
    by_id,
    each_case,
    parameters,
    run,
    set_grads,
)
from compare import beyond_torch, frozen, parameters_of, refused, results, snapshot

SHAPES = [(0,), (5, 3), ()]

Spoil = Callable[[dict[str, Any]], Any]


def assert_continues(optimizer: Any, resumed: Any) -> None:
    for each in (optimizer, resumed):
        run(each, 2, first_seed=50)
    assert results(optimizer) == results(resumed)


# ---- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("state_dtype", [None, torch.float32, torch.float64], ids=str)
@each_case(CASES)
def test_low_precision_run_resumes_from_a_file(
    case: Case, state_dtype: torch.dtype | None, tmp_path: Path
) -> None:
    params = parameters(dtype=torch.bfloat16, shapes=SHAPES)
    optimizer = case.make(params, state_dtype=state_dtype)
    run(optimizer, 2)
    torch.save([params, optimizer.state_dict()], tmp_path / "run")
    values, saved = torch.load(tmp_path / "run", weights_only=True)
    given = frozen(saved)
    resumed = case.make([nn.Parameter(value) for value in values], state_dtype=state_dtype)
    resumed.load_state_dict(saved)
    for state in resumed.state.values():
        for name in state.keys() & set(case.cls.tensor_states):
            assert state[name].dtype == (state_dtype or torch.bfloat16)
    assert_continues(optimizer, resumed)
    assert frozen(saved) == given  # the optimizer shares no memory with what it loaded


@pytest.mark.parametrize("case", **by_id(SOME))
def test_truncated_file_stops_before_the_optimizer(case: Case, tmp_path: Path) -> None:
    optimizer, file = case.make(parameters(shapes=SHAPES)), tmp_path / "run"
    run(optimizer, 1)
    torch.save(optimizer.state_dict(), file)
    whole = file.read_bytes()
    before = snapshot(optimizer)
    for kept in (0.0, 0.1, 0.5, 0.9, 0.99):
        file.write_bytes(whole[: int(kept * len(whole))])
        # Which of them torch raises depends on where the file ends.
        with pytest.raises((EOFError, OSError, RuntimeError)):
            optimizer.load_state_dict(torch.load(file, weights_only=True))
        assert snapshot(optimizer) == before


@pytest.mark.parametrize("cls", CLASSES)
def test_keys_that_others_put_into_a_group_come_with_the_file(cls: type) -> None:
    optimizer, resumed = (cls(parameters(shapes=SHAPES)) for _ in range(2))
    optimizer.param_groups[0].update({"initial_lr": 0.5, "mine": [1]})
    resumed.param_groups[0]["own"] = 2
    resumed.load_state_dict(optimizer.state_dict())
    group = resumed.param_groups[0]
    optimizer.param_groups[0]["mine"].append(3)
    assert (group["initial_lr"], group["mine"], group["own"]) == (0.5, [1], 2)


# ---- options that are turned on after the file was written ---------------------------------------

LATER = [
    pytest.param(before, later, id=f"{before.id}-{later.id}")
    for later in CASES
    if later.penalty in ("none", "elastic_net")
    for before in dict.fromkeys([PLAIN[later.cls], Case(later.rule, "none", *RULES[later.rule])])
    if before.id != later.id
]


@pytest.mark.parametrize("edited", ["file", "group"])
@pytest.mark.parametrize(("before", "later"), LATER)
def test_file_from_before_an_option_was_turned_on(before: Case, later: Case, edited: str) -> None:
    """What the option needs is created by the next step, as where it is turned on in a run."""
    optimizer = before.make(parameters(shapes=SHAPES))
    run(optimizer, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    params = [nn.Parameter(param.detach().clone()) for param in parameters_of(optimizer)]
    resumed = later.make(params)
    if edited == "file":
        saved["param_groups"][0].update(later.kwargs)
    resumed.load_state_dict(saved)
    resumed.param_groups[0].update(later.kwargs)
    optimizer.param_groups[0].update(later.kwargs)
    assert_continues(optimizer, resumed)


# ---- torch.distributed.checkpoint ----------------------------------------------------------------

WAYS = {
    "nested": StateDictOptions(),
    "flattened": StateDictOptions(flatten_optimizer_state_dict=True),
    "full": StateDictOptions(full_state_dict=True, cpu_offload=True),
}
ways = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


@pytest.fixture
def _process_group(tmp_path: Path) -> Iterator[None]:
    """One CPU rank."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def build(case: Case, **options: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    return model, case.make(model.parameters(), **options)


# torch cannot gather what is empty.
STATEFUL = [case for case in KERNEL_CASES if case.make(parameters()).states(case.options)]


@pytest.mark.usefixtures("_process_group")
@ways
@each_case(STATEFUL)
def test_run_resumes_from_a_distributed_checkpoint(
    case: Case, way: StateDictOptions, tmp_path: Path
) -> None:
    """Read into a new optimizer, whose state a step with lr 0 creates."""
    model, optimizer = build(case, max_grad_norm=0.5)
    run(optimizer, 2)
    saved = {
        "model": model.state_dict(),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=way),
    }
    dcp.save(saved, checkpoint_id=tmp_path / "run")
    twin, resumed = build(case, max_grad_norm=0.5)
    fresh = frozen(list(twin.parameters()))
    found = {
        "model": twin.state_dict(),
        "optimizer": get_optimizer_state_dict(twin, resumed, options=way),
    }
    assert frozen(list(twin.parameters())) == fresh
    dcp.load(found, checkpoint_id=tmp_path / "run")
    twin.load_state_dict(found["model"])
    set_optimizer_state_dict(twin, resumed, found["optimizer"], options=way)
    assert_continues(optimizer, resumed)


# Of each class that torch has too, the case with the most options.
SHARED = [
    max((case for case in TORCH_CASES if case.cls is cls), key=lambda case: len(case.kwargs))
    for cls in TORCH_CLASSES
]


def build_torchs(case: Case) -> tuple[nn.Module, Any]:
    model, _ = build(case)
    theirs: Any = case.torch_cls
    return model, theirs(model.parameters(), **case.kwargs)


def save(way: StateDictOptions, file: Path, model: nn.Module, optimizer: Any) -> None:
    state = get_optimizer_state_dict(model, optimizer, options=way)
    dcp.save({"optimizer": state}, checkpoint_id=file)


def load(way: StateDictOptions, file: Path, model: nn.Module, optimizer: Any) -> None:
    """As the tutorials do it, with the planner that wants every key."""
    target = {"optimizer": get_optimizer_state_dict(model, optimizer, options=way)}
    dcp.load(target, checkpoint_id=file)
    set_optimizer_state_dict(model, optimizer, target["optimizer"], options=way)


@pytest.mark.usefixtures("_process_group")
@ways
@each_case(SHARED)
def test_distributed_checkpoint_of_torch_goes_on_here(
    case: Case, way: StateDictOptions, tmp_path: Path
) -> None:
    """Read by torch's class, which hands it over, as docs/recipes.md says."""
    model, theirs = build_torchs(case)
    run(theirs, 2)
    save(way, tmp_path / "run", model, theirs)
    twin, reader = build_torchs(case)
    twin.load_state_dict(model.state_dict())
    load(way, tmp_path / "run", twin, reader)
    resumed = case.make(twin.parameters(), lr=1e-9, l1=0.25)
    resumed.load_state_dict(reader.state_dict())
    plain = case.make(model.parameters(), lr=1e-9, l1=0.25)
    plain.load_state_dict(theirs.state_dict())
    assert_continues(plain, resumed)


# A dampened momentum has a state more here than in torch.
SAME_STATES = [
    max(
        (case for case in TORCH_CASES if case.cls is cls and "dampening" not in case.kwargs),
        key=lambda case: len(case.kwargs),
    )
    for cls in TORCH_CLASSES
]


@pytest.mark.usefixtures("_process_group")
@pytest.mark.parametrize("way", [way for way in WAYS if "flat" not in way])
@pytest.mark.parametrize("begun", [False, True])
@each_case(SAME_STATES)
def test_distributed_checkpoint_of_torch_is_read_where_no_option_is_ours(
    case: Case, way: str, begun: bool, tmp_path: Path
) -> None:
    """What torch does not know is then not listed. It may be set once all is loaded."""
    model, theirs = build_torchs(case)
    run(theirs, 2)
    save(WAYS[way], tmp_path / "run", model, theirs)
    twin, resumed = build(case, lr=1e-9)
    if begun:
        run(resumed, 1)
    twin.load_state_dict(model.state_dict())
    load(WAYS[way], tmp_path / "run", twin, resumed)
    plain = case.make(model.parameters(), lr=1e-9)
    plain.load_state_dict(theirs.state_dict())
    for each in (plain, resumed):
        each.param_groups[0]["l1"] = 0.25
    assert_continues(plain, resumed)


@pytest.mark.usefixtures("_process_group")
@ways
@each_case(SHARED)
def test_distributed_checkpoint_goes_on_in_torch(
    case: Case, way: StateDictOptions, tmp_path: Path
) -> None:
    model, optimizer = build(case)
    run(optimizer, 2)
    save(way, tmp_path / "run", model, optimizer)
    twin, resumed = build_torchs(case)
    load(way, tmp_path / "run", twin, resumed)
    for mine, theirs in zip(optimizer.state.values(), resumed.state.values(), strict=True):
        assert mine.keys() - theirs.keys() <= beyond_torch(optimizer)
        assert frozen({name: mine[name] for name in theirs}) == frozen(theirs)
    for name, value in resumed.param_groups[0].items():
        if name == "betas":  # torch gathers a pair as a list
            assert tuple(value) == case.make([torch.zeros(1)]).defaults[name]
        elif name != "params":
            assert value == optimizer.param_groups[0][name], name


@pytest.mark.usefixtures("_process_group")
@pytest.mark.parametrize("way", ["nested", "flattened"])
@each_case(SHARED)
def test_distributed_checkpoint_of_torch_is_not_read_without_its_missing_options(
    case: Case, way: str, tmp_path: Path
) -> None:
    """It reads what the optimizer lists. What has an effect is listed, so that nothing is lost."""
    model, theirs = build_torchs(case)
    run(theirs, 2)
    save(WAYS[way], tmp_path / "run", model, theirs)
    twin, optimizer = build(case, l1=0.25)
    run(optimizer, 1)
    for param in twin.parameters():
        param.grad = None  # torch asks for no state where there are gradients
    with refused(optimizer, CheckpointException, "Missing key in checkpoint state_dict"):
        load(WAYS[way], tmp_path / "run", twin, optimizer)


@pytest.mark.usefixtures("_process_group")
@ways
@pytest.mark.parametrize("saved", [0.0, 0.25])
@pytest.mark.parametrize("case", **by_id(SOME))
def test_saved_options_win_in_a_distributed_checkpoint(
    case: Case, saved: float, way: StateDictOptions, tmp_path: Path
) -> None:
    """Also where the file says that there is none, and where the optimizer has none."""
    model, optimizer = build(case, l1=saved, weight_decay=saved, l1_mode="subgradient")
    run(optimizer, 2)
    save(way, tmp_path / "run", model, optimizer)
    other = 0.25 - saved
    twin, resumed = build(case, l1=other, weight_decay=other, l1_mode="subgradient")
    twin.load_state_dict(model.state_dict())
    load(way, tmp_path / "run", twin, resumed)
    group = resumed.param_groups[0]
    assert (group["l1"], group["weight_decay"]) == (saved, saved)


@ways
@each_case(KERNEL_CASES)
def test_asking_for_the_state_before_training_changes_nothing(
    case: Case, way: StateDictOptions
) -> None:
    (model, asked), (_, plain) = build(case), build(case)
    before = frozen(parameters_of(asked))
    get_optimizer_state_dict(model, asked, options=way)
    assert frozen(parameters_of(asked)) == before
    assert_continues(asked, plain)


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flattened"])
@pytest.mark.parametrize("case", **by_id(SOME))
def test_state_of_a_parameter_that_never_had_a_gradient(case: Case, flat: bool) -> None:
    """Flattened, torch gives back an empty dict for each state that the file lacks."""
    way = StateDictOptions(flatten_optimizer_state_dict=flat, strict=False)
    model, optimizer = build(case)
    model[1].requires_grad_(False)
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    model[1].requires_grad_(True)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=way))
    twin, resumed = build(case)
    twin.load_state_dict(model.state_dict())
    set_optimizer_state_dict(twin, resumed, saved, options=way)
    assert not resumed.state.get(twin[1].weight)
    assert_continues(optimizer, resumed)


# ---- files that cannot be right ------------------------------------------------------------------

LAST = len(SHAPES) - 1
"""The parameter whose state is spoiled: all before it are good."""


def trained(cls: type, seed: int = 0) -> Any:
    """Two groups, one parameter without a gradient, state of every kind, and a clip."""
    params = parameters(seed, shapes=[*SHAPES, (2,)])
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.5}]
    optimizer = FULL[cls].make(groups, max_grad_norm=1.0)
    run(optimizer, 1)
    optimizer.state.pop(params[3])
    return optimizer


def assert_refused(cls: type, spoil: Spoil, message: str) -> None:
    """Loading what `spoil` makes of a good file, or returns, changes nothing at all."""
    optimizer, other = trained(cls), trained(cls, seed=1)
    saved = copy.deepcopy(other.state_dict())
    spoiled = spoil(saved)
    with refused(optimizer, ValueError, message):
        optimizer.load_state_dict(saved if spoiled is None else spoiled)


NO_FILE: dict[str, Spoil] = {
    "list": lambda saved: [saved],
    "tensor": lambda saved: torch.ones(3),
    "number": lambda saved: 3,
    "empty": lambda saved: {},
    "weights": lambda saved: nn.Linear(3, 2).state_dict(),
    "whole_training": lambda saved: {"model": {}, "optimizer": saved},
    "no_state": lambda saved: {"param_groups": saved["param_groups"]},
    "no_groups": lambda saved: {"state": saved["state"]},
    "state_of_another_kind": lambda saved: {**saved, "state": [*saved["state"].values()]},
    "groups_of_another_kind": lambda saved: {**saved, "param_groups": saved["param_groups"][0]},
    "no_params": lambda saved: {**saved, "param_groups": [{"lr": 0.1}, {"lr": 0.1}]},
}


@pytest.mark.parametrize("spoil", NO_FILE.values(), ids=NO_FILE)
@pytest.mark.parametrize("cls", CLASSES)
def test_what_is_no_state_dict_is_refused(cls: type, spoil: Spoil) -> None:
    assert_refused(cls, spoil, "^loaded state dict (is no dict|lacks)")


def test_a_hook_may_make_a_state_dict_of_what_is_none() -> None:
    optimizer, other = trained(fusedreg.AdamW), trained(fusedreg.AdamW, seed=1)
    optimizer.register_load_state_dict_pre_hook(lambda _, whole: whole["optimizer"])
    optimizer.load_state_dict({"epoch": 3, "optimizer": other.state_dict()})
    assert frozen(optimizer.state_dict()) == frozen(other.state_dict())


def one_group(saved: dict[str, Any]) -> None:
    saved["param_groups"].pop()


def three_groups(saved: dict[str, Any]) -> None:
    saved["param_groups"].append({**saved["param_groups"][1], "params": []})


def parameter_too_few(saved: dict[str, Any]) -> None:
    saved["param_groups"][1]["params"].pop()


def parameter_too_many(saved: dict[str, Any]) -> None:
    saved["param_groups"][1]["params"].append(9)


def bad_number(saved: dict[str, Any]) -> None:
    saved["param_groups"][1]["lr"] = math.nan


def state_of_nobody(saved: dict[str, Any]) -> None:
    saved["state"][9] = saved["state"][LAST]


MISFITS = [
    (one_group, "^loaded state dict has a different number of parameter groups"),  # torch's words
    (three_groups, "^loaded state dict has a different number of parameter groups"),
    (parameter_too_few, "^loaded state dict .* doesn't match the size of optimizer's group"),
    (parameter_too_many, "^loaded state dict .* doesn't match the size of optimizer's group"),
    (bad_number, "^Invalid learning rate: nan"),
    (state_of_nobody, "^loaded state dict .*9"),
]


@pytest.mark.parametrize(("spoil", "message"), MISFITS, ids=[each[0].__name__ for each in MISFITS])
@pytest.mark.parametrize("cls", CLASSES)
def test_groups_that_do_not_fit_are_refused(cls: type, spoil: Spoil, message: str) -> None:
    assert_refused(cls, spoil, message)


@pytest.mark.parametrize(
    ("cls", "name"),
    [
        (cls, name)
        for cls in CLASSES
        if len({*cls.tensor_states, *cls.counts}) > 1  # else it would lack all, as is allowed
        for name in (*cls.tensor_states, *cls.counts)
        if name not in cls.late_states
    ],
)
def test_incomplete_state_is_refused(cls: type, name: str) -> None:
    def spoil(saved: dict[str, Any]) -> None:
        del saved["state"][LAST][name]

    assert_refused(cls, spoil, f"^loaded state dict lacks '{name}' for parameter {LAST}")


def states(cls: type) -> set[str]:
    return {*cls.tensor_states, *cls.counts}


@pytest.mark.parametrize("cls", CLASSES)
def test_state_of_another_class_is_refused(cls: type) -> None:
    foreign = next(each for each in CLASSES if not states(each) & states(cls))

    def spoil(saved: dict[str, Any]) -> None:
        saved["state"][LAST] = copy.deepcopy(trained(foreign).state_dict()["state"][LAST])

    keys = "|".join(trained(foreign).state_dict()["state"][LAST])
    message = f"'({keys})' for parameter {LAST}, which {cls.__name__} does not keep"
    assert_refused(cls, spoil, f"^loaded state dict contains {message}")


def required(cls: type) -> set[str]:
    return states(cls) - {*cls.late_states}


@pytest.mark.parametrize(
    ("foreign", "cls"),
    [
        (foreign, cls)
        for foreign in CLASSES
        for cls in CLASSES
        if not required(foreign) <= states(cls)
    ],
)
def test_file_of_another_class_is_refused(foreign: type, cls: type) -> None:
    """Also where the two share a state: Adam's file has Lion's, and RMSprop's has SGD's."""
    saved, optimizer = trained(foreign).state_dict(), trained(cls)
    with refused(optimizer, ValueError, "loaded state dict (contains|lacks)"):
        optimizer.load_state_dict(saved)


# ---- a file is judged by itself and by the class that loads it -----------------------------------

STATELESS = "SGD without momentum"
WRITERS: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        name: (name, {"momentum": 0.9} if name in ("SGD", "RMSprop") else {})
        for name, cls in vars(torch.optim).items()
        if isinstance(cls, type) and issubclass(cls, Optimizer) and cls is not Optimizer
    },
    STATELESS: ("SGD", {}),
    "AMSGrad": ("Adam", {"amsgrad": True}),
}
"""Each class of torch.optim, and those of its options that keep other states."""
ADAMS = {"Adam", "AdamW", "AMSGrad", "RAdam", "SparseAdam"}
"""The same moments, of the same meaning."""
INTERCHANGEABLE: dict[type, set[str]] = {
    fusedreg.SGD: {"SGD", STATELESS},
    fusedreg.Adam: ADAMS,
    fusedreg.AdamW: ADAMS,
    fusedreg.LAMB: ADAMS,
    fusedreg.RMSprop: {"RMSprop"},
    fusedreg.Adagrad: {"Adagrad"},
    fusedreg.Lion: set(),
}
MATRIX = [(2, 3), (3, 2)]
"""Muon takes nothing else."""


def written_by(writer: str) -> dict[str, Any]:
    name, options = WRITERS[writer]
    cls = getattr(torch.optim, name)
    optimizer = cls(parameters(shapes=MATRIX), **options)

    def closure() -> torch.Tensor:
        params = parameters_of(optimizer)
        set_grads(params, 0)
        for param in params if name == "SparseAdam" else ():
            param.grad = param.grad.to_sparse()
        return torch.ones(())

    optimizer.step(closure)
    saved: dict[str, Any] = copy.deepcopy(optimizer.state_dict())
    assert saved["state"] or writer == STATELESS
    return saved


@pytest.fixture(params=[False, True], ids=["alone", "beside_others"])
def _other_classes(request: pytest.FixtureRequest) -> Iterator[list[type]]:
    """Classes of this program that have nothing to do with the file."""
    if not request.param:
        yield []
        return

    class Masked(fusedreg.SGD):
        tensor_states = (*fusedreg.SGD.tensor_states, "mask")
        counts = MappingProxyType({**fusedreg.SGD.counts, "counter": Count()})

    class Velocities(fusedreg.FusedOptimizer):
        tensor_states = ("velocity", "exp_avg", "note")
        counts = MappingProxyType({"mu_product": Count(1.0)})

    yield [Masked, Velocities]


@pytest.mark.usefixtures("_other_classes")
@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("cls", CLASSES)
def test_file_of_each_class_of_torch_loads_or_is_refused(cls: type, writer: str) -> None:
    saved, optimizer = written_by(writer), cls(parameters(shapes=MATRIX))
    if writer in INTERCHANGEABLE[cls]:
        optimizer.load_state_dict(saved)
        kept = optimizer.state_dict()["state"]
        assert {key: state.keys() for key, state in kept.items()} == {
            key: state.keys() for key, state in saved["state"].items()
        }
        run(optimizer, 1)
        return
    with refused(optimizer, ValueError, "^loaded state dict (contains|lacks) .* class"):
        optimizer.load_state_dict(saved)


OWN_STATES = {
    "mask": torch.tensor([True, False]),
    "counter": torch.tensor(3),
    "velocity": torch.ones(2),
    "note": "warm",
}


@pytest.mark.usefixtures("_other_classes")
@pytest.mark.parametrize("cls", CLASSES)
def test_own_entries_come_along_whatever_classes_there_are(cls: type) -> None:
    """Also of a parameter that has no state else."""
    optimizer, other = trained(cls), trained(cls, seed=1)
    for param in parameters_of(optimizer):
        optimizer.state[param].update(OWN_STATES)
    other.load_state_dict(optimizer.state_dict())
    for param in parameters_of(other):
        assert other.state[param].keys() >= OWN_STATES.keys()
    assert frozen(other.state_dict()) == frozen(optimizer.state_dict())


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("name", ["mu_product", "eta", "momentum_mass", "step"])
def test_a_count_of_another_class_is_refused(name: str, cls: Any) -> None:
    """NAdam's file differs from Adam's by `mu_product` alone."""

    def spoil(saved: dict[str, Any]) -> None:
        saved["state"][LAST][name] = torch.tensor(0.5)

    if name not in cls.counts:
        assert_refused(cls, spoil, f"^loaded state dict contains '{name}' for parameter {LAST}")


def test_subclass_with_a_state_of_its_own_asks_for_it() -> None:
    class Masked(fusedreg.Adam):
        tensor_states = (*fusedreg.Adam.tensor_states, "mask")

        def states(self, group: Any) -> tuple[str, ...]:
            return (*super().states(group), "mask")

    adam, masked, later = (
        cls(parameters(shapes=SHAPES)) for cls in (fusedreg.Adam, Masked, Masked)
    )
    run(adam, 1)
    with refused(masked, ValueError, "^loaded state dict lacks 'mask' for parameter 0"):
        masked.load_state_dict(adam.state_dict())
    with_mask = copy.deepcopy(adam.state_dict())
    for key, param in enumerate(parameters_of(adam)):
        with_mask["state"][key]["mask"] = torch.ones_like(param)
    later.load_state_dict(with_mask)
    assert frozen(later.state_dict()["state"]) == frozen(with_mask["state"])


@pytest.mark.parametrize("shape", [(3, 5), (5, 4), (15,), (1, 5, 3), (1,), (), (0,)], ids=str)
@pytest.mark.parametrize(
    ("cls", "name"), [(cls, name) for cls in CLASSES for name in cls.tensor_states]
)
def test_state_of_another_shape_is_refused(cls: type, name: str, shape: tuple[int, ...]) -> None:
    """Also where it would broadcast."""

    def spoil(saved: dict[str, Any]) -> None:
        saved["state"][1][name] = torch.ones(shape, dtype=torch.float64)

    shown = re.escape(str(shape))
    assert_refused(cls, spoil, f"^loaded state dict contains '{name}' of shape {shown}")


@pytest.mark.parametrize(("cls", "name"), [(cls, name) for cls in CLASSES for name in cls.counts])
def test_count_of_another_shape_is_refused(cls: type, name: str) -> None:
    def spoil(saved: dict[str, Any]) -> None:
        saved["state"][1][name] = torch.ones(2)

    assert_refused(cls, spoil, rf"^loaded state dict contains '{name}' of shape \(2,\)")


@pytest.mark.parametrize("value", [0.5, "warm", [1.0]], ids=repr)
@pytest.mark.parametrize(
    ("cls", "name"), [(cls, name) for cls in CLASSES for name in cls.tensor_states]
)
def test_state_that_is_no_tensor_is_refused(cls: type, name: str, value: object) -> None:
    def spoil(saved: dict[str, Any]) -> None:
        saved["state"][1][name] = value

    assert_refused(cls, spoil, f"^loaded state dict contains '{name}'")


# ---- files that others write ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "note",
    ["warm", np.ones(2), torch.ones(2), {}, OrderedDict()],
    ids=["text", "array", "tensor", "dict", "empty"],
)
@pytest.mark.parametrize("cls", CLASSES)
def test_what_a_user_keeps_beside_the_states_comes_with_the_file(cls: type, note: Any) -> None:
    optimizer, other = trained(cls), trained(cls, seed=1)
    for param in parameters_of(optimizer):  # the last has no state else
        optimizer.state[param]["note"] = note
    other.load_state_dict(optimizer.state_dict())
    for param in parameters_of(other):
        assert type(other.state[param]["note"]) is type(note)


@pytest.mark.parametrize("cls", CLASSES)
def test_any_mapping_is_a_state_dict(cls: type) -> None:
    optimizer, other = trained(cls), trained(cls, seed=1)
    saved = optimizer.state_dict()
    other.load_state_dict(
        UserDict(
            {
                **saved,
                "state": UserDict(saved["state"]),
                "param_groups": tuple(saved["param_groups"]),
            }
        )
    )
    assert frozen(other.state_dict()) == frozen(optimizer.state_dict())


def test_state_that_is_no_dict_is_refused() -> None:
    def spoil(saved: dict[str, Any]) -> None:
        saved["state"][0] = None

    assert_refused(fusedreg.Adam, spoil, "^loaded state dict contains None as the state")


NO_MOMENT: dict[str, Spoil] = {
    "text": lambda saved: saved["state"][1].update(step="x"),
    "negative": lambda saved: saved["state"][1].update(step=torch.tensor(-3.0)),
    "nan": lambda saved: saved["state"][1].update(step=math.nan),
    "complex_step": lambda saved: saved["state"][1].update(step=torch.tensor(1j)),
    "sparse": lambda saved: saved["state"][1].update(exp_avg=torch.zeros(5, 3).to_sparse()),
    "complex": lambda saved: saved["state"][1].update(exp_avg=torch.zeros(5, 3) * 1j),
    "group_of_another_kind": lambda saved: {**saved, "param_groups": [3, 4]},
    "params_of_another_kind": lambda saved: {**saved, "param_groups": [{"params": None}] * 2},
}


@pytest.mark.parametrize("spoil", NO_MOMENT.values(), ids=NO_MOMENT)
def test_state_that_no_step_could_use_is_refused(spoil: Spoil) -> None:
    assert_refused(fusedreg.Adam, spoil, "^loaded state dict ")

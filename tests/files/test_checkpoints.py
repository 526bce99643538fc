"""Files of every kind go in and out; those that are refused are in test_refused_files.py."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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

from cases import (
    CASES,
    CLASSES,
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
)
from compare import beyond_torch, frozen, parameters_of, refused, results, snapshot

SHAPES = [(0,), (5, 3), ()]


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

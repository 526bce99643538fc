"""Saving, loading, copying: a run goes on as if nothing had happened, in fusedreg and in torch."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import fusedreg

from cases import (
    CASES,
    CLASSES,
    DTYPES,
    PATHS,
    PLAIN,
    SOME,
    TORCH_CASES,
    Case,
    each_case,
    parameters,
    run,
    set_grads,
)
from compare import assert_close, beyond_torch, frozen, parameters_of, refused, snapshot

SHAPES = [(0,), (5, 3), ()]


def copies(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [nn.Parameter(param.detach().clone()) for param in parameters_of(optimizer)]


def through_a_file(saved: Any) -> Any:
    """Saved by torch.save, loaded as a stranger's file must be."""
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_continues(optimizer: Any, resumed: Any, steps: int = 2) -> None:
    """Both go the same way from here, to the last bit, and do not influence each other."""
    run(optimizer, steps, first_seed=50)
    run(resumed, steps, first_seed=50)
    ours, theirs = snapshot(optimizer), snapshot(resumed)
    assert ours["params"] == theirs["params"]
    assert ours["state"] == theirs["state"]


# ---- state_dict --------------------------------------------------------------------------------


@each_case(CASES)
def test_loaded_run_equals_uninterrupted_run(case: Case, path: str) -> None:
    optimizer = case.make(parameters(shapes=SHAPES), path, max_grad_norm=1.0)
    run(optimizer, 2)
    saved = through_a_file(optimizer.state_dict())
    before = frozen(saved)
    resumed = case.make(copies(optimizer), path, max_grad_norm=1.0)
    resumed.load_state_dict(saved)
    assert_continues(optimizer, resumed)
    assert frozen(saved) == before  # the optimizer shares no memory with what it loaded


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cls", CLASSES)
def test_own_settings_win_over_the_constructor_but_flags_do_not(
    cls: type, dtype: torch.dtype
) -> None:
    optimizer = cls(parameters(dtype=dtype), lr=0.1, l1=0.2, l1_mode="decoupled", fused=True)
    run(optimizer, 1)
    resumed = cls(copies(optimizer), lr=0.5, weight_decay=0.3, foreach=True)
    flags = {name: resumed.param_groups[0][name] for name in ("foreach", "fused", "differentiable")}
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    loaded, saved = resumed.param_groups[0], optimizer.param_groups[0]
    assert {name: loaded[name] for name in flags} == flags
    for name in saved.keys() - flags.keys() - {"params"}:
        assert loaded[name] == saved[name]
    # Interpreted kernels and LLVM's may differ in the last bit; here it is the settings.
    optimizer.param_groups[0]["fused"] = None
    assert_continues(optimizer, resumed)


@each_case(CASES)
def test_state_dict_holds_what_checkpoint_tools_can_take(case: Case) -> None:
    optimizer = case.make(parameters(shapes=SHAPES), max_grad_norm=1.0, skip_nonfinite=True)
    run(optimizer, 1)
    saved = optimizer.state_dict()
    assert saved.keys() == {"state", "param_groups"}
    for state in saved["state"].values():
        for name, value in state.items():
            assert isinstance(value, torch.Tensor)  # torch.distributed.checkpoint flattens these
            assert "." not in name  # and splits names there
            assert value.dim() == 0 or name in case.cls.tensor_states  # FSDP shards these
    assert {"max_grad_norm", "skip_nonfinite"}.isdisjoint(saved["param_groups"][0])
    for param, state in zip(parameters_of(optimizer), saved["state"].values(), strict=False):
        assert all(state[name] is optimizer.state[param][name] for name in state)  # live, as torch


@each_case(CASES)
def test_own_state_exists_only_where_it_is_used(case: Case, path: str) -> None:
    optimizer = case.make(parameters(shapes=SHAPES), path)
    run(optimizer, 2)
    options = case.options
    names = {name for state in optimizer.state.values() for name in state}
    thresholded = options["l1"] > 0 and options["l1_mode"] == "prox"
    # With dampening only the mass tells the first gradient, which is undamped, from the later ones.
    needs_mass = options.get("momentum", 0) > 0 and (thresholded or options.get("dampening", 0) > 0)
    more = beyond_torch(optimizer)
    assert names & more == (more if needs_mass else set())
    if case.torch_kwargs is not None:
        twin = case.torch_cls(copies(optimizer), **case.torch_kwargs, foreach=False)
        run(twin, 1)
        torchs = {name for state in twin.state.values() for name in state}
        assert names - more == torchs


# ---- torch's checkpoints -----------------------------------------------------------------------


@each_case(TORCH_CASES)
def test_training_goes_on_from_torch_and_back_in_torch(case: Case, path: str) -> None:
    only_torch = case.torch_cls(parameters(shapes=SHAPES), **case.torch_kwargs, foreach=False)
    run(only_torch, 6)

    optimizer = case.torch_cls(parameters(shapes=SHAPES), **case.torch_kwargs, foreach=False)
    run(optimizer, 2)
    for first_seed, cls, options in [
        (1002, case.cls, PATHS[path]),
        (1004, case.torch_cls, {"foreach": False}),
    ]:
        saved = through_a_file(optimizer.state_dict())
        optimizer = cls(copies(optimizer), **options)  # all else comes from the file
        optimizer.load_state_dict(saved)
        run(optimizer, 2, first_seed)
    # Only the two steps of fusedreg may round otherwise: one ulp each, which the last two carry on.
    assert_close(parameters_of(optimizer), parameters_of(only_torch), ulps=4)
    ours, theirs = (list(each.state.values()) for each in (optimizer, only_torch))
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        assert_close(one.values(), [other[name] for name in one], ulps=4)


@each_case(TORCH_CASES)
def test_options_missing_in_a_torch_file_keep_their_values(case: Case) -> None:
    theirs = case.torch_cls(parameters(), **case.torch_kwargs)
    run(theirs, 1)
    own = {"l1": 0.25, "l1_mode": "decoupled"}
    optimizer = case.cls(copies(theirs), **own)
    optimizer.load_state_dict(theirs.state_dict())
    group = optimizer.param_groups[0]
    assert {name: group[name] for name in own} == own
    assert all(group[name] == value for name, value in case.torch_kwargs.items())


@pytest.mark.parametrize("options", [{}, {"lr_independent_decay": True}], ids=str)
def test_adamw_stays_adamw_and_adam_stays_adam(options: dict[str, bool]) -> None:
    adam, adamw = torch.optim.Adam(parameters()), fusedreg.AdamW(parameters(), **options)
    run(adam, 1)
    adamw.load_state_dict(adam.state_dict())
    assert adamw.param_groups[0]["decoupled_weight_decay"] is True


@each_case(SOME)
def test_older_files_load(case: Case, path: str) -> None:
    """Before torch 1.12 a step count was a number; group options were added one by one."""
    optimizer = case.make(parameters(shapes=SHAPES), path)
    run(optimizer, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        for name in state.keys() & optimizer.counts.keys() - beyond_torch(optimizer):
            state[name] = state[name].item()
    for group in saved["param_groups"]:
        for name in group.keys() - case.kwargs.keys() - {"params"}:
            del group[name]
    resumed = case.cls(copies(optimizer), lr=0.5, **PATHS[path])
    resumed.load_state_dict(saved)
    assert_continues(optimizer, resumed)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_an_absent_state_that_an_older_file_calls_none_is_absent(
    momentum: float, path: str
) -> None:
    optimizers = []
    for _ in range(2):
        params = parameters(shapes=SHAPES)
        optimizers.append(fusedreg.SGD(params, lr=0.1, momentum=momentum, **PATHS[path]))
    saved = optimizers[0].state_dict()
    saved["state"] = {index: {"momentum_buffer": None} for index in range(len(SHAPES))}
    optimizers[0].load_state_dict(saved)
    assert_continues(*optimizers)


def test_counts_that_another_class_narrowed_are_widened() -> None:
    params = parameters(dtype=torch.bfloat16, shapes=SHAPES)
    for case in SOME:
        optimizer = case.make(params)
        run(optimizer, 1)
        saved = copy.deepcopy(optimizer.state_dict())
        for state in saved["state"].values():
            for name in state.keys() & set(optimizer.counts):
                state[name] = state[name].to(torch.bfloat16)
        before = {name: value.dtype for name, value in optimizer.state[params[-1]].items()}
        optimizer.load_state_dict(saved)
        after = {name: value.dtype for name, value in optimizer.state[params[-1]].items()}
        assert after == before


# ---- what loading must not do ------------------------------------------------------------------


def test_loading_shares_no_tensor_lr_with_the_file() -> None:
    first, second = (fusedreg.Adam(parameters(), lr=torch.tensor(0.1)) for _ in range(2))
    second.load_state_dict(first.state_dict())
    second.param_groups[0]["lr"].fill_(0.5)
    assert first.param_groups[0]["lr"] == torch.tensor(0.1)


@pytest.mark.parametrize("saved_as", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loading_never_narrows_a_state(
    dtype: torch.dtype, saved_as: torch.dtype, path: str
) -> None:
    optimizer = fusedreg.AdamW(parameters(dtype=dtype, shapes=SHAPES), **PATHS[path])
    run(optimizer, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["exp_avg"] = torch.randn(state["exp_avg"].shape).to(saved_as)
        state["mask"] = torch.ones(state["exp_avg"].shape, dtype=torch.bool)
        state["count"] = torch.tensor(2**24 + 1)
        state["step"] = torch.tensor(2.0**24 + 2, dtype=torch.float64)
    given = frozen(saved["state"])
    optimizer.load_state_dict(saved)
    loaded = optimizer.state_dict()["state"]
    for key, state in loaded.items():
        assert state["exp_avg"].dtype == torch.promote_types(dtype, saved_as)
        assert torch.equal(state["exp_avg"].to(saved_as), saved["state"][key]["exp_avg"])
        for name in ("mask", "count", "step"):
            assert frozen(state[name]) == given[key][name]
    run(optimizer, 1)  # a state wider than its parameter is stepped as it is
    assert loaded[1]["exp_avg"].dtype == torch.promote_types(dtype, saved_as)
    assert loaded[1]["step"] == 2**24 + 3


def wrong_group_count(saved: dict[str, Any]) -> None:
    saved["param_groups"].append({**saved["param_groups"][0], "params": []})


def wrong_group_size(saved: dict[str, Any]) -> None:
    saved["param_groups"][0]["params"].pop()


def wrong_shape(saved: dict[str, Any]) -> None:
    saved["state"][1]["exp_avg"] = saved["state"][1]["exp_avg"].t()


def wrong_option(saved: dict[str, Any]) -> None:
    saved["param_groups"][0]["l1"] = -1.0


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (wrong_group_count, "different number of parameter groups"),  # torch's words
        (wrong_group_size, "doesn't match the size of optimizer's group"),  # torch's words
        (wrong_shape, r"'exp_avg' of shape \(3, 5\) for parameter 1, which has shape \(5, 3\)"),
        (wrong_option, "Invalid l1 value"),
    ],
)
def test_a_file_that_does_not_fit_changes_nothing(
    spoil: Callable[[Any], None], message: str
) -> None:
    optimizer, other = (fusedreg.Adam(parameters(seed, shapes=SHAPES)) for seed in range(2))
    run(optimizer, 1)
    run(other, 2)
    saved = copy.deepcopy(other.state_dict())
    spoil(saved)
    with refused(optimizer, ValueError, message):
        optimizer.load_state_dict(saved)


def test_state_of_no_parameter_and_what_is_no_tensor_are_kept() -> None:
    optimizer = fusedreg.AdamW(parameters(shapes=SHAPES))
    run(optimizer, 1)
    saved = optimizer.state_dict()
    saved["state"]["run"] = {"seed": [1, 2]}
    saved["state"][0]["note"] = ["warm"]
    optimizer.load_state_dict(saved)
    loaded = optimizer.state_dict()["state"]
    assert loaded["run"] == {"seed": [1, 2]}
    assert loaded[0]["note"] == ["warm"]
    saved["state"]["run"]["seed"].append(3)
    saved["state"][0]["note"].append("cold")
    assert (loaded["run"], loaded[0]["note"]) == ({"seed": [1, 2]}, ["warm"])


def test_hooks_of_state_dict_and_load_state_dict() -> None:
    optimizer = fusedreg.AdamW(parameters(shapes=SHAPES), lr=0.1)
    run(optimizer, 1)
    calls: list[str] = []

    def lower_lr(_: Any, saved: dict[str, Any]) -> dict[str, Any]:
        calls.append("load_pre")
        groups = [{**group, "lr": 0.01} for group in saved["param_groups"]]
        return {**saved, "param_groups": groups}

    optimizer.register_state_dict_pre_hook(lambda _: calls.append("save_pre"))
    optimizer.register_state_dict_post_hook(lambda _, saved: {**saved, "mine": 1})
    optimizer.register_load_state_dict_pre_hook(lower_lr)
    optimizer.register_load_state_dict_pre_hook(lambda *_: calls.append("first"), prepend=True)
    optimizer.register_load_state_dict_post_hook(
        lambda loaded: calls.append(f"load_post {loaded.param_groups[0]['lr']}")
    )
    saved = optimizer.state_dict()
    assert saved["mine"] == 1
    optimizer.load_state_dict(saved)
    assert calls == ["save_pre", "first", "load_pre", "load_post 0.01"]
    assert saved["param_groups"][0]["lr"] == 0.1


@pytest.mark.parametrize("names_in", ["both", "file", "optimizer"])
def test_named_parameters_load_by_position(names_in: str, path: str) -> None:
    """As in torch: names are saved, and do not decide what belongs to what."""
    model = nn.Linear(3, 2)
    named, plain = list(model.named_parameters()), list(model.parameters())
    source = fusedreg.AdamW(named if names_in != "optimizer" else plain, **PATHS[path])
    run(source, 2)
    twin = copy.deepcopy(model)
    named, plain = list(twin.named_parameters()), list(twin.parameters())
    resumed = fusedreg.AdamW(named if names_in != "file" else plain, **PATHS[path])
    resumed.load_state_dict(through_a_file(source.state_dict()))
    assert resumed.param_groups[0]["param_names"] == ["weight", "bias"]
    assert_continues(source, resumed)


@each_case(CASES)
def test_distributed_checkpoint_round_trip(case: Case) -> None:
    """Through names instead of numbers, into an optimizer that has not stepped yet."""

    def build() -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
        return model, case.make(model.parameters())

    model, optimizer = build()
    run(optimizer, 2)
    saved = through_a_file(get_optimizer_state_dict(model, optimizer))
    twin, resumed = build()
    twin.load_state_dict(model.state_dict())
    before = snapshot(resumed)["params"]
    set_optimizer_state_dict(twin, resumed, saved)
    assert snapshot(resumed)["params"] == before
    assert_continues(optimizer, resumed)


# ---- copies ------------------------------------------------------------------------------------


def count_call(optimizer: Any, *_: Any) -> None:
    """A hook that pickle can find."""
    optimizer.calls = getattr(optimizer, "calls", 0) + 1


def pickled(optimizer: Any) -> Any:
    return pickle.loads(pickle.dumps(optimizer))


@each_case(CASES)
def test_a_copy_continues_identically(case: Case, path: str) -> None:
    optimizer = case.make(parameters(shapes=SHAPES), path, max_grad_norm=0.5, skip_nonfinite=True)
    run(optimizer, 1)
    set_grads(parameters_of(optimizer), 1)
    parameters_of(optimizer)[1].grad[0, 0] = torch.inf
    optimizer.step()
    for twin in (copy.deepcopy(optimizer), pickled(optimizer)):
        assert (twin.max_grad_norm, twin.skip_nonfinite) == (0.5, True)
        assert twin.skipped_steps == 1
        assert torch.isinf(twin.grad_norm)
        assert repr(twin) == repr(optimizer)
        assert twin.defaults == optimizer.defaults
        assert_continues(copy.deepcopy(optimizer), twin)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_a_copy_keeps_hooks_of_its_own(duplicate: Callable[[Any], Any]) -> None:
    optimizer = fusedreg.AdamW(parameters(shapes=SHAPES), fused=True)
    optimizer.register_step_pre_hook(count_call)
    optimizer.register_step_post_hook(count_call)
    optimizer.register_state_dict_pre_hook(count_call)
    optimizer.register_load_state_dict_post_hook(count_call)
    twin = duplicate(optimizer)
    assert twin._step_supports_amp_scaling
    run(twin, 1)
    twin.load_state_dict(twin.state_dict())
    assert twin.calls == 4
    assert not hasattr(optimizer, "calls")
    later = twin.register_step_post_hook(count_call)  # the copy can be hooked as any other
    run(twin, 1)
    later.remove()
    run(twin, 1)
    assert twin.calls == 4 + 3 + 2


def test_a_pickle_that_lacks_group_options_is_filled_up() -> None:
    optimizer = fusedreg.AdamW(parameters(shapes=SHAPES), max_grad_norm=0.5)
    run(optimizer, 1)
    twin = copy.deepcopy(optimizer)
    state = twin.__getstate__()
    # The first release of torch had only the lr of these.
    state["param_groups"] = [{name: twin.param_groups[0][name] for name in ("params", "lr")}]
    twin.__setstate__(state)
    assert twin.param_groups[0].keys() == optimizer.param_groups[0].keys()
    assert_continues(optimizer, twin)


# ---- options turned on later -------------------------------------------------------------------

LATER = [case for case in CASES if case.rule != PLAIN[case.cls].rule]


@each_case(LATER)
def test_options_may_be_turned_on_later(case: Case, path: str) -> None:
    """What they need begins at 0, and SGD's momentum as at its own first step."""
    optimizer = PLAIN[case.cls].make(parameters(shapes=SHAPES), path)
    run(optimizer, 2)
    optimizer.param_groups[0].update(case.kwargs)
    fresh = case.make(copies(optimizer), path)
    saved = copy.deepcopy(optimizer.state_dict())
    for key, state in saved["state"].items():  # SGD has none yet
        for name in fresh.states(fresh.param_groups[0]):
            state.setdefault(name, torch.zeros_like(parameters_of(optimizer)[key]))
    fresh.load_state_dict(saved)
    assert_continues(optimizer, fresh)


@pytest.mark.parametrize("cls", [cls for cls in CLASSES if "momentum_mass" in cls.counts])
def test_l1_turned_on_later_takes_the_momentum_as_warmed_up(cls: type, path: str) -> None:
    optimizer = cls(parameters(shapes=SHAPES), lr=0.01, momentum=0.9, **PATHS[path])
    run(optimizer, 2)
    optimizer.param_groups[0]["l1"] = 0.1
    run(optimizer, 1)
    # The limit 1 / (1 - momentum) stays where it is: one rounding each of 1 - 0.9, the quotient,
    # the product and the sum.
    mass = optimizer.state[parameters_of(optimizer)[1]]["momentum_mass"]
    assert mass.item() == pytest.approx(1 / 0.1, rel=4 * 2.0**-52)


def test_l1_turned_on_later_finds_the_mass_that_dampening_counted(path: str) -> None:
    options = {"lr": 0.01, "momentum": 0.5, "dampening": 0.25, **PATHS[path]}
    optimizer = fusedreg.SGD(parameters(shapes=SHAPES), **options)
    run(optimizer, 2)
    optimizer.param_groups[0]["l1"] = 0.1
    run(optimizer, 1)
    # 1, then twice 0.5 * mass + 0.75, all exact.
    assert optimizer.state[parameters_of(optimizer)[1]]["momentum_mass"].item() == 1.375


def test_l1_finds_the_limit_of_the_mass_for_a_damped_buffer_of_torch(path: str) -> None:
    options = {"lr": 0.01, "momentum": 0.5, "dampening": 0.25}
    theirs = torch.optim.SGD(parameters(shapes=SHAPES), **options)
    run(theirs, 2)
    optimizer = fusedreg.SGD(parameters(shapes=SHAPES), **options, **PATHS[path])
    optimizer.load_state_dict(theirs.state_dict())
    optimizer.param_groups[0]["l1"] = 0.1
    run(optimizer, 1)
    # 0.75 / 0.5, which 0.5 * mass + 0.75 leaves where it is, all exact.
    assert optimizer.state[parameters_of(optimizer)[1]]["momentum_mass"].item() == 1.5


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_parameter_twice_in_a_group_has_the_number_that_torch_gives_it() -> None:
    saved = []
    for cls in (torch.optim.Adam, fusedreg.Adam):
        model = nn.Linear(2, 2)
        weight, bias = model.parameters()
        optimizer = cls([weight, weight, bias], lr=0.1)
        set_grads([weight, bias], seed=1)
        optimizer.step()
        whole = get_optimizer_state_dict(model, optimizer)
        saved.append((optimizer.state_dict()["param_groups"][0]["params"], whole["state"].keys()))
    assert saved[0] == saved[1]

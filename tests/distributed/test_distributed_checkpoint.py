"""Files of torch.distributed.checkpoint, between ranks and from torch.optim."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from cases import CASES, SOME, Case, parameters, set_grads
from compare import parameters_of
from ranks import on_every_rank
from spread import (
    ADAM,
    ADAMW,
    LAMB,
    MAX_NORM,
    OTHERS,
    SGD,
    SHAPES,
    STEPS,
    assert_close,
    backward,
    follow,
    local,
    name,
    wholes,
    wrapped,
)

# ---- torch.distributed.checkpoint ---------------------------------------------------------------

FULL = {"full_state_dict": True}
OPTIONS: dict[str, dict[str, bool]] = {
    "sharded": {},
    "flattened": {"flatten_optimizer_state_dict": True},
    "full": FULL,
    "full_from_rank0": {**FULL, "cpu_offload": True, "broadcast_from_rank0": True},
}


def transfer(source: tuple[nn.Module, Any], target: tuple[nn.Module, Any], how: str) -> None:
    """Optimizer state by torch.distributed.checkpoint."""
    options = OPTIONS[how]
    saving = {option: on for option, on in options.items() if option != "broadcast_from_rank0"}
    state = get_optimizer_state_dict(*source, options=StateDictOptions(**saving))
    if "broadcast_from_rank0" in options and dist.get_rank():
        state = {}
    set_optimizer_state_dict(*target, state, options=StateDictOptions(**options))


@pytest.mark.parametrize(
    ("wrapper", "case", "how"),
    [
        *(("fsdp2", ADAMW, how) for how in OPTIONS),
        ("fsdp2", SGD, "full"),
        ("hsdp", ADAM, "sharded"),
        ("fsdp1", ADAM, "full"),
        ("fsdp1_views", SGD, "full"),
        ("fsdp2", LAMB, "full"),
        *(("fsdp2", case, "flattened") for case in OTHERS),
    ],
    ids=name,
)
@on_every_rank
def test_training_goes_on_from_a_distributed_checkpoint(wrapper: str, case: Case, how: str) -> None:
    first = wrapped(wrapper, case, max_grad_norm=MAX_NORM)
    alone = case.make(parameters(shapes=SHAPES), max_grad_norm=MAX_NORM)
    follow(first[1], alone, lambda seed: backward(first[0], seed), lambda: wholes(first[0]))
    second = wrapped(wrapper, case, max_grad_norm=MAX_NORM, lr=1e-9)
    with torch.no_grad():
        for param, old in zip(second[0].parameters(), first[0].parameters(), strict=True):
            param.copy_(old)
    transfer(first, second, how)
    seeds = range(STEPS, 2 * STEPS)
    follow(second[1], alone, lambda s: backward(second[0], s), lambda: wholes(second[0]), seeds)


@pytest.mark.parametrize(
    ("wrapper", "case"),
    [*(("fsdp2", case) for case in SOME), ("ddp", SGD), ("fsdp1", ADAMW), ("fsdp1_views", SGD)],
    ids=name,
)
@on_every_rank
def test_checkpoint_before_training_changes_no_training(wrapper: str, case: Case) -> None:
    """Asking for the state takes a step with lr 0, which is to count for nothing."""
    model, optimizer = wrapped(wrapper, case, max_grad_norm=MAX_NORM)
    alone = case.make(parameters(shapes=SHAPES), max_grad_norm=MAX_NORM)
    before = wholes(model)
    get_optimizer_state_dict(model, optimizer)
    assert_close(wholes(model), before, rtol=0, atol=0)
    follow(optimizer, alone, lambda seed: backward(model, seed), lambda: wholes(model))


@on_every_rank
def test_sums_begin_where_they_are_told_to_after_a_checkpoint_before_training() -> None:
    """And a file says so to an optimizer that was told another beginning."""
    (case,) = (case for case in OTHERS if case.rule == "adagrad_decay")
    first, second = (
        wrapped("fsdp2", case, initial_accumulator_value=start) for start in (0.25, 4.0)
    )
    for source, target, expected in ((first, first, 0.25), (first, second, 0.25)):
        transfer(source, target, "flattened")
        for state in target[1].state.values():
            assert (local(state["sum"]) == expected).all()
            assert state["step"] == 0
        assert target[1].param_groups[0]["decay_lr"] == case.options["lr"]


@pytest.mark.parametrize(
    ("how", "by_torch"),
    [*((how, False) for how in OPTIONS if how != "flattened"), *((how, True) for how in OPTIONS)],
)
@on_every_rank
def test_distributed_checkpoint_of_torch_adamw_goes_on_here(how: str, by_torch: bool) -> None:
    """Loaded at once, or by torch's class, which hands it over: docs/recipes.md says when."""
    case = next(case for case in CASES if case.id == "adamw-decay")
    first = wrapped("fsdp2", case)
    theirs = first[0], torch.optim.AdamW(first[0].parameters(), **case.torch_kwargs)
    alone = case.make(parameters(shapes=SHAPES))
    for seed in range(STEPS):
        backward(theirs[0], seed)
        theirs[1].step()
        set_grads(parameters_of(alone), seed)
        alone.step()
    theirs[0].zero_grad()  # torch asks for no state where there are gradients
    second = theirs[0], case.make(theirs[0].parameters(), lr=1e-9)
    if by_torch:
        reader = theirs[0], torch.optim.AdamW(theirs[0].parameters())
        transfer(theirs, reader, how)
        second[1].load_state_dict(reader[1].state_dict())
    else:
        transfer(theirs, second, how)
    seeds = range(STEPS, 2 * STEPS)
    follow(second[1], alone, lambda s: backward(second[0], s), lambda: wholes(second[0]), seeds)


@on_every_rank
def test_consolidated_state_of_zero_redundancy_loads_in_one_process() -> None:
    model, optimizer = wrapped("zero", ADAMW, max_grad_norm=MAX_NORM)
    alone = ADAMW.make(parameters(shapes=SHAPES), max_grad_norm=MAX_NORM)
    follow(optimizer, alone, lambda seed: backward(model, seed), lambda: wholes(model))
    optimizer.consolidate_state_dict(to=0)
    if dist.get_rank() == 0:
        one = ADAMW.make(wholes(model), lr=1e-9, max_grad_norm=MAX_NORM)
        one.load_state_dict(optimizer.state_dict())
        for each in (one, alone):
            set_grads(parameters_of(each), STEPS)
            each.step()
        assert_close(parameters_of(one), parameters_of(alone))
    dist.barrier()

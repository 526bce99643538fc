"""What torch schedules or averages beside an optimizer: it goes on, and goes on as in torch.

Every scheduler by itself, from a float and a tensor lr, is in test_options.py.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from test_options import lr_schedulers
from torch import nn
from torch.optim import lr_scheduler, swa_utils

from cases import SOME, TORCH_CLASSES, Case, by_id, parameters, run, tensors
from compare import assert_close, frozen, parameters_of, snapshot

SHAPES = [(5, 3), ()]

Schedule = Callable[[Any], Any]
SCHEDULES: dict[str, Schedule] = {
    **lr_schedulers(),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=0.01, anneal_epochs=4),
}
kinds = pytest.mark.parametrize("kind", [float, torch.tensor], ids=["floats", "tensors"])


def advance(optimizer: Any, schedule: Any, seeds: range) -> list[Any]:
    """One step for each seed; what the schedule wrote into the groups after each."""
    seen = []
    for seed in seeds:
        run(optimizer, 1, seed)
        plateau = isinstance(schedule, lr_scheduler.ReduceLROnPlateau)
        schedule.step(*([1.0] if plateau else []))
        names = ("lr", "momentum", "betas", "initial_lr", "swa_lr")
        groups = optimizer.param_groups
        seen.append(frozen([{n: group[n] for n in names if n in group} for group in groups]))
    return seen


@kinds
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("case", **by_id(SOME))
def test_a_schedule_resumes_from_a_file(
    case: Case, name: str, kind: Callable[[float], Any], tmp_path: Path
) -> None:
    def build() -> tuple[Any, Any]:
        optimizer = case.make(parameters(shapes=SHAPES), lr=kind(0.05))
        return optimizer, SCHEDULES[name](optimizer)

    whole, schedule = build()
    advance(whole, schedule, range(3))
    saved = [parameters_of(whole), whole.state_dict(), schedule.state_dict()]
    torch.save(saved, tmp_path / "run")
    values, of_optimizer, of_schedule = torch.load(tmp_path / "run", weights_only=True)
    resumed, again = build()
    with torch.no_grad():
        for param, value in zip(parameters_of(resumed), values, strict=True):
            param.copy_(value)
    resumed.load_state_dict(of_optimizer)
    again.load_state_dict(of_schedule)
    rest = range(3, 7)
    assert advance(resumed, again, rest) == advance(whole, schedule, rest)
    assert snapshot(resumed) == snapshot(whole)


CYCLES: dict[str, Schedule] = {
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(
        o, 0.01, 0.1, step_size_up=2, base_momentum=0.6, max_momentum=0.8
    ),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(
        o, 0.1, total_steps=8, base_momentum=0.6, max_momentum=0.8
    ),
}


@pytest.mark.parametrize("name", CYCLES)
@pytest.mark.parametrize("cls", [c for c in TORCH_CLASSES if "betas" in signature(c).parameters])
def test_tensor_betas_cycle_as_in_torch(cls: type, name: str) -> None:
    runs = []
    for make in (cls, getattr(torch.optim, cls.__name__)):
        options = {"lr": torch.tensor(0.05), "betas": (torch.tensor(0.9), torch.tensor(0.99))}
        params = parameters(dtype=torch.float32, shapes=SHAPES)
        optimizer = make(params, **options)
        runs.append((advance(optimizer, CYCLES[name](optimizer), range(6)), params))
    (ours, params), (theirs, expected) = runs
    assert ours == theirs
    assert len({str(each["betas"]) for (each,) in ours}) > 1  # they do cycle
    # A step of each side rounds by half an ulp, in the worst case always the other way.
    assert_close(params, expected, ulps=6)


@kinds
@pytest.mark.parametrize("strategy", ["cos", "linear"])
@pytest.mark.parametrize("cls", TORCH_CLASSES)
def test_swalr_after_another_schedule_moves_as_in_torch(
    cls: type, strategy: str, kind: Callable[[float], Any]
) -> None:
    runs = []
    for make in (cls, getattr(torch.optim, cls.__name__)):
        params = parameters(dtype=torch.float32, shapes=SHAPES)
        optimizer = make([{"params": [param], "lr": kind(0.1)} for param in params])
        before = lr_scheduler.MultiplicativeLR(optimizer, lambda epoch: 0.9)
        seen = advance(optimizer, before, range(2))
        average = swa_utils.SWALR(
            optimizer, swa_lr=[0.02, 0.01], anneal_epochs=3, anneal_strategy=strategy
        )
        seen += advance(optimizer, average, range(2, 7))
        runs.append((seen, params))
    (ours, params), (theirs, expected) = runs
    assert ours == theirs
    assert_close(params, expected, ulps=7)  # one a step, as above


AVERAGES: dict[str, dict[str, Any]] = {
    "equal": {},
    "swa": {"multi_avg_fn": swa_utils.get_swa_multi_avg_fn()},
    "ema": {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.9), "use_buffers": True},
}


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("cls", TORCH_CLASSES)
def test_averages_of_a_model_are_those_of_torch(cls: type, average: str) -> None:
    """Taken by hooks of the step, which see the parameters as the step leaves them."""
    averages = []
    for make in (cls, getattr(torch.optim, cls.__name__)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double()
        averaged = swa_utils.AveragedModel(model, **AVERAGES[average])
        optimizer = make(model.parameters(), lr=0.01)
        optimizer.register_step_post_hook(lambda *_, a=averaged, m=model: a.update_parameters(m))
        model(*tensors(0, shapes=[(6, 4)]))  # fills the buffers
        run(optimizer, 3)
        assert averaged.n_averaged == 3
        assert frozen(list(averaged.module.parameters())) != frozen(list(model.parameters()))
        numbers = averaged.module.state_dict().values()
        averages.append([each for each in numbers if each.is_floating_point()])
    # 2 ulp a step as in test_oracle, and one more for the mean.
    assert_close(*averages, ulps=3 * 3)


@pytest.mark.parametrize("case", **by_id(SOME))
def test_batch_norm_of_an_average_is_updated_and_nothing_else(case: Case) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double()
    averaged = swa_utils.AveragedModel(model)
    optimizer = case.make(model.parameters())
    run(optimizer, 2)
    averaged.update_parameters(model)
    before = snapshot(optimizer), frozen(list(averaged.parameters()))
    (x,) = tensors(0, shapes=[(6, 4)])
    swa_utils.update_bn([x], averaged)
    assert (snapshot(optimizer), frozen(list(averaged.parameters()))) == before
    mean = averaged.module[0](x).mean(0)
    assert_close([averaged.module[1].running_mean], [mean], ulps=6)  # sums of 6

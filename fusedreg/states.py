"""The states of parameters: created, and checked where a user may have written into them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fusedreg import dist
from fusedreg.checks import check_count, check_planes
from fusedreg.contract import UpdateRule
from fusedreg.formats import planes_of
from fusedreg.scalars import number
from fusedreg.types import GroupsWithGrads, ParamGroup, Settings, States


def settings_of(
    rule: UpdateRule, group: ParamGroup, params: Iterable[Tensor]
) -> dict[torch.device, Settings]:
    """The numbers of a group on every device of its parameters."""
    return {
        device: {name: number(group[name], device) for name in rule.defaults}
        for device in {param.device: None for param in params}
    }


def create_states(rule: UpdateRule, states: States, work: GroupsWithGrads) -> None:
    """Create what the states of some parameters lack for their next step."""
    for group, params in work:
        for param in params:
            if param in states:
                _tidy(rule, group, param, states[param])
        for device, settings in settings_of(rule, group, params).items():
            needed = rule.counts_of(settings), rule.states(settings)
            for param in params:
                if param.device == device:
                    state = states.get(param, {})
                    if not _is_complete(rule, group, param, state, *needed):
                        rule.init_state(settings, param, state)
                        _check_counts(rule, needed[0], state)
                    if dist.where_of(param) is not None:
                        _shard_alike(rule, group, param, state)
                    if state:
                        states[param] = state


def _tidy(rule: UpdateRule, group: ParamGroup, param: Tensor, state: dict[str, Tensor]) -> None:
    """Take what a user wrote into the state of a parameter: None forgets, a number counts."""
    storage = rule.state_format(group, param)
    for name in rule.tensor_states:
        check_planes(group, param, name, {p: state.get(p) for p in planes_of(storage, [name])})
    for name in rule.counts:
        check_count(group, param, name, state.get(name))
    for name in (*planes_of(storage, rule.tensor_states), *rule.counts):
        value = state.get(name)
        if value is None:
            state.pop(name, None)
        elif name in rule.counts and not isinstance(value, Tensor):
            state[name] = rule.counts[name].create(param, value)


def _is_complete(
    rule: UpdateRule,
    group: ParamGroup,
    param: Tensor,
    state: dict[str, Tensor],
    counts: Sequence[str],
    names: Sequence[str],
) -> bool:
    """Whether all is there that a step is known to need; never of an empty state."""
    if not state or not all(map(state.__contains__, counts)):
        return False
    planes = planes_of(rule.state_format(group, param), names)
    return all(map(state.__contains__, planes))


def _check_counts(rule: UpdateRule, counts: Sequence[str], state: dict[str, Tensor]) -> None:
    """Raise where a count is missing, which kernels would take for 1."""
    for name in counts:
        if name not in state:
            raise RuntimeError(
                f"{type(rule).__name__}.init_state creates no {name!r}: call "
                "super().init_state, which creates all counts that counts_of names"
            )


def _shard_alike(
    rule: UpdateRule, group: ParamGroup, param: Tensor, state: dict[str, Tensor]
) -> None:
    """Give the planes of a DTensor its placements, so that their parts belong together."""
    for name in planes_of(rule.state_format(group, param), rule.tensor_states):
        if name in state:
            state[name] = dist.sharded_as(param, state[name])

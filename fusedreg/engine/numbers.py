"""The numbers of each param group as a device takes them, compared in every step.

A scheduler may change every group in every step, so this reads a group as one tuple of options and
compares it by identity. Where only lr is another float, one number of the line is replaced. Other
changes are checked once for all groups that changed alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from operator import is_, itemgetter
from typing import Any, NamedTuple

from torch import Tensor

from fusedreg.contract import UpdateRule
from fusedreg.kernels.contract import FIRST_NUMBER, SLOTS, Backend, DeviceFunction, Hook
from fusedreg.kernels.contract import Rule as DeviceRule
from fusedreg.kernels.layout import Group, with_lr
from fusedreg.penalties import Term
from fusedreg.scalars import Number, is_on_device, on_host
from fusedreg.types import ParamGroup


class Structure(NamedTuple):
    """What the options of a group decide: which kernels its parameters need."""

    rule: DeviceRule | None
    """None where the reference path steps its parameters."""
    states: tuple[str, ...]
    fused: bool | None
    hooks: tuple[tuple[str, DeviceFunction], ...]
    """Stage and function of each hook of its penalties."""


class GroupNumbers:
    """One line of numbers for each group, and what its options decide.

    It does not keep the optimizer, which owns it: a cycle would keep both alive.

    Args:
        rule: the optimizer.
        backend: what launches the kernels.
        groups: all param groups, checked.
    """

    def __init__(self, rule: UpdateRule, backend: Backend, groups: list[ParamGroup]) -> None:
        self._backend = backend
        self._options_of = itemgetter("lr", *(name for name in rule.defaults if name != "lr"))
        self._options = [self._options_of(group) for group in groups]
        self._seen = [_snapshot_if_mutable(options) for options in self._options]
        self._sizes = [len(group) for group in groups]
        self.structure = [self._structure(rule, group) for group in groups]
        self.hooks = self._placed(rule, groups)
        """The hooks of all groups, in the order of the optimizer's penalties."""
        self.options = len([*_elements(groups[0][name] for name in rule.device_options)])
        """How many options the rule takes."""
        self.width = FIRST_NUMBER + sum(hook.width for hook in self.hooks) + self.options
        """How many numbers a line has."""
        self.lines = [self._line(rule, group) for group in groups]
        self.hooks_of = self._packed()
        """The hooks of the launch that a group is part of."""

    def _placed(self, rule: UpdateRule, groups: list[ParamGroup]) -> list[Hook]:
        """Each hook that any group needs, once, and where its numbers are in a line."""
        hooks: dict[tuple[str, DeviceFunction], Hook] = {}
        first = FIRST_NUMBER
        for penalty in rule.penalties:
            for term in (term for group in groups for term in penalty.terms(group)):
                function = self._backend.hook(term.function)
                if (term.stage, function) not in hooks:
                    width = len(term.numbers)
                    hooks[term.stage, function] = Hook(term.stage, function, first, width)
                    first += width
        return [*hooks.values()]

    def _packed(self) -> list[tuple[Hook, ...]]:
        """Gather groups into as few launches as have slots for all their hooks."""
        packs: list[set[Hook]] = []
        pack_of: list[set[Hook]] = []
        for structure in self.structure:
            own = {hook for hook in self.hooks if (hook.stage, hook.function) in structure.hooks}
            pack = next((pack for pack in packs if _has_slots(pack | own)), None)
            if pack is None:
                pack = set()
                packs.append(pack)
                if not _has_slots(own):
                    raise ValueError(
                        f"kernels have {SLOTS} slots for penalties at each stage of a step, and a "
                        "param group has more at once: pass fused=False"
                    )
            pack |= own
            pack_of.append(pack)
        return [tuple(hook for hook in self.hooks if hook in pack) for pack in pack_of]

    def refresh(self, rule: UpdateRule, groups: list[ParamGroup]) -> bool | None:
        """Take over this step's options, say whether any changed; None: they need another plan.

        Raises what checking a group raises, for one that changed.
        """
        if len(groups) != len(self._options):
            return None
        changed = False
        alike: dict[tuple[object, ...], tuple[list[Number], Structure]] = {}
        for index, group in enumerate(groups):
            options, old = self._options_of(group), self._options[index]
            if len(group) != self._sizes[index] or not rule.own_options.isdisjoint(group.keys()):
                rule.validate(group)  # a key that was added is refused or warned of
                self._sizes[index] = len(group)
            if all(map(is_, options, old)):
                seen = self._seen[index]
                if seen is None or seen == _snapshot(options):
                    continue
            if not self._take(index, rule, group, options, alike):
                return None
            changed = True
        return changed

    def _take(
        self,
        index: int,
        rule: UpdateRule,
        group: ParamGroup,
        options: tuple[Any, ...],
        alike: dict[tuple[object, ...], tuple[list[Number], Structure]],
    ) -> bool:
        """Replace a line, the quick way where that is known to be right."""
        lr, others = options[0], options[1:]
        simple = type(lr) is float and lr >= 0 and self._seen[index] is None
        if simple and all(map(is_, others, self._options[index][1:])):
            self._options[index] = options
            self.lines[index] = with_lr(self.lines[index], lr)
            return True
        mutable = _snapshot_if_mutable(options)
        found = alike.get(others) if simple and mutable is None else None
        if found is not None:
            line, structure = with_lr(found[0], lr), found[1]
        else:
            rule.validate(group)
            options = self._options_of(group)  # which the check may have made plain
            mutable = _snapshot_if_mutable(options)
            structure = self._structure(rule, group)
            if structure != self.structure[index]:
                return False
            line = self._line(rule, group)
            if mutable is None:
                alike[options[1:]] = line, structure
        if structure != self.structure[index]:
            return False
        self._options[index], self._seen[index], self.lines[index] = options, mutable, line
        return True

    def _structure(self, rule: UpdateRule, group: ParamGroup) -> Structure:
        """What of a group's options decides which kernels its parameters need."""
        names, wanted = rule.states(group), rule.device_rule(group)
        device_rule = None
        if wanted is not None:
            options = [*_elements(group[name] for name in rule.device_options)]
            device_rule = self._backend.rule(
                wanted, states=len(names), counts=len(rule.counts), options=len(options)
            )
        hooks = tuple(
            (term.stage, self._backend.hook(term.function)) for term in _terms(rule, group)
        )
        return Structure(device_rule, names, group["fused"], hooks)

    def _line(self, rule: UpdateRule, group: ParamGroup) -> list[Number]:
        """The numbers of a group in the device's order; a tensor where it must not be read."""
        line: list[Number] = [0.0] * self.width
        line[:FIRST_NUMBER] = Group(lr=group["lr"], sign=-1.0 if group["maximize"] else 1.0)
        for term in _terms(rule, group):
            function = self._backend.hook(term.function)
            (first,) = (
                hook.first
                for hook in self.hooks
                if (hook.stage, hook.function) == (term.stage, function)
            )
            line[first : first + len(term.numbers)] = term.numbers
        line[self.width - self.options :] = _elements(group[name] for name in rule.device_options)
        return [value if is_on_device(value) else float(value) for value in line]


def _terms(rule: UpdateRule, group: ParamGroup) -> Iterator[Term]:
    """What the penalties of a group ask of kernels."""
    return (term for penalty in rule.penalties for term in penalty.terms(group))


def _has_slots(hooks: set[Hook]) -> bool:
    """Whether one launch can run all these hooks."""
    stages = [hook.stage for hook in hooks]
    return all(stages.count(stage) <= slots for stage, slots in SLOTS.items())


def _snapshot(options: object) -> object:
    """Options with the numbers that they hold now."""
    if isinstance(options, (tuple, list)):
        return tuple(map(_snapshot, options))
    if isinstance(options, Tensor) and on_host(options) and options.numel() == 1:
        return options.item()
    return options


def _snapshot_if_mutable(options: tuple[object, ...]) -> object:
    """The same where an option may change without being replaced, else None."""
    return _snapshot(options) if any(map(_is_mutable, options)) else None


def _is_mutable(option: object) -> bool:
    """Whether an option is a list or the like, or a tensor that the host may read."""
    if isinstance(option, tuple):
        return any(map(_is_mutable, option))
    return type(option).__hash__ is None or (isinstance(option, Tensor) and on_host(option))


def _elements(values: Iterable[Any]) -> Iterator[Any]:
    """Numbers one by one, also those of a pair."""
    for value in values:
        yield from value if isinstance(value, (tuple, list)) else (value,)

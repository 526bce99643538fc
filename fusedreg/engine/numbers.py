"""The numbers of each param group as a device takes them, compared in every step.

A scheduler may change every group in every step, so this reads a group as one tuple of options and
compares it by identity. Where only lr is another float, one number is replaced. Other
changes are checked once for all groups that changed alike.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from operator import is_, itemgetter
from typing import Any, NamedTuple

from torch import Tensor

from fusedreg.contract import UpdateRule
from fusedreg.kernels.contract import FIRST_NUMBER, SLOTS, Backend, DeviceFunction, Hook, Stage
from fusedreg.kernels.contract import Rule as DeviceRule
from fusedreg.kernels.layout import GroupScalars, with_lr
from fusedreg.scalars import Number, is_on_device, on_host
from fusedreg.types import ParamGroup


class Asked(NamedTuple):
    """A hook that a group asks for. One launch gives groups that ask for the same one slot."""

    penalty: int
    """Which of the optimizer's penalties it belongs to."""
    term: int
    """Which of this penalty's terms it is."""
    stage: Stage
    function: DeviceFunction
    width: int
    """How many numbers it takes."""


class Structure(NamedTuple):
    """What the options of a group decide: which kernels its parameters need."""

    kernel_rule: DeviceRule | str | None
    """As the optimizer says it."""
    states: tuple[str, ...]
    counts: tuple[str, ...]
    fused: bool | None
    rule: DeviceRule | None = None
    """The rule itself where kernels step any of the parameters; else the rest says nothing."""
    options: int = 0
    """How many options the rule takes."""
    hooks: tuple[Asked, ...] = ()


class GroupNumbers:
    """The scalars of each group, and what its options decide.

    It does not keep the optimizer, which owns it: a cycle would keep both alive.

    Args:
        rule: the optimizer.
        backend: what launches the kernels.
        groups: all param groups, checked.
        stepped: places of the groups with parameters that kernels step.
    """

    def __init__(
        self,
        rule: UpdateRule,
        backend: Backend,
        groups: list[ParamGroup],
        stepped: Collection[int],
    ) -> None:
        self._backend, self._stepped = backend, stepped
        self._options_of = itemgetter("lr", *(name for name in rule.defaults if name != "lr"))
        self._rule_takes_lr = "lr" in rule.device_options
        self._options = [self._options_of(group) for group in groups]
        self._seen = [_snapshot_if_mutable(options) for options in self._options]
        self._sizes = [len(group) for group in groups]
        read = [self._read(rule, group, index) for index, group in enumerate(groups)]
        self.structure = [structure for structure, _ in read]
        self._hooks = self._placed()
        """The hooks of all groups, in the order of the optimizer's penalties."""
        widths = (hook.width for hook in self._hooks.values())
        options = max((structure.options for structure in self.structure), default=0)
        self.width = FIRST_NUMBER + sum(widths) + options
        """How many scalars a group has."""
        self.scalars = [
            self._scalars(rule, group, *each) for group, each in zip(groups, read, strict=True)
        ]
        self.hooks_of = self._packed()
        """The hooks of the launch that a group is part of."""

    def _placed(self) -> dict[Asked, Hook]:
        """Each hook that any group asks for, once, and where its numbers are among the scalars."""
        asked = dict.fromkeys(hook for structure in self.structure for hook in structure.hooks)
        hooks: dict[Asked, Hook] = {}
        first = FIRST_NUMBER
        for one in sorted(asked, key=itemgetter(0, 1)):
            hooks[one] = Hook(one.stage, one.function, first, one.width)
            first += one.width
        return hooks

    def _packed(self) -> list[tuple[Hook, ...]]:
        """Gather groups into as few launches as have slots for all their hooks."""
        packs: list[set[Hook]] = []
        pack_of: list[set[Hook]] = []
        for structure in self.structure:
            own = {self._hooks[asked] for asked in structure.hooks}
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
        return [tuple(hook for hook in self._hooks.values() if hook in pack) for pack in pack_of]

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
        """Replace the scalars of a group, the quick way where that is known to be right."""
        lr, others = options[0], options[1:]
        simple = type(lr) is float and lr >= 0 and self._seen[index] is None
        simple = simple and not self._rule_takes_lr
        if simple and all(map(is_, others, self._options[index][1:])):
            self._options[index] = options
            self.scalars[index] = with_lr(self.scalars[index], lr)
            return True
        mutable = _snapshot_if_mutable(options)
        kind = (index in self._stepped, *others)
        found = alike.get(kind) if simple and mutable is None else None
        if found is not None:
            scalars, structure = with_lr(found[0], lr), found[1]
        else:
            rule.validate(group)
            options = self._options_of(group)  # which the check may have made plain
            mutable = _snapshot_if_mutable(options)
            structure, asked = self._read(rule, group, index)
            if structure != self.structure[index]:
                return False
            scalars = self._scalars(rule, group, structure, asked)
            if mutable is None:
                kind = (index in self._stepped, *options[1:])
                alike[kind] = scalars, structure
        if structure != self.structure[index]:
            return False
        self._options[index], self._seen[index], self.scalars[index] = options, mutable, scalars
        return True

    def _read(
        self, rule: UpdateRule, group: ParamGroup, index: int
    ) -> tuple[Structure, dict[Asked, tuple[Number, ...]]]:
        """What the options of a group decide, and the numbers of the hooks that it asks for."""
        wanted, names = rule.kernel_rule(group), rule.states(group)
        structure = Structure(wanted, names, rule.counts_of(group), group["fused"])
        if wanted is None or index not in self._stepped:
            return structure, {}
        options = len([*_options_of_rule(rule, group)])
        device_rule = self._backend.rule(
            wanted, states=len(names), counts=len(rule.counts), options=options
        )
        asked: dict[Asked, tuple[Number, ...]] = {}
        for place, penalty in enumerate(rule.penalties):
            for turn, (stage, function, numbers, _) in enumerate(penalty.terms(group)):
                if not numbers:
                    raise ValueError(
                        f"{type(penalty).__name__}.terms yields a Term without numbers, so a group "
                        "without the penalty, which has zeros for them, would have it too: give it "
                        "the number 1.0"
                    )
                hook = self._backend.hook(function)
                asked[Asked(place, turn, stage, hook, len(numbers))] = numbers
        return structure._replace(rule=device_rule, options=options, hooks=(*asked,)), asked

    def _scalars(
        self,
        rule: UpdateRule,
        group: ParamGroup,
        structure: Structure,
        asked: dict[Asked, tuple[Number, ...]],
    ) -> list[Number]:
        """The numbers of a group in the device's order; a tensor where it must not be read."""
        scalars: list[Number] = [0.0] * self.width
        if structure.rule is None:
            return scalars  # no kernel reads it
        scalars[:FIRST_NUMBER] = GroupScalars(
            lr=group["lr"], sign=-1.0 if group["maximize"] else 1.0
        )
        for hook, numbers in asked.items():
            first = self._hooks[hook].first
            scalars[first : first + hook.width] = numbers
        scalars[self.width - structure.options :] = _options_of_rule(rule, group)
        return [value if is_on_device(value) else float(value) for value in scalars]


def _options_of_rule(rule: UpdateRule, group: ParamGroup) -> Iterator[Any]:
    """The numbers that a group's device rule takes, also those of a pair one by one."""
    for name in rule.device_options:
        value = group[name]
        yield from value if isinstance(value, (tuple, list)) else (value,)


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

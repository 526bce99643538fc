"""The numbers of each param group as a device takes them, compared in every step.

A scheduler may change every group in every step, so this reads a group as one tuple of options and
compares it by identity. Where only lr is another float, one number of the line is replaced. Other
changes are checked once for all groups that changed alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import is_, itemgetter
from typing import Any, Protocol

from torch import Tensor

from fusedreg.scalars import Number, on_host

Groups = Sequence[dict[str, Any]]


class Rule(Protocol):
    """The part of an optimizer that the engine needs; see FusedOptimizer, which documents it."""

    defaults: dict[str, Any]
    own_options: frozenset[str]
    tensor_states: tuple[str, ...]
    scalar_states: tuple[str, ...]
    device_options: tuple[str, ...]
    layerwise: bool

    def device_rule(self, group: Mapping[str, Any]) -> Any:
        """The rule, or its name in `fusedreg.kernels.device.rules`."""

    def states(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        """Names of the tensor states that the rule moves."""

    def _check_group(self, group: dict[str, Any]) -> None:
        """Raise where an option is out of range."""


class Lines:
    """One line of numbers for each group, and what its options decide.

    It does not keep the optimizer, which owns it: a cycle would keep both alive.

    Args:
        rule: the optimizer.
        launch: the module that launches kernels.
        groups: all param groups, checked.
    """

    def __init__(self, rule: Rule, launch: Any, groups: Groups) -> None:
        self._launch = launch
        self._options_of = itemgetter("lr", *(name for name in rule.defaults if name != "lr"))
        self._options = [self._options_of(group) for group in groups]
        self._seen = [_snapshot_if_mutable(options) for options in self._options]
        self._sizes = [len(group) for group in groups]
        self.lines = [self._line(rule, group) for group in groups]
        self.structure = [
            self._structure(rule, group, line)
            for group, line in zip(groups, self.lines, strict=True)
        ]
        """What the options of each group decide: rule, states, hooks, path."""
        self.stale = True
        """Whether the lines differ from those that were sent last."""

    def refresh(self, rule: Rule, groups: Groups) -> bool:
        """Take over this step's options; False where they ask for another plan.

        Raises what checking a group raises, for one that changed.
        """
        if len(groups) != len(self._options):
            return False
        alike: dict[tuple[Any, ...], tuple[list[Number], tuple[Any, ...]]] = {}
        for index, group in enumerate(groups):
            options, old = self._options_of(group), self._options[index]
            if len(group) != self._sizes[index] or not rule.own_options.isdisjoint(group.keys()):
                rule._check_group(group)  # a key that was added is refused or warned of
                self._sizes[index] = len(group)
            if all(map(is_, options, old)):
                seen = self._seen[index]
                if seen is None or seen == _snapshot(options):
                    continue
            if not self._take(index, rule, group, options, alike):
                return False
        return True

    def _take(
        self,
        index: int,
        rule: Rule,
        group: dict[str, Any],
        options: tuple[Any, ...],
        alike: dict[tuple[Any, ...], tuple[list[Number], tuple[Any, ...]]],
    ) -> bool:
        """Replace a line, the quick way where that is known to be right."""
        self.stale = True
        lr, others = options[0], options[1:]
        simple = type(lr) is float and lr >= 0 and self._seen[index] is None
        if simple and all(map(is_, others, self._options[index][1:])):
            self._options[index] = options
            self.lines[index] = self._launch.with_lr(self.lines[index], lr)
            return True
        mutable = _snapshot_if_mutable(options)
        found = alike.get(others) if simple and mutable is None else None
        if found is not None:
            line, structure = self._launch.with_lr(found[0], lr), found[1]
        else:
            rule._check_group(group)
            options = self._options_of(group)  # which the check may have made plain
            mutable = _snapshot_if_mutable(options)
            line = self._line(rule, group)
            structure = self._structure(rule, group, line)
            if mutable is None:
                alike[options[1:]] = line, structure
        if structure != self.structure[index]:
            return False
        self._options[index], self._seen[index], self.lines[index] = options, mutable, line
        return True

    def _structure(self, rule: Rule, group: dict[str, Any], line: list[Number]) -> tuple[Any, ...]:
        """What of a group's options decides which state, rule and hooks its parameters need."""
        names = rule.states(group)
        device_rule = self._launch.rule_of(
            rule.device_rule(group),
            states=len(names),
            counts=len(rule.scalar_states),
            line=len(line),
        )
        hooks = self._launch.penalties([line])
        return device_rule, names, group["l1_mode"] == "decoupled", group["fused"], hooks

    def _line(self, rule: Rule, group: dict[str, Any]) -> list[Number]:
        """The numbers of a group in the device's order; a tensor where it must not be read."""
        decay, l1, mode = group["weight_decay"], group["l1"], group["l1_mode"]
        decoupled = group["decoupled_weight_decay"]
        line = self._launch.line(
            lr=group["lr"],
            maximize=group["maximize"],
            coupled=0.0 if decoupled else decay,
            decoupled=decay if decoupled else 0.0,
            subgradient=l1 if mode == "subgradient" else 0.0,
            prox=l1 if mode == "prox" else 0.0,
            shrink=l1 if mode == "decoupled" else 0.0,
            decay_lr=group["decay_lr"] if group["lr_independent_decay"] else 1.0,
            options=_elements(group[name] for name in rule.device_options),
        )
        return [value if is_remote(value) else float(value) for value in line]


def is_remote(value: object) -> bool:
    """Whether reading `value` would wait for a device."""
    return isinstance(value, Tensor) and not on_host(value)


def _snapshot(options: Any) -> Any:
    """Options with the numbers that they hold now."""
    if isinstance(options, (tuple, list)):
        return tuple(map(_snapshot, options))
    if isinstance(options, Tensor) and on_host(options) and options.numel() == 1:
        return options.item()
    return options


def _snapshot_if_mutable(options: tuple[Any, ...]) -> Any:
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

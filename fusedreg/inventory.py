"""What a plan of kernels was made for, and whether it still holds.

Each step compares addresses, sizes and dtypes of parameters, gradients and states with those seen
before, so that no address is used after its tensor is gone. This runs for every parameter in every
step, so it maps C functions over lists and looks at single tensors only where those differ.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import reduce
from itertools import chain
from operator import attrgetter, is_, itemgetter, or_
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from fusedreg.backend import same_layout
from fusedreg.dist import is_sharded_alike, local, spread_of
from fusedreg.scalars import Number, on_host

Groups = Sequence[dict[str, Any]]
States = Mapping[Any, dict[str, Tensor]]

# Bound once, because they run so often.
_params_of = itemgetter("params")
_grad_of = attrgetter("grad")
_dtype_of = attrgetter("dtype")
_numel_of = Tensor.numel
_address_of = Tensor.data_ptr
_is_contiguous = Tensor.is_contiguous

ALIGNMENT = 16
"""Bytes of the widest access of a GPU."""
EMPTY = 16
"""Stands for the address of an empty gradient, because 0 stands for none."""


class Rule(Protocol):
    """The part of an optimizer that the engine needs; see FusedOptimizer, which documents it."""

    defaults: dict[str, Any]
    tensor_states: tuple[str, ...]
    scalar_states: tuple[str, ...]
    device_options: tuple[str, ...]
    layerwise: bool

    def device_rule(self, group: Mapping[str, Any]) -> Any:
        """The rule, or its name in `fusedreg.kernels.rules`."""

    def states(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        """Names of the tensor states that the rule moves."""

    def _check_group(self, group: dict[str, Any]) -> None:
        """Raise where an option is out of range."""


class Inventory:
    """The parameters, states, options and gradients that kernels step with.

    Args:
        rule: the optimizer.
        kernels: the module that launches the kernels of each parameter.
        groups: all param groups.
        chosen: the parameters that kernels step, each with the index of its group. Parameter,
            gradient and states of each are walkable.
        rest: the parameters that the reference steps.
        state: the optimizer's state, complete for the chosen ones.
        grad_dtypes: what is known of gradients that are not there now.
    """

    def __init__(
        self,
        rule: Rule,
        kernels: Mapping[Tensor, ModuleType | None],
        groups: Groups,
        chosen: Mapping[Tensor, int],
        rest: Collection[Tensor],
        state: States,
        grad_dtypes: Mapping[Tensor, torch.dtype],
    ) -> None:
        self.rule, self.chosen, self.rest = rule, chosen, rest
        self.stepped = list(chosen)
        self.launchers = [kernels[param] for param in chosen]
        self.launch: Any = self.launchers[0]  # tables and numbers are the same for all
        self.group_of = list(chosen.values())
        self.sharded = any(local(param) is not param for param in chosen)
        self._take_places(groups)
        self.options_of = itemgetter(*rule.defaults)
        self.options = [self.options_of(group) for group in groups]
        self.changeable = [any(map(_may_change, options)) for options in self.options]
        self.lines = [self._line(group) for group in groups]
        self.structure = [self._structure(*pair) for pair in zip(groups, self.lines, strict=True)]
        self._take_states(groups, state)

        # From here on tensors stand for what of them is here.
        self.params = list(map(local, chosen))
        self.contiguous = list(map(_is_contiguous, self.params))
        self.numels = list(map(_numel_of, self.params))
        self.single = [i for i, numel in enumerate(self.numels) if numel == 1]
        self.permuted = [i for i, contiguous in enumerate(self.contiguous) if not contiguous]
        self.grad_dtypes = [
            grad_dtypes.get(param, param.dtype) if param.grad is None else param.grad.dtype
            for param in chosen
        ]
        self.grads: list[int] = []
        self.copies: list[Tensor] = []
        self.aligned: list[int] | None = []
        self._take_grads(list(chosen))
        self._take_alignment(self.states_here(state))
        self.stale_grads = self.stale_lines = True

    # ---- seen once -----------------------------------------------------------------------------

    def _take_places(self, groups: Groups) -> None:
        """Where the chosen parameters stand among all, and which have had no gradient yet."""
        self.flat = list(chain.from_iterable(map(_params_of, groups)))
        self.sizes = [len(group["params"]) for group in groups]
        place = {param: index for index, param in enumerate(self.flat)}
        self.places = [place[param] for param in self.chosen]
        self.whole = self.places == list(range(len(self.flat)))
        known = self.chosen.keys() | self.rest
        self.idle = [place[param] for param in place if param not in known]
        self.spreads = dict.fromkeys(map(spread_of, self.flat))

    def _take_states(self, groups: Groups, state: States) -> None:
        """Names and addresses of the states of each chosen parameter."""
        of_group = [(*self.rule.states(group), *self.rule.scalar_states) for group in groups]
        self.names = [
            tuple(name for name in of_group[group] if name in state.get(param, ()))
            for param, group in self.chosen.items()
        ]
        uniform = len(set(self.names)) == 1 and self.names[0]
        self.states_of = itemgetter(*self.names[0]) if uniform else None
        self.places_in_memory = self._places_in_memory(list(self.chosen), state)

    def states_here(self, state: States) -> list[dict[str, Tensor]]:
        """What is here of the states of each chosen parameter."""
        return [
            {name: local(state[param][name]) for name in names}
            for param, names in zip(self.chosen, self.names, strict=True)
        ]

    def _take_alignment(self, states: list[dict[str, Tensor]]) -> None:
        """Which parameters lie, with their gradients and moments, at multiples of 16 bytes."""
        moments = self.rule.tensor_states
        self.is_aligned = [
            not any(
                address % ALIGNMENT
                for address in (
                    param.data_ptr(),
                    grad,
                    *(value.data_ptr() for name, value in state.items() if name in moments),
                )
            )
            for param, grad, state in zip(self.params, self.grads, states, strict=True)
        ]
        self.aligned = [i for i, aligned in enumerate(self.is_aligned) if aligned]
        if all(self.is_aligned):
            self.aligned = None  # all, which is checked faster

    def _structure(self, group: dict[str, Any], line: list[Number]) -> tuple[Any, ...]:
        """What of a group's options decides which state, rule and hooks its parameters need."""
        names = self.rule.states(group)
        rule = self.launch.rule_of(
            self.rule.device_rule(group),
            states=len(names),
            counts=len(self.rule.scalar_states),
            line=len(line),
        )
        hooks = self.launch.penalties([line])
        return rule, names, group["l1_mode"] == "decoupled", group["fused"], hooks

    def _line(self, group: dict[str, Any]) -> list[Number]:
        """The numbers of a group in the device's order; a tensor where it must not be read."""
        decay, l1, mode = group["weight_decay"], group["l1"], group["l1_mode"]
        decoupled = group["decoupled_weight_decay"]
        line = self.launch.line(
            lr=group["lr"],
            maximize=group["maximize"],
            coupled=0.0 if decoupled else decay,
            decoupled=decay if decoupled else 0.0,
            subgradient=l1 if mode == "subgradient" else 0.0,
            prox=l1 if mode == "prox" else 0.0,
            shrink=l1 if mode == "decoupled" else 0.0,
            decay_lr=group["decay_lr"] if group["lr_independent_decay"] else 1.0,
            options=_elements(group[name] for name in self.rule.device_options),
        )
        return [value if is_remote(value) else float(value) for value in line]

    # ---- compared in every step ----------------------------------------------------------------

    def refresh(self, groups: Groups, state: States) -> bool:
        """Take over this step's options and gradients; False where the plan no longer holds.

        Raises what checking a group raises, for one whose options changed. Changes no tensor.
        """
        if len(groups) != len(self.options) or not self._take_options(groups):
            return False
        if [len(group["params"]) for group in groups] != self.sizes:
            return False
        flat = list(chain.from_iterable(map(_params_of, groups)))
        if not all(map(is_, flat, self.flat)):
            return False
        if any(flat[place].grad is not None for place in self.idle):
            return False
        params = flat if self.whole else [flat[place] for place in self.places]
        try:
            here = self._places_in_memory(params, state)
            return here == self.places_in_memory and self._take_grads(params)
        except (KeyError, RuntimeError):  # a state has gone; a gradient is sparse
            return False

    def _take_options(self, groups: Groups) -> bool:
        for index, group in enumerate(groups):
            options = self.options_of(group)
            if all(map(is_, options, self.options[index])) and not self.changeable[index]:
                continue
            self.rule._check_group(group)
            line = self._line(group)
            if self._structure(group, line) != self.structure[index]:
                return False
            self.options[index], self.lines[index], self.stale_lines = options, line, True
            self.changeable[index] = any(map(_may_change, options))
        return True

    def _places_in_memory(self, params: list[Tensor], state: States) -> list[Any]:
        """Where parameters and states are and how they are to be read, in a fixed order."""
        states: Iterable[Any]
        own = len(state) == len(params) and all(map(is_, state, self.chosen))
        if self.states_of is not None and own:
            states = map(self.states_of, state.values())
            if len(self.names[0]) > 1:
                states = chain.from_iterable(states)
        else:
            named = zip(params, self.names, strict=True)
            # get, because a defaultdict would make an entry
            states = (state.get(param, {})[name] for param, names in named for name in names)
        states = list(states)
        if self.sharded:
            params, states = list(map(local, params)), list(map(local, states))
        # A plan takes states of one dtype for each parameter, so the first tells it for all that
        # were converted together; an own list for each property compares faster than one for all.
        firsts = states[:: len(self.names[0])] if self.states_of is not None else states
        return [
            list(map(_address_of, params)),
            list(map(_numel_of, params)),
            list(map(_is_contiguous, params)),
            list(map(_address_of, states)),
            list(map(_dtype_of, firsts)),
        ]

    def _take_grads(self, params: list[Tensor]) -> bool:
        """Take over where the gradients are; False where one belongs into another bucket."""
        grads = list(map(_grad_of, params))
        if self.sharded:
            pairs = zip(params, grads, strict=True)
            if not all(grad is None or is_sharded_alike(param, grad) for param, grad in pairs):
                return False
            params = self.params
            grads = [None if grad is None else local(grad) for grad in grads]
        missing: list[int] = []
        try:
            dtypes = list(map(_dtype_of, grads))
        except AttributeError:
            missing = [i for i, grad in enumerate(grads) if grad is None]
            for i in missing:  # the parameter stands in until its address is replaced by 0
                grads[i] = params[i]
            dtypes = list(map(_dtype_of, grads))
            for i in missing:
                dtypes[i] = self.grad_dtypes[i]
        if dtypes != self.grad_dtypes or list(map(_numel_of, grads)) != self.numels:
            return False
        # Autograd leaves a number that met a conjugate lazily negated, and its memory is not.
        if any(grads[i].is_neg() for i in self.single):
            return False
        self._match_layouts(params, grads)
        addresses = _addresses_of(grads)
        for i in missing:
            addresses[i] = 0
        if addresses == self.grads:
            return True
        if self.aligned is None:
            misaligned = reduce(or_, addresses) % ALIGNMENT
        else:
            misaligned = any(addresses[i] % ALIGNMENT for i in self.aligned)
        if not misaligned:
            self.grads, self.stale_grads = addresses, True
        return not misaligned

    def _match_layouts(self, params: list[Tensor], grads: list[Tensor]) -> None:
        """Replace each gradient whose elements lie in another order than its parameter's."""
        self.copies.clear()
        contiguous = list(map(_is_contiguous, grads))
        if contiguous == self.contiguous and not self.permuted:
            return
        for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
            if not (contiguous[i] and self.contiguous[i]) and not same_layout(param, grad):
                grads[i] = torch.empty_like(param, dtype=grad.dtype).copy_(grad)
                self.copies.append(grads[i])  # until the step has been launched

    @property
    def has_grads(self) -> bool:
        """Whether any of the chosen parameters has a gradient in this step."""
        return any(self.grads)


def _addresses_of(grads: list[Tensor]) -> list[int]:
    """Where gradients are, and not 0 for an empty one, because 0 stands for none."""
    addresses = list(map(_address_of, grads))
    if all(addresses):
        return addresses
    for i, grad in enumerate(grads):
        if not addresses[i]:
            if grad.numel():
                raise RuntimeError("a gradient has no memory of its own")  # of a subclass
            addresses[i] = EMPTY
    return addresses


def is_remote(value: object) -> bool:
    """Whether reading `value` would wait for a device."""
    return isinstance(value, Tensor) and not on_host(value)


def _may_change(option: object) -> bool:
    """Whether an option may change without being replaced: a list, or a tensor of the host."""
    if isinstance(option, (tuple, list)):
        return isinstance(option, list) or any(map(_may_change, option))
    return isinstance(option, Tensor) and on_host(option)


def _elements(values: Iterable[Any]) -> Iterator[Any]:
    """Numbers one by one, also those of a pair."""
    for value in values:
        yield from value if isinstance(value, (tuple, list)) else (value,)

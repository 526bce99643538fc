"""What a plan of kernels was made for, and whether it still holds.

Kernels get addresses. So everything that decides how memory is read is compared in every step:
the dtype, shape, strides, device and class of each parameter, gradient and state, and its address.
The first five are the facts of a tensor, and one call of torch's own guards compares them for all
tensors. Only where that says no, each tensor is looked at:

- a gradient with other strides is copied into the layout of its parameter;
- any other change of facts is new structure, and the plan is made anew;
- new addresses under the same facts are only sent to the device.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import reduce
from itertools import chain
from operator import attrgetter, is_, itemgetter, or_
from typing import NamedTuple

import torch
from torch import Tensor

from fusedreg.backend import is_plain, same_layout
from fusedreg.contract import UpdateRule
from fusedreg.dist import is_sharded_alike, local, sharding_of, where_of
from fusedreg.engine.numbers import GroupNumbers
from fusedreg.formats import planes_of
from fusedreg.kernels.contract import Backend
from fusedreg.types import ParamGroup, States

try:
    from torch._C._dynamo.guards import TensorGuards
except ImportError:  # it is no public part of torch; without it every tensor is looked at
    TensorGuards = None  # type: ignore[assignment, misc]

# Bound once, because they run so often.
_params_of = itemgetter("params")
_grad_of = attrgetter("grad")
_address_of = Tensor.data_ptr

EMPTY = 16
"""Stands for the address of an empty gradient, because 0 stands for none."""


class Changes(NamedTuple):
    """What is different from the last step, so that it has to be sent to the device."""

    numbers: bool = False
    """The scalars of groups."""
    tables: bool = False
    """Where parameters and states are."""
    grads: bool = False
    """Where gradients are."""
    copies: Sequence[Tensor] = ()
    """Gradients in the layout of their parameters, to be kept until the step is launched."""


NOTHING, OTHER_GRADS, MOVED = Changes(), Changes(grads=True), Changes(tables=True, grads=True)


class Watcher:
    """The parameters, states, options and gradients that kernels step with.

    It does not keep the optimizer, which owns it: a cycle would keep both alive.

    Args:
        rule: the optimizer.
        backends: what launches the kernels of each parameter.
        groups: all param groups.
        chosen: the parameters that kernels step, each with the index of its group. Parameter,
            gradient and states of each are dense.
        rest: the parameters that the reference steps.
        state: the optimizer's state, complete for the chosen ones.
        grad_dtypes: what is known of gradients that are not there now.

    Raises:
        RuntimeError: a tensor has no memory of its own.
    """

    def __init__(
        self,
        rule: UpdateRule,
        backends: Mapping[Tensor, Backend | None],
        groups: list[ParamGroup],
        chosen: Mapping[Tensor, int],
        rest: Collection[Tensor],
        state: States,
        grad_dtypes: Mapping[Tensor, torch.dtype],
    ) -> None:
        self.chosen, self.rest = chosen, rest
        self.counts = tuple(rule.counts)
        self.layerwise = rule.layerwise
        self.stepped = list(chosen)
        found = (backends[param] for param in chosen)
        self.backends = [backend for backend in found if backend is not None]
        self.backend = self.backends[0]  # tables and numbers are the same for all
        self.group_of = list(chosen.values())
        self.sharded = any(local(param) is not param for param in chosen)
        self.options = GroupNumbers(rule, self.backend, groups, {*self.group_of})
        self._take_places(groups)
        self._take_names(rule, groups, state)
        self.grad_dtypes = [
            grad_dtypes.get(param, param.dtype) if param.grad is None else param.grad.dtype
            for param in chosen
        ]
        # From here on a DTensor stands for its local part.
        self.params = list(map(local, chosen))
        self.numels = [param.numel() for param in self.params]
        self.empty = [i for i, numel in enumerate(self.numels) if numel == 0]
        fixed = [*self.stepped, *self._states_of(self.stepped, state)]
        self.grads_begin = len(fixed)
        self.where = list(map(where_of, fixed)) if self.sharded else []
        self.fixed_facts = list(map(_facts, map(local, fixed)))
        self.addresses: list[int] = []
        """Of parameters, then states, then gradients; 0 for a gradient that is not there."""
        self._missing: list[int] = []
        self._other_layout: list[int] = []
        self._guards: Callable[..., bool] = _never
        self._aligned_fixed: Callable[[list[int]], tuple[int, ...]] | None = None
        self._aligned_grads: Callable[[list[int]], tuple[int, ...]] | None = None
        changes = self._take_tensors(self.stepped, state)
        if changes is None:
            raise RuntimeError(
                "a parameter, a gradient or a state has no memory: its storage was freed or "
                "resized, or its class wraps another tensor. Give it memory, or pass fused=False"
            )
        self.first_copies = changes.copies
        self._take_alignment()

    # ---- seen once -----------------------------------------------------------------------------

    def _take_places(self, groups: list[ParamGroup]) -> None:
        """Where the chosen parameters stand among all, and which have had no gradient yet."""
        self.flat = list(chain.from_iterable(map(_params_of, groups)))
        self.sizes = [len(group["params"]) for group in groups]
        place = {param: index for index, param in enumerate(self.flat)}
        self.places = [place[param] for param in self.chosen]
        self.whole = self.places == list(range(len(self.flat)))
        known = self.chosen.keys() | self.rest
        self.idle = [place[param] for param in place if param not in known]
        self.shardings = dict.fromkeys(map(sharding_of, self.flat))

    def _take_names(self, rule: UpdateRule, groups: list[ParamGroup], state: States) -> None:
        """Names of the states of each chosen parameter, and where they begin among addresses."""
        self.formats = [rule.state_format(groups[i], param) for param, i in self.chosen.items()]
        states_of = [rule.states(group) for group in groups]
        self.planes = [
            planes_of(storage, states_of[group])
            for storage, group in zip(self.formats, self.group_of, strict=True)
        ]
        """Names of the tensors that the states of each parameter are stored in."""
        self.names = [
            (*planes, *(name for name in self.counts if name in state.get(param, ())))
            for param, planes in zip(self.chosen, self.planes, strict=True)
        ]
        self._same_names = len(set(self.names)) == 1
        self._named = itemgetter(*self.names[0]) if self._same_names and self.names[0] else None
        counts = list(map(len, self.names))
        self._first_state = [len(counts) + sum(counts[:i]) for i in range(len(counts))]

    def state_index(self, position: int, name: str) -> int:
        """Where the address of a state is among `addresses`; -1 where a parameter has none."""
        names = self.names[position]
        return self._first_state[position] + names.index(name) if name in names else -1

    def states_here(self, state: States) -> list[dict[str, Tensor]]:
        """The states of each chosen parameter, or their local parts."""
        return [
            {name: local(state[param][name]) for name in names}
            for param, names in zip(self.chosen, self.names, strict=True)
        ]

    def _take_alignment(self) -> None:
        """Which parameters lie, with gradients and moments, where the widest access begins."""
        fixed = [
            [i, *(self.state_index(i, name) for name in planes)]
            for i, planes in enumerate(self.planes)
        ]
        width = self.backend.alignment
        self.is_aligned = [
            not any(self.addresses[place] % width for place in (*places, self.grads_begin + i))
            for i, places in enumerate(fixed)
        ]
        if width > 1 and any(self.is_aligned):
            aligned = [i for i, is_aligned in enumerate(self.is_aligned) if is_aligned]
            # The first twice, so that the getter returns a tuple for one tensor too.
            of_fixed = [place for i in aligned for place in fixed[i]]
            self._aligned_fixed = itemgetter(of_fixed[0], *of_fixed)
            self._aligned_grads = itemgetter(
                self.grads_begin + aligned[0], *(self.grads_begin + i for i in aligned)
            )

    # ---- compared in every step ----------------------------------------------------------------

    def refresh(self, rule: UpdateRule, groups: list[ParamGroup], states: States) -> Changes | None:
        """Take over this step's options, addresses and gradients; None where a plan is outdated.

        Raises what checking a group raises, for one whose options changed. Changes no tensor.
        """
        numbers = self.options.refresh(rule, groups)
        if numbers is None or [len(group["params"]) for group in groups] != self.sizes:
            return None
        flat = list(chain.from_iterable(map(_params_of, groups)))
        if not all(map(is_, flat, self.flat)):
            return None
        if self.idle and any(flat[place].grad is not None for place in self.idle):
            return None
        params = flat if self.whole else [flat[place] for place in self.places]
        try:
            changes = self._take_tensors(params, states)
        except (AttributeError, KeyError, RuntimeError, TypeError):
            return None  # a state has gone or is no tensor; a gradient is sparse
        return changes._replace(numbers=True) if changes is not None and numbers else changes

    def _states_of(self, params: list[Tensor], state: States) -> list[Tensor]:
        """The states of all parameters in the order of their names."""
        states: list[Tensor]
        if self._same_names and not self.names[0]:
            return []
        own = len(state) == len(params) and all(map(is_, state, self.chosen))
        if self._named is not None and own:
            found = map(self._named, state.values())
            states = list(chain.from_iterable(found) if len(self.names[0]) > 1 else found)
        else:
            named = zip(params, self.names, strict=True)
            # get, because a defaultdict would make an entry
            states = [state.get(param, {})[name] for param, names in named for name in names]
        return states

    def _take_tensors(self, params: list[Tensor], state: States) -> Changes | None:
        """Take over where tensors are; None where one is to be read in another way."""
        states = self._states_of(params, state)
        grads = list(map(_grad_of, params))
        if self.sharded:
            pairs = zip(params, grads, strict=True)
            if not all(grad is None or is_sharded_alike(param, grad) for param, grad in pairs):
                return None
            if [where_of(tensor) for tensor in chain(params, states)] != self.where:
                return None
            params, states = list(map(local, params)), list(map(local, states))
            grads = [None if grad is None else local(grad) for grad in grads]
        known = True
        for i in self._missing:
            known = known and grads[i] is None
            if known:
                grads[i] = params[i]  # stands in until its address is replaced by 0
        if not (known and self._guards(*params, *states, *grads)) and not self._look_at_each(
            params, states, grads
        ):
            return None
        copies = []
        for i in self._other_layout:
            grads[i] = torch.empty_like(params[i], dtype=grads[i].dtype).copy_(grads[i])
            copies.append(grads[i])
        changes = self._take_addresses(list(map(_address_of, chain(params, states, grads))))
        return changes._replace(copies=copies) if changes is not None and copies else changes

    def _look_at_each(
        self, params: list[Tensor], states: list[Tensor], grads: list[Tensor | None]
    ) -> bool:
        """Compare facts one by one, and take over which gradients are there and how they lie."""
        if list(map(_facts, [*params, *states])) != self.fixed_facts:
            return False
        missing, other_layout = [], []
        for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
            if grad is None or (grad is param and i in self._missing):
                missing.append(i)
                grads[i] = param
            elif not (
                grad.dtype == self.grad_dtypes[i]
                and grad.device == param.device
                and grad.shape == param.shape
                and is_plain(grad)
            ):
                return False
            elif not same_layout(param, grad):
                other_layout.append(i)
        self._missing, self._other_layout = missing, other_layout
        self._guards = _guards_of([*params, *states, *grads])
        return True

    def _take_addresses(self, addresses: list[int]) -> Changes | None:
        """Take over addresses; None where they ask for another access."""
        begin = self.grads_begin
        for i in self.empty:
            addresses[begin + i] = EMPTY
        for i in self._missing:
            addresses[begin + i] = 0
        if addresses == self.addresses:
            return NOTHING
        if not all(addresses) and not self._all_have_memory(addresses):
            return None
        moved = addresses[:begin] != self.addresses[:begin]
        if self._aligned_fixed is not None and self._aligned_grads is not None:
            combined = reduce(or_, self._aligned_grads(addresses))
            if moved:
                combined = reduce(or_, self._aligned_fixed(addresses), combined)
            if combined % self.backend.alignment:
                return None
        self.addresses = addresses
        return MOVED if moved else OTHER_GRADS

    def _all_have_memory(self, addresses: list[int]) -> bool:
        """Whether 0 stands only for what is empty or missing, and for no storage that was freed."""
        absent = {self.grads_begin + i for i in self._missing}
        for i in self.empty:
            absent.add(i)
            absent.update(range(self._first_state[i], self._first_state[i] + len(self.names[i])))
        return all(address or place in absent for place, address in enumerate(addresses))

    @property
    def with_grads(self) -> list[Tensor]:
        """Those of the chosen parameters that have a gradient in this step."""
        if not self._missing:
            return self.stepped
        missing = set(self._missing)
        return [param for i, param in enumerate(self.stepped) if i not in missing]

    @property
    def has_grads(self) -> bool:
        """Whether any of the chosen parameters has a gradient in this step."""
        return len(self._missing) < len(self.stepped)


def _facts(tensor: Tensor) -> tuple[object, ...]:
    """What besides its address decides how the memory of a tensor is read."""
    return (
        type(tensor), tensor.dtype, tensor.device, tensor.shape, tensor.stride(), tensor.is_neg(),
    )  # fmt: skip


def _never(*tensors: object) -> bool:
    """Guards that know nothing."""
    return False


def _guards_of(tensors: list[Tensor | None]) -> Callable[..., bool]:
    """A function that says whether other tensors have the facts of these; False may be wrong."""
    if TensorGuards is None:
        return _never
    guards = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
    check: Callable[..., bool] = guards.check
    return check

"""The step on a device: tensors sorted into buckets once, then a handful of launches for all.

A plan is made when something new appears and used until something moves. Each step compares
addresses, sizes and dtypes of parameters, gradients and states with those of the plan, so that no
address is used after its tensor is gone; it sends the gradients' addresses and the groups' numbers
only if they changed, and waits for nothing. See docs/engine.md.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import reduce
from itertools import chain
from operator import attrgetter, is_, itemgetter, or_
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fusedreg.backend import is_sharded_alike, local, same_layout
from fusedreg.scalars import Flag, Number, on_host

Groups = Sequence[dict[str, Any]]
States = Mapping[Any, dict[str, Tensor]]

# Bound once: these run for every parameter in every step.
_params_of = itemgetter("params")
_grad_of = attrgetter("grad")
_dtype_of = attrgetter("dtype")
_numel_of = Tensor.numel
_address_of = Tensor.data_ptr
_is_contiguous = Tensor.is_contiguous

ALIGNMENT = 16
"""Bytes of the widest access of a GPU; also the address that stands for an empty gradient."""


NOT_BEFORE_CAPTURE = (
    "Cannot capture a step that has to create state, send tables from the host or load kernels: "
    "take one step with the same parameters, states and options before the capture"
)


class Rule(Protocol):
    """The part of an optimizer that the engine needs; see FusedOptimizer, which documents it."""

    defaults: dict[str, Any]
    scalar_states: tuple[str, ...]
    device_options: tuple[str, ...]

    def device_rule(self, group: Mapping[str, Any]) -> str:
        """Name of the rule in `fusedreg.kernels.rules`."""

    def states(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        """Names of the tensor states that the rule moves."""

    def _check_group(self, group: dict[str, Any]) -> None:
        """Raise where an option is out of range."""


class Kind(NamedTuple):
    """What the tensors of one launch have in common."""

    device: torch.device
    rule: str
    states: tuple[str, ...]
    shrink: bool  # one L1 threshold for all elements, whatever the gain of each
    param: torch.dtype
    grad: torch.dtype
    state: torch.dtype
    scalar: torch.dtype
    aligned: bool


@dataclass
class Bucket:
    """The tensors of one kind."""

    kind: Kind
    positions: list[int]
    """Where its tensors stand among the parameters of the plan."""
    hooks: dict[str, bool]
    """Which penalties any of its groups has."""
    table: Any
    rows: Tensor
    first_chunk: int
    """Where its chunks begin among the partial norms of the device."""
    first_tensor: int
    """Where its tensors begin among the gradient addresses of the device."""


@dataclass
class Memory:
    """What the buckets of one device share."""

    buckets: list[Bucket]
    grads: Tensor
    partials: Tensor
    numbers: Tensor


class Plan:
    """Tables of the parameters that kernels step.

    Args:
        rule: the optimizer.
        launch: `fusedreg.kernels.launch`.
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
        launch: ModuleType,
        groups: Groups,
        chosen: Mapping[Tensor, int],
        rest: Collection[Tensor],
        state: States,
        grad_dtypes: Mapping[Tensor, torch.dtype],
    ) -> None:
        self.rule, self.launch = rule, launch
        self.chosen, self.rest = chosen, rest
        self.group_of = list(chosen.values())
        self.sharded = any(local(param) is not param for param in chosen)
        flat = list(chain.from_iterable(map(_params_of, groups)))
        place = {param: index for index, param in enumerate(flat)}
        self.flat = flat
        self.sizes = [len(group["params"]) for group in groups]
        self.places = [place[param] for param in chosen]
        self.whole = self.places == list(range(len(flat)))
        self.idle = [place[param] for param in place if param not in chosen and param not in rest]

        self.options_of = itemgetter(*rule.defaults)
        self.options = [self.options_of(group) for group in groups]
        self.lines = [self._line(group) for group in groups]
        self.structure = [self._structure(*pair) for pair in zip(groups, self.lines, strict=True)]

        self.names = [
            tuple(
                n for n in (*rule.states(groups[g]), *rule.scalar_states) if n in state.get(p, ())
            )
            for p, g in chosen.items()
        ]
        uniform = len(set(self.names)) == 1 and self.names[0]
        self.states_of = itemgetter(*self.names[0]) if uniform else None
        self.places_in_memory = self._places_in_memory(list(chosen), state)

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

        self.memory = self._layout([_localized(state.get(param, {})) for param in chosen])
        self.aligned = [
            position
            for memory in self.memory.values()
            for bucket in memory.buckets
            if bucket.kind.aligned
            for position in bucket.positions
        ]
        if len(self.aligned) == len(self.params):
            self.aligned = None
        self.header: list[float | None] = []
        self.stale_grads = self.stale_lines = True
        self.variant: tuple[bool, ...] = ()
        self.launches = 0

    # ---- built once ----------------------------------------------------------------------------

    def _structure(self, group: dict[str, Any], line: list[Number]) -> tuple[Any, ...]:
        """What of a group's options decides which state, rule and hooks its parameters need."""
        rule, names = self.rule.device_rule(group), self.rule.states(group)
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
            options=_elements(group[name] for name in self.rule.device_options),
        )
        return [value if _is_remote(value) else float(value) for value in line]

    def _layout(self, states: list[dict[str, Tensor]]) -> dict[torch.device, Memory]:
        """Sort the tensors into buckets and write their tables."""
        kinds: dict[torch.device, dict[Kind, list[int]]] = {}
        for position in range(len(self.params)):
            kind = self._kind(position, states[position])
            kinds.setdefault(kind.device, {}).setdefault(kind, []).append(position)
        return {device: self._memory(device, of, states) for device, of in kinds.items()}

    def _kind(self, position: int, state: Mapping[str, Tensor]) -> Kind:
        param = self.params[position]
        rule, names, shrink, *_ = self.structure[self.group_of[position]]
        moments = [state[name] for name in names]
        counts = [state[name].dtype for name in self.rule.scalar_states if name in state]
        addresses = [*map(_address_of, [param, *moments]), self.grads[position]]
        return Kind(
            device=param.device,
            rule=rule,
            states=names,
            shrink=shrink,
            param=param.dtype,
            grad=self.grad_dtypes[position],
            state=moments[0].dtype if moments else param.dtype,
            scalar=counts[0] if counts else torch.float64,
            aligned=all(address % ALIGNMENT == 0 for address in addresses),
        )

    def _memory(
        self,
        device: torch.device,
        kinds: Mapping[Kind, list[int]],
        states: list[dict[str, Tensor]],
    ) -> Memory:
        buckets: list[Bucket] = []
        chunks = tensors = 0
        for kind, positions in kinds.items():
            params = [self.params[position] for position in positions]
            theirs = [states[position] for position in positions]
            slots = [
                list(map(_address_of, params)),
                *(
                    [state[name].data_ptr() if name in state else 0 for state in theirs]
                    for name in (*kind.states, *self.rule.scalar_states)
                ),
            ]
            groups = [self.group_of[position] for position in positions]
            table = self.launch.build(slots, [param.numel() for param in params], groups, device)
            rows = torch.empty(len(params), self.launch.ROW, dtype=torch.float64, device=device)
            hooks = self.launch.penalties([self.lines[group] for group in set(groups)])
            buckets.append(Bucket(kind, positions, hooks, table, rows, chunks, tensors))
            chunks += table.chunks
            tensors += (
                len(params) + len(params) % 2
            )  # triton compiles for the alignment, so keep it
        size = self.launch.HEADER + sum(map(len, self.lines))
        return Memory(
            buckets,
            grads=torch.empty(tensors, dtype=torch.int64, device=device),
            partials=torch.empty(chunks, dtype=torch.float64, device=device),
            numbers=torch.empty(size, dtype=torch.float64, device=device),
        )

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
            if all(map(is_, options, self.options[index])) and not any(map(_may_change, options)):
                continue
            self.rule._check_group(group)
            line = self._line(group)
            if self._structure(group, line) != self.structure[index]:
                return False
            self.options[index], self.lines[index], self.stale_lines = options, line, True
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
            states = (state[param][name] for param, names in named for name in names)
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

    # ---- one step ------------------------------------------------------------------------------

    @property
    def has_grads(self) -> bool:
        """Whether any of its parameters has a gradient in this step."""
        return any(self.grads)

    @property
    def device(self) -> torch.device | None:
        """The device that has all its parameters whole, or None."""
        return None if self.sharded or len(self.memory) > 1 else next(iter(self.memory))

    def capturing(self) -> bool:
        """Whether a CUDA graph is being captured on one of its devices."""
        return any(map(is_capturing, self.memory))

    def take_launches(self) -> int:
        """Kernels launched since the last call."""
        launches, self.launches = self.launches, 0
        return launches

    def norms(self) -> list[Tensor]:
        """Tensors whose norm is that of all gradients."""
        if self.sharded:  # a norm of a DTensor is one over all its parts
            return [param.grad for param in self.chosen if param.grad is not None]
        for device, memory in self.memory.items():
            with _current(device):
                self._norms(memory, self._send_grads(device, memory))
        return [memory.partials for memory in self.memory.values()]

    def run(
        self,
        *,
        scale: Number = 1.0,
        skip: Flag = False,
        grad_scale: Number | None = None,
        found_inf: Number | None = None,
        max_norm: float | None = None,
        skip_nonfinite: bool = False,
        grad_norm: Tensor | None = None,
        skipped: Tensor | None = None,
    ) -> None:
        """Step every parameter that has a gradient.

        Args:
            scale: multiplies every gradient.
            skip: whether nothing may change.
            grad_scale, found_inf: what GradScaler says; it divides, and not 0 means skip.
            max_norm: clip the norm over all gradients of the plan; None does not.
            skip_nonfinite: skip where that norm is inf or NaN.
            grad_norm: 0-dim float32, takes the norm; None computes no norm. Like `skipped` it needs
                a plan that has a `device`.
            skipped: 0-dim int64, is increased by one where nothing changed.
        """
        variant = (
            max_norm is None,
            grad_norm is None,
            skipped is None,
            *map(_is_remote, (scale, skip, grad_scale, found_inf)),
        )
        if self.capturing() and variant != self.variant:
            raise RuntimeError(NOT_BEFORE_CAPTURE)  # it may have to compile or load a kernel
        self.variant = variant
        clips = max_norm is not None and max_norm != float("inf")
        scaled = clips or grad_scale is not None or isinstance(scale, Tensor) or scale != 1.0
        if grad_scale is not None and not _is_remote(grad_scale):
            scale, grad_scale = scale / float(grad_scale), None
        if found_inf is not None and not _is_remote(found_inf):
            skip, found_inf = skip | bool(found_inf != 0), None
        header = self.launch.header(
            max_norm=max_norm if clips else float("inf"),
            scale=scale,
            skip=skip,
            skip_nonfinite=skip_nonfinite,
        )
        known = [None if isinstance(value, Tensor) else float(value) for value in header]
        if known != self.header:
            self.header, self.stale_lines = known, True
        for device, memory in self.memory.items():
            with _current(device):
                grads = self._send_grads(device, memory)
                numbers = self._send_numbers(device, memory, header)
                if grad_norm is not None:
                    self._norms(memory, grads)
                for bucket in memory.buckets:
                    first = bucket is memory.buckets[0]
                    self._rows(
                        bucket,
                        self._grads_of(bucket, grads),
                        numbers,
                        partials=None if grad_norm is None else memory.partials,
                        grad_scale=_remote(grad_scale, device),
                        found_inf=_remote(found_inf, device),
                        grad_norm=grad_norm if first else None,
                        skipped=skipped if first else None,
                    )
                for bucket in memory.buckets:
                    self._step(bucket, self._grads_of(bucket, grads), scaled)
        # As any operation in place does: a backward pass through the old values must fail.
        torch.autograd.graph.increment_version(list(self.chosen))
        if not self.capturing():
            self.stale_grads = self.stale_lines = False
        self.copies.clear()

    def _send_grads(self, device: torch.device, memory: Memory) -> Tensor:
        """The gradients' addresses on the device; in a graph its own, which nothing else writes."""
        if not self.stale_grads and not is_capturing(device):
            return memory.grads
        addresses: list[int] = []
        for bucket in memory.buckets:
            addresses += [0] * (bucket.first_tensor - len(addresses))
            addresses += map(self.grads.__getitem__, bucket.positions)
        addresses += [0] * (memory.grads.numel() - len(addresses))
        if is_capturing(device):
            constants: Tensor = self.launch.constants(addresses, device)
            return constants.to(torch.int64)
        # A buffer is read faster than a list.
        self.launch.send(torch.frombuffer(array("q", addresses), dtype=torch.int64), memory.grads)
        return memory.grads

    def _send_numbers(
        self, device: torch.device, memory: Memory, header: Sequence[Number]
    ) -> Tensor:
        """Header and lines on the device, where the numbers that live there join them."""
        values = [*header, *chain.from_iterable(self.lines)]
        remote = [(i, value) for i, value in enumerate(values) if isinstance(value, Tensor)]
        numbers = memory.numbers
        floats = [0.0 if isinstance(value, Tensor) else value for value in values]
        if is_capturing(device):
            numbers = self.launch.constants(floats, device)
        elif self.stale_lines:
            self.launch.send(torch.frombuffer(array("d", floats), dtype=torch.float64), numbers)
        if remote:
            targets = [numbers[i] for i, _ in remote]
            torch._foreach_copy_(targets, [value.reshape(()) for _, value in remote])
        return numbers

    def _grads_of(self, bucket: Bucket, grads: Tensor) -> Tensor:
        return grads[bucket.first_tensor : bucket.first_tensor + len(bucket.positions)]

    def _norms(self, memory: Memory, grads: Tensor) -> None:
        for bucket in memory.buckets:
            if bucket.table.chunks:
                self.launches += 1
                self.launch.norms(
                    bucket.table,
                    self._grads_of(bucket, grads),
                    memory.partials,
                    bucket.first_chunk,
                    bucket.kind.grad,
                    bucket.kind.aligned,
                )

    def _rows(self, bucket: Bucket, grads: Tensor, numbers: Tensor, **more: Tensor | None) -> None:
        kind = bucket.kind
        self.launches += 1
        self.launch.rows(
            bucket.table,
            grads,
            numbers,
            bucket.rows,
            rule=kind.rule,
            states=len(kind.states),
            counts=len(self.rule.scalar_states),
            count=kind.scalar,
            line=len(self.lines[0]),
            **more,
        )

    def _step(self, bucket: Bucket, grads: Tensor, scaled: bool) -> None:
        if not bucket.table.chunks:
            return
        kind = bucket.kind
        self.launches += 1
        self.launch.step(
            bucket.table,
            grads,
            bucket.rows,
            rule=kind.rule,
            states=len(kind.states),
            scaled=scaled,
            shrink=kind.shrink,
            param=kind.param,
            grad=kind.grad,
            state=kind.state,
            aligned=kind.aligned,
            **bucket.hooks,
        )


def _localized(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: local(value) for name, value in state.items() if isinstance(value, Tensor)}


def _addresses_of(grads: list[Tensor]) -> list[int]:
    """Where gradients are, and not 0 for an empty one, because 0 stands for none."""
    addresses = list(map(_address_of, grads))
    if all(addresses):
        return addresses
    for i, grad in enumerate(grads):
        if not addresses[i]:
            if grad.numel():
                raise RuntimeError("a gradient has no memory of its own")  # of a subclass
            addresses[i] = ALIGNMENT
    return addresses


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on the current stream."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Makes `device` the current one, on which triton launches."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _is_remote(value: object) -> bool:
    """Whether reading `value` would wait for a device."""
    return isinstance(value, Tensor) and not on_host(value)


def _remote(value: Number | None, device: torch.device) -> Tensor | None:
    """A number of a device as a one-element tensor on `device`; None for one of the host."""
    return value.to(device) if isinstance(value, Tensor) and _is_remote(value) else None


def _may_change(option: object) -> bool:
    """Whether an option may change without being replaced: a list, or a tensor of the host."""
    if isinstance(option, (tuple, list)):
        return isinstance(option, list) or any(map(_may_change, option))
    return isinstance(option, Tensor) and on_host(option)


def _elements(values: Iterable[Any]) -> Iterator[Any]:
    """Numbers one by one, also those of a pair."""
    for value in values:
        yield from value if isinstance(value, (tuple, list)) else (value,)

"""The step on a device: a handful of launches for all tensors of a plan.

A plan is made for the tensors as they are read now, and used until one has another shape, strides,
dtype, device or class, or a group asks for other kernels. A step sends addresses and the groups'
numbers only if they changed, and waits for nothing. See docs/engine.md.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from fusedreg.dist import Sharding
from fusedreg.engine.layout import Memory, addresses_at, layout
from fusedreg.engine.watch import NOTHING, Changes, Watcher
from fusedreg.kernels.contract import Call
from fusedreg.kernels.layout import StepScalars
from fusedreg.kernels.table import constants, move, send
from fusedreg.scalars import Flag, Number, is_on_device
from fusedreg.types import States

NOT_BEFORE_CAPTURE = (
    "Cannot capture a step that has to create state, send tables from the host or load kernels: "
    "take one step with the same parameters, states and options before the capture"
)

ONE = 1.0
"""The scale of a step that has none, compared by identity."""

OverRanks = Callable[[Mapping[Tensor, Tensor]], None]
"""All-reduces the local sums of each parameter in place."""


class Plan:
    """Tables of the parameters that kernels step.

    Args:
        watcher: what they are.
        state: the optimizer's state.
    """

    def __init__(self, watcher: Watcher, state: States) -> None:
        self.watcher = watcher
        self.memory = layout(watcher, watcher.states_here(state))
        self.gpus = list(filter(is_gpu, self.memory))
        self.step_scalars: list[float | None] = []
        self.on_device = False  # whether any number lives on a device
        self.variant: tuple[bool, ...] = ()
        self._pending = Changes(numbers=True, grads=True, copies=watcher.first_copies)
        """What has not been sent to the device yet."""
        self._norm: Tensor | None = None
        self._launched: list[Call] = []
        """In this step."""
        self._again: list[Call] = []
        """Those of the last step. Empty unless it had no norm, no scale and no skip."""

    @property
    def device(self) -> torch.device | None:
        """The device that has all its parameters whole, or None."""
        alone = len(self.memory) == 1 and not self.watcher.sharded
        return next(iter(self.memory)) if alone else None

    def capturing(self) -> bool:
        """Whether a CUDA graph is being captured on one of its devices."""
        return any(map(is_capturing, self.gpus))

    def take(self, changes: Changes) -> None:
        """Take over what the watcher has found, to be sent in the next run."""
        if changes is not NOTHING:
            old = self._pending
            self._pending = Changes(
                numbers=old.numbers or changes.numbers,
                tables=old.tables or changes.tables,
                grads=old.grads or changes.grads,
                copies=changes.copies,
            )

    def norms(self) -> list[tuple[Sharding | None, Tensor]]:
        """Vectors whose norms make that of all gradients here, each with how it is sharded."""
        for device, memory in self.memory.items():
            with _current(device):
                self._do(self._norms(memory, self._send_grads(device, memory)))
        return [
            (bucket.key.sharding, memory.partials[bucket.first_chunk :][: bucket.table.chunks])
            for memory in self.memory.values()
            for bucket in memory.buckets
        ]

    def run(
        self,
        *,
        scale: Number = ONE,
        skip: Flag = False,
        grad_scale: Number | None = None,
        found_inf: Number | None = None,
        max_norm: float | None = None,
        skip_nonfinite: bool = False,
        norm_on: torch.device | None = None,
        skipped: Tensor | None = None,
        over_ranks: OverRanks | None = None,
    ) -> tuple[Tensor | None, int]:
        """Step every parameter that has a gradient; return the norm and the number of launches.

        Args:
            scale: multiplies every gradient.
            skip: whether nothing may change.
            grad_scale, found_inf: what GradScaler says; it divides, and not 0 means skip.
            max_norm: clip the norm over all gradients of the plan; None does not.
            skip_nonfinite: skip where that norm is inf or NaN.
            norm_on: the device of the plan, to compute the norm there; None computes none.
            skipped: 0-dim int64 on that device, is increased by one where nothing changed.
            over_ranks: sums squares over ranks, for a layerwise rule where there are parts.
        """
        plain = (
            scale is ONE
            and skip is False
            and grad_scale is None
            and found_inf is None
            and max_norm is None
            and norm_on is None
            and skipped is None
            and over_ranks is None
        )
        if plain and self._again and not self._has_news():
            self._do(self._again)
            return None, self._finish(moved=True)
        grad_norm = None if norm_on is None else self._take_norm(norm_on)
        clips = max_norm is not None and max_norm != float("inf")
        scaled = clips or grad_scale is not None or isinstance(scale, Tensor) or scale != 1.0
        if self.gpus:
            on_device = map(is_on_device, (scale, skip, grad_scale, found_inf))
            variant = (scaled, max_norm is None, grad_norm is None, skipped is None, *on_device)
            if self.capturing() and variant != self.variant:
                raise RuntimeError(NOT_BEFORE_CAPTURE)  # it may have to compile or load a kernel
            self.variant = variant
        if grad_scale is not None and self._reads(grad_scale):
            scale, grad_scale = scale / float(grad_scale), None
        if found_inf is not None and self._reads(found_inf):
            skip, found_inf = skip | bool(found_inf != 0), None
        step_scalars = StepScalars(
            max_norm=max_norm if max_norm is not None and clips else float("inf"),
            scale=scale,
            skip=skip,
            skip_nonfinite=skip_nonfinite,
        )
        known = [None if isinstance(value, Tensor) else float(value) for value in step_scalars]
        if known != self.step_scalars:
            self.step_scalars = known
            self._pending = self._pending._replace(numbers=True)
        before = self._skipped_here(skipped)
        self._send_moved()
        steps: list[tuple[torch.device, list[Call]]] = []
        for device, memory in self.memory.items():
            with _current(device):
                grads = self._send_grads(device, memory)
                numbers = self._send_numbers(device, memory, step_scalars)
                # Only a step that is captured has other tensors for addresses and numbers.
                same = grads is memory.views and numbers is memory.numbers
                if grad_norm is not None:
                    self._do(self._prepared(memory, "norms", same, self._norms, grads))
                rows = partial(
                    self._rows,
                    numbers=numbers,
                    partials=None if grad_norm is None else memory.partials,
                    grad_scale=_remote(grad_scale, device),
                    found_inf=_remote(found_inf, device),
                    grad_norm=grad_norm,
                    skipped=skipped,
                )
                usual = same and skipped is None and grad_scale is None and found_inf is None
                usual = usual and (grad_norm is None or not self.gpus)
                key = ("rows", grad_norm is None)
                self._do(self._prepared(memory, key, usual, rows, grads))
                if self.watcher.layerwise:
                    squares = partial(self._squares, numbers=numbers, scaled=scaled)
                    self._do(self._prepared(memory, ("squares", scaled), same, squares, grads))
                step = partial(self._step, numbers=numbers, scaled=scaled)
                steps.append((device, self._prepared(memory, ("step", scaled), same, step, grads)))
        if over_ranks is not None:
            over_ranks(self._squares_of_params())
        for device, calls in steps:
            with _current(device):
                self._do(calls)
        # On a GPU there is more to look after in every step: captures, and the current device.
        self._again = [] if self.gpus or not plain else [*self._launched]
        moved = skip is not True and before == self._skipped_here(skipped)
        # A caller may keep the norm of a step.
        told = grad_norm if self.gpus or grad_norm is None else grad_norm.clone()
        return told, self._finish(moved)

    def _take_norm(self, device: torch.device) -> Tensor:
        """What takes the norm: on a CPU always the same, so that launches can be made again."""
        if self._norm is None or self.gpus:
            self._norm = torch.empty((), dtype=torch.float32, device=device)
        return self._norm

    def _has_news(self) -> bool:
        """Whether anything has to be sent to a device."""
        return self.on_device or self._pending is not NOTHING

    def _do(self, calls: list[Call]) -> None:
        for call in calls:
            call()
        self._launched += calls

    def _prepared(
        self,
        memory: Memory,
        key: Any,
        same: bool,
        make: Callable[[Memory, Sequence[Tensor]], list[Call]],
        grads: Sequence[Tensor],
    ) -> list[Call]:
        """Launches, made anew unless they are the `same` in every step."""
        calls = memory.calls.get(key) if same else None
        if calls is None:
            calls = make(memory, grads)
            if same:
                memory.calls[key] = calls
        return calls

    def _finish(self, moved: bool) -> int:
        """What is left to do on the host, once all is launched; returns how many launches."""
        if moved:
            # As any operation in place does: a backward pass through the old values must fail.
            torch.autograd.graph.increment_version(self.watcher.with_grads)
        # A graph has numbers and addresses of its own, so nothing has been sent.
        self._pending = self._pending._replace(copies=()) if self.capturing() else NOTHING
        launches = len(self._launched)
        self._launched.clear()
        return launches

    def _reads(self, value: Number) -> bool:
        """Whether the host reads a number: one that it has, or that only it needs."""
        return not is_on_device(value) or not self.gpus

    def _skipped_here(self, skipped: Tensor | None) -> int | None:
        """How many steps were skipped, where no device has to be asked."""
        return None if skipped is None or is_on_device(skipped) else int(skipped)

    def _send_grads(self, device: torch.device, memory: Memory) -> list[Tensor]:
        """Each bucket's gradients' addresses on the device; in a graph its own, only read there."""
        if not self._pending.grads and not is_capturing(device):
            return memory.views
        begin = self.watcher.grads_begin
        addresses: list[int] = []
        for bucket in memory.buckets:
            addresses += [0] * (bucket.first_tensor - len(addresses))
            addresses += (self.watcher.addresses[begin + i] for i in bucket.positions)
        addresses += [0] * (memory.grads.numel() - len(addresses))
        if is_capturing(device):
            captured = constants(addresses, device).to(torch.int64)
            return [bucket.grads_in(captured) for bucket in memory.buckets]
        # A buffer is read faster than a list.
        send(torch.frombuffer(array("q", addresses), dtype=torch.int64), memory.grads)
        return memory.views

    def _send_moved(self) -> None:
        """Tell the tables where parameters and states are now, if any has moved."""
        if not self._pending.tables:
            return
        for device, memory in self.memory.items():
            with _current(device):
                for bucket in memory.buckets:
                    move(bucket.table, addresses_at(self.watcher, bucket.slots))
        self._pending = self._pending._replace(tables=False)

    def _send_numbers(
        self, device: torch.device, memory: Memory, step_scalars: Sequence[Number]
    ) -> Tensor:
        """All scalars on the device, where the numbers that live there join them."""
        if not (self._pending.numbers or self.on_device or is_capturing(device)):
            return memory.numbers
        values = [*step_scalars, *chain.from_iterable(self.watcher.options.scalars)]
        on_device = [(i, value) for i, value in enumerate(values) if isinstance(value, Tensor)]
        numbers = memory.numbers
        floats = [0.0 if isinstance(value, Tensor) else value for value in values]
        if is_capturing(device):
            numbers = constants(floats, device)
        elif self._pending.numbers:
            send(torch.frombuffer(array("d", floats), dtype=torch.float64), numbers)
        self.on_device = bool(on_device)
        if on_device:
            targets = [numbers[i] for i, _ in on_device]
            torch._foreach_copy_(targets, [value.reshape(()) for _, value in on_device])
        return numbers

    def _norms(self, memory: Memory, grads: Sequence[Tensor]) -> list[Call]:
        """The norm of each chunk of the gradients."""
        return [
            bucket.key.backend.norms(
                bucket.key.program, bucket.table, addresses, memory.partials, bucket.first_chunk
            )
            for bucket, addresses in zip(memory.buckets, grads, strict=True)
        ]

    def _rows(
        self,
        memory: Memory,
        grads: Sequence[Tensor],
        *,
        numbers: Tensor,
        grad_norm: Tensor | None,
        skipped: Tensor | None,
        **more: Tensor | None,
    ) -> list[Call]:
        """The row of each tensor; the first bucket writes the norm and counts what is skipped."""
        return [
            bucket.key.backend.rows(
                bucket.key.program,
                bucket.arrays(addresses, numbers),
                grad_norm=grad_norm if bucket is memory.buckets[0] else None,
                skipped=skipped if bucket is memory.buckets[0] else None,
                **more,
            )
            for bucket, addresses in zip(memory.buckets, grads, strict=True)
        ]

    def _squares(
        self, memory: Memory, grads: Sequence[Tensor], *, numbers: Tensor, scaled: bool
    ) -> list[Call]:
        """For a layerwise rule: sums of squares of every tensor here, and of its update."""
        return [
            call
            for bucket, addresses in zip(memory.buckets, grads, strict=True)
            for call in bucket.key.backend.squares(
                bucket.key.program, bucket.arrays(addresses, numbers), scaled=scaled
            )
        ]

    def _step(
        self, memory: Memory, grads: Sequence[Tensor], *, numbers: Tensor, scaled: bool
    ) -> list[Call]:
        """What moves parameters, states and counts."""
        return [
            bucket.key.backend.step(
                bucket.key.program, bucket.arrays(addresses, numbers), scaled=scaled
            )
            for bucket, addresses in zip(memory.buckets, grads, strict=True)
        ]

    def _squares_of_params(self) -> dict[Tensor, Tensor]:
        """Where the squares of each parameter of a layerwise rule are."""
        return {
            self.watcher.stepped[position]: squares
            for memory in self.memory.values()
            for bucket in memory.buckets
            for position, squares in zip(bucket.positions, bucket.squares, strict=True)
        }


def is_gpu(device: torch.device) -> bool:
    """Whether work on a device is queued, and may be captured in a graph."""
    return device.type == "cuda"


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on the current stream."""
    if not is_gpu(device):
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Makes `device` the current one, on which triton launches."""
    return torch.cuda.device(device) if is_gpu(device) else nullcontext()


def _remote(value: Number | None, device: torch.device) -> Tensor | None:
    """A number of a device as a one-element tensor on `device`; None for one of the host."""
    return value.to(device) if isinstance(value, Tensor) and is_on_device(value) else None

"""Triton's backend: grids, launch options and the arguments of the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, final

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedreg.kernels import table as tables
from fusedreg.kernels.contract import SLOTS, Arrays, Call, DeviceFunction, Program, Rule, Stage
from fusedreg.kernels.device import penalties, rules
from fusedreg.kernels.gpu.norms import norm_kernel
from fusedreg.kernels.gpu.rows import rows_kernel
from fusedreg.kernels.gpu.walk import fold_kernel, squares_kernel, step_kernel
from fusedreg.kernels.table import Table

CHUNK = 8192
"""Elements of one program of the step and of the norm."""
BLOCK = 1024
"""Elements of one iteration: 8 for each of 128 threads, so two 16-byte accesses of float32.

Half as many in float64, which needs two registers for each number, and where addresses are no
multiples of 16 bytes, so that each element has an address of its own in registers.
"""
ROWS_BLOCK = 128
FOLD_BLOCK = 2048
LAUNCH_OPTIONS: dict[str, int | bool] = {
    "num_warps": 4,
    # A product and a sum stay two roundings, as in torch.
    "enable_fp_fusion": False,
}
DTYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int32: tl.int32,
    torch.int16: tl.int16,
    torch.int8: tl.int8,
}
"""What the kernels load and store."""


def block_of(dtype: torch.dtype, aligned: bool) -> int:
    """Elements of one iteration for tensors of a dtype."""
    return BLOCK if aligned and dtype != torch.float64 else BLOCK // 2


def run(kernel: Any, programs: int, *args: Tensor | int | None, **constexprs: Any) -> None:
    """Launch `kernel` on the current device and stream. Every launch of the package goes here."""
    kernel[(programs,)](*args, **constexprs, **LAUNCH_OPTIONS)


@final
class Triton:
    """Triton's kernels, on a GPU; see contract.Backend, which documents the methods."""

    name = "triton"
    alignment = 16

    def rule(self, rule: Rule | str, *, states: int, counts: int, options: int) -> Rule:
        """The device functions of a rule; triton's compiler checks them in the first launch."""
        return rules.resolve(rule)

    def hook(self, function: DeviceFunction | str) -> DeviceFunction:
        """The device function of a penalty."""
        return penalties.resolve(function)

    def build(
        self,
        addresses: Sequence[Sequence[int]],
        numels: Sequence[int],
        groups: Sequence[int],
        device: torch.device,
    ) -> Table:
        """The table of some tensors."""
        return tables.build(addresses, numels, groups, device, CHUNK)

    def norms(
        self, program: Program, table: Table, grads: Tensor, partials: Tensor, first: int
    ) -> Call:
        """Writes the norm of every chunk of the gradients."""
        return partial(
            run,
            norm_kernel,
            table.chunks,
            grads,
            table.numels,
            table.first_chunks,
            table.owners,
            partials,
            first,
            GRAD=DTYPES[program.grad],
            ALIGNED=program.aligned,
            CHUNK=CHUNK,
            BLOCK=block_of(program.grad, program.aligned),
        )

    def rows(
        self,
        program: Program,
        arrays: Arrays,
        *,
        partials: Tensor | None = None,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        grad_norm: Tensor | None = None,
        skipped: Tensor | None = None,
    ) -> Call:
        """Writes the row of every tensor, with its new counts, which `step` stores."""
        table = arrays.table
        return partial(
            run,
            rows_kernel,
            triton.cdiv(table.tensors, ROWS_BLOCK),
            table.addresses,
            arrays.grads,
            table.groups,
            arrays.numbers,
            arrays.rows,
            partials,
            0 if partials is None else partials.numel(),
            grad_scale,
            found_inf,
            grad_norm,
            skipped,
            table.tensors,
            SCALARS=program.rule.scalars,
            COUNT=program.rule.width,
            FIRST_COUNT=program.first_count,
            COUNT_DTYPES=tuple(DTYPES[count] for count in program.counts),
            GROUP_WIDTH=program.group_width,
            FIRST_OPTION=program.first_option,
            ROW=program.row,
            BLOCK=ROWS_BLOCK,
            FOLD=FOLD_BLOCK,
        )

    def squares(self, program: Program, arrays: Arrays, *, scaled: bool) -> list[Call]:
        """Writes the sums of squares of every tensor and of its update; changes nothing else."""
        table = arrays.table
        constants = _constants(program, scaled)
        of_chunks = _walk(squares_kernel, arrays, arrays.partials, constants)
        of_tensors = partial(
            run,
            fold_kernel,
            table.tensors,
            arrays.partials,
            table.numels,
            table.first_chunks,
            arrays.squares,
            CHUNK=CHUNK,
            BLOCK=FOLD_BLOCK,
        )
        return [of_chunks, of_tensors]

    def step(self, program: Program, arrays: Arrays, *, scaled: bool) -> Call:
        """Steps every tensor that has a gradient, and its counts with it."""
        constants = {
            "ENCODE": None if program.codec is None else program.codec.encode,
            "FIRST_COUNT": program.first_count,
            "COUNT_DTYPES": tuple(DTYPES[count] for count in program.counts),
            **_functions(program, "prox"),
            **_constants(program, scaled),
        }
        squares = arrays.squares if program.layerwise else None
        return _walk(step_kernel, arrays, squares, constants)


def _walk(kernel: Any, arrays: Arrays, sums: Tensor | None, constants: dict[str, Any]) -> Call:
    """A launch over all chunks."""
    return partial(run, kernel, arrays.table.chunks, *arrays.walked(sums), **constants)


def _constants(program: Program, scaled: bool) -> dict[str, Any]:
    """The constants of a kernel that walks all elements."""
    slots = [hook for stage in SLOTS for hook in program.slots(stage)]
    return {
        "RULE": program.rule.tile,
        "COUNT": program.rule.width,
        "STATES": program.states,
        "PLANES": tuple(DTYPES[plane] for plane in program.planes),
        "DECODE": None if program.codec is None else program.codec.decode,
        **_functions(program, "gradient"),
        **_functions(program, "decay"),
        "FIRSTS": tuple(0 if hook is None else hook.first for hook in slots),
        "WIDTHS": tuple(0 if hook is None else hook.width for hook in slots),
        "GROUP_WIDTH": program.group_width,
        "ROW": program.row,
        "SCALED": scaled,
        "PARAM": DTYPES[program.param],
        "GRAD": DTYPES[program.grad],
        "COMPUTE": tl.float64 if program.param == torch.float64 else tl.float32,
        "ALIGNED": program.aligned,
        "CHUNK": CHUNK,
        "BLOCK": block_of(program.param, program.aligned),
    }


def _functions(program: Program, stage: Stage) -> dict[str, DeviceFunction | None]:
    """The hooks of a stage as the kernels call them: DECAY, PROX1, PROX2."""
    hooks = program.slots(stage)
    numbers = [""] if len(hooks) == 1 else range(1, 1 + len(hooks))
    return {
        f"{stage.upper()}{number}": None if hook is None else hook.function
        for number, hook in zip(numbers, hooks, strict=True)
    }


BACKEND = Triton()

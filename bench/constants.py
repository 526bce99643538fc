"""AdamW with other launch constants of the kernels: `python bench/run.py --sweep`, on a GPU."""

from __future__ import annotations

from itertools import islice, product
from typing import Any

import torch
from comparison import prepare
from contenders import Task, make_groups, own, params_of
from measure import Machine, Timed, rounds, spread
from methods import METHODS
from shapes import GPT2, TINY
from verify import expected, max_norm, set_grads, start


def sweep(machine: Machine) -> list[dict[str, Any]]:
    """GPT-2 124M in float32; results that differ from the reference are not timed."""
    from fusedreg.kernels import table  # noqa: PLC0415  # triton only where it is asked for
    from fusedreg.kernels.gpu import backend as launch  # noqa: PLC0415

    shapes = TINY["tiny"] if machine.dry else [GPT2]
    groups = make_groups(shapes, torch.float32, machine.device)
    norm, params = max_norm(groups), params_of(groups)
    tasks = [Task(METHODS["AdamW"], max_norm) for max_norm in (None, norm)]
    begin = start(groups, tasks[0])
    must_be = [expected(begin, groups, task) for task in tasks]
    before = launch.BLOCK, launch.LAUNCH_OPTIONS["num_warps"], table.CHUNK
    grid = product((1024, 2048, 4096), (4, 8), (8192, 16384, 32768, 65536), (0, 1))
    options = {"fused": True} if machine.dry else {}
    found = []
    for block, warps, chunk, clip in islice(grid, 2 if machine.dry else None):
        if machine.left() < 0:
            break
        launch.BLOCK, launch.LAUNCH_OPTIONS["num_warps"] = block, warps
        launch.CHUNK = table.CHUNK = chunk
        contender = own(groups, tasks[clip], **options)
        runner = prepare(contender, groups, begin, must_be[clip], machine)
        row = {"block": block, "warps": warps, "chunk": chunk, "clip": bool(clip)}
        ms: dict[str, float] = {}
        if runner.verdict.matches:
            timed = {("fusedreg", "all"): Timed(contender.step, runner.host or 0.0)}
            times = rounds(timed, machine, before=lambda: set_grads(params, begin.grads))
            ms = dict(zip(("ms", "p20", "p80"), spread(times["fusedreg", "all"]), strict=True))
        found.append({**row, **ms, "verdict": str(runner.verdict)})
    launch.BLOCK, launch.LAUNCH_OPTIONS["num_warps"], table.CHUNK = before
    launch.CHUNK = table.CHUNK
    return found

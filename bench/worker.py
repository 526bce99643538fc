"""Steps one version of fusedreg when it is told to; see versions.py, which starts two of these.

Commands come as JSON lines, and each is answered by one. It knows only what every version has.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import torch
from contenders import Contender, Task, make_groups, own, params_of
from jobs import Job, all_shapes
from measure import Machine, Timed, host_seconds, timer
from methods import DTYPES, METHODS
from verify import Start, check, expected, max_norm, set_grads, start

import fusedreg


class Worker:
    """What lasts from one command to the next."""

    contender: Contender
    begin: Start
    groups: list[dict[str, Any]]
    timed: Timed

    def __init__(self, dry: bool) -> None:
        gpu = torch.cuda.is_available() and not dry
        self.machine = Machine(torch.device("cuda" if gpu else "cpu"), 0.0, 0.0, dry=dry)

    def make(self, job: dict[str, Any], results: str) -> dict[str, Any]:
        """Make and verify the optimizer of a job, if there is one; write its parameters."""
        of = Job(**job)
        if not hasattr(fusedreg, METHODS[of.method].cls):
            return {"verdict": f"has no {of.method}"}
        shapes = all_shapes(self.machine.dry)[of.model]
        self.groups = make_groups(shapes, DTYPES[of.dtype], self.machine.device)
        task = Task(METHODS[of.method], max_norm(self.groups) if of.clip else None)
        self.begin = start(self.groups, task)
        options = {"fused": True} if self.machine.dry else {}
        self.contender = own(self.groups, task, **options)
        must_be = expected(self.begin, self.groups, task)
        verdict = check(self.contender, self.groups, self.begin, must_be)
        torch.save([param.detach().cpu() for param in params_of(self.groups)], results)
        host = host_seconds(self.contender.step, self.machine) if self.machine.on_gpu else 0.0
        self.timed = Timed(self.contender.step, host)
        return {"verdict": str(verdict)}

    def step(self) -> dict[str, Any]:
        set_grads(params_of(self.groups), self.begin.grads)
        self.machine.wait()
        begin = time.perf_counter()
        ms = timer(self.timed, self.machine)()
        return {"ms": ms, "seconds": time.perf_counter() - begin}


def main() -> None:
    dry = "--dry-run" in sys.argv
    if dry:
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed
    worker = Worker(dry)
    for line in sys.stdin:
        name, arguments = json.loads(line)
        print(json.dumps(getattr(worker, name)(**arguments)), file=answers, flush=True)


if __name__ == "__main__":
    main()

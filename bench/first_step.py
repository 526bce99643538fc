"""Seconds of the first step of a process, as JSON: `python bench/first_step.py MODEL`.

The kernels compiled for it are verified by another optimizer, once the time is taken.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
from contenders import Task, make_groups, own
from methods import METHODS
from shapes import of_targets
from verify import check, expected, max_norm, start


def main() -> None:
    models = {**of_targets(dry=True), **of_targets(dry=False)}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=models)
    parser.add_argument("--reference", action="store_true", help="with fused=False")
    arguments = parser.parse_args()
    groups = make_groups(models[arguments.model], torch.float32, torch.device("cpu"))
    task = Task(METHODS["AdamW"], max_norm(groups))
    begin = start(groups, task)
    options: dict[str, Any] = {"fused": False} if arguments.reference else {}
    first, second = own(groups, task, **options), own(groups, task, **options)
    since = time.perf_counter()
    first.step()
    seconds = time.perf_counter() - since
    verdict = check(second, groups, begin, expected(begin, groups, task))
    found = {"seconds": seconds, "backend": first.optimizer.backend, "verdict": str(verdict)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()

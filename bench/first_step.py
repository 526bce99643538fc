"""Seconds of the first step of a process, as JSON: `python bench/first_step.py MODEL`.

The kernels compiled for it are verified by another optimizer, once the time is taken.
"""

from __future__ import annotations

import argparse
import json

import torch
from contenders import own
from jobs import of_targets
from measure import seconds
from methods import METHODS
from verify import Setting


def main() -> None:
    models = {**of_targets(dry=True), **of_targets(dry=False)}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=models)
    parser.add_argument("--reference", action="store_true", help="with fused=False")
    arguments = parser.parse_args()
    setting = Setting(models[arguments.model], torch.float32, torch.device("cpu"))
    task = setting.task(METHODS["AdamW"], clip=True)
    fused = False if arguments.reference else None
    first, second = (own(setting.groups, task, fused=fused) for _ in range(2))
    found = {"seconds": seconds(first.step), "backend": first.optimizer.backend}
    print(json.dumps({**found, "verdict": str(setting.check(second, task))}))


if __name__ == "__main__":
    main()

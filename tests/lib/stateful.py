"""Random programs around an optimizer: whatever a user does between two steps, the next is right.

A machine draws with hypothesis what is done to a Program, and shortens what fails. The suite draws
the same few programs in every run, and

    python tests/lib/stateful.py --steps 100000

takes that many steps in other ones each time, and counts what it found.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
import time
import traceback
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import fusedreg
from fusedreg.cases import CLASSES

import environment  # noqa: F401  # by itself too, triton interprets as in the suite
from stateful_program import COUNTS, DTYPES, GRADS, MEMORY, SHAPES, SIZES, Program, number_of

# ---- programs drawn by hypothesis ----------------------------------------------------------------

COMMON: dict[str, list[Any]] = {
    "lr": [0.1, 0.01, 1.0, 0.0],
    "weight_decay": [0.0, 0.5],
    "decoupled_weight_decay": [False, True],
    "lr_independent_decay": [False, True],
    "l1": [0.0, 0.125],
    "l1_mode": ["prox", "decoupled", "subgradient"],
    "maximize": [False, True],
    "state_dtype": [None, torch.float32, torch.float64, torch.bfloat16],
}
BETAS = [(0.9, 0.999), (0.5, 0.75), (0.9, 0.9), (0.0, 0.9), (0.5, 0.0)]
MOMENTUM = {"momentum": [0.0, 0.9, 0.5]}
ADAM = {"betas": BETAS, "eps": [1e-8, 1e-3, 0.0]}
RULES: dict[Any, dict[str, list[Any]]] = {
    fusedreg.SGD: {**MOMENTUM, "dampening": [0.0, 0.5], "nesterov": [False, True]},
    fusedreg.Adam: {**ADAM, "amsgrad": [False, True]},
    fusedreg.AdamW: {**ADAM, "amsgrad": [False, True]},
    fusedreg.RMSprop: {
        **MOMENTUM, "alpha": [0.99, 0.5], "eps": ADAM["eps"], "centered": [False, True]
    },
    fusedreg.Adagrad: {
        "lr_decay": [0.0, 0.125], "eps": [1e-10, 0.0], "initial_accumulator_value": [0.0, 0.125]
    },
    fusedreg.Lion: {"betas": BETAS},
    fusedreg.LAMB: ADAM,
}  # fmt: skip
KINDS = ["float", "float", "int", "tensor", "tensor32", "numpy", "numpy32"]
PLAIN_DTYPES = DTYPES[:4]


def choices(cls: Any) -> dict[str, list[Any]]:
    """The options of a class and what they may be."""
    names = {**COMMON, **RULES[cls]}
    if cls is fusedreg.AdamW:
        del names["decoupled_weight_decay"]
    if cls is fusedreg.Lion:
        names["l1_mode"] = COMMON["l1_mode"][1:]
    return names


@st.composite
def options_of_class(draw: Any, cls: Any, with_l1: bool) -> dict[str, Any]:
    """Options of a constructor that go together; most of them are the defaults."""
    names = choices(cls)
    chosen = draw(st.sets(st.sampled_from(sorted(names)), max_size=5))
    options = {name: draw(st.sampled_from(names[name])) for name in sorted(chosen)}
    if not with_l1:
        options.pop("l1", None)
    try:
        made = cls([torch.zeros(1)], **options)
    except ValueError:  # of options that exclude each other nothing remains
        return {}
    options["lr"] = draw(
        st.sampled_from(KINDS).map(lambda kind: number_of(made.defaults["lr"], kind))
    )
    own = {"max_grad_norm": [None, 1.0, math.inf], "skip_nonfinite": [False, True]}
    return options | {name: draw(st.sampled_from(values)) for name, values in own.items()}


@st.composite
def specs(draw: Any, dtypes: list[torch.dtype]) -> list[Any]:
    """One to four parameters, of one dtype or of several."""
    few = draw(st.sampled_from([dtypes[:1], dtypes]))
    one = st.tuples(*map(st.sampled_from, (SHAPES, few, MEMORY, [0, 1])))
    return draw(st.lists(one, min_size=1, max_size=4))


NUMBERS = st.integers(0, 3)
SEEDS = st.integers(0, 999)
STEPS = {
    "plain": lambda p: p.step(),
    "closure": lambda p: p.step_with_closure(),
    "scaled": lambda p: p.step_scaled(4.0, 0.0),
    "only scaled": lambda p: p.step_scaled(4.0, None),
    "overflow": lambda p: p.step_scaled(4.0, 2.0),
    "hooks": lambda p: p.step_with_hooks(0.05),
    "again": lambda p: (p.step(), p.step()),
}
MISTAKES = ["a parameter twice", "no state_dict", "no groups", "state of nobody", "sparse", "lr",
            "weight_decay", "l1_mode", "differentiable"]  # fmt: skip
SPOILED = [None, 2, 2.0, torch.tensor([1.0, 2.0])]


class Machine(RuleBasedStateMachine):
    """Draws programs; a subclass says on which path."""

    path = "reference"
    program: Program

    @initialize(data=st.data())
    def begin(self, data: Any) -> None:
        cls = data.draw(st.sampled_from(CLASSES))
        params = data.draw(specs(DTYPES))
        is_real = all(not dtype.is_complex for _, dtype, *_ in params)
        options = data.draw(options_of_class(cls, with_l1=is_real))
        self.program = Program(self.path, cls, options, params)

    @rule(
        kinds=st.lists(st.sampled_from(GRADS), min_size=6, max_size=6),
        size=st.sampled_from(SIZES),
        number=SEEDS,
        how=st.sampled_from(sorted(STEPS)),
        times=st.integers(1, 12),
    )
    def step(self, kinds: list[str], size: float, number: int, how: str, times: int) -> None:
        for turn in range(times):
            self.program.set_grads(kinds[turn:] + kinds[:turn], size, number + turn)
            STEPS[how](self.program)

    @rule(index=NUMBERS, kind=st.sampled_from(["nan", "inf"]), number=SEEDS)
    def step_nonfinite(self, index: int, kind: str, number: int) -> None:
        program = self.program
        program.set_grads(["same"] * 6, 1.0, number)
        program.set_grad(program.params[index % len(program.params)], kind, 1.0, number)
        program.optimizer.skip_nonfinite = True
        program.step()

    @rule(number=SEEDS, hows=st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=12))
    def step_along_the_same_memory(self, number: int, hows: list[str]) -> None:
        for turn, how in enumerate(hows):
            self.program.write_grads(number + turn)
            STEPS[how](self.program)

    @rule(index=NUMBERS, memory=st.sampled_from(MEMORY))
    def move(self, index: int, memory: str) -> None:
        self.program.move(index % len(self.program.params), memory)

    @rule(index=NUMBERS)
    def write(self, index: int) -> None:
        self.program.write(index % len(self.program.params))

    @rule()
    def flatten(self) -> None:
        self.program.flatten()

    @rule(index=NUMBERS, dtype=st.sampled_from(PLAIN_DTYPES))
    def retype(self, index: int, dtype: torch.dtype) -> None:
        self.program.retype(index % len(self.program.params), dtype)

    @rule(index=NUMBERS)
    def expand(self, index: int) -> None:
        self.program.expand(index % len(self.program.params))

    @rule(index=NUMBERS)
    def resize(self, index: int) -> None:
        self.program.resize(index % len(self.program.params))

    @rule(index=NUMBERS, how=st.sampled_from(["flat", "transpose", "reversed"]))
    def reshape(self, index: int, how: str) -> None:
        self.program.reshape(index % len(self.program.params), how)

    @rule(index=NUMBERS)
    def reinterpret(self, index: int) -> None:
        self.program.reinterpret(index % len(self.program.params))

    @rule(group=NUMBERS, kind=st.sampled_from(KINDS), data=st.data())
    def edit(self, group: int, kind: str, data: Any) -> None:
        names = {**choices(self.program.cls), "fused": [None, False]}
        name = data.draw(st.sampled_from(sorted(names)))
        value = data.draw(st.sampled_from(names[name]))
        self.program.edit(group, name, number_of(value, kind if name != "l1" else "float"))

    @rule(norm=st.sampled_from([None, 0.5, math.inf, 1e30]), skip=st.booleans())
    def edit_own(self, norm: float | None, skip: bool) -> None:
        self.program.optimizer.max_grad_norm = norm
        self.program.optimizer.skip_nonfinite = skip

    @rule(index=NUMBERS, how=st.sampled_from(["all", "clear", "del", "one"]))
    def forget(self, index: int, how: str) -> None:
        self.program.forget(index % len(self.program.params), how)

    @rule(index=NUMBERS, which=NUMBERS, how=st.sampled_from([*MEMORY, "double", "single"]))
    def restate(self, index: int, which: int, how: str) -> None:
        self.program.restate(index % len(self.program.params), which, how)

    @rule(index=NUMBERS, which=NUMBERS, value=st.sampled_from(SPOILED))
    def spoil(self, index: int, which: int, value: Any) -> None:
        self.program.spoil(index % len(self.program.params), which, value)

    @rule(shape=st.sampled_from(SHAPES), memory=st.sampled_from(MEMORY))
    def add_group(self, shape: tuple[int, ...], memory: str) -> None:
        self.program.add_group(shape, self.program.params[0].dtype, memory)

    @precondition(lambda self: self.program.is_whole)
    @rule()
    def reload(self) -> None:
        self.program.reload()

    @precondition(lambda self: self.program.is_whole)
    @rule()
    def hook_files(self) -> None:
        self.program.hook_files()

    @rule(how=st.sampled_from(["deepcopy", "pickle"]))
    def copy(self, how: str) -> None:
        self.program.copy(how)

    @precondition(lambda self: self.program.is_whole)
    @rule()
    def step_as_torch(self) -> None:
        self.program.step_as_torch()

    @rule(where=st.sampled_from(["closure", "hook"]))
    def raise_in(self, where: str) -> None:
        self.program.raise_in(where)

    @rule(which=st.sampled_from(MISTAKES))
    def misuse(self, which: str) -> None:
        self.program.misuse(which)

    @rule(share=st.floats(0, 1), number=SEEDS)
    def interrupt(self, share: float, number: int) -> None:
        # What lies between count and moments is a small part of the lines, at the end of them.
        for turn in range(6):
            self.program.set_grads(["same"] * 6, 1.0, number + turn)
            self.program.interrupt((share + 1 - 2.0**-turn) % 1)
            self.program.step()

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "program"):
            COUNTS["actions"] += 1
            self.program.assert_as_known()
            self.program.check_states()
            self.program.check_backend()
            if self.program.is_whole:
                self.program.check_loads()


def machine(on: str) -> type[Machine]:
    """The machine of a path."""
    return type(f"Machine_{on}", (Machine,), {"path": on})


def run_programs(path: str, number: int, programs: int, steps: int) -> None:
    """Run so many programs of at most so many actions; a number gives the same ones again."""
    run_state_machine_as_test(
        seed(number)(machine(path)),
        settings=settings(
            max_examples=programs,
            stateful_step_count=steps,
            deadline=None,
            database=None,
            print_blob=False,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink],
        ),
    )


# ---- the long run --------------------------------------------------------------------------------


def batch(number: int, path: str, programs: int) -> tuple[Counter[str], str]:
    """Some programs of their own; what was counted, and what failed."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    COUNTS.clear()
    fault = ""
    try:
        run_programs(path, number, programs, steps=40)
    except Exception as error:  # whatever it is, it is what is looked for
        fault = "".join(traceback.format_exception(error))
    return Counter(COUNTS), fault


def kind_of(fault: str) -> str:
    """Faults that differ in numbers only are one."""
    lines = [line.strip(" |") for line in fault.splitlines()]
    raised = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Interrupt)\b", line)]
    return re.sub(r"-?\d[\d.e+-]*", "#", raised[-1] if raised else "?")


def main() -> int:
    """Take many steps, and say what was found."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--first", type=int, default=time.time_ns() % 2**32, help="first seed")
    options = parser.parse_args()
    total: Counter[str] = Counter()
    faults: dict[str, list[str]] = {}
    start, number = time.monotonic(), options.first
    # Of ten batches one is interpreted, which takes ten times as long.
    paths = ["reference", "default"] * 4 + ["default", "fused"]
    print(f"first seed {number}", flush=True)
    while total["steps"] < options.steps:
        # A process for each, because compiled kernels stay as long as it lives.
        with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
            runs = {}
            for _ in range(options.jobs):
                path = paths[number % len(paths)]
                runs[number, path] = pool.submit(
                    batch, number, path, 10 if path == "fused" else 200
                )
                number += 1
            for key, run in runs.items():
                try:
                    counts, fault = run.result()
                except BrokenProcessPool as error:
                    counts, fault = Counter(), f"SystemError: the process died, {error}"
                total += counts
                if fault and kind_of(fault) not in faults:
                    print(f"\nseed and path {key}\n{fault}", flush=True)
                if fault:
                    faults.setdefault(kind_of(fault), []).append(str(key))
        seconds = time.monotonic() - start
        print(f"{seconds:6.0f} s  {dict(total)}  {len(faults)} faults", flush=True)
    share = total["judged"] / max(total["elements"], 1)
    print(
        f"{total['steps']} steps in {total['programs']} programs of {total['actions']} actions; "
        f"{total['refused']} refused as expected, {total['interrupts']} interrupts; "
        f"{share:.2%} of {total['elements']} numbers judged; {len(faults)} faults"
    )
    for kind, where in faults.items():
        print(f"  {len(where)} times, first {where[0]}: {kind}")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())

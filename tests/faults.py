"""Plants faults into copies of the source, one by one, and runs the tests that must catch them.

    python tests/faults.py            # all; exit status 1 if the short selection misses one
    python tests/faults.py momentum   # those whose name or file has this word

A test that cannot fail catches nothing. So each fault is a line that somebody could have written,
on each of the three paths. It names the tests that should notice it. The table shows which of them
did: first those of `make test`, and where these notice nothing, those of `make test-all`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
COPIED = (
    "fusedreg",
    "kernels",
    "tests",
    "bench",
    "docs",
    "pyproject.toml",
    "README.md",
    "CONTRIBUTING.md",
)
TIMEOUT = 300
"""Seconds for the tests of one fault. One that takes longer is not caught."""
SHORT, LONG = ("-m", "not slow"), ()

ORACLE = "steps/test_oracle.py"
REFERENCE, CPU, GPU = (f"{ORACLE} -k {path}" for path in ("reference", "default", "fused"))
AMP, CLIPPING = "steps/test_amp.py", "steps/test_clipping.py"
DECAY, L1, STEP = "steps/test_decay.py", "steps/test_l1.py", "steps/test_step.py"
STATE, FILES = "files/test_state.py", "files/test_checkpoints.py files/test_refused_files.py"


class Fault(NamedTuple):
    """One text of one file, and what stands wrongly in its place."""

    name: str
    file: str
    old: str
    new: str
    tests: str
    """Arguments of pytest, within tests/."""


RULES, PENALTIES = "kernels/device/rules.py", "kernels/device/penalties.py"
REFERENCE_STEP, PENALTY = "fusedreg/reference.py", "fusedreg/penalty.py"
CHECKPOINT, DIST, NORMS = "fusedreg/checkpoint.py", "fusedreg/dist.py", "fusedreg/norms.py"
L2, STEPPER = "fusedreg/penalties/l2.py", "fusedreg/stepper.py"
STEPS = "kernels/device/step.py"
MOMENTUM, GROUPS = "fusedreg/optimizers/momentum.py", "fusedreg/groups.py"
ADAM, RMSPROP = "fusedreg/optimizers/adam.py", "fusedreg/optimizers/rmsprop.py"
LOOPS, WALK, ROWS = "kernels/cpu/loops.py", "kernels/gpu/walk.py", "kernels/gpu/rows.py"
NUMBERS, PLAN, WATCH = (
    "fusedreg/engine/numbers.py",
    "fusedreg/engine/plan.py",
    "fusedreg/engine/watch.py",
)

FAULTS = [
    # ---- rules and penalties of both compilers
    Fault("count of Adam is frozen", RULES, "t = counts[0] + 1.0\n    correction1", "t = counts[0]\n    correction1", CPU),
    Fault("no correction of the first moment", RULES, "correction1 = 1.0 - power(beta1, t)", "correction1 = t / t", CPU),
    Fault("no root of the second correction", RULES, "square_root(1.0 - power(beta2, t))", "1.0 - power(beta2, t)", CPU),
    Fault("eps before the correction", RULES, "divide(square_root(v), scalars[4]) + scalars[5]", "divide(square_root(v) + scalars[5], scalars[4])", CPU),
    Fault("amsgrad takes the smallest", RULES, "tl.maximum(states[2], v, propagate_nan", "tl.minimum(states[2], v, propagate_nan", CPU),
    Fault("first gradient is damped", RULES, "complement = tl.where(first, 1.0, 1.0 - dampening)", "complement = 1.0 - dampening", CPU),
    Fault("nesterov without momentum of its own", RULES, "return g + scalars[2] * b, gain, states", "return g + b, gain, states", CPU),
    Fault("threshold of nesterov is that of momentum", RULES, "return 1.0 + options[0] * mass, (", "return mass, (", CPU),
    Fault("mass of a momentum is not stored", RULES, "return mass, scalars, (counts[0], mass)", "return mass, scalars, (counts[0], counts[1])", CPU),
    Fault("lr_decay counts from 1", RULES, "(1.0 + counts[0] * lr_decay, eps)", "(1.0 + (counts[0] + 1.0) * lr_decay, eps)", CPU),
    Fault("Lion moves its momentum first", RULES, "return direction, 1.0, (average(m, g, complement2),)", "return direction, 1.0, (average(m, g, complement1),)", CPU),
    Fault("trust ratio upside down", STEPS, "tl.sqrt(param_squares) / tl.sqrt(update_squares)", "tl.sqrt(update_squares) / tl.sqrt(param_squares)", CPU),
    Fault("unused weights are wiped out", RULES, "gain = tl.where(v == 0.0, 0.0, reciprocal(d))", "gain = reciprocal(d)", L1),
    Fault("average from the far end", RULES, "where(weight < 0.5, 0.5 * old", "where(weight >= 0.5, 0.5 * old", "steps/test_corners.py"),
    Fault("threshold without gain", PENALTIES, "soft_threshold(w, threshold * gain)", "soft_threshold(w, threshold)", CPU),
    Fault("decay adds", PENALTIES, "tl.where(weight_decay == 0.0, g, g + weight_decay * w)", "tl.where(weight_decay == 0.0, g, g - weight_decay * w)", CPU),
    Fault("threshold hides NaN", PENALTIES, "small = tl.where(w == w, 0.0, w)", "small = tl.where(w == w, 0.0, 0.0)", L1),
    Fault("threshold grows negative weights", PENALTIES, "w + threshold, small", "w - threshold, small", CPU),
    # ---- reference
    Fault("reference: averages are doubled", MOMENTUM, "half, half_new = 0.5 * old, 0.5 * new", "half, half_new = old, new", REFERENCE),
    Fault("reference: a buffer of zeros is warm", MOMENTUM, "mass = torch.where(has_moved, mass + limit, mass)", "mass = mass + limit", f"{AMP} {STATE} steps/test_options.py"),
    Fault("reference: a warm buffer is undamped", MOMENTUM, "limit = (1 - dampening) / (1 - group[\"momentum\"])", "limit = 1 / (1 - group[\"momentum\"])", f"{STATE} steps/test_options.py steps/test_stateful.py"),
    Fault("reference: bias correction left out", ADAM, "direction = m / denominator / (1 - beta1**step)", "direction = m / denominator", REFERENCE),
    Fault("reference: centered without centre", RMSPROP, "variance = (v - a * a).clamp(min=0)", "variance = v", REFERENCE),
    Fault("reference: maximize ignored", REFERENCE_STEP, "if settings[\"maximize\"]:", "if False:", REFERENCE),
    Fault("reference: decoupled decay is coupled too", L2, "if settings[\"decoupled_weight_decay\"] or is_zero(weight_decay):", "if is_zero(weight_decay):", REFERENCE),
    Fault("reference: penalty twice", REFERENCE_STEP, "        w = penalty.prox(settings, w, rate, moved.gain)", "        w = penalty.prox(settings, penalty.prox(settings, w, rate, moved.gain), rate, moved.gain)", REFERENCE),
    Fault("reference: decay after the step", REFERENCE_STEP, "w = w * (1 - rate * moved.decay)\n    w = w - rate * moved.direction", "w = (w - rate * moved.direction) * (1 - rate * moved.decay)\n    else:\n        w = w - rate * moved.direction", REFERENCE),
    Fault("reference: lr of 0 moves", REFERENCE_STEP, "skip | (lr == 0)", "skip", STEP),
    Fault("reference: a skip changes moments", REFERENCE_STEP, "stepped += [(plane, x, skip) for", "stepped += [(plane, x, False) for", AMP),
    Fault("reference: lr of 0 rewrites", REFERENCE_STEP, "if keep is not True and isinstance(target, Tensor)", "if isinstance(target, Tensor)", STEP),
    Fault("independent decay is forgotten", L2, "if settings[\"lr_independent_decay\"]:", "if False:", DECAY),
    Fault("soft threshold is hard", PENALTY, "return torch.sgn(x) * (modulus - threshold).clamp(min=0) + 0.0", "return torch.where(modulus > threshold, x, 0.0)", "steps/test_penalty.py"),
    Fault("subgradient at 0 is 1", PENALTY, "torch.where(w.isnan(), w, torch.sgn(w))", "torch.where(w < 0, -1.0, 1.0).to(w)", "steps/test_penalty.py"),
    # ---- norms, clipping, scaling, ranks
    Fault("clip without its 1e-6", NORMS, "(max_grad_norm / (norm + 1e-6))", "(max_grad_norm / norm)", CLIPPING),
    Fault("clip enlarges", NORMS, ".clamp(max=1.0)", "", CLIPPING),
    Fault("norm in the dtype of the gradient", NORMS, "torch.linalg.vector_norm(x, dtype=wide)", "torch.linalg.vector_norm(x).to(wide)", CLIPPING),
    Fault("copies count as parts", DIST, "_squares(norm) / math.prod(mesh.size(dim) for dim in dims if dim not in sharding.dims)", "_squares(norm)", "distributed/test_dtensors.py"),
    Fault("norms are added, not squares", DIST, "return torch.stack([norm, norm / SCALE[norm.dtype]]).square()", "return torch.stack([norm, norm / SCALE[norm.dtype]])", "distributed"),
    Fault("one group only counts for its mesh", DIST, "squares = squares + _sum_over_mesh(mesh, parts)", "squares = _sum_over_mesh(mesh, parts)", "distributed"),
    Fault("a sum of found_inf is not looked at", STEPPER, "found_inf is None else found_inf != 0", "found_inf is None else found_inf == 1", f"{AMP} steps/test_torch_faults.py"),
    Fault("loss scale multiplies", STEPPER, "1.0 if loss_scale is None else 1.0 / loss_scale", "1.0 if loss_scale is None else 1.0 * loss_scale", AMP),
    # ---- files and groups
    Fault("a checkpoint narrows", CHECKPOINT, "dtype or torch.promote_types(value.dtype, param.dtype)", "dtype or param.dtype", f"{STATE} {FILES}"),
    Fault("a count of bfloat16 stays one", CHECKPOINT, "dtype = torch.promote_types(count.dtype, least)", "dtype = count.dtype", f"{STATE} {FILES}"),
    Fault("a file changes how to run", CHECKPOINT, "for name in (\"params\", *EXECUTION_FLAGS) if", "for name in (\"params\",) if", f"{STATE} {FILES}"),
    Fault("a file of another class is loaded", CHECKPOINT, "if missing and foreign:", "if False:", FILES),
    Fault("a file shares memory", CHECKPOINT, "value.detach().to(param.device, dtype, copy=True)", "value.detach().to(param.device, dtype)", f"{STATE} {FILES}"),
    Fault("biases are penalised", GROUPS, "last == \"bias\" or last.startswith(\"bias_\")", "last == \"bias\"", "steps/test_groups.py"),
    Fault("the first pattern wins", GROUPS, "options[matched].update(chosen)", "options[matched] = {**chosen, **options[matched]}", "steps/test_groups.py"),
    Fault("a tied weight has one name", GROUPS, "model.named_parameters(remove_duplicate=False)", "model.named_parameters()", "steps/test_groups.py"),
    # ---- kernels of a CPU
    Fault("CPU: counts are not stored", LOOPS, "                        with when(address != 0):\n                            Pointer", "                        with when(address == 1):\n                            Pointer", CPU),
    Fault("CPU: last element is left out", LOOPS, "return begin, select(begin + CHUNK < numel, begin + CHUNK, numel)", "return begin, select(begin + CHUNK < numel, begin + CHUNK, numel - 1)", CPU),
    Fault("CPU: trust ratio squared", LOOPS, "rate = rate * trust(sums[tensor * 2], sums[tensor * 2 + 1])", "rate = rate * trust(sums[tensor * 2], sums[tensor * 2 + 1]) * trust(sums[tensor * 2], sums[tensor * 2 + 1])", CPU),
    Fault("CPU: a skipped step is counted twice", LOOPS, "counter[0] = counter[0] + 1", "counter[0] = counter[0] + 2", AMP),
    Fault("clip hides a norm of NaN", STEPS, "factor = tl.where(factor > 1.0, 1.0, factor)  # a NaN stays one", "factor = tl.where(factor < 1.0, factor, 1.0)", f"{CLIPPING} {AMP}"),
    Fault("CPU: lr of 0 moves", LOOPS, "moves = elements.lr.to(elements.compute) != 0.0", "moves = elements.lr == elements.lr", STEP),
    Fault("kernels: clip adds 1e-3", STEPS, "factor = max_norm / (norm + 1e-6)", "factor = max_norm / (norm + 1e-3)", CLIPPING),
    # ---- kernels of a GPU, interpreted
    Fault("GPU: last block is not stored", WALK, "if rest < tl.minimum(begin + CHUNK, numel):\n            step_block(", "if rest > numel:\n            step_block(", GPU),
    Fault("kernels: maximize ignored", STEPS, "return (active, sign * scale, gain), scalars, counts", "return (active, scale, gain), scalars, counts", CPU),
    Fault("GPU: all count where the first tensor does", WALK, "(FIRST_COUNT + i) * tensors + tensor)\n        ptr", "(FIRST_COUNT + i) * tensors)\n        ptr", GPU),
    Fault("shrink takes the gain", PENALTIES, "threshold = (rate * numbers[0]).to(w.dtype)", "threshold = (rate * numbers[0] * mass).to(w.dtype)", CPU),
    # What a scaler says is read by the host here; only on a GPU the kernel of the rows reads it.
    Fault("kernels: loss scale multiplies", PLAN, "scale, grad_scale = scale / float(grad_scale), None", "scale, grad_scale = scale * float(grad_scale), None", AMP),
    # ---- plans
    Fault("two terms have the same numbers", NUMBERS, "Asked(place, turn, stage,", "Asked(0, 0, stage,", "steps/test_own_penalties.py"),
    Fault("a late count comes never", NUMBERS, "Structure(wanted, names, rule.counts_of(group),", "Structure(wanted, names, (),", "kernels/test_own_rules.py"),
    Fault("options of a rule begin too early", NUMBERS, "scalars[self.width - structure.options :]", "scalars[-1 - structure.options : -1]", f"{ORACLE} -k default"),
    Fault("addresses are never sent again", PLAN, "if not self._pending.tables:\n            return", "return", "kernels/test_plan.py kernels/test_same_memory.py"),
    Fault("a moved gradient is not noticed", WATCH, "return MOVED if moved else OTHER_GRADS", "return MOVED if moved else NOTHING", "kernels/test_plan.py kernels/test_same_memory.py"),
    Fault("a new gradient of an old parameter", WATCH, "if self.idle and any(", "if False and any(", "kernels/test_plan.py steps/test_step.py"),
    Fault("a parameter keeps its version", PLAN, "if moved:\n", "if False:\n", "kernels steps/test_step.py steps/test_sequences.py"),
]  # fmt: skip


def planted(fault: Fault) -> str:
    """The file with the fault; raises where its text is not there exactly once."""
    source = (ROOT / fault.file).read_text()
    if source.count(fault.old) != 1:
        raise ValueError(f"{fault.file} has {source.count(fault.old)} times {fault.old!r}")
    return source.replace(fault.old, fault.new)


def copy_to(folder: Path) -> None:
    """Everything that tests read, the kernels where an installed package has them."""
    left_out = shutil.ignore_patterns("__pycache__", "integration")
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=left_out)
        else:
            shutil.copy(source, folder / name)
    (folder / "fusedreg" / "kernels").symlink_to(folder / "kernels")


def first_failure(folder: Path, tests: str, selection: tuple[str, ...]) -> str | None:
    """The test in a copy of the repository that fails first; None where all pass."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--benchmark-disable", "--tb=no"]
    command += ["-p", "no:cacheprovider", *selection]
    words = tests.split()
    words = [f"tests/{word}" if (ROOT / "tests" / word).exists() else word for word in words]
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            [*command, *words],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED tests/")]
    if done.returncode == 1 and failed:
        return failed[0].split(" - ")[0].removeprefix("FAILED tests/").rpartition("/")[2]
    if done.returncode < 0:  # a wrong address does that
        return f"the process died of signal {-done.returncode}"
    if done.returncode != 0:  # nothing was imported or collected, which no test can be praised for
        raise RuntimeError(
            f"pytest exits with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    return None


def caught(fault: Fault) -> tuple[str | None, str | None]:
    """What the short and the long selection of a fault's tests notice.

    The long one has all tests of the short one, so that it runs only where that notices nothing.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_to(folder)
        (folder / fault.file).write_text(planted(fault))
        short = first_failure(folder, fault.tests, SHORT)
        return short, short or first_failure(folder, fault.tests, LONG)


def check_passes_without_faults(faults: list[Fault]) -> None:
    """Raise where a test fails by itself: it would seem to catch every fault."""
    with tempfile.TemporaryDirectory() as name:
        copy_to(Path(name))
        for tests in dict.fromkeys(fault.tests for fault in faults):
            failure = first_failure(Path(name), tests, SHORT)
            if failure is not None:
                raise RuntimeError(f"{failure} fails without any fault")


def main() -> int:
    """Print the table; 1 if the tests of `make test` miss a fault."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("words", nargs="*", help="only faults with one of these in name or file")
    parser.add_argument("--jobs", type=int, default=2, help="how many at a time (2)")
    parser.add_argument("--no-control", action="store_true", help="do not run without faults first")
    options = parser.parse_args()
    faults = [
        fault
        for fault in FAULTS
        if not options.words or any(w in f"{fault.name} {fault.file}" for w in options.words)
    ]
    for fault in faults:
        planted(fault)
    if not options.no_control:
        check_passes_without_faults(faults)
    missed = 0
    print(f"{'fault':<46} {'short':<6} {'long':<6} first test that fails", flush=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        for fault, (short, long) in zip(faults, pool.map(caught, faults), strict=True):
            missed += short is None
            answers = ("yes" if found else "NO" for found in (short, long))
            print(
                f"{fault.name:<46} {' '.join(f'{a:<6}' for a in answers)} {long or ''}", flush=True
            )
    print(f"{len(faults)} faults, {missed} not caught by the short selection")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())

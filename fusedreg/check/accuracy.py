"""One step of every case, held against the same step in float64.

The yardstick is `oracle`: the papers' formulas, which share no code with the package. Weights,
gradients and moments are rounded to the dtype under test before either steps, so what differs is
the step itself. `torch.optim` takes the same step where it has an equal, and in float64 it must
agree with the yardstick too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from fusedreg.cases import DTYPES, PENALTIES, RULES, Case, History
from fusedreg.check.oracle import Slot, clip, one_step
from fusedreg.optimizer import FusedOptimizer
from fusedreg.scalars import wide_dtype

CPU = torch.device("cpu")

SHAPES = [(0,), (5, 3), (), (1,), (3, 0, 2), (1023,), (8193,), (0,)]
"""Odd sizes, 0-dim, empty ones around, and one more than a chunk (8192) of triton's kernels."""

LARGE = [(0,), (131073,), (65537,), (1,), (0,)]
"""One more than two chunks (65536) of the host's kernels, and than one: work for two threads."""

SMALLEST = 1 / 8
"""Weights and gradients lie between this and 1 in size, or, with this probability, are 0.

So (1 - beta2) * g**2 is not 0 in float16, and results are small only where terms cancel. A gradient
that points against a penalty may be smaller by this: see `not_cancelling`.
"""

ROUNDINGS = 16.0
"""Most ulp of the dtype that a step computes in.

Clip factor, coupled decay, momentum or moments, bias corrections, root, quotient, step and
threshold are about 16 roundings, of numbers too: each half an ulp of a term at most twice as large
as what `ulps` compares with (a step that takes a weight from 1 to -1 has size 2). Of the rules that
divide, the penalised gradient does not cancel (`not_cancelling`), and neither does a variance: of
k gradients it is at least alpha^k of the mean square, and k is 3. A trust ratio is two sums in
float64, rounded once. No sum that Lion takes the sign of is within a rounding of 0 in these inputs,
which a test looks after. A wrong factor gives thousands.
"""

STEPS_BEFORE = (0, 2)
"""Each case takes its first step, and its third."""

CLIPS = (None, 0.5)
"""Limits of the gradient norm, in units of the norm."""

MARGIN = 1e-3
"""Nearer (relatively, in l1) to its threshold a weight may be 0 or not, by rounding.

A threshold is about 0.01 at least, and float32 moves a weight of 1 by 1e-7 a rounding.
"""


class Place(NamedTuple):
    """Where a step runs, and by which path: "reference", "llvm" or "triton"."""

    device: torch.device
    path: str

    @property
    def option(self) -> str:
        """What the constructor is asked for, a name in `fusedreg.cases.PATHS`."""
        if self.path == "reference":
            return "reference"
        # Nobody has to ask for a device's own kernels.
        return "fused" if (self.path, self.device.type) == ("triton", "cpu") else "default"

    def takes(self, problem: Problem) -> bool:
        """Whether the step can be right there, and is worth its time."""
        dtype = problem.dtype
        if self.path == "llvm":
            # Compiling takes most of the time, and clipping another kernel. So every other pair of
            # penalties meets it, in the other dtypes the others.
            number = list(PENALTIES).index(problem.case.penalty) // 2 + DTYPES.index(dtype)
            return (problem.max_norm is not None) == bool(number % 2)
        if self.path == "triton" and self.device.type == "cpu":
            return dtype != torch.bfloat16  # triton's interpreter truncates to it
        return dtype != torch.float64 or wide_dtype(self.device) == torch.float64


def is_spared(problem: Problem, place: Place) -> bool:
    """Whether a run of all cases may leave a step out, because compiling it takes long.

    Of the kernels of a CPU it needs the elastic nets, and of the others every other one: so each
    rule meets each penalty, and either meets each dtype.
    """
    case = problem.case
    if place.path != "llvm" or case.penalty == "elastic_net":
        return False
    rule, penalty = list(RULES).index(case.rule), list(PENALTIES).index(case.penalty)
    return (rule + penalty + DTYPES.index(problem.dtype)) % 2 == 1


class Inputs(NamedTuple):
    """What a step starts from, in float64; `counts` are the 0-dim states."""

    names: list[str]
    """Of the states that the case keeps, the ones of a first step too."""
    steps: int
    """Taken before."""
    weights: list[Tensor]
    grads: list[Tensor]
    moments: list[dict[str, Tensor]]
    counts: list[dict[str, Tensor]]
    histories: list[History]
    """Moments and counts, with those that the case does not keep."""

    def rounded(self, dtype: torch.dtype) -> Inputs:
        """The same as `dtype` holds it."""

        def to(x: Tensor) -> Tensor:
            return x.to(dtype).double()

        return self._replace(
            weights=list(map(to, self.weights)),
            grads=list(map(to, self.grads)),
            moments=[{name: to(x) for name, x in state.items()} for state in self.moments],
        )


class Problem(NamedTuple):
    """A step to take, and what it gives in float64."""

    case: Case
    dtype: torch.dtype
    max_norm: float | None
    inputs: Inputs
    weights: list[Tensor]
    states: list[dict[str, Tensor]]
    zero: list[Tensor]
    """Where a weight must be exactly 0."""
    nonzero: list[Tensor]
    """Where it must not."""


class Row(NamedTuple):
    """What was found of one step."""

    case: str
    rule: str
    penalty: str
    clip: bool
    dtype: str
    device: str
    path: str
    backend: str = "none"
    launches: int = 0
    ulp: float = math.nan
    torch_ulp: float | None = None
    """None where torch.optim has no equal."""
    bound: float = math.nan
    failures: tuple[str, ...] = ()
    first: bool = False
    """Whether there was no step before."""
    weights: int = 0
    """How many were stepped."""


def dtype_name(dtype: torch.dtype) -> str:
    """As a person writes it."""
    return str(dtype).removeprefix("torch.")


# ---- what is stepped -----------------------------------------------------------------------------


Shapes = Sequence[tuple[int, ...]]


def problems(
    cases: Iterable[Case], dtypes: Sequence[torch.dtype], shapes: Shapes = SHAPES
) -> Iterator[Problem]:
    """The steps of each case in each dtype, without and with clipping."""
    for case in cases:
        for exact in (inputs_of(case, steps, shapes) for steps in STEPS_BEFORE):
            for dtype in dtypes:
                inputs = exact.rounded(dtype)
                norm = math.sqrt(sum(float(grad.square().sum()) for grad in inputs.grads))
                for share in CLIPS:
                    yield problem(case, dtype, None if share is None else share * norm, inputs)


def inputs_of(case: Case, steps: int, shapes: Shapes = SHAPES) -> Inputs:
    """Random weights and gradients, and the state that some steps have left."""
    slots = [Slot(weight) for weight in values(0, shapes)]
    for step in range(steps):
        _step(case, slots, values(1 + step, shapes), max_norm=None)
    weights = values(-1, shapes)
    grads = list(map(not_cancelling, values(-2, shapes), weights))
    if case.options["maximize"]:
        grads = [-grad for grad in grads]
    moment_names, count_names = state_names(case)
    moments, counts = (
        [{name: _state(slot, name) for name in names if steps} for slot in slots]
        for names in (moment_names, count_names)
    )
    names = [*moment_names, *count_names]
    histories = [slot.history for slot in slots]
    return Inputs(names, steps, weights, grads, moments, counts, histories)


def not_cancelling(grad: Tensor, weight: Tensor) -> Tensor:
    """The gradient, where it points against the penalties of a weight at most an eighth of that.

    Otherwise nothing but a rounding error may be left of the two, and its quotient by its own root
    would be a step like any other. Clipping makes the gradient smaller, which does no harm.
    """
    against = weight * grad < 0
    limit = SMALLEST * torch.minimum(weight.abs(), grad.abs())
    return torch.where(against, limit * grad.sign(), grad)


def state_names(case: Case) -> tuple[list[str], list[str]]:
    """The moments, and the 0-dim states, that an optimizer of the case keeps."""
    param = torch.nn.Parameter(torch.ones(()))
    param.grad = torch.ones(())
    try:
        optimizer = case.make([param])
        optimizer.step()
    except Exception:  # whatever it is, `measure` meets it again and says so
        return [], []
    found = optimizer.state.get(param, {})
    moments, counts = (
        [name for name in names if name in found]
        for names in (optimizer.tensor_states, optimizer.counts)
    )
    return moments, counts


def rates(case: Case, count: int) -> list[float]:
    """The learning rate of each parameter: every other one is in a second group."""
    lr = case.options["lr"]
    return [lr / (1 + i % 2) for i in range(count)]


def groups(case: Case, params: Sequence[Tensor]) -> list[dict[str, Any]]:
    """The two groups, as an optimizer takes them."""
    first, second = rates(case, 2)
    return [{"params": params[::2], "lr": first}, {"params": params[1::2], "lr": second}]


def _step(case: Case, slots: list[Slot], grads: list[Tensor], max_norm: float | None) -> None:
    lrs = rates(case, len(slots))
    for slot, grad, lr in zip(slots, clip(grads, max_norm), lrs, strict=True):
        one_step(slot, grad, case, lr=lr)


def _state(slot: Slot, name: str) -> Tensor:
    return torch.as_tensor(slot.history[name], dtype=torch.float64)


def values(seed: int, shapes: Shapes = SHAPES) -> list[Tensor]:
    """Random numbers of either sign, some of them 0."""
    generator = torch.Generator().manual_seed(seed)

    def draw(shape: tuple[int, ...]) -> Tensor:
        size, sign, kept = torch.rand(3, *shape, generator=generator, dtype=torch.float64)
        size = SMALLEST + (1 - SMALLEST) * size
        return torch.where(kept < SMALLEST, 0.0, torch.where(sign < 0.5, -size, size))

    return [draw(shape) for shape in shapes]


def problem(case: Case, dtype: torch.dtype, max_norm: float | None, inputs: Inputs) -> Problem:
    """A step, taken in float64."""
    weights, states = by_oracle(case, max_norm, inputs)
    zero = nonzero = [torch.zeros_like(weight, dtype=torch.bool) for weight in weights]
    if case.options["l1"] and case.options["l1_mode"] != "subgradient":
        less, more = (
            by_oracle(_with_l1(case, 1 + change), max_norm, inputs)[0]
            for change in (-MARGIN, MARGIN)
        )
        zero, nonzero = [weight == 0 for weight in less], [weight != 0 for weight in more]
    return Problem(case, dtype, max_norm, inputs, weights, states, zero, nonzero)


def _with_l1(case: Case, factor: float) -> Case:
    return replace(case, kwargs={**case.kwargs, "l1": factor * case.options["l1"]})


def by_oracle(
    case: Case, max_norm: float | None, inputs: Inputs
) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Weights and states after the step."""
    slots = []
    of_each = zip(inputs.weights, inputs.histories, inputs.moments, inputs.counts, strict=True)
    for weight, history, moments, counts in of_each:
        slot = Slot(weight, history.copy())
        slot.history.update(moments)
        slot.history.update({name: value.item() for name, value in counts.items()})
        slots.append(slot)
    _step(case, slots, inputs.grads, max_norm)
    states = [{name: _state(slot, name) for name in inputs.names} for slot in slots]
    return [slot.w for slot in slots], states


# ---- a step of any optimizer ---------------------------------------------------------------------


def _parameters(
    weights: Iterable[Tensor], dtype: torch.dtype, device: torch.device
) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(weight.to(device, dtype, copy=True)) for weight in weights]


def _load(
    optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter], inputs: Inputs
) -> None:
    """Give the parameters their gradients and states."""
    wide = {torch.float64: wide_dtype(params[0].device)}
    of_each = zip(params, inputs.grads, inputs.moments, inputs.counts, strict=True)
    for param, grad, moments, counts in of_each:
        param.grad = grad.to(param, copy=True)
        state = {name: x.to(param, copy=True) for name, x in moments.items()}
        for name, x in counts.items():
            state[name] = x.to(param.device, wide.get(x.dtype, x.dtype), copy=True)
        if state:
            optimizer.state[param] = state


def _results(
    optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter]
) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Weights and states, in float64 on the CPU."""

    def read(x: Tensor) -> Tensor:
        return x.detach().cpu().double()

    states = [optimizer.state.get(param, {}) for param in params]
    return list(map(read, params)), [{n: read(x) for n, x in state.items()} for state in states]


# ---- what is found of it -------------------------------------------------------------------------


def measure(problem: Problem, place: Place) -> Row:
    """Take the step at a place; an error that it raises is a failure like any other."""
    case, dtype = problem.case, problem.dtype
    row = Row(
        case=case.id,
        rule=case.rule,
        penalty=case.penalty,
        clip=problem.max_norm is not None,
        dtype=dtype_name(dtype),
        device=str(place.device),
        path=place.path,
        first=problem.inputs.steps == 0,
        weights=sum(weight.numel() for weight in problem.weights),
    )
    try:
        row = _measure_ours(problem, place, row)
        return row if case.torch_kwargs is None else _measure_torchs(problem, place, row)
    except Exception as error:  # whatever a new GPU, driver or torch comes up with
        who = "fusedreg" if row.backend == "none" else "torch.optim"
        first = str(error).strip().partition("\n")[0]
        raised = f"{who} raised {type(error).__name__}: {first}"
        return row._replace(failures=(*row.failures, raised))


def _measure_ours(problem: Problem, place: Place, row: Row) -> Row:
    params = _parameters(problem.inputs.weights, problem.dtype, place.device)
    case = problem.case
    optimizer = case.make(groups(case, params), place.option, max_grad_norm=problem.max_norm)
    _load(optimizer, params, problem.inputs)
    grads = [param.grad for param in params]
    before = _bits(grads)
    optimizer.step()
    weights, states = _results(optimizer, params)
    ulp = _worst(problem, weights, states)
    bound = bound_of(problem, place, optimizer)
    found = {
        f"backend is {optimizer.backend}": optimizer.backend != place.path,
        # `backend` says what shall run; the launches are what did.
        f"{optimizer.launches} launches": optimizer.launches
        != (0 if place.path == "reference" else launches(case, row.clip)),
        ".grad was written": any(p.grad is not g for p, g in zip(params, grads, strict=True))
        or not all(map(torch.equal, before, _bits(grads))),
        f"error {ulp:.3g} ulp, bound {bound:.3g}": not ulp <= bound,  # so that a NaN fails
        "weights on the wrong side of the threshold": any(
            bool((zero & (weight != 0) | nonzero & (weight == 0)).any())
            for weight, zero, nonzero in zip(weights, problem.zero, problem.nonzero, strict=True)
        ),
        "0-dim state": not _counts_agree(problem, place, optimizer, states),
    }
    return row._replace(
        backend=optimizer.backend,
        launches=optimizer.launches,
        ulp=ulp,
        bound=bound,
        failures=tuple(failure for failure, is_so in found.items() if is_so),
    )


def launches(case: Case, clip: bool) -> int:
    """Rows and step; before them the norm; between them the squares of each tensor, folded."""
    return 2 + clip + 2 * case.cls.layerwise


def _measure_torchs(problem: Problem, place: Place, row: Row) -> Row:
    """Torch's for-loop, after its own clipping."""
    params = _parameters(problem.inputs.weights, problem.dtype, place.device)
    make: Any = problem.case.torch_cls
    kwargs = problem.case.torch_kwargs or {}
    optimizer = make(groups(problem.case, params), **kwargs, foreach=False)
    _load(optimizer, params, problem.inputs)
    if problem.max_norm is not None:
        clip_grad_norm_(params, problem.max_norm, foreach=False)
    optimizer.step()
    ulp = _worst(problem, *_results(optimizer, params))
    row = row._replace(torch_ulp=ulp)
    if problem.dtype == torch.float64 and not ulp <= row.bound:
        apart = f"torch.optim in float64 is {ulp:.3g} ulp from the yardstick"
        row = row._replace(failures=(*row.failures, apart))
    return row


def _bits(tensors: Iterable[Tensor | None]) -> list[Tensor]:
    return [x.reshape(-1).view(torch.uint8).clone() for x in tensors if x is not None]


def _counts_agree(
    problem: Problem, place: Place, optimizer: FusedOptimizer, states: list[dict[str, Tensor]]
) -> bool:
    """Whether the 0-dim states are right: counts exactly, a mass up to its two roundings."""
    eps = torch.finfo(wide_dtype(place.device)).eps
    return all(
        name in got and math.isclose(got[name], exact[name], rel_tol=2 * eps)
        for got, exact in zip(states, problem.states, strict=True)
        for name in optimizer.counts
        if name in exact
    )


def _worst(problem: Problem, weights: list[Tensor], states: list[dict[str, Tensor]]) -> float:
    """The largest error of a weight or moment in ulp of the dtype; NaN if there is one."""
    inputs = problem.inputs
    found = [ulps(weights, problem.weights, inputs.weights, problem.dtype)]
    for name in problem.case.cls.tensor_states:
        if name in problem.states[0]:
            got, exact = ([state[name] for state in each] for each in (states, problem.states))
            before = [
                moments.get(name, torch.zeros_like(weight))
                for moments, weight in zip(inputs.moments, inputs.weights, strict=True)
            ]
            found.append(ulps(got, exact, before, problem.dtype))
    return float(torch.stack(found).max())


def ulps(
    got: Iterable[Tensor], exact: Iterable[Tensor], before: Iterable[Tensor], dtype: torch.dtype
) -> Tensor:
    """The largest error of an element, in ulp of `dtype` at the larger of `before` and `exact`.

    A result that is small because terms cancelled is as wrong as the terms are. Hence `before`, and
    at least `SMALLEST` times the largest of all: no input but 0 is smaller than that.
    """
    got, exact, before = (torch.cat([x.reshape(-1) for x in xs]) for xs in (got, exact, before))
    size = torch.maximum(before.abs(), exact.abs())
    limits = torch.finfo(dtype)
    size = size.clamp(min=max(float(size.max()) * SMALLEST, limits.tiny))
    ulp = torch.ldexp(torch.full_like(size, limits.eps), torch.frexp(size).exponent - 1)
    return ((got - exact).abs() / ulp).max()


def bound_of(problem: Problem, place: Place, optimizer: FusedOptimizer) -> float:
    """How many ulp of the stored dtype a step may be off."""
    stored = problem.dtype
    computed = torch.float64 if stored == torch.float64 else torch.float32
    roundings = ROUNDINGS
    if computed == wide_dtype(place.device):  # else the numbers of a step are wider than this
        # A sum of n squares in another order: each addition is off by 0.3 ulp or so, at random.
        sizes = [grad.numel() for grad in problem.inputs.grads]
        if problem.max_norm is not None:
            roundings += math.sqrt(sum(sizes)) / 3
        if optimizer.layerwise:  # two of them, and the root of each halves that
            roundings += math.sqrt(max(sizes)) / 3
        betas = optimizer.defaults.get("betas")
        # Lion has betas, but counts no steps and corrects nothing.
        if betas and optimizer.counts and (place.device.type != "cpu" or place.path == "triton"):
            # A device forms 1 - beta**t, at least 1 - beta, to an ulp of 1; the root halves that.
            # On a CPU the power is the one that Python takes.
            roundings += 1 / (1 - betas[0]) + 0.5 / (1 - betas[1])
    if stored == computed:
        return roundings
    # Rounded once, to nearest.
    return 0.5 + roundings * torch.finfo(computed).eps / torch.finfo(stored).eps

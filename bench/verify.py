"""Whether an implementation computes what it is timed for, asked before it is timed.

Every implementation takes three steps from the same start, with the very objects and tensors that
are then timed. A sample of the parameters is compared with the oracle of `fusedreg check`: the
formulas of the papers in float64, on numbers that know how far roundings can take them. All of a
step is elementwise but norms: that of the gradients, which is formed in float64 over all of them,
and those of single tensors in a layerwise method, whose sample consists of whole tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from contenders import Contender, Task, make_groups
from jobs import Groups
from methods import CLIP_SHARE, SCALE, Method
from torch import Tensor

MIXTURES = ((1.0, 0.0), (-0.5, 0.25), (0.75, 0.5))
"""Each step's gradient: so much of the first gradient, plus so much of the first parameter."""
SAMPLE = 2**20

ROUNDINGS = 2
"""Half ulp that one operation of a formula stands for. Most are one operation of torch as well, but
a product with a number rounds the number too, and an average as m + (1 - beta) * (g - m) rounds the
difference of two numbers that the formula multiplies one by one."""
ERROR_OF_CONSTANTS = 1.3e-5
"""Relative, of 1 - 0.999 formed in float32, as kernels form it that are given betas as float32."""
ERROR_OF_NORM = 1e-4
"""Relative, of a norm accumulated in float32, as torch accumulates it."""
ROUNDINGS_OF_CLIPPING = 5
"""Norms of tensors, their norm, quotient and product, where each is stored in the dtype."""


class Rounded:
    """A float64 value and how far from it roundings to a narrower dtype can lead.

    Where terms cancel, where a small number divides and where a formula jumps, the error grows by
    itself. It is infinite or NaN where nothing is known.
    """

    def __init__(self, value: Tensor, error: Tensor, unit: float) -> None:
        self.value, self.error, self.unit = value, error, unit

    def of(self, x: Any) -> Rounded:
        """A number that is exact."""
        if isinstance(x, Rounded):
            return x
        value = torch.as_tensor(x, dtype=torch.float64, device=self.value.device)
        return Rounded(value, torch.zeros_like(value), self.unit)

    def result(self, value: Tensor, error: Tensor) -> Rounded:
        return Rounded(value, error + ROUNDINGS * self.unit * value.abs(), self.unit)

    def __add__(self, other: Any) -> Rounded:
        other = self.of(other)
        return self.result(self.value + other.value, self.error + other.error)

    def __neg__(self) -> Rounded:
        return Rounded(-self.value, self.error, self.unit)

    def __sub__(self, other: Any) -> Rounded:
        return self + -self.of(other)

    def __mul__(self, other: Any) -> Rounded:
        other = self.of(other)
        error = (self.value.abs() + self.error) * other.error + other.value.abs() * self.error
        return self.result(self.value * other.value, error)

    __radd__, __rmul__ = __add__, __mul__

    def __truediv__(self, other: Any) -> Rounded:
        other = self.of(other)
        value, least = self.value / other.value, other.value.abs() - other.error
        error = (self.error + value.abs() * other.error) / least
        return self.result(value, torch.where(least > 0, error, torch.inf))

    def __rtruediv__(self, other: Any) -> Rounded:
        return self.of(other) / self

    def __pow__(self, exponent: int) -> Rounded:
        assert exponent == 2
        return self * self

    def __gt__(self, other: Any) -> Rounded:
        """Whether it is so and, as the error, where roundings may have it otherwise."""
        apart = self - other
        return Rounded(apart.value > 0, apart.value.abs() <= apart.error, self.unit)

    def __eq__(self, other: object) -> Rounded:  # type: ignore[override]
        apart = self - other
        return Rounded(apart.value == 0, apart.value.abs() <= apart.error, self.unit)

    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def __torch_function__(cls, function: Any, _types: Any, args: Any, _kwargs: Any = None) -> Any:
        return FUNCTIONS[function](*args)


def _where(truth: Rounded, one: Any, other: Any) -> Rounded:
    a, b = truth.of(one), truth.of(other)
    either = (a.value - b.value).abs() + a.error + b.error
    error = torch.where(truth.error, either, torch.where(truth.value, a.error, b.error))
    return Rounded(torch.where(truth.value, a.value, b.value), error, truth.unit)


def _sqrt(x: Rounded) -> Rounded:
    root = x.value.sqrt()
    return x.result(root, root - (x.value - x.error).clamp(min=0).sqrt())


FUNCTIONS: dict[Any, Callable[..., Any]] = {
    torch.where: _where,
    torch.sqrt: _sqrt,
    torch.sign: lambda x: Rounded(x.value.sign(), 2.0 * (x.value.abs() <= x.error), x.unit),
    torch.relu: lambda x: Rounded(x.value.relu(), x.error, x.unit),
    torch.linalg.norm: lambda x: torch.linalg.norm(x.value),  # its error comes in `one_step`
}
"""What the formulas call."""


def one_step(slot: Any, grad: Rounded, lr: Rounded, method: Method) -> None:
    """A step of the oracle, which takes the norms of a trust ratio for exact."""
    from fusedreg.check import oracle  # noqa: PLC0415  # another commit may lack it

    before, norm = slot.w, torch.linalg.vector_norm
    oracle.one_step(slot, grad, method.case, lr=lr)
    if method.layerwise:
        moved = slot.w.value - before.value
        relative = norm(before.error) / norm(before.value) + norm(slot.w.error) / norm(moved)
        slot.w.error += (relative + 2 * ERROR_OF_NORM) * moved.abs()


class Expected(NamedTuple):
    """What the sample must be, and how far from it each element may be."""

    values: Tensor
    bound: Tensor


class Verdict(NamedTuple):
    """The error and its bound, where the error is the largest part of it."""

    error: float
    bound: float

    @property
    def of_bound(self) -> float:
        return self.error / self.bound

    @property
    def matches(self) -> bool:
        return self.of_bound <= 1  # and not NaN

    def __str__(self) -> str:
        told = f"results differ: by {self.error:.1e}, where {self.bound:.1e} is allowed"
        return "" if self.matches else told


class Setting:
    """Parameters and gradients as all contenders begin with them."""

    def __init__(
        self, shapes: Groups, dtype: torch.dtype, device: torch.device, scaled: bool = False
    ) -> None:
        self.groups = make_groups(shapes, dtype, device)
        self.params = [param for group in self.groups for param in group["params"]]
        self.scale = SCALE if scaled else 1.0
        self.values = [param.detach().clone() for param in self.params]
        self.grads = [self.scale * param.grad for param in self.params]
        self.norm, self.expected = cache(self._norm), cache(self._expected)

    def task(self, method: Method, clip: bool) -> Task:
        """With a limit that halves the gradients, where it clips."""
        limit = CLIP_SHARE * self.norm(0) / self.scale if clip else None
        return Task(method, limit, scaled=self.scale != 1)

    def set_grads(self, step: int = 0) -> None:
        """In place, as memory is slow to get; those of the first step are those that are timed."""
        grads = [param.grad for param in self.params]
        torch._foreach_copy_(grads, self.grads)
        of_grad, of_param = MIXTURES[step]
        if of_param:
            torch._foreach_mul_(grads, of_grad)
            torch._foreach_add_(grads, self.values, alpha=of_param * self.scale)

    def _norm(self, step: int) -> float:
        """Of all gradients, in float64."""
        self.set_grads(step)
        norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float64) for p in self.params]
        return float(torch.linalg.vector_norm(torch.stack(norms)))

    def sample(self, tensors: list[Any], method: Method) -> list[Tensor]:
        """Elements as float64: of a layerwise method all of the tensors that there is room for.

        Of others those at equal distances, the last of each tensor among them. The distance is odd,
        so that every position in a vector or block is met.
        """
        k = 1 if method.layerwise else sum(x.numel() for x in tensors) // SAMPLE | 1
        if method.layerwise:
            tensors = [tensors[i] for i in fitting([x.numel() for x in tensors])]
        return [x.detach().flatten()[(x.numel() - 1) % k :: k].double() for x in tensors]

    def _expected(self, task: Task) -> Expected:
        """The oracle after the steps, with the errors that the dtype of the parameters explains."""
        from fusedreg.check.oracle import Slot  # noqa: PLC0415  # as above

        method, unit = task.method, torch.finfo(self.values[0].dtype).eps / 2

        def read(tensors: list[Any], factor: float = 1.0, error: float = 0.0) -> list[Rounded]:
            parts = [factor * x for x in self.sample(tensors, method)]
            # All at once where nothing is per tensor.
            parts = parts if method.layerwise else [torch.cat(parts)]
            return [Rounded(x, error * x.abs(), unit) for x in parts]

        slots = [Slot(w) for w in read(self.values)]
        rates = [
            torch.tensor(group["lr"], dtype=torch.float64, device=w.device).expand(w.shape)
            for group in self.groups
            for w in group["params"]
        ]
        error = ERROR_OF_CONSTANTS
        if task.max_norm is not None:
            error += ERROR_OF_NORM + ROUNDINGS_OF_CLIPPING * unit
        for step in range(len(MIXTURES)):
            factor = 1 / self.scale
            if task.max_norm is not None:
                factor *= min(1.0, task.max_norm / (self.norm(step) / self.scale + 1e-6))
            self.set_grads(step)
            grads = read([param.grad for param in self.params], factor, error)
            for slot, grad, lr in zip(slots, grads, read(rates), strict=True):
                one_step(slot, grad, lr, method)
        self.set_grads()
        values, bound = (torch.cat([getattr(s.w, of) for s in slots]) for of in ("value", "error"))
        # A bound of 0, where the threshold has certainly been met, is no divisor.
        return Expected(values, bound.nan_to_num(nan=torch.inf).clamp(min=1e-300))

    def take_steps(self, contender: Contender) -> None:
        """From where all begin; the gradients are then those to be timed."""
        with torch.no_grad():
            torch._foreach_copy_(self.params, self.values)
        for step in range(len(MIXTURES)):
            self.set_grads(step)
            contender.step()
        self.set_grads()

    def check(self, contender: Contender, task: Task) -> Verdict:
        self.take_steps(contender)
        return self.judge(self.params, task)

    def judge(self, params: list[Any], task: Task) -> Verdict:
        """Of parameters after the steps."""
        must_be = self.expected(task)
        error = (torch.cat(self.sample(params, task.method)) - must_be.values).abs()
        worst = int((error / must_be.bound).nan_to_num(nan=torch.inf).argmax())
        return Verdict(float(error[worst]), float(must_be.bound[worst]))


def fitting(sizes: list[int]) -> list[int]:
    """Those of which a sample has room for all elements, in turn; the smallest, if for none.

    >>> fitting([2**19, 2**20, 2**18, 2**19, 5])
    [0, 2, 4]
    """
    found, room = [], SAMPLE
    for index, size in enumerate(sizes):
        if size <= room:
            found.append(index)
            room -= size
    return found or [sizes.index(min(sizes))]

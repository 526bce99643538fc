"""How far from the float64 reference roundings can take a parameter, in each class.

Every operation on the way may round to the dtype, as torch's for-loop and foreach do; who computes
in float32 and rounds to bfloat16 once needs less. Roundings are counted for three steps, as many as
verify.py takes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from methods import Method
from torch import Tensor

ROUNDINGS_OF_PARAM = 4
"""In a step, where every operation rounds: the factor of the decay, its product, the step, the
threshold's difference."""
ROUNDINGS_OF_THRESHOLD = 8
"""Of the second moment in three steps (two each, halved by the root), then root, eps, reciprocal,
product and a constant. A threshold larger than the parameter makes it 0 in any case."""


class Count(NamedTuple):
    """Relative errors of an update."""

    roundings: int
    of_grad: int
    """How often an error of the gradients enters."""


# Errors of gradients, each at most e, enter a quotient g / d twice: e / d by g, |g| / d * E / d by
# the root d of the sum of k_i * g_i^2, whose error E is at most e * sqrt(sum of k_i). In Adam both
# are averages, so the k_i sum to 1 and |g| <= d: 2 e / d together. In RMSprop and Adagrad |g| / d
# is at most 1 / sqrt(last k), and that k is the largest: (1 + sqrt(3)) e / d in three steps.
ADAM = Count(18, 2)
"""The gradient and its decay; moments, two each in three steps; root, bias corrections, eps,
quotient, product and the constants."""
RMSPROP = Count(21, 3)
"""The gradient and its decay, 1 + sqrt(3) times; the second moment, eight in three steps, halved by
the root; root, eps; the quotient and five in the buffer; product and two constants."""
ADAGRAD = Count(14, 3)
"""The gradient and its decay, 1 + sqrt(3) times; the sum, six in three steps, halved by the root;
root, eps, quotient, product and a constant."""
LION = Count(11, 1)
"""Of the number whose sign is taken: three each in two steps of the moment, two products, their
sum, two constants."""
COUNTS = {"RMSprop": RMSPROP, "Adagrad": ADAGRAD, "Lion": LION}
"""Of the others ADAM: SGD has fewer, and in LAMB what is added to Adam's direction does not pass
through the quotient."""

ROUNDINGS_OF_RATIO = 4
"""Two norms, their quotient, its product with lr."""
ERROR_OF_CONSTANTS = 1.3e-5
"""Relative, of 1 - 0.999 formed in float32, as kernels form it that are given betas as float32."""
ERROR_OF_NORM = 1e-4
"""Relative, of a norm accumulated in float32, as torch accumulates it."""


SQUARES = {"RMSprop": "square_avg", "Adagrad": "sum"}
"""What the state is called whose root divides; `exp_avg_sq` in all others."""


class Errors(NamedTuple):
    """Relative errors in a step."""

    of_param: float
    of_update: float
    of_ratio: float


def roundings(method: Method, dtype: torch.dtype, clip: bool) -> Errors:
    """Those of a method in a dtype."""
    unit = torch.finfo(dtype).eps / 2
    count = COUNTS.get(method.cls, ADAM)
    of_param = ROUNDINGS_OF_PARAM * unit
    of_update = count.roundings * unit + ERROR_OF_CONSTANTS
    if method.l1:
        of_param += ROUNDINGS_OF_THRESHOLD * unit + ERROR_OF_CONSTANTS
    if clip:  # norms of tensors, their norm, quotient and product are rounded too
        of_clip = ERROR_OF_NORM + 5 * unit
        of_update += count.of_grad * of_clip
        of_param += of_clip if method.l1 else 0.0
    return Errors(of_param, of_update, 2 * ERROR_OF_NORM + ROUNDINGS_OF_RATIO * unit)


class Bound:
    """What `error` each element may have, carried along the steps of the reference.

    In a step, with the sizes of all that is summed in the place of the sums:

        update = size of the largest gradient so far * unit, what a gradient of 1 contributes
        error += lr * (of_update * update + decay * unit * error) + of_param * size of the parameter

    where the decay of that product is the coupled one, by which an error of a parameter is in its
    next gradient. Adam and others divide by a root, which is small where such a decay cancels the
    gradient: there the roundings of both are large beside it.
    """

    def __init__(self, optimizer: Any, params: list[Tensor], lr: Tensor, errors: Errors) -> None:
        self.optimizer, self.params, self.lr, self.errors = optimizer, params, lr, errors
        self.options = optimizer.param_groups[0]
        decay, decoupled = self.options["weight_decay"], self.options["decoupled_weight_decay"]
        self.decay, self.coupled = (decay, 0.0) if decoupled else (0.0, decay)
        self.size = self._values().abs()
        self.largest, self.buffer, self.error = (torch.zeros_like(self.size) for _ in range(3))
        self.steps = 0

    def step(self) -> None:
        """Take a step of the reference, whose gradients are there."""
        name = type(self.optimizer).__name__
        w, m = self._values(), self._states("exp_avg")
        grad = torch.cat([param.grad for param in self.params])
        self.largest = torch.maximum(self.largest, grad.abs() + self.coupled * w.abs())
        self.optimizer.step()
        self.steps += 1
        unit = self._unit(name)
        update = self.largest * unit
        error = self.errors.of_update * update + self.coupled * unit * self.error
        if name == "Lion":
            update, error = self._of_sign(m, grad, error)
        if name == "LAMB":
            update, error = self._of_ratio(w, unit, update, error)
        self.size += self.lr * update
        self.error += self.lr * error + self.errors.of_param * self.size

    def _unit(self, name: str) -> Tensor:
        """What a gradient of 1 can contribute to a step, over lr, before anything cancels."""
        beta1, beta2 = self.options.get("betas", (0.0, 0.0))
        if name == "Lion":  # to the number whose sign is taken
            return torch.full_like(self.size, beta1 * (1 - beta2 ** (self.steps - 1)) + 1 - beta1)
        unit = torch.ones_like(self.size)
        if name != "SGD":
            square = self._states(SQUARES.get(name, "exp_avg_sq"))
            unit /= (square / (1 - beta2**self.steps)).sqrt() + self.options["eps"]
        if self.options.get("momentum"):  # a buffer has at most all updates so far
            self.buffer += unit
            return self.buffer
        return unit

    def _of_sign(self, m: Tensor, grad: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
        """Steps of 1, whose sign may be the other one where roundings can carry it over 0.

        Nothing else of a gradient's error arrives. Both signs are right there, 2 from each other;
        an element that is not in doubt must have the sign of the reference.
        """
        beta1, _ = self.options["betas"]
        in_doubt = (beta1 * m + (1 - beta1) * grad).abs() <= error
        return torch.ones_like(error), 2.0 * in_doubt

    def _of_ratio(
        self, w: Tensor, unit: Tensor, update: Tensor, error: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Updates times the trust ratio of each tensor, in which the errors of all elements are."""
        beta1, _ = self.options["betas"]
        direction = self._states("exp_avg") / (1 - beta1**self.steps) * unit
        whole = direction + self.decay * w  # what the norm is taken of
        update = update + self.decay * w.abs()
        error = error + self.decay * (self.errors.of_param * w.abs() + self.error)
        of_w, of_whole, of_error, of_old = map(self._norms, (w, whole, error, self.error))
        relative = of_error / of_whole + of_old / of_w + self.errors.of_ratio
        return of_w / of_whole * update, of_w / of_whole * (error + relative * whole.abs())

    def _norms(self, values: Tensor) -> Tensor:
        """Of the tensor that an element belongs to."""
        parts = values.split([param.numel() for param in self.params])
        return torch.cat([torch.linalg.vector_norm(x).expand(x.shape) for x in parts])

    def _values(self) -> Tensor:
        return torch.cat(self.params).detach()

    def _states(self, name: str) -> Tensor:
        """Zeros before the first step."""
        state = self.optimizer.state
        return torch.cat([state[w].get(name, torch.zeros_like(w)).detach() for w in self.params])

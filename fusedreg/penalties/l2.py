"""L2 and decoupled weight decay."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from fusedreg.penalties.base import Penalty, Settings, Term
from fusedreg.penalty import value
from fusedreg.scalars import Number, is_zero, wide


class L2(Penalty):
    """`weight_decay / 2 * ||w||_2^2`, or with `decoupled_weight_decay` a decay beside the rule.

    The former is what scikit-learn calls ridge. The latter multiplies w by 1 - rate * weight_decay,
    or with `lr_independent_decay` by 1 - rate * weight_decay / decay_lr.
    """

    def terms(self, group: Settings) -> Iterable[Term]:
        """One hook, on the gradient or on the parameter."""
        if is_zero(group["weight_decay"]):
            return
        if group["decoupled_weight_decay"]:
            yield Term("decay", "l2_decay", (_coefficient(group),))
        else:
            yield Term("gradient", "l2_gradient", (group["weight_decay"],))

    def gradient(self, settings: Settings, grad: Tensor, w: Tensor) -> Tensor:
        """`weight_decay * w`, where it is coupled."""
        weight_decay = settings["weight_decay"]
        if settings["decoupled_weight_decay"] or is_zero(weight_decay):
            return grad
        coupled: Tensor = grad + weight_decay * w
        return coupled

    def decay(self, settings: Settings, w: Tensor, direction: Tensor) -> Number:
        """`weight_decay`, where it is decoupled."""
        if not settings["decoupled_weight_decay"] or is_zero(settings["weight_decay"]):
            return 0.0
        return _coefficient(settings)

    def value(self, settings: Settings, w: Tensor) -> Tensor:
        """`weight_decay / 2 * sum(w**2)`."""
        return value(w, weight_decay=settings["weight_decay"])

    def subdifferential(self, settings: Settings, w: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient `weight_decay * w`."""
        gradient: Tensor = settings["weight_decay"] * w
        return gradient, gradient


def _coefficient(group: Settings) -> Number:
    """What the rate multiplies in the decoupled decay."""
    weight_decay: Number = group["weight_decay"]
    if not group["lr_independent_decay"]:
        return weight_decay
    return wide(weight_decay) / wide(group["decay_lr"])

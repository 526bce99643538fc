"""L2 and decoupled weight decay."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, TypedDict

from torch import Tensor

from fusedreg.checks import check_number
from fusedreg.options import Option
from fusedreg.penalties.base import Penalty, Term
from fusedreg.penalty import value
from fusedreg.scalars import Number, is_on_device, is_zero, on_host
from fusedreg.types import ParamGroup, Settings


def check_lr_independent_decay(group: ParamGroup, name: str, read_device: bool) -> None:
    """Raise where the decay is asked to leave out lr and cannot, or decay_lr is out of range."""
    decay_lr = group[name]
    check_number(name, decay_lr, read_device=read_device)
    if not group["lr_independent_decay"]:
        return
    if not group["decoupled_weight_decay"]:
        raise ValueError(
            "lr_independent_decay=True needs decoupled_weight_decay=True: a coupled decay is part "
            "of the gradient, and what lr does to that it does to the decay"
        )
    if (not isinstance(decay_lr, Tensor) or read_device or on_host(decay_lr)) and decay_lr == 0:
        raise ValueError(
            "Invalid decay_lr value: 0 (with lr_independent_decay=True a step decays by "
            "weight_decay * lr / decay_lr, where decay_lr is the lr that the group was added with: "
            "add it with the largest of its schedule)"
        )


class L2Options(TypedDict, total=False):
    """How the weights decay."""

    decoupled_weight_decay: Annotated[bool, Option(False)]
    lr_independent_decay: Annotated[bool, Option(False)]
    decay_lr: Annotated[
        float | Tensor | None,
        Option(None, check_lr_independent_decay, copied_from="lr", needs="lr_independent_decay"),
    ]


class L2(Penalty):
    """`weight_decay / 2 * ||w||_2^2`, or with `decoupled_weight_decay` a decay beside the rule.

    The former is what scikit-learn calls ridge. The latter multiplies w by 1 - rate * weight_decay,
    or with `lr_independent_decay` by 1 - rate * weight_decay / decay_lr.
    """

    options = L2Options

    def terms(self, group: Settings) -> Iterable[Term]:
        """One hook, on the gradient or on the parameter."""
        if is_zero(group["weight_decay"]):
            return
        if group["decoupled_weight_decay"]:
            yield _decay(group["weight_decay"], group["decay_lr"], group["lr_independent_decay"])
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
        coefficient: Number = settings["weight_decay"]
        if settings["lr_independent_decay"]:
            coefficient = coefficient / settings["decay_lr"]
        return coefficient

    def value(self, settings: Settings, w: Tensor) -> Tensor:
        """`weight_decay / 2 * sum(w**2)`."""
        return value(w, weight_decay=settings["weight_decay"])

    def subdifferential(self, settings: Settings, w: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient `weight_decay * w`."""
        gradient: Tensor = settings["weight_decay"] * w
        return gradient, gradient


def _decay(weight_decay: Number, decay_lr: Number, lr_independent: bool) -> Term:
    """The hook of the decoupled decay. On a GPU a division takes long, so the host divides."""
    if not lr_independent:
        return Term("decay", "l2_decay", (weight_decay,))
    if is_on_device(weight_decay) or is_on_device(decay_lr):
        return Term("decay", "l2_decay_over_lr", (weight_decay, decay_lr))
    return Term("decay", "l2_decay", (float(weight_decay) / float(decay_lr),))

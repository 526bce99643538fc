"""What a penalty is: options of a param group, and what they add to a step.

A penalty acts at up to three stages of a step. Each stage has two forms, which must agree: a method
here, in torch operations, for the reference path, and a device function for the kernels, which
`terms` names. Without an override a stage does nothing.

    gradient   adds to the gradient of the loss, before the rule sees it
    decay      the coefficient c of w = w * (1 - rate * c), before the step
    prox       the proximal operator, after the step

`rate` is lr, times the trust ratio of a layerwise rule. `value` and `subdifferential` say what the
penalty is as a function of the weights, so that `kkt_distance` can tell how far they are from an
optimum. An optimizer lists its penalties in the class attribute `penalties`; so a subclass adds
one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, NamedTuple, TypedDict, get_args

import torch
from torch import Tensor

from fusedreg.kernels.contract import DeviceFunction, Stage
from fusedreg.options import owner
from fusedreg.scalars import Number
from fusedreg.types import Settings


class NoOptions(TypedDict):
    """Of a penalty that has none."""


class Term(NamedTuple):
    """What a penalty asks of the kernels for one param group."""

    stage: Stage
    function: DeviceFunction | str
    """The device function, or its name in kernels/device/penalties.py."""
    numbers: tuple[Number, ...]
    """What it takes, at least one: options as they are, but not lr.

    Zeros stand for a group without the penalty, so a hook that needs no number takes 1.0.

    The tensor of an option on a GPU is read there in every step. What is computed from it would be
    formed only once: the device function has to do that.
    """
    uses_gain: bool = True
    """Of the stage "prox": whether it uses the gain, so that momentum must keep its mass."""


class Penalty:
    """Base class: a penalty that does nothing."""

    options: ClassVar[type] = NoOptions
    """A TypedDict that declares its options; see options.py."""

    def __init_subclass__(cls, **kwargs: object) -> None:
        """Raise if kernels would leave out what the reference path does."""
        super().__init_subclass__(**kwargs)
        if cls.on_kernels is not Penalty.on_kernels:
            return
        for stage in get_args(Stage):
            abstract = getattr(getattr(cls, stage), "__isabstractmethod__", False)
            if owner(cls, stage) < owner(cls, "terms") and not abstract:
                raise TypeError(
                    f"{cls.__name__} overrides {stage} but not terms, so kernels would leave it "
                    "out: yield a Term with the device function that does the same from terms, or "
                    "return False from on_kernels for the reference path"
                )

    def check_param(self, group: Settings, param: Tensor) -> str | None:
        """Why a parameter cannot be in this group, None where it can."""
        return None

    def on_kernels(self, group: Settings) -> bool:
        """Whether `terms` says all; False leaves all parameters of the group to the reference."""
        return True

    def terms(self, group: Settings) -> Iterable[Term]:
        """What kernels must do for this group: nothing where the penalty is off."""
        return ()

    def gradient(self, settings: Settings, grad: Tensor, w: Tensor) -> Tensor:
        """The gradient with that of the penalty."""
        return grad

    def decay(self, settings: Settings, w: Tensor, direction: Tensor) -> Number:
        """The coefficient of the decoupled decay."""
        return 0.0

    def prox(self, settings: Settings, w: Tensor, rate: Number, gain: Number) -> Tensor:
        """The weights after the proximal step.

        Args:
            settings: the options of the group.
            w: the weights after the step of the rule.
            rate: lr, times the trust ratio of a layerwise rule.
            gain: what the rule made of a constant gradient of 1, a number or a tensor like `w`. The
                fixed point minimises loss + penalty where rate * gain is the proximal step size.
        """
        return w

    def value(self, settings: Settings, w: Tensor) -> Tensor:
        """The penalty of the weights, a 0-dim tensor."""
        return w.new_zeros(())

    def subdifferential(self, settings: Settings, w: Tensor) -> tuple[Tensor, Tensor]:
        """The smallest and the largest subgradient of the penalty at each coordinate."""
        nothing = torch.zeros_like(w)
        return nothing, nothing


def needs_gain(penalties: Iterable[Penalty], group: Settings) -> bool:
    """Whether the proximal operator of any penalty uses the gain in this group."""
    return any(
        any(term.stage == "prox" and term.uses_gain for term in penalty.terms(group))
        if penalty.on_kernels(group)
        else type(penalty).prox is not Penalty.prox
        for penalty in penalties
    )


def kkt_distance(
    penalties: Iterable[Penalty], settings: Settings, w: Tensor, grad: Tensor
) -> Tensor:
    """How far each coordinate is from being optimal for the loss plus all penalties.

    It is the distance between -grad and the sum of the subdifferentials, an interval.

    Args:
        penalties: those of an optimizer.
        settings: the options of the param group.
        w: the parameters.
        grad: gradient of the loss alone at `w`, same shape.

    >>> from fusedreg.penalties import L1, L2
    >>> group = {"l1": 1.0, "l1_mode": "prox", "weight_decay": 0.0, "decoupled_weight_decay": False}
    >>> w, grad = torch.tensor([2.0, 0.0]), torch.tensor([-1.0, 3.0])
    >>> kkt_distance([L1(), L2()], group, w, grad).tolist()
    [0.0, 2.0]
    """
    low, high = torch.zeros_like(w), torch.zeros_like(w)
    for penalty in penalties:
        lowest, highest = penalty.subdifferential(settings, w)
        low, high = low + lowest, high + highest
    return torch.maximum(grad + low, -(grad + high)).clamp(min=0)

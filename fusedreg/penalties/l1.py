"""L1, as a proximal step, as a decoupled threshold, or as a subgradient."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal, TypedDict

import torch
from torch import Tensor

from fusedreg.checks import check_finite
from fusedreg.kernels.contract import Stage
from fusedreg.options import Option
from fusedreg.penalties.base import Penalty, Term
from fusedreg.penalty import soft_threshold, subgradient, value
from fusedreg.scalars import Number, is_zero
from fusedreg.types import ParamGroup, Settings

TERMS: dict[str, tuple[Stage, str]] = {
    "prox": ("prox", "l1_prox"),
    "decoupled": ("prox", "l1_shrink"),
    "subgradient": ("gradient", "l1_subgradient"),
}
"""Mode -> the stage of the step at which it acts, and its device function."""


def check_l1_mode(group: ParamGroup, name: str, _: bool) -> None:
    """Raise unless there is such a way to penalise."""
    if group[name] not in TERMS:
        raise ValueError(f"Invalid {name} value: {group[name]!r} (expected one of {(*TERMS,)})")


class L1Options(TypedDict, total=False):
    """The L1 penalty."""

    l1: Annotated[float | Tensor, Option(0.0, check_finite)]
    l1_mode: Annotated[Literal["prox", "decoupled", "subgradient"], Option("prox", check_l1_mode)]


class L1(Penalty):
    """`l1 * ||w||_1`.

    `l1_mode` says what a step does: "prox" takes the proximal step of rate * gain, whose fixed
    point minimises loss + penalty; "decoupled" that of rate alone; "subgradient" adds l1 * sign(w)
    to the gradient.
    """

    options = L1Options

    def check_param(self, group: Settings, param: Tensor) -> str | None:
        """A complex parameter is stepped as pairs of reals."""
        l1 = group["l1"]
        if not param.is_complex() or (not isinstance(l1, Tensor) and l1 == 0):
            return None
        return (
            f"Invalid l1 value: {l1} for a complex parameter: a step treats it as pairs of reals, "
            "whose soft-threshold is not that of the modulus. Put it into a group with l1=0"
        )

    def terms(self, group: Settings) -> Iterable[Term]:
        """One hook, which depends on the mode."""
        if not is_zero(group["l1"]):
            mode = group["l1_mode"]
            yield Term(*TERMS[mode], (group["l1"],), uses_gain=mode == "prox")

    def gradient(self, settings: Settings, grad: Tensor, w: Tensor) -> Tensor:
        """`l1 * sign(w)`, in the mode "subgradient"."""
        if settings["l1_mode"] != "subgradient" or is_zero(settings["l1"]):
            return grad
        return grad + subgradient(w, l1=settings["l1"])

    def prox(self, settings: Settings, w: Tensor, rate: Number, gain: Number) -> Tensor:
        """The soft-threshold, in the other two modes."""
        l1, mode = settings["l1"], settings["l1_mode"]
        if mode == "subgradient" or is_zero(l1):
            return w
        return soft_threshold(w, rate * l1 * gain if mode == "prox" else rate * l1)

    def value(self, settings: Settings, w: Tensor) -> Tensor:
        """`l1 * sum(|w|)`."""
        return value(w, l1=settings["l1"])

    def subdifferential(self, settings: Settings, w: Tensor) -> tuple[Tensor, Tensor]:
        """`l1 * sign(w)`, and [-l1, l1] where w is 0."""
        sign, at_zero = subgradient(w, l1=settings["l1"]), w == 0
        l1 = torch.as_tensor(settings["l1"], dtype=w.dtype, device=w.device)
        return torch.where(at_zero, -l1, sign), torch.where(at_zero, l1, sign)

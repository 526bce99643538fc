"""Lion and LAMB beside the packages that people have them from, where those are installed.

lion-pytorch is in the test extra. timm is not, because it imports torchvision, which must be built
for the very torch that is there.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fusedreg

from cases import PATHS, parameters, run, ulp

STEPS = 8
BETAS = (0.8, 0.95)


def optim_of(package: str) -> Any:
    """The module with the optimizers of a package, or skip."""
    return pytest.importorskip(
        package,
        reason="pip install lion-pytorch, or timm with the torchvision of the torch that is here",
        exc_type=ImportError,
    )


def assert_equal_to(
    theirs: type, kwargs: dict[str, Any], ours: type, options: dict[str, Any], ulps: float
) -> None:
    """Both step the same tensors; `ulps` a step, of the largest entry of each."""
    params, others = parameters(), parameters()
    optimizers = ours(params, **options), theirs(others, **kwargs)
    schedules = [
        torch.optim.lr_scheduler.CosineAnnealingLR(each, T_max=2 * STEPS) for each in optimizers
    ]
    for step in range(STEPS):
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            run(optimizer, steps=1, first_seed=step)
            schedule.step()
    for w, other in zip(params, others, strict=True):
        largest = max([1.0, *other.detach().abs().flatten().tolist()])
        torch.testing.assert_close(w, other, rtol=0, atol=STEPS * ulps * ulp(w.dtype, largest))


# ---- Lion ----------------------------------------------------------------------------------------

# w (1 - lr wd) - lr u: both round the factor, the product and the difference, each half an ulp.
LION = 3.0


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_lion_is_lion_pytorchs(weight_decay: float, path: str) -> None:
    common = {"lr": 0.05, "betas": BETAS, "weight_decay": weight_decay}
    peer = optim_of("lion_pytorch").Lion
    assert_equal_to(peer, common, fusedreg.Lion, {**common, **PATHS[path]}, LION)


def test_independent_decay_is_lion_pytorchs_decoupled(path: str) -> None:
    """Which divides by the lr of its constructor, one for all groups."""
    common = {"lr": 0.05, "betas": BETAS, "weight_decay": 0.03}
    peer = optim_of("lion_pytorch").Lion
    ours = {**common, "lr_independent_decay": True, **PATHS[path]}
    theirs = {**common, "decoupled_weight_decay": True}
    assert_equal_to(peer, theirs, fusedreg.Lion, ours, LION)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_lion_is_timms(weight_decay: float, maximize: bool, path: str) -> None:
    common = {"lr": 0.05, "betas": BETAS, "weight_decay": weight_decay, "maximize": maximize}
    peer = optim_of("timm.optim").Lion
    assert_equal_to(peer, common, fusedreg.Lion, {**common, **PATHS[path]}, LION)


# ---- LAMB ----------------------------------------------------------------------------------------

# About twelve roundings of half an ulp in either direction u, whose size is near 1 and which lr
# makes a tenth; two norms of at most 67 entries, each sqrt(67) / 3 ulp off in another order; the
# product and the difference.
LAMB = 4.0


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_lamb_is_timms(weight_decay: float, path: str) -> None:
    """Which leaves the trust ratio at 1 without decay, unless it is to adapt always."""
    common = {"lr": 0.05, "betas": BETAS, "eps": 1e-3, "weight_decay": weight_decay}
    peer = optim_of("timm.optim").Lamb
    theirs = {**common, "always_adapt": True, "max_grad_norm": None}
    assert_equal_to(peer, theirs, fusedreg.LAMB, {**common, **PATHS[path]}, LAMB)


def test_lamb_clips_as_timms_but_for_1e_6(path: str) -> None:
    """Theirs is max_norm / norm, ours max_norm / (norm + 1e-6): relatively 1e-6 / norm < 1e-7."""
    common = {"lr": 0.05, "betas": BETAS, "eps": 1e-3, "weight_decay": 0.3, "max_grad_norm": 1.0}
    peer = optim_of("timm.optim").Lamb
    # The norm of 114 normal entries is about 10. Of each step, lr max|u| with |u| about 3, that
    # is 1e-7 at most, where the root's eps lets it through at all.
    through = 1e-7 * 0.05 * 3 / 2.0**-52
    assert_equal_to(peer, common, fusedreg.LAMB, {**common, **PATHS[path]}, LAMB + through)

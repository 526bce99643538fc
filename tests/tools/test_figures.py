"""What the figures of the documentation claim holds of their numbers, and they are drawn."""

from __future__ import annotations

import importlib
from functools import cache
from math import cos, exp, log, pi, prod
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from matplotlib.image import imread

from fusedreg.demo import diabetes
from fusedreg.penalty import kkt_distance

FOLDER = Path(__file__).parents[2] / "docs" / "figures"
FEW_DECAYS = (0.3, 0.5, 2.0, 10.0)
FEW_STEPS = 200


@cache
def script(name: str) -> ModuleType:
    """A module of docs/figures, which import one another as scripts of one folder do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        return importlib.import_module(name)


@cache
def numbers(name: str) -> Any:
    """What a script draws, on smaller settings where the full ones take more than two seconds."""
    module = script(name)
    small = {
        "regularisation_path": lambda: module.compute(count=4),
        "cross_validation": lambda: module.compute(count=2),
        "weight_histograms": module.compute,
        "adamw_box": lambda: module.compute_all(FEW_DECAYS),
        "ulp_error": lambda: module.compute_all(FEW_STEPS),
    }
    return small.get(name, getattr(module, "compute_all", None))()


# ---- prox_modes ---------------------------------------------------------------------------------


def moved_by_gradient(optimizer: str) -> float:
    """How far a constant gradient of 1 moves a weight in a step, from the papers' formulas."""
    module = script("prox_modes")
    options = module.SETTINGS[optimizer][1]
    if optimizer == "SGD":
        return options["lr"] / (1 - options["momentum"])
    return options["lr"] / (module.GRADIENT + 1e-8)


@pytest.mark.parametrize("mode", ["prox", "decoupled"])
@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_exactly_the_dead_zone_becomes_zero(optimizer: str, mode: str) -> None:
    module, found = script("prox_modes"), numbers("prox_modes")[optimizer][mode]
    a = moved_by_gradient(optimizer)
    lr = module.SETTINGS[optimizer][1]["lr"]
    threshold = module.L1 * (a if mode == "prox" else lr)
    distance = (found.before - a * module.GRADIENT).abs() - threshold
    # The grid keeps 1e-5 away from the edges, where 1e-16 would decide.
    assert distance.abs().min() > 1e-6
    assert torch.equal(found.after == 0, distance < 0)


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_zero_stays_where_it_is_optimal_by_prox_alone(optimizer: str) -> None:
    module, maps = script("prox_modes"), numbers("prox_modes")[optimizer]
    gradient = torch.tensor([module.GRADIENT])
    assert kkt_distance(torch.zeros(1), gradient, l1=module.L1).item() == 0
    assert {mode: found.of_zero == 0 for mode, found in maps.items()} == {
        "prox": True,
        "decoupled": False,
        "subgradient": False,
    }


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_a_subgradient_step_makes_no_zero(optimizer: str) -> None:
    found = numbers("prox_modes")[optimizer]["subgradient"]
    assert found.dead_zone is None
    assert (found.after != 0).all()


# ---- weight_histograms --------------------------------------------------------------------------


def test_prox_makes_most_zeros_and_the_loss_none() -> None:
    pairs = numbers("weight_histograms")
    in_loss, decoupled, prox = (pair.ours for pair in pairs)
    assert [pair.recipe.l1_mode for pair in pairs] == ["subgradient", "decoupled", "prox"]
    assert in_loss.zeros == 0
    assert 0 < decoupled.zeros < prox.zeros
    assert min(run.accuracy for run in (in_loss, decoupled, prox)) >= 0.95


# ---- regularisation_path ------------------------------------------------------------------------


def test_paths_are_optimal_and_scikit_learns() -> None:
    paths = numbers("regularisation_path")
    exact = paths["scikit-learn"]
    assert set(paths) == {"SGD", "Adam", "scikit-learn"}
    for path in paths.values():
        assert max(path.kkt) <= diabetes.KKT_TOLERANCE
        assert path.zeros == exact.zeros
        # That residual and strong convexity allow no more.
        assert max(path.worst_difference(exact)) <= diabetes.guaranteed_difference(diabetes.load())


# ---- cross_validation ---------------------------------------------------------------------------


def test_cross_validated_errors_are_scikit_learns() -> None:
    module, (ours, theirs) = script("cross_validation"), numbers("cross_validation")
    for fold, (train, held_out) in enumerate(module.folds(diabetes.load())):
        # A row x predicts x w, so coefficients that are d apart predict at most |x| d apart, and a
        # mean of squares whose root is r changes by at most 2 r e + e^2 for an e of that mean.
        apart = diabetes.guaranteed_difference(train)
        apart *= held_out.X.square().sum(1).mean().sqrt().item()
        allowed = apart * (2 * theirs.errors[:, fold] ** 0.5 + apart)
        assert (abs(ours.errors[:, fold] - theirs.errors[:, fold]) <= allowed).all()
    assert fold + 1 == ours.errors.shape[1]
    assert ours.nonzeros.tolist() == theirs.nonzeros.tolist()


def test_the_choices_are_those_of_the_rules() -> None:
    module = script("cross_validation")
    # Their variance is 2.5 / 4, so one standard error of a mean over five is sqrt(0.125) = 0.354.
    spread = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0]).numpy()
    errors = torch.tensor([3.4, 3.3, 3.0, 4.0]).numpy()[:, None] + spread
    curve = module.Curve([4.0, 3.0, 2.0, 1.0], errors, torch.zeros(4, 1))
    assert (curve.best, curve.chosen) == (2, 1)


# ---- trajectories -------------------------------------------------------------------------------

PENALTIES = ("coupled L2", "decoupled decay", "prox L1")


def learning_rates(module: ModuleType, first: float) -> list[float]:
    return [first * module.LAST_LR ** (step / module.STEPS) for step in range(module.STEPS)]


@pytest.mark.parametrize("penalty", PENALTIES)
def test_sgd_ends_in_the_minimum(penalty: str) -> None:
    module, run = script("trajectories"), numbers("trajectories")["SGD"][penalty]
    # A step shortens the distance by lr / (1 - momentum) times the curvature, and by not more than
    # sqrt(momentum). The factor 10 is room for the transient, as in problems.TOLERANCE.
    curvature = torch.linalg.eigvalsh(module.H)[0].item() / (1 - module.MOMENTUM)
    rates = learning_rates(module, module.OPTIMIZERS["SGD"][1]["lr"])
    left = exp(-sum(min(-log(module.MOMENTUM) / 2, lr * curvature) for lr in rates))
    assert run.miss <= 10 * left * (run.way[0] - run.minimum).norm().item()


def overshoot(betas: tuple[float, float], last_lr: float) -> float:
    """What an Adam step may miss: moves of at most lr as long as the averages remember.

    With equal betas a step is at most lr, because the mean of squares is at least the squared mean.
    """
    assert betas[0] == betas[1]
    return last_lr / (1 - betas[0])


@pytest.mark.parametrize("penalty", PENALTIES)
def test_adam_ends_in_the_minimum(penalty: str) -> None:
    module, run = script("trajectories"), numbers("trajectories")["Adam"][penalty]
    options = module.OPTIMIZERS["Adam"][1]
    assert run.miss <= overshoot(options["betas"], module.LAST_LR * options["lr"])


def test_only_prox_ends_on_an_axis() -> None:
    for runs in numbers("trajectories").values():
        zeros = {penalty: (run.way[-1] == 0).tolist() for penalty, run in runs.items()}
        none = [False, False]
        assert zeros == dict.fromkeys(PENALTIES, none) | {"prox L1": [False, True]}


def test_the_minima_are_different_ones() -> None:
    for runs in numbers("trajectories").values():
        minima = torch.stack([run.minimum for run in runs.values()])
        apart = torch.pdist(minima)
        assert apart.min() > 0.3  # several times the rings' size


# ---- adamw_box ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["AdamW", "Adam"])
def test_box_and_ridge_are_reached(name: str) -> None:
    module, ends = script("adamw_box"), numbers("adamw_box")[name]
    for decay, found, exact in zip(ends.decays, ends.found, ends.exact, strict=True):
        first_lr = module.LR / decay
        left = exp(-decay * sum(learning_rates(module, first_lr)))  # of the way to the box
        allowed = overshoot(module.BETAS, module.LAST_LR * first_lr) + left / decay
        assert (found - exact).abs().max().item() <= allowed


def test_adamw_stays_in_its_box_and_adam_does_not() -> None:
    ends = numbers("adamw_box")
    for decay, found in zip(ends["AdamW"].decays, ends["AdamW"].found, strict=True):
        # w (1 - lr decay) + lr u with |u| <= 1 cannot leave it but by the rounding of 2000 steps.
        assert found.abs().max().item() <= (1 + 2000 * 2**-52) / decay
    largest = dict(zip(ends["Adam"].decays, ends["Adam"].found.abs().amax(1), strict=True))
    assert largest[2.0] > 0.5


# ---- decay_forms --------------------------------------------------------------------------------

ROUNDED = 2000 * 2**-52
"""Two roundings in each of 1000 steps, relative to the weight."""


def test_what_each_form_of_decay_obeys() -> None:
    obeys = {}
    for name, ways in numbers("decay_forms").items():
        first, *others = (torch.tensor(way, dtype=torch.float64) for way in ways.values())
        # eps of Adam's 1e-8 is all that can tell a gradient from twice the gradient.
        same = 1e-7 if name == "coupled (Adam)" else ROUNDED
        obeys[name] = [((way / first - 1).abs().max() > same).item() for way in others]
    assert obeys == {  # half the lr, twice the weight_decay
        "coupled (Adam)": [True, False],
        "decoupled (AdamW)": [True, True],
        "independent of lr (AdamW)": [False, True],
        "in the trust ratio (LAMB)": [True, False],
    }


@pytest.mark.parametrize("change", ["as it is", "half the lr", "twice the weight_decay"])
def test_what_is_left_is_the_product_of_the_steps(change: str) -> None:
    module, ways = script("decay_forms"), numbers("decay_forms")
    of_lr, of_decay = module.CHANGES[change]
    cosine = [(1 + cos(pi * step / module.STEPS)) / 2 for step in range(module.STEPS)]
    lost = {
        "decoupled (AdamW)": of_lr * of_decay * module.LR,
        "independent of lr (AdamW)": of_decay * module.LR,
        "in the trust ratio (LAMB)": of_lr * module.LR,
    }
    for name, fraction in lost.items():
        left = prod(1 - fraction * rate for rate in cosine)
        # torch computes the cosine step by step, from the one before.
        assert ways[name][change][-1] == pytest.approx(left, rel=1e-9)


# ---- ulp_error ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_error_is_at_most_one_and_a_half_of_torchs_for_loop(name: str, dtype: torch.dtype) -> None:
    curves = {curve.name: curve for curve in numbers("ulp_error")[dtype][name]}
    (loop,) = (curve for key, curve in curves.items() if key.startswith("torch for-loop"))
    ours = [curve for key, curve in curves.items() if key.startswith("fusedreg")]
    assert loop.steps[-1] == FEW_STEPS
    assert len(ours) == (1 if dtype == torch.float32 else 2)
    for curve in ours:
        assert all(
            mine <= 1.5 * theirs for mine, theirs in zip(curve.errors, loop.errors, strict=True)
        )


def test_the_decay_factor_makes_most_of_adamws_error(monkeypatch: pytest.MonkeyPatch) -> None:
    module = script("ulp_error")
    with_decay = numbers("ulp_error")[torch.float32]["AdamW"]
    monkeypatch.setitem(module.OPTIMIZERS, "AdamW", {"lr": 0.01, "weight_decay": 0.0})
    without = module.compute("AdamW", torch.float32, FEW_STEPS)
    for curve in without:  # some more roundings than the one at the end of a step
        assert curve.errors[-1] < 2 * (FEW_STEPS / 12) ** 0.5
    for curve in with_decay:
        # 1 - 1e-4 is 1.66e-8 off in float32: that times the steps, in ulps of 1.2e-7, for weights
        # from 1 to 2 whose root mean square is 1.53.
        expected = 1.66e-8 * FEW_STEPS * 1.53 / torch.finfo(torch.float32).eps
        assert curve.errors[-1] == pytest.approx(expected, rel=0.1)


def test_an_ulp_is_that_of_the_exact_weight() -> None:
    exact = torch.tensor([[1.0, 1.9, -2.5, 0.3]], dtype=torch.float64)
    ulps = torch.tensor([1, 1, 2, 0.25], dtype=torch.float64) * 2**-7
    found = script("ulp_error").rms_ulps(exact + 3 * ulps, exact, torch.bfloat16)
    assert found == pytest.approx([3.0])


# ---- drawn --------------------------------------------------------------------------------------

NAMES = (
    "prox_modes",
    "weight_histograms",
    "regularisation_path",
    "cross_validation",
    "trajectories",
    "adamw_box",
    "decay_forms",
    "ulp_error",
)


@pytest.mark.parametrize("name", NAMES)
def test_main_draws_the_figure(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, found = script(name), numbers(name)
    entry = "compute_all" if hasattr(module, "compute_all") else "compute"
    monkeypatch.setattr(module, entry, lambda: found)
    module.main([str(tmp_path / "new")])
    (png,) = (tmp_path / "new").iterdir()
    assert png.name == f"{name}.png"
    image = imread(png)
    height, width, _ = image.shape
    assert width >= 8 * 150
    assert height >= 4 * 150
    assert image[..., :3].std() > 0.05  # something is drawn


def test_all_draws_every_script_and_each_stands_beside_its_figure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    drawn = {module.__name__ for module in script("all").scripts()}
    assert drawn == set(NAMES)
    assert all((FOLDER / f"{name}.png").is_file() for name in drawn)

"""The demo on small settings: its two halves, its report, its figures and its command line."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from rich.console import Console

import fusedreg.demo
from fusedreg.__main__ import main
from fusedreg.demo import diabetes, digits, figures
from fusedreg.demo.comparison import Comparison
from fusedreg.demo.progress import tracking

T = TypeVar("T")
FIGURES = ("demo.png", "diabetes-paths.png", "digits-weights.png")
PROX = [recipe for recipe in digits.RECIPES if recipe.is_prox]
EQUAL = [recipe for recipe in digits.RECIPES if not recipe.is_prox]


def silently(items: Sequence[T], description: str) -> Iterator[T]:
    return iter(items)


def broken(comparisons: Sequence[Comparison]) -> list[str]:
    return [comparison.name for comparison in comparisons if not comparison.holds]


class Demo(NamedTuple):
    status: int
    printed: str
    errors: str
    out: Path
    numbers: dict[str, Any]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """The whole demo through its command line, on few values of l1 and few epochs."""
    out = tmp_path_factory.mktemp("demo") / "new" / "folder"
    printed, errors = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed), redirect_stderr(errors):
        patch.setattr(fusedreg.demo, "run", partial(fusedreg.demo.run, l1_count=3, max_epochs=3))
        patch.setattr(digits, "ACCURACY_FLOOR", 0.8)
        patch.setattr(digits, "ZERO_SHARE_FLOOR", 0.1)
        patch.setenv("COLUMNS", "80")
        status = main(["demo", "--out", str(out)])
    numbers = json.loads((out / "demo.json").read_text(encoding="utf-8"))
    return Demo(status, printed.getvalue(), errors.getvalue(), out, numbers)


# ---- the whole --------------------------------------------------------------------------------


def test_all_comparisons_hold(demo: Demo) -> None:
    assert demo.status == 0
    assert demo.errors == ""
    assert f"{len(demo.numbers['comparisons'])} of {len(demo.numbers['comparisons'])}" in (
        demo.printed
    )


def test_tables_are_whole_in_80_columns(demo: Demo) -> None:
    lines = demo.printed.splitlines()
    assert max(map(len, lines[:-1])) <= 80
    assert "…" not in demo.printed
    for recipe in digits.RECIPES:
        assert any(line.strip().startswith(recipe.name) for line in lines)


def test_json_holds_all_numbers(demo: Demo) -> None:
    numbers = demo.numbers
    packages = {"python", "torch", "scikit-learn", "fusedreg", "llvmlite"}
    assert set(numbers["versions"]) == packages
    assert numbers["versions"]["fusedreg"] == fusedreg.__version__
    assert numbers["machine"]["cores"] >= 1
    assert 0 < numbers["seconds"]["diabetes"] < numbers["seconds"]["total"]
    assert numbers["tolerances"]["coefficients"] == diabetes.COEFFICIENT_TOLERANCE
    paths = {(path["penalty"], path["solver"]): path for path in numbers["diabetes"]}
    assert set(paths) == {
        (penalty, solver)
        for penalty in diabetes.PENALTIES
        for solver in ("scikit-learn", *diabetes.SOLVERS)
    }
    for path in paths.values():
        for series in ("l1", "coefficients", "zeros", "kkt", "steps", "worst_difference"):
            assert len(path[series]) == 3
        assert len(path["coefficients"][0]) == 10
    assert [run["name"] for run in numbers["digits"]] == [r.name for r in digits.RECIPES]
    for run, recipe in zip(numbers["digits"], digits.RECIPES, strict=True):
        assert (run["torch"] is None) == (run["largest_difference"] is None) == recipe.is_prox
        assert 0 <= run["fusedreg"]["zeros"] <= run["fusedreg"]["weights"] == 64 * 64 + 64 * 10
    assert all(comparison["holds"] for comparison in numbers["comparisons"])


@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_pictures(demo: Demo, name: str) -> None:
    pixels = imread(demo.out / name)[..., :3]
    assert min(pixels.shape[:2]) > 500
    assert len(np.unique(pixels @ [1, 1e3, 1e6])) > 100  # colours
    inked = (pixels < 0.9).any(axis=2)
    assert 0.01 < inked.mean() < 0.5
    assert inked[-40:, :200].any()  # the machine and the versions


def test_no_path_of_this_machine_is_written(demo: Demo) -> None:
    text = (demo.out / "demo.json").read_text(encoding="utf-8") + demo.printed
    text = text.replace(str(demo.out), "")
    for path in (Path.cwd(), Path.home(), Path(fusedreg.__file__).parent, Path(sys.prefix)):
        assert str(path) not in text
    assert sorted(file.name for file in demo.out.iterdir()) == sorted([*FIGURES, "demo.json"])


# ---- comparisons ------------------------------------------------------------------------------


def test_a_comparison_with_nan_never_holds() -> None:
    assert Comparison("equal", 1.0, "<=", 1.0).holds
    assert Comparison("equal", 1.0, ">=", 1.0).holds
    assert not Comparison("more", 1.1, "<=", 1.0).holds
    assert not Comparison("nan", math.nan, "<=", 1.0).holds
    assert not Comparison("nan", math.nan, ">=", 1.0).holds


# ---- diabetes ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lasso() -> list[diabetes.Path]:
    data = diabetes.load()
    l1s = diabetes.l1_grid(data, 3)[:2]
    return [
        diabetes.reference(data, "Lasso", l1s),
        diabetes.follow(data, "Lasso", "SGD", l1s, silently),
    ]


def test_grid_starts_where_the_first_coefficient_wakes_up() -> None:
    data = diabetes.load()
    l1s = diabetes.l1_grid(data, 30)
    assert len(l1s) == 30
    assert l1s == sorted(l1s, reverse=True)
    ratio = l1s[0] / l1s[1]
    lambda_max = l1s[0] * ratio
    assert lambda_max == pytest.approx(1e3 * l1s[-1])
    asleep, awake = diabetes.reference(
        data, "Lasso", [lambda_max * 1.001, lambda_max * 0.999]
    ).zeros
    assert asleep == 10
    assert awake < 10


def test_a_path_holds_against_scikit_learn(lasso: list[diabetes.Path]) -> None:
    compared = diabetes.comparisons(lasso)
    assert len(compared) == 4
    assert broken(compared) == []


def test_a_tighter_coefficient_tolerance_fails(
    lasso: list[diabetes.Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diabetes, "COEFFICIENT_TOLERANCE", 0.0)
    assert broken(diabetes.comparisons(lasso)) == [
        "Lasso path, SGD: largest coefficient difference to scikit-learn"
    ]


def test_a_small_coefficient_does_not_count_as_zero(lasso: list[diabetes.Path]) -> None:
    exact, ours = lasso
    almost = ours.coefficients.clone()
    almost[almost == 0] = 1e-12
    assert broken(diabetes.comparisons([exact, ours._replace(coefficients=almost)])) == [
        "Lasso path, SGD: values of l1 with another number of exact zeros"
    ]


def test_an_unfinished_path_fails(
    lasso: list[diabetes.Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diabetes, "MAX_STEPS", 20)
    short = diabetes.follow(diabetes.load(), "Lasso", "Adam", lasso[0].l1, silently)
    assert short.steps == [20, 20]
    assert "Lasso path, Adam: KKT residual" in broken(diabetes.comparisons([lasso[0], short]))


# ---- digits -----------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", EQUAL, ids=[recipe.name for recipe in EQUAL])
def test_training_differs_from_torch_by_rounding(
    recipe: digits.Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = digits.compare(digits.load(), recipe, 2, silently)
    assert pair.difference is not None
    assert pair.difference <= digits.PARAMETER_TOLERANCE
    assert pair.last_bit_difference is not None
    assert 0 < pair.last_bit_difference <= digits.PARAMETER_TOLERANCE
    monkeypatch.setattr(digits, "ACCURACY_FLOOR", 0.5)
    assert broken(digits.comparisons([pair])) == []
    monkeypatch.setattr(digits, "PARAMETER_TOLERANCE", -1.0)
    assert broken(digits.comparisons([pair])) == [
        f"digits, {recipe.name}: largest difference to torch"
    ]


@pytest.mark.parametrize("recipe", EQUAL[1:], ids=[recipe.name for recipe in EQUAL[1:]])
def test_the_difference_would_show_a_missing_penalty(recipe: digits.Recipe) -> None:
    """The tolerance is far below what each penalty does to the parameters."""
    data = digits.load()
    plain = recipe._replace(weight_decay=0.0, l1=0.0, max_grad_norm=None)
    with_penalty = digits.train(data, recipe, digits.by_fusedreg, range(1))
    without = digits.train(data, plain, digits.by_torch, range(1))
    difference = (with_penalty.parameters - without.parameters).abs().max()
    assert difference > 1e5 * digits.PARAMETER_TOLERANCE


@pytest.mark.parametrize("recipe", PROX, ids=[recipe.name for recipe in PROX])
def test_prox_must_make_zeros(recipe: digits.Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits, "ACCURACY_FLOOR", 0.5)
    pair = digits.compare(digits.load(), recipe, 2, silently)
    assert pair.torch is None
    assert pair.difference is None
    assert pair.ours.zeros > 0
    dense = pair.ours._replace(weights=pair.ours.weights + 1e-300)
    assert broken(digits.comparisons([pair._replace(ours=dense)])) == [
        f"digits, {recipe.name}: share of weights exactly 0"
    ]


def test_what_else_must_hold_of_a_training(monkeypatch: pytest.MonkeyPatch) -> None:
    clipping = next(recipe for recipe in digits.RECIPES if recipe.max_grad_norm is not None)
    run = digits.Run(torch.zeros(3), torch.zeros(2), accuracy=0.9, epochs=4, clipped_share=0.1)
    pair = digits.Pair(clipping, run, run._replace(epochs=5), run)
    assert [name.partition(": ")[2] for name in broken(digits.comparisons([pair]))] == [
        "test accuracy",
        "weights exactly 0",
        "share of steps clipped",
        "epochs trained more or less than torch",
    ]


def test_training_stops_early_at_the_best_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([3.0, 1.0, 2.0, 2.0, 0.0])
    monkeypatch.setattr(digits, "evaluate", lambda model, *split: (next(losses), 0.5))
    monkeypatch.setattr(digits, "PATIENCE", 2)
    data, recipe = digits.load(), digits.RECIPES[0]
    run = digits.train(data, recipe, digits.by_fusedreg, range(9))
    assert run.epochs == 4
    losses = iter([2.0, 1.0, 0.0])
    two_epochs = digits.train(data, recipe, digits.by_fusedreg, range(2))
    assert torch.equal(run.parameters, two_epochs.parameters)


def test_training_leaves_the_random_state_alone() -> None:
    state = torch.get_rng_state()
    digits.train(digits.load(), digits.RECIPES[0], digits.by_fusedreg, range(1))
    assert torch.equal(torch.get_rng_state(), state)


def test_splits_are_disjoint_and_whole() -> None:
    data = digits.load()
    assert [len(labels) for _, labels in data] == [1077, 360, 360]
    for images, labels in data:
        assert images.dtype == torch.float64
        assert labels.bincount().min() > len(labels) / 15  # every class in every split


def test_biases_start_at_zero() -> None:
    biases = [param for param in digits.network().parameters() if param.dim() == 1]
    assert len(biases) == 2
    assert all((bias == 0).all() for bias in biases)


# ---- report and figures -----------------------------------------------------------------------


def test_labels_are_apart_and_in_order() -> None:
    values = [0.5, 0.0, 0.01, 0.52, 0.02, -1.0]
    placed = figures.spread(values, 0.1)
    assert np.argsort(placed).tolist() == np.argsort(values).tolist()
    assert np.diff(sorted(placed)).min() >= 0.1 - 1e-12
    assert placed[5] == -1.0
    assert np.mean(placed) == pytest.approx(np.mean(values))


def test_a_job_left_early_counts_as_done() -> None:
    terminal = Console(file=io.StringIO(), force_terminal=True, width=80)
    with tracking(terminal, 1) as track:
        for item in track([1, 2, 3], "an early stop"):
            if item == 2:
                break
    shown = terminal.file.getvalue()
    assert "an early stop" in shown
    assert "100%" in shown


# ---- the command line -------------------------------------------------------------------------


def test_what_does_not_hold_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = [Comparison("first", 2.0, "<=", 1.0), Comparison("second", 0.1, ">=", 0.5)]
    monkeypatch.setattr(fusedreg.demo, "run", lambda out: failed)
    assert main(["demo", "--out", str(tmp_path)]) == 1
    errors = capsys.readouterr().err
    assert "does not hold: first: 2, must be <= 1\n" in errors
    assert "does not hold: second: 0.1, must be >= 0.5\n" in errors


def test_default_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fusedreg.demo, "run", lambda out: given.append(out) or [])
    assert main(["demo"]) == 0
    assert given == [Path("fusedreg-demo")]
    assert (tmp_path / "fusedreg-demo").is_dir()


@pytest.mark.parametrize("module", ["matplotlib", "numpy", "sklearn"])
def test_without_the_extra(
    module: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    forget_demo(monkeypatch, module)
    assert main(["demo"]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    assert "pip install 'fusedreg[demo]'" in printed.err
    assert list(tmp_path.iterdir()) == []


def test_another_missing_module_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    forget_demo(monkeypatch, "fusedreg.penalty")
    with pytest.raises(ModuleNotFoundError, match=r"fusedreg\.penalty"):
        main(["demo"])


def forget_demo(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    """Let the demo be imported anew, and the module `missing` and all in it not be found."""
    for name in list(sys.modules):
        if is_within("fusedreg.demo", name):
            monkeypatch.delitem(sys.modules, name)
        elif is_within(missing, name):
            monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delattr(fusedreg, "demo")


def is_within(package: str, module: str) -> bool:
    return f"{module}.".startswith(f"{package}.")


def test_a_folder_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["demo", "--out", str(tmp_path / "file")]) == 2
    assert "File exists" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [[], ["unknown"], ["demo", "--in", "x"]])
def test_wrong_arguments(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert "usage: fusedreg" in capsys.readouterr().err


def test_importing_fusedreg_needs_no_extra() -> None:
    code = (
        "import sys, fusedreg, fusedreg.__main__; "
        "print(*{'matplotlib', 'rich', 'sklearn'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_module_runs() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fusedreg", "demo", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "fusedreg-demo" in done.stdout

"""The demo's numbers as tables for a person and as JSON for a program."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table

from fusedreg.demo import diabetes, digits
from fusedreg.demo.comparison import Comparison
from fusedreg.machine import Record, environment

STYLE: Record = {
    "box": box.SIMPLE_HEAD,
    "title_justify": "left",
    "title_style": "bold",
    "caption_justify": "left",
    "pad_edge": False,
}
"""Of the tables; they fit into 80 columns."""


def path_table(paths: Sequence[diabetes.Path], data: diabetes.Data) -> Table:
    """One penalty: exact zeros, steps and worst difference at each l1."""
    (exact,) = (path for path in paths if path.solver == "scikit-learn")
    ours = [path for path in paths if path is not exact]
    table = Table(
        title=f"Diabetes, {exact.penalty} path: exact zeros of {len(data.names)} coefficients",
        **STYLE,
        caption="Largest difference of a coefficient from scikit-learn, must be at most "
        f"{diabetes.COEFFICIENT_TOLERANCE:g}. Steps end at a KKT residual of "
        f"{diabetes.KKT_TOLERANCE:g}, which guarantees {diabetes.guaranteed_difference(data):.1e}.",
    )
    headings = ["\nl1", "zeros\nsklearn"]
    headings += [f"zeros\n{path.solver}" for path in ours]
    headings += [f"difference\n{path.solver}" for path in ours]
    headings += [f"steps\n{path.solver}" for path in ours]
    for heading in headings:
        table.add_column(heading, justify="right")
    worst = [path.worst_difference(exact) for path in ours]
    for i, l1 in enumerate(exact.l1):
        row = [f"{l1:.5f}", str(exact.zeros[i]), *(str(path.zeros[i]) for path in ours)]
        row += [f"{differences[i]:.1e}" for differences in worst]
        table.add_row(*row, *(str(path.steps[i]) for path in ours))
    return table


def digits_table(pairs: Sequence[digits.Pair]) -> Table:
    """One row per recipe."""
    total = pairs[0].ours.weights.numel()
    table = Table(
        title=f"Digits: network with {total} weights, dropout, early stopping, float64",
        **STYLE,
        caption="Same seed, batches and dropout masks in both libraries. Must hold: no parameter "
        f"further from torch than {digits.PARAMETER_TOLERANCE:g}, equally many epochs, accuracy at "
        f"least {digits.ACCURACY_FLOOR:g}, exact zeros by prox alone, and there in at least "
        f"{digits.ZERO_SHARE_FLOOR:.0%} of the weights. torch.optim has no equal of prox.\n"
        "* torch from itself, if it starts from weights that differ in their last bit: what this "
        "training makes of a rounding.",
    )
    table.add_column("\npenalty")
    table.add_column("\nclass")
    for heading in (
        "epochs\n(torch)",
        "test\naccuracy",
        "exact\nzeros",
        "from\ntorch",
        "torch,\nlast bit*",
    ):
        table.add_column(heading, justify="right")
    for pair in pairs:
        recipe, ours = pair.recipe, pair.ours
        clipped = "" if recipe.max_grad_norm is None else f"\n({ours.clipped_share:.0%} of steps)"
        table.add_row(
            recipe.name + clipped,
            recipe.optimizer,
            f"{ours.epochs} ({pair.torch.epochs if pair.torch else '-'})",
            f"{ours.accuracy:.4f}",
            str(ours.zeros),
            _scientific(pair.difference),
            _scientific(pair.last_bit_difference),
        )
    return table


def _scientific(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def record(
    paths: Sequence[diabetes.Path],
    pairs: Sequence[digits.Pair],
    compared: Sequence[Comparison],
    seconds: dict[str, float],
) -> Record:
    """All numbers, for demo.json."""
    return {
        **environment("scikit-learn"),
        "seconds": seconds,
        "tolerances": {
            "kkt_residual": diabetes.KKT_TOLERANCE,
            "coefficients": diabetes.COEFFICIENT_TOLERANCE,
            "parameters": digits.PARAMETER_TOLERANCE,
            "accuracy_floor": digits.ACCURACY_FLOOR,
            "zero_share_floor": digits.ZERO_SHARE_FLOOR,
            "clipped_share_floor": digits.CLIPPED_SHARE_FLOOR,
        },
        "diabetes": [_path_record(path, paths) for path in paths],
        "digits": [_pair_record(pair) for pair in pairs],
        "comparisons": [{**each._asdict(), "holds": each.holds} for each in compared],
    }


def _path_record(path: diabetes.Path, paths: Sequence[diabetes.Path]) -> Record:
    (exact,) = (p for p in paths if (p.penalty, p.solver) == (path.penalty, "scikit-learn"))
    return {
        **path._asdict(),
        "coefficients": path.coefficients.tolist(),
        "zeros": path.zeros,
        "worst_difference": path.worst_difference(exact),
    }


def _pair_record(pair: digits.Pair) -> Record:
    return {
        **pair.recipe._asdict(),
        "fusedreg": _run_record(pair.ours),
        "torch": None if pair.torch is None else _run_record(pair.torch),
        "largest_difference": pair.difference,
        "largest_difference_last_bit": pair.last_bit_difference,
    }


def _run_record(run: digits.Run) -> Record:
    return {
        "accuracy": run.accuracy,
        "epochs": run.epochs,
        "weights": run.weights.numel(),
        "zeros": run.zeros,
        "clipped_share": run.clipped_share,
    }

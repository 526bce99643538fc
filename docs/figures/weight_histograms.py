"""Draw weight_histograms: the sizes of a network's weights after training with each mode of l1.

The network, data, seed and batches of `fusedreg demo`, trained by SGD with momentum 0.9 and the
same l1 and lr three times; only `l1_mode` differs. "decoupled" has the threshold lr * l1, a tenth
of the one that minimises loss + l1 |w| under this momentum, so it makes fewer zeros than "prox".
"""

from __future__ import annotations

from collections.abc import Sequence

from drawing import run
from matplotlib.figure import Figure

from fusedreg.demo import digits
from fusedreg.demo.digits import Pair, Recipe
from fusedreg.demo.figures import draw_histogram
from fusedreg.demo.style import new_figure
from fusedreg.machine import caption

L1 = 1e-3
RECIPES = tuple(
    Recipe(name, "SGD", digits.SGD, l1=L1, l1_mode=mode)
    for name, mode in (
        ("L1 in the loss", "subgradient"),
        ("L1, decoupled", "decoupled"),
        ("L1, prox", "prox"),
    )
)


def compute(max_epochs: int = 100) -> list[Pair]:
    """Each recipe trained by fusedreg, until early stopping or for `max_epochs`."""
    data = digits.load()
    return [
        Pair(recipe, digits.train(data, recipe, digits.by_fusedreg, range(max_epochs)))
        for recipe in RECIPES
    ]


def draw(pairs: Sequence[Pair]) -> Figure:
    """One panel for each mode."""
    figure = new_figure(11, 4.2, caption("scikit-learn"))
    panels = figure.subplots(1, len(pairs), sharex=True, sharey=True)
    for axes, pair in zip(panels, pairs, strict=True):
        draw_histogram(axes, pair)
        axes.set_xlabel("|w|")
    panels[0].set_ylabel("number of weights")
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw it."""
    run("weight_histograms", lambda: draw(compute()), arguments)


if __name__ == "__main__":
    main()

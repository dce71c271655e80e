"""Draw the curves of a run on one page: loss, lambda or threshold, sparsity, all layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from sparsecast.sparsify.measure import Score
from sparsecast.sparsify.training.curve_table import Row

FIGURE = "curves.png"
COLORS = ("#8a8f98", "#3b76c4", "#2f9e5f", "#b0549a", "#d9822b", "#7a6a4f")
STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}


def write_figure(
    path: Path, tables: Mapping[str, Sequence[Row]], scores: Mapping[str, Score]
) -> None:
    """Write `draw_curves` as PNG."""
    figure = draw_curves(tables, scores)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=120, metadata={"Software": None})


def draw_curves(tables: Mapping[str, Sequence[Row]], scores: Mapping[str, Score]) -> Figure:
    """Draw the curves of every phase over the tokens of the run, pre-training included.

    Args:
        tables: Name of a phase to its rows.
        scores: The rows of the card in their order. The last of them that has a table is shown
            layer by layer; one without a table is a mark in the color of the one before it.
    """
    names = sorted(tables.keys() - scores.keys()) + [name for name in scores if name in tables]
    color = {name: COLORS[place % len(COLORS)] for place, name in enumerate(names)}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 7), layout="constrained")
        (loss, weight), (sparsity, layers) = figure.subplots(2, 2)
        for name in names:
            rows = tables[name]
            tokens = [row.tokens for row in rows]
            loss.plot(tokens, _running_mean(rows), color=color[name], lw=1.2, label=name)
            steered = [row.threshold or row.weight for row in rows]
            weight.plot(tokens, steered, color=color[name], lw=1.4)
            if any(row.wanted for row in rows):
                wanted = [row.wanted or np.nan for row in rows]
                sparsity.plot(tokens, wanted, color="black", lw=0.8, ls=":")
            sparsity.plot(tokens, [row.sparsity for row in rows], color=color[name], lw=1.4)
        _mark_untrained(sparsity, tables, scores, color)
        every = [row.loss for rows in tables.values() for row in rows]
        loss.set_ylim(top=float(np.nanquantile(every, 0.97)) * 1.02)  # cuts the first steps off
        loss.set(ylabel="loss (mean NLL, nats), running mean")
        weight.set(ylabel="lambda, or threshold with a target")
        sparsity.set(ylabel="sparsity, mean over layers", ylim=(-0.02, 1.02))
        _draw_layers(figure, layers, tables[names[-1]])
        layers.set_title(names[-1], fontsize=9)
        figure.legend(*loss.get_legend_handles_labels(), loc="outside upper center", ncols=6)
        for axes in (loss, weight, sparsity, layers):
            axes.set_xlabel("tokens")
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    return figure


def _mark_untrained(
    axes: Axes,
    tables: Mapping[str, Sequence[Row]],
    scores: Mapping[str, Score],
    color: Mapping[str, str],
) -> None:
    """Mark every score without a table on the last token of the one that it goes on from."""
    signs, before = cycle("Ds^"), next(iter(tables))
    for name, score in scores.items():
        if name in tables:
            before = name
            continue
        end, label = tables[before][-1].tokens, f"{name}, on held-out text"
        axes.plot(end, score.sparsity, next(signs), color=color[before], ms=5, label=label)
        axes.legend(loc=(0.02, 0.06))


def _running_mean(rows: Sequence[Row]) -> list[float]:
    """Average each loss with those before it, over a fortieth of the phase: batches differ more
    than the branches do."""
    window = max(1, len(rows) // 40)
    losses = [row.loss for row in rows]
    return [fmean(losses[max(0, end - window) : end]) for end in range(1, len(rows) + 1)]


def _draw_layers(figure: Figure, axes: Axes, rows: Sequence[Row]) -> None:
    tokens = [row.tokens for row in rows]
    before = tokens[0] - (tokens[1] - tokens[0]) if len(tokens) > 1 else 0
    values = np.array([row.sparsity_L for row in rows]).T
    edges = np.arange(len(values) + 1) - 0.5
    mesh = axes.pcolormesh([max(0, before), *tokens], edges, values, vmax=1, cmap="viridis")
    figure.colorbar(mesh, ax=axes, label="sparsity")
    axes.grid(False)
    axes.set(ylabel="layer")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))

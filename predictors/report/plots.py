"""The report's figures as SVG text that follows the page's light or dark colors."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import colormaps
from matplotlib import pyplot as plt
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy import linspace

BLUE, ORANGE, GREEN, GRAY = "#3b76c4", "#d9822b", "#2f9e5f", "#8a8f98"
STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "svg.fonttype": "none",
    "svg.hashsalt": "sparsecast",
    "legend.frameon": False,
}


def recall_and_sparsity(layers: Sequence[dict[str, Any]]) -> str:
    """Plot recall, predicted and true sparsity over layers."""
    index = [row["layer"] for row in layers]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6.4, 3.0))
        axes.plot(index, [row["recall"] for row in layers], "o-", color=BLUE, label="recall")
        axes.plot(
            index,
            [row["predicted_sparsity"] for row in layers],
            "s-",
            color=ORANGE,
            label="predicted sparsity",
        )
        axes.plot(
            index,
            [row["true_sparsity"] for row in layers],
            "--",
            color=GRAY,
            label="true sparsity",
        )
        axes.set(xlabel="layer", ylim=(min(0.5, *_all(layers)) - 0.02, 1.01))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
        return _svg(figure)


def curves(
    layers: Sequence[dict[str, Any]], points: Sequence[Sequence[tuple[float, float]]]
) -> str:
    """Plot recall against predicted sparsity: one curve per layer, its operating point ringed.

    Layers run from dark to light, with a color scale.
    """
    index = [row["layer"] for row in layers]
    shades = ListedColormap(colormaps["viridis"](linspace(0.15, 0.92, max(index) - min(index) + 1)))
    norm = Normalize(min(index) - 0.5, max(index) + 0.5)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6.4, 3.6))
        for row, curve in zip(layers, points, strict=True):
            color = shades(norm(row["layer"]))
            axes.plot([p for _, p in curve], [r for r, _ in curve], color=color, lw=1.2)
            axes.plot(
                row["predicted_sparsity"],
                row["recall"],
                "o",
                color=color,
                markeredgecolor="black",
                markeredgewidth=0.9,
                ms=6,
                clip_on=False,
                zorder=3,
                gid=f"chosen-{row['layer']}",
            )
        left = max(0.0, min(row["predicted_sparsity"] for row in layers) - 0.3)
        lowest = min(0.5, *(row["recall"] - 0.05 for row in layers))
        axes.set(xlabel="predicted sparsity", ylabel="recall", xlim=(left, 1), ylim=(lowest, 1.01))
        if len(layers) > 1:
            ticks = MaxNLocator(nbins=8, integer=True, steps=[1, 2, 4, 5, 8, 10])
            mapped = ScalarMappable(norm, shades)
            scale = figure.colorbar(mapped, ax=axes, label="layer", ticks=ticks)
            assert scale.solids is not None
            scale.solids.set_rasterized(False)
        return _svg(figure)


def traffic_bars(layers: Sequence[dict[str, Any]]) -> str:
    """Plot every layer's traffic beside cascade, exact path and oracle."""
    index = [row["layer"] for row in layers]
    dot = 4 if len(index) <= 24 else 2
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6.4, 3.0))
        axes.bar(index, [row["traffic"] for row in layers], color=BLUE, label="traffic", width=0.6)
        for name, color in (("cascade", GREEN), ("exact", ORANGE), ("oracle", GRAY)):
            axes.plot(index, [row[name] for row in layers], "o--", color=color, label=name, ms=dot)
        axes.set(xlabel="layer", ylabel="share of dense FFN bytes", ylim=(0, None))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
        return _svg(figure)


def data_needed(entries: Sequence[dict[str, Any]]) -> str:
    """Plot mean recall and predicted sparsity over training tokens, fewest first."""
    tokens = [entry["train_tokens"] for entry in entries]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6.4, 2.6))
        for name, line, color in (
            ("recall", "o-", BLUE),
            ("predicted_sparsity", "s-", ORANGE),
        ):
            values = [entry["mean"][name] for entry in entries]
            axes.plot(tokens, values, line, color=color, label=name.replace("_", " "))
        axes.set(xlabel="training tokens", xscale="log")
        axes.set_xticks(tokens, [f"{count:,}" for count in tokens])
        axes.minorticks_off()
        axes.margins(y=0.15)
        axes.legend(ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
        return _svg(figure)


def _all(layers: Sequence[dict[str, Any]]) -> list[float]:
    names = ("recall", "predicted_sparsity", "true_sparsity")
    return [row[name] for row in layers for name in names]


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None}
    )
    plt.close(figure)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace("#000000", "currentColor")
    # A fixed size in points would not shrink on a narrow screen.
    return re.sub(r'(<svg[^>]*?) (?:height|width)="[\d.]+pt"', r"\1", text, count=1)

"""The report as one self-contained page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Predictors of {model}</title>
<style>
:root {{ color-scheme: light dark;
  --ink: #1c2128; --soft: #5b6470; --line: #d8dde3; --page: #fff; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #e6e9ed; --soft: #9aa4b0; --line: #3a424c; --page: #15191e; }}
}}
body {{ font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--page);
  max-width: 46rem; margin: 2.5rem auto; padding: 0 1.2rem; }}
h1 {{ font-size: 1.6rem; line-height: 1.2; margin-bottom: .2rem; }}
h2 {{ font-size: 1.15rem; margin-top: 2.4rem; }}
p.soft, figcaption {{ color: var(--soft); font-size: .92rem; }}
.cards {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .8rem;
  margin: 1.4rem 0; }}
.cards div {{ border: 1px solid var(--line); border-radius: 8px; padding: .7rem .9rem; }}
.cards b {{ display: block; font-size: 1.5rem; font-weight: 600; }}
.cards span {{ color: var(--soft); font-size: .85rem; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; font-size: .88rem;
  font-variant-numeric: tabular-nums; }}
th, td {{ text-align: right; padding: .3rem .55rem; border-bottom: 1px solid var(--line); }}
th {{ color: var(--soft); font-weight: 500; }}
tr:last-child td {{ font-weight: 600; border-bottom: 0; }}
figure {{ margin: 1rem 0; }} svg {{ width: 100%; height: auto; }}
svg text {{ fill: var(--ink); }}
dt {{ font-weight: 600; margin-top: .6rem; }} dd {{ margin: 0; color: var(--soft); }}
</style>
<h1>Activation predictors</h1>
<p class="soft">{model}, {layers} layers, rank {rank}, {dtype}, threshold {threshold}; scored on
{tokens} held-out tokens, with the weights as exported.</p>
<div class="cards">{cards}</div>
<h2>Layer by layer</h2>
<figure>{recall}<figcaption>What fired and was predicted (recall), and what is
skipped.</figcaption></figure>
<h2>What each threshold would give</h2>
<figure>{curves}<figcaption>The dot is the operating point that was calibrated; every other point
of a curve is another target for <code>sparsecast train</code>.</figcaption></figure>
<h2>Bytes that decoding reads</h2>
<figure>{traffic}<figcaption>FFN weights and predictor, as a share of the dense FFN in f16. A
predictor earns its place well below the exact path, which needs none.</figcaption></figure>
<h2>Numbers</h2>
<div class="scroll">{table}</div>
<h2>What they mean</h2>
<dl>
<dt>recall</dt><dd>Of the neurons that fired, the share that was predicted. What is missed is
lost.</dd>
<dt>predicted sparsity</dt><dd>The share of neurons the engine skips.</dd>
<dt>true sparsity</dt><dd>The share that is exactly zero: the most that could be skipped for
free.</dd>
<dt>precision</dt><dd>Of the predicted neurons, the share that fired.</dd>
<dt>AUC</dt><dd>How often a neuron that fired scores above one that did not, over all
thresholds.</dd>
<dt>traffic</dt><dd>Predictor + (1 - predicted sparsity): what PowerInfer reads.</dd>
<dt>cascade</dt><dd>The gate of the predicted neurons first, the rest only where it fired.</dd>
<dt>exact</dt><dd>No predictor: the whole gate, the rest where it fired. Cannot be wrong.</dd>
<dt>oracle</dt><dd>A perfect predictor that costs nothing.</dd>
</dl>
</html>
"""


def page(report: dict[str, Any], rows: Sequence[Sequence[str]], figures: Sequence[str]) -> str:
    """The whole page.

    Args:
        report: As report.json.
        rows: The table as text, header first, mean last.
        figures: Three SVGs: recall and sparsity, curves, traffic.
    """
    mean, change = report["mean"], report["perplexity_change"]
    cards = [
        (f"{mean['recall']:.1%}", "recall"),
        (f"{mean['predicted_sparsity']:.1%}", "predicted sparsity"),
        (f"{mean['true_sparsity']:.1%}", "true sparsity"),
        (f"{mean['traffic']:.2f}", f"traffic (exact {mean['exact']:.2f})"),
    ]
    if change is not None:
        cards.append((f"{change:+.2%}", "perplexity"))
    head, *body = (
        "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row) + "</tr>"
        for tag, row in zip(["th"] + ["td"] * (len(rows) - 1), rows, strict=True)
    )
    return PAGE.format(
        model=escape(report["model"]),
        layers=len(report["layers"]),
        rank=f"{mean['rank']:g}",
        dtype=escape(report["predictor_dtype"]),
        threshold=f"{report['threshold']:g}",
        tokens=f"{report['tokens']:,}",
        cards="".join(f"<div><b>{value}</b><span>{name}</span></div>" for value, name in cards),
        recall=figures[0],
        curves=figures[1],
        traffic=figures[2],
        table=f"<table>{head}{''.join(body)}</table>",
    )

"""report.html: the report as one self-contained page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from sparsecast.predictors.report.score import times_oracle
from sparsecast.predictors.report.wording import MIXTURE, TERMS, perplexity_sentence

Rows = Sequence[Sequence[str]]

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
  max-width: 48rem; margin: 2.5rem auto; padding: 0 1.2rem; }}
h1 {{ font-size: 1.6rem; line-height: 1.2; margin-bottom: .2rem; }}
h2 {{ font-size: 1.15rem; margin-top: 2.4rem; }}
h3 {{ font-size: 1rem; font-weight: 500; }}
h1, p, dd, code {{ overflow-wrap: anywhere; }}
p.verdict {{ font-size: 1.1rem; font-weight: 600; }}
p.soft, figcaption {{ color: var(--soft); font-size: .92rem; }}
.cards {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(8rem, 1fr)); gap: .8rem;
  margin: 1.4rem 0; }}
.cards div {{ border: 1px solid var(--line); border-radius: 8px; padding: .7rem .9rem; }}
.cards b {{ display: block; font-size: 1.5rem; font-weight: 600; line-height: 1.3; }}
.cards span, .cards small {{ display: block; font-size: .85rem; line-height: 1.35; }}
.cards small {{ color: var(--soft); }}
.scroll {{ overflow-x: auto; max-width: 100%; }}
table {{ border-collapse: separate; border-spacing: 0; width: 100%; font-size: .82rem;
  font-variant-numeric: tabular-nums; }}
th, td {{ text-align: right; padding: .3rem .35rem; border-bottom: 1px solid var(--line); }}
th {{ color: var(--soft); font-weight: 500; vertical-align: bottom; }}
th:first-child, td:first-child {{ text-align: left; position: sticky; left: 0;
  background: var(--page); }}
tr:last-child td {{ border-bottom: 0; }}
tr.main td {{ font-weight: 600; }}
figure {{ margin: 1rem 0; }} svg {{ width: 100%; height: auto; }}
svg text {{ fill: var(--ink); }}
dt {{ font-weight: 600; margin-top: .6rem; }} dd {{ margin: 0; color: var(--soft); }}
</style>
<h1>Activation predictors</h1>
<p class="soft">{model}, {layers} layers, rank {rank}, {dtype}, threshold {threshold}; scored with
the weights as exported, on {tokens} held-out tokens of {corpus}.</p>
<p class="verdict">{verdict}</p>
<p>{perplexity}</p>
<div class="cards">{cards}</div>
{side}{data}
<h2>Layer by layer</h2>
<figure>{recall}<figcaption>Recall, and the share of neurons that is skipped and could be
skipped.</figcaption></figure>
<div class="scroll">{table}</div>
{experts}<h2>Other thresholds</h2>
<figure>{curves}<figcaption>One curve per layer. The ringed dot is the calibrated operating point;
any other point of the curve can be a target of <code>sparsecast train</code>.</figcaption></figure>
<h2>Bytes that decoding reads</h2>
<figure>{traffic}<figcaption>Weights read per token, as a share of the dense FFN in f16. Predictors
are worth their misses if their traffic is well below the exact path's.</figcaption></figure>
<h2>Terms</h2>
<dl>
{terms}<dt>recall p5</dt><dd>5 % of the tokens have this recall or less.</dd>
<dt>first token</dt><dd>Recall on the first token of each document.</dd>
<dt>precision</dt><dd>Of the predicted neurons, the share that fires.</dd>
<dt>AUC</dt><dd>Probability that a neuron that fires scores above one that does not (area under the
ROC curve).</dd>
<dt>AP</dt><dd>Average precision: mean precision over all recalls. A random predictor has 1 - true
sparsity.</dd>
</dl>
<h2>How this report was made</h2>
<p class="soft">{date}, sparsecast {version}:<br><code>{command}</code></p>
</html>
"""


SIDE = """<h2>Side by side</h2>
<div class="scroll">{table}</div>
<p class="soft">Means over layers, on the same held-out tokens; the predictors of this report come
first. The exact path's traffic is {exact:.3f}, the oracle's {oracle:.3f}.</p>
"""
EXPERTS = """<h2>Expert by expert</h2>
<p class="soft">{sentence}</p>
<details><summary>{count} experts</summary><div class="scroll">{table}</div></details>
"""
DATA = """<h3>{shared}</h3>
<figure>{figure}</figure>
<div class="scroll">{table}</div>
"""


def page(
    report: dict[str, Any],
    figures: Sequence[str],
    rows: Rows,
    side: Rows,
    data: Mapping[str, tuple[str, Rows]],
    experts: Rows,
) -> str:
    """Render the whole page. Tables come as text, header first.

    Args:
        report: What report.json holds.
        figures: Three SVGs: recall and sparsity, curves, traffic.
        rows: One row per layer, the mean last.
        side: One row per predictor folder, this report's own first; empty to omit the section.
        experts: One row per expert; empty for a dense model.
        data: A figure and a table for each group of predictors that differ in training tokens.
    """
    mean = report["mean"]
    sections = "".join(
        DATA.format(shared=escape(shared), figure=figure, table=_table(table))
        for shared, (figure, table) in data.items()
    )
    return PAGE.format(
        model=escape(report["model"]),
        layers=len(report["layers"]),
        rank=f"{mean['rank']:g}",
        dtype=escape(report["predictor_dtype"]),
        threshold=f"{report['threshold']:g}",
        tokens=f"{report['tokens']:,}",
        corpus=escape(report["corpus"]),
        verdict=escape(report["verdict"]),
        perplexity=escape(perplexity_sentence(report)),
        terms=_terms(),
        date=report["date"],
        version=escape(report["version"]),
        command=escape(report["command"]),
        cards=_cards(report),
        side=SIDE.format(table=_table(side, main=1), **mean) if side else "",
        data=f"<h2>How much training data is enough</h2>\n{sections}" if sections else "",
        recall=figures[0],
        curves=figures[1],
        traffic=figures[2],
        table=_table(rows, main=len(rows) - 1),
        experts=EXPERTS.format(
            sentence=escape(MIXTURE), count=f"{len(experts) - 1:,}", table=_table(experts)
        )
        if experts
        else "",
    )


def _terms() -> str:
    sentences = {name: escape(text[0].upper() + text[1:]) + "." for name, text in TERMS.items()}
    return "".join(f"<dt>{name}</dt><dd>{text}</dd>\n" for name, text in sentences.items())


def _cards(report: dict[str, Any]) -> str:
    """Render the headline figures; those not measured are left out."""
    mean, times = report["mean"], times_oracle(report["mean"])
    reach = f"exact path {mean['exact']:.3f}, oracle {mean['oracle']:.3f}"
    cards = [
        (f"{mean['recall']:.1%}", "recall", f"5th percentile {mean['recall_p5']:.1%}"),
        (
            f"{mean['predicted_sparsity']:.1%}",
            "predicted sparsity",
            f"true {mean['true_sparsity']:.1%}",
        ),
        (f"{mean['traffic']:.3f}", "of the dense FFN's bytes", reach),
    ]
    if times is not None:
        cards.append((f"{times:.2f}×", "the oracle's traffic", "1 would be perfect"))
    for key, note in (
        ("perplexity_change", "predicted: with the model's own activation"),
        ("bundle_perplexity_change", "bundle: as PowerInfer computes it"),
    ):
        if (change := report[key]) is not None:
            cards.append((f"{change:+.2%}", "perplexity", note))
    return "".join(
        f"<div><b>{value}</b><span>{name}</span><small>{note}</small></div>"
        for value, name, note in cards
    )


def _table(rows: Rows, main: int | None = None) -> str:
    """Render a table with the row number `main` in bold."""
    lines = []
    for number, row in enumerate(rows):
        tag = "td" if number else "th"
        cells = "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row)
        mark = ' class="main"' if number == main else ""
        lines.append(f"<tr{mark}>{cells}</tr>")
    return f"<table>{''.join(lines)}</table>"

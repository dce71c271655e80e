"""report.html and its figures."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from sparsecast.predictors.report.plots import curves
from sparsecast.predictors.report.run import report
from sparsecast.predictors.report.score import score_layers
from sparsecast.predictors.report.wording import TERMS


def test_terms_are_explained_on_screen_and_pages(cfg, capsys):
    report(cfg)
    screen = capsys.readouterr().err
    for name in ("traffic", "cascade", "exact", "oracle"):
        assert f"\n{name}: {TERMS[name]}\n" in screen
        assert f"\n- {name}: {TERMS[name]}\n" in (cfg.out / "report.md").read_text()
        assert f"<dt>{name}</dt>" in (cfg.out / "report.html").read_text()


def test_every_table_scrolls_in_its_own_box(cfg, variant):
    report(replace(cfg, against=[variant("b", train_tokens=9), variant("c", train_tokens=90)]))
    page = (cfg.out / "report.html").read_text()
    assert page.count("<table>") == page.count('<div class="scroll"><table>') == 3
    assert ".scroll { overflow-x: auto;" in page
    assert "overflow-wrap: anywhere" in page


@pytest.mark.parametrize("count", [1, 2, 32, 80])
def test_layers_have_a_color_each_and_a_scale(count):
    layers = [
        {"layer": i, "recall": 0.9, "predicted_sparsity": 0.5 + i / 200} for i in range(count)
    ]
    svg = curves(layers, [[(1.0, 0.0), (0.9, 0.5), (0.0, 1.0)]] * count)
    lines = re.findall(
        r'<g id="line2d_\d+">\s*<path d="[^"]*"[^>]*stroke: (#\w+); stroke-width: 1.2', svg
    )
    assert len(lines) == len(set(lines)) == count
    assert (">layer<" in svg) == (count > 1)
    assert "<image" not in svg


def test_the_page_stands_alone(cfg):
    report(cfg)
    page = (cfg.out / "report.html").read_text()
    assert page.count("<svg") == 3
    assert "<script" not in page
    assert not re.search(r'(?:src|href)="(?!#)', page)
    assert "prefers-color-scheme: dark" in page
    assert (cfg.out / "report.md").read_text().count("\n| ") >= 3


def test_side_by_side_is_on_every_page_and_names_are_escaped(cfg, variant):
    report(replace(cfg, against=[variant("more <b>", recipe="reference")]))
    markdown, html = ((cfg.out / f"report.{kind}").read_text() for kind in ("md", "html"))
    for text in (markdown, html):
        assert "Side by side" in text
        assert "How much training data is enough" not in text
    assert "| more <b> | reference | 32 | f16 |" in markdown
    assert "more &lt;b&gt;" in html
    assert "more <b>" not in html


def test_the_operating_point_is_marked_and_lies_on_its_curve(cfg, trained, synthetic):
    scores = score_layers(trained, synthetic, "pred")
    for score in scores:
        recall, sparsity = zip(*score.curve, strict=True)
        at = np.interp(score.values["predicted_sparsity"], sparsity, recall)
        assert at == pytest.approx(score.values["recall"], abs=5e-3)
    report(cfg)
    page = (cfg.out / "report.html").read_text()
    assert [f'id="chosen-{layer}"' in page for layer in (0, 1, 2)] == [True, True, False]


def test_the_page_opens_with_the_headline_figures(cfg):
    mean = report(cfg)["mean"]
    page = (cfg.out / "report.html").read_text()
    cards = page[page.index('class="cards"') : page.index("<h2>")]
    for name in ("recall", "recall_p5", "predicted_sparsity", "true_sparsity"):
        assert f"{mean[name]:.1%}" in cards
    for name in ("traffic", "exact", "oracle"):
        assert f"{mean[name]:.3f}" in cards
    assert f"{mean['traffic'] / mean['oracle']:.2f}×" in cards

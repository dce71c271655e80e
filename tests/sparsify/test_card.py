"""The card and the record say what a reader elsewhere can use, and nothing of this machine."""

from __future__ import annotations

import json

import pytest

from sparsecast.sparsify.card import count, write_card
from sparsecast.sparsify.measure import Score
from sparsecast.sparsify.plan import publishable_name
from sparsecast.sparsify.samples import Sample

FACTS = {
    "parameters": 18_736,
    "model_type": "falcon",
    "tokens": 16_384,
    "corpus": "notes.txt",
    "corpus_tokens": 7_296,
    "activation": "fatrelu",
    "threshold": 0.25,
}


AFTER = (
    "| ProSparse after the shift | 75.00% | 55.00% / 80.00% / 90.00% | 1,234 | 3.000 | +50.00% |"
)


@pytest.mark.parametrize(
    ("number", "text"),
    [(16_384, "16,384"), (999_999, "999,999"), (1_000_000, "1.0M"), (159_973_376, "160.0M")],
)
def test_small_numbers_are_not_zero_millions(number, text):
    assert count(number) == text


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("builtin", "builtin"),
        ("wikitext:wikitext-2-raw-v1@train", "wikitext:wikitext-2-raw-v1@train"),
        ("owner/name", "owner/name"),
        ("/home/me/secret/notes.txt", "notes.txt"),
        ("../secret/notes.jsonl", "notes.jsonl"),
        ("secret/*.md", "*.md"),
        ("~/secret/notes", "notes"),
    ],
)
def test_a_corpus_is_named_without_its_path(spec, name):
    assert publishable_name(spec) == name


def tried(threshold: float, perplexity: float) -> dict[str, float]:
    return {"threshold": threshold, "perplexity": perplexity, "sparsity": 0.5}


RAISED = {"target_sparsity": 0.9, "max_perplexity_increase": None, "perplexity_bound": None}
BOUND = RAISED | {"max_perplexity_increase": 0.05, "perplexity_bound": 4.2}
PLAIN = {"activation": "relu", "threshold": 0.0}


@pytest.mark.parametrize(
    ("facts", "sentences"),
    [
        (
            RAISED | {"calibration_sweep": [tried(0.0, 4.0), tried(0.25, 4.1)]},
            "towards a sparsity of 90.00%. The one it is saved with, 0.25, was chosen on "
            "calibration text.",
        ),
        (
            RAISED | PLAIN | {"calibration_sweep": [tried(0.0, 4.0)]},
            "It is saved without one: plain ReLU is as sparse.",
        ),
        (
            BOUND | {"calibration_sweep": [tried(0.0, 4.0), tried(0.25, 4.1)]},
            "of 90.00%, while calibration perplexity was at most 5.00% above that of the dense "
            "start. The one it is saved with",
        ),
        (
            BOUND | PLAIN | {"calibration_sweep": [tried(0.0, 4.0), tried(0.25, 4.3)]},
            "without one: every one that was tried costs more perplexity than was allowed.",
        ),
        (
            BOUND | PLAIN | {"calibration_sweep": [tried(0.0, 4.3), tried(0.25, 4.4)]},
            "without one: plain ReLU alone costs more perplexity than was allowed.",
        ),
    ],
)
def test_the_card_names_the_recipe_of_a_target(tmp_path, facts, sentences):
    (tmp_path / "sparsify.json").write_text(json.dumps(FACTS | facts))
    write_card(tmp_path, "m", {"as saved": Score(3.0, 0.9, (0.9,), (0,))}, [])

    card = " ".join((tmp_path / "README.md").read_text().split())
    assert sentences in card
    assert "ProSparse" not in card


def test_the_card_reads_well_and_holds_samples_in_their_fences(tmp_path):
    (tmp_path / "sparsify.json").write_text(json.dumps(FACTS))
    scores = {
        "GELU original": Score(2.0, 0.0, (0.0, 0.0, 0.0), (0, 0, 0)),
        "ProSparse after the shift": Score(3.0, 0.75, (0.8, 0.9, 0.55), (0, 1_200, 34)),
    }

    samples = [Sample("Use ```text", "fences ````"), Sample("Why?", "So.", chat=True)]
    write_card(tmp_path, "m", scores, samples, [Sample("", "dense"), Sample("", "Thus.")])

    card = (tmp_path / "README.md").read_text()
    assert "A ReLU-sparse Falcon of 18,736 parameters" in card
    assert AFTER in card
    assert "against GELU" in card
    assert "trained on 16,384 tokens" in card
    assert "7,296 tokens of `notes.txt`" in card
    assert "`activation` is `fatrelu`" in card
    assert "````text\nUse ```text\n````" in card
    assert "`````text\nfences ````\n`````" in card
    assert "how the original goes on after as many tokens:\n\n```text\ndense\n```" in card
    assert "how the original answers after as many tokens:\n\n```text\nThus.\n```" in card
    assert card.index("Thus.") < card.index("and how the model answers:") < card.index("So.")


@pytest.mark.parametrize(
    ("act", "alone"), [("relu", True), ("relu2", True), ("fatrelu", False), ("drelu", False)]
)
def test_the_card_says_how_transformers_loads_the_model(tmp_path, act, alone):
    (tmp_path / "sparsify.json").write_text(json.dumps(FACTS | {"activation": act}))
    write_card(tmp_path, "m", {}, [])
    load = (tmp_path / "README.md").read_text().partition("## Load")[2].partition("## Samples")[0]
    assert ("transformers loads this model by itself" in load) == alone
    assert ("import sparsecast.integrations.transformers\n" in load) != alone
    assert "KeyError" not in load or not alone
    assert load.count("```python") == (1 if alone else 2)

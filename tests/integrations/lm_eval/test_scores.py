"""Scores side by side: the paired error against a formula, and what JSON and screen show."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from sparsecast.integrations.lm_eval.scores import (
    Score,
    paired_stderr,
    read_scores,
    show_tasks,
    side_by_side,
)


def results(values: list[float], **more: object) -> dict:
    samples = [{"doc_id": i, "filter": "none", "acc": value} for i, value in enumerate(values)]
    metrics = {
        "name": "t",
        "alias": "t",
        "sample_len": len(values),
        "acc,none": sum(values) / len(values),
        "acc_stderr,none": 0.1,
        **more,
    }
    return {
        "results": {"t": metrics},
        "samples": {"t": samples},
        "higher_is_better": {"t": {"acc": True}},
        "n-shot": {"t": 0},
        "versions": {"t": 1.0},
    }


def test_the_paired_error_is_that_of_the_mean_difference():
    rng = np.random.default_rng(0)
    dense, other = rng.integers(0, 2, 50), rng.integers(0, 2, 50)
    found = [read_scores(results(list(map(float, v))))["t"]["acc,none"] for v in (other, dense)]
    want = np.std(other - dense, ddof=1) / math.sqrt(50)
    assert paired_stderr(*found) == pytest.approx(want, rel=1e-12)


def test_a_metric_that_is_no_mean_has_no_paired_error():
    """A perplexity per document does not add up to that of the task."""
    read = results([0.0, 1.0, 1.0])
    read["results"]["t"]["acc,none"] = 0.9
    score = read_scores(read)["t"]["acc,none"]
    assert score == Score(0.9, 0.1, {})
    assert paired_stderr(score, score) is None


@pytest.mark.parametrize("absent", ["N/A", float("nan"), float("inf"), None, [1.0]])
def test_what_is_no_number_becomes_null(absent):
    score = read_scores(results([1.0, 0.0], **{"acc_stderr,none": absent}))["t"]["acc,none"]
    assert score.stderr is None
    assert read_scores(results([1.0], **{"f1,none": absent}))["t"]["f1,none"].value is None


def test_a_filter_is_read_with_its_own_samples():
    read = results([1.0, 0.0])
    read["results"]["t"] |= {"acc,strict": 0.0, "acc_stderr,strict": 0.0}
    read["samples"]["t"] += [{"doc_id": i, "filter": "strict", "acc": 0.0} for i in (0, 1)]
    scores = read_scores(read)["t"]
    assert scores["acc,none"].by_document == {0: 1.0, 1: 0.0}
    assert scores["acc,strict"].by_document == {0: 0.0, 1: 0.0}


def test_json_and_screen_have_every_mode(capsys):
    dense, other = results([1.0, 1.0, 0.0, 0.0]), results([1.0, 0.0, 0.0, 0.0])
    by_mode = {"dense": read_scores(dense), "exact": read_scores(dense)}
    by_mode |= {"predicted": read_scores(other), "bundle": None}
    tasks = side_by_side(by_mode, dense)
    row = json.loads(json.dumps(tasks))["t"]["metrics"]["acc,none"]
    assert row["higher_is_better"] is True
    assert row["bundle"] is None
    assert row["dense"] == {"value": 0.5, "stderr": 0.1}
    assert row["predicted"] == {
        "value": 0.25,
        "stderr": 0.1,
        "change": -0.25,
        "change_stderr": pytest.approx(0.25),
    }
    assert (tasks["t"]["documents"], tasks["t"]["version"]) == (4, 1.0)
    show_tasks(tasks)
    lines = [line.split() for line in capsys.readouterr().err.splitlines()]
    assert ["task", "n", "metric", "dense", "exact", "predicted", "bundle"] in lines
    assert ["t", "4", "acc", "0.5000", "0.5000", "0.2500"] in lines
    assert ["change", "+0.0000", "-0.2500"] in lines
    assert ["its", "stderr", "0.0000", "0.2500"] in lines

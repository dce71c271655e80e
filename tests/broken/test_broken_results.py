"""Broken results of earlier stages, as report, sparsify and push read them."""

from __future__ import annotations

from pathlib import Path

import pytest
from broken.results import (
    CARDS,
    EVALUATION,
    EVALUATIONS,
    MODELS,
    OPTIONS,
    REPORT,
    REPORTS,
    SPARSIFIED,
    write,
)
from broken.runner import judge, refused

from sparsecast.core.files import read_json, write_json, write_text
from sparsecast.integrations.hub.config import PushConfig
from sparsecast.integrations.hub.facts import model_facts, predictor_facts
from sparsecast.integrations.hub.scores import more_measures
from sparsecast.predictors.checkpoint import load_predictors
from sparsecast.predictors.report.result import read_evaluation
from sparsecast.sparsify.work_folder import is_finished


@pytest.fixture
def predictors(make_predictors, tmp_path):
    return load_predictors(make_predictors(tmp_path / "pred"))


@pytest.fixture
def folder(predictors, tmp_path) -> Path:
    return write(tmp_path / "results", predictors.nbytes, predictors.threshold)


def evaluation(folder: Path) -> None:
    """Report writes what it read into its own files."""
    found = read_evaluation(folder / EVALUATION)
    write_json(folder / "report", found)
    write_text(folder / "report.md", str(found["evaluated_on"]))
    assert found["perplexity_change"] > -1


def finished(folder: Path) -> None:
    assert is_finished(folder, OPTIONS)


def card(folder: Path) -> None:
    """Push makes a card of it, which is text and numbers."""
    facts = model_facts(read_json(folder / SPARSIFIED, "facts"), "relu", "0" * 16, "small")
    write_json(folder / "card", facts.measures)


@pytest.fixture
def report(predictors):
    def read(folder: Path) -> None:
        cfg = PushConfig(folder=folder, repo="a/b", report=folder / REPORT)
        (folder / EVALUATION).unlink(missing_ok=True)
        write_json(folder / "card", more_measures(cfg, predictor_facts(predictors), predictors))

    return read


def test_the_sound_results_are_read(folder, report):
    for read in (evaluation, finished, card, report):
        assert refused(read, folder) is None


@pytest.mark.parametrize("case", EVALUATIONS, ids=str)
def test_broken_evaluation(case, folder):
    judge(case, evaluation, folder)


@pytest.mark.parametrize("case", REPORTS, ids=str)
def test_broken_report(case, folder, report):
    judge(case, report, folder)


@pytest.mark.parametrize("case", MODELS, ids=str)
def test_broken_model(case, folder):
    judge(case, finished, folder)


@pytest.mark.parametrize("case", CARDS, ids=str)
def test_broken_card(case, folder):
    judge(case, card, folder)

"""report and evaluate check that they can write first, and show results before writing."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from sparsecast.core.errors import InputError
from sparsecast.predictors.checkpoint import PredictorSet
from sparsecast.predictors.config import EvaluateConfig, ReportConfig
from sparsecast.predictors.evaluate import evaluate
from sparsecast.predictors.predictor import Predictor
from sparsecast.predictors.report.run import report


@pytest.fixture
def asked(synthetic, recipe, trained, tmp_path) -> ReportConfig:
    return ReportConfig(
        predictors=recipe.out, activations=synthetic.folder, out=tmp_path / "report"
    )


@pytest.fixture
def nothing_scored(monkeypatch):
    def score(*_: object) -> None:
        pytest.fail("the predictors were scored")

    monkeypatch.setattr("sparsecast.predictors.report.run.score_layers", score)
    monkeypatch.setattr("sparsecast.predictors.evaluate.load_model", score)


def test_a_second_report_into_the_folder_is_refused(asked, nothing_scored):
    with (
        FileLock(asked.out.parent / ".report.lock"),
        pytest.raises(InputError, match="another report is writing it"),
    ):
        report(asked)


def test_a_report_leaves_no_lock(asked):
    report(asked)
    report(asked)
    assert [path.name for path in asked.out.parent.iterdir()] == ["report"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"out": Path("/proc/report")}, "/proc/report: cannot be written"),
        ({"json": Path("/proc/report.json")}, "--json: /proc/report.json cannot be written"),
        ({"json": Path("/")}, "--json: / cannot be written"),
    ],
)
def test_a_report_that_cannot_be_written_is_refused_first(asked, nothing_scored, options, words):
    with pytest.raises(InputError, match=words):
        report(replace(asked, **options))
    assert not list(asked.out.parent.iterdir())


def test_an_evaluation_that_cannot_be_written_is_refused_first(
    model_folder, recipe, nothing_scored
):
    asked = EvaluateConfig(
        model=str(model_folder), predictors=recipe.out, json=Path("/proc/x.json")
    )
    with pytest.raises(InputError, match=r"--json: /proc/x\.json cannot be written"):
        evaluate(asked)


def test_the_table_is_on_the_screen_if_the_report_cannot_be_written(asked, monkeypatch, capfd):
    write = Path.write_text

    def full(path: Path, text: str, **options: object) -> int:
        if "report.html" not in path.name:
            return write(path, text, **options)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left on device") as failed:
        report(asked)
    shown = capfd.readouterr().err
    assert "held-out scores" in shown
    assert "mean" in shown
    said = str(failed.value)
    assert f"{asked.out}: cannot be written (report.html: No space left on device)" in said
    assert "the report needs" in said
    assert "the scores are on the screen; make room and run the same command again" in said
    assert not list(asked.out.parent.iterdir())


def test_the_perplexities_are_on_the_screen_if_their_json_cannot_be_written(
    model_folder, corpus, tmp_path, monkeypatch, capfd
):
    PredictorSet([Predictor(torch.ones(2, 64), torch.ones(1280, 2))] * 3, 0.0, None).save(
        tmp_path / "pred"
    )

    def full(path: Path, _: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("sparsecast.core.disk.write_text", full)
    asked = EvaluateConfig(
        model=str(model_folder),
        predictors=tmp_path / "pred",
        corpus=str(corpus),
        tokens=60,
        seq_len=60,
        json=tmp_path / "x.json",
    )
    with pytest.raises(OSError, match="No space left.*the result needs .* is on the screen"):
        evaluate(asked)
    assert "perplexity on 60 held-out tokens" in capfd.readouterr().err

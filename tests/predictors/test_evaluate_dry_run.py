"""--dry-run of evaluate tells what the run then takes, and leaves no trace."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from sparsecast.cli.main import main
from sparsecast.core import dry_run, memory
from sparsecast.core.distributed import DistributedContext
from sparsecast.core.errors import InputError
from sparsecast.core.models.loading import load_model
from sparsecast.predictors import evaluate_dry_run
from sparsecast.predictors.checkpoint import PredictorSet
from sparsecast.predictors.config import EvaluateConfig
from sparsecast.predictors.evaluate import evaluate
from sparsecast.predictors.evaluate_dry_run import forecast
from sparsecast.predictors.predictor import Predictor


@pytest.fixture(autouse=True)
def _once(monkeypatch):
    """Measure everything once."""
    monkeypatch.setattr(dry_run, "LONG", 0)


@pytest.fixture
def asked(model_folder, corpus, tmp_path):
    layers = [Predictor(torch.randn(8, 64).half(), torch.randn(1280, 8).half()) for _ in range(3)]
    PredictorSet(layers, 0.0, None).save(tmp_path / "pred")
    return EvaluateConfig(
        model=str(model_folder),
        predictors=tmp_path / "pred",
        corpus=str(corpus),
        tokens=400,
        seq_len=64,
        device="cpu",
        json=tmp_path / "evaluate.json",
    )


def test_it_tells_what_the_run_takes(asked, tmp_path):
    model, _ = load_model(asked.model)
    before = sorted(tmp_path.rglob("*"))

    found = forecast(replace(asked, dry_run=True))

    assert sorted(tmp_path.rglob("*")) == before
    assert found.host["weights"] == sum(weight.nbytes for weight in model.parameters())
    assert 0 < found.seconds["perplexities"] < 600
    half = forecast(replace(asked, tokens=40))
    assert half.host["weights"] == found.host["weights"]
    with pytest.raises(InputError, match=r"dry_run: .*evaluate_dry_run\.forecast"):
        evaluate(replace(asked, dry_run=True))


def test_the_command_ends_well(asked, capfd):
    args = ["--model", asked.model, "--predictors", str(asked.predictors), "--tokens", "400"]
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", *args, "--corpus", str(asked.corpus), "--device", "cpu", "--dry-run"])
    assert ended.value.code == 0
    told = " ".join(capfd.readouterr().err.split())
    assert "evaluate: a dry run, nothing is written disk none" in told


def test_tasks_have_no_time(asked):
    by_default = {"tokens": 20_000, "seq_len": 512}
    cfg = replace(asked, corpus=None, tasks=["arc_easy"], batch_size=1, **by_default)
    found = forecast(cfg)
    assert list(found.seconds) == ["loading"]
    assert "without --tasks" in found.note


def test_a_model_that_cannot_fit_is_refused_by_both(asked, monkeypatch):
    """`bundle` rounds the weights in place, also those that are a map of their file."""
    monkeypatch.setattr(memory, "host_limit", lambda: 1_000_000)
    loads = ("predictors.evaluate.load_model", "predictors.evaluate_dry_run.load_first_layers")
    for name in loads:
        monkeypatch.setattr(f"sparsecast.{name}", lambda *_, **__: pytest.fail("loaded"))
    for dtype in ("float32", "float16"):
        for run in (evaluate, forecast):
            with pytest.raises(InputError, match=rf"the model in {dtype} needs .* can get 1 MB"):
                run(replace(asked, dtype=dtype))


def test_other_ranks_tell_nothing(asked, monkeypatch, capfd):
    other = nullcontext(DistributedContext(1, 2, 1))
    monkeypatch.setattr(evaluate_dry_run, "distributed_context", lambda: other)
    assert forecast(asked) is None
    assert capfd.readouterr() == ("", "")

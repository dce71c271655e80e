"""--dry-run of train tells what the run then takes, and leaves no trace."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparsecast.cli.main import main
from sparsecast.core import disk, dry_run, memory
from sparsecast.core.distributed import DistributedContext
from sparsecast.core.errors import InputError
from sparsecast.core.models.shape import ModelShape
from sparsecast.core.run_record import begin_run
from sparsecast.predictors import train_measure
from sparsecast.predictors.calibration.objective import Objective
from sparsecast.predictors.config import TrainConfig
from sparsecast.predictors.planning import make_plan, open_source, resolve
from sparsecast.predictors.recipes import initial_weights
from sparsecast.predictors.train import train
from sparsecast.predictors.train_dry_run import CALIBRATION, CHECKS, STEPS, WARM, forecast
from sparsecast.predictors.training import trainer
from sparsecast.predictors.training.lightning_module import PredictorModule
from sparsecast.predictors.training.needs import check_fits, disk_bytes, state_bytes
from sparsecast.predictors.training.plan import TrainingPlan
from sparsecast.predictors.training.schedule import Schedule

SHAPES = {"7b": (4096, 11008, 32), "13b": (5120, 13824, 40), "70b": (8192, 28672, 80)}
"""Hidden size, FFN width, layers."""


@pytest.fixture(autouse=True)
def _once(monkeypatch):
    """Measure everything once."""
    monkeypatch.setattr(dry_run, "LONG", 0)
    monkeypatch.setattr(train_measure, "ENOUGH", 0)


@pytest.fixture
def asked(synthetic, tmp_path):
    return TrainConfig(
        activations=synthetic.folder, out=tmp_path / "pred", rank=32, epochs=2, batch_size=1024
    )


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({}, [WARM, STEPS, CHECKS, CALIBRATION]),
        ({"predictor_dtype": "f16"}, [WARM, STEPS, CHECKS, CALIBRATION]),
        ({"recipe": "reference"}, [STEPS, CHECKS, CALIBRATION]),
    ],
)
def test_it_tells_what_the_run_then_takes(asked, tmp_path, capfd, options, parts):
    cfg = replace(asked, **options)

    found = forecast(replace(cfg, dry_run=True))

    assert not list(tmp_path.iterdir())
    assert found is not None
    assert [name for name, seconds in found.seconds.items() if seconds] == parts
    request = resolve(cfg, DistributedContext())
    plan = make_plan(request, open_source(request))
    assert found.disk == disk_bytes(plan)
    if "recipe" not in options:
        start = initial_weights(plan, open_source(request), plan.free_units)
        module = PredictorModule(
            start, dtype=plan.dtype, objective=plan.objective, schedule=plan.schedule
        )
        # weights, gradients, two moments, best epoch
        assert state_bytes(plan) == 20 * sum(weight.numel() for weight in module.parameters())
    train(cfg)
    assert forecast(replace(cfg, dry_run=True)) is None
    assert "already trained" in capfd.readouterr().err
    with pytest.raises(InputError, match=r"dry_run: .*train_dry_run\.forecast"):
        train(replace(cfg, dry_run=True))


def test_the_command_ends_well(asked, tmp_path, capfd):
    args = ["--activations", str(asked.activations), "--out", str(asked.out), "--rank", "32"]
    with pytest.raises(SystemExit) as ended:
        main(["train", *args, "--recipe", "reference", "--dry-run"])
    assert ended.value.code == 0
    told = " ".join(capfd.readouterr().err.split())
    assert re.search(r"pred: train: a dry run, .* disk [\d.]+ [kM]B, .* steps [0-9]:0", told)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("limit", ["disk", "memory"])
def test_what_cannot_fit_is_refused_by_both_before_training(asked, monkeypatch, limit, capfd):
    if limit == "disk":
        monkeypatch.setattr(disk, "free_bytes", lambda _: 100_000)
    else:
        monkeypatch.setattr(memory, "host_limit", lambda: 100_000)
    monkeypatch.setattr(trainer.L, "Trainer", lambda **_: pytest.fail("training began"))
    said = []
    for run in (train, forecast):
        with pytest.raises(InputError, match=r"training needs [\d.]+ kB.*, but .* 100 kB") as no:
            run(asked)
        said.append(str(no.value))
    assert said[0] == said[1]
    assert "not measured, since the run does not fit" in capfd.readouterr().err
    assert not list(asked.out.parent.iterdir())


def test_a_running_model(model_folder, corpus, tmp_path):
    cfg = TrainConfig(
        model=str(model_folder),
        corpus=str(corpus),
        out=tmp_path / "pred",
        tokens=4_000,
        seq_len=64,
        epochs=2,
        batch_size=128,
        rank=32,
        device="cpu",
    )

    found = forecast(cfg)

    assert not list(tmp_path.iterdir())
    assert found is not None
    assert found.seconds["the model"] > 0
    assert found.seconds[STEPS] > 0
    assert found.host["the model's weights"] > 0


def test_a_running_model_is_refused_before_it_records(model_folder, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "host_limit", lambda: 100_000)
    monkeypatch.setattr(
        "sparsecast.predictors.planning.open_online_source", lambda _: pytest.fail("recorded")
    )
    cfg = TrainConfig(model=str(model_folder), corpus=str(corpus), out=tmp_path / "pred", rank=32)
    with pytest.raises(InputError, match="training needs .* but this process can get 100 kB"):
        train(cfg)


@pytest.mark.parametrize("size", SHAPES)
def test_large_shapes_by_hand(size, asked, tmp_path, monkeypatch):
    hidden, ffn, layers = SHAPES[size]
    plan = TrainingPlan(
        out=tmp_path / "pred",
        recipe="default",
        shape=ModelShape(layers=layers, hidden_size=hidden, ffn_width=ffn, ffn_matrices=3),
        dtype="q4_0",
        ranks=[hidden * 5 // 8] * layers,
        schedule=Schedule(num_epochs=6, batch_tokens=512, peak_lr=3e-3),
        steps_per_epoch=None,
        objective=Objective(),
        loss="count",
        model=None,
        clip_labels=None,
        own_layers=list(range(layers)),
        device=torch.device("cpu"),
        context=DistributedContext(),
        data_parallel=False,
        options={},
        run=begin_run("train", asked),
    )
    # Four of the hidden units are the bias; an offset for each neuron is trained beside.
    weights = layers * ((hidden * 5 // 8 - 4) * (hidden + ffn) + ffn)
    assert state_bytes(plan) == 20 * weights
    assert disk_bytes(plan) == pytest.approx(32 * weights, rel=0.01)
    monkeypatch.setattr(disk, "free_bytes", lambda _: 10**18)
    monkeypatch.setattr(memory, "host_limit", lambda: 20 * weights)
    check_fits(plan)
    monkeypatch.setattr(memory, "host_limit", lambda: 20 * weights - 1)
    with pytest.raises(InputError, match=f"{Path(plan.out).name}: training needs"):
        check_fits(plan)


def test_predictors_made_with_other_options_are_refused(asked):
    train(asked)
    with pytest.raises(InputError, match=r"made differently \(rank was 32, now 16"):
        forecast(replace(asked, rank=16))
    assert forecast(asked) is None

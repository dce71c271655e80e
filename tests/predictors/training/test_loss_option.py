"""`--loss`: what a miss weighs, where that comes from by default, and that it helps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sparsecast.core.bitmask import unpack
from sparsecast.core.distributed import DistributedContext
from sparsecast.core.earlier_runs import compare_options
from sparsecast.core.errors import InputError
from sparsecast.predictors.config import ReportConfig, TrainConfig
from sparsecast.predictors.planning import resolve
from sparsecast.predictors.report.run import report
from sparsecast.predictors.train import train


@pytest.fixture
def cfg(with_energies, tmp_path) -> TrainConfig:
    return TrainConfig(
        activations=with_energies.folder,
        out=tmp_path / "pred",
        rank=32,
        epochs=1,
        batch_size=128,
        device="cpu",
    )


def test_by_value_more_of_the_energy_is_found_at_equal_sparsity(
    synthetic, recipe, edit_store, tmp_path
):
    """Half of the neurons add 16 times what the others do, and the rank is too small for all."""

    def with_codes(tensors: dict[str, torch.Tensor]) -> None:
        code_F = (144 + 32 * (torch.arange(200) % 2)).to(torch.uint8)
        for layer in (0, 1):
            mask_TF = unpack(tensors[f"layer.{layer}.mask"], 200)
            tensors[f"layer.{layer}.energy"] = code_F.expand_as(mask_TF)[mask_TF]

    store = edit_store(synthetic, tmp_path / "acts", with_codes, energy=True)
    found = {}
    for loss in ("count", "value"):
        cfg = replace(
            recipe,
            activations=store.folder,
            out=tmp_path / loss,
            loss=loss,
            rank=8,
            epochs=2,
            target_recall=None,
            target_sparsity=0.9,
        )
        train(cfg)
        told = ReportConfig(
            predictors=cfg.out, activations=store.folder, out=tmp_path / f"{loss}-report"
        )
        found[loss] = report(told)["mean"]
        assert found[loss]["predicted_sparsity"] == pytest.approx(0.9, abs=0.01)
    missed = {loss: 1 - scores["energy_recall"] for loss, scores in found.items()}
    assert missed["value"] < 0.8 * missed["count"]
    assert found["value"]["recall"] < found["count"]["recall"]


def test_value_is_the_default_where_there_are_energies(cfg, recipe):
    def loss_of(asked: TrainConfig) -> str:
        return resolve(asked, DistributedContext()).options["loss"]

    assert loss_of(cfg) == "value"
    assert loss_of(replace(cfg, loss="count")) == "count"
    assert loss_of(replace(cfg, recipe="reference")) == "count"
    assert loss_of(recipe) == "count"


def test_runs_of_before_the_option_counted():
    (change,) = compare_options({}, {"loss": "value"})
    assert "loss was 'count', now 'value': give --loss count, as runs before" in change
    assert compare_options({}, {"loss": "count"}) == []


def test_what_has_no_values_is_refused(cfg, recipe):
    with pytest.raises(InputError, match="--loss value: .* has no energies to weigh misses by"):
        train(replace(recipe, loss="value"))
    for other in ("svd", "reference"):
        with pytest.raises(InputError, match=f"--recipe default, not {other}"):
            replace(cfg, recipe=other, model="m", loss="value", target_sparsity=None)

"""Recipes, objectives and ranks, checked by counting decisions again."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsecast.core.errors import InputError
from sparsecast.core.models.loading import load_model
from sparsecast.core.models.perplexity import perplexity
from sparsecast.predictors.baselines.public_recipe import PublicRecipeModule
from sparsecast.predictors.baselines.svd import gate_of, whitened
from sparsecast.predictors.calibration.bias import bias_of
from sparsecast.predictors.calibration.operating_point import RATIO, most_misses, recorded_documents
from sparsecast.predictors.config import TrainConfig
from sparsecast.predictors.layer_data import layer_batches
from sparsecast.predictors.metrics import Counts, count, traffic
from sparsecast.predictors.model_in_loop import predictors_in_loop
from sparsecast.predictors.predictor import rms_normalized
from sparsecast.predictors.recipes import uncalibrated
from sparsecast.predictors.train import train
from sparsecast.predictors.training.lightning_module import PredictorModule
from sparsecast.predictors.training.rank_selection import _spend
from sparsecast.predictors.training.warm_start import moments, warm_start

CPU = torch.device("cpu")


def start(store, free_units: list[int], dtype: str):
    return warm_start((moments(store, layer, CPU) for layer in (0, 1)), free_units, dtype)


def predictor_module(cfg: TrainConfig, dtype: str, weights) -> PredictorModule:
    return PredictorModule(weights, dtype=dtype, objective=cfg.objective, schedule=cfg.schedule)


def public_module(cfg: TrainConfig, store, rank: int) -> PublicRecipeModule:
    return PublicRecipeModule(
        cfg.schedule, layers=[0, 1], rank=rank, shape=store.manifest.model_shape
    )


def recount(predictor, store, split: str, layer: int) -> Counts:
    total = Counts(0, 0, 0, 0)
    for x_TD, active_TF in layer_batches(store, split, layer):
        total = total.plus(count(predictor.logits(x_TD) >= 0, active_TF))
    return total


@pytest.fixture(scope="session")
def quantized(recipe, tmp_path_factory):
    """Predictors of the synthetic store by format: one epoch, calibrated to a recall of 0.95."""
    out = tmp_path_factory.mktemp("quantized")
    return {
        dtype: train(replace(recipe, out=out / dtype, predictor_dtype=dtype, epochs=1))
        for dtype in ("q8_0", "q4_0")
    }


@pytest.mark.parametrize("dtype", ["q8_0", "q4_0"])
def test_quantized_predictors_reach_the_target_as_stored(quantized, synthetic, dtype):
    predictors = quantized[dtype]
    assert predictors.manifest.dtypes == [dtype] * 2
    for layer, predictor in enumerate(predictors.layers):
        counts = recount(predictor, synthetic, "calibration", layer)
        assert counts.recall == pytest.approx(0.95, abs=0.003)
        assert predictors.manifest.calibration[layer]["recall"] == counts.recall
        assert counts.predicted_sparsity > 0.4
        for one, two in zip(predictor.weights, predictor.stored().weights, strict=True):
            assert torch.equal(one, two)


def test_a_module_computes_what_the_file_will(synthetic, recipe):
    """Logits in training equal those of the exported predictor."""
    for dtype in ("f16", "q8_0", "q4_0"):
        free = 32 - (0 if dtype == "f16" else 4)
        module = predictor_module(recipe, dtype, start(synthetic, [free] * 2, dtype))
        x_TD = synthetic.rows("calibration", 0, 1).x_TD
        x_LBD = rms_normalized(x_TD)[None].expand(2, -1, -1)
        logits_LBF, bias_LB1 = module(x_LBD)
        weights = module.best_weights([free] * 2)[1]
        before = uncalibrated(weights, dtype, synthetic, 1, CPU)
        predictor = before.at_threshold(0.0)
        want = predictor.logits(x_LBD[1])
        scale = want.abs().max().item()
        tolerance = 2e-3 * scale if dtype == "f16" else 1e-4 * scale
        assert (logits_LBF[1] - want).abs().max().item() < tolerance
        # In f16 training assumes b = 1, which least squares only approximates.
        b_T1 = bias_of(predictor, before.constant_R, x_LBD[1])
        tolerance = 0.25 if dtype == "f16" else 2e-3
        torch.testing.assert_close(
            bias_LB1[0].expand_as(b_T1) if dtype == "f16" else bias_LB1[1],
            b_T1,
            rtol=tolerance,
            atol=1e-3,
        )


def test_padding_of_smaller_ranks_stays_zero(synthetic, recipe):
    weights = start(synthetic, [28, 12], "q4_0")
    assert not weights.fc1_LRD[1, 12:].any()
    module = predictor_module(recipe, "q4_0", weights)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    x_LBD = torch.stack([synthetic.rows("train", 0, layer).x_TD[:64] for layer in (0, 1)])
    for _ in range(3):
        logits_LBF, _bias = module(rms_normalized(x_LBD))
        optimizer.zero_grad()
        logits_LBF.square().mean().backward()
        optimizer.step()
    assert not module.fc1_LRD[1, 12:].any()
    assert not module.fc2_LFR[1, :, 12:].any()
    assert module.fc1_LRD[0, 12:].any()


def test_a_step_equals_the_public_recipes(synthetic, recipe, monkeypatch):
    """One step against AdamW on a loss computed for each layer alone."""
    cfg = TrainConfig(activations=recipe.activations, out=recipe.out, recipe="reference")
    schedule = cfg.schedule
    assert (schedule.batch_tokens, schedule.peak_lr, schedule.num_epochs) == (1024, 1e-3, 20)
    torch.manual_seed(5)
    module = public_module(cfg, synthetic, rank=16)
    monkeypatch.setattr(module, "log", lambda *_, **__: None)
    both = (module.fc1_LRD.data, module.fc2_LFR.data)
    before = [(a.clone(), b.clone()) for a, b in zip(*both, strict=True)]
    rows = [synthetic.rows("train", 0, layer, 0, 64) for layer in (0, 1)]
    batch = type("B", (), {})()
    batch.x_LBD = torch.stack([r.x_TD for r in rows])
    batch.mask_LBP = torch.stack([r.mask_TP for r in rows])
    optimizer = module.configure_optimizers()
    module.training_step(batch, 0).backward()
    optimizer.step()

    for layer, (fc1, fc2) in enumerate(before):
        fc1.requires_grad_()
        fc2.requires_grad_()
        x = rows[layer].x_TD.float()
        bits = np.unpackbits(rows[layer].mask_TP.numpy(), axis=1, bitorder="little")[:, :200]
        y = torch.from_numpy(bits).float()
        p = torch.sigmoid((x @ fc1.T).relu() @ fc2.T)
        w = y.mean() + 0.005
        loss = torch.nn.functional.binary_cross_entropy(p, y, weight=y * (1 - w) + w)
        alone = torch.optim.AdamW([fc1, fc2], lr=1e-3, weight_decay=0.01)
        loss.backward()
        alone.step()
        torch.testing.assert_close(module.fc1_LRD[layer].data, fc1.data, rtol=1e-3, atol=2e-5)
        torch.testing.assert_close(module.fc2_LFR[layer].data, fc2.data, rtol=1e-3, atol=2e-5)


def test_the_public_recipe_keeps_best_recalls_and_stops_each_layer(recipe, synthetic, monkeypatch):
    module = public_module(replace(recipe, target_recall=None, recipe="reference"), synthetic, 8)
    monkeypatch.setattr(module, "log", lambda *_, **__: None)
    trainer = type("T", (), {"should_stop": False, "current_epoch": 0})()
    monkeypatch.setattr(
        PublicRecipeModule, "current_epoch", property(lambda _: trainer.current_epoch)
    )
    monkeypatch.setattr(PublicRecipeModule, "trainer", trainer)
    # Layer 0 is best at epoch 2 and stops after 7; layer 1 improves again at epoch 6.
    recalls = [(0.5, 0.5), (0.6, 0.7), (0.8, 0.6)] + [(0.7, 0.6)] * 3 + [(0.7, 0.75)]
    recalls += [(0.1, 0.1), (0.9, 0.1), (0.9, 0.1), (0.9, 0.1), (0.9, 0.1)]
    for epoch, pair in enumerate(recalls):
        trainer.current_epoch = epoch
        module._counts = [Counts(int(100 * r), 100, 100, 1000) for r in pair]
        module.on_validation_epoch_end()
        assert trainer.should_stop == (epoch == 11)
    assert module.best_epoch_L.tolist() == [2, 6]
    torch.testing.assert_close(module.best_recall_L, torch.tensor([0.8, 0.75]))


def test_the_svd_at_full_rank_equals_the_gate(model_folder, acts):
    model, _ = load_model(str(model_folder), device="cpu")
    weight_FD, constant_F = gate_of(model, 1)
    layer = model.model.layers[1]
    x_TD = acts.rows("train", 0, 1, 0, 200).x_TD
    with torch.inference_mode():
        gate_TF = layer.mlp.gate_proj(layer.post_attention_layernorm(x_TD.float()))
    torch.testing.assert_close(
        rms_normalized(x_TD) @ weight_FD.T + constant_F, gate_TF, rtol=1e-3, atol=1e-3
    )
    linear_gate = whitened(moments(acts, 1, CPU), weight_FD, constant_F, 0.2, 64, 130, "f16")
    linear = (rms_normalized(x_TD) @ linear_gate.fc1_RD.T).relu() @ linear_gate.fc2_FR.T
    scale_F = linear.square().mean(0).sqrt() / gate_TF.square().mean(0).sqrt()
    torch.testing.assert_close(linear / scale_F, gate_TF, rtol=2e-2, atol=2e-2)


def test_a_smaller_svd_beats_chance_and_needs_no_training(model_folder, acts, tmp_path):
    cfg = TrainConfig(
        activations=acts.folder,
        out=tmp_path / "svd",
        recipe="svd",
        model=str(model_folder),
        predictor_dtype="f16",
        rank=66,
        target_recall=0.9,
        device="cpu",
    )
    predictors = train(cfg)
    for layer, predictor in enumerate(predictors.layers):
        counts = recount(predictor, acts, "calibration", layer)
        assert predictor.rank == 66
        assert counts.recall == pytest.approx(0.9, abs=0.003)
        assert counts.predicted_sparsity > 0.1 + 0.3 * counts.true_sparsity  # chance is 0.1
    assert not (cfg.out / "logs").exists()


@pytest.mark.parametrize("target", [0.001, 0.02, 0.3])
def test_the_bisection_ends_within_a_tenth_of_the_most_misses(target):
    last = {}

    def change(misses: float) -> float:
        value = 3 * misses**1.5
        if value <= target:
            last["fits"] = misses
        return value

    assert most_misses(change, target) is None
    exact = min(0.3, (target / 3) ** (2 / 3))
    assert last["fits"] <= exact <= last["fits"] * RATIO
    assert most_misses(lambda misses: 1.0, target) == 1.0


def test_a_perplexity_target_is_met_on_the_calibration_documents(
    model_folder, acts, tmp_path, monkeypatch
):
    cfg = TrainConfig(
        activations=acts.folder,
        out=tmp_path / "p",
        model=str(model_folder),
        batch_size=256,
        target_perplexity=0.01,
        epochs=1,
        rank=64,
        device="cpu",
    )
    predictors = train(cfg)
    model, _ = load_model(str(model_folder), device="cpu")
    data = recorded_documents(acts)
    dense = perplexity(model, data)
    with predictors_in_loop(model, predictors):
        assert perplexity(model, data) <= dense * 1.01
    recalls = [layer["recall"] for layer in predictors.manifest.calibration]
    assert max(recalls) - min(recalls) < 0.01
    monkeypatch.setattr("sparsecast.predictors.calibration.operating_point.FEWEST_MISSES", 0.25)
    with pytest.raises(InputError, match=r"still .* above 0.0001%; train with a larger --rank"):
        train(replace(cfg, out=tmp_path / "q", target_perplexity=1e-6))
    other = tmp_path / "other"
    shutil.copytree(model_folder, other)
    weights = load_file(other / "model.safetensors")
    save_file({name: 1.01 * w for name, w in weights.items()}, other / "model.safetensors")
    with pytest.raises(InputError, match=r"is not the model that .* was recorded from"):
        train(replace(cfg, out=tmp_path / "q", model=str(other)))


def test_recorded_documents_are_the_recorded_tokens(acts):
    data = recorded_documents(acts)
    ids = torch.cat(
        [acts.tokens("calibration", i)[0] for i in range(len(acts.shards("calibration")))]
    )
    found = torch.cat([batch.ids_BS[batch.keep_BS] for batch in data])
    assert sorted(found.tolist()) == sorted(ids.tolist())
    assert all((batch.ids_BS[:, 0] == 1).all() for batch in data)  # BOS


def test_a_traffic_budget_is_met_and_spent(recipe, synthetic, tmp_path):
    cfg = replace(
        recipe, out=tmp_path / "p", target_recall=None, traffic_budget=0.5, epochs=1, rank=16
    )
    predictors = train(cfg)
    counts = [recount(p, synthetic, "calibration", i) for i, p in enumerate(predictors.layers)]
    traffics = [
        traffic(
            rank=16,
            hidden_size=64,
            ffn_width=200,
            matrices=3,
            recall=c.recall,
            predicted_sparsity=c.predicted_sparsity,
            true_sparsity=c.true_sparsity,
        ).traffic
        for c in counts
    ]
    assert sum(traffics) / 2 == pytest.approx(0.5, abs=0.01)
    with pytest.raises(InputError, match="--traffic-budget: got 0.05, but the predictors"):
        train(replace(cfg, out=tmp_path / "q", traffic_budget=0.05))


def test_a_predictor_budget_is_met_and_spent(recipe, synthetic, tmp_path):
    cfg = replace(
        recipe, out=tmp_path / "p", rank=None, predictor_budget=0.2, epochs=1, predictor_dtype=None
    )
    predictors = train(cfg)
    share = sum(layer.nbytes for layer in predictors.layers) / (2 * 3 * 64 * 200 * 2)
    assert 0 < share <= 0.2
    assert all(layer.dtype == "q4_0" and layer.rank % 32 == 0 for layer in predictors.layers)
    with pytest.raises(InputError, match=r"--predictor-budget: got 0.01, expected at least 0."):
        train(replace(cfg, out=tmp_path / "q", predictor_budget=0.01))


def test_blocks_go_where_they_lower_traffic_most():
    tried = [1, 2, 4]
    gains = [[0.5, 0.6, 0.9], [0.5, 0.7, 0.71], [0.8, 0.801, 0.802]]
    assert _spend(gains, tried, 7, unit=0.01) == [4, 2, 1]
    assert _spend(gains, tried, 4, unit=0.01) == [1, 2, 1]
    assert _spend(gains, tried, 99, unit=0.01) == [4, 2, 1]
    assert math.isclose(sum(_spend(gains, tried, 3, unit=0.01)), 3)


def test_the_svd_needs_the_recorded_model_and_keeps_an_unfinished_run(
    model_folder, acts, tmp_path, family_like
):
    cfg = TrainConfig(
        activations=acts.folder,
        out=tmp_path / "p",
        recipe="svd",
        model=str(family_like),
        predictor_dtype="f16",
        device="cpu",
    )
    with pytest.raises(InputError, match=r"is not the model that .* was recorded from"):
        train(cfg)
    work = tmp_path / ".p.train"
    work.mkdir()
    (work / "last.ckpt").write_bytes(b"hours of work")
    (work / "recipe.json").write_text('{"recipe": "default", "predictor_dtype": "f16"}')
    with pytest.raises(InputError, match="unfinished run .*recipe was 'default', now 'svd'"):
        train(replace(cfg, model=str(model_folder)))
    assert (work / "last.ckpt").read_bytes() == b"hours of work"


@pytest.fixture
def family_like(model_folder, tmp_path):
    """A model of the same shape with other weights."""
    other = tmp_path / "other"
    shutil.copytree(model_folder, other)
    weights = load_file(other / "model.safetensors")
    save_file({name: -w for name, w in weights.items()}, other / "model.safetensors")
    return other

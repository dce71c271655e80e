"""`bench predictors`: what it counts, chooses and averages, against numpy and by hand."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sparsecast.cli.bench.predictors import bench_predictors, open_other
from sparsecast.cli.bench.predictors_config import BenchPredictorsConfig
from sparsecast.cli.bench.predictors_points import Point, Search, common_thresholds, sign_thresholds
from sparsecast.cli.bench.predictors_scores import HeldOut, compared, count_layers, misses
from sparsecast.cli.bench.predictors_seeds import over_seeds
from sparsecast.cli.bench.predictors_table import show_predictors
from sparsecast.cli.bench.predictors_training import Clock, train_svd
from sparsecast.collect.store.store import ActivationStore
from sparsecast.core.bitmask import unpack
from sparsecast.core.errors import InputError
from sparsecast.core.models.loading import load_model
from sparsecast.predictors.baselines.sparseinfer import SignRule
from sparsecast.predictors.calibration.operating_point import PerplexityNotMet, recorded_documents
from sparsecast.predictors.checkpoint import PredictorSet, load_predictors
from sparsecast.predictors.model_in_loop import rules_in_loop
from sparsecast.predictors.predictor import Predictor

CPU = torch.device("cpu")
SHARES = {"recall": 0.9, "predicted_sparsity": 0.8, "true_sparsity": 0.88, "precision": 0.5}


def _split(store: ActivationStore, split: str, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and masks of a whole split, in numpy."""
    rows = [store.rows(split, shard, layer) for shard in range(len(store.shards(split)))]
    x = torch.cat([part.x_TD for part in rows])
    mask = torch.cat([unpack(part.mask_TP, store.manifest.ffn_width) for part in rows])
    return x.numpy(), mask.numpy()


def _logits(predictor: Predictor, x: np.ndarray) -> np.ndarray:
    """PowerInfer's predictor in f16."""
    fc1, fc2 = (weight.float().numpy() for weight in predictor.weights)
    hidden = np.maximum(x.astype(np.float32) @ fc1.T, 0)
    return hidden.astype(np.float16).astype(np.float32) @ fc2.T


@pytest.fixture(scope="module")
def random_predictors(synthetic) -> PredictorSet:
    generator = torch.Generator().manual_seed(11)
    d, f = synthetic.manifest.hidden_size, synthetic.manifest.ffn_width

    def randn(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    layers = [Predictor(randn(16, d) / 8, randn(f, 16) / 4).stored() for _ in range(2)]
    return PredictorSet(layers, 0.0, None)


def test_held_out_counts_are_those_of_numpy(synthetic, random_predictors):
    threshold = 0.3
    found = count_layers(random_predictors.layers, threshold, synthetic, CPU)
    for layer, counts in enumerate(found):
        x, active = _split(synthetic, "held-out", layer)
        predicted = _logits(random_predictors.layers[layer], x) >= threshold
        assert counts.total == active.size
        assert counts.active == active.sum()
        # sums of another order may turn over what lies at the threshold
        assert counts.predicted == pytest.approx(predicted.sum(), rel=1e-4)
        assert counts.hit == pytest.approx((predicted & active).sum(), rel=1e-4)


def test_ours_misses_nothing_less_than_itself(synthetic, trained):
    """Against its own decisions: every layer skips as much, and ranks by nearly the same score."""
    counts = count_layers(trained.layers, trained.threshold, synthetic, CPU)
    row = misses(trained, counts, synthetic, CPU)
    assert row["recall"] == pytest.approx(sum(c.recall for c in counts) / 2, abs=5e-3)
    assert row["bytes"] == 2 * 32 * (64 + 200) * 2


def test_one_threshold_for_all_layers_keeps_that_recall(synthetic, random_predictors):
    at = common_thresholds(random_predictors, synthetic, CPU)
    scores = []
    for layer, predictor in enumerate(random_predictors.layers):
        x, active = _split(synthetic, "calibration", layer)
        scores.append(_logits(predictor, x)[active])
    fired = np.concatenate(scores)
    for share in (0.3, 0.01):
        threshold = at(share).threshold
        assert (fired >= threshold).mean() == pytest.approx(1 - share, abs=2e-3)
    assert at(1e-9).threshold <= fired.min() + 1e-6
    assert at(0.1).shares == [16 * (64 + 200) / (3 * 64 * 200)] * 2


@pytest.mark.parametrize("limit", [0.25, 0.03, 2e-6])
def test_the_most_misses_within_the_limit_are_found(limit, monkeypatch):
    """On a model whose perplexity is 1 + 5 times the misses of the point in its loop."""
    where, running = "sparsecast.cli.bench.predictors_points", [0.0]

    @contextmanager
    def loop(model, rules, threshold):
        running[:] = [threshold]
        yield

    monkeypatch.setattr(f"{where}.recorded_documents", lambda store: [])
    monkeypatch.setattr(f"{where}.dense_perplexity", lambda *_: 1.0)
    monkeypatch.setattr(f"{where}.perplexity", lambda *_: 1 + 5 * running[0])
    monkeypatch.setattr(f"{where}.rules_in_loop", loop)

    def at(share: float) -> Point:
        return Point(rules=[], threshold=share, dtype="f16", rank=1, shares=[])

    found = Search(None, None, limit).most_misses(at)
    assert isinstance(found, Point)
    assert limit / 1.1 <= 5 * found.threshold * (1 + 1e-6) <= limit * (1 + 1e-6)
    assert Search(None, None, 1e-10).most_misses(at) == pytest.approx(5e-9)


def test_signs_in_the_loop_are_counted_signs(acts, model_folder):
    model, _ = load_model(str(model_folder), device="cpu")
    at = sign_thresholds(model, acts, CPU)
    rows = HeldOut(model, acts)
    block = model.model.layers[1]
    norm_of, gate = block.post_attention_layernorm, block.mlp.gate_proj.weight
    signs = np.sign((gate.float() * norm_of.weight.float()).detach().numpy())
    x, active = _split(acts, "calibration", 1)
    score = np.sign(x.astype(np.float32)) @ signs.T
    point = at(0.2)
    rule = point.rules[1]
    assert isinstance(rule, SignRule)
    assert (score[active] >= rule.threshold).mean() >= 0.8
    assert (score[active] >= rule.threshold + 1).mean() < 0.8  # scores are whole numbers
    found = rows.score(point)
    # One bit for each gate weight, of three matrices of 16 bits; then all of a predicted neuron.
    assert found["traffic"] == pytest.approx(1 / 48 + 1 - found["predicted_sparsity"])
    assert found["held_out_change"] != 0
    everything = replace(point, rules=[replace(r, threshold=-65.0) for r in point.rules])
    assert rows.score(everything)["held_out_change"] == 0
    batch = recorded_documents(acts, "held-out")[0]
    x1, inputs = [], []
    only = [replace(r, threshold=-65.0) for r in point.rules]
    only[1] = rule
    with torch.inference_mode(), rules_in_loop(model, only, 0.0):
        norm_of.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        down = block.mlp.down_proj
        down.register_forward_pre_hook(lambda _, args: x1.append(args[0]), prepend=True)
        down.register_forward_pre_hook(lambda _, args: x1.append(args[0]))  # behind the rule's
        model(batch.ids_BS)
    (plain, masked), (again,) = x1, inputs
    kept = np.sign(again.float().numpy()) @ signs.T >= rule.threshold
    np.testing.assert_array_equal(masked.numpy(), np.where(kept, plain.numpy(), 0))


def test_means_over_seeds_are_of_single_runs():
    runs = [
        {"a": {"x": 1.0, "n": 64}, "layers": [0.5, None], "met": True, "dtype": "f16", "r": 2.0},
        {"a": {"x": 4.0, "n": 64}, "layers": [0.25, 1.0], "met": False, "dtype": "f16", "r": None},
        {"a": {"x": 2.5, "n": 64}, "layers": [0.0, 1.0], "met": True, "dtype": "f16", "r": 1.0},
    ]
    values = over_seeds(runs)
    lost = {"met": False, "dtype": "f16", "r": None}
    assert values == {
        "a": {"x": 2.5, "n": 64}, "layers": [0.25, None], **lost,
        "smallest": {"a": {"x": 1.0, "n": 64}, "layers": [0.0, None], **lost},
        "largest": {"a": {"x": 4.0, "n": 64}, "layers": [0.5, None], **lost},
    }  # fmt: skip
    assert over_seeds(runs[:1]) == runs[0]


def test_another_store_must_be_of_the_same_model(synthetic, edit_store, tmp_path):
    def store(name: str, **fields: object) -> Path:
        return edit_store(synthetic, tmp_path / name, lambda _: None, **fields).folder

    assert open_other(store("same", corpus="other"), synthetic).manifest.corpus == "other"
    for name, fields, told in (
        ("model", {"fingerprint": "1" * 16, "model": "stranger"}, "recorded from stranger"),
        ("threshold", {"activation": "fatrelu", "activation_threshold": 0.2}, "activation fatrelu"),
    ):
        with pytest.raises(InputError, match=told) as refused:
            open_other(store(name, **fields), synthetic)
        assert str(tmp_path / name) in str(refused.value)
    tokens = {name: n for name, n in synthetic.manifest.shard_tokens.items() if name != "held-out"}
    with pytest.raises(InputError, match="shard_tokens"):
        open_other(store("no-held-out", shard_tokens=tokens), synthetic)


def test_what_cannot_meet_the_perplexity_has_a_row_that_says_so(
    synthetic, tmp_path, monkeypatch, caplog
):
    def refuse(cfg):
        assert (cfg.recipe, cfg.target_perplexity) == ("svd", 0.01)
        raise PerplexityNotMet("--target-perplexity: too much", 0.034)

    monkeypatch.setattr("sparsecast.cli.bench.predictors_training.train", refuse)
    cfg = BenchPredictorsConfig(
        activations=synthetic.folder, model="m", out=tmp_path, perplexity=0.01, device="cpu"
    )
    clock = Clock()
    assert train_svd(cfg, clock) == 0.034
    assert list(clock.seconds) == ["svd"]
    scored = {"met": True, "closest_change": None, "dtype": "q4_0", "rank": 32.0, "threshold": 0.0}
    scored |= {"held_out_change": 0.008, **SHARES, "exact": 0.4, "oracle": 0.12}
    row = HeldOut.score(object.__new__(HeldOut), 0.034)
    rows = {
        "reference": scored | {"traffic": 0.5, "cascade": 0.3},
        "svd": row,
        "sign": scored | {"traffic": 0.6, "cascade": 0.4},
        "ours": scored | {"traffic": 0.3, "cascade": 0.2},
    }
    assert set(row) == set(rows["ours"])
    found = compared(0.01, rows)
    assert found["traffic_over"] == {"reference": 0.6, "svd": None, "sign": 0.5}
    assert found["over_oracle"] == pytest.approx(0.3 / 0.12)
    without = compared(0.01, rows | {"ours": row})
    assert without["over_oracle"] is None
    assert set(without["traffic_over"].values()) == {None}
    counted = {"rank": 32, "bytes": 8, **SHARES, "dtype": "f16", "miss_ratio": 0.5}
    values = {"seeds": 1, "held_out_tokens": 7, "perplexity": found}
    show_predictors(values | dict.fromkeys(("reference", "same_rank", "same_bytes"), counted))
    lines = caplog.text.splitlines()
    (heads,) = [line.split("┃") for line in lines if " sign ┃" in line]
    (cells,) = [line.split("│") for line in lines if "held-out change" in line]
    assert (heads[3].strip(), cells[3].strip()) == ("svd", "not met")
    assert "svd: not met, +3.400% at best" in caplog.text


def test_ranges_of_seeds_fit_80_columns(caplog, monkeypatch):
    monkeypatch.setattr("sparsecast.core.messages.TABLE_WIDTH", 80)
    runs = []
    for n in range(3):
        row = {"met": True, "closest_change": None, "dtype": "q4_0", "rank": 1024.0}
        row |= {"held_out_change": 0.005 + n / 999, "exact": 0.4, "oracle": 0.1}
        row |= {name: share + n / 99 for name, share in SHARES.items()}
        row |= {"traffic": 0.5 + n / 99, "cascade": 0.4 + n / 99}
        rows = {name: row | {"traffic": n / 9 + 0.1} for name in ("reference", "svd", "sign")}
        counted = {"rank": 1024, "bytes": 10**9, "dtype": "f16", **SHARES, "miss_ratio": n / 9}
        alike = dict.fromkeys(("reference", "same_rank", "same_bytes"), counted)
        runs.append({"perplexity": compared(0.005, rows | {"ours": row}), **alike})
    show_predictors({"seeds": 3, "held_out_tokens": 7, **over_seeds(runs)})
    assert "predicted sparsity" in caplog.text
    assert "…" not in caplog.text


@pytest.mark.slow
def test_the_comparison_of_two_seeds(model_folder, acts, tmp_path, monkeypatch):
    cfg = BenchPredictorsConfig(
        activations=acts.folder,
        model=str(model_folder),
        out=tmp_path / "compare",
        other_activations=acts.folder,
        perplexity=0.2,
        epochs=1,
        reference_epochs=1,
        device="cpu",
        json=tmp_path / "c.json",
    )
    result = bench_predictors(cfg)
    assert json.loads((tmp_path / "c.json").read_text()) == result
    assert result["reference"]["rank"] == 32
    same = result["same_bytes"]
    assert same["bytes"] <= result["reference"]["bytes"]
    for name in ("same_rank", "same_bytes"):
        row = result[name]
        assert row["miss_ratio"] == pytest.approx(
            (1 - row["recall"]) / (1 - result["reference"]["recall"])
        )
    at = result["perplexity"]
    assert at["traffic_ratio"] == pytest.approx(at["ours"]["traffic"] / at["reference"]["traffic"])
    assert at["reference"]["threshold"] != 0
    for name in ("reference", "svd", "sign", "ours"):
        assert result["other"][name] == at[name]  # the same text
    assert result["other"]["held_out_tokens"] == result["held_out_tokens"]
    seconds = result["seconds"]
    assert seconds["total"] == pytest.approx(sum(seconds.values()) - seconds["total"])
    # Everything is kept: a second run trains nothing, and a second seed only itself.
    with monkeypatch.context() as patch:
        patch.setattr("sparsecast.predictors.recipes.fit", lambda *_: pytest.fail("trained"))
        assert bench_predictors(cfg)["same_bytes"] == same
    both = bench_predictors(replace(cfg, seeds=2))
    recalls = []
    for name in ("reference", "reference-seed1"):
        layers, of_layers = load_predictors(cfg.out / name).layers, []
        for layer, predictor in enumerate(layers):
            x, active = _split(acts, "held-out", layer)
            of_layers.append((_logits(predictor, x) >= 0)[active].mean())
        recalls.append(float(np.mean(of_layers)))
    assert recalls[0] != pytest.approx(recalls[1], abs=1e-4)
    assert both["reference"]["recall"] == pytest.approx(np.mean(recalls), abs=1e-4)
    assert both["smallest"]["reference"]["recall"] == pytest.approx(min(recalls), abs=1e-4)
    for name in ("traffic_ratio", "cascade_ratio", "over_oracle"):
        low, high = (both[key]["perplexity"][name] for key in ("smallest", "largest"))
        assert low < high
        assert both["perplexity"][name] == pytest.approx((low + high) / 2)
        assert at[name] in (pytest.approx(low), pytest.approx(high))

"""What `auto` makes of each layer, by its calibration and by what was measured."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sparsecast.kernels.in_models import dispatch, sparse_ffn, torch_fallback
from sparsecast.kernels.in_models.dispatch import max_tokens
from sparsecast.kernels.in_models.sparse_ffn import SparseFFN
from sparsecast.kernels.in_models.sparsify import sparsify_model

GOOD = {"recall": 0.95, "predicted_sparsity": 0.7, "true_sparsity": 0.9}
ALWAYS = {"exact": {0.0: 4}, "predicted": {0.0: 4}}


@pytest.fixture(autouse=True)
def _all_was_measured(monkeypatch):
    monkeypatch.setattr(dispatch, "MAX_CPU_THREADS", torch.get_num_threads())
    monkeypatch.setattr(dispatch, "MAX_RANK", 0.5)


@pytest.fixture
def table(monkeypatch):
    def set_to(row, device: str = "cpu", matrices: int = 3) -> None:
        monkeypatch.setattr(dispatch, "MEASURED", {device: {(1, 1, matrices): row}})

    return set_to


def paths(model) -> list[str]:
    found = []
    for layer in model.base_model.layers:
        if isinstance(layer.mlp, SparseFFN):
            found.append("predicted" if layer.mlp.predicts else "exact")
        else:
            found.append("dense")
    return found


@pytest.mark.parametrize(
    ("changed", "path"),
    [
        ({}, "predicted"),
        ({"recall": 0.8}, "exact"),
        ({"energy_recall": 0.94}, "exact"),
        ({"energy_recall": 0.0}, "exact"),
        ({"energy_recall": 0.96}, "predicted"),
        ({"energy_recall": None}, "predicted"),
    ],
)
def test_a_layer_below_a_bound_is_exact(changed, path, table, make, predictors):
    table(ALWAYS)
    source = predictors(calibration=[GOOD, {**GOOD, **changed}])
    assert paths(sparsify_model(make("llama"), source)) == ["predicted", path]


def test_bounds_are_the_callers(table, make, predictors):
    table(ALWAYS)
    source = predictors(calibration=[GOOD, {**GOOD, "recall": 0.5, "energy_recall": 0.6}])
    model = sparsify_model(make("llama"), source, least_recall=0.5, least_energy_recall=0.6)
    assert paths(model) == ["predicted", "predicted"]
    model = sparsify_model(make("llama"), source, least_recall=0.96)
    assert paths(model) == ["exact", "exact"]


def test_without_a_calibration_layers_are_exact(table, make, predictors):
    table(ALWAYS)
    for source in (None, predictors()):
        assert paths(sparsify_model(make("llama"), source)) == ["exact", "exact"]


@pytest.mark.parametrize(
    ("row", "want"),
    [
        ({"exact": {0.85: 4}, "predicted": {0.65: 4}}, ["predicted", "exact"]),
        ({"exact": {0.95: 4}, "predicted": {0.65: 4}}, ["predicted", "dense"]),
        ({"exact": {0.85: 4}, "predicted": {0.75: 4}}, ["exact", "exact"]),
        ({"exact": {0.95: 4}, "predicted": {0.75: 4}}, ["dense", "dense"]),
        ({"exact": {0.85: 0}, "predicted": {0.65: 0}}, ["dense", "dense"]),
        ({}, ["dense", "dense"]),
    ],
)
def test_what_was_slower_stays_as_it_was(row, want, table, make, predictors):
    """Predicted layers go by their predicted sparsity, exact ones by the true one."""
    table(row)
    source = predictors(calibration=[GOOD, {**GOOD, "recall": 0.2}])
    assert paths(sparsify_model(make("llama"), source)) == want


def test_dtypes_and_devices_that_were_not_measured_are_dense(table, make, predictors):
    table(ALWAYS)
    source = predictors(calibration=[GOOD, GOOD])
    assert paths(sparsify_model(make("llama", torch.float64), source)) == ["dense", "dense"]
    assert paths(sparsify_model(make("llama", torch.float16), source)) == ["dense", "dense"]
    table(ALWAYS, matrices=2)
    assert paths(sparsify_model(make("llama"), source)) == ["dense", "dense"]


def test_an_ffn_of_two_matrices_goes_by_its_own_table(table, make, predictors):
    table(ALWAYS, matrices=2)
    source = predictors(calibration=[GOOD, {**GOOD, "recall": 0.2}])
    squared = replace(source, manifest=replace(source.manifest, activation="relu2"))
    assert paths(sparsify_model(make("arcee"), squared)) == ["predicted", "exact"]
    assert paths(sparsify_model(make("bitnet"), squared)) == ["dense", "dense"]


def test_where_kernels_run_the_gpus_table_decides(table, make, predictors):
    """Under the interpreter, 16 bits on a CPU stand for it."""
    table(ALWAYS, device="cuda")
    model = make("llama", torch.float16)
    if torch.cuda.is_available():
        model = model.to("cuda")
    source = predictors(calibration=[GOOD, GOOD])
    assert paths(sparsify_model(model, source)) == ["predicted"] * 2


def test_more_threads_than_were_measured_are_dense(table, make, predictors, monkeypatch):
    table(ALWAYS)
    monkeypatch.setattr(dispatch, "MAX_CPU_THREADS", torch.get_num_threads() - 1)
    assert paths(sparsify_model(make("llama"), predictors())) == ["dense", "dense"]


def test_small_models_are_dense(make, predictors):
    source = predictors(calibration=[GOOD, GOOD])
    assert paths(sparsify_model(make("llama"), source)) == ["dense", "dense"]


def test_ranks_above_those_that_were_measured_are_exact(monkeypatch, table, make, predictors):
    table(ALWAYS)
    source = predictors(calibration=[GOOD, GOOD])
    share = source.layers[0].rank / make("llama").config.hidden_size
    monkeypatch.setattr(dispatch, "MAX_RANK", share)
    assert paths(sparsify_model(make("llama"), source)) == ["predicted"] * 2
    monkeypatch.setattr(dispatch, "MAX_RANK", share - 0.01)
    assert paths(sparsify_model(make("llama"), source)) == ["exact"] * 2


def test_prompts_and_large_batches_are_the_models_own(table, make, predictors, ids, logits, near):
    table(ALWAYS)
    dense = make("prosparse")
    source = predictors(calibration=[GOOD, GOOD])
    fatrelu = replace(source.manifest, activation="fatrelu", activation_threshold=0.3)
    model = sparsify_model(make("prosparse"), replace(source, manifest=fatrelu))

    for shape in ((1, 5), (5, 1), (1, 40)):
        near(logits(model, ids(*shape)), logits(dense, ids(*shape)))
    difference = (logits(model, ids(1, 4)) - logits(dense, ids(1, 4))).abs().max()
    assert difference > 0.1


@pytest.mark.parametrize(("exact", "want"), [(4, "exact"), (1, "dense")])
def test_more_tokens_than_predicting_pays_for(
    exact, want, table, make, predictors, ids, logits, near, monkeypatch
):
    table({"exact": {0.0: exact}, "predicted": {0.0: 2}})
    taken = []
    for name in ("over_rows", "dense"):
        real = getattr(torch_fallback, name)

        def told(x, ffn, predicted, name=name, real=real):
            path = "predicted" if predicted is not None else {"over_rows": "exact"}.get(name, name)
            taken.append(path)
            return real(x, ffn, predicted)

        monkeypatch.setattr(torch_fallback, name, told)
    dense = make("llama")
    model = sparsify_model(make("llama"), predictors(calibration=[GOOD, GOOD]))

    for count, path in ((1, "predicted"), (2, "predicted"), (3, want), (5, "dense")):
        got = logits(model, ids(1, count))
        assert taken == [path] * 2, count
        assert all(layer.mlp._predictor_input is None for layer in model.base_model.layers)
        if path != "predicted":
            near(got, logits(dense, ids(1, count)))
        taken.clear()


@pytest.mark.slow
def test_in_the_kernels_more_tokens_go_the_exact_way(monkeypatch, make, predictors, table, ids):
    table({"exact": {0.0: 3}, "predicted": {0.0: 1}}, device="cuda")
    taken = []
    for name in ("exact_ffn", "predicted_ffn"):
        real = getattr(sparse_ffn, name)

        def told(*given, name=name, real=real):
            taken.append(name)
            return real(*given)

        monkeypatch.setattr(sparse_ffn, name, told)
    model = make("llama", torch.float16)
    if torch.cuda.is_available():
        model = model.to("cuda")
    sparsify_model(model, predictors(calibration=[GOOD, GOOD]))
    assert "predicted up to 1 tokens, exact up to 3" in repr(model)

    for count, want in ((1, ["predicted_ffn"] * 2), (3, ["exact_ffn"] * 2), (4, [])):
        with torch.no_grad():
            model(ids(1, count).to(model.device))
        assert taken == want, count
        taken.clear()


@pytest.mark.parametrize(
    ("shape", "path", "sparsity", "tokens"),
    [
        ((512, 2048, 3), "exact", 0.89, 4),
        ((1536, 3840, 3), "predicted", 0.99, 0),
        ((4096, 11008, 3), "exact", 0.89, 16),
        ((4096, 11008, 3), "predicted", 0.79, 1),
        ((8192, 28672, 3), "predicted", 0.42, 0),
        ((4096, 16384, 2), "exact", 0.8, 4),
        ((2048, 8192, 2), "exact", 0.8, 1),
        ((2048, 8192, 2), "exact", 0.89, 4),
        ((4096, 16384, 2), "predicted", 0.79, 1),
        ((3000, 12000, 2), "predicted", 0.7, 1),
        ((3000, 12000, 2), "predicted", 0.6, 0),
        ((768, 3072, 2), "exact", 0.99, 0),
    ],
)
def test_what_a_gpu_was_measured_to_gain(shape, path, sparsity, tokens):
    """As docs/results.md has it."""
    assert max_tokens(path, sparsity, device="cuda", shape=shape) == tokens


def test_the_nearest_measurements_decide(monkeypatch):
    small, large = {"exact": {0.7: 1, 0.9: 3}}, {"exact": {0.7: 8}}
    shapes = {
        (10, 100, 3): small,
        (20, 100, 3): large,
        (40, 100, 3): {"exact": {0.7: 2}},
        (11, 100, 2): {"exact": {0.0: 16}},
    }
    monkeypatch.setattr(dispatch, "MEASURED", {"cuda": shapes})

    def tokens(hidden: int, sparsity: float | None, matrices: int = 3, path: str = "exact") -> int:
        return max_tokens(path, sparsity, device="cuda", shape=(hidden, 100, matrices))

    assert tokens(9, 0.9) == 0
    assert tokens(10, 0.9) == 3
    assert tokens(19, 0.89) == 1
    assert tokens(19, 0.69) == 0
    assert tokens(19, None) == 1
    assert tokens(20, 0.9) == 8
    assert tokens(30, 0.9) == 2
    assert tokens(50, 0.9) == 2
    assert tokens(30, 0.9, matrices=2) == 16
    assert tokens(30, 0.9, path="predicted") == 0
    assert max_tokens("exact", 0.9, device="cpu", shape=(99, 99, 3)) == 0

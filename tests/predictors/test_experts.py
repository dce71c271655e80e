"""One predictor per expert: from recorded activations to perplexity."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.metrics import precision_score, recall_score

from sparsecast.collect.config import CollectConfig
from sparsecast.collect.inspect import InspectConfig
from sparsecast.collect.run import collect
from sparsecast.collect.store.store import ActivationStore
from sparsecast.core.bitmask import unpack
from sparsecast.core.errors import InputError
from sparsecast.core.models.loading import load_model
from sparsecast.export.inspect import inspect
from sparsecast.predictors import recipes
from sparsecast.predictors.checkpoint import load_predictors
from sparsecast.predictors.config import EvaluateConfig, ReportConfig, TrainConfig
from sparsecast.predictors.evaluate import evaluate
from sparsecast.predictors.model_in_loop import predictors_in_loop
from sparsecast.predictors.predictor import Predictor
from sparsecast.predictors.report.run import report
from sparsecast.predictors.train import train
from sparsecast.predictors.training.expert_data import ExpertBatches
from tests.tools.mixtures import LAYERS, D, E, F, K, forward, write_mixture


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model_folder):
    return write_mixture(tmp_path_factory.mktemp("mixture") / "m", "mixtral", model_folder)


@pytest.fixture(scope="module")
def acts(folder, corpus, tmp_path_factory) -> ActivationStore:
    """4,000 tokens, of which each expert sees about half."""
    return collect(collection(folder, corpus, tmp_path_factory.mktemp("acts") / "acts"))


def collection(folder, corpus, out, **changes):
    base = {"tokens": 4_000, "seq_len": 64, "device": "cpu", "long_documents": "cut", **changes}
    return CollectConfig(model=str(folder), corpus=str(corpus), out=out, **base)


def training(acts, out, **changes) -> TrainConfig:
    base = {"rank": 32, "epochs": 2, "batch_size": 128, "device": "cpu", **changes}
    return TrainConfig(activations=acts.folder, out=out, **base)


@pytest.fixture(scope="module")
def trained(acts, tmp_path_factory):
    out = tmp_path_factory.mktemp("pred") / "pred"
    return out, train(training(acts, out))


@pytest.fixture(scope="module")
def reported(acts, trained, tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "report"
    return report(ReportConfig(predictors=trained[0], activations=acts.folder, out=out))


def evaluation(folder, predictors, corpus, **changes) -> EvaluateConfig:
    base = {"tokens": 300, "seq_len": 64, "device": "cpu", **changes}
    return EvaluateConfig(model=str(folder), predictors=predictors, corpus=str(corpus), **base)


def held_out(acts, ffn):
    """Inputs and masks of one expert, all shards."""
    rows = [acts.rows("held-out", shard, ffn) for shard in range(len(acts.shards("held-out")))]
    x_TD, mask_TP = (torch.cat(parts) for parts in zip(*rows, strict=True))
    return x_TD, unpack(mask_TP, F)


def test_a_folder_has_a_file_for_every_expert(trained):
    out, predictors = trained
    names = {path.name for path in out.glob("*.pt")}
    assert names == {f"model_{i}_{e}.pt" for i in range(LAYERS) for e in range(E)}
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["experts"] == E
    assert manifest["ranks"] == [32] * (LAYERS * E)
    assert manifest["dtypes"] == ["q4_0"] * (LAYERS * E)
    assert predictors.layer_count == LAYERS
    shown = inspect(InspectConfig(path=out))
    assert shown.ok


def test_predictors_find_the_gates_of_rank_8(reported):
    """Half of the neurons fire; predictors of rank 32 find about 95 % and skip most others."""
    for row in reported["experts"]:
        assert 0.4 < row["true_sparsity"] < 0.6
        assert 0.9 < row["recall"] < 0.99
        assert row["predicted_sparsity"] > 0.65 * row["true_sparsity"]


def test_an_experts_scores_are_those_of_scikit_learn(acts, trained, reported):
    predictors = trained[1]
    for number, row in enumerate(reported["experts"]):
        assert (row["layer"], row["expert"]) == divmod(number, E)
        x_TD, fired_TF = held_out(acts, number)
        chosen_TF = predictors.layers[number].logits(x_TD) >= 0
        fired, chosen = fired_TF.flatten().numpy(), chosen_TF.flatten().numpy()
        assert row["tokens"] == len(x_TD)
        assert row["recall"] == pytest.approx(recall_score(fired, chosen))
        assert row["precision"] == pytest.approx(precision_score(fired, chosen))
        assert row["predicted_sparsity"] == pytest.approx(1 - chosen.mean())
        assert row["true_sparsity"] == pytest.approx(1 - fired.mean())
        share = 32 * (D + F) * 4.5 / (3 * D * F * 16)
        assert row["traffic"] == pytest.approx(share + chosen.mean())


def test_a_layers_scores_are_those_of_its_experts_added_up(acts, trained, reported):
    predictors = trained[1]
    recalls = []
    for layer, row in enumerate(reported["layers"]):
        hit = active = predicted = total = 0
        for ffn in range(layer * E, (layer + 1) * E):
            x_TD, fired_TF = held_out(acts, ffn)
            chosen_TF = predictors.layers[ffn].logits(x_TD) >= 0
            hit += int((chosen_TF & fired_TF).sum())
            active += int(fired_TF.sum())
            predicted += int(chosen_TF.sum())
            total += fired_TF.numel()
        assert total == K * F * acts.manifest.tokens("held-out")
        assert row["recall"] == pytest.approx(hit / active)
        assert row["predicted_sparsity"] == pytest.approx(1 - predicted / total)
        assert "expert" not in row
        recalls.append(hit / active)
    assert reported["mean"]["recall"] == pytest.approx(sum(recalls) / LAYERS)
    assert reported["mean"]["rank"] == 32


def test_predictors_in_the_loop_equal_a_forward_pass_by_hand(folder, trained, monkeypatch):
    """Each predictor gets the residual of its own expert's tokens, and what it does not select is
    left out. The decisions are the model's own: they flip where rounding does."""
    predictors, seen = trained[1], {}
    ffn_of = {id(p.fc1_RD): ffn for ffn, p in enumerate(predictors.layers)}

    def logits(self, x_TD):
        logits_TF = original(self, x_TD)
        seen[ffn_of[id(self.fc1_RD)]] = iter(zip(x_TD, logits_TF >= 0, strict=True))
        return logits_TF

    def select(layer, expert, x_D):
        own_D, chosen_F = next(seen[layer * E + expert])
        torch.testing.assert_close(own_D.double(), x_D, rtol=1e-4, atol=1e-4)
        return chosen_F

    original = Predictor.logits
    monkeypatch.setattr(Predictor, "logits", logits)
    ids = torch.randint(3, 500, (30,)).tolist()
    model, _ = load_model(str(folder), device="cpu")
    with torch.inference_mode():
        with predictors_in_loop(model, predictors):
            logits_TV = model(torch.tensor([ids])).logits[0].double()
        want_TV, _ = forward(folder, ids, select)
        dense_TV, _ = forward(folder, ids)
        after_TV = model(torch.tensor([ids])).logits[0].double()
    torch.testing.assert_close(logits_TV, want_TV, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(after_TV, dense_TV, rtol=1e-4, atol=1e-4)  # hooks are gone
    assert (want_TV - dense_TV).abs().mean() > 0.01
    assert all(next(rows, None) is None for rows in seen.values())


def test_evaluate_leaves_out_what_powerinfer_cannot_run(folder, trained, corpus, acts, tmp_path):
    values = evaluate(evaluation(folder, trained[0], corpus, json=tmp_path / "e.json"))
    assert values["perplexity"]["bundle"] is None
    assert values["change"]["bundle"] is None
    assert abs(values["change"]["exact"]) < 1e-5
    assert 1e-4 < abs(values["change"]["predicted"]) < 0.5
    result = report(
        ReportConfig(
            predictors=trained[0],
            activations=acts.folder,
            out=tmp_path / "r",
            evaluation=tmp_path / "e.json",
            against=["sign"],
            model=str(folder),
        )
    )
    assert result["perplexity_change"] == values["change"]["predicted"]
    assert result["bundle_perplexity_change"] is None
    page = (tmp_path / "r" / "report.html").read_text()
    assert f"{LAYERS * E} experts" in page
    text = (tmp_path / "r" / "report.md").read_text()
    assert text.count("\n| 2 | ") == 1 + E  # the layer, and its experts


def test_batches_hold_each_experts_own_rows(acts):
    ffns = [1, 2, 3]
    data = ExpertBatches(acts, "train", 64, seed=4, ffns=ffns)
    rows = {ffn: sum(acts.row_counts("train", ffn)) for ffn in ffns}
    assert len(data) == -(-sum(rows.values()) // (3 * 64))
    seen = {ffn: {} for ffn in ffns}
    known = {ffn: known_rows(acts, ffn) for ffn in ffns}
    epochs = 3
    for epoch in range(epochs):
        data.epoch = epoch
        for batch in data:
            assert batch.rows == (64, 64, 64)
            for place, ffn in enumerate(ffns):
                for x_D, mask_P in zip(batch.x_LBD[place], batch.mask_LBP[place], strict=True):
                    key = (x_D.view(torch.uint8).numpy().tobytes(), mask_P.numpy().tobytes())
                    seen[ffn][key] = seen[ffn].get(key, 0) + 1
    for ffn in ffns:
        assert set(seen[ffn]) <= set(known[ffn])
        drawn = epochs * len(data) * 64
        times = [seen[ffn].get(key, 0) / count for key, count in known[ffn].items()]
        assert min(times) >= drawn // rows[ffn]
        assert max(times) <= -(-drawn // rows[ffn])
    data.epoch = 1
    first, again = next(iter(data)), next(iter(data))
    assert torch.equal(first.x_LBD, again.x_LBD)
    data.epoch = 2
    assert not torch.equal(first.x_LBD, next(iter(data)).x_LBD)


def known_rows(acts, ffn):
    counts = {}
    for shard in range(len(acts.shards("train"))):
        for x_D, mask_P in zip(*acts.rows("train", shard, ffn), strict=True):
            key = (x_D.view(torch.uint8).numpy().tobytes(), mask_P.numpy().tobytes())
            counts[key] = counts.get(key, 0) + 1
    return counts


def test_without_a_seed_every_row_comes_once_in_order(acts):
    ffns = [0, 5]
    batches = list(ExpertBatches(acts, "calibration", 32, ffns=ffns))
    for place, ffn in enumerate(ffns):
        got = torch.cat([batch.x_LBD[place, : batch.rows[place]] for batch in batches])
        want = [
            acts.rows("calibration", shard, ffn).x_TD
            for shard in range(len(acts.shards("calibration")))
        ]
        assert torch.equal(got, torch.cat(want))


def test_an_interrupted_run_goes_on(acts, trained, tmp_path, monkeypatch, capsys):
    """In the second epoch of layer 2, with the layers before it finished."""
    layers, fails = [], [True]

    def noted(plan, source):
        layers.append(plan.group)
        return original(plan, source)

    def read(self):
        if layers[-1] == 2 and self.epoch == 1 and fails.pop():
            raise RuntimeError("the power fails")
        yield from original_rows(self)

    original, original_rows = recipes._trained, ExpertBatches.__iter__
    monkeypatch.setattr(recipes, "_trained", noted)
    monkeypatch.setattr(ExpertBatches, "__iter__", read)
    with pytest.raises(RuntimeError, match="the power fails"):
        train(training(acts, tmp_path / "pred"))
    assert "resuming" not in capsys.readouterr().err
    fails.append(False)
    again = train(training(acts, tmp_path / "pred"))
    told = capsys.readouterr().err
    assert "resuming: the experts of 2 layers are trained" in told
    assert "resuming from the last finished epoch" in told
    assert layers == [0, 1, 2, 2]
    for one, other in zip(again.layers, trained[1].layers, strict=True):
        assert torch.equal(one.fc1_RD, other.fc1_RD)
        assert torch.equal(one.fc2_FR, other.fc2_FR)
    assert not list(tmp_path.glob(".*"))


def test_an_interrupt_tells_what_is_kept(acts, tmp_path, monkeypatch):
    """In the first epoch of layer 0, where nothing is, and in that of layer 1."""
    layer = 0

    def read(self):
        if self._ffns[0] // E == layer:
            raise KeyboardInterrupt
        yield from original(self)

    original = ExpertBatches.__iter__
    monkeypatch.setattr(ExpertBatches, "__iter__", read)
    with pytest.raises(KeyboardInterrupt, match="nothing is left behind"):
        train(training(acts, tmp_path / "pred"))
    assert not list(tmp_path.iterdir())
    layer = 1
    with pytest.raises(KeyboardInterrupt, match="what other layers have finished is kept"):
        train(training(acts, tmp_path / "pred"))
    assert [path.name for path in tmp_path.glob(".*/*.ckpt")] == ["last-trained-0.ckpt"]


@pytest.mark.parametrize(
    ("name", "count", "router", "dtype"),
    [
        ("mixtral", "num_local_experts", "gate", "q4_0"),
        ("smallthinker", "moe_num_primary_experts", "primary_router", "f16"),
    ],
)
def test_an_expert_that_no_token_reaches_selects_everything(
    name, count, router, dtype, model_folder, corpus, tmp_path, capsys
):
    """Routers of layer 1 are w, 2 w, -w, -2 w and 0: two are above 0 for every token."""
    folder = write_mixture(tmp_path / "m", name, model_folder, **{count: 5})
    tensors = load_file(folder / "model.safetensors")
    key = f"model.layers.1.block_sparse_moe.{router}.weight"
    w_D = tensors[key][0]
    tensors[key] = torch.stack([w_D, 2 * w_D, -w_D, -2 * w_D, 0 * w_D])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    acts = collect(collection(folder, corpus, tmp_path / "acts", tokens=2_500))
    assert "no token is routed to layer 1, expert 4" in capsys.readouterr().err
    made = train(training(acts, tmp_path / "pred", predictor_dtype=dtype, epochs=1))
    assert "experts have fewer than" in capsys.readouterr().err
    idle = made.layers[9]
    assert bool((idle.logits(torch.randn(7, D)) >= made.threshold).all())
    result = report(
        ReportConfig(predictors=tmp_path / "pred", activations=acts.folder, out=tmp_path / "report")
    )
    row = result["experts"][9]
    assert (row["tokens"], row["recall"], row["traffic"]) == (0, None, None)
    assert result["layers"][1]["recall"] > 0.9
    values = evaluate(evaluation(folder, tmp_path / "pred", corpus))
    assert abs(values["change"]["exact"]) < 1e-5
    assert 1e-4 < abs(values["change"]["predicted"]) < 0.5


def test_svd_needs_no_training(folder, acts, tmp_path):
    made = train(
        training(acts, tmp_path / "p", recipe="svd", model=str(folder), predictor_dtype="f16")
    )
    result = report(
        ReportConfig(predictors=tmp_path / "p", activations=acts.folder, out=tmp_path / "r")
    )
    assert len(made.layers) == LAYERS * E
    assert result["mean"]["recall"] > 0.9
    assert result["mean"]["predicted_sparsity"] > 0.4  # of 0.5: the gate has rank 8


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"target_perplexity": 0.01, "model": "{model}"}, "--target-perplexity: is for dense"),
        ({"traffic_budget": 0.5}, "--traffic-budget: is for dense"),
        ({"rank": None, "predictor_budget": 0.5}, "--predictor-budget: is for dense"),
        ({"recipe": "reference"}, "--recipe reference: is for dense"),
    ],
)
def test_what_needs_a_dense_model_is_refused(changes, says, folder, acts, tmp_path):
    changes = {k: str(folder) if v == "{model}" else v for k, v in changes.items()}
    with pytest.raises(InputError, match=says) as error:
        train(training(acts, tmp_path / "p", **changes))
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_training_on_a_running_mixture_is_refused(folder, corpus, tmp_path):
    config = TrainConfig(model=str(folder), corpus=str(corpus), out=tmp_path / "p", tokens=10_000)
    with pytest.raises(InputError, match="is a mixture of experts .* run sparsecast collect"):
        train(config)


def test_predictors_of_experts_belong_to_their_manifest(trained, manifest_of, tmp_path):
    copy = tmp_path / "pred"
    shutil.copytree(trained[0], copy)
    (copy / "model_1_2.pt").unlink()
    with pytest.raises(InputError, match=r"model_1_2\.pt: no such file"):
        load_predictors(copy)
    shutil.copy(trained[0] / "model_0_0.pt", copy / "model_1_2.pt")
    with pytest.raises(InputError, match="is not the file that was trained"):
        load_predictors(copy)
    (copy / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"of experts, but no manifest\.json"):
        load_predictors(copy)


def test_predictors_of_a_dense_model_are_refused(folder, acts, trained, manifest_of, tmp_path):
    dense = [p.stored() for p in trained[1].layers]
    manifest = manifest_of(dense, activation="relu", activation_threshold=0.0)
    replace(trained[1], manifest=manifest).save(tmp_path / "p")
    with pytest.raises(InputError, match="for a dense FFN per layer, but .* 4 experts per layer"):
        report(ReportConfig(predictors=tmp_path / "p", activations=acts.folder, out=tmp_path / "r"))

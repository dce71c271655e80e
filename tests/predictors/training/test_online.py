"""Training on a running model, compared with what `collect` records of the same documents."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch

from sparsecast.collect.config import CollectConfig
from sparsecast.collect.run import collect
from sparsecast.core.distributed import DistributedContext
from sparsecast.core.earlier_runs import compare_options
from sparsecast.core.errors import InputError
from sparsecast.predictors.config import TrainConfig
from sparsecast.predictors.layer_data import layer_batches
from sparsecast.predictors.metrics import Counts, count
from sparsecast.predictors.planning import make_plan, open_source, resolve
from sparsecast.predictors.train import train
from sparsecast.predictors.training import online
from sparsecast.predictors.training.lightning_module import PredictorModule
from sparsecast.predictors.training.warm_start import moments

CPU = torch.device("cpu")


@pytest.fixture
def cfg(model_folder, corpus, tmp_path) -> TrainConfig:
    return TrainConfig(
        model=str(model_folder),
        corpus=str(corpus),
        out=tmp_path / "pred",
        tokens=4_000,
        seq_len=256,
        epochs=2,
        batch_size=128,
        rank=32,
        predictor_dtype="f16",
        device="cpu",
        long_documents="cut",
    )


@pytest.fixture(scope="module")
def whole(model_folder, corpus, tmp_path_factory):
    """A store of every training token of the corpus."""
    return collect(
        CollectConfig(
            model=str(model_folder),
            corpus=str(corpus),
            out=tmp_path_factory.mktemp("whole") / "acts",
            seq_len=256,
            device="cpu",
            long_documents="cut",
            energy=True,
        ),
        shares={"train": 1 << 40, "calibration": 400, "held-out": 2},
    )


def opened(cfg: TrainConfig):
    """The source and the plan of a process that trains alone."""
    request = resolve(cfg, DistributedContext())
    source = open_source(request)
    return source, make_plan(request, source)


def rows_of(store, layer: int) -> set[bytes]:
    kept = set()
    for shard in range(len(store.shards("train"))):
        rows = store.rows("train", shard, layer)
        codes = store.codes("train", shard, layer, 0, None)
        parts = (rows.x_TD.half().numpy(), rows.mask_TP.numpy(), codes.numpy())
        kept |= {b"".join(part.tobytes() for part in row) for row in zip(*parts, strict=True)}
    return kept


def test_batches_hold_tokens_that_collect_would_store(cfg, whole):
    source, plan = opened(cfg)
    layers = source.store.manifest.layers
    batches = source.batches(plan)
    assert len(batches) == 4_000 // (2 * 128)
    known = {layer: rows_of(whole, layer) for layer in layers}
    seen: dict[int, list[bytes]] = {layer: [] for layer in layers}
    for epoch in range(2):
        batches.epoch = epoch
        taken = list(batches)
        assert len(taken) == len(batches)
        for batch in taken:
            for layer in layers:
                parts = batch.x_LBD.half(), batch.mask_LBP, batch.value_LBF
                rows = zip(*(part[layer].numpy() for part in parts), strict=True)
                seen[layer] += [b"".join(part.tobytes() for part in row) for row in rows]
    for layer in layers:
        # In another batch, a forward pass may round the last bit differently.
        found = sum(row in known[layer] for row in seen[layer])
        assert found > 0.97 * len(seen[layer])
        assert len(set(seen[layer])) > 0.97 * len(seen[layer])


def test_an_epoch_is_the_same_after_a_restart(cfg):
    source, plan = opened(cfg)
    plan = replace(plan, own_layers=[0])
    straight = source.batches(plan)
    first = list(straight)
    straight.epoch = 1
    second = list(straight)
    fresh = source.batches(plan)
    fresh.epoch = 1
    for one, two in zip(second, fresh, strict=True):
        assert torch.equal(one.x_LBD, two.x_LBD)
        assert torch.equal(one.mask_LBP, two.mask_LBP)
    assert not torch.equal(first[0].x_LBD, second[0].x_LBD)


def test_shares_of_the_text_are_disjoint(cfg):
    source, _ = opened(cfg)
    seen = []
    for place in range(2):
        request = resolve(replace(cfg, data_parallel=True), DistributedContext(place, 2))
        plan = make_plan(request, source)
        share = source.batches(replace(plan, own_layers=[0]))
        assert len(share) == 4_000 // (2 * 128 * 2)
        seen.append({row.numpy().tobytes() for batch in share for row in batch.x_LBD[0]})
    assert len(seen[0] & seen[1]) < 0.03 * len(seen[0])  # BOS looks alike everywhere


def test_the_text_is_read_from_its_beginning_twice_in_all(cfg, monkeypatch):
    """Once for the moments and once for all epochs: no batch beyond an epoch is requested."""
    begun = []
    text = online.OnlineSource.text

    def counted(self):
        begun.append(1)
        return text(self)

    monkeypatch.setattr(online.OnlineSource, "text", counted)
    train(replace(cfg, epochs=4))
    assert len(begun) == 2


def test_a_refused_run_leaves_nothing_that_binds_the_next(cfg, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="--predictor-dtype q4_0: stores rows in blocks"):
        train(replace(cfg, predictor_dtype="q4_0", rank=40))
    assert list(tmp_path.iterdir()) == []

    def fail(*_: object) -> None:
        raise InputError("refused late")

    with monkeypatch.context() as patch:
        patch.setattr("sparsecast.predictors.recipes.warm_start", fail)
        with pytest.raises(InputError, match="refused late"):
            train(cfg)
    assert list(tmp_path.iterdir()) == []

    def killed(*_: object) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr("sparsecast.predictors.recipes.warm_start", killed)
        patch.setattr("sparsecast.predictors.train.clear_unfinished", lambda _: None)
        with pytest.raises(RuntimeError, match="killed"):
            train(cfg)
    assert [path.name for path in tmp_path.iterdir()] == [".pred.train"]
    train(replace(cfg, tokens=3_000, epochs=1))  # records other calibration documents
    assert {path.name for path in tmp_path.iterdir()} == {"pred"}


def test_a_config_that_does_not_fit_the_weights_is_refused(cfg, tmp_path):
    folder = shutil.copytree(cfg.model, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 10**9}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="describes 1,000,000,000 layers"):
        train(replace(cfg, model=str(folder)))


def test_an_interrupt_before_training_leaves_nothing(cfg, tmp_path, monkeypatch):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sparsecast.collect.recording._forward", interrupt)
    with pytest.raises(KeyboardInterrupt, match="before training began, nothing is left behind"):
        train(cfg)
    assert list(tmp_path.iterdir()) == []


def test_a_short_corpus_is_read_again(cfg, whole, capsys):
    source, _ = opened(cfg)
    text = source.text()
    tokens = whole.manifest.tokens("train")
    first = next(text)
    held = first.tokens
    while held < tokens:
        held += next(text).tokens
    assert held == tokens
    assert torch.equal(next(text).ids_BS, first.ids_BS)
    told = capsys.readouterr().err
    assert f"has {tokens:,} training tokens, fewer than --tokens 4,000, so it is read again" in told


def test_documents_are_read_in_windows_or_cut_and_old_runs_have_cut_them(cfg, tmp_path, caplog):
    corpus = tmp_path / "long.jsonl"
    rows = [{"text": f"value {i} " * 150} for i in range(9)] + [{"text": None}]
    corpus.write_text("\n".join(map(json.dumps, rows)))
    cfg = replace(cfg, corpus=str(corpus), seq_len=64)
    lengths = {}
    for how in ("split", "cut"):
        source, plan = opened(
            replace(cfg, out=tmp_path / how, long_documents=None if how == "split" else how)
        )
        assert plan.options["long_documents"] == how
        assert source.store.manifest.options["long_documents"] == how
        text = source.text()
        lengths[how] = next(text).ids_BS.shape[1]
        batches = [next(text) for _ in range(30)]
        assert all(batch.ids_BS.shape[1] <= 64 for batch in batches)
        source.tell_skipped()
        assert f"{corpus}: 1 of 10 rows cannot be used" in caplog.messages[-1]
    assert lengths == {"split": 64, "cut": 64}
    old = {name: v for name, v in plan.options.items() if name != "long_documents"}
    assert compare_options(old, plan.options) == []


def test_moments_are_those_of_the_store(cfg, whole, monkeypatch):
    cfg = replace(cfg, tokens=whole.manifest.tokens("train"))
    source, _ = opened(cfg)
    monkeypatch.setattr(online, "WARM_TOKENS", 1 << 40)
    layers = source.store.manifest.layers
    for layer, got in zip(layers, source.moments(layers, CPU), strict=True):
        for one, two in zip(got, moments(whole, layer, CPU), strict=True):
            # The store keeps inputs in float16, as batches do.
            torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


def test_predictors_meet_the_target_and_leave_nothing_else(cfg, whole, tmp_path):
    predictors = train(cfg)
    manifest = predictors.manifest
    assert manifest.recipe["train_tokens"] == 15 * 2 * 128  # whole batches of 4,000
    assert manifest.recipe["corpus"] == cfg.corpus
    for layer, predictor in enumerate(predictors.layers):
        total = Counts(0, 0, 0, 0)
        for x_TD, active_TF in layer_batches(whole, "calibration", layer):
            total = total.plus(count(predictor.logits(x_TD) >= 0, active_TF))
        assert total.recall == pytest.approx(0.95, abs=0.01)
    assert {path.name for path in tmp_path.iterdir()} == {"pred"}
    assert train(cfg).manifest == manifest  # kept, not trained again
    with pytest.raises(InputError, match="train_tokens was 3840, now 4864"):
        train(replace(cfg, tokens=5_000))


def test_a_killed_run_resumes_with_the_text_it_has_not_read(cfg, tmp_path, monkeypatch):
    whole = train(replace(cfg, out=tmp_path / "whole"))
    validate, seen = PredictorModule.on_validation_epoch_end, []

    def die_in_the_second(self) -> None:
        seen.append(self.current_epoch)
        if len(seen) == 2:
            raise RuntimeError("killed")
        validate(self)

    with monkeypatch.context() as patch:
        patch.setattr(PredictorModule, "on_validation_epoch_end", die_in_the_second)
        with pytest.raises(RuntimeError, match="killed"):
            train(cfg)
    resumed = train(cfg)
    assert seen == [0, 1]
    for one, two in zip(whole.layers, resumed.layers, strict=True):
        for a, b in zip(one.weights, two.weights, strict=True):
            assert torch.equal(a, b)
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "pred"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"corpus": None, "model": None}, "give --activations, or --model with --corpus"),
        ({"activations": "acts"}, "give --activations, or --model with --corpus"),
        ({"model": None}, "--corpus: needs the model"),
        ({"corpus": "-"}, "save it to a file"),
        ({"recipe": "svd"}, "--recipe svd: needs recorded activations"),
        ({"predictor_budget": 0.1, "rank": None}, "--predictor-budget: needs recorded"),
        ({"tokens": 200}, "--tokens: must be at least 256, a batch in each of 2 epochs, got 200"),
        ({"corpus": None, "activations": "acts"}, "--tokens: belongs to --corpus"),
        (
            {
                "corpus": None,
                "activations": "acts",
                "tokens": None,
                "seq_len": None,
                "long_documents": None,
                "dtype": "float16",
            },
            "--dtype: belongs to --corpus",
        ),
        (
            {
                "corpus": None,
                "activations": "acts",
                "tokens": None,
                "seq_len": None,
                "long_documents": "cut",
            },
            "--long-documents: belongs to --corpus",
        ),
    ],
)
def test_conflicting_options_are_refused(cfg, changes, message):
    with pytest.raises(InputError, match=message):
        replace(cfg, **changes)

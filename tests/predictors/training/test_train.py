"""Training on labels that can be learned: results, refusals, interrupts and resumption."""

from __future__ import annotations

import shutil
import signal
from dataclasses import replace

import pytest
import torch
from filelock import FileLock

from sparsecast.collect.config import CollectConfig
from sparsecast.collect.run import collect
from sparsecast.core.errors import InputError
from sparsecast.predictors import recipes
from sparsecast.predictors.baselines.public_recipe import PublicRecipeModule
from sparsecast.predictors.config import TrainConfig
from sparsecast.predictors.layer_data import layer_batches
from sparsecast.predictors.metrics import Counts, count
from sparsecast.predictors.predictor import Predictor, rms_normalized
from sparsecast.predictors.train import train
from sparsecast.predictors.training.data import TokenBlocks
from sparsecast.predictors.training.lightning_module import PredictorModule
from sparsecast.predictors.training.warm_start import moments, warm_start


def start(synthetic, free: int, dtype: str = "f16"):
    of_layers = (moments(synthetic, layer, torch.device("cpu")) for layer in (0, 1))
    return warm_start(of_layers, [free] * 2, dtype)


def recount(predictor: Predictor, store, split: str, layer: int) -> Counts:
    """Count the decisions of an f16 file's weights in float64, without the package's scoring."""
    total = Counts(0, 0, 0, 0)
    fc1, fc2 = predictor.fc1_RD.double(), predictor.fc2_FR.double()
    for x_TD, active_TF in layer_batches(store, split, layer):
        total = total.plus(count((x_TD.double() @ fc1.T).relu() @ fc2.T >= 0, active_TF))
    return total


def test_a_learnable_problem_is_learned(trained, synthetic):
    """At a recall of 0.95, chance would skip 5 %."""
    for layer, predictor in enumerate(trained.layers):
        counts = recount(predictor, synthetic, "held-out", layer)
        assert 0.8 < counts.true_sparsity < 0.95
        assert counts.recall > 0.93
        assert counts.predicted_sparsity > counts.true_sparsity - 0.1


def test_calibration_recall_is_the_target_with_the_weights_of_the_file(trained, synthetic):
    for layer, predictor in enumerate(trained.layers):
        assert predictor.fc1_RD.dtype == torch.float16
        counts = recount(predictor, synthetic, "calibration", layer)
        assert counts.recall == pytest.approx(0.95, abs=0.002)
        stated = trained.manifest.calibration[layer]
        assert stated["recall"] == pytest.approx(counts.recall, abs=1e-3)
        assert stated["predicted_sparsity"] == pytest.approx(counts.predicted_sparsity, abs=1e-3)


def test_calibration_sparsity_is_the_target(recipe, synthetic, tmp_path):
    cfg = replace(recipe, out=tmp_path / "pred", target_recall=None, target_sparsity=0.7, epochs=1)
    for layer, predictor in enumerate(train(cfg).layers):
        counts = recount(predictor, synthetic, "calibration", layer)
        assert counts.predicted_sparsity == pytest.approx(0.7, abs=0.002)


def test_decisions_do_not_depend_on_the_norm_of_the_input(trained, synthetic):
    predictor = trained.layers[0]
    x_TD = synthetic.rows("held-out", 0, 0).x_TD
    exact = Predictor(predictor.fc1_RD.double(), predictor.fc2_FR.double())

    def decide(x: torch.Tensor) -> torch.Tensor:
        return (x.double() @ exact.fc1_RD.T).relu() @ exact.fc2_FR.T >= 0

    raw, scaled = decide(x_TD), decide(rms_normalized(x_TD))
    assert (raw == scaled).float().mean() >= 0.9999
    assert (decide(1000 * x_TD.double()) == raw).float().mean() >= 0.9999


def test_the_same_options_give_the_same_predictors(recipe, trained, tmp_path):
    again = train(replace(recipe, out=tmp_path / "pred"))
    for one, two in zip(trained.layers, again.layers, strict=True):
        assert torch.equal(one.fc1_RD, two.fc1_RD)
        assert torch.equal(one.fc2_FR, two.fc2_FR)


def test_a_finished_folder_is_kept(recipe, trained):
    path = recipe.out / "model_0.pt"
    before = path.stat().st_mtime_ns
    train(recipe)
    assert path.stat().st_mtime_ns == before


def test_other_options_do_not_overwrite_a_finished_folder(recipe, trained):
    with pytest.raises(InputError, match="epochs was 3, now 4"):
        train(replace(recipe, epochs=4))
    with pytest.raises(InputError, match="target_recall was 0.95, now 0.9"):
        train(replace(recipe, target_recall=0.9))


def test_predictors_of_other_activations_are_not_kept(
    recipe, trained, synthetic, tmp_path, edit_store
):
    other = edit_store(synthetic, tmp_path / "a", lambda _: None, fingerprint="f" * 16)
    with pytest.raises(InputError, match="another model"):
        train(replace(recipe, activations=other.folder))
    again = shutil.copytree(synthetic.folder, tmp_path / "b")
    assert train(replace(recipe, activations=again)).manifest == trained.manifest


def test_predictors_of_other_tokens_are_not_taken_for_finished(
    recipe, trained, synthetic, tmp_path, edit_store
):
    """As many other tokens of the same corpus and model."""

    def shuffle(tensors) -> None:
        tensors["id"] = tensors["id"].flip(0).contiguous()

    other = edit_store(synthetic, tmp_path / "acts", shuffle)
    with pytest.raises(InputError, match=r"made differently \(activations was '\w{32}', now '\w"):
        train(replace(recipe, activations=other.folder))


def test_a_store_that_lacks_a_layer_is_refused(recipe, tmp_path, model_folder, corpus):
    cfg = CollectConfig(
        model=str(model_folder),
        corpus=str(corpus),
        out=tmp_path / "acts",
        tokens=300,
        seq_len=64,
        layers=[1],
    )
    collect(cfg)
    with pytest.raises(InputError, match="without --layers"):
        train(replace(recipe, activations=cfg.out, out=tmp_path / "pred"))


@pytest.mark.parametrize("name", ["layer.0.x", "layer.1.mask"])
@pytest.mark.parametrize("split", ["train", "calibration"])
def test_a_flipped_bit_is_found_before_training(
    recipe, synthetic, tmp_path, flipped, monkeypatch, name, split
):
    monkeypatch.setattr(PredictorModule, "on_validation_epoch_end", lambda *_: pytest.fail("late"))
    folder = flipped(synthetic.folder, tmp_path / "acts", f"{split}-00001.safetensors", name)
    with pytest.raises(InputError, match=rf"{split}-00001\.safetensors: damaged, {name} has"):
        train(replace(recipe, activations=folder, out=tmp_path / "pred"))
    assert not (tmp_path / "pred").exists()


def test_nan_inputs_are_not_blamed_on_the_learning_rate(recipe, synthetic, tmp_path, edit_store):
    def spoil(tensors) -> None:
        tensors["layer.1.x"][3, 5] = float("nan")

    folder = edit_store(synthetic, tmp_path / "acts", spoil).folder
    with pytest.raises(InputError, match=r"layer\.1\.x, .* layer 1, holds NaN at token 3; collect"):
        train(replace(recipe, activations=folder, out=tmp_path / "pred"))


def test_a_predictor_folder_is_not_taken_for_activations(recipe, trained, tmp_path):
    with pytest.raises(InputError, match="holds predictors .*--predictors takes; expected activ"):
        train(replace(recipe, activations=recipe.out, out=tmp_path / "pred"))
    with pytest.raises(InputError, match=r"is a file, expected its folder; give"):
        train(replace(recipe, activations=recipe.activations / "manifest.json"))


def test_nothing_is_trained_where_nothing_fires(recipe, synthetic, tmp_path, edit_store):
    def silence(tensors) -> None:
        for layer in (0, 1):
            tensors[f"layer.{layer}.mask"].zero_()

    folder = edit_store(synthetic, tmp_path / "acts", silence).folder
    with pytest.raises(InputError, match="nothing fires in any layer on 7,000 tokens"):
        train(replace(recipe, activations=folder, out=tmp_path / "pred"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["acts"]


def test_an_interrupt_in_the_first_epoch_leaves_nothing(recipe, tmp_path, monkeypatch):
    """Ctrl-C still works afterwards, although Lightning leaves it ignored."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(PredictorModule, "on_validation_epoch_end", interrupt)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="nothing is left behind"):
        train(replace(recipe, out=tmp_path / "pred"))
    assert signal.getsignal(signal.SIGINT) is before
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_behind_the_last_epoch_says_what_is_kept(recipe, tmp_path, monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(recipes, "_calibrate", interrupt)
    with pytest.raises(KeyboardInterrupt, match="pred: interrupted; repeat the command to resume"):
        train(replace(recipe, out=tmp_path / "pred"))
    assert [path.name for path in tmp_path.iterdir()] == [".pred.train"]


@pytest.mark.parametrize(
    "changes",
    [{}, {"predictor_dtype": "q4_0"}, {"recipe": "reference", "target_recall": None}],
    ids=["f16", "q4_0", "reference"],
)
def test_a_run_killed_in_an_epoch_ends_as_an_uninterrupted_one(
    recipe, tmp_path, monkeypatch, changes
):
    cfg = replace(recipe, out=tmp_path / "whole", batch_size=512, **changes)
    whole = train(cfg)
    module = PublicRecipeModule if changes.get("recipe") else PredictorModule
    validate, seen = module.on_validation_epoch_end, []

    def die_in_the_third(self) -> None:
        seen.append(self.current_epoch)
        if len(seen) == 3:
            raise OSError("killed")
        validate(self)

    cfg = replace(cfg, out=tmp_path / "pred")
    with monkeypatch.context() as patch:
        patch.setattr(module, "on_validation_epoch_end", die_in_the_third)
        with pytest.raises(OSError, match="killed"):
            train(cfg)
    assert not cfg.out.exists()
    with pytest.raises(InputError, match=r"holds an unfinished run .*batch_size was 512, now 256"):
        train(replace(cfg, batch_size=256))
    resumed = train(cfg)
    assert seen == [0, 1, 2]
    for one, two in zip(whole.layers, resumed.layers, strict=True):
        for a, b in zip(one.weights, two.weights, strict=True):
            assert torch.equal(a, b)
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "pred"}
    for start in range(2):
        logs = cfg.out / "logs" / f"version_{start}"
        assert (logs / "metrics.csv").read_text().startswith("epoch")
        assert len(list(logs.glob("events.out.tfevents.*"))) == 1


@pytest.mark.parametrize("objective", [{"target_recall": 0.9}, {"target_sparsity": 0.7}])
def test_every_layer_keeps_its_own_best_epoch(recipe, synthetic, objective, monkeypatch):
    """After the first epoch layer 0 gets worse and layer 1 better; both keep the better weights."""
    cfg = replace(recipe, **{"target_recall": None, **objective})
    module = PredictorModule(
        start(synthetic, 28, "q8_0"),
        dtype="q8_0",
        objective=cfg.objective,
        schedule=cfg.schedule,
    )
    monkeypatch.setattr(module, "log", lambda *_, **__: None)

    def epoch() -> None:
        module.on_validation_epoch_start()
        for i, batch in enumerate(TokenBlocks(synthetic, "calibration", 512)):
            module.validation_step(batch, i)
        module.on_validation_epoch_end()

    good = module.fc2_LFR.detach().clone()
    with torch.no_grad():
        module.fc2_LFR[1] = torch.randn_like(good[1])
        epoch()
        module.fc2_LFR[0] = torch.randn_like(good[0])
        module.fc2_LFR[1] = good[1]
        epoch()
    # Recall at a sparsity of 0.7 is nearly 1; sparsity cannot be, with 12 % active.
    for score in module.best_score_L.tolist():
        assert (score > 0.92) == ("target_sparsity" in objective)
    for layer, weights in enumerate(module.best_weights([28, 28])):
        assert torch.equal(weights.fc2_FR, good[layer])


def test_a_run_that_cannot_be_written_keeps_its_training(recipe, tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    cfg = replace(recipe, out=tmp_path / "pred", epochs=1, batch_size=512)
    with monkeypatch.context() as patch:
        patch.setattr("sparsecast.predictors.checkpoint.write_json", fail)
        with pytest.raises(OSError, match="No space left"):
            train(cfg)
    assert {path.name for path in tmp_path.iterdir()} == {".pred.train"}
    monkeypatch.setattr(PredictorModule, "training_step", fail)
    train(cfg)
    assert {path.name for path in tmp_path.iterdir()} == {"pred"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_recall": 0.9, "target_sparsity": 0.7}, "not both"),
        ({"target_recall": 1.5}, "--target-recall"),
        ({"target_sparsity": 0.0}, "--target-sparsity"),
        ({"rank": 4}, "--rank: must be at least 5"),
        ({"rank": 64, "predictor_budget": 0.1}, "--rank or --predictor-budget"),
        ({"recipe": "magic"}, "--recipe: got 'magic', expected default, reference, svd"),
        ({"recipe": "svd"}, "give --model"),
        ({"recipe": "reference", "target_recall": 0.9}, "its threshold at 0"),
        ({"recipe": "reference", "predictor_dtype": "q4_0"}, "so --predictor-dtype q4_0 cannot be"),
        ({"recipe": "reference", "predictor_budget": 0.1}, "so --predictor-budget cannot be"),
        ({"seed": -1}, "--seed"),
        ({"predictor_dtype": "q5_0"}, "--predictor-dtype: got 'q5_0', expected f16, q8_0, q4_0"),
        ({"target_perplexity": 0.001}, "give --model"),
        ({"traffic_budget": 1.5}, "--traffic-budget"),
        ({"traffic_budget": 0.3, "target_recall": 0.9}, "not both"),
        ({"epochs": 0}, "--epochs"),
        ({"lr": 0.0}, "--lr"),
        ({"batch_size": 0}, "--batch-size"),
        ({"batch_size": 100}, "--batch-size"),
    ],
)
def test_options_out_of_range_are_named(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        TrainConfig(activations=tmp_path, out=tmp_path / "pred", **options)


def test_nan_weights_end_the_run(recipe, tmp_path):
    with pytest.raises(InputError, match="training diverged in epoch 0: .* a smaller --lr"):
        train(replace(recipe, out=tmp_path / "pred", lr=1e30, epochs=1))
    assert not (tmp_path / "pred").exists()


def test_a_rank_beyond_twice_the_hidden_size_is_refused(recipe, tmp_path):
    train(replace(recipe, out=tmp_path / "most", rank=128, epochs=1, batch_size=512))
    with pytest.raises(InputError, match="--rank: got 129, expected at most twice .* 128"):
        train(replace(recipe, out=tmp_path / "pred", rank=129))
    assert {path.name for path in tmp_path.iterdir()} == {"most"}


def test_a_second_run_and_a_foreign_folder_are_refused_before_any_work(recipe, tmp_path):
    with (
        FileLock(tmp_path / ".pred.lock"),
        pytest.raises(InputError, match="another training is writing it"),
    ):
        train(replace(recipe, out=tmp_path / "pred"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds other files"):
        train(replace(recipe, out=tmp_path / "mine"))
    with pytest.raises(InputError, match="is not a folder"):
        train(replace(recipe, out=tmp_path / "mine" / "notes.txt"))
    with pytest.raises(InputError, match="cannot be written"):
        train(replace(recipe, out=tmp_path / "mine" / "notes.txt" / "x"))


@pytest.mark.parametrize("dtype", ["f16", "q4_0"])
@pytest.mark.parametrize("silent", [True, False])
def test_layers_with_nothing_to_learn_still_get_predictors(
    recipe, synthetic, tmp_path, edit_store, capfd, silent, dtype
):
    """Layer 0 is silent or always active; layer 1 has inputs along a single direction."""

    def change(tensors) -> None:
        tensors["layer.0.mask"].fill_(0 if silent else 255)
        ones = torch.ones_like(tensors["layer.1.x"])
        tensors["layer.1.x"] = ones * torch.linspace(0.5, 2, len(ones))[:, None].half()

    store = edit_store(synthetic, tmp_path / "acts", change)
    cfg = replace(
        recipe,
        activations=store.folder,
        out=tmp_path / "pred",
        epochs=1,
        batch_size=512,
        predictor_dtype=dtype,
    )
    predictors = train(cfg)
    for predictor in predictors.layers:
        assert all(weight.isfinite().all() for weight in predictor.weights)
    told = "nothing fires in layer 0;" if silent else "every token in layer 0, so there is no"
    assert told in capfd.readouterr().err
    first, second = predictors.manifest.calibration
    if silent:
        assert first["recall"] == 1.0
        assert first["predicted_sparsity"] > 0.99
    else:
        assert first["recall"] > 0.94
    assert second["recall"] > 0.9

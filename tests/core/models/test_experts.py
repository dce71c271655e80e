"""Mixtures of experts: what is recorded, against forward passes written by hand."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file
from transformers import MixtralForCausalLM

from sparsecast.collect.config import CollectConfig
from sparsecast.collect.inspect import InspectConfig, inspect
from sparsecast.collect.run import collect
from sparsecast.collect.store.store import Manifest
from sparsecast.core.bitmask import unpack
from sparsecast.core.errors import InputError
from sparsecast.core.manifests import write_manifest
from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.core.models.loading import load_model
from sparsecast.predictors.config import TrainConfig
from sparsecast.predictors.train import train
from tests.tools.mixtures import LAYERS, NAMES, E, F, K, forward, write_mixture


@pytest.fixture(scope="module")
def mixture(tmp_path_factory, model_folder):
    root = tmp_path_factory.mktemp("mixtures")

    def folder(name: str):
        path = root / name
        return path if path.exists() else write_mixture(path, name, model_folder)

    return folder


@pytest.fixture(scope="module")
def short(tmp_path_factory, corpus):
    """Documents of 30 to 150 characters, so that batches have padding."""
    text = "".join(path.read_text() for path in sorted(corpus.iterdir())[:9])
    path = tmp_path_factory.mktemp("pieces") / "pieces.jsonl"
    starts = range(0, 60_000, 150)
    rows = [{"text": text[start : start + 30 + start % 120]} for start in starts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def recorded(mixture, short, tmp_path_factory):
    out = tmp_path_factory.mktemp("acts") / "acts"
    return collect(config(mixture("mixtral"), short, out, count_tokens=200))


def config(folder, corpus, out, **changes):
    base = {"tokens": 600, "seq_len": 64, "batch_size": 4, "device": "cpu"}
    base |= {"input_dtype": "float32"}
    return CollectConfig(model=str(folder), corpus=str(corpus), out=out, **{**base, **changes})


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_a_forward_pass_by_hand(name, mixture):
    ids = torch.randint(3, 500, (40,)).tolist()
    model, _ = load_model(str(mixture(name)), device="cpu")
    with torch.inference_mode():
        logits_TV = model(torch.tensor([ids])).logits[0]
    want_TV, _ = forward(mixture(name), ids)
    torch.testing.assert_close(logits_TV.double(), want_TV, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_records_each_experts_tokens(name, mixture, short, tmp_path):
    """Choices of the router, inputs and masks of two documents, one expert at a time."""
    store = collect(config(mixture(name), short, tmp_path / "acts"))
    made = store.manifest
    assert (made.experts, made.experts_per_token, made.ffn_width) == (E, K, F)
    assert made.activation == ("drelu" if name == "turbosparse" else "relu")
    ids, position = store.tokens("train", 0)
    starts = [*(position == 0).nonzero().flatten().tolist(), len(ids)]
    lengths = {stop - start for start, stop in zip(starts, starts[1:], strict=False)}
    assert len(lengths) > 3
    for start, stop in ((starts[1], starts[2]), (starts[6], starts[7])):
        _, layers = forward(mixture(name), ids[start:stop].tolist())
        for layer, want in enumerate(layers):
            assert_recorded(store, layer, start, stop, want)


def assert_recorded(store, layer, start, stop, want):
    fired_TkF = want.x1_TkF != 0
    covered = 0
    for expert in range(E):
        ffn = layer * E + expert
        token_T = store.routed("train", 0, ffn)
        rows = store.rows("train", 0, ffn)
        assert len(rows.x_TD) == len(token_T) == store.row_counts("train", ffn)[0]
        here = (token_T >= start) & (token_T < stop)
        own_T, slot_T = (want.chosen_Tk == expert).nonzero(as_tuple=True)
        assert torch.equal(token_T[here] - start, own_T)
        torch.testing.assert_close(rows.x_TD[here].double(), want.x_TD[own_T], rtol=1e-4, atol=1e-4)
        different = unpack(rows.mask_TP[here], F) != fired_TkF[own_T, slot_T]
        assert want.edge_TkF[own_T, slot_T][different].abs().sum() < 1e-4
        assert different.float().mean() < 1e-3
        covered += len(own_T)
    assert covered == K * (stop - start)


def test_statistics_are_counts_of_the_rows(recorded, tmp_path):
    store = recorded
    stats = store.stats()
    for ffn in store.manifest.ffns:
        masks = [
            unpack(store.rows(split, shard, ffn).mask_TP, F)
            for split in ("train", "calibration", "held-out")
            for shard in range(len(store.shards(split)))
        ]
        mask_TF = torch.cat(masks)
        splits = ["train", "calibration", "held-out"]
        assert torch.equal(stats.fired(ffn, splits), mask_TF.sum(0))
        spread = stats.token_sparsity(ffn, splits)
        assert spread.tokens == len(mask_TF)
        assert spread.mean == pytest.approx(1 - mask_TF.double().mean().item())
    routed = [stats.token_sparsity(ffn, ["counted"]).tokens for ffn in store.manifest.ffns]
    assert [sum(routed[i * E : i * E + E]) for i in range(LAYERS)] == [200 * K] * LAYERS

    shown = inspect(InspectConfig(path=store.folder, json=tmp_path / "i.json"))
    assert shown.ok
    rows = json.loads((tmp_path / "i.json").read_text())["experts"]
    assert [(row["layer"], row["expert"]) for row in rows] == [
        (i, e) for i in range(LAYERS) for e in range(E)
    ]
    assert [row["tokens"] for row in rows] == [
        stats.token_sparsity(ffn).tokens for ffn in store.manifest.ffns
    ]
    assert len(shown.values["layers"]) == LAYERS
    assert shown.values["bytes_per_token_layer"] < 1.2 * shown.values["bound"]


def test_a_resumed_collection_has_the_same_bytes(mixture, short, tmp_path):
    whole = collect(config(mixture("mixtral"), short, tmp_path / "a"))
    partial = tmp_path / ".b.part"
    again = config(mixture("mixtral"), short, tmp_path / "b")
    collect(again)
    (tmp_path / "b").rename(partial)
    (partial / "train-00000.safetensors").unlink()
    manifest = json.loads((partial / "manifest.json").read_text())
    manifest |= {"shard_tokens": {}, "checksums": {}, "documents": {}, "truncated": {}}
    write_manifest(partial, Manifest(**manifest))
    collect(again)
    for path in whole.folder.iterdir():
        if path.name not in ("manifest.json", "run.json"):
            assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


@pytest.mark.parametrize("x_dtype", ["int8", "bfloat16"])
def test_input_types_change_no_choice_and_no_mask(x_dtype, mixture, short, tmp_path):
    one = collect(config(mixture("mixtral"), short, tmp_path / "a"))
    other = collect(config(mixture("mixtral"), short, tmp_path / "b", input_dtype=x_dtype))
    for ffn in one.manifest.ffns:
        a, b = one.rows("train", 0, ffn, 3, 9), other.rows("train", 0, ffn, 3, 9)
        assert torch.equal(a.mask_TP, b.mask_TP)
        assert len(a.x_TD) == 6
        step_T1 = a.x_TD.abs().amax(1, keepdim=True) / (127 if x_dtype == "int8" else 128)
        assert bool(((a.x_TD - b.x_TD.float()).abs() <= 0.51 * step_T1).all())


def test_the_loop_equals_transformers_own_experts(mixture):
    folder = mixture("mixtral")
    theirs = MixtralForCausalLM.from_pretrained(folder).eval()
    ours, _ = load_model(str(folder), device="cpu")
    ids = torch.randint(3, 500, (2, 50))
    with torch.inference_mode():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)


def test_a_file_of_3d_experts_is_read_too(mixture, tmp_path):
    """As transformers keeps them in memory."""
    folder = mixture("mixtral")
    model = MixtralForCausalLM.from_pretrained(folder)
    copy = tmp_path / "m"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    save_file(
        {name: value.clone() for name, value in model.state_dict().items()},
        copy / "model.safetensors",
        {"format": "pt"},
    )
    Checkpoint(str(copy)).check()
    loaded, _ = load_model(str(copy), device="cpu")
    ids = torch.randint(3, 500, (1, 20))
    with torch.inference_mode():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_local_experts": 8}, "describes 8 experts per layer, but the weights hold 4"),
        ({"num_local_experts": 2**31 - 1}, "describes 2,147,483,647 experts"),
        ({"num_experts_per_tok": 5}, "routes each token to 5 of 4 experts"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok is 0"),
        ({"intermediate_size": 104}, "is \\[96, 64\\], but config.json describes \\[104, 64\\]"),
        ({"hidden_act": "silu"}, "leaves no exact zeros"),
    ],
)
def test_a_config_of_another_mixture_is_refused(change, says, tmp_path, model_folder):
    folder = write_mixture(tmp_path / "m", "mixtral", model_folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=says) as error:
        load_model(str(folder), device="cpu")
    assert "\n" not in str(error.value)


def test_a_missing_matrix_of_one_expert_is_named(mixture, tmp_path, model_folder):
    folder = write_mixture(tmp_path / "m", "mixtral", model_folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"layers\.1\.block_sparse_moe\.experts\.2\.w3.* missing"):
        load_model(str(folder), device="cpu")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"experts": 10**15}, "holds no counts|going by manifest"),
        ({"experts_per_token": 1}, "holds no counts|going by manifest"),
        ({"experts_per_token": 5}, "its experts makes no sense"),
        ({"experts": 0}, "its experts makes no sense"),
        ({"experts": "4"}, "its experts makes no sense"),
        ({"energy": True}, "its experts makes no sense"),
    ],
)
def test_a_manifest_of_other_experts_is_refused(fields, says, recorded, tmp_path):
    """With checksums that fit: what nobody but somebody hostile would do."""
    copy = shutil.copytree(recorded.folder, tmp_path / "acts")
    value = json.loads((copy / "manifest.json").read_text()) | fields
    sums = value["checksums"]
    del sums["manifest.json"]
    text = json.dumps(value, sort_keys=True).encode()
    sums["manifest.json"] = xxhash.xxh3_128_hexdigest(text)
    (copy / "manifest.json").write_text(json.dumps(value))
    with pytest.raises(InputError, match=says):
        train(TrainConfig(activations=copy, out=tmp_path / "pred", device="cpu"))


def test_energies_are_refused(mixture, corpus, tmp_path):
    with pytest.raises(InputError, match="--energy: .* is a mixture of experts"):
        collect(config(mixture("mixtral"), corpus, tmp_path / "a", energy=True))

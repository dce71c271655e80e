"""The whole stage, against an independent dense forward."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from sparsecast.collect.config import CollectConfig
from sparsecast.collect.run import collect
from sparsecast.collect.store.store import ActivationStore
from sparsecast.core.bitmask import pack, unpack
from sparsecast.core.errors import InputError
from sparsecast.core.models.loading import load_model, max_positions, open_model
from sparsecast.core.text.corpus import Document, read_documents
from sparsecast.core.text.splits import SPLITS, assign_splits
from sparsecast.core.text.tokens import split_quotas, token_batches, tokenize_documents


@given(st.integers(0, 5), st.integers(1, 40), st.integers(0, 2**31))
def test_bits_are_numpys_little_endian(n_tokens, width, seed):
    mask = np.random.default_rng(seed).random((n_tokens, width)) < 0.3
    packed = pack(torch.from_numpy(mask))
    assert np.array_equal(packed.numpy(), np.packbits(mask, axis=1, bitorder="little"))
    assert np.array_equal(unpack(packed, width).numpy(), mask)


def test_store_counts_what_it_holds(acts):
    for layer in acts.manifest.layers:
        fired = torch.zeros(acts.manifest.ffn_width, dtype=torch.int64)
        for split in SPLITS:
            for shard, tokens in enumerate(acts.shards(split)):
                rows = acts.rows(split, shard, layer)
                assert rows.x_TD.shape == (tokens, acts.manifest.hidden_size)
                fired += unpack(rows.mask_TP, acts.manifest.ffn_width).sum(0)
        assert torch.equal(fired, acts.stats().fired(layer))
    assert acts.manifest.tokens() == 6_000
    assert acts.manifest.tokens("held-out") == 300


def test_recorded_input_reproduces_the_recorded_mask(acts, model_folder):
    """Through the family's own norm and projections; ties with the threshold may round away."""
    model, _ = load_model(str(model_folder), device="cpu")
    for i, layer in enumerate(model.model.layers):
        rows = acts.rows("held-out", 0, i)
        norm = LlamaRMSNorm(64, eps=model.config.rms_norm_eps)
        norm.weight = layer.post_attention_layernorm.weight
        with torch.inference_mode():
            normed = norm(rows.x_TD.float())
            gate = normed @ layer.mlp.gate_proj.weight.T
            up = normed @ layer.mlp.up_proj.weight.T
        fired = (gate >= 0.2) & (up != 0)
        same = fired == unpack(rows.mask_TP, 1280)
        assert same.float().mean() > 0.999
        assert (gate[~same] - 0.2).abs().max() < 0.01
        assert 0.05 < fired.float().mean() < 0.95


@pytest.fixture(scope="module")
def windows(model_folder, corpus, tmp_path_factory):
    """6,000 tokens, of long documents in windows."""
    return collect(config(model_folder, corpus, tmp_path_factory.mktemp("windows") / "acts"))


def test_recorded_tokens_are_those_of_a_dense_forward(windows, model_folder, corpus):
    """Same order, no padding: layer 0's input follows from embedding and attention alone."""
    model, tokenizer = load_model(str(model_folder), device="cpu")
    want = []
    docs = assign_splits(read_documents(str(corpus), long_documents="split"))
    read = token_batches(
        docs,
        tokenizer,
        split_quotas(6_000),
        seq_len=256,
        batch_size=8,
        long_documents="split",
    )
    for batch in read:
        if batch.split != "held-out":
            continue
        for ids, keep in zip(batch.ids_BS, batch.keep_BS, strict=True):
            captured = []
            hook = model.model.layers[0].post_attention_layernorm.register_forward_pre_hook(
                lambda _, args, captured=captured: captured.append(args[0][0])
            )
            with torch.inference_mode():
                model(ids[keep][None])
            hook.remove()
            want.append(captured[0])
    got = windows.rows("held-out", 0, 0).x_TD.float()
    torch.testing.assert_close(got, torch.cat(want), rtol=2e-3, atol=2e-3)


def config(model_folder, corpus, out, **changes) -> CollectConfig:
    base = CollectConfig(
        model=str(model_folder), corpus=str(corpus), out=out, tokens=6_000, seq_len=256
    )
    return replace(base, **changes)


def test_a_finished_store_is_kept_and_other_options_are_refused(windows, model_folder, corpus):
    before = {p.name: p.stat().st_mtime_ns for p in windows.folder.iterdir()}

    collect(config(model_folder, corpus, windows.folder))

    assert {p.name: p.stat().st_mtime_ns for p in windows.folder.iterdir()} == before
    with pytest.raises(InputError, match=r"seq_len was 256, now 64"):
        collect(config(model_folder, corpus, windows.folder, seq_len=64))


def test_chosen_layers_and_bf16(model_folder, corpus, tmp_path):
    cfg = config(model_folder, corpus, tmp_path / "a", layers=[2, 0], dtype="bfloat16", tokens=600)
    store = collect(cfg)
    assert store.manifest.layers == [0, 2]
    assert store.rows("train", 0, 2).x_TD.dtype == torch.bfloat16
    with pytest.raises(InputError, match=r"--layers: .* 0 to 2, got \[3\]"):
        collect(config(model_folder, corpus, tmp_path / "b", layers=[3]))
    assert not (tmp_path / "b").exists()


def test_a_foreign_folder_is_not_touched(model_folder, corpus, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds other files"):
        collect(config(model_folder, corpus, tmp_path))
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_more_tokens_in_a_row_than_the_model_was_made_for_are_refused(
    model_folder, corpus, tmp_path
):
    with pytest.raises(InputError, match=r"--seq-len: got 257, but .* made for 256 positions"):
        collect(config(model_folder, corpus, tmp_path / "a", seq_len=257))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("kind", "fits"), [("linear", True), ("dynamic", True), ("yarn", False)])
def test_rope_that_states_its_stretched_length_is_not_stretched_again(model_folder, kind, fits):
    model, _ = load_model(str(model_folder), device="cpu")
    model.config.rope_parameters = {"rope_type": kind, "factor": 4.0, "rope_theta": 5e4}
    assert max_positions(model) == (1024 if fits else 256)


def test_a_token_without_an_embedding_is_refused_before_it_runs(model_folder, corpus, tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(model_folder, copy)
    config_of = json.loads((copy / "config.json").read_text())
    weights = load_file(copy / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name][:300].clone()
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    (copy / "config.json").write_text(json.dumps(config_of | {"vocab_size": 300}))
    with pytest.raises(InputError, match=r"tokenizer has '.*' as id 300, but .* ids 0 to 299"):
        collect(config(copy, corpus, tmp_path / "a", tokens=600))
    assert not (tmp_path / "a").exists()


def test_a_special_token_without_an_embedding_is_refused_where_a_text_gives_it(model_folder):
    tokenizer = open_model(str(model_folder))[1]
    docs = [("train", Document("a", "import os"))]
    with pytest.raises(
        InputError, match=r"gives id \d+ \('.*'\), but the model has embeddings for"
    ):
        list(tokenize_documents(docs, tokenizer, {"train": 9}, 9, vocabulary=50))


def test_out_may_be_a_link(model_folder, corpus, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "real")
    store = collect(config(model_folder, corpus, tmp_path / "link", tokens=600))
    assert (tmp_path / "link").is_symlink()
    assert store.manifest.tokens() == 600
    assert {path.name for path in tmp_path.iterdir()} == {"link", "real"}
    for bad in (Path("/"), Path("/dev/null"), Path("/proc/acts")):
        with pytest.raises(InputError, match=f"{bad}: "):
            collect(config(model_folder, corpus, bad))


def test_a_corpus_that_fails_leaves_nothing_and_blocks_nothing(model_folder, corpus, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    out = tmp_path / "acts"
    with pytest.raises(InputError, match="2 different document"):
        collect(config(model_folder, tmp_path / "a.jsonl", out))
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
    part = tmp_path / ".acts.part"
    part.mkdir()
    (part / "manifest.json").write_text("killed before the first shard")
    assert collect(config(model_folder, corpus, out, tokens=600)).manifest.tokens() == 600


def test_a_finished_store_of_another_tokenizer_is_refused(model_folder, corpus, tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(model_folder, copy)
    cfg = config(copy, corpus, tmp_path / "a", tokens=600)
    collect(cfg)
    text = (copy / "tokenizer.json").read_text()
    (copy / "tokenizer.json").write_text(text.replace('"prepend": "▁"', '"prepend": "▁▁"'))
    with pytest.raises(InputError, match="tokenizer was "):
        collect(cfg)


def test_damaged_stores_are_named(acts, tmp_path):
    with pytest.raises(InputError, match=r"manifest\.json: no such file"):
        ActivationStore(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"format_version": 99}))
    with pytest.raises(InputError, match="format version 99"):
        ActivationStore(tmp_path)
    (tmp_path / "manifest.json").write_text((acts.folder / "manifest.json").read_text())
    with pytest.raises(InputError, match=r"train-00000\.safetensors: no such file, expected"):
        ActivationStore(tmp_path).rows("train", 0, 0)


def test_the_command_line_exits_with_2_and_one_line(tmp_path, sparsecast_forked):
    args = [
        "collect",
        "--model",
        str(tmp_path),
        "--corpus",
        "builtin",
        "--out",
        str(tmp_path / "o"),
    ]
    done = sparsecast_forked(args)
    _, error = done.communicate()
    assert done.returncode == 2
    assert error.count("\n") == 1
    assert "no config.json" in error
    assert not (tmp_path / "o").exists()

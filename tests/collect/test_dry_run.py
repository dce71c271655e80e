"""--dry-run of collect tells what the run then takes, and leaves no trace."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig

from sparsecast.cli.main import main
from sparsecast.collect.config import CollectConfig
from sparsecast.collect.dry_run import forecast
from sparsecast.collect.outline import make_outline
from sparsecast.collect.run import collect
from sparsecast.core import disk, dry_run, memory
from sparsecast.core.errors import InputError
from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.core.models.loading import load_model

SHAPES = {"7b": (4096, 11008, 32, 32), "13b": (5120, 13824, 40, 40), "70b": (8192, 28672, 80, 8)}
"""Llama 2: hidden size, FFN width, layers, heads of keys and values."""


@pytest.fixture(autouse=True)
def _once(monkeypatch):
    """Measure everything once."""
    monkeypatch.setattr(dry_run, "LONG", 0)


@pytest.fixture
def asked(tmp_path, model_folder, corpus):
    return CollectConfig(
        model=str(model_folder), corpus=str(corpus), out=tmp_path / "acts", tokens=3_000, seq_len=64
    )


def test_it_tells_what_the_run_then_takes(asked, tmp_path):
    model, _ = load_model(asked.model)

    found = forecast(replace(asked, dry_run=True))

    assert not list(tmp_path.iterdir())
    assert found is not None
    store = collect(asked)
    taken = sum(path.stat().st_size for path in store.folder.iterdir())
    assert found.disk == pytest.approx(taken, rel=0.1)
    assert found.host["weights"] == sum(weight.nbytes for weight in model.parameters())
    assert 0 < found.host["shards"] < taken
    assert 0 < found.seconds["recording"] < 600
    assert found.seconds["loading"] > 0
    assert found.device_bytes == 0


def test_the_command_prints_a_table_and_ends_well(asked, tmp_path, capfd):
    args = ["--model", asked.model, "--corpus", asked.corpus, "--out", str(asked.out)]
    with pytest.raises(SystemExit) as ended:
        main(["collect", *args, "--tokens", "3000", "--seq-len", "64", "--dry-run"])
    assert ended.value.code == 0
    told = " ".join(capfd.readouterr().err.split())
    assert re.search(r"disk [\d.]+ MB, .* host memory .* weights [\d.]+ MB .* time 0:0", told)
    assert not list(tmp_path.iterdir())


def test_an_option_more_does_not_make_another_store(asked, capfd):
    collect(asked)
    assert forecast(replace(asked, dry_run=True)) is None
    assert "already collected" in capfd.readouterr().err
    collect(asked)
    with pytest.raises(InputError, match=r"dry_run: .*collect\.dry_run\.forecast"):
        collect(replace(asked, dry_run=True))


@pytest.fixture
def no_weights(monkeypatch):
    def load(*_: object, **__: object) -> None:
        pytest.fail("weights were loaded")

    monkeypatch.setattr("sparsecast.collect.run.load_model", load)
    monkeypatch.setattr("sparsecast.collect.dry_run.load_first_layers", load)


@pytest.mark.parametrize("limit", ["disk", "memory"])
def test_what_cannot_fit_is_refused_by_both_before_anything_is_loaded(
    asked, no_weights, monkeypatch, limit, capfd
):
    assert Checkpoint(asked.model).config.dtype == torch.float16
    if limit == "disk":
        monkeypatch.setattr(disk, "free_bytes", lambda _: 1_000_000)
    else:
        monkeypatch.setattr(memory, "host_limit", lambda: 1_000_000)
    said = []
    for run in (collect, forecast):
        with pytest.raises(InputError, match=r"needs [\d.]+ MB.*, but .* 1 MB") as refused:
            run(asked)
        said.append(str(refused.value))
    assert said[0] == said[1]
    assert "not measured, since the run does not fit" in capfd.readouterr().err
    assert not list(asked.out.parent.iterdir())


def test_weights_that_stay_a_map_of_their_file_are_not_refused(asked, monkeypatch):
    monkeypatch.setattr(memory, "host_limit", lambda: 1_000_000)
    assert collect(replace(asked, dtype="float16")).manifest.tokens() == 3_000


def test_weights_beyond_a_gpu_are_refused(asked, no_weights, monkeypatch):
    monkeypatch.setattr(memory, "device_limit", lambda device: 1_000_000)
    monkeypatch.setattr(
        "sparsecast.collect.outline.pick_device", lambda name: torch.device("cuda:0")
    )
    with pytest.raises(InputError, match=r"acts: the model in float16 .* cuda:0 has 1 MB"):
        collect(asked)


def test_a_folder_without_weights_will_do(asked, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(asked.model, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    with_weights = forecast(asked)

    found = forecast(replace(asked, model=str(bare)))

    assert found is not None
    assert with_weights is not None
    assert found.disk == with_weights.disk
    assert found.host["weights"] == with_weights.host["weights"]
    assert list(found.seconds) == ["recording"]


@pytest.mark.parametrize("size", SHAPES)
def test_large_shapes_by_hand(size, tmp_path):
    hidden, ffn, layers, kv_heads = SHAPES[size]
    LlamaConfig(
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 128,
        num_key_value_heads=kv_heads,
        vocab_size=32_000,
        hidden_act="relu",
        architectures=["LlamaForCausalLM"],
        dtype="float16",
    ).save_pretrained(tmp_path)
    cfg = CollectConfig(model=str(tmp_path), corpus="builtin", out=tmp_path / "acts", device="cpu")

    outline = make_outline(cfg, Checkpoint(cfg.model))

    attention = 2 * hidden * hidden + 2 * hidden * 128 * kv_heads
    each = attention + 3 * hidden * ffn + 2 * hidden
    parameters = 2 * 32_000 * hidden + layers * each + hidden
    assert parameters == pytest.approx({"7b": 6.74e9, "13b": 13.0e9, "70b": 69.0e9}[size], rel=1e-2)
    assert outline.needs.model == 4 * parameters
    assert outline.needs.store == pytest.approx(400_000 * layers * (2 * hidden + ffn / 8), rel=0.02)
    token = layers * (2 * hidden + ffn / 8 + 4)
    assert outline.needs.buffers == pytest.approx(3 * max(2**27, 4096 * token), rel=0.02)


def test_weights_that_stay_mapped_are_not_counted_as_needed(asked):
    """They may be larger than the memory: the system drops their pages and reads them again."""
    own = forecast(asked)
    mapped = forecast(replace(asked, dtype="float16"))
    assert own is not None
    assert mapped is not None
    assert "weights" not in mapped.host
    assert mapped.pages >= own.host["weights"] // 2


def test_it_refuses_what_the_run_refuses(asked, tmp_path):
    """An output made with other options, too long sequences, and a corpus without text."""
    (tmp_path / "silent.jsonl").write_text('{"title": 1}\n')
    for wrong in ({"seq_len": 100_000}, {"corpus": str(tmp_path / "silent.jsonl")}):
        for run in (forecast, collect):
            with pytest.raises(InputError, match="--seq-len: got|silent.jsonl"):
                run(replace(asked, **wrong))
    collect(asked)
    os.rename(asked.out, tmp_path / ".acts.part")
    with pytest.raises(InputError, match=r"\.acts\.part: .* made differently \(seq_len was 64"):
        forecast(replace(asked, seq_len=32))
    assert forecast(asked) is not None
    os.rename(tmp_path / ".acts.part", asked.out)
    with pytest.raises(InputError, match=r"made differently \(seq_len was 64"):
        forecast(replace(asked, seq_len=32))
    assert forecast(asked) is None

"""What a collection takes is said, and refused, before its model is loaded."""

from __future__ import annotations

import errno
import re
from dataclasses import replace

import pytest
import torch

from sparsecast.collect.config import CollectConfig
from sparsecast.collect.estimate import store_bytes
from sparsecast.collect.run import collect
from sparsecast.collect.store.shard import Shape
from sparsecast.core import disk
from sparsecast.core.errors import InputError
from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.core.models.loading import load_model
from sparsecast.core.models.pretrained import empty_model
from sparsecast.core.models.shape import model_shape, weight_bytes
from sparsecast.core.text.tokens import split_quotas


@pytest.fixture
def asked(tmp_path, model_folder, corpus):
    return CollectConfig(
        model=str(model_folder), corpus=str(corpus), out=tmp_path / "acts", tokens=3_000, seq_len=64
    )


def taken(folder) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layers": [1]},
        {"input_dtype": "int8"},
        {"input_dtype": "float32", "count_tokens": 2_000},
        {"tokens": 9_000},
    ],
)
def test_the_estimate_is_within_a_tenth(asked, capfd, options):
    store = collect(replace(asked, **options))
    said = re.search(r"takes about ([\d.]+) (kB|MB) of disk", capfd.readouterr().err)
    assert said is not None
    told = float(said[1]) * {"kB": 1e3, "MB": 1e6}[said[2]]
    assert told == pytest.approx(taken(store.folder), rel=0.1)


def test_the_default_of_a_7b_takes_what_the_documentation_says():
    shape = Shape(layers=range(32), hidden_size=4096, ffn_width=11008, x_dtype="float16")
    assert store_bytes(shape, split_quotas(400_000)) == pytest.approx(123e9, rel=0.02)


def test_the_outline_is_the_model_without_its_weights(model_folder):
    drawn = empty_model(Checkpoint(str(model_folder)).config)
    model, _ = load_model(str(model_folder))
    assert all(weight.is_meta for weight in drawn.parameters())
    assert model_shape(drawn) == model_shape(model)
    held = sum(weight.nbytes for weight in model.parameters())
    assert weight_bytes(drawn, torch.float32) == held


@pytest.fixture
def no_model(monkeypatch):
    def load(*_: object, **__: object) -> None:
        pytest.fail("the model was loaded")

    monkeypatch.setattr("sparsecast.collect.run.load_model", load)


def test_what_the_disk_cannot_hold_is_refused(asked, no_model, monkeypatch):
    monkeypatch.setattr(disk, "free_bytes", lambda _: 2_000_000)
    with pytest.raises(InputError, match=r"the store needs 2\.\d+ MB, but only 2 MB are free"):
        collect(asked)
    assert not list(asked.out.parent.iterdir())


def test_a_resumed_run_needs_what_is_not_there_yet(asked, monkeypatch, capfd):
    collect(replace(asked, out=asked.out.with_name("whole")))
    asked.out.with_name("whole").rename(asked.out.with_name(".acts.part"))
    monkeypatch.setattr(disk, "free_bytes", lambda _: 500_000)
    collect(asked)
    assert "resuming" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("/no/such/folder", "no such file or folder"),
        ("", "--corpus: is empty"),
        ("{tmp}/two.jsonl", "2 different document"),
        ("{tmp}/bad.jsonl", r"bad\.jsonl:1: not JSON"),
        ("{tmp}/wide.txt", "byte order mark of UTF-16"),
    ],
)
def test_the_corpus_is_looked_at_before_the_model_is_loaded(asked, tmp_path, no_model, spec, words):
    (tmp_path / "two.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    (tmp_path / "bad.jsonl").write_text("text\n")
    (tmp_path / "wide.txt").write_text("text", encoding="utf-16")
    with pytest.raises(InputError, match=words):
        collect(replace(asked, corpus=spec.format(tmp=tmp_path)))


@pytest.mark.parametrize("layers", [[], [3], [-1]])
def test_so_are_the_layers(asked, no_model, layers):
    with pytest.raises(InputError, match="--layers: "):
        collect(replace(asked, layers=layers))


@pytest.mark.parametrize("kept", [0, 1])
def test_a_full_disk_is_told_with_what_is_kept(asked, monkeypatch, kept):
    written = []

    def to_folder(folder):
        def write(name, image):
            if len(written) == kept:
                raise OSError(errno.ENOSPC, "No space left on device", str(folder / name))
            (folder / name).write_bytes(b"".join(image.blocks()))
            written.append(name)

        return write

    monkeypatch.setattr("sparsecast.collect.recording.to_folder", to_folder)
    with pytest.raises(OSError, match=r"-00000\.safetensors: No space left on device") as failed:
        collect(asked)
    said = str(failed.value)
    assert re.search(r"acts: cannot be written .*; the store needs [\d.]+ MB of disk, ", said)
    assert "are free there now; " in said
    assert (f"{kept} finished shards are kept" if kept else "nothing is left behind") in said
    assert (asked.out.with_name(".acts.part").is_dir()) == bool(kept)

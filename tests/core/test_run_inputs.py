"""Fingerprints of inputs: what changes them, and how much is read."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from sparsecast.core import run_inputs
from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.core.run_inputs import (
    describe_changes,
    fingerprint_corpus,
    fingerprint_files,
    fingerprint_model,
)


@pytest.fixture
def text(tmp_path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    for name in "abc":
        (folder / f"{name}.txt").write_text(f"{name} text " * 20)
    return folder


def test_a_corpus_is_the_same_elsewhere_and_under_other_names(text, tmp_path):
    before = fingerprint_corpus(str(text))
    moved = Path(shutil.move(text, tmp_path / "moved"))
    for path in moved.iterdir():
        path.rename(path.with_name(f"new-{path.name}"))
    assert fingerprint_corpus(str(moved)) == fingerprint_corpus(f"{moved}/*.txt") == before


def test_any_change_of_a_small_corpus_is_seen(text):
    found = {fingerprint_corpus(str(text))}
    raw = (text / "b.txt").read_bytes()
    for at in range(0, len(raw), 40):
        (text / "b.txt").write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
        found.add(fingerprint_corpus(str(text)))
    (text / "b.txt").write_bytes(raw + b"\n")
    found.add(fingerprint_corpus(str(text)))
    (text / "d.txt").write_bytes(b"")
    found.add(fingerprint_corpus(str(text)))
    assert len(found) == 1 + len(range(0, len(raw), 40)) + 2


def test_of_many_bytes_a_part_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(run_inputs, "MOST", 16 * 4096)
    paths = [tmp_path / name for name in ("large", "small")]
    paths[0].write_bytes(os.urandom(100 * 4096))
    paths[1].write_bytes(b"x" * 100)
    before = fingerprint_files(paths)
    raw = bytearray(paths[0].read_bytes())
    changed = set()
    for at in (0, len(raw) - 1):
        raw[at] ^= 1
        paths[0].write_bytes(raw)
        changed.add(fingerprint_files(paths))
        raw[at] ^= 1
    paths[0].write_bytes(raw)
    paths[1].write_bytes(b"y" * 100)
    changed.add(fingerprint_files(paths))
    assert len(changed | {before}) == 4
    reads = []
    monkeypatch.setattr(run_inputs.xxhash, "xxh3_128", lambda: Counting(reads))
    fingerprint_files(paths)
    assert sum(reads) <= 17 * 4096


class Counting:
    def __init__(self, reads: list[int]) -> None:
        self.reads = reads

    def update(self, data: bytes | str) -> None:
        self.reads.append(len(data))

    def hexdigest(self) -> str:
        return ""


def test_of_a_model_weights_config_and_tokenizer_are_told_apart(model_folder, tmp_path):
    copy = Path(shutil.copytree(model_folder, tmp_path / "model"))
    before = fingerprint_model(Checkpoint(str(copy)))
    assert before == fingerprint_model(Checkpoint(str(model_folder)))
    config = copy / "config.json"
    config.write_text(config.read_text().replace("transformers_version", "_name_or_path"))
    assert fingerprint_model(Checkpoint(str(copy))) == before
    config.write_text(config.read_text().replace("50000.0", "60000.0"))
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    now = fingerprint_model(Checkpoint(str(copy)))
    assert describe_changes({"model": before}, {"model": now}) == ["model (config, tokenizer)"]


def test_what_cannot_be_compared_is_no_change(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    assert fingerprint_corpus("-") is fingerprint_corpus(str(fifo)) is None
    assert fingerprint_corpus("someone/text@train") is None
    assert describe_changes({"corpus": None, "model": "a"}, {"corpus": "b"}) == []


def test_builtin_is_the_versions_of_its_packages():
    found = fingerprint_corpus("builtin")
    assert {"python", "torch", "scikit-learn"} <= set(found)
    other = found | {"torch": "0"}
    assert describe_changes({"corpus": other}, {"corpus": found}) == ["corpus (torch)"]

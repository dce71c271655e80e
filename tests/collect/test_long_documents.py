"""Stores of windows and of cut documents, those of earlier versions, and rows that are left out."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import pytest

from sparsecast.collect.config import CollectConfig
from sparsecast.collect.inspect import InspectConfig, inspect
from sparsecast.collect.output import begin_or_resume, partial_folder
from sparsecast.collect.run import collect
from sparsecast.collect.store.store import Manifest, read_manifest
from sparsecast.core.errors import InputError
from sparsecast.core.manifests import write_manifest
from sparsecast.core.messages import log
from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.core.text.tokens import encode
from sparsecast.core.tokenizers.loading import load_tokenizer

SEQ_LEN = 64


@pytest.fixture(scope="module")
def books(corpus, tmp_path_factory):
    """30 rows of different lengths, and 3 that cannot be used."""
    texts = [path.read_text() for path in sorted(corpus.iterdir())]
    path = tmp_path_factory.mktemp("books") / "books.jsonl"
    rows = [{"text": texts[i % len(texts)][i : i + 60 + 12 * i]} for i in range(30)]
    rows[10:10] = [{"text": None}, {"prompt": "x"}, {"messages": [{"role": "user"}]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def cfg(model_folder, books, tmp_path_factory):
    out = tmp_path_factory.mktemp("stores") / "split"
    return CollectConfig(
        model=str(model_folder), corpus=str(books), out=out, tokens=10**6, seq_len=SEQ_LEN
    )


@pytest.fixture(scope="module")
def told():
    """What is logged, as long as these tests run."""
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    log.addHandler(handler)
    level = log.level
    log.setLevel("INFO")
    yield records
    log.setLevel(level)
    log.removeHandler(handler)


@pytest.fixture(scope="module")
def store(cfg, told):
    return collect(cfg)


@pytest.fixture(scope="module")
def cut(cfg, told):
    return collect(replace(cfg, out=cfg.out.with_name("cut"), long_documents="cut"))


def sequences(store) -> dict[str, list[list[int]]]:
    found: dict[str, list[list[int]]] = {}
    for split, counts in store.manifest.shard_tokens.items():
        for shard in range(len(counts)):
            for i, place in zip(*(v.tolist() for v in store.tokens(split, shard)), strict=True):
                if place == 0:
                    found.setdefault(split, []).append([])
                assert place == len(found[split][-1])
                found[split][-1].append(i)
    return found


def test_a_store_holds_every_window_once_in_its_documents_split(store, cut, model_folder, books):
    tokenizer = load_tokenizer(Checkpoint(str(model_folder)))
    room, bos = SEQ_LEN - 1, tokenizer.bos_token_id
    found, first = sequences(store), sequences(cut)
    rows = [json.loads(line) for line in books.read_text().splitlines()]
    texts = [text.strip() for row in rows if isinstance(text := row.get("text"), str)]
    seen = 0
    for text in texts:
        ids = encode(tokenizer, text, 10**9)[1:]
        want = [[bos, *ids[i : i + room]] for i in range(0, len(ids), room)]
        (split,) = [name for name, there in found.items() if want[0] in there]
        for window in want:
            assert found[split].count(window) == 1
        assert want[0] in first[split]
        seen += len(want)
    assert sum(map(len, found.values())) == seen > 60
    assert sum(map(len, first.values())) == len(texts)


def test_the_manifest_states_windows_documents_and_rows_left_out(store, cut, caplog):
    made = store.manifest
    assert made.options["long_documents"] == "split"
    assert cut.manifest.options["long_documents"] == "cut"
    assert sum(made.documents.values()) == 30
    assert 10 < sum(made.truncated.values()) < 30
    assert made.documents == cut.manifest.documents
    assert made.truncated == cut.manifest.truncated
    assert made.skipped == cut.manifest.skipped == 3
    with caplog.at_level("INFO", "sparsecast"):
        inspect(InspectConfig(path=store.folder))
    assert "in windows); 3 rows could not be used" in " ".join(caplog.messages)


def test_the_screen_tells_windows_and_rows_left_out(store, cut, told, books):
    long = sum(store.manifest.truncated.values())
    windows = sum(map(len, sequences(store).values())) - (30 - long)
    screen = "\n".join(told)
    assert (
        f"{long} of 30 documents are longer than 64 tokens: they were read in {windows} windows"
        in screen
    )
    assert f"{long} of 30 documents were cut at 64 tokens" in screen
    left_out = f"{books}: 3 of 33 rows cannot be used and were left out: {books}:11: expected"
    assert screen.count(left_out) == 2


def as_of_old(folder) -> Manifest:
    """Write a folder's manifest as versions before --long-documents did."""
    made = read_manifest(folder)
    options = {name: v for name, v in made.options.items() if name != "long_documents"}
    old = replace(made, options=options, skipped=0)
    write_manifest(folder, old)
    assert "skipped" not in json.loads((folder / "manifest.json").read_text())
    return old


def test_a_store_of_an_earlier_version_counts_as_cut(cfg, cut):
    old = as_of_old(cut.folder)
    try:
        again = collect(replace(cfg, out=cut.folder, long_documents="cut"))
        assert again.manifest.skipped == 0
        told = "long_documents was 'cut', now 'split': give --long-documents cut, as runs before"
        with pytest.raises(InputError, match=told):
            collect(replace(cfg, out=cut.folder))
    finally:
        write_manifest(
            cut.folder,
            replace(old, options={**old.options, "long_documents": "cut"}, skipped=3),
        )


def test_an_unfinished_collection_of_an_earlier_version_counts_as_cut(store, cut, tmp_path):
    out = tmp_path / "acts"
    partial = partial_folder(out)
    partial.mkdir()
    unfinished = replace(cut.manifest, shard_tokens={}, checksums={}, skipped=0)
    write_manifest(partial, unfinished)
    as_of_old(partial)
    (partial / "train-00000.safetensors").touch()
    begin_or_resume(out, unfinished)
    with pytest.raises(InputError, match="give --long-documents cut"):
        begin_or_resume(out, replace(unfinished, options=store.manifest.options))


@pytest.mark.parametrize("value", [-1, True, "3", None, 0.5])
def test_a_number_of_rows_that_makes_no_sense_is_refused(value, cut, tmp_path):
    write_manifest(tmp_path, replace(cut.manifest, skipped=value))
    with pytest.raises(InputError, match="its skipped makes no sense"):
        read_manifest(tmp_path)

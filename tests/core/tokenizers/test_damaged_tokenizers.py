"""Missing, partial and damaged tokenizers: one line names the fault before any work."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from sentencepiece import sentencepiece_model_pb2 as proto
from tokenizer_folders import CONFIG, by_digits, folder_of, loaded, small
from tokenizers import Tokenizer

from sparsecast.cli.main import main
from sparsecast.core.errors import InputError
from sparsecast.sparsify.config import SparsifyConfig
from sparsecast.sparsify.run import sparsify

ROOT = Path(__file__).parents[3]


CLASSES = [
    *("LlamaTokenizer", "LlamaTokenizerFast", "GPT2Tokenizer", "PreTrainedTokenizerFast"),
    *("TokenizersBackend", "BertTokenizer", "T5Tokenizer", "GPTNeoXTokenizer", "NoSuchTokenizer"),
]


@pytest.mark.parametrize("kind", [None, *CLASSES])
def test_a_folder_without_tokenizer_files_is_named(kind, model_folder, tmp_path):
    config = None if kind is None else CONFIG | {"tokenizer_class": kind}
    folder = folder_of(tmp_path / "m", model_folder, None, config)

    with pytest.raises(InputError, match=f"{folder}: no tokenizer files, expected tokenizer.json"):
        loaded(folder)


@pytest.mark.parametrize("stage", ["collect", "train", "export"])
def test_every_stage_names_it_before_work(stage, model_folder, tmp_path, corpus, capsys, acts):
    folder = Path(shutil.copytree(model_folder, tmp_path / "m"))
    for name in ("tokenizer.json", "tokenizer.model"):
        (folder / name).unlink()
    predictors = ["--predictors", str(tmp_path)]
    options = predictors if stage == "export" else ["--corpus", str(corpus), "--seq-len", "128"]

    with pytest.raises(SystemExit) as info:
        main([stage, "--model", str(folder), "--out", str(tmp_path / "out"), *options])

    assert info.value.code == 2
    told = capsys.readouterr().err.strip().split("\n")
    assert f"{folder}: no tokenizer files" in told[-1]
    assert "Loading weights" not in "".join(told)
    assert not (tmp_path / "out").exists()


def test_sparsify_names_it_before_work(model_folder, tmp_path, corpus):
    folder = Path(shutil.copytree(model_folder, tmp_path / "m"))
    for name in ("tokenizer.json", "tokenizer.model"):
        (folder / name).unlink()

    with pytest.raises(InputError, match=f"{folder}: no tokenizer files"):
        sparsify(SparsifyConfig(model=str(folder), corpus=str(corpus), out=tmp_path / "out"))


def half(folder: Path, *names: str) -> None:
    Tokenizer.from_str(by_digits(folder).to_str()).model.save(str(folder))
    (folder / "tokenizer.json").unlink()
    for name in {"vocab.json", "merges.txt"} - {*names}:
        (folder / name).unlink()


def empty_vocabulary(folder: Path) -> None:
    (folder / "vocab.json").write_text("{}")
    (folder / "merges.txt").write_text("#version: 0.2\n")


def short_merges(folder: Path) -> None:
    half(folder, "vocab.json", "merges.txt")
    (folder / "merges.txt").write_text("#version: 0.2\n")


def short_model(folder: Path) -> None:
    whole = (ROOT / "sparsify" / "tiny-prosparse" / "tokenizer.model").read_bytes()
    (folder / "tokenizer.model").write_bytes(whole[: len(whole) // 2])


def first_pieces(folder: Path) -> None:
    """Cut between two pieces, where protobuf sees nothing wrong."""
    path = ROOT / "sparsify" / "tiny-prosparse" / "tokenizer.model"
    model = proto.ModelProto.FromString(path.read_bytes())
    kept = proto.ModelProto(pieces=model.pieces[:400])
    (folder / "tokenizer.model").write_bytes(kept.SerializeToString())


def twice(folder: Path) -> None:
    model = proto.ModelProto.FromString(small(folder / "t", {"ab": 0.0}).read_bytes())
    model.pieces.add(piece="ab", score=-9.0)
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())


def pointer(folder: Path) -> None:
    said = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 499723\n"
    (folder / "tokenizer.model").write_text(said)


def other_json(folder: Path) -> None:
    small(folder / "tokenizer.model", {"aa": 0.0})
    by_digits(folder)


def settings_of(folder: Path) -> None:
    small(folder / "tokenizer.model", {"ab": 0.0})
    (folder / "tokenizer_config.json").write_text("{")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda f: half(f, "vocab.json"), "has vocab.json without merges.txt"),
        (lambda f: half(f, "merges.txt"), "has merges.txt without vocab.json"),
        (empty_vocabulary, "its tokenizer has . tokens and makes none of a text"),
        (short_merges, "merges.txt: makes 0 of the 2 longer pieces in vocab.json"),
        (short_model, "not a sentencepiece model|has 1022 pieces and no word"),
        (first_pieces, "tokenizer.model: has 400 pieces and no word of their kind"),
        (twice, "tokenizer.model: sentencepiece refuses it .*ab"),
        (pointer, "tokenizer.model: is a Git LFS pointer"),
        (lambda f: (f / "tokenizer.json").write_text(""), "tokenizer.json: is empty"),
        (
            lambda f: (f / "tokenizer.json").write_text("[1]"),
            "tokenizer.json: expected a JSON object",
        ),
        (lambda f: os.mkfifo(f / "tokenizer.json"), "tokenizer.json: is a FIFO"),
        (lambda f: (f / "tokenizer.model").mkdir(), "tokenizer.model: is a folder"),
        (other_json, "tokenizer.model: has 'a' as piece 260, but tokenizer.json beside it has 64"),
        (settings_of, "tokenizer_config.json: is not JSON"),
    ],
    ids=lambda value: getattr(value, "__name__", "x").strip("<>"),
)
@pytest.mark.parametrize("kind", ["LlamaTokenizer", "GPT2Tokenizer"])
def test_damaged_and_partial_tokenizers_are_named(make, reason, kind, model_folder, tmp_path):
    config = {"tokenizer_class": kind, "bos_token": "<s>"}
    folder = folder_of(tmp_path / "m", model_folder, None, config)
    make(folder)

    with pytest.raises(InputError, match=reason) as info:
        loaded(folder)
    assert "\n" not in str(info.value)
    assert str(folder) in str(info.value)

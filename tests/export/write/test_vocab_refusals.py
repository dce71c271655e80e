"""Tokenizers that export refuses, with the reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models

from sparsecast.cli.main import main
from sparsecast.core.errors import InputError
from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.export.bundle import bundle_file
from sparsecast.export.checks.vocab import check_vocabulary
from sparsecast.export.config import ExportConfig
from sparsecast.export.read.reader import GGUFFile
from sparsecast.export.run import export
from sparsecast.export.write.vocab_reader import read_vocabulary


def change(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "tokenizer.json"
    spec = json.loads(path.read_text())
    edit(spec)
    path.write_text(json.dumps(spec))


def rows(folder: Path) -> int:
    return int(json.loads((folder / "config.json").read_text())["vocab_size"])


def vocabulary(folder: Path):
    return read_vocabulary(Checkpoint(str(folder)), rows(folder))


def bundle_of(folder: Path, make_predictors) -> Path:
    out = folder.parent / "bundle"
    predictors = make_predictors(folder.parent / "p", str(folder))
    return export(ExportConfig(model=str(folder), predictors=predictors, out=out)).parent


def lose(spec, *characters):
    for number, character in enumerate(characters):
        spec["model"]["vocab"][f"zzzz{number}"] = spec["model"]["vocab"].pop(character)


def lose_a_tab(spec):
    lose(spec, chr(0x100 + 9))


def lose_merges(spec):
    spec["model"]["merges"] = []


def strange_character(spec):
    vocab = spec["model"]["vocab"]
    last = max(vocab, key=vocab.get)
    vocab["a b"] = vocab.pop(last)
    spec["model"]["merges"] = [m for m in spec["model"]["merges"] if last not in (*m, "".join(m))]


def repeat_a_token(spec):
    spec["added_tokens"][1]["content"] = "<unused_602>"


REFUSED = [
    (lambda spec: spec.update(pre_tokenizer={"type": "Whitespace"}), "without byte_fallback"),
    (lambda spec: spec["model"].update(dropout=0.5), "dropout 0.5"),
    (lose_a_tab, "1 of the characters that stand for bytes of text are not tokens"),
    (lambda spec: lose(spec, chr(0xF3)), "1 of the characters that stand for bytes of text"),
    (lose_merges, "has no merges"),
    (strange_character, "'a b', holds ' ', which stands for no byte"),
    (repeat_a_token, "'<unused_602>' is empty or a duplicate"),
]


@pytest.mark.parametrize(("edit", "reason"), REFUSED)
def test_byte_level_tokenizers_that_the_engine_misreads_are_refused(byte_copy, edit, reason):
    change(byte_copy, edit)

    with pytest.raises(InputError, match=reason) as info:
        vocabulary(byte_copy)
    assert str(byte_copy / "tokenizer.json") in str(info.value)
    assert "\n" not in str(info.value)


def test_bytes_that_no_prose_has_may_lack_a_token(byte_copy, random_predictors):
    change(byte_copy, lambda spec: lose(spec, "\u0104", "\u011d", "\u00c0", "\u00f2", "\u00ff"))

    bundle = bundle_of(byte_copy, random_predictors)

    assert "no token for the control characters 0x04, 0x1d:" in (bundle / "README.md").read_text()
    assert check_vocabulary(GGUFFile(bundle_file(bundle))).ok


def test_a_vocabulary_larger_than_the_embedding_is_refused(byte_copy):
    with pytest.raises(InputError, match="has 600 pieces, but the model's embedding has 500 rows"):
        read_vocabulary(Checkpoint(str(byte_copy)), 500)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0), "is a unigram model"),
        (models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"), "is a WordPiece model"),
        (models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"), "is a WordLevel model"),
    ],
)
def test_other_models_are_refused_with_the_reason(
    byte_copy, predictors, model, reason, capsys, tmp_path
):
    Tokenizer(model).save(str(byte_copy / "tokenizer.json"))
    args = ["export", "--model", str(byte_copy), "--predictors", str(predictors)]

    with pytest.raises(SystemExit) as info:
        main([*args, "--out", str(tmp_path / "out")])

    assert info.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert reason in line


def without_byte(spec):
    spec["model"]["vocab"]["<0xZZ>"] = spec["model"]["vocab"].pop("<0x41>")


def test_pieces_without_all_bytes_are_refused(json_copy):
    change(json_copy, without_byte)

    with pytest.raises(InputError, match="has no byte piece <0x41>"):
        vocabulary(json_copy)


@pytest.mark.parametrize("content", ["{", "[]", '{"model": {"type": "BPE"}}'])
def test_a_damaged_tokenizer_json_is_the_users_error(byte_copy, content):
    (byte_copy / "tokenizer.json").write_text(content)

    with pytest.raises(InputError, match=str(byte_copy)):
        vocabulary(byte_copy)


def test_no_tokenizer_at_all_is_the_users_error(byte_copy):
    (byte_copy / "tokenizer.json").unlink()

    with pytest.raises(InputError, match=str(byte_copy)):
        vocabulary(byte_copy)

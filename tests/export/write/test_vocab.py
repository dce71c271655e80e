"""Vocabularies as export writes them, and the tokenizers that it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import regex
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoTokenizer, LlamaTokenizer

from sparsecast.core.errors import InputError
from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.export.bundle import bundle_file
from sparsecast.export.config import ExportConfig, VerifyConfig
from sparsecast.export.engine.protocol import held_out_documents, joined
from sparsecast.export.read.reader import GGUFFile
from sparsecast.export.read.vocab import alphabet, tokenizer_of
from sparsecast.export.read.words import words
from sparsecast.export.run import export
from sparsecast.export.verify import verify
from sparsecast.export.write.vocab_reader import read_vocabulary

WORDS = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


FALCON = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Punctuation", "behavior": "Contiguous"},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
        {"type": "Digits", "individual_digits": False},
        {
            "type": "Split",
            "pattern": {"Regex": "[0-9][0-9][0-9]"},
            "behavior": "Isolated",
            "invert": False,
        },
    ],
}


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


def gpt2_encode(file: GGUFFile, words: list[str]) -> list[int]:
    """GPT-2's own encoder.py on a file's tokens and merges."""
    ids = {token: i for i, token in enumerate(file.keys["tokenizer.ggml.tokens"])}
    ranks = {tuple(m.split(" ")): i for i, m in enumerate(file.keys["tokenizer.ggml.merges"])}
    byte_of = alphabet()
    found = []
    for word in words:
        parts = [byte_of[byte] for byte in word.encode()]
        while pairs := [p for p in zip(parts, parts[1:], strict=False) if p in ranks]:
            first = min(pairs, key=ranks.__getitem__)
            merged: list[str] = []
            while parts:
                taken = 2 if tuple(parts[:2]) == first else 1
                merged.append("".join(parts[:taken]))
                parts = parts[taken:]
            parts = merged
        found += [ids[part] for part in parts]
    return found


def test_the_alphabet_is_that_of_the_tokenizers_library():
    library = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    two_bytes = "".join(chr(0x80 + i) for i in range(64))

    assert sorted(alphabet()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    ((written, _),) = library.pre_tokenize_str(two_bytes + " \n\t~")
    assert written == "".join(alphabet()[byte] for byte in (two_bytes + " \n\t~").encode())


def test_a_byte_level_file_holds_what_powerinfer_wants(byte_bundle, byte_model):
    file = GGUFFile(bundle_file(byte_bundle()))
    keys = file.keys
    raw = json.loads((byte_model / "tokenizer.json").read_text())

    assert keys["tokenizer.ggml.model"] == "gpt2"
    assert keys["tokenizer.ggml.merges"] == [" ".join(pair) for pair in raw["model"]["merges"]]
    assert keys["tokenizer.ggml.tokens"][600:] == [
        *("<|endoftext|>", "<|a b|>"),
        *("<unused_602>", "<unused_603>", "<unused_604>"),
    ]
    assert keys["tokenizer.ggml.token_type"] == [1] * 600 + [3, 4, 5, 5, 5]
    assert keys["tokenizer.ggml.bos_token_id"] == keys["tokenizer.ggml.eos_token_id"] == 600
    assert "tokenizer.ggml.scores" not in keys
    card = (file.path.parent / "README.md").read_text()
    assert '-p "..."' in card
    assert "begins with a space" not in card
    assert "## Text" not in card


def test_a_byte_level_file_tokenises_as_gpt2s_own_code_and_as_transformers(
    byte_bundle, byte_model, corpus
):
    file = GGUFFile(bundle_file(byte_bundle()))
    ours, theirs = tokenizer_of(file), AutoTokenizer.from_pretrained(byte_model)
    docs = held_out_documents(str(corpus), ours, 2_000)
    text = joined(docs) + " \u00e4\u4f60\u597d\U0001f600's   (1234)\t\n<|endoftext|> "
    plain = " ".join(regex.findall(r"\p{L}+|\p{Nd}+", text))  # where the engine cuts as GPT-2

    assert ours.encode(text) == gpt2_encode(file, words(text))
    ids = ours.encode(plain)
    assert ids == gpt2_encode(file, WORDS.findall(plain))
    assert ids == theirs(plain, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert 601 not in ours.encode("x <|a b|> y")
    assert ours.bos is None


def test_merges_are_read_in_either_spelling(byte_copy):
    pairs = vocabulary(byte_copy)

    def as_strings(spec):
        spec["model"]["merges"] = [" ".join(pair) for pair in spec["model"]["merges"]]

    change(byte_copy, as_strings)

    assert vocabulary(byte_copy) == pairs


def test_a_sequence_of_no_normalizers_is_none(byte_copy, byte_model):
    empty = {"type": "Sequence", "normalizers": []}
    cut = json.loads((byte_copy / "tokenizer.json").read_text())["pre_tokenizer"]
    one = {"type": "Sequence", "pretokenizers": [cut]}
    change(byte_copy, lambda spec: spec.update(normalizer=empty, pre_tokenizer=one))

    assert vocabulary(byte_copy) == vocabulary(byte_model)


def test_vocab_json_and_merges_txt_do_as_well(byte_copy, byte_model):
    Tokenizer.from_file(str(byte_copy / "tokenizer.json")).model.save(str(byte_copy))
    (byte_copy / "tokenizer.json").unlink()
    path = byte_copy / "tokenizer_config.json"
    path.write_text(path.read_text().replace("PreTrainedTokenizerFast", "GPT2Tokenizer"))

    ours, want = vocabulary(byte_copy), vocabulary(byte_model)

    assert ours.merges == want.merges
    assert ours.tokens[:600] == want.tokens[:600]
    assert ours.tokens[ours.special["eos"]] == "<|endoftext|>"


def test_falcons_cuts_are_exported_with_a_warning(
    byte_copy, byte_model, capsys, random_predictors, corpus
):
    change(byte_copy, lambda spec: spec.update(pre_tokenizer=FALCON))

    bundle = bundle_of(byte_copy, random_predictors)

    assert "as Falcon's tokenizer does" in " ".join(capsys.readouterr().err.split())
    assert "as Falcon's tokenizer does" in (bundle / "README.md").read_text()
    result = verify(VerifyConfig(bundle=bundle, corpus=str(corpus)))
    assert result.ok
    detail = next(c.detail for c in result.checks if c.name == "tokens")
    assert "the engine's way to split text changes 1 of 1 documents" in detail
    assert "1 of 3 documents" in (bundle / "README.md").read_text()


def test_a_space_or_a_bos_put_before_text_is_told(byte_copy):
    def edit(spec):
        spec["pre_tokenizer"]["add_prefix_space"] = True
        single = [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}]
        spec["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [*single, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"],
            "special_tokens": {
                "<|endoftext|>": {"id": "<|endoftext|>", "ids": [600], "tokens": ["<|endoftext|>"]}
            },
        }

    change(byte_copy, edit)

    space, bos = vocabulary(byte_copy).notes
    assert "puts a space before" in space
    assert "puts <|endoftext|> before a text, the engine does not: begin prompts with it" in bos


def test_tokenizer_json_alone_gives_the_pieces_of_tokenizer_model(json_copy, model_folder):
    ours, want = vocabulary(json_copy), vocabulary(model_folder)

    assert ours == want


def test_a_shipped_tokenizer_gives_the_same_pieces_from_either_file(tmp_path):
    source = Path("sparsify/tiny-prosparse")
    folder = tmp_path / "m"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, folder)

    ours, want = vocabulary(folder), vocabulary(source)

    assert ours == want


def test_what_transformers_saves_of_a_llama_tokenizer_is_exported(json_copy, model_folder):
    """It has no normalizer, but puts a space before text that does not begin with one."""
    (json_copy / "tokenizer.json").unlink()
    LlamaTokenizer.from_pretrained(model_folder).save_pretrained(json_copy)

    ours, want = vocabulary(json_copy), vocabulary(model_folder)

    assert ours._replace(notes=[]) == want
    assert "begins with one" in ours.notes[0]


def test_tokenizer_model_needs_no_class_named(model_folder, tmp_path):
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()

    assert vocabulary(folder) == vocabulary(model_folder)


def test_user_defined_pieces_are_told(json_copy):
    def edit(spec):
        piece, last = max(spec["model"]["vocab"].items(), key=lambda item: item[1])
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
        spec["added_tokens"].append({"id": last, "content": piece, **flags})

    change(json_copy, edit)

    (note,) = vocabulary(json_copy).notes
    assert "recognizes 1 user-defined tokens in a text" in note


def test_padding_and_tokens_beyond_the_embedding(byte_copy):
    added = {
        "id": 700,
        "content": "<beyond>",
        **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
    }
    ids = range(601, 701)
    more = [{**added, "id": i, "content": f"<m{i}>", "special": i % 2 == 0} for i in ids]
    change(byte_copy, lambda spec: spec.update(added_tokens=[*spec["added_tokens"][:1], *more]))

    ours = vocabulary(byte_copy)

    assert ours.tokens[600:] == ["<|endoftext|>", "<m601>", "<m602>", "<m603>", "<m604>"]
    assert ours.types[600:] == [3, 4, 3, 4, 3]


def test_bos_and_eos_come_from_the_config_only_as_special_tokens(byte_copy):
    path = byte_copy / "tokenizer_config.json"
    path.write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    with pytest.raises(InputError, match="no bos_token within the embedding"):
        vocabulary(byte_copy)  # LlamaConfig's defaults 1 and 2 are ordinary tokens here

    config = json.loads((byte_copy / "config.json").read_text())
    (byte_copy / "config.json").write_text(json.dumps(config | {"eos_token_id": [600, 5]}))

    assert vocabulary(byte_copy).special == {"bos": 600, "eos": 600}


def test_a_bundle_of_tokenizer_json_alone_passes_verify(json_copy, random_predictors, corpus):
    result = verify(
        VerifyConfig(bundle=bundle_of(json_copy, random_predictors), corpus=str(corpus))
    )

    assert result.ok, [c for c in result.checks if not c.ok]
    assert "as in tokenizer.json" in [c.detail for c in result.checks]

"""Tokenizers that the engine lacks: refused with a count, exported with consent, verified."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tokenizer_folders import loaded
from tokenizers import Tokenizer

from sparsecast.core.errors import InputError
from sparsecast.export.bundle import bundle_file
from sparsecast.export.checks.tokens import check_tokens
from sparsecast.export.config import ExportConfig, VerifyConfig
from sparsecast.export.read import other_tokens
from sparsecast.export.read.other_tokens import count_other_tokens
from sparsecast.export.read.reader import GGUFFile
from sparsecast.export.read.vocab import tokenizer_of
from sparsecast.export.run import export
from sparsecast.export.verify import verify


def split(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


RAW = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
PLAIN = RAW | {"use_regex": True}
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def cut_by(*steps):
    return {"type": "Sequence", "pretokenizers": [*steps]}


DIGITS = cut_by({"type": "Digits", "individual_digits": True}, PLAIN)
LLAMA3 = cut_by(split(WORDS), RAW)
QWEN = cut_by(split(WORDS.replace("{1,3}", "")), RAW)
KINDS = [
    ({"pre_tokenizer": DIGITS}, r"splits text by Digits, ByteLevel instead of GPT-2's"),
    ({"pre_tokenizer": LLAMA3}, r"splits text by Split\(.*, ByteLevel without its regex"),
    (
        {"pre_tokenizer": LLAMA3, "ignore_merges": True},
        r"splits text by .* takes a word whole where it is a token \(ignore_merges\)",
    ),
    ({"pre_tokenizer": QWEN, "normalizer": {"type": "NFC"}}, r"normalizes text \(NFC\); splits"),
    ({"normalizer": {"type": "NFC"}}, r"normalizes text \(NFC\)"),
]
NAMES = ["smollm2", "llama3-merges", "llama3", "qwen", "nfc"]
SOME_SLOW = [
    pytest.param(*kind, id=name, marks=[] if name in ("smollm2", "qwen") else pytest.mark.slow)
    for kind, name in zip(KINDS, NAMES, strict=True)
]


def change(folder: Path, edit) -> None:
    path = folder / "tokenizer.json"
    spec = json.loads(path.read_text())
    edit(spec)
    path.write_text(json.dumps(spec))


def edited(folder: Path, fields) -> Path:
    def edit(spec):
        spec["model"]["ignore_merges"] = fields.get("ignore_merges", False)
        spec.update({k: v for k, v in fields.items() if k != "ignore_merges"})

    change(folder, edit)
    return folder


def options(folder: Path, make_predictors, **more) -> ExportConfig:
    predictors = make_predictors(folder.parent / "p", str(folder))
    return ExportConfig(model=str(folder), predictors=predictors, out=folder.parent / "b", **more)


def counted(folder: Path, bundle: Path) -> tuple[int, int]:
    """(documents that differ, all): tokenizer.json as it stands against the file's tokenizer."""
    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    own.encode_special_tokens = True
    engine = tokenizer_of(GGUFFile(bundle_file(bundle)))
    pairs = [
        (own.encode(t, add_special_tokens=False).ids, engine.encode(t))
        for t in other_tokens.sample_documents()
    ]
    return sum(a != b for a, b in pairs), len(pairs)


@pytest.mark.parametrize(("fields", "reason"), KINDS, ids=NAMES)
def test_without_consent_the_count_and_the_way_out_are_told(
    byte_copy, random_predictors, fields, reason
):
    with pytest.raises(InputError, match=reason) as info:
        export(options(edited(byte_copy, fields), random_predictors))

    message = str(info.value)
    assert message.startswith(f"{byte_copy}: its tokenizer ")
    assert re.search(r"makes other tokens of \d of 3 documents of the builtin corpus", message)
    assert message.endswith("accept this with --allow-other-tokens")
    assert "\n" not in message


@pytest.mark.parametrize(("fields", "reason"), SOME_SLOW)
def test_with_consent_the_card_and_verify_give_the_same_count(
    byte_copy, random_predictors, corpus, fields, reason
):
    folder = edited(byte_copy, fields)
    bundle = export(options(folder, random_predictors, allow_other_tokens=True)).parent

    differ, of = counted(folder, bundle)
    card = (bundle / "README.md").read_text()
    assert re.search(reason, card)
    assert f"{differ} of {of} documents of the builtin corpus" in card
    result = verify(VerifyConfig(bundle=bundle, corpus=str(corpus)))
    assert result.ok, [check for check in result.checks if not check.ok]
    detail = next(check.detail for check in result.checks if check.name == "other tokens")
    assert f"{differ} of {of} documents" in detail
    assert detail.endswith(", as when exported")
    assert differ


def test_more_than_the_user_was_told_fails(byte_copy, random_predictors, corpus, monkeypatch):
    """Here the tokenizer changes after the export; its vocabulary stays."""
    folder = edited(byte_copy, {"normalizer": {"type": "NFC"}})
    bundle = export(options(folder, random_predictors, allow_other_tokens=True)).parent
    edited(folder, {"pre_tokenizer": LLAMA3})

    def details():
        result = verify(VerifyConfig(bundle=bundle, corpus=str(corpus)))
        return {check.name: check for check in result.checks}

    wrong = details()["other tokens"]
    assert not wrong.ok
    assert ", but when exported of 1 of 3 documents" in wrong.detail

    more = [*other_tokens.sample_documents(), "more text"]
    monkeypatch.setattr(other_tokens, "_sample", lambda count: more)
    elsewhere = details()["other tokens"]
    assert elsewhere.ok
    assert "when exported, on other text, of 1 of 3 documents" in elsewhere.detail


@pytest.mark.parametrize("text", ["{}", "[", '{"documents": 1}', "3"])
def test_a_damaged_record_fails(byte_copy, random_predictors, corpus, text, monkeypatch):
    folder = edited(byte_copy, {"normalizer": {"type": "NFC"}})
    bundle = export(options(folder, random_predictors, allow_other_tokens=True)).parent
    keys = GGUFFile.__init__

    def damaged(self, path):
        keys(self, path)
        self.keys["sparsecast.other_tokens"] = text

    monkeypatch.setattr(GGUFFile, "__init__", damaged)
    result = verify(VerifyConfig(bundle=bundle, corpus=str(corpus)))

    assert [check.name for check in result.checks if not check.ok] == ["other tokens"]


def test_a_split_of_which_the_file_says_nothing_fails(byte_copy, byte_bundle, corpus):
    """The vocabulary is the same; the model's tokenizer has become another."""
    file = GGUFFile(bundle_file(byte_bundle()))
    edited(byte_copy, {"pre_tokenizer": LLAMA3})

    result = verify(VerifyConfig(bundle=file.path.parent, model=str(byte_copy), corpus=str(corpus)))

    (wrong,) = [check for check in result.checks if not check.ok]
    assert wrong.name == "tokens"
    assert wrong.detail.endswith(", and the export did not say so")


def test_a_merge_of_another_model_fails_even_where_the_split_was_accepted(
    byte_copy, random_predictors
):
    folder = edited(byte_copy, {"pre_tokenizer": DIGITS})
    path = export(options(folder, random_predictors, allow_other_tokens=True))
    file = GGUFFile(path)
    file.keys["tokenizer.ggml.merges"].reverse()
    docs = ["def f(x):\n    return x + 1\n"]

    assert check_tokens(loaded(folder), tokenizer_of(GGUFFile(path)), docs, told=True).ok
    assert not check_tokens(loaded(folder), tokenizer_of(file), docs, told=True).ok


def test_tokens_are_counted_document_by_document():
    model = {"a": [1, 2, 3], "b": [1, 1], "c": [4]}.__getitem__
    engine = {"a": [2, 1, 9], "b": [1, 1], "c": [4, 5]}.__getitem__

    count = count_other_tokens(model, engine, "abc")

    assert (count.documents, count.of_documents) == (2, 3)
    assert (count.tokens, count.of_tokens) == (1, 6)
    assert count.sample != count_other_tokens(model, engine, "ab").sample


def swap_merges(spec):
    merges = spec["model"]["merges"]
    first = next(i for i in range(1, len(merges)) if "".join(merges[i]) != "".join(merges[i - 1]))
    double = next(
        i for i in range(first, len(merges)) if "".join(merges[i]) == "".join(merges[i - 1])
    )
    merges.insert(0, merges.pop(double))


def drop_a_merge(spec):
    merges = spec["model"]["merges"]
    double = next(i for i in range(1, len(merges)) if "".join(merges[i]) == "".join(merges[i - 1]))
    del merges[double]


METASPACE = {
    "type": "Metaspace",
    "replacement": "\u2581",
    "prepend_scheme": "never",
    "split": False,
}


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (swap_merges, "merges that split .* as no scores can"),
        (drop_a_merge, "no merge for the pieces .*, which form a piece"),
        (lambda spec: spec.update(normalizer=None), "prepares text by nothing"),
        (lambda spec: spec.update(normalizer={"type": "NFKC"}), "prepares text by .*NFKC"),
        (
            lambda spec: spec.update(normalizer=None, pre_tokenizer=METASPACE),
            "prepares text by .*never",
        ),
    ],
    ids=["order", "missing", "nothing", "nfkc", "no space in front"],
)
def test_pieces_that_the_engine_prepares_or_merges_otherwise(
    json_copy, random_predictors, corpus, edit, reason
):
    change(json_copy, edit)

    with pytest.raises(InputError, match=f"{reason}.*makes other tokens of .* of 3 documents"):
        export(options(json_copy, random_predictors))
    bundle = export(options(json_copy, random_predictors, allow_other_tokens=True)).parent

    assert re.search(reason, (bundle / "README.md").read_text())
    result = verify(VerifyConfig(bundle=bundle, corpus=str(corpus)))
    assert result.ok, [check for check in result.checks if not check.ok]
    assert "other tokens" in [check.name for check in result.checks]


def test_a_gpt2_tokenizer_is_exported_without_consent_and_its_count_told(
    byte_copy, random_predictors, corpus, monkeypatch
):
    monkeypatch.setattr(other_tokens, "_sample", lambda count: ["if x:\n    (y)[z]\n", "a b"])

    bundle = export(options(byte_copy, random_predictors)).parent

    record = json.loads(GGUFFile(bundle_file(bundle)).keys["sparsecast.other_tokens"])
    assert (record["documents"], record["of_documents"]) == (1, 2)
    assert "1 of 2 documents" in (bundle / "README.md").read_text()
    assert verify(VerifyConfig(bundle=bundle, corpus=str(corpus))).ok

"""Broken tokenizers: tokenizer.json, tokenizer.model, vocab.json with merges.txt, settings."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from broken.bytes_faults import KINDS, content, cut, in_folder, linked
from broken.json_faults import DIGITS, LONG, brief, edited, fields, nested, no_object, without
from broken.runner import Case, Damage
from sentencepiece import sentencepiece_model_pb2 as proto

WHOLE, MODEL = "tokenizer.json", "tokenizer.model"
SETTINGS, SPECIAL = "tokenizer_config.json", "special_tokens_map.json"


def spec(change: Callable[[dict[str, Any]], object]) -> Damage:
    return edited(WHOLE, change)


def model(**values: Any) -> Damage:
    return spec(lambda value: value["model"].update(values))


def vocab(**ids: Any) -> Damage:
    return spec(lambda value: value["model"]["vocab"].update(ids))


def added(**values: Any) -> Damage:
    token = {
        "id": 299,
        "content": "<x>",
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    return spec(lambda value: value["added_tokens"].append(token | values))


def of_pieces(damage: Damage) -> Damage:
    """tokenizer.model alone."""

    def both(folder: Path) -> None:
        (folder / WHOLE).unlink()
        damage(folder)

    return both


def pieces(change: Callable[[Any], object]) -> Damage:
    def damage(folder: Path) -> None:
        made = proto.ModelProto.FromString((folder / MODEL).read_bytes())
        change(made)
        (folder / MODEL).write_bytes(made.SerializeToString())

    return of_pieces(damage)


def pair(vocabulary: str | bytes, merges: str | bytes) -> Damage:
    def damage(folder: Path) -> None:
        for name in (WHOLE, MODEL):
            (folder / name).unlink()
        settings = json.loads((folder / SETTINGS).read_text())
        (folder / SETTINGS).write_text(json.dumps(settings | {"tokenizer_class": "GPT2Tokenizer"}))
        for name, text in {"vocab.json": vocabulary, "merges.txt": merges}.items():
            (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)

    return damage


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


CASES = [
    *no_object(WHOLE, without=("gone", "a link to nothing")),
    *no_object(SETTINGS, without=("gone", "a link to nothing")),
    *(
        Case(f"{WHOLE} {what}", damage)
        for what, damage in {
            "without a model": without(WHOLE, "model"),
            "without added tokens and more": content("{}", WHOLE),
            "of another version": fields(WHOLE, {"version": "9.9"}),
        }.items()
    ),
    Case(f"{WHOLE} of no version", without(WHOLE, "version"), "the tokenizers library reads it"),
    *(
        Case(f"a model that is {brief(value)}", fields(WHOLE, {"model": value}))
        for value in (None, [], 1, "BPE", {}, {"type": "BPE"}, {"type": "no such"}, {"type": LONG})
    ),
    *(
        Case(f"model.{name} {brief(value)}", model(**{name: value}))
        for name, value in (
            ("vocab", None),
            ("vocab", []),
            ("vocab", {}),
            ("vocab", {"a": -1}),
            ("vocab", {"a": 2**32}),
            ("vocab", {"a": 2**63}),
            ("vocab", {"a": "0"}),
            ("vocab", {"a": 1.5}),
            ("vocab", {"a": DIGITS}),
            ("merges", None),
            ("merges", {}),
            ("merges", [1]),
            ("merges", ["a"]),
            ("merges", [["a"]]),
            ("merges", [["no", "piece"]]),
            ("merges", [["a", "b", "c"]]),
            ("type", "Unigram"),
            ("type", 1),
            ("dropout", 2),
            ("dropout", "x"),
            ("unk_token", 5),
            ("byte_fallback", "yes"),
        )
    ),
    *(
        Case(f"an id of {brief(value)}", vocab(zz=value))
        for value in (-1, 300, 10**6, 2**31, 2**32, "1", None)
    ),
    *(
        Case(f"{name} {brief(value)}", fields(WHOLE, {name: value}))
        for name, value in (
            ("normalizer", 1),
            ("normalizer", {"type": "no such"}),
            ("normalizer", {"type": "Replace"}),
            ("normalizer", {"type": "Replace", "pattern": {"Regex": "("}, "content": ""}),
            ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "x"}),
            ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA/////w=="}),
            ("pre_tokenizer", []),
            ("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "(?<"}}),
            ("pre_tokenizer", {"type": "no such"}),
            ("post_processor", 5),
            ("post_processor", {"type": "x"}),
            ("decoder", "x"),
            ("decoder", {"type": LONG}),
            ("truncation", 1),
            ("padding", "x"),
            ("added_tokens", 1),
            ("added_tokens", [1]),
            ("added_tokens", [{}]),
            ("added_tokens", nested(90)),
        )
    ),
    *(
        Case(f"an added token whose {name} is {brief(value)}", added(**{name: value}))
        for name, value in (
            ("id", -1),
            ("id", 2**32),
            ("id", "x"),
            ("id", None),
            ("content", 1),
            ("content", None),
        )
    ),
    Case("an added token beyond the embedding", added(id=10**6, special=False)),
    *(
        Case(f"the setting {name} {brief(value)}", fields(SETTINGS, {name: value}))
        for name, value in (
            ("tokenizer_class", 1),
            ("tokenizer_class", [LONG]),
            ("bos_token", 1),
            ("bos_token", [1]),
            ("added_tokens_decoder", 1),
            ("added_tokens_decoder", {"x": 1}),
            ("added_tokens_decoder", {"9": {"content": 1}}),
        )
    ),
    Case(
        "the setting of a negative id",
        fields(SETTINGS, {"added_tokens_decoder": {"-1": {"content": "a"}}}),
        "the library numbers added tokens itself",
    ),
    Case(
        "code of its own",
        fields(SETTINGS, {"auto_map": {"AutoTokenizer": ["canary.X", None]}}),
        "it is never run; tokenizer.json is the whole tokenizer",
    ),
    *(
        Case(f"{MODEL}: {kind}", in_folder(damage, MODEL))
        for kind, damage in KINDS.items()
        if kind not in ("gone", "a link to nothing")
    ),
    *(
        Case(f"{MODEL}: cut at {share:.0%}", of_pieces(cut(share, MODEL)), only=MODEL)
        for share in (0.01, 0.2, 0.5, 0.9, 0.99)
    ),
    *(
        Case(f"{MODEL}: {what}", of_pieces(content(data, MODEL)), only=MODEL)
        for what, data in {
            "zeros": bytes(99),
            "ones": b"\xff" * 99,
            "text": "hello",
            "a piece of 2 GB": b"\x0a" + varint(2**31 - 1),
            "a piece of 2**63 bytes": b"\x0a" + varint(2**63),
            "groups without end": b"\x0b" * 100_000,
            "fields of no name": b"\x02\x00" * 999,
            "a zip": b"PK\x03\x04" + bytes(99),
            "a number that never ends": b"\x08" + b"\xff" * 99,
        }.items()
    ),
    *(
        Case(f"{MODEL}: {what}", pieces(change), only=MODEL)
        for what, change in {
            "no pieces": lambda m: m.ClearField("pieces"),
            "a piece twice": lambda m: m.pieces.append(m.pieces[-1]),
            "an empty piece": lambda m: setattr(m.pieces[-1], "piece", ""),
            "two unknown pieces": lambda m: setattr(m.pieces[-1], "type", 2),
            "no trainer": lambda m: m.ClearField("trainer_spec"),
        }.items()
    ),
    Case(
        f"{MODEL}: no unknown piece",
        pieces(lambda m: [setattr(p, "type", 1) for p in m.pieces if p.type == 2]),
        "every byte has a piece of its own",
    ),
    Case("a link to a tokenizer", linked(WHOLE), "the file is whole"),
    *(
        Case(f"vocab.json and merges.txt: {what}", pair(*both))
        for what, both in {
            "empty": ("", ""),
            "no object": ("[]", "#version: 0.2\n"),
            "negative ids": ('{"a": -1, "b": 1}', "a b\n"),
            "ids that are texts": ('{"a": "0", "b": "1"}', "a b\n"),
            "a merge of nothing": ('{"a": 0, "b": 1}', "c d\n"),
            "no merges": ('{"a": 0, "b": 1, "ab": 2, "abab": 3}', "#version: 0.2\n"),
            "merges that are no UTF-8": ('{"a": 0, "b": 1, "ab": 2}', b"\xff\xfe\n"),
            "lists in lists": ("[" * 10**5, "a b\n"),
            "huge ids": ('{"a": 99999999999999, "b": 1}', "a b\n"),
        }.items()
    ),
]

"""Compare a file's vocabulary with the model's.

Written without the exporter's code: a tokenizer's files are read as JSON instead of through the
tokenizers library, and pieces come from sentencepiece's processor instead of its protobuf.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import sentencepiece

from sparsecast.core.errors import InputError
from sparsecast.core.files import read_json
from sparsecast.core.tokenizers.files import sentencepiece_file
from sparsecast.export.checks.base import Check
from sparsecast.export.checks.sources import Source
from sparsecast.export.checks.vocab import BYTES
from sparsecast.export.read.vocab import BYTE, NORMAL, UNKNOWN, USER

CONTROL, UNUSED = 3, 5


def check_pieces(source: Source) -> Check:
    """Compare tokens, types, scores and merges with the tokenizer's files, BOS and EOS with the
    config."""
    folder = source.checkpoint.folder
    try:
        if source.file.keys["tokenizer.ggml.model"] == "gpt2":
            name, wrong = _against_bytes(source, folder)
        elif (path := sentencepiece_file(folder)) is not None:
            name, wrong = "tokenizer.model", _against_model(source, path)
        else:
            name, wrong = "tokenizer.json", _against_json(source, folder)
        wrong += _wrong_ends(source, folder)
    except InputError as error:
        return Check("pieces", False, str(error))
    except (KeyError, TypeError, ValueError, OSError, RuntimeError) as error:
        return Check("pieces", False, f"{folder}: its tokenizer cannot be read ({error!r})")
    more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    detail = "; ".join(wrong[:3]) + more
    return Check("pieces", not wrong, detail or f"as in {name}")


def _against_model(source: Source, path: Path) -> list[str]:
    keys = source.file.keys
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    kinds = [
        (model.is_unknown, UNKNOWN),
        (model.is_control, CONTROL),
        (model.is_unused, UNUSED),
        (model.is_byte, BYTE),
    ]
    count = len(keys["tokenizer.ggml.tokens"])
    if len(model) > count:
        return [f"{count} tokens, tokenizer.model has {len(model)}"]
    wrong = []
    for i in range(len(model)):
        kind = next((number for test, number in kinds if test(i)), NORMAL)
        want = (model.id_to_piece(i), model.get_score(i), kind)
        got = tuple(keys[f"tokenizer.ggml.{n}"][i] for n in ("tokens", "scores", "token_type"))
        # The processor does not distinguish user-defined pieces from normal ones.
        if want != (*got[:2], NORMAL if got[2] == USER else got[2]):
            wrong.append(f"token {i} is {got}, tokenizer.model has {want}")
    added = [token for token in _added(path.parent) if token["id"] >= len(model)]
    ids = {token["content"]: token["id"] for token in added}
    return wrong + _wrong_tokens(keys, ids, _added_kinds(added, path.parent))


def _added(folder: Path) -> list[dict[str, Any]]:
    """List the tokens that tokenizer.model lacks, from tokenizer.json or the tokenizer's config."""
    if (folder / "tokenizer.json").is_file():
        raw = read_json(folder / "tokenizer.json", "the model's tokenizer")
        return list(raw["added_tokens"])
    path = folder / "tokenizer_config.json"
    named = read_json(path, "the tokenizer's config") if path.is_file() else {}
    return [{**t, "id": int(i)} for i, t in (named.get("added_tokens_decoder") or {}).items()]


def _against_json(source: Source, folder: Path) -> list[str]:
    """Check that scores fall along the merges, except between pieces whose merges alternate."""
    keys = source.file.keys
    raw = read_json(folder / "tokenizer.json", "the model's tokenizer")
    unknown = raw["model"].get("unk_token") or "<unk>"
    kinds = (
        _added_kinds(raw["added_tokens"], folder)
        | {unknown: {UNKNOWN}}
        | dict.fromkeys(BYTES, {BYTE})
    )
    if wrong := _wrong_tokens(keys, _ids(raw), kinds):
        return wrong
    ids = {token: i for i, token in enumerate(keys["tokenizer.ggml.tokens"])}
    scores = keys["tokenizer.ggml.scores"]
    merged = [left + right for left, right in _pairs(raw["model"]["merges"])]
    final, last = {text: i for i, text in enumerate(merged)}, 0
    for i, (first, then) in enumerate(pairwise(merged)):
        last = max(last, final[first])
        fall = scores[ids[first]] - scores[ids[then]]
        if last > i and fall:
            wrong.append(
                f"{then!r} has another score than {first!r}, though their merges alternate"
            )
        elif last == i and fall <= 0:
            wrong.append(f"{then!r} has no lower score than {first!r}, which is merged before it")
    return wrong


def _against_bytes(source: Source, folder: Path) -> tuple[str, list[str]]:
    keys = source.file.keys
    path = folder / "tokenizer.json"
    if path.is_file():
        raw = read_json(path, "the model's tokenizer")
        vocab, merges = _ids(raw), _pairs(raw["model"]["merges"])
        kinds = _added_kinds(raw["added_tokens"], folder)
    else:
        vocab = read_json(folder / "vocab.json", "the model's vocabulary")
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        merges = _pairs([line for line in lines if line and not line.startswith("#version")])
        # One of several files says which are special; the tokens check sees the rest.
        kinds = dict.fromkeys(vocab, {NORMAL, CONTROL, USER})
    wrong = _wrong_tokens(keys, vocab, kinds)
    written = [tuple(merge.split(" ")) for merge in keys["tokenizer.ggml.merges"]]
    if written != merges:
        at = next(
            (i for i, pair in enumerate(zip(written, merges, strict=False)) if pair[0] != pair[1]),
            min(len(written), len(merges)),
        )
        wrong.append(f"merges differ from number {at} on ({len(written)} and {len(merges)})")
    return ("tokenizer.json" if path.is_file() else "vocab.json and merges.txt"), wrong


def _pairs(merges: list[Any]) -> list[tuple[str, ...]]:
    """Read merges in either form, "left right" or ["left", "right"]; of a repeated one the last
    counts, as in the tokenizers library."""
    pairs = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in merges]
    return [*dict.fromkeys(reversed(pairs))][::-1]


def _ids(raw: dict[str, Any]) -> dict[str, int]:
    ids: dict[str, int] = raw["model"]["vocab"]
    return ids | {token["content"]: token["id"] for token in raw["added_tokens"]}


def _added_kinds(added: list[dict[str, Any]], folder: Path) -> dict[str, set[int]]:
    """Return the types of added tokens; a token that the config names is a control token."""
    path = folder / "tokenizer_config.json"
    config = read_json(path, "the tokenizer's config") if path.is_file() else {}
    ends = [config.get(f"{end}_token") for end in ("bos", "eos", "unk", "pad")]
    named = {end.get("content") if isinstance(end, dict) else end for end in ends}
    return {
        token["content"]: {CONTROL if token["special"] or token["content"] in named else USER}
        for token in added
    }


def _wrong_tokens(
    keys: dict[str, Any], vocab: dict[str, int], kinds: dict[str, set[int]]
) -> list[str]:
    """List tokens whose id or type is wrong.

    Args:
        kinds: Allowed types of tokens that are not normal ones.
    """
    tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    wrong = []
    for text, i in vocab.items():
        allowed = kinds.get(text, {NORMAL})
        if i >= len(tokens):
            if allowed == {NORMAL}:
                wrong.append(f"token {i}, {text!r}, is lost: there are {len(tokens)} rows")
        elif tokens[i] != text or types[i] not in allowed:
            wrong.append(f"token {i} is {tokens[i]!r} of type {types[i]}, the model has {text!r}")
    return wrong


def _wrong_ends(source: Source, folder: Path) -> list[str]:
    """Compare BOS and EOS with the config, the tokenizer's config and its model.

    A gpt2 vocabulary without BOS may use EOS.
    """
    keys, known = source.file.keys, {}
    tokens = keys["tokenizer.ggml.tokens"]
    path = folder / "tokenizer_config.json"
    named = read_json(path, "the tokenizer's config") if path.is_file() else {}
    for end in ("bos", "eos"):
        configured = source.config.get(f"{end}_token_id")
        known[end] = {*(configured if isinstance(configured, list) else [configured])}
        token = named.get(f"{end}_token")
        text = token.get("content") if isinstance(token, dict) else token
        known[end] |= {i for i, own in enumerate(tokens) if own == text}
    if (pieces := sentencepiece_file(folder)) is not None:
        model = sentencepiece.SentencePieceProcessor(model_file=str(pieces))
        known["bos"].add(model.bos_id())
        known["eos"].add(model.eos_id())
    if keys["tokenizer.ggml.model"] == "gpt2":
        known["bos"] |= known["eos"]
    return [
        f"{end}_token_id is {got}, the model has {sorted(known[end], key=str)}"
        for end in ("bos", "eos")
        if (got := keys.get(f"tokenizer.ggml.{end}_token_id")) is not None and got not in known[end]
    ]

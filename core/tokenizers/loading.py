"""Load the tokenizer of a model's folder exactly as its files define it.

transformers builds a tokenizer from a class and from files, and some classes override the files:
they drop tokenizer.json's rules for spaces, digits and line ends, or merge pieces of equal scores
in tokenizer.model by id. The result differs from the tokens that the model was trained on. Here
tokenizer.json is used as it stands, and merges follow tokenizer.model's scores. transformers
handles special tokens, added tokens and the chat template.
"""

from __future__ import annotations

import json
from operator import itemgetter
from pathlib import Path
from typing import Any, cast

from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE
from tokenizers.normalizers import Prepend, Replace, Sequence
from tokenizers.pre_tokenizers import Metaspace
from transformers import PreTrainedTokenizerBase as Tokenizer

from sparsecast.core.errors import InputError, is_panic, reason_of
from sparsecast.core.messages import log
from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.core.models.pretrained import load_pretrained_tokenizer
from sparsecast.core.options import short_repr
from sparsecast.core.tokenizers.files import MOST_IDS, check_files, sentencepiece_file, settings_of
from sparsecast.core.tokenizers.sentencepiece_bpe import (
    NORMAL,
    SPACE,
    USER,
    adds_one_space,
    find_mismatch,
    is_bpe,
    merges_by_score,
    read_model,
    scores_of,
)


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """Load the tokenizer beside a checkpoint's weights.

    Raises:
        InputError: No tokenizer files, or part of them; damaged ones; two tokenizers in one folder;
            one that makes nothing of a text.
    """
    try:
        return _load(checkpoint.folder)
    except BaseException as error:
        if not is_panic(error):
            raise
        raise InputError(
            f"{checkpoint.folder}: the tokenizers library fails on these files ({error}); copy the "
            "tokenizer's files from where the model comes from"
        ) from error


def _load(folder: Path) -> Tokenizer:
    check_files(folder)
    path = sentencepiece_file(folder)
    model: Any = None if path is None else read_model(path)
    try:
        tokenizer: Any = load_pretrained_tokenizer(folder)
    except Exception as error:  # a damaged tokenizer file raises whatever it meets
        if "auto_map" in settings_of(folder):
            raise InputError(
                f"{folder}: tokenizer_config.json names code of the model's own under auto_map, "
                "which is not run; take auto_map out, and name a class of transformers under "
                "tokenizer_class"
            ) from error
        raise InputError(
            f"{folder}: no usable tokenizer ({reason_of(error)}); expected the tokenizer.json or "
            "tokenizer.model of this model beside config.json"
        ) from error
    _check_largest(tokenizer, folder)
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        whole = folder / "tokenizer.json"
        if whole.exists():
            _as_written(backend, whole)
        if path is not None and is_bpe(model):
            _by_score(tokenizer, path, model)
            if not whole.exists() and adds_one_space(model):
                whole_pieces = any(piece.type == USER for piece in model.pieces)
                _put_space(backend, settings_of(folder), whole_pieces)
    if not tokenizer("a b", add_special_tokens=False, verbose=False)["input_ids"]:
        raise InputError(
            f"{folder}: its tokenizer has {len(tokenizer)} tokens and makes none of a text; copy "
            "the tokenizer's whole files from where the model comes from"
        )
    return cast(Tokenizer, tokenizer)


def _check_largest(tokenizer: Any, folder: Path) -> None:
    """Refuse an absurd id; see `MOST_IDS`."""
    token, largest = max(tokenizer.get_vocab().items(), key=itemgetter(1), default=("", 0))
    if largest >= MOST_IDS:
        raise InputError(
            f"{folder}: the tokenizer has {short_repr(token)} as id {largest:,}, expected ids "
            f"below {MOST_IDS:,}, far above any vocabulary; copy the tokenizer's files again"
        )


def _as_written(backend: Any, path: Path) -> None:
    try:
        own = Backend.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise InputError(
            f"{path}: not a tokenizer ({reason_of(error)}); copy the model's own "
            "tokenizer.json here"
        ) from error
    backend.model = own.model
    backend.normalizer = own.normalizer
    backend.pre_tokenizer = own.pre_tokenizer


def _by_score(tokenizer: Any, path: Path, model: Any) -> None:
    """Order merges as sentencepiece does with `model`, the tokenizer.model at `path`.

    Raises:
        InputError: The tokenizer.json beside it belongs to another tokenizer.
    """
    backend = tokenizer.backend_tokenizer
    spec = json.loads(backend.to_str())["model"]
    if spec["type"] != "BPE":
        return
    vocab: dict[str, int] = spec["vocab"]
    _check_same(path, vocab, model, tokenizer.added_tokens_decoder)
    merges = [(left, right) for left, right in spec["merges"]]
    if find_mismatch(vocab, merges, model) is None:
        return
    scores = {text: score for text, score in scores_of(model).items() if text in vocab}
    merges = merges_by_score(scores)
    fallback = model.trainer_spec.byte_fallback
    backend.model = BPE(
        vocab, merges, unk_token=spec["unk_token"], fuse_unk=True, byte_fallback=fallback
    )
    if (text := find_mismatch(vocab, merges, model)) is not None:
        log.warning(
            f"{path}: pieces share scores in a way that transformers' tokenizers cannot express, "
            f"so text such as {text!r} becomes other tokens than sentencepiece and PowerInfer make"
        )


def _put_space(backend: Any, settings: dict[str, Any], whole_pieces: bool) -> None:
    """Add a space before a text, and after special tokens unless `legacy` is false.

    With added pieces that are matched whole, a space would also follow each of them. Then the space
    goes in front of the text only, and not if the text begins with a space.
    """
    if settings.get("add_prefix_space") is False:
        return
    if whole_pieces or settings.get("legacy") is False:
        backend.normalizer = None
        backend.pre_tokenizer = Metaspace(SPACE, prepend_scheme="first", split=False)
    else:
        backend.normalizer = Sequence([Prepend(SPACE), Replace(" ", SPACE)])
        backend.pre_tokenizer = None


def _check_same(path: Path, vocab: dict[str, int], model: Any, added: dict[int, Any]) -> None:
    """Check that two vocabularies agree; ids of added tokens may have other names."""
    for i, piece in enumerate(model.pieces):
        if piece.type == NORMAL and vocab.get(piece.piece) != i and i not in added:
            raise InputError(
                f"{path}: has {piece.piece!r} as piece {i}, but tokenizer.json beside it has "
                f"{vocab.get(piece.piece, 'none')}; leave only the tokenizer of this model there"
            )

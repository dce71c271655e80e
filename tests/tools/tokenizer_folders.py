"""Folders of small tokenizers of every kind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from sentencepiece import sentencepiece_model_pb2 as proto
from tokenizers import Tokenizer, models, pre_tokenizers

from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.core.tokenizers.loading import load_tokenizer

CONFIG = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}


def folder_of(folder: Path, model_folder: Path, tokenizer: Path | None, config=CONFIG) -> Path:
    """A model's folder with this tokenizer.model."""
    folder.mkdir()
    shutil.copy(model_folder / "config.json", folder)
    if tokenizer is not None:
        shutil.copy(tokenizer, folder / "tokenizer.model")
        rows = len(proto.ModelProto.FromString(tokenizer.read_bytes()).pieces)
        raw = json.loads((folder / "config.json").read_text()) | {"vocab_size": rows}
        (folder / "config.json").write_text(json.dumps(raw))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def loaded(folder: Path):
    return load_tokenizer(Checkpoint(str(folder)))


def small(path: Path, scores: dict[str, float], user: tuple[str, ...] = ()) -> Path:
    """A model of these pieces, single characters and bytes."""
    model = proto.ModelProto()
    model.pieces.add(piece="<unk>", type=2)
    for text in ("<s>", "</s>"):
        model.pieces.add(piece=text, type=3)
    for byte in range(256):
        model.pieces.add(piece=f"<0x{byte:02X}>", type=6)
    for text, score in scores.items():
        model.pieces.add(piece=text, score=score)
    for text in user:
        model.pieces.add(piece=text, type=4)
    for text in sorted({"\u2581", *"".join(scores)} - scores.keys()):
        model.pieces.add(piece=text, score=-1e6)
    model.trainer_spec.model_type, model.trainer_spec.byte_fallback = 2, True
    model.normalizer_spec.remove_extra_whitespaces = False
    path.write_bytes(model.SerializeToString())
    return path


def by_digits(folder: Path, **parts: object) -> Tokenizer:
    """A byte-level tokenizer.json that cuts digits apart, as SmolLM2's."""
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab |= {"12": 256, "ab": 257}
    own = Tokenizer(models.BPE(vocab, [("1", "2"), ("a", "b")]))
    own.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    for name, value in parts.items():
        setattr(own, name, value)
    own.add_special_tokens(["<|endoftext|>"])
    own.save(str(folder / "tokenizer.json"))
    return own

"""Check the header's keys for what the engine would refuse, misread or not notice.

Keys and value types are those of `llm_load_hparams` (PowerInfer's llama.cpp at d3ebd7c).
"""

from __future__ import annotations

from typing import Any

from sparsecast.export.checks.base import Check
from sparsecast.export.read.header import EPSILON
from sparsecast.export.read.reader import FLOAT32, INT32, STRING, UINT32, GGUFFile

COUNTS = (
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "attention.head_count",
)
OPTIONAL = {
    "attention.head_count_kv": UINT32,
    "rope.dimension_count": UINT32,
    "rope.freq_base": FLOAT32,
    "rope.scaling.type": STRING,
    "rope.scaling.factor": FLOAT32,
    "rope.scale_linear": FLOAT32,
}
"""Optional keys of an architecture, with their types."""
ELEMENTS = {
    "tokenizer.ggml.tokens": STRING,
    "tokenizer.ggml.scores": FLOAT32,
    "tokenizer.ggml.token_type": INT32,
    "tokenizer.ggml.merges": STRING,
}
"""Element types of arrays. The engine assumes them whatever the file says."""
TOKENIZERS = ("llama", "gpt2")


def check_metadata(file: GGUFFile) -> Check:
    """Check the magic, the keys and their types."""
    keys: dict[str, Any] = file.keys
    wrong = [] if file.magic == b"PWRI" else [f"magic is {file.magic!r}, expected b'PWRI'"]
    if file.alignment != 32:
        wrong.append(f"alignment is {file.alignment}, expected 32")
    arch = keys.get("general.architecture")
    if not isinstance(arch, str) or arch not in EPSILON:
        wrong.append(f"general.architecture is {arch!r}, expected one of {', '.join(EPSILON)}")
        return Check("metadata", False, "; ".join(wrong))
    counts = [f"{arch}.{name}" for name in COUNTS]
    required = _required(arch, counts)
    wrong += [f"{key} is missing" for key in required if key not in keys]
    for key, kind in {**required, **_optional(arch)}.items():
        if key in keys and file.key_types[key] != kind:
            wrong.append(f"{key} has value type {file.key_types[key]}, expected {kind}")
    for key, kind in file.element_types.items():
        if kind != ELEMENTS.get(key, kind):
            wrong.append(f"{key} holds elements of type {kind}, expected {ELEMENTS[key]}")
    if wrong:
        return Check("metadata", False, "; ".join(wrong))
    wrong += [f"{key} is 0" for key in counts if not keys[key]]
    if (blocks := keys[f"{arch}.block_count"]) > len(file.entries):
        wrong.append(f"{arch}.block_count is {blocks}, more than there are tensors")
    if (model := keys["tokenizer.ggml.model"]) not in TOKENIZERS:
        wrong.append(f"tokenizer.ggml.model is {model!r}, expected {' or '.join(TOKENIZERS)}")
    if keys[f"{arch}.feed_forward_length"] <= 1000:
        wrong.append("the FFN is not wider than 1000: the engine ignores the threshold")
    if not wrong:
        wrong += [*_wrong_heads(arch, keys), *_wrong_rope(arch, keys)]
    return Check("metadata", not wrong, "; ".join(wrong) or f"{len(keys)} keys of a {arch}")


def _required(arch: str, counts: list[str]) -> dict[str, int]:
    return {
        "general.architecture": STRING,
        **dict.fromkeys(counts, UINT32),
        f"{arch}.{EPSILON[arch]}": FLOAT32,
        "powerinfer.sparse_threshold": FLOAT32,
        "tokenizer.ggml.model": STRING,
    }


def _optional(arch: str) -> dict[str, int]:
    return {
        **{f"{arch}.{name}": kind for name, kind in OPTIONAL.items()},
        "general.file_type": UINT32,
        "general.quantization_version": UINT32,
        **{
            f"tokenizer.ggml.{kind}_token_id": UINT32
            for kind in ("bos", "eos", "unknown", "padding")
        },
    }


def _wrong_heads(arch: str, keys: dict[str, Any]) -> list[str]:
    hidden, heads = keys[f"{arch}.embedding_length"], keys[f"{arch}.attention.head_count"]
    kv_heads = keys.get(f"{arch}.attention.head_count_kv", heads)
    if hidden % heads or not kv_heads or heads % kv_heads:
        return [f"{heads} heads and {kv_heads} key/value heads do not fit hidden size {hidden}"]
    if keys.get(f"{arch}.rope.dimension_count", hidden // heads) != hidden // heads:
        return [f"{arch}.rope.dimension_count is not the head size"]
    return []


def _wrong_rope(arch: str, keys: dict[str, Any]) -> list[str]:
    rope = keys.get(f"{arch}.rope.scaling.type", "none")
    if rope not in ("none", "linear"):
        return [f"{arch}.rope.scaling.type is {rope!r}, expected none or linear"]
    for name in ("rope.scaling.factor", "rope.scale_linear"):
        if arch == "falcon" and keys.get(f"falcon.{name}", 1.0) != 1.0:
            return [f"falcon.{name} is not 1: the engine divides by it twice"]
    return []

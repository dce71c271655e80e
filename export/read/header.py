"""Read the numbers in a model file's header, whose keys begin with the architecture."""

from __future__ import annotations

from typing import Any, NamedTuple

from sparsecast.export.read.reader import GGUFFile


class Header(NamedTuple):
    """The header as the engine reads it; absent keys have the engine's defaults."""

    arch: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    vocab: int
    context: int
    eps: float
    """Epsilon of every norm."""
    rope_base: float
    rope_factor: float
    threshold: float

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def gated(self) -> bool:
        """Whether the FFN has a gate."""
        return self.arch in ("llama", "bamboo")


def header_of(file: GGUFFile) -> Header:
    """Read the header of a file that `check_metadata` has passed."""
    keys: dict[str, Any] = file.keys
    arch = keys["general.architecture"]

    def get(name: str, default: Any = None) -> Any:
        key = f"{arch}.{name}"
        return keys[key] if default is None else keys.get(key, default)

    # The second key is the older name.
    factor = get("rope.scaling.factor", 0.0) or get("rope.scale_linear", 0.0) or 1.0
    return Header(
        arch=arch,
        layers=get("block_count"),
        hidden=get("embedding_length"),
        ffn=get("feed_forward_length"),
        heads=get("attention.head_count"),
        kv_heads=get("attention.head_count_kv", get("attention.head_count")),
        vocab=len(keys["tokenizer.ggml.tokens"]),
        context=get("context_length"),
        # The engine's opt does not read it and uses 0 (`llm_load_hparams`).
        eps=0.0 if arch == "opt" else get(EPSILON[arch]),
        rope_base=get("rope.freq_base", 10_000.0),
        rope_factor=1.0 if get("rope.scaling.type", "linear") == "none" else factor,
        threshold=keys.get("powerinfer.sparse_threshold", 0.0),
    )


EPSILON = {
    "llama": "attention.layer_norm_rms_epsilon",
    "bamboo": "attention.layer_norm_rms_epsilon",
    "falcon": "attention.layer_norm_epsilon",
    "opt": "attention.layer_norm_epsilon",
}
"""The key of the norms' epsilon, by architecture."""

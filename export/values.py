"""Compare a bundle's tensors and header with the model they were made from.

Written without the exporter's code: rows of q and k by index arithmetic instead of swapped axes,
the config from config.json as it stands instead of transformers' object. Quantised tensors are
compared by value, as our own reader dequantises them, with what the gguf package makes of the
model's.

Shape letters: V vocabulary, D hidden, F FFN width; stored tensors are (rows, columns).
"""

from __future__ import annotations

from math import isclose

import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from torch import Tensor

from sparsecast.collect.atomic import read_json
from sparsecast.collect.checkpoint import Checkpoint
from sparsecast.export.checks import Check, same
from sparsecast.export.reader import GGUFFile
from sparsecast.export.tensor_types import TensorType
from sparsecast.export.tensors import expected_shapes

SOURCES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down_t": "mlp.down_proj",
}


class Source:
    """What the model says each tensor of the file should hold."""

    def __init__(self, checkpoint: Checkpoint, file: GGUFFile) -> None:
        self.checkpoint = checkpoint
        self.file = file
        self.config = read_json(checkpoint.folder / "config.json", "the model's config")
        self.heads: int = file.keys["llama.attention.head_count"]
        self.kv_heads: int = file.keys.get("llama.attention.head_count_kv", self.heads)

    def raw(self, name: str) -> Tensor:
        """The source's tensor as the checkpoint stores it, for a name of the file."""
        if name == "output.weight" and self.config.get("tie_word_embeddings"):
            name = "token_embd.weight"
        return self.checkpoint.tensor(f"{module_of(name)}.weight")

    def arranged(self, name: str) -> Tensor:
        """(rows, columns) of the file, in the source's dtype."""
        raw, short = self.raw(name), _parts(name)[1]
        if short == "ffn_down_t":
            return raw.t()
        if short in ("attn_q", "attn_k"):
            heads = self.heads if short == "attn_q" else self.kv_heads
            return raw[interleaved_rows(len(raw), heads)]
        return raw

    def expected(self, name: str) -> Tensor:
        """What our reader should give for the tensor, see `rounded`."""
        return rounded(self.arranged(name), self.file.entries[name].type)


def rounded(values: Tensor, kind: TensorType) -> Tensor:
    """What a file of this type holds for `values`: in its dtype, float32 where it is quantised."""
    if kind.block == 1:
        return values.float().to(kind.dtype)
    type_ = GGMLQuantizationType[kind.name.upper()]
    packed = quantize(values.float().contiguous().numpy(), type_)
    return torch.from_numpy(dequantize(packed, type_)).view(values.shape)


def interleaved_rows(rows: int, heads: int) -> Tensor:
    """The source's row for each row of the file: 2 j takes j, 2 j + 1 takes j + size / 2."""
    size = rows // heads
    row = torch.arange(rows)
    head, within = row // size, row % size
    return head * size + within // 2 + (within % 2) * (size // 2)


def check_values(source: Source) -> list[Check]:
    """Every tensor of the model, exactly; one check per kind, its detail names what differs."""
    failed: dict[str, list[str]] = {}
    names = [name for name in expected_shapes(source.file) if module_of(name) is not None]
    for name in names:
        wrong = failed.setdefault(f"values {_parts(name)[1]}", [])
        want, got = source.expected(name), source.file.tensor(name)
        if not same(want, got):
            wrong.append(f"{name}: {_cause(source, name, want, got)}")
    return [
        Check(kind, not wrong, "; ".join(wrong) or "as the model rounds to")
        for kind, wrong in failed.items()
    ]


def _cause(source: Source, name: str, want: Tensor, got: Tensor) -> str:
    """Why `got` is not `want`, as far as the bytes tell."""
    if want.shape != got.shape:
        return f"is {tuple(got.shape)}, the model makes it {tuple(want.shape)}"
    if not bool(got.isfinite().all()):
        return f"holds {int((~got.isfinite()).sum())} NaN or infinite values"
    kind = source.file.entries[name].type
    flipped = source.arranged(name).t().contiguous().view(got.shape)
    if got.dim() == 2 and torch.equal(rounded(flipped, kind), got):
        return "transposed: its bytes are those of the transpose"
    if _parts(name)[1] in ("attn_q", "attn_k") and (cause := _row_order(source, name, want, got)):
        return cause
    if twin := _twin(source, name, got):
        return f"equals {twin} of the model: swapped or written twice"
    flat, ours = got.flatten(), want.flatten()
    differs = (flat != ours).nonzero().flatten()
    first = int(differs[0])
    if not bool(flat[first:].any()):
        return f"truncated: only zeros from value {first} of {flat.numel()} on"
    largest = (flat.float() - ours.float()).abs().max().item()
    return f"{len(differs)} of {flat.numel()} values differ, by up to {largest:.3g}"


def _row_order(source: Source, name: str, want: Tensor, got: Tensor) -> str | None:
    raw = rounded(source.raw(name), source.file.entries[name].type)
    if same(raw, got):
        return "permuted wrongly: rows are in the model's order, not interleaved per head"
    for heads in {source.heads, source.kv_heads}:
        if len(raw) % (2 * heads) == 0 and same(raw[interleaved_rows(len(raw), heads)], got):
            return f"permuted wrongly: interleaved as if it had {heads} heads"
    return "permuted wrongly: the right rows in a wrong order" if _same_rows(want, got) else None


def _same_rows(want: Tensor, got: Tensor) -> bool:
    """The same rows in any order, by their float64 sums against random weights."""
    generator = torch.Generator().manual_seed(0)
    weights_D = torch.randn(want.shape[1], generator=generator, dtype=torch.float64)
    sums = [(rows.double() * weights_D).sum(1).sort().values for rows in (want, got)]
    return torch.equal(*sums)


def _twin(source: Source, name: str, got: Tensor) -> str | None:
    """Another tensor of this shape that the model would give these values to."""
    for other, entry in source.file.entries.items():
        if other == name or entry.shape != tuple(got.shape) or _parts(other)[1] not in SOURCES:
            continue
        if same(source.expected(other).to(got.dtype), got):
            return other
    return None


def check_header(source: Source) -> Check:
    """Sizes, norm epsilon and rope against config.json, in its old and its new spelling."""
    config, keys = source.config, source.file.keys
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    theta = rope.get("rope_theta", config.get("rope_theta", 10_000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    heads = config["num_attention_heads"]
    want = {
        "llama.block_count": config["num_hidden_layers"],
        "llama.embedding_length": config["hidden_size"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.attention.head_count": heads,
        "llama.context_length": config.get("max_position_embeddings", 2048),
        "llama.attention.layer_norm_rms_epsilon": config.get("rms_norm_eps", 1e-6),
    }
    wrong = [
        f"{key} is {keys[key]:g}, config.json has {value:g}"
        for key, value in want.items()
        if not isclose(keys[key], value, rel_tol=1e-6)
    ]
    # Where a key is absent the engine takes these values.
    defaults = {
        "llama.attention.head_count_kv": (heads, config.get("num_key_value_heads") or heads),
        "llama.rope.freq_base": (10_000.0, theta),
        "llama.rope.scaling.factor": (1.0, rope.get("factor", 1.0) if kind == "linear" else 1.0),
    }
    for key, (absent, value) in defaults.items():
        if not isclose(keys.get(key, absent), value, rel_tol=1e-6):
            wrong.append(f"{key} is {keys.get(key, absent):g}, config.json has {value:g}")
    return Check("header", not wrong, "; ".join(wrong) or "as config.json says")


def module_of(name: str) -> str | None:
    """The model's module whose weight a tensor of the file holds; None for a predictor's."""
    block, short = _parts(name)
    if short not in SOURCES:
        return None
    return SOURCES[short] if block is None else f"model.layers.{block}.{SOURCES[short]}"


def _parts(name: str) -> tuple[int | None, str]:
    """Layer and kind of a tensor: blk.3.attn_q.weight is (3, "attn_q")."""
    parts = name.removesuffix(".weight").split(".")
    return (int(parts[1]), parts[2]) if parts[0] == "blk" else (None, parts[0])

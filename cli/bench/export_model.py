"""A llama with random weights and predictors, as large as asked, written without being in memory.

bf16 safetensors, one shard per layer and one for the rest, with an index; config.json; a
sentencepiece model of type BPE whose pieces beyond the bytes are made up. Predictors are random f16
matrices of rank D / 4 without a manifest.

Shape letters: V vocabulary, D hidden, K key/value width, F FFN width, R rank.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from sentencepiece import sentencepiece_model_pb2 as proto
from torch import Tensor

from sparsecast.core.files import write_json


class ModelShape(NamedTuple):
    """What decides the bytes of a llama."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int

    @property
    def rank(self) -> int:
        return self.hidden // 4

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor; those of a layer have `{i}` in their names."""
        d, k = self.hidden, self.hidden // self.heads * self.kv_heads
        layer = {
            "input_layernorm": (d,),
            "self_attn.q_proj": (d, d),
            "self_attn.k_proj": (k, d),
            "self_attn.v_proj": (k, d),
            "self_attn.o_proj": (d, d),
            "post_attention_layernorm": (d,),
            "mlp.gate_proj": (self.ffn, d),
            "mlp.up_proj": (self.ffn, d),
            "mlp.down_proj": (d, self.ffn),
        }
        return {
            "model.embed_tokens.weight": (self.vocab, d),
            "model.norm.weight": (d,),
            "lm_head.weight": (self.vocab, d),
            **{f"model.layers.{{i}}.{name}.weight": shape for name, shape in layer.items()},
        }

    @property
    def parameters(self) -> int:
        counts = {name: torch.Size(shape).numel() for name, shape in self.tensors.items()}
        return sum(n * (self.layers if "{i}" in name else 1) for name, n in counts.items())

    @property
    def nbytes(self) -> int:
        """Return the size of the model and its predictors on disk."""
        return 2 * (self.parameters + self.layers * self.rank * (self.hidden + self.ffn))


SHAPES = {
    "tiny": ModelShape(hidden=256, ffn=1024, layers=4, heads=4, kv_heads=2, vocab=2048),
    "1b": ModelShape(hidden=2048, ffn=5632, layers=22, heads=32, kv_heads=4, vocab=32_000),
}


def write_random(
    shape: ModelShape,
    model: Path,
    predictors: Path,
    wrote: Callable[[int], Any] = lambda nbytes: None,
) -> None:
    """Make both folders. Memory: the larger of a layer and the shard of embedding and output."""
    for folder in (model, predictors):
        folder.mkdir(parents=True)
    _write_config(shape, model)
    _write_vocabulary(shape.vocab, model / "tokenizer.model")
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    for number in range(shape.layers + 1):
        # The last shard holds what belongs to no layer.
        inner = number < shape.layers
        weights = {
            name.format(i=number): _random(size, generator).bfloat16()
            for name, size in shape.tensors.items()
            if ("{i}" in name) == inner
        }
        file = f"model-{number + 1:05d}-of-{shape.layers + 1:05d}.safetensors"
        save_file(weights, model / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(weights, file)
        wrote(sum(weight.nbytes for weight in weights.values()))
    index = {"metadata": {"total_size": 2 * shape.parameters}, "weight_map": weight_map}
    write_json(model / "model.safetensors.index.json", index)
    for i in range(shape.layers):
        sizes = {
            "fc1.weight": (shape.rank, shape.hidden),
            "fc2.weight": (shape.ffn, shape.rank),
        }
        pair = {name: _random(size, generator).half() for name, size in sizes.items()}
        torch.save(pair, predictors / f"model_{i}.pt")
        wrote(sum(weight.nbytes for weight in pair.values()))


def _random(size: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.empty(size).normal_(0, 0.02, generator=generator)


def _write_config(shape: ModelShape, folder: Path) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "relu",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocab,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "bfloat16",
    }
    write_json(folder / "config.json", config)


def _write_vocabulary(size: int, path: Path) -> None:
    model = proto.ModelProto()  # type: ignore[attr-defined]  # made at import
    model.trainer_spec.model_type = model.trainer_spec.BPE
    model.trainer_spec.byte_fallback = True
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.remove_extra_whitespaces = False
    for text, kind in (("<unk>", 2), ("<s>", 3), ("</s>", 3)):
        model.pieces.add(piece=text, score=0.0, type=kind)
    for byte in range(256):
        model.pieces.add(piece=f"<0x{byte:02X}>", score=0.0, type=6)
    for number in range(size - len(model.pieces)):
        model.pieces.add(piece=word(number), score=-float(number), type=1)
    path.write_bytes(model.SerializeToString())


def word(number: int) -> str:
    """Letters that no other number has."""
    word = ""
    while number >= 0:
        number, letter = divmod(number, 26)
        word, number = chr(ord("a") + letter) + word, number - 1
    return word

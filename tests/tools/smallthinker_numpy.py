"""llama.cpp's graph of a smallthinker file in numpy, float64, from its own keys and tensors.

Written from src/models/smallthinker.cpp, `build_moe_ffn`, `load_hparams` and ggml's rope (NEOX),
for any number of experts; the file is read by the gguf package. Nothing of sparsecast is used.

Shape letters: S tokens, V vocabulary, D hidden, H heads, N head size, E experts, F FFN.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize

SOFTMAX = 1


class SmallThinker:
    def __init__(self, path: Path) -> None:
        reader = GGUFReader(path)
        self.keys = {name: field.contents() for name, field in reader.fields.items()}
        assert self.keys["general.architecture"] == "smallthinker"
        self.tensors = {
            t.name: dequantize(t.data, t.tensor_type)
            .reshape([int(n) for n in t.shape][::-1])
            .astype(np.float64)
            for t in reader.tensors
        }
        self.used: set[str] = set()

    def key(self, name: str, default: object = None):
        found = self.keys.get(f"smallthinker.{name}", default)
        assert found is not None, name
        return found

    def tensor(self, name: str) -> np.ndarray:
        self.used.add(f"{name}.weight")
        return self.tensors[f"{name}.weight"]

    def logits(self, ids: list[int]) -> np.ndarray:
        """Logits of each token, (S, V)."""
        assert "smallthinker.attention.sliding_window" not in self.keys  # or layers would differ
        x_SD = self.tensor("token_embd")[ids]
        for i in range(self.key("block_count")):
            router_SE = x_SD @ self.tensor(f"blk.{i}.ffn_gate_inp").T
            h_SD = x_SD + self._attention(i, self._norm(x_SD, f"blk.{i}.attn_norm"))
            x_SD = h_SD + self._experts(i, self._norm(h_SD, f"blk.{i}.ffn_norm"), router_SE)
        head = "output" if "output.weight" in self.tensors else "token_embd"
        out_SV = self._norm(x_SD, "output_norm") @ self.tensor(head).T
        assert self.used == self.tensors.keys()  # the loader refuses a file with others
        return out_SV

    def _norm(self, x_SD: np.ndarray, name: str) -> np.ndarray:
        eps = self.key("attention.layer_norm_rms_epsilon")
        return x_SD / np.sqrt((x_SD**2).mean(-1, keepdims=True) + eps) * self.tensor(name)

    def _attention(self, i: int, x_SD: np.ndarray) -> np.ndarray:
        heads = self.key("attention.head_count")
        kv_heads = self.key("attention.head_count_kv", heads)
        size = self.key("attention.key_length", x_SD.shape[1] // heads)
        assert size == self.key("attention.value_length", size)
        assert size == self.key("rope.dimension_count", size)
        q, k, v = (
            (x_SD @ self.tensor(f"blk.{i}.attn_{name}").T).reshape(len(x_SD), -1, size)
            for name in "qkv"
        )
        q, k = self._rope(q), self._rope(k)
        k, v = (np.repeat(t, heads // kv_heads, axis=1) for t in (k, v))
        scores = np.einsum("qhn,khn->hqk", q, k) / np.sqrt(size)
        scores[:, ~np.tri(len(x_SD), dtype=bool)] = -np.inf
        mixed = np.einsum("hqk,khn->qhn", _softmax(scores), v)
        return mixed.reshape(len(x_SD), -1) @ self.tensor(f"blk.{i}.attn_output").T

    def _rope(self, x_SHN: np.ndarray) -> np.ndarray:
        half = x_SHN.shape[-1] // 2
        scale = 1 / self.key("rope.scaling.factor", 1.0)
        base = self.key("rope.freq_base", 10000.0)
        steps = scale * np.arange(len(x_SHN))[:, None] * base ** (-np.arange(half) / half)
        cos, sin = np.cos(steps)[:, None], np.sin(steps)[:, None]
        a, b = x_SHN[..., :half], x_SHN[..., half:]
        return np.concatenate([a * cos - b * sin, a * sin + b * cos], -1)

    def _experts(self, i: int, x_SD: np.ndarray, router_SE: np.ndarray) -> np.ndarray:
        assert self.key("expert_gating_func", 0) == SOFTMAX  # anything else aborts or differs
        used = self.key("expert_used_count")
        prob_SE = _softmax(router_SE)
        chosen = np.argsort(-prob_SE, axis=1)[:, :used]
        weight = np.take_along_axis(prob_SE, chosen, 1)
        weight = weight / np.clip(weight.sum(1, keepdims=True), 2.0**-14, None)
        gate, up, down = (self.tensor(f"blk.{i}.ffn_{n}_exps") for n in ("gate", "up", "down"))
        assert gate.shape[:2] == (self.key("expert_count"), self.key("expert_feed_forward_length"))
        out = np.zeros_like(x_SD)
        for s, x_D in enumerate(x_SD):
            for e, w in zip(chosen[s], weight[s], strict=True):
                out[s] += w * (down[e] @ (np.maximum(gate[e] @ x_D, 0) * (up[e] @ x_D)))
        return out


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)

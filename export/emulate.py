"""Evaluate a bundle's file as PowerInfer's CPU engine does, in plain torch.

What the engine computes (PowerInfer's llama.cpp and ggml.c at d3ebd7c), reproduced from the file
alone:
- a product with f16 weights rounds its input to f16 and sums in float32 or better; with f32
  weights nothing is rounded. ffn_down_t is such a product: relu(gate) * up is its input;
- a product with q8_0 or q4_0 weights rounds its input to q8_0 and sums the codes of a block as
  integers. Terms that cancel leave exactly 0, an active neuron, which float32 misses by a last bit;
  float64 holds the products and the sum of a block without rounding;
- rope turns neighbouring pairs, its angle by repeated float32 multiplication;
- softmax takes exp through an f16 table: argument and result are rounded to f16;
- the KV cache is float32 (`--memory-f32`);
- neuron j is skipped where fc2 @ relu(fc1 @ z) < threshold, z the residual before the FFN norm.

Shape letters: B batch, S sequence, T = B S tokens, D hidden, H heads, K key/value heads, E head
size, F FFN width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsecast.export.reader import GGUFFile
from sparsecast.predictors.formats import BLOCK


class Emulator:
    """The engine's arithmetic on one file.

    Memory: the file is mapped; one matrix at a time is widened to float32 (a quantised one to
    float64), and the activations of the tokens given.

    Args:
        coarse: False rounds the inputs of quantised products to f16, like those of f16: the noise
            of q8_0 would hide what else is wrong.
    """

    def __init__(self, file: GGUFFile, *, coarse: bool = True) -> None:
        self._coarse = coarse
        keys: dict[str, Any] = file.keys
        self.file = file
        self.layers: int = keys["llama.block_count"]
        self.heads: int = keys["llama.attention.head_count"]
        self.kv_heads: int = keys.get("llama.attention.head_count_kv", self.heads)
        self.eps: float = keys["llama.attention.layer_norm_rms_epsilon"]
        self.rope_base: float = keys.get("llama.rope.freq_base", 10_000.0)
        self.rope_scale: float = 1.0 / (keys.get("llama.rope.scaling.factor", 0.0) or 1.0)
        self.threshold: float = keys.get("powerinfer.sparse_threshold", 0.0)
        self.head_dim = keys["llama.embedding_length"] // self.heads

    @torch.no_grad()
    def logits(self, ids_BS: Tensor, *, all_active: bool = False) -> Tensor:
        """(B, S, V) float32 logits for sequences of one length.

        Args:
            ids_BS: int64; BOS is not added.
            all_active: Compute every neuron, as the engine does at a threshold of -1e30.
        """
        B, S = ids_BS.shape
        x_TD = self.file.tensor("token_embd.weight")[ids_BS.flatten()].float()
        cos_SE, sin_SE = self._rope_table(S)
        for i in range(self.layers):
            normed_TD = self._norm(x_TD, f"blk.{i}.attn_norm.weight")
            x_TD = x_TD + self._attention(normed_TD, i, B, cos_SE, sin_SE)
            x_TD = x_TD + self._ffn(x_TD, i, all_active)
        logits_TV = self._product(self._norm(x_TD, "output_norm.weight"), "output.weight")
        return logits_TV.view(B, S, -1)

    def predictor_logits(self, x_TD: Tensor, layer: int) -> Tensor:
        """(T, F) float32 of one layer for float32 inputs, the residual before the FFN norm."""
        hidden_TR = self._product(x_TD, f"blk.{layer}.fc1.weight").relu_()
        return self._product(hidden_TR, f"blk.{layer}.fc2.weight")

    def _product(self, x_TD: Tensor, name: str) -> Tensor:
        """x times a matrix whose rows are outputs; those of ffn_down_t are inputs."""
        weight = self.file.tensor(name)
        stored = self.file.entries[name].type
        if stored.name != "f32":
            x_TD = rounded_input(x_TD, stored.name if self._coarse else "f16")
        sums = torch.float64 if stored.block > 1 else torch.float32
        weight = weight.to(sums)
        return (x_TD.to(sums) @ (weight if ".ffn_down_t." in name else weight.T)).float()

    def _norm(self, x_TD: Tensor, name: str) -> Tensor:
        mean_T1 = x_TD.square().double().mean(-1, keepdim=True).float()
        return x_TD * (1 / (mean_T1 + self.eps).sqrt()) * self.file.tensor(name)

    def _rope_table(self, length: int) -> tuple[Tensor, Tensor]:
        """(S, E / 2) cosines and sines."""
        angle_S = torch.arange(length, dtype=torch.float32)
        step = torch.tensor(self.rope_base).pow(-2.0 / self.head_dim)
        angles = []
        for _ in range(self.head_dim // 2):
            angles.append(angle_S * self.rope_scale)
            angle_S = angle_S * step
        angle_SE = torch.stack(angles, -1)
        return angle_SE.cos(), angle_SE.sin()

    def _heads(self, x_TD: Tensor, batch: int, heads: int) -> Tensor:
        """(T, heads E) to (B, heads, S, E)."""
        return x_TD.view(batch, -1, heads, self.head_dim).transpose(1, 2)

    def _attention(
        self, x_TD: Tensor, layer: int, batch: int, cos_SE: Tensor, sin_SE: Tensor
    ) -> Tensor:
        q = self._heads(self._product(x_TD, f"blk.{layer}.attn_q.weight"), batch, self.heads)
        k = self._heads(self._product(x_TD, f"blk.{layer}.attn_k.weight"), batch, self.kv_heads)
        v = self._heads(self._product(x_TD, f"blk.{layer}.attn_v.weight"), batch, self.kv_heads)
        q, k = _turned(q, cos_SE, sin_SE), _turned(k, cos_SE, sin_SE)
        group = self.heads // self.kv_heads
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores_BHSS = q @ k.transpose(-1, -2) * self.head_dim**-0.5
        length = scores_BHSS.shape[-1]
        future_SS = torch.ones(length, length, dtype=torch.bool).triu(1)
        scores_BHSS.masked_fill_(future_SS, float("-inf"))
        mixed_BHSE = _softmax(scores_BHSS) @ v
        mixed_TD = mixed_BHSE.transpose(1, 2).reshape(len(x_TD), -1)
        return self._product(mixed_TD, f"blk.{layer}.attn_output.weight")

    def _ffn(self, x_TD: Tensor, layer: int, all_active: bool) -> Tensor:
        block = f"blk.{layer}"
        normed_TD = self._norm(x_TD, f"{block}.ffn_norm.weight")
        gate_TF = self._product(normed_TD, f"{block}.ffn_gate.weight")
        x1_TF = gate_TF.relu_() * self._product(normed_TD, f"{block}.ffn_up.weight")
        if not all_active:
            x1_TF.masked_fill_(self.predictor_logits(x_TD, layer) < self.threshold, 0.0)
        return self._product(x1_TF, f"{block}.ffn_down_t.weight")


def rounded_input(x_TD: Tensor, dtype: str) -> Tensor:
    """What the engine multiplies weights of this format by, float32.

    Codes of q8_0 are x (127 / max), as its vector code has it: the same codes at 5 million of 5
    million random inputs. x (1 / (max / 127)), as the reference code and so formats.py have it,
    gives another at one of a million, and so does 127 times a reciprocal, as torch divides a number
    by a tensor.
    """
    if dtype == "f16":
        return x_TD.half().float()
    blocks = x_TD.reshape(len(x_TD), -1, BLOCK)
    largest = blocks.abs().amax(-1, keepdim=True)
    inverse = torch.full_like(largest, 127).div(largest)
    codes = (blocks * torch.where(largest == 0, 0.0, inverse)).round()
    return (codes * (largest / 127).half().float()).flatten(1)


def _turned(x_BHSE: Tensor, cos_SE: Tensor, sin_SE: Tensor) -> Tensor:
    even, odd = x_BHSE[..., 0::2], x_BHSE[..., 1::2]
    pairs = (even * cos_SE - odd * sin_SE, even * sin_SE + odd * cos_SE)
    return torch.stack(pairs, -1).flatten(-2)


def _softmax(scores: Tensor) -> Tensor:
    shifted = (scores - scores.amax(-1, keepdim=True)).half().float()
    weights = shifted.exp().half().float()
    return weights / weights.sum(-1, keepdim=True)

"""Evaluate a bundle's file as PowerInfer's CPU engine does, in plain torch.

The engine's arithmetic (PowerInfer's llama.cpp and ggml.c at d3ebd7c), from the file alone:
- a product with f16 weights rounds its input to f16 and sums in float32 or better; with f32
  weights nothing is rounded. ffn_down_t is such a product, with the input relu(gate) * up;
- a product with q8_0 or q4_0 weights rounds its input to q8_0, sums codes as integers, scales the
  sums and adds them in float32 (here in float64, except where a predictor's terms cancel: ties.py);
- rope rotates neighboring pairs, in a falcon the halves of a head; its angles come from repeated
  float32 multiplication. An opt adds an embedding of the position plus 2;
- softmax computes exp through an f16 table: argument and result are rounded to f16;
- the KV cache is float32 (`--memory-f32`);
- neuron j is skipped if fc2 @ relu(fc1 @ z) < threshold, where z is the residual before the FFN
  norm, in a falcon the layer's input. A skipped neuron of an opt still counts, with relu of its
  bias, when the input of a q4_0 ffn_down_t is rounded in blocks.

Shape letters: B batch, S sequence, T = B S tokens, D hidden, H heads, K key/value heads, E head
size, F FFN width, V vocabulary, N outputs of a product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecast.export.engine.ties import resolve_ties
from sparsecast.export.read.header import header_of
from sparsecast.export.read.reader import GGUFFile
from sparsecast.predictors.formats import rounded_input

POSITION_OFFSET = 2
Rope = tuple[Tensor, Tensor]
"""(S, E / 2) cosines and sines."""


class Emulator:
    """The engine's arithmetic on one file.

    Memory: the mapped file, one matrix at a time in float32 (float64 if quantized), and the
    activations of the given tokens.

    Args:
        coarse: Round the inputs of quantized products to q8_0. False rounds them to f16: the noise
            of q8_0 would hide other errors.
    """

    def __init__(self, file: GGUFFile, *, coarse: bool = True) -> None:
        self._coarse = coarse
        self.file = file
        self.header = header_of(file)

    @torch.no_grad()
    def logits(self, ids_BS: Tensor, *, all_active: bool = False) -> Tensor:
        """Compute (B, S, V) float32 logits for sequences of one length.

        Args:
            ids_BS: int64 ids; BOS is not added.
            all_active: Compute every neuron, as the engine does at a threshold of -1e30.
        """
        B, S = ids_BS.shape
        x_TD = self.file.tensor("token_embd.weight")[ids_BS.flatten()].float()
        opt = self.header.arch == "opt"
        if opt:
            places_SD = self.file.tensor("position_embd.weight")[POSITION_OFFSET:][:S].float()
            x_TD = x_TD + places_SD.repeat(B, 1)
        rope = None if opt else self._rope_table(S)
        for i in range(self.header.layers):
            x_TD = self._block(x_TD, f"blk.{i}", B, rope, all_active)
        head = "token_embd" if opt else "output"
        return self._linear(self._norm(x_TD, "output_norm"), head).view(B, S, -1)

    def predictor_logits(self, x_TD: Tensor, layer: int) -> Tensor:
        """Compute one layer's (T, F) float32 logits from float32 inputs, z above."""
        hidden_TR = self._product(x_TD, f"blk.{layer}.fc1.weight").relu_()
        name = f"blk.{layer}.fc2.weight"
        logits_TF = self._product(hidden_TR, name)
        if self.file.entries[name].type.block == 1:
            return logits_TF
        width = self.header.ffn
        scale_N, code_NK = self.file.blocks(name)
        blocks = scale_N.view(width, -1), code_NK.view(width, -1, code_NK.shape[1])
        return resolve_ties(logits_TF, hidden_TR, *blocks, self.header.threshold)

    def _block(
        self, x_TD: Tensor, block: str, batch: int, rope: Rope | None, all_active: bool
    ) -> Tensor:
        skip_TF = None
        if self.header.arch == "falcon":
            normed_TD = self._norm(x_TD, f"{block}.attn_norm")
            own = f"{block}.attn_norm_2"
            seen_TD = self._norm(x_TD, own) if f"{own}.weight" in self.file.entries else normed_TD
            mixed_TD = self._attention(seen_TD, block, batch, rope)
            if not all_active:
                skip_TF = self._skipped(x_TD, block)
            return self._ffn(normed_TD, block, skip_TF) + mixed_TD + x_TD
        x_TD = x_TD + self._attention(self._norm(x_TD, f"{block}.attn_norm"), block, batch, rope)
        if not all_active:
            skip_TF = self._skipped(x_TD, block)
        return self._ffn(self._norm(x_TD, f"{block}.ffn_norm"), block, skip_TF) + x_TD

    def _skipped(self, x_TD: Tensor, block: str) -> Tensor | None:
        layer = int(block.removeprefix("blk."))
        return self.predictor_logits(x_TD, layer) < self.header.threshold

    def _linear(self, x_TD: Tensor, name: str, skip_TD: Tensor | None = None) -> Tensor:
        y_TN = self._product(x_TD, f"{name}.weight", skip_TD)
        bias = f"{name}.bias"
        return y_TN + self.file.tensor(bias) if bias in self.file.entries else y_TN

    def _product(self, x_TD: Tensor, name: str, skip_TD: Tensor | None = None) -> Tensor:
        """Multiply x by a matrix whose rows are outputs; the rows of ffn_down_t are inputs.

        Args:
            skip_TD: Inputs that are set to 0 after rounding.
        """
        weight = self.file.tensor(name)
        stored = self.file.entries[name].type
        if stored.name != "f32":
            x_TD = self._rounded(x_TD, stored.name)
        if skip_TD is not None:
            x_TD = x_TD.masked_fill(skip_TD, 0.0)
        sums = torch.float64 if stored.block > 1 else torch.float32
        weight = weight.to(sums)
        return (x_TD.to(sums) @ (weight if ".ffn_down_t." in name else weight.T)).float()

    def _rounded(self, x_TD: Tensor, stored: str) -> Tensor:
        """Round the input of a product with weights of type `stored`."""
        return rounded_input(x_TD, stored if self._coarse else "f16")

    def _norm(self, x_TD: Tensor, name: str) -> Tensor:
        """Apply the RMS norm, or LayerNorm if the file has a bias."""
        bias = f"{name}.bias"
        if bias in self.file.entries:
            x_TD = x_TD - x_TD.double().mean(-1, keepdim=True).float()
        mean_T1 = x_TD.square().double().mean(-1, keepdim=True).float()
        scale_T1 = inverse_root(mean_T1 + self.header.eps)
        y_TD = x_TD * scale_T1 * self.file.tensor(f"{name}.weight")
        return y_TD + self.file.tensor(bias) if bias in self.file.entries else y_TD

    def _rope_table(self, length: int) -> Rope:
        size = self.header.head_dim
        angle_S = torch.arange(length, dtype=torch.float32)
        step = torch.tensor(self.header.rope_base).pow(-2.0 / size)
        angles = []
        for _ in range(size // 2):
            angles.append(angle_S * (1.0 / self.header.rope_factor))
            angle_S = angle_S * step
        angle_SE = torch.stack(angles, -1)
        return angle_SE.double().cos().float(), angle_SE.double().sin().float()

    def _heads(self, x_TD: Tensor, batch: int) -> Tensor:
        """Reshape (T, heads E) to (B, heads, S, E)."""
        size = self.header.head_dim
        return x_TD.view(batch, -1, x_TD.shape[1] // size, size).transpose(1, 2)

    def _attention(self, x_TD: Tensor, block: str, batch: int, rope: Rope | None) -> Tensor:
        q, k, v = (self._heads(y, batch) for y in self._projected(x_TD, block))
        if rope is not None:
            rotate = _rotate_halves if self.header.arch == "falcon" else _rotate_pairs
            q, k = rotate(q, *rope), rotate(k, *rope)
        group = self.header.heads // self.header.kv_heads
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores_BHSS = q @ k.mT * self.header.head_dim**-0.5
        length = scores_BHSS.shape[-1]
        future_SS = torch.ones(length, length, dtype=torch.bool).triu(1)
        scores_BHSS.masked_fill_(future_SS, float("-inf"))
        mixed_BHSE = _softmax(scores_BHSS) @ v
        mixed_TD = mixed_BHSE.transpose(1, 2).reshape(len(x_TD), -1)
        return self._linear(mixed_TD, f"{block}.attn_output")

    def _projected(self, x_TD: Tensor, block: str) -> list[Tensor]:
        """Project to queries (T, H E), keys and values (T, K E)."""
        if self.header.arch != "falcon":
            return [self._linear(x_TD, f"{block}.attn_{name}") for name in "qkv"]
        width = self.header.kv_heads * self.header.head_dim
        fused = self._linear(x_TD, f"{block}.attn_qkv")
        return list(torch.split(fused, [self.header.hidden, width, width], dim=-1))

    def _ffn(self, x_TD: Tensor, block: str, skip_TF: Tensor | None) -> Tensor:
        return self._down(self._first(x_TD, block), block, skip_TF)

    def _first(self, x_TD: Tensor, block: str) -> list[Tensor]:
        """Compute gate and up, or up alone, (T, F) without bias."""
        names = ("ffn_gate", "ffn_up") if self.header.gated else ("ffn_up",)
        return [self._product(x_TD, f"{block}.{name}.weight") for name in names]

    def _biased(self, first: list[Tensor], block: str, skip_TF: Tensor | None) -> list[Tensor]:
        """Set skipped neurons to 0, then add the file's biases."""
        names = ("ffn_gate", "ffn_up") if self.header.gated else ("ffn_up",)
        parts = []
        for name, y_TF in zip(names, first, strict=True):
            if skip_TF is not None:
                y_TF = y_TF.masked_fill(skip_TF, 0.0)
            bias = f"{block}.{name}.bias"
            parts.append(y_TF + self.file.tensor(bias) if bias in self.file.entries else y_TF)
        return parts

    def _x1(self, first: list[Tensor], block: str, skip_TF: Tensor | None) -> Tensor:
        """Compute the input of the down projection, (T, F)."""
        parts = self._biased(first, block, skip_TF)
        x1_TF = parts[0].relu()
        if self.header.gated:
            x1_TF = x1_TF * (parts[1].relu() if self.header.arch == "bamboo" else parts[1])
        return x1_TF

    def _down(self, first: list[Tensor], block: str, skip_TF: Tensor | None) -> Tensor:
        x1_TF = self._x1(first, block, skip_TF)
        return self._linear(x1_TF, f"{block}.ffn_down_t", skip_TF)


def _rotate_pairs(x_BHSE: Tensor, cos_SE: Tensor, sin_SE: Tensor) -> Tensor:
    even, odd = x_BHSE[..., 0::2], x_BHSE[..., 1::2]
    pairs = (even * cos_SE - odd * sin_SE, even * sin_SE + odd * cos_SE)
    return torch.stack(pairs, -1).flatten(-2)


def _rotate_halves(x_BHSE: Tensor, cos_SE: Tensor, sin_SE: Tensor) -> Tensor:
    first, second = x_BHSE.chunk(2, -1)
    return torch.cat([first * cos_SE - second * sin_SE, first * sin_SE + second * cos_SE], -1)


def inverse_root(x: Tensor) -> Tensor:
    """Compute 1 / sqrt(x), each step rounded to float32 as in C.

    torch's own results are a last bit off on some CPUs, which can change a quantized code.
    """
    return (1 / x.double().sqrt().float().double()).float()


def _softmax(scores: Tensor) -> Tensor:
    shifted = (scores - scores.amax(-1, keepdim=True)).half().float()
    weights = shifted.exp().half().float()
    return weights / weights.sum(-1, keepdim=True)

"""A module that stands where a model's FFN stood and reads the rows that its tokens need.

Few tokens (a decoding step) go through the kernels, or on a CPU through the rows one by one; many
(a prompt), and float32 on a GPU, through dense products. Which one is decided by shapes, dtypes and
devices alone, so torch.compile takes one path, and CUDA graphs never wait for the host.

Inference only: the operators have no gradient.

Shape letters: T tokens, D hidden, F FFN width, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsecast.kernels.in_models import torch_fallback
from sparsecast.kernels.ops.ffn import FFN, PredictorWeights, exact_ffn, predicted_ffn
from sparsecast.kernels.ops.launch import INTERPRETED, MAX_TOKENS, rounded_threshold
from sparsecast.kernels.ops.predictor import input_dtype
from sparsecast.kernels.ops.quantized import Quantized, dequantized

CPU_TOKENS = 8
"""Beyond, dense products were faster on a CPU at every shape and sparsity that was measured."""


def runs_kernels(weight: Tensor) -> bool:
    """Whether the kernels take weights of this dtype and device."""
    here = weight.device.type == ("cpu" if INTERPRETED else "cuda")
    return here and weight.dtype in (torch.float16, torch.bfloat16)


class SparseFFN(nn.Module):
    """One layer's FFN, exact or behind a predictor.

    Args:
        ffn: Its weights; parameters are taken as they are, not copied.
        predictor: None for the exact path.
        most_tokens: Up to how many tokens go this way. By default what the device is made for: 16
            in the kernels, `CPU_TOKENS` on a CPU.
        exact_tokens: Above those, up to how many go the exact way in spite of a predictor.
        masks_prompts: Whether dense products of more tokens leave out what the predictor does. If
            not, prompts are computed as the model itself does.

    Its parameters are transposed where `nn.Linear` had them otherwise; a predictor's weights are
    buffers that no state dict holds. Move a model to its device and dtype before, not after.
    """

    gate_FD: nn.Parameter | None
    up_FD: nn.Parameter
    down_FD: nn.Parameter
    up_bias_F: nn.Parameter | None
    down_bias_D: nn.Parameter | None
    fc1: Tensor
    fc1_scale: Tensor | None
    fc2: Tensor
    fc2_scale: Tensor | None

    def __init__(
        self,
        ffn: FFN,
        predictor: PredictorWeights | None = None,
        *,
        most_tokens: int | None = None,
        exact_tokens: int = 0,
        masks_prompts: bool = True,
    ) -> None:
        super().__init__()
        for name, weight in zip(ffn._fields[:5], ffn[:5], strict=True):
            self.register_parameter(name, _parameter(weight))
        self.act = ffn.act
        self.threshold = rounded_threshold(ffn.threshold, ffn.up_FD.dtype)
        self.predicts = predictor is not None
        if predictor is not None:
            self.cut = predictor.threshold
            self.input_dtype = input_dtype(predictor.fc1_RD)
            for name, matrix in zip(("fc1", "fc2"), predictor[:2], strict=True):
                if not runs_kernels(ffn.up_FD):
                    matrix = dequantized(matrix)
                parts = (matrix, None) if isinstance(matrix, Tensor) else matrix
                for suffix, part in zip(("", "_scale"), parts, strict=True):
                    self.register_buffer(name + suffix, part, persistent=False)
        limit = MAX_TOKENS if runs_kernels(ffn.up_FD) else CPU_TOKENS
        self.most_tokens = limit if most_tokens is None else min(limit, most_tokens)
        self.exact_tokens = min(limit, exact_tokens)
        self.masks_prompts = masks_prompts
        self._seen: Tensor | None = None

    @property
    def ffn(self) -> FFN:
        weights = (self.gate_FD, self.up_FD, self.down_FD, self.up_bias_F, self.down_bias_D)
        return FFN(*weights, act=self.act, threshold=self.threshold)

    @property
    def predictor(self) -> PredictorWeights:
        """Only where `predicts`."""
        fc1, fc2 = _matrix(self.fc1, self.fc1_scale), _matrix(self.fc2, self.fc2_scale)
        return PredictorWeights(fc1, fc2, self.cut, self.input_dtype)

    def see(self, _norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        """A forward pre-hook for the module whose input the predictor reads: the norm in front."""
        self._seen = args[0]

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D), in one dtype.

        Raises:
            RuntimeError: There is a predictor, but `see` was not called since the last time.
        """
        x_TD = x.reshape(-1, x.shape[-1])
        z_TD = self._taken(x_TD) if self.predicts else None
        ffn = self.ffn
        picks = len(x_TD) <= max(self.most_tokens, self.exact_tokens)
        if len(x_TD) > self.most_tokens and (picks or not self.masks_prompts):
            z_TD = None
        if picks and runs_kernels(x_TD):
            if z_TD is None:
                y_TD, _ = exact_ffn(x_TD, ffn)
            else:
                y_TD, _ = predicted_ffn(x_TD, z_TD, ffn, self.predictor)
        else:
            predicted_TF = None if z_TD is None else torch_fallback.predicted(z_TD, self.predictor)
            product = (
                torch_fallback.over_rows if picks and not x_TD.is_cuda else torch_fallback.dense
            )
            y_TD = product(x_TD, ffn, predicted_TF)
        return y_TD.view(x.shape)

    def _taken(self, x_TD: Tensor) -> Tensor:
        """What `see` saw, and forget it: a kept tensor would outlive its CUDA graph."""
        z, self._seen = self._seen, None
        if z is None:
            raise RuntimeError("the predictor's input is missing: register `see` at the FFN's norm")
        return z.reshape(x_TD.shape)

    def extra_repr(self) -> str:
        (width, hidden), path = self.up_FD.shape, "predicted" if self.predicts else "exact"
        told = f"{hidden}, {width}, {self.act}, {path} up to {self.most_tokens} tokens"
        more = self.exact_tokens > self.most_tokens
        return f"{told}, exact up to {self.exact_tokens}" if more else told


def _parameter(weight: Tensor | None) -> nn.Parameter | None:
    if weight is None or isinstance(weight, nn.Parameter):
        return weight
    return nn.Parameter(weight, requires_grad=False)


def _matrix(weight: Tensor, scale: Tensor | None) -> Tensor | Quantized:
    return weight if scale is None else Quantized(weight, scale)

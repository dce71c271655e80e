"""The module that replaces a model's FFN and reads only the weight rows that its tokens need.

Few tokens (a decoding step) go through the kernels, or on a CPU through the needed rows in plain
torch. Many tokens (a prompt), and float32 on a GPU, go through dense products. The choice depends
on shapes, dtypes and devices alone, so torch.compile sees one path and CUDA graphs never wait for
the host.

For inference only: the operators have no gradient.

Shape letters: T tokens, D hidden, F FFN width, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsecast.kernels.in_models import torch_fallback
from sparsecast.kernels.ops.compiler import HAS_TRITON
from sparsecast.kernels.ops.ffn import (
    FFN,
    WEIGHTS,
    PredictorWeights,
    exact_ffn,
    predicted_ffn,
)
from sparsecast.kernels.ops.launch import INTERPRETED, MAX_TOKENS, rounded_threshold
from sparsecast.kernels.ops.predictor import input_dtype
from sparsecast.kernels.ops.quantized import Quantized, dequantized

MAX_CPU_TOKENS = 8
"""With more tokens, dense products were faster on a CPU at every measured shape and sparsity."""


def runs_kernels(weight: Tensor) -> bool:
    """Return whether the kernels take weights of this dtype and device."""
    here = weight.device.type == ("cpu" if INTERPRETED else "cuda")
    return HAS_TRITON and here and weight.dtype in (torch.float16, torch.bfloat16)


class SparseFFN(nn.Module):
    """One layer's FFN, exact or predicted.

    Args:
        ffn: The weights; parameters are shared, not copied.
        predictor: None for the exact path.
        max_tokens: Largest number of tokens for this path. By default the device's limit: 16 in the
            kernels, `MAX_CPU_TOKENS` on a CPU.
        max_exact_tokens: Up to this number, more tokens than `max_tokens` go the exact way even if
            there is a predictor.
        mask_prompts: Whether dense products of still more tokens zero the neurons that are not
            predicted. If not, prompts are computed as in the dense model.

    `down_FD` is the transpose of the weight in `nn.Linear`. A predictor's weights are buffers that
    are not in the state dict. Move the model to its device and dtype before, not after.
    """

    gate_FD: nn.Parameter | None
    up_FD: nn.Parameter
    down_FD: nn.Parameter
    up_bias_F: nn.Parameter | None
    down_bias_D: nn.Parameter | None
    x1_norm_F: nn.Parameter | None
    fc1: Tensor
    fc1_scale: Tensor | None
    fc2: Tensor
    fc2_scale: Tensor | None

    def __init__(
        self,
        ffn: FFN,
        predictor: PredictorWeights | None = None,
        *,
        max_tokens: int | None = None,
        max_exact_tokens: int = 0,
        mask_prompts: bool = True,
    ) -> None:
        super().__init__()
        for name, weight in zip(WEIGHTS, ffn.weights, strict=True):
            self.register_parameter(name, _parameter(weight))
        self.act = ffn.act
        self.threshold = rounded_threshold(ffn.threshold, ffn.up_FD.dtype)
        self.x1_norm_eps = ffn.x1_norm_eps
        self.predicts = predictor is not None
        if predictor is not None:
            self.predictor_threshold = predictor.threshold
            self.input_dtype = input_dtype(predictor.fc1_RD)
            for name, matrix in zip(("fc1", "fc2"), predictor[:2], strict=True):
                if not runs_kernels(ffn.up_FD):
                    matrix = dequantized(matrix)
                parts = (matrix, None) if isinstance(matrix, Tensor) else matrix
                for suffix, part in zip(("", "_scale"), parts, strict=True):
                    self.register_buffer(name + suffix, part, persistent=False)
        limit = MAX_TOKENS if runs_kernels(ffn.up_FD) else MAX_CPU_TOKENS
        self.max_tokens = limit if max_tokens is None else min(limit, max_tokens)
        self.max_exact_tokens = min(limit, max_exact_tokens)
        self.mask_prompts = mask_prompts
        self._predictor_input: Tensor | None = None

    @property
    def ffn(self) -> FFN:
        return FFN(
            self.gate_FD,
            self.up_FD,
            self.down_FD,
            self.up_bias_F,
            self.down_bias_D,
            self.x1_norm_F,
            act=self.act,
            threshold=self.threshold,
            x1_norm_eps=self.x1_norm_eps,
        )

    @property
    def predictor(self) -> PredictorWeights:
        """The predictor's weights; only if `predicts`."""
        fc1, fc2 = _matrix(self.fc1, self.fc1_scale), _matrix(self.fc2, self.fc2_scale)
        return PredictorWeights(fc1, fc2, self.predictor_threshold, self.input_dtype)

    def keep_predictor_input(self, _norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Keep the predictor's input: a forward pre-hook of the norm in front of the FFN."""
        self._predictor_input = args[0]

    def forward(self, x: Tensor) -> Tensor:
        """Compute the FFN of (..., D); return the same shape and dtype.

        Raises:
            RuntimeError: There is a predictor, but `keep_predictor_input` was not called since the
                last call.
        """
        x_TD = x.reshape(-1, x.shape[-1])
        z_TD = self._take_predictor_input(x_TD) if self.predicts else None
        ffn = self.ffn
        reads_rows = len(x_TD) <= max(self.max_tokens, self.max_exact_tokens)
        if len(x_TD) > self.max_tokens and (reads_rows or not self.mask_prompts):
            z_TD = None
        if reads_rows and runs_kernels(x_TD):
            if z_TD is None:
                y_TD, _ = exact_ffn(x_TD, ffn)
            else:
                y_TD, _ = predicted_ffn(x_TD, z_TD, ffn, self.predictor)
        else:
            predicted_TF = None if z_TD is None else torch_fallback.predicted(z_TD, self.predictor)
            product = (
                torch_fallback.over_rows
                if reads_rows and not x_TD.is_cuda
                else torch_fallback.dense
            )
            y_TD = product(x_TD, ffn, predicted_TF)
        return y_TD.view(x.shape)

    def _take_predictor_input(self, x_TD: Tensor) -> Tensor:
        """Return the predictor's input and drop it: a kept tensor would outlive its CUDA graph."""
        z, self._predictor_input = self._predictor_input, None
        if z is None:
            raise RuntimeError(
                "the predictor's input is missing; register `keep_predictor_input` as a forward "
                "pre-hook of the norm in front of the FFN"
            )
        return z.reshape(x_TD.shape)

    def extra_repr(self) -> str:
        (width, hidden), path = self.up_FD.shape, "predicted" if self.predicts else "exact"
        text = f"{hidden}, {width}, {self.act}, {path} up to {self.max_tokens} tokens"
        more = self.max_exact_tokens > self.max_tokens
        return f"{text}, exact up to {self.max_exact_tokens}" if more else text


def _parameter(weight: Tensor | None) -> nn.Parameter | None:
    if weight is None or isinstance(weight, nn.Parameter):
        return weight
    return nn.Parameter(weight, requires_grad=False)


def _matrix(weight: Tensor, scale: Tensor | None) -> Tensor | Quantized:
    return weight if scale is None else Quantized(weight, scale)

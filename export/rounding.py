"""How the engine rounds the inputs of a product, by the type of its weights.

Shape letters: T tokens, D width of the input, B blocks of 32 in it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecast.predictors.formats import BLOCK


def rounded_input(x_TD: Tensor, dtype: str) -> Tensor:
    """What the engine multiplies weights of this format by, float32."""
    if dtype == "f16":
        return x_TD.half().float()
    scale_TB, code_TBK = q8_0(x_TD)
    return (code_TBK * scale_TB[..., None]).flatten(1)


def q8_0(x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Scales (T, B) and codes (T, B, 32), both float32.

    Codes are x (127 / max), as the engine's vector code has it: the same codes at 5 million of 5
    million random inputs. x (1 / (max / 127)), as the reference code and so formats.py have it,
    gives another at one of a million, and so does 127 times a reciprocal, as torch divides a number
    by a tensor.
    """
    blocks_TBK = x_TD.reshape(len(x_TD), -1, BLOCK)
    largest_TB1 = blocks_TBK.abs().amax(-1, keepdim=True)
    inverse = torch.full_like(largest_TB1, 127).div(largest_TB1)
    codes_TBK = (blocks_TBK * torch.where(largest_TB1 == 0, 0.0, inverse)).round()
    return (largest_TB1[..., 0] / 127).half().float(), codes_TBK

"""How every kernel here is launched: where it can run, and in which order.

Kernels of one FFN follow each other within microseconds, so on Hopper and later each may start
before the last one has ended (programmatic dependent launch). It waits in `after_previous` before
it reads what that one wrote, and before it writes; its own weights it may read earlier. The first
kernel of an FFN waits before it lets the next one start, so nothing is read too early of what was
written before the FFN. So does `rows` of one token, since `down` does not wait for its end but for
the entries of its list (entries.py), which must be blank by then; what `down` writes waits.
Predictors in codes let the next one start after their products where there are several tokens: with
five kernels waiting behind it the FFN took longer (1B, 4 tokens: 35 us instead of 26). The last one
lets nothing start: what follows in a model waits for its end anyway, and a benchmark of many FFNs
shall not gain what a model would not.

Blocks are tables that were measured, not Triton's autotuner: that one times kernels at their first
call, which a CUDA graph cannot record.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

MAX_TOKENS = 16
INTERPRETED = triton.knobs.runtime.interpret
"""Set by TRITON_INTERPRET=1 in the environment: kernels run in Python, on CPU tensors."""


@triton.jit
def after_previous(PDL: tl.constexpr):
    """Wait until the kernel before this one has ended and its results can be read."""
    if PDL:
        gdc_wait()


@triton.jit
def start_next(PDL: tl.constexpr):
    """Let the kernel after this one start, once all programs of this one have come here."""
    if PDL:
        gdc_launch_dependents()


def padded(tokens: int) -> int:
    """Columns of a product: 1, or what the tensor cores' tiles hold.

    Raises:
        ValueError: Not between 1 and 16 tokens.
    """
    if not 1 <= tokens <= MAX_TOKENS:
        raise ValueError(
            f"x: holds {tokens} tokens, expected 1 to {MAX_TOKENS}; use the dense FFN for more"
        )
    return 1 if tokens == 1 else MAX_TOKENS


def options(x: Tensor) -> dict[str, Any]:
    """Keyword arguments of every launch on this tensor's device.

    Raises:
        ValueError: The kernels cannot run there.
    """
    if x.device.type == "cuda" and not INTERPRETED:
        pdl = _capability(x.device.index)[0] >= 9
        return {"PDL": True, "launch_pdl": True} if pdl else {"PDL": False}
    if x.device.type == "cpu" and INTERPRETED:
        return {"PDL": False}
    raise ValueError(
        f"x: is on {x.device}, expected a CUDA device (or the CPU under TRITON_INTERPRET=1); use "
        "the functions called reference there"
    )


@torch.compiler.assume_constant_result
def rounded_threshold(threshold: float, dtype: torch.dtype) -> float:
    """T as a comparison in this dtype sees it; torch.compile need not look inside."""
    return _rounded(threshold, dtype)


@cache
def _rounded(threshold: float, dtype: torch.dtype) -> float:
    return torch.tensor(threshold, dtype=dtype).item()


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)

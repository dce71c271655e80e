"""Where the kernels can run, and how one starts before the previous one has ended.

The kernels of an FFN follow each other within microseconds. On Hopper and later they use
programmatic dependent launch (PDL): `start_next` lets the next kernel start once all programs of
this one have called it, and `after_previous` waits until the previous kernel has ended and its
writes can be read. A kernel calls `after_previous` before it reads what the previous one wrote and
before it writes anything; it may read weights earlier. So weights must be written before the
selecting kernel launches.

- The first kernel of an FFN waits before it lets the next one start. So no kernel reads the FFN's
  inputs too early.
- `gate_up` of one token does the same. `down` waits for single list entries instead of for its end
  (active_list.py), so the list must be blank by then. `down` waits before it writes.
- Predictors in q8_0 and q4_0 let the next kernel start after their products if there are several
  tokens. With five kernels waiting behind it the FFN was slower (1B, 4 tokens: 35 us instead of
  26).
- The last kernel lets nothing start. In a model the next operation waits for its end anyway, and a
  benchmark of many FFNs must not gain what a model would not.

Block sizes are tables of measured values. Triton's autotuner times kernels at their first call,
which a CUDA graph cannot record.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from sparsecast.kernels.ops.compiler import (
    HAS_TRITON,
    gdc_launch_dependents,
    gdc_wait,
    require_triton,
    tl,
    triton,
)

MAX_TOKENS = 16
INTERPRETED = HAS_TRITON and triton.knobs.runtime.interpret
"""Whether TRITON_INTERPRET=1 is set in the environment: kernels run in Python, on CPU tensors."""


@triton.jit
def after_previous(PDL: tl.constexpr):
    """Wait until the previous kernel has ended and its results can be read."""
    if PDL:
        gdc_wait()


@triton.jit
def start_next(PDL: tl.constexpr):
    """Let the next kernel start once all programs of this one have called this or ended."""
    if PDL:
        gdc_launch_dependents()


def padded_tokens(tokens: int) -> int:
    """Return the columns of a product: 1, or 16, the smallest tile of the tensor cores.

    Raises:
        ValueError: The number of tokens is not 1 to 16.
    """
    if not 1 <= tokens <= MAX_TOKENS:
        raise ValueError(
            f"x: holds {tokens} tokens, expected 1 to {MAX_TOKENS}; use the dense FFN for more"
        )
    return 1 if tokens == 1 else MAX_TOKENS


def launch_options(x: Tensor) -> dict[str, Any]:
    """Return the keyword arguments of every launch on this tensor's device.

    Raises:
        ValueError: The kernels cannot run on this device.
    """
    require_triton()
    if x.device.type == "cuda" and not INTERPRETED:
        pdl = _capability(x.device.index)[0] >= 9
        return {"PDL": True, "launch_pdl": True} if pdl else {"PDL": False}
    if x.device.type == "cpu" and INTERPRETED:
        return {"PDL": False}
    raise ValueError(
        f"x: is on {x.device}, expected a CUDA device (or the CPU under TRITON_INTERPRET=1); use "
        "exact_reference or predicted_reference there"
    )


@torch.compiler.assume_constant_result
def rounded_threshold(threshold: float, dtype: torch.dtype) -> float:
    """Return T rounded to this dtype, as a constant for torch.compile."""
    return _rounded(threshold, dtype)


@cache
def _rounded(threshold: float, dtype: torch.dtype) -> float:
    return torch.tensor(threshold, dtype=dtype).item()


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)

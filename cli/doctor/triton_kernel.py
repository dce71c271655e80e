"""A kernel of one line, which shows whether Triton compiles on this machine."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def copy_one(src, dst):
    tl.store(dst, tl.load(src))

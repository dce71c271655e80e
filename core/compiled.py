"""Fuse chains of small tensor operations into one kernel on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from sparsecast.core.errors import reason_of
from sparsecast.core.messages import log

LARGE = 1 << 24
"""Least number of elements of the first argument for which seconds of compilation pay off."""

P = ParamSpec("P")
R = TypeVar("R")


def compile_when_large(function: Callable[P, R]) -> Callable[P, R]:
    """Compile `function` for a large first argument on a GPU; call it uncompiled otherwise,
    and if compilation fails, for example without a C compiler. Results agree up to rounding.

    Large intermediate results are then never written; memory traffic, not arithmetic, limits them.
    """
    compiled: Any = None
    broken = False

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal broken, compiled
        first = args[0]
        large = isinstance(first, Tensor) and first.is_cuda and first.numel() >= LARGE
        if broken or not large:
            return function(*args, **kwargs)
        if compiled is None:
            compiled = torch.compile(function)
        try:
            result: R = compiled(*args, **kwargs)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            broken = True
            log.warning(
                f"torch.compile failed ({reason_of(error)}); training goes on without it, slower"
            )
            return function(*args, **kwargs)
        return result

    return call

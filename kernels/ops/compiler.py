"""Triton, or a stand-in where it cannot be imported: macOS, Windows, a Linux without it.

With the stand-in the modules of the kernels can be imported, so that their plain torch versions
work, and whoever calls a kernel gets a ValueError.
"""

from __future__ import annotations

from typing import Any

__all__ = ["HAS_TRITON", "gdc_launch_dependents", "gdc_wait", "require_triton", "tl", "triton"]


class _Absent:
    """Stands for Triton: each of its attributes, and what it makes of a kernel, is this again."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *_: object, **__: object) -> Any:
        return self


_absent: Any = _Absent()
try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:
    triton = tl = gdc_launch_dependents = gdc_wait = _absent

HAS_TRITON = triton is not _absent
"""Whether kernels can be compiled, or interpreted."""


def require_triton() -> None:
    """Raise `ValueError` if Triton cannot be imported."""
    if not HAS_TRITON:
        raise ValueError(
            "the kernels need Triton, which cannot be imported here; see `sparsecast doctor`, or "
            "use exact_reference or predicted_reference"
        )

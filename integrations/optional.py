"""Packages that only one integration needs, imported when it runs."""

from __future__ import annotations

import importlib
from types import ModuleType

from sparsecast.core.errors import InputError


def optional(module: str, *, option: str, extra: str) -> ModuleType:
    """Import ``module``, which ``pip install 'sparsecast[<extra>]'`` brings.

    Raises:
        InputError: ``module`` is not installed; names ``option``, which needs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        top = module.partition(".")[0]
        if error.name not in (top, module):  # installed, but something that it imports is not
            raise
        raise InputError(
            f"{option} needs the package {top}, which is not installed; "
            f"run: pip install 'sparsecast[{extra}]'"
        ) from None

"""The files of a bundle and their names."""

from __future__ import annotations

import os
import re
from pathlib import Path

from sparsecast.core.errors import InputError
from sparsecast.core.files import check_file, unreadable_error
from sparsecast.core.folders import check_folder_kind
from sparsecast.core.hub import local_folder
from sparsecast.core.run_record import RUN

SUFFIX = ".powerinfer.gguf"
"""Suffix of the model's file."""
GPUIDX_SUFFIX = ".generated.gpuidx"
"""What a GPU build of PowerInfer appends to the model's file name to find the split."""
BESIDE = (f"*{GPUIDX_SUFFIX}", "predictor", "activation", "README.md", RUN)
"""What a bundle may hold beside its model."""


def file_name(model: str) -> str:
    """Name the GGUF file after a model's folder or Hugging Face id.

    Characters that a shell would have to quote are replaced: PowerInfer passes the path to one.
    """
    folder = Path(model).expanduser()
    name = (folder.resolve() if folder.is_dir() else folder).name
    return (re.sub(r"[^A-Za-z0-9._-]+", "-", name).lstrip(".-") or "model") + SUFFIX


def bundle_file(bundle: Path) -> Path:
    """Find the GGUF file of a bundle's folder; a path to a file is returned as it is.

    A hub id, `owner/name` or `owner/name@revision`, is downloaded unless something here has its
    name.

    Raises:
        InputError: Nothing there or on the hub, or not exactly one such file in the folder.
    """
    want = "a folder that `sparsecast export` wrote"
    bundle = local_folder(bundle, "bundle")
    if not bundle.is_dir():
        check_file(bundle, want)
        return bundle
    try:
        found = sorted(name for name in os.listdir(bundle) if name.endswith(SUFFIX))
    except OSError as error:
        raise unreadable_error(bundle, error, want) from error
    if len(found) != 1:
        check_folder_kind(bundle, "bundle")
        raise InputError(
            f"{bundle}: holds {len(found)} files *{SUFFIX}, expected exactly one; give {want}"
        )
    return bundle / found[0]

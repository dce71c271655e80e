"""torch files that appear whole or not at all, also Lightning's, and disks that have no room.

Lightning stages its checkpoints in the system's temporary folder, which may be smaller than they
are and on another disk. Here they are staged beside their final place.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from safetensors import SafetensorError

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def save_torch(value: Any, path: Path) -> None:
    """`torch.save` in one step; a failed one leaves what was there before."""
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as file:  # by itself, torch hides what the system said
            torch.save(value, file)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


class StagedCheckpoints(TorchCheckpointIO):
    """For `Trainer(plugins=[StagedCheckpoints()])`."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        save_torch(checkpoint, Path(path))


def no_room(error: BaseException) -> str | None:
    """The system's words where a disk, a quota or a limit of files was full; else None.

    torch and safetensors wrap them in errors of their own.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _NO_ROOM:
            return os.strerror(seen.errno)
        code = (
            re.search(r"os error (\d+)", str(seen)) if isinstance(seen, SafetensorError) else None
        )
        if code and int(code[1]) in _NO_ROOM:
            return os.strerror(int(code[1]))
        seen = seen.__cause__ or seen.__context__
    return None


def full_disk(folder: Path, reason: str, nbytes: float, left: str) -> OSError:
    """What to raise where a stage ran out of room.

    Args:
        folder: Where it was writing.
        reason: Of `no_room`.
        nbytes: That the whole run needs there.
        left: What was kept and how to go on.
    """
    return OSError(
        f"{folder}: {reason[0].lower()}{reason[1:]}; the run needs about {size(nbytes)} there, "
        f"{size(free(folder))} are free; {left}"
    )


def free(folder: Path) -> int:
    """Bytes that may still be written where `folder` is, or will be."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    return shutil.disk_usage(there).free


def size(nbytes: float) -> str:
    """Bytes as a person reads them."""
    return f"{nbytes / 2**30:,.1f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:,.1f} MiB"

"""torch files that appear whole or not at all, also Lightning's.

Lightning stages its checkpoints in the system's temporary folder, which may be smaller than they
are and on another disk. Here they are staged beside their final place.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from sparsecast.core.disk import full_disk_errno


def save_torch(value: Any, path: Path) -> None:
    """`torch.save` in one step; a failed one leaves what was there before.

    Raises:
        OSError: The disk is full, in the system's words, which torch hides.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as file:
            torch.save(value, file)
        os.replace(part, path)
    except RuntimeError as error:
        if (code := full_disk_errno(error)) is None:
            raise
        raise OSError(code, os.strerror(code), str(path)) from error
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        part.unlink(missing_ok=True)


class StagedCheckpoints(TorchCheckpointIO):
    """For `Trainer(plugins=[StagedCheckpoints()])`."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        save_torch(checkpoint, Path(path))

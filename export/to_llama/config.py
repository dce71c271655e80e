"""The options of `sparsecast convert`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sparsecast.core.options import validate_fields


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Write a MiniCPM or Granite as a LLaMA, with its scales in the weights, and prove it equal."""

    model: str
    """Hugging Face id or local folder of the model, whatever its activation."""

    to: Literal["llama"]
    """Format to write: llama, which every engine reads."""

    out: Path
    """Folder to write; it appears when complete and proved."""

    def __post_init__(self) -> None:
        validate_fields(self)

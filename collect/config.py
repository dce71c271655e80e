"""What `sparsecast collect` takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sparsecast.collect.errors import InputError


@dataclass(frozen=True, kw_only=True)
class CollectConfig:
    """Record predictor inputs and fired neurons from a ReLU-sparse model over a corpus."""

    model: str
    """Hugging Face id or local folder of a causal LM with relu or fatrelu."""

    corpus: str
    """builtin, a .txt, .md, .jsonl or .parquet file, a folder, a glob, or name[:config][@split]."""

    out: Path
    """Folder to write; it appears when complete."""

    tokens: int = 400_000
    """Tokens to record: 90 % for training, 5 % each for calibration and held-out."""

    seq_len: int = 512
    """Documents are truncated to this many tokens, BOS included."""

    batch_size: int = 8
    """Documents per forward pass."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    dtype: str = "auto"
    """auto (float32 on the CPU, else the checkpoint's), float32, float16 or bfloat16."""

    layers: list[int] | None = None
    """Layers to record; all of them when unset."""

    activation_threshold: float | None = None
    """FATReLU threshold, for a model whose config has lost it."""

    def __post_init__(self) -> None:
        for name, least in (("tokens", 60), ("seq_len", 2), ("batch_size", 1)):
            if (value := getattr(self, name)) < least:
                option = name.replace("_", "-")
                raise InputError(f"--{option}: must be at least {least}, got {value}")

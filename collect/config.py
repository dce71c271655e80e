"""Options of `sparsecast collect`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sparsecast.core.options import DeviceMap, ModelDtype, check_device_map, validate_fields
from sparsecast.core.text.corpus import LongDocuments


@dataclass(frozen=True, kw_only=True)
class CollectConfig:
    """Record predictor inputs and fired neurons from a ReLU-sparse model over a corpus.

    An interrupted run resumes with the same command. `torchrun --nproc-per-node N -m
    sparsecast collect ...` shares the work over N processes.
    """

    model: str
    """Hugging Face id or local folder of a causal LM with relu or fatrelu."""

    corpus: str
    """builtin, a .txt, .md, .jsonl or .parquet file, a folder, a glob, - for standard input, or a
    dataset on the hub, `name[:config][@split]`. Rows have `text`, or a chat under `messages` or
    `conversations`; rows that cannot be used are counted and left out."""

    out: Path
    """Folder to write; it appears when complete."""

    tokens: int = 400_000
    """Tokens to record: 90 % for training, 5 % each for calibration and held-out."""

    count_tokens: int = 0
    """Further training tokens that only the statistics count; nothing of them is stored."""

    seq_len: int = 512
    """Tokens that the model reads at once, BOS included; documents are never packed. Plain text in
    few or long files is cut into documents of 6,000 characters first."""

    long_documents: LongDocuments = "split"
    """split: a document longer than --seq-len becomes consecutive windows, each behind BOS. cut:
    its first window alone. Chats are always cut."""

    batch_size: int = 8
    """Sequences of --seq-len tokens per forward pass; shorter documents are batched in more."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    dtype: ModelDtype = "auto"
    """auto (float32 on the CPU, else the checkpoint's), float32, float16 or bfloat16."""

    device_map: DeviceMap | None = None
    """auto, balanced, balanced_low_0 or sequential: spread a model larger than one device over all
    of them."""

    input_dtype: Literal["auto", "float16", "bfloat16", "float32", "int8"] = "auto"
    """How predictor inputs are stored: auto (bfloat16 for a bfloat16 model, else float16),
    float16, bfloat16, float32, or int8 with a scale per token: half the bytes, but about 0.2 % of
    the decisions that float32 inputs explain can no longer be told from them."""

    energy: bool = False
    """Also store what energy recall needs: one byte per active neuron."""

    layers: list[int] | None = None
    """Layers to record, as 0,2,5; all of them when unset."""

    activation_threshold: float | None = None
    """FATReLU threshold, for a model whose config has lost it."""

    dry_run: bool = False
    """Print what the run would take, disk, memory and time, and write nothing. Measures a batch on
    the first layers; a folder with config.json alone will do, without time."""

    def __post_init__(self) -> None:
        validate_fields(
            self, tokens=60, count_tokens=0, seq_len=2, batch_size=1, activation_threshold=0
        )
        if self.layers is not None:
            object.__setattr__(self, "layers", sorted(set(self.layers)))
        check_device_map(self.device_map, self.device)

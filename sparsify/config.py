"""What `sparsecast sparsify` takes, and the presets that need no model to start from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sparsecast.collect.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A llama to train from scratch. FFN width above 1000, or PowerInfer takes a wrong kernel."""

    hidden_size: int
    ffn_width: int
    layers: int
    heads: int
    kv_heads: int
    vocab_size: int
    tokens: int
    lr: float
    l1: float


PRESETS = {
    "tiny": Preset(
        hidden_size=256,
        ffn_width=1024,
        layers=6,
        heads=8,
        kv_heads=2,
        vocab_size=2048,
        tokens=160_000_000,
        lr=3e-3,
        l1=0.6,
    ),
    "30m": Preset(
        hidden_size=512,
        ffn_width=2048,
        layers=8,
        heads=8,
        kv_heads=4,
        vocab_size=4096,
        tokens=250_000_000,
        lr=1.5e-3,
        l1=0.2,
    ),
}


@dataclass(frozen=True, kw_only=True)
class SparsifyConfig:
    """ProSparse training: ReLU substitution, progressive L1 regularisation, FATReLU shift.

    Starts from a SiLU model (--model), or pre-trains one first (--preset).
    """

    out: Path
    """Folder for the sparse model; it appears when complete, an interrupted run resumes."""

    model: str | None = None
    """A llama or mistral with SiLU, ReLU or FATReLU: Hugging Face id or folder."""

    preset: str | None = None
    """tiny (7M parameters) or 30m: pre-train a SiLU llama first, tokenizer included."""

    corpus: str = "builtin"
    """builtin, a .txt, .md, .jsonl or .parquet file, a folder, a glob, or name[:config][@split]."""

    tokens: int | None = None
    """Tokens to train on in all, pre-training included; unset: the preset's, or 100 million."""

    pretrain_share: float = 0.4
    """Share of the tokens that a preset spends on SiLU pre-training."""

    l1: float | None = None
    """Last lambda of the schedule; the loss adds lambda times the sum over layers of mean |x1|."""

    lr: float | None = None
    """Peak AdamW learning rate; unset: the preset's, or 3e-5 as ProSparse-7B."""

    seq_len: int = 512
    """Tokens per training sequence."""

    batch_tokens: int = 32_768
    """Tokens per optimiser step."""

    shift_tolerance: float = 0.005
    """The FATReLU threshold is the largest that raises calibration perplexity by at most this."""

    baselines: bool = False
    """Also train the SiLU original and plain ReLU on the same tokens, for the model card."""

    eval_tokens: int = 200_000
    """Tokens of the calibration and of the held-out split to measure on."""

    device: str = "auto"
    """auto, cpu or cuda."""

    compile: bool = True
    """torch.compile the training step on a GPU."""

    seed: int = 0
    """Of initialisation and data order."""

    def __post_init__(self) -> None:
        if (self.model is None) == (self.preset is None):
            raise InputError("sparsify: give either --model or --preset")
        if self.preset is not None and self.preset not in PRESETS:
            raise InputError(f"--preset: got {self.preset!r}, expected {' or '.join(PRESETS)}")
        if not 0 <= self.pretrain_share < 1:
            raise InputError(f"--pretrain-share: must be in [0, 1), got {self.pretrain_share}")
        if self.batch_tokens < self.seq_len or self.seq_len < 2:
            raise InputError(
                f"--batch-tokens {self.batch_tokens}: must hold at least one sequence of "
                f"--seq-len {self.seq_len} >= 2 tokens"
            )

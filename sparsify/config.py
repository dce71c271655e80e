"""What `sparsecast sparsify` takes, and the presets that need no model to start from."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from pathlib import Path

from sparsecast.core.errors import InputError
from sparsecast.core.options import check_between, validate_fields


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
    """ProSparse training: ReLU substitution, progressive L1 regularization, FATReLU shift.

    Starts from a SiLU model (--model), or pre-trains one first (--preset).
    """

    out: Path
    """Folder for the sparse model; it appears when complete, an interrupted run resumes."""

    model: str | None = None
    """Hugging Face id or folder, of any family that collect reads; with SiLU, GELU or sparse."""

    preset: str | None = None
    """tiny (7M parameters) or 30m: pre-train a SiLU llama first, tokenizer included."""

    corpus: str = "builtin"
    """builtin, a .txt, .md, .jsonl or .parquet file, a folder, a glob, or a dataset on the hub,
    `name[:config][@split]`."""

    tokens: int | None = None
    """Tokens to train on in all, pre-training included, in whole steps of --batch-tokens; unset:
    the preset's, or 100 million."""

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
    """Of initialization and data order."""

    def __post_init__(self) -> None:
        validate_fields(
            self, tokens=1, seq_len=2, eval_tokens=2, pretrain_share=0, l1=0, shift_tolerance=0
        )
        if (self.model is None) == (self.preset is None):
            raise InputError("sparsify: give either --model or --preset")
        if self.preset is not None and self.preset not in PRESETS:
            raise InputError(f"--preset: got {self.preset!r}, expected {' or '.join(PRESETS)}")
        if not self.pretrain_share < 1:
            raise InputError(f"--pretrain-share: must be below 1, got {self.pretrain_share}")
        check_between(self, 0, inf, "lr")
        if self.batch_tokens < self.seq_len:
            raise InputError(
                f"--batch-tokens: got {self.batch_tokens}, expected at least one sequence of "
                f"--seq-len {self.seq_len} tokens"
            )
        least = 2 if self._pretrains else 1
        if self.steps < least:
            why = "one step" if least == 1 else "two steps, one of them pre-training,"
            raise InputError(
                f"--tokens: got {self.tokens}, expected at least {least * self.step_tokens:,}: "
                f"{why} of --batch-tokens {self.batch_tokens}"
            )

    @property
    def _preset(self) -> Preset | None:
        return None if self.preset is None else PRESETS[self.preset]

    @property
    def _pretrains(self) -> bool:
        return self.preset is not None and self.pretrain_share > 0

    @property
    def batch_size(self) -> int:
        """Sequences per step."""
        return self.batch_tokens // self.seq_len

    @property
    def step_tokens(self) -> int:
        return self.batch_size * self.seq_len

    @property
    def steps(self) -> int:
        """Of the whole run: as many as `tokens` have room for."""
        tokens = self.tokens
        if tokens is None:
            tokens = self._preset.tokens if self._preset else 100_000_000
        return tokens // self.step_tokens

    @property
    def pretrain_steps(self) -> int:
        share = int(self.steps * self.pretrain_share)
        return min(max(1, share), self.steps - 1) if self._pretrains else 0

    @property
    def phases(self) -> int:
        """Stretches of training: pre-training, the baselines, ProSparse."""
        return int(self._pretrains) + (3 if self.baselines else 1)

    @property
    def peak_lr(self) -> float:
        if self.lr is not None:
            return self.lr
        return self._preset.lr if self._preset else 3e-5

    @property
    def last_l1(self) -> float:
        if self.l1 is not None:
            return self.l1
        return self._preset.l1 if self._preset else 0.1

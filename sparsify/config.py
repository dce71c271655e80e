"""The options of `sparsecast sparsify`, and the presets that are trained from scratch."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Literal

from sparsecast.core.errors import InputError
from sparsecast.core.options import check_between, option_of, validate_fields
from sparsecast.core.text.corpus import LongDocuments
from sparsecast.sparsify.training.stages import TABLES


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A llama to train from scratch.

    PowerInfer picks a wrong kernel for FFN widths up to 1000.
    """

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

SFT_SHARE = 6_000 / 95_000
"""Steps of fine-tuning per step of sparse training, MiniCPM-S-1B's."""


TARGET_SPARSITY = 0.85
MOST_SPARSITY = 0.95
"""The target if --max-perplexity-increase alone is given."""


@dataclass(frozen=True, kw_only=True)
class SparsifyConfig:
    """Train a ReLU-sparse model: as sparse as asked, or with ProSparse's own recipe.

    Training starts from a model (--model) or pre-trains a small SiLU llama first (--preset). Say
    how sparse (--target-sparsity) or how much worse (--max-perplexity-increase), or give --l1 for
    ProSparse: ReLU, progressive L1, FATReLU threshold shift.
    """

    out: Path
    """Folder for the sparse model. It appears when complete; an interrupted run resumes."""

    model: str | None = None
    """Hugging Face id or folder of a model with SiLU, GELU or a ReLU, of a family that collect
    supports."""

    preset: str | None = None
    """tiny (7M parameters) or 30m: pre-train a SiLU llama and its tokenizer first."""

    corpus: str = "builtin"
    """Training text: builtin, a .txt, .md, .jsonl or .parquet file, a folder, a glob, or a dataset
    on the hub, `name[:config][@split]`."""

    tokens: int | None = None
    """Tokens to train on, pre-training included, rounded down to whole steps of --batch-tokens.
    Unset: the preset's number, or 100 million."""

    pretrain_share: float = 0.4
    """Share of the tokens for the SiLU pre-training of a preset."""

    target_sparsity: float | None = None
    """Share of zeros in x1, the input of the down projection, that the model ends with, the mean
    over layers: a threshold on the gate rises during training until it is reached. Unset: 0.85, but
    0.95 with --max-perplexity-increase, and nothing with --l1."""

    max_perplexity_increase: float | None = None
    """Sparsity stops rising where calibration perplexity exceeds that of the dense start, of
    --model or of a preset's pre-training, by more than this share."""

    stages: Literal["1b", "7b", "13b"] = "7b"
    """Published stages in which the L1 term's weight rises in ProSparse's recipe, scaled to the
    run: those of ProSparse-7B, ProSparse-13B, or MiniCPM-S-1B, whose learning rate falls in a last
    stage."""

    l1: float | None = None
    """Final weight of the L1 term, the sum over layers of the mean over tokens and neurons of |x1|,
    where x1 is the input of the down projection: ProSparse's recipe instead of a target. With a
    target, the weight that --baselines are trained with. Unset: the preset's, or 0.1."""

    lr: float | None = None
    """Peak AdamW learning rate. Unset: the preset's, or that of --stages: 3e-5, for 13b 5e-5."""

    seq_len: int = 512
    """Tokens per sequence."""

    sft_corpus: str | None = None
    """Chats, as --corpus takes them, for supervised fine-tuning behind the sparse training: the
    loss is on the assistant's answers alone. The model's tokenizer must have a chat template."""

    sft_tokens: int | None = None
    """Tokens of chats to train on, questions included. Unset: 6 % of --tokens, MiniCPM-S-1B's share
    of steps."""

    sft_lr: float | None = None
    """Peak learning rate on chats. Unset: a tenth of --lr."""

    long_documents: LongDocuments = "split"
    """For the texts that scores are measured on: split a document longer than --seq-len into
    windows, or cut it to its first one. Training reads all of a document in either case."""

    batch_tokens: int = 32_768
    """Tokens per optimizer step."""

    micro_batch: int | None = None
    """Sequences per forward pass on each device; a step adds up the gradients of as many passes as
    it takes. Unset: all sequences of a step at once."""

    checkpoint_activations: bool = False
    """Keep the inputs of decoder layers alone for the backward pass and compute the rest again:
    less memory for about a third more computation. Never compiled."""

    shift_tolerance: float = 0.005
    """Relative increase in calibration perplexity that the FATReLU threshold may cause in
    ProSparse's recipe."""

    baselines: bool = False
    """Also train the original activation, plain ReLU, ReLU with a fixed L1 weight, and with a
    target ProSparse's recipe on the same tokens, for the model card."""

    eval_tokens: int = 200_000
    """Tokens per split (calibration and held-out) that scores are measured on, from as many
    documents as eight times as many tokens have."""

    dry_run: bool = False
    """Print parameters, memory per device, disk and time, the latter from a few steps on this
    device. Nothing is trained or written."""

    device: str = "auto"
    """auto, cpu or cuda."""

    compile: bool = True
    """torch.compile the decoder layers on a GPU."""

    seed: int = 0
    """Seed of the initialization and the data order."""

    def __post_init__(self) -> None:
        validate_fields(
            self,
            tokens=1,
            seq_len=2,
            micro_batch=1,
            eval_tokens=2,
            pretrain_share=0,
            l1=0,
            shift_tolerance=0,
            max_perplexity_increase=0,
        )
        if (self.model is None) == (self.preset is None):
            raise InputError("sparsify: give either --model or --preset")
        if self.preset is not None and self.preset not in PRESETS:
            raise InputError(f"--preset: got {self.preset!r}, expected {' or '.join(PRESETS)}")
        self._check_target()
        self._check_sft()
        if not self.pretrain_share < 1:
            raise InputError(f"--pretrain-share: must be below 1, got {self.pretrain_share}")
        check_between(self, 0, inf, "lr", "sft_lr")
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

    def _check_target(self) -> None:
        check_between(self, 0, 1, "target_sparsity")
        given = self.target_sparsity is not None or self.max_perplexity_increase is not None
        if given and self.l1 is not None and not self.baselines:
            raise InputError(
                "--l1: is ProSparse's recipe, and --target-sparsity and --max-perplexity-increase "
                "are another; give one of them, or --baselines true to train both"
            )
        if self.target is not None and not self.baselines:
            self._check_unset(
                "ProSparse's recipe; give --l1 instead of a target, or --baselines true to train "
                "both",
                "stages",
                "shift_tolerance",
            )
        if self.preset is None:
            self._check_unset("--preset, which is not given", "pretrain_share")

    def _check_unset(self, purpose: str, *names: str) -> None:
        """Raise if an option would have no effect."""
        for name in names:
            if getattr(self, name) != getattr(type(self), name):
                raise InputError(f"{option_of(name)}: is for {purpose}")

    def _check_sft(self) -> None:
        if self.sft_corpus is None:
            self._check_unset("--sft-corpus, which is not given", "sft_tokens", "sft_lr")
            return
        if self.preset is not None:
            raise InputError(
                "--sft-corpus: the tokenizer of a --preset has no chat template; give a --model "
                "whose tokenizer has one"
            )
        if self.sft_tokens is not None and self.sft_tokens < self.step_tokens:
            raise InputError(
                f"--sft-tokens: got {self.sft_tokens}, expected at least {self.step_tokens:,}: one "
                f"step of --batch-tokens {self.batch_tokens}"
            )

    @property
    def _preset(self) -> Preset | None:
        return None if self.preset is None else PRESETS[self.preset]

    @property
    def _pretrains(self) -> bool:
        return self.preset is not None and self.pretrain_share > 0

    @property
    def batch_size(self) -> int:
        """Sequences per optimizer step."""
        return self.batch_tokens // self.seq_len

    @property
    def step_tokens(self) -> int:
        return self.batch_size * self.seq_len

    @property
    def steps(self) -> int:
        """Optimizer steps of the run, pre-training included."""
        tokens = self.tokens
        if tokens is None:
            tokens = self._preset.tokens if self._preset else 100_000_000
        return tokens // self.step_tokens

    @property
    def pretrain_steps(self) -> int:
        share = int(self.steps * self.pretrain_share)
        return min(max(1, share), self.steps - 1) if self._pretrains else 0

    @property
    def sft_steps(self) -> int:
        """Optimizer steps of the supervised fine-tuning."""
        if self.sft_corpus is None:
            return 0
        if self.sft_tokens is not None:
            return self.sft_tokens // self.step_tokens
        return max(1, round(SFT_SHARE * self.steps))

    @property
    def peak_lr(self) -> float:
        if self.lr is not None:
            return self.lr
        return self._preset.lr if self._preset else TABLES[self.stages].lr

    @property
    def target(self) -> float | None:
        """Share of zeros to reach; None for ProSparse's recipe."""
        if self.target_sparsity is not None:
            return self.target_sparsity
        if self.max_perplexity_increase is not None:
            return MOST_SPARSITY
        return TARGET_SPARSITY if self.l1 is None else None

    @property
    def peak_sft_lr(self) -> float:
        return self.peak_lr / 10 if self.sft_lr is None else self.sft_lr

    @property
    def last_l1(self) -> float:
        if self.l1 is not None:
            return self.l1
        return self._preset.l1 if self._preset else 0.1

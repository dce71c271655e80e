"""What `sparsecast train`, `report` and `evaluate` take."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sparsecast.core.errors import InputError
from sparsecast.core.options import ModelDtype, check_between, option_of, validate_fields
from sparsecast.core.text.corpus_files import is_stream
from sparsecast.predictors.calibration.objective import DEFAULT_RECALL, Objective
from sparsecast.predictors.training.schedule import Schedule

DEFAULT_TOKENS, DEFAULT_SEQ_LEN = 2_000_000, 512
"""What --corpus is read with."""
DEFAULT_SCHEDULES = {
    "default": (6, 512, 3e-3),
    "reference": (20, 1024, 1e-3),
    "svd": (6, 512, 3e-3),
}
"""(epochs, tokens per batch, peak learning rate) of every recipe."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train one predictor per layer, all layers at once, and calibrate each to an objective.

    Reads recorded activations (--activations), or a running model (--model with --corpus). An
    interrupted run resumes from its last epoch with the same command. `torchrun --nproc-per-node N
    -m sparsecast train ...` shares the layers over N processes.
    """

    out: Path
    """Folder for the predictors; it appears when complete."""

    activations: Path | None = None
    """Folder written by `sparsecast collect`."""

    corpus: str | None = None
    """Instead of --activations: what --model reads while predictors train, as in `sparsecast
    collect`; of the training text nothing is stored."""

    tokens: int | None = None
    """Training tokens of --corpus, in whole batches, read one after the other while the corpus
    lasts, and then again; before that at most 65,536 of them for a start. Unset: 2,000,000."""

    seq_len: int | None = None
    """Documents of --corpus are cut at this many tokens; unset: 512."""

    dtype: ModelDtype = "auto"
    """Of --model with --corpus: auto (float32 on the CPU, else the checkpoint's), float32, float16
    or bfloat16."""

    activation_threshold: float | None = None
    """FATReLU threshold of --model with --corpus, where its config has lost it."""

    recipe: Literal["default", "reference", "svd"] = "default"
    """default: ours. reference: the public recipe behind ProSparse's numbers. svd: training-free,
    the whitened truncated SVD of the gate of --model."""

    model: str | None = None
    """The model that was recorded; for svd, --target-perplexity and --corpus."""

    clip_labels: float | None = None
    """Of the reference recipe: train on the largest activations of a token alone, at most this
    share of the neurons, such as 0.15. Needs --model, and activations with energies."""

    predictor_dtype: Literal["f16", "q8_0", "q4_0"] | None = None
    """f16, q8_0 or q4_0: the format that predictors are trained for and stored in; unset: q4_0, or
    f16 where the hidden size is no multiple of 32 and for the reference recipe."""

    rank: int | None = None
    """Hidden width of each predictor, bias units included; unset: 5/8 of the hidden size in q4_0,
    a quarter in the reference recipe, else 3/8, in multiples of 32."""

    predictor_budget: float | None = None
    """Instead of a rank: bytes of all predictors over those of the FFN in f16; ranks are chosen per
    layer for the least traffic."""

    target_recall: float | None = None
    """Recall each layer is calibrated to; unset: 0.95, if nothing else is asked for."""

    target_sparsity: float | None = None
    """Predicted sparsity each layer is calibrated to."""

    target_perplexity: float | None = None
    """Largest relative increase of the calibration documents' perplexity, such as 0.001: all layers
    get the smallest common recall that keeps it. Needs --model."""

    traffic_budget: float | None = None
    """Mean FFN traffic: the cuts that reach the largest mean recall within it."""

    epochs: int | None = None
    """Passes over recorded training tokens, or parts that --tokens are read in; unset: 6, or at
    most 20 in the reference recipe."""

    batch_size: int | None = None
    """Tokens per optimiser step, the same for all layers; unset: 512, reference 1024."""

    lr: float | None = None
    """Peak AdamW learning rate; unset: 3e-3, reference 1e-3."""

    device: str = "auto"
    """auto, cpu or cuda."""

    seed: int = 0
    """Of initialization and data order."""

    data_parallel: bool = False
    """Under torchrun: every process trains all layers, with a batch of --batch-size each, instead
    of some of the layers."""

    def __post_init__(self) -> None:
        validate_fields(
            self, rank=5, epochs=1, batch_size=32, tokens=1, seq_len=2, activation_threshold=0
        )
        check_between(self, 0, math.inf, "lr")
        self._check_objective()
        if self.clip_labels is not None:
            self._check_clipping(self.clip_labels)
        if self.rank is not None and self.predictor_budget is not None:
            raise InputError("train: give --rank or --predictor-budget, not both")
        if self.schedule.batch_tokens % 32:
            raise InputError(
                f"--batch-size: must be a multiple of 32, the tokens read together, got "
                f"{self.batch_size}"
            )
        self._check_source()
        if self.model is None and (self.recipe == "svd" or self.target_perplexity):
            raise InputError(
                f"train: {'--target-perplexity' if self.target_perplexity else '--recipe'} "
                "needs the model itself; give --model"
            )

    def _check_source(self) -> None:
        if (self.activations is None) == (self.corpus is None):
            raise InputError(
                "train: give --activations, or --model with --corpus to train from the running "
                "model"
            )
        if self.corpus is None:
            online = ("tokens", "seq_len", "activation_threshold")
            given = [n for n in online if getattr(self, n) is not None]
            if self.dtype != "auto":
                given.append("dtype")
            if given:
                option = option_of(given[0])
                raise InputError(
                    f"{option}: belongs to --corpus; recorded activations have their own"
                )
            return
        if self.model is None:
            raise InputError("--corpus: needs the model that reads it; give --model")
        if is_stream(self.corpus):
            raise InputError(
                f"--corpus {self.corpus}: text is read more than once; save it to a file"
            )
        if self.recipe == "svd" or self.predictor_budget is not None:
            what = "--recipe svd" if self.recipe == "svd" else "--predictor-budget"
            raise InputError(
                f"{what}: needs recorded activations; run sparsecast collect, then give "
                "--activations"
            )
        self.steps_per_epoch()

    def _check_clipping(self, share: float) -> None:
        if not 0 < share <= 1:
            raise InputError(f"--clip-labels: must be in (0, 1], got {share}")
        if self.recipe != "reference":
            raise InputError(
                f"--clip-labels: belongs to --recipe reference, not {self.recipe}; leave it out"
            )
        if self.model is None or self.activations is None:
            raise InputError(
                "--clip-labels: needs --activations with energies and the model that was recorded, "
                "for the norms of its down projections; give both"
            )

    def _check_objective(self) -> None:
        names = ("target_recall", "target_sparsity", "target_perplexity", "traffic_budget")
        given = {n: v for n in names if (v := getattr(self, n)) is not None}
        options = [option_of(name) for name in given]
        if len(given) > 1:
            raise InputError(f"train: give {' or '.join(options)}, not both")
        check_between(self, 0, 1, *names, "predictor_budget")
        fixed = [option_of(n) for n in ("predictor_budget",) if getattr(self, n)]
        if self.predictor_dtype not in (None, "f16"):
            fixed.append(f"--predictor-dtype {self.predictor_dtype}")
        if self.recipe == "reference" and fixed:
            raise InputError(
                f"train: the reference recipe has one rank in f16, so {fixed[0]} cannot be "
                "followed; use --rank, or another recipe"
            )
        if self.recipe == "reference" and given:
            raise InputError(
                f"train: the reference recipe has its threshold at 0, so {options[0]} cannot be "
                "met; use another recipe"
            )

    @property
    def schedule(self) -> Schedule:
        """--epochs, --batch-size and --lr, or the recipe's defaults."""
        num_epochs, batch_tokens, peak_lr = DEFAULT_SCHEDULES[self.recipe]
        return Schedule(
            num_epochs=num_epochs if self.epochs is None else self.epochs,
            batch_tokens=batch_tokens if self.batch_size is None else self.batch_size,
            peak_lr=peak_lr if self.lr is None else self.lr,
            seed=self.seed,
        )

    @property
    def objective(self) -> Objective:
        """The --target or budget that was given, or the default recall."""
        return Objective(
            recall=self.target_recall or DEFAULT_RECALL,
            sparsity=self.target_sparsity,
            perplexity=self.target_perplexity,
            traffic=self.traffic_budget,
        )

    def steps_per_epoch(self, processes: int = 1) -> int:
        """Optimizer steps per epoch on a running model.

        Args:
            processes: How many share the batches.

        Raises:
            InputError: --tokens do not fill one batch per epoch and process.
        """
        schedule, tokens = self.schedule, self.tokens or DEFAULT_TOKENS
        least = schedule.num_epochs * schedule.batch_tokens * processes
        if tokens < least:
            raise InputError(
                f"--tokens: must be at least {least:,}, a batch in each of {schedule.num_epochs} "
                f"epochs{f' for {processes} processes' if processes > 1 else ''}, got {tokens:,}"
            )
        return tokens // least


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Score predictors on the held-out documents: report.json, report.md and report.html."""

    predictors: Path
    """Folder written by `sparsecast train`, or a predictor repository of PowerInfer's."""

    activations: Path
    """Folder written by `sparsecast collect` from the same model."""

    out: Path
    """Folder for the report."""

    against: list[Literal["sign"] | Path] | None = None
    """Other predictor folders of the same model, as a b or a,b, scored on the same tokens; sign is
    SparseInfer's rule, without training, at the recall of --predictors on calibration tokens. A
    folder of that name is ./sign."""

    model: str | None = None
    """The model that was recorded; for --against sign."""

    evaluation: Path | None = None
    """JSON written by `sparsecast evaluate --json`, for the change in perplexity."""

    json: Path | None = None
    """Also write report.json to this file."""

    def __post_init__(self) -> None:
        validate_fields(self)
        if self.model is None and "sign" in (self.against or []):
            raise InputError(
                "--against sign: needs the model that was recorded; give --model, or ./sign for a "
                "folder of that name"
            )


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Perplexity on held-out documents: dense, exact, predicted, and as the bundle computes it."""

    model: str
    """Hugging Face id or local folder of the model that the predictors belong to."""

    predictors: Path
    """Folder written by `sparsecast train`, or a predictor repository of PowerInfer's."""

    corpus: str = "builtin"
    """builtin, a .txt, .md, .jsonl or .parquet file, a folder, a glob, or a dataset on the hub,
    `name[:config][@split]`."""

    tokens: int = 20_000
    """Held-out tokens to evaluate on."""

    seq_len: int = 512
    """Documents are truncated to this many tokens, BOS included."""

    batch_size: int = 8
    """Documents per forward pass."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    dtype: ModelDtype = "auto"
    """auto (float32 on the CPU, else the checkpoint's), float32, float16 or bfloat16."""

    activation_threshold: float | None = None
    """FATReLU threshold, for a model whose config has lost it."""

    json: Path | None = None
    """Also write the perplexities to this file."""

    def __post_init__(self) -> None:
        validate_fields(self, tokens=2, seq_len=2, batch_size=1, activation_threshold=0)

"""Options of `sparsecast train`, `report` and `evaluate`."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from sparsecast.core.errors import InputError
from sparsecast.core.options import ModelDtype, check_between, option_of, validate_fields
from sparsecast.core.text.corpus import LongDocuments
from sparsecast.core.text.corpus_files import is_stream
from sparsecast.predictors.calibration.objective import DEFAULT_RECALL, Objective
from sparsecast.predictors.training.schedule import Schedule

DEFAULT_TOKENS, DEFAULT_SEQ_LEN = 2_000_000, 512
"""Defaults for --corpus."""
DEFAULT_LONG_DOCUMENTS: LongDocuments = "split"
DEFAULT_SCHEDULES = {
    "default": (6, 512, 3e-3),
    "reference": (20, 1024, 1e-3),
    "svd": (6, 512, 3e-3),
}
"""(epochs, tokens per batch, peak learning rate) of every recipe."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train one predictor per layer, all layers at once, and calibrate each to an objective.

    In a mixture of experts each expert has a predictor, and one layer is trained after the other.

    Trains on recorded activations (--activations) or on a running model (--model with --corpus). An
    interrupted run resumes from its last epoch when the command is repeated. `torchrun
    --nproc-per-node N -m sparsecast train ...` distributes the layers over N processes.
    """

    out: Path
    """Folder for the predictors; it appears when complete."""

    activations: Path | None = None
    """Folder written by `sparsecast collect`."""

    corpus: str | None = None
    """Instead of --activations: text that --model reads while predictors train, named as in
    `sparsecast collect`. No activations of the training text are stored."""

    tokens: int | None = None
    """Training tokens of --corpus, rounded down to whole batches; a shorter corpus is read again.
    Unset: 2,000,000."""

    seq_len: int | None = None
    """Tokens of --corpus that the model reads at once, BOS included; unset: 512."""

    long_documents: LongDocuments | None = None
    """Documents of --corpus longer than --seq-len: split into windows, or cut to the first one, as
    in `sparsecast collect`; unset: split."""

    dtype: ModelDtype = "auto"
    """Dtype of --model with --corpus: auto (float32 on the CPU, else the checkpoint's), float32,
    float16 or bfloat16."""

    activation_threshold: float | None = None
    """FATReLU threshold of --model with --corpus, if its config has lost it."""

    recipe: Literal["default", "reference", "svd"] = "default"
    """default: warm start and quantization-aware training. reference: the public recipe behind
    ProSparse's predictors. svd: whitened truncated SVD of the gate of --model, without training."""

    model: str | None = None
    """The recorded model, for --recipe svd, --target-perplexity, --clip-labels and --corpus."""

    clip_labels: float | None = None
    """For --recipe reference: count only the largest activations of a token as active, at most this
    share of the neurons, such as 0.15. Needs --model and activations with energies."""

    loss: Literal["count", "value"] | None = None
    """What a miss weighs. count: all the same. value: what the neuron adds to the residual stream,
    |x1| times the norm of its down column; needs --activations with energies, or --corpus. Unset:
    value where it can be, for --recipe default."""

    predictor_dtype: Literal["f16", "q8_0", "q4_0"] | None = None
    """Format that predictors are trained for and stored in: f16, q8_0 or q4_0. Unset: q4_0; f16 if
    the hidden size is not a multiple of 32, and for --recipe reference."""

    rank: int | None = None
    """Hidden width of each predictor, bias units included. Unset, in multiples of 32: 5/8 of the
    hidden size in q4_0, 3/8 in other formats, 1/4 for --recipe reference."""

    predictor_budget: float | None = None
    """Instead of --rank: bytes of all predictors relative to the FFN in f16. Each layer's rank is
    chosen for the least total traffic."""

    target_recall: float | None = None
    """Recall of each layer. Unset: 0.95, unless another objective is given."""

    target_sparsity: float | None = None
    """Predicted sparsity of each layer."""

    target_perplexity: float | None = None
    """Largest relative increase of perplexity on the calibration documents, such as 0.001; all
    layers get the smallest recall that meets it. Needs --model."""

    traffic_budget: float | None = None
    """Mean FFN traffic over layers; thresholds are chosen for the largest mean recall within it."""

    epochs: int | None = None
    """Passes over the recorded training tokens; with --corpus, parts that --tokens are split into.
    Unset: 6; at most 20 for --recipe reference."""

    batch_size: int | None = None
    """Tokens per optimizer step, the same for all layers. Unset: 512, or 1024 for --recipe
    reference."""

    lr: float | None = None
    """Peak AdamW learning rate. Unset: 3e-3; 1e-3 for --recipe reference."""

    device: str = "auto"
    """auto, cpu or cuda."""

    seed: int = 0
    """Seed of initialization and data order."""

    data_parallel: bool = False
    """Under torchrun, distribute batches instead of layers: every process trains all layers on its
    own batches of --batch-size."""

    dry_run: bool = False
    """Print what the run would take, disk, memory and time, and write nothing. Measures
    steps on a few layers; without time for --recipe svd."""

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
                "--batch-size: must be a multiple of 32, because tokens are read in blocks of 32; "
                f"got {self.batch_size}"
            )
        self._check_source()
        if self.loss == "value" and self.recipe != "default":
            raise InputError(
                f"--loss value: belongs to --recipe default, not {self.recipe}; leave it out"
            )
        if self.model is None and (self.recipe == "svd" or self.target_perplexity):
            raise InputError(
                f"train: {'--target-perplexity' if self.target_perplexity else '--recipe'} "
                "needs the recorded model; give --model"
            )

    def _check_source(self) -> None:
        if (self.activations is None) == (self.corpus is None):
            raise InputError(
                "train: give --activations, or --model with --corpus to train on the running model"
            )
        if self.corpus is None:
            online = ("tokens", "seq_len", "long_documents", "activation_threshold")
            given = [n for n in online if getattr(self, n) is not None]
            if self.dtype != "auto":
                given.append("dtype")
            if given:
                option = option_of(given[0])
                raise InputError(
                    f"{option}: belongs to --corpus; leave it out, because recorded activations "
                    "have their own"
                )
            return
        if self.model is None:
            raise InputError("--corpus: needs the model that reads the text; give --model")
        if is_stream(self.corpus):
            raise InputError(
                f"--corpus {self.corpus}: cannot be a stream, because it is read more than once; "
                "save it to a file"
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
                "--clip-labels: needs --activations with energies and the recorded model, for the "
                "norms of its down projections; give both"
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
                f"train: --recipe reference trains one rank in f16, so {fixed[0]} cannot be "
                "followed; give --rank, or choose another recipe"
            )
        if self.recipe == "reference" and given:
            raise InputError(
                f"train: --recipe reference keeps its threshold at 0, so {options[0]} cannot be "
                "met; choose another recipe"
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
    """Score predictors on held-out documents; write report.json, report.md and report.html."""

    predictors: Path
    """Folder written by `sparsecast train`, one of PowerInfer's predictor repositories, or the id
    of either on the Hub, `owner/name[@revision]`."""

    activations: Path
    """Folder written by `sparsecast collect` from the same model."""

    out: Path
    """Folder for the report."""

    against: list[Literal["sign"] | Path] | None = None
    """Other predictor folders to score on the same tokens, as a b or a,b. sign is SparseInfer's
    rule, which needs no training, at the recall of --predictors on the calibration split; write
    ./sign for a folder of that name."""

    model: str | None = None
    """The recorded model; needed by --against sign."""

    evaluation: Path | None = None
    """JSON written by `sparsecast evaluate --json`; adds the change in perplexity."""

    json: Path | None = None
    """Also write report.json to this file."""

    def __post_init__(self) -> None:
        validate_fields(self)
        if self.model is None and "sign" in (self.against or []):
            raise InputError(
                "--against sign: needs the recorded model; give --model, or write ./sign for a "
                "folder of that name"
            )


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Measure perplexity, or lm-eval's tasks: dense, exact, predicted and bundle.

    dense is the model as it is; exact computes only what the gate lets through; predicted applies
    the predictors' masks; bundle computes as PowerInfer does.
    """

    model: str
    """Hugging Face id or local folder of the predictors' model."""

    predictors: Path
    """Folder written by `sparsecast train`, one of PowerInfer's predictor repositories, or the id
    of either on the Hub, `owner/name[@revision]`."""

    corpus: str | None = None
    """Text whose held-out documents give perplexities: builtin, a .txt, .md, .jsonl or .parquet
    file, a folder, a glob, or a dataset on the hub, `name[:config][@split]`. Unset: builtin, or no
    perplexities if --tasks is given."""

    tasks: list[str] | None = None
    """Tasks, groups, tags or globs of lm-eval, or .yaml files of tasks, as a b or a,b. Needs the
    extra lm-eval."""

    include_path: Path | None = None
    """Folder of .yaml files with tasks of your own, for --tasks."""

    num_fewshot: int | None = None
    """Examples before each question of --tasks; unset: what each task says, or none."""

    limit: float | None = None
    """Documents of each task, the first ones; below 1, their share. For trying out."""

    chat_template: bool = False
    """Put the prompts of --tasks through the tokenizer's chat template, examples as turns."""

    tokens: int = 20_000
    """Held-out tokens to evaluate on."""

    seq_len: int = 512
    """Tokens that the model reads at once, BOS included."""

    long_documents: LongDocuments = DEFAULT_LONG_DOCUMENTS
    """split: a document longer than --seq-len becomes consecutive windows, each behind BOS. cut:
    its first window alone. Chats are always cut."""

    batch_size: int = 8
    """Sequences of --seq-len tokens per forward pass; for --tasks, requests."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    dtype: ModelDtype = "auto"
    """auto (float32 on the CPU, else the checkpoint's), float32, float16 or bfloat16."""

    activation_threshold: float | None = None
    """FATReLU threshold, if the model's config has lost it."""

    json: Path | None = None
    """Also write the numbers to this file."""

    dry_run: bool = False
    """Print what the run would take, disk, memory and time, and write nothing. Measures a
    batch on the first two layers; without the time of --tasks."""

    def __post_init__(self) -> None:
        validate_fields(self, tokens=2, seq_len=2, batch_size=1, activation_threshold=0)
        check_between(self, 0, math.inf, "limit")
        if self.tasks is None:
            if self.corpus is None:
                object.__setattr__(self, "corpus", "builtin")
            self._check_unused("tasks", "include_path", "num_fewshot", "limit", "chat_template")
        elif self.corpus is None:
            self._check_unused("corpus", "tokens", "seq_len", "long_documents")

    def _check_unused(self, needed: str, *names: str) -> None:
        """Refuse options that would have no effect without another one."""
        defaults = {field.name: field.default for field in fields(self)}
        if given := [name for name in names if getattr(self, name) != defaults[name]]:
            raise InputError(
                f"{option_of(given[0])}: belongs to {option_of(needed)}; give that too, or leave "
                "this out"
            )

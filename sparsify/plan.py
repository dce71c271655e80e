"""The plan of one sparsify run: every option resolved, the source model opened and checked."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from sparsecast.core.errors import InputError
from sparsecast.core.models.bitnet import rounds_online
from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.core.models.families import activation_rule, family_of, refuse_experts
from sparsecast.core.models.loading import check_seq_len, open_model, pick_device
from sparsecast.core.models.pretrained import empty_model
from sparsecast.core.run_record import Run, begin_run
from sparsecast.core.text.corpus import LongDocuments
from sparsecast.core.text.corpus_files import SUFFIXES, is_stream
from sparsecast.sparsify.config import PRESETS, Preset, SparsifyConfig
from sparsecast.sparsify.training.stages import TABLES, StageTable
from sparsecast.sparsify.training.team import Team

SPARSE = ("relu", "fatrelu", "drelu")


@dataclass(frozen=True, kw_only=True)
class SparsifyPlan:
    """What to train, from which model or preset, on which text, and where to write it."""

    out: Path
    checkpoint: Checkpoint | None
    """The model to start from; None for a preset."""
    tokenizer: Tokenizer | None
    """The tokenizer of `checkpoint`; a preset trains its own."""
    preset: Preset | None
    corpus: str
    sft_corpus: str | None
    """Chats for supervised fine-tuning; None: there is none."""
    eval_tokens: int
    """Tokens per split that perplexity and sparsity are measured on."""
    seq_len: int
    long_documents: LongDocuments
    """How `eval_tokens` are read."""
    batch_size: int
    """Sequences per optimizer step."""
    micro_batch: int | None
    """Sequences per forward pass on each device; None for all of a step."""
    checkpoint_activations: bool
    steps: int
    """Optimizer steps of the run, pre-training included."""
    pretrain_steps: int
    sft_steps: int
    """Optimizer steps on `sft_corpus`, behind `steps`."""
    lr: float
    """Peak learning rate."""
    sft_lr: float
    stages: StageTable
    target: float | None
    """Share of zeros in x1 to reach; None for ProSparse's recipe."""
    max_increase: float | None
    """Of calibration perplexity, relative to the dense start; None: no bound."""
    l1: float
    """Final weight of the L1 term, in ProSparse's recipe and the baselines."""
    shift_tolerance: float
    baselines: bool
    compile: bool
    device: torch.device
    dtype: torch.dtype
    """Of the weights as they are saved and scored."""
    seed: int
    team: Team
    """The processes that train."""
    options: dict[str, Any] = field(repr=False)
    """What a resumed run must have in common with its first start, free of local paths."""
    run: Run
    """What run.json says of the run."""

    @property
    def tokens(self) -> int:
        """Tokens to train on, without fine-tuning."""
        return self.steps * self.batch_size * self.seq_len

    @property
    def sft_tokens(self) -> int:
        """Tokens of the fine-tuning."""
        return self.sft_steps * self.batch_size * self.seq_len

    @property
    def phases(self) -> int:
        """Number of training phases: pre-training, the baselines, the recipe, fine-tuning."""
        others = int(self.pretrain_steps > 0) + int(self.sft_steps > 0)
        return others + 1 + self.baselines * (3 if self.target is None else 4)


def _check_shares(cfg: SparsifyConfig, team: Team) -> None:
    if cfg.batch_size % team.context.size:
        raise InputError(
            f"--batch-tokens: a step has {cfg.batch_size} sequences of --seq-len {cfg.seq_len} "
            f"tokens, which {team.context.size} processes cannot share equally; choose a multiple "
            "of their number"
        )


def _check_corpora(cfg: SparsifyConfig) -> None:
    for option, corpus in (("--corpus", cfg.corpus), ("--sft-corpus", cfg.sft_corpus)):
        if corpus is not None and is_stream(corpus):
            raise InputError(
                f"{option} {corpus}: sparsify reads its corpus more than once, expected one that "
                "can be; save it to a file"
            )


def make_plan(cfg: SparsifyConfig, team: Team | None = None) -> SparsifyPlan:
    """Resolve the options and run every check that needs no corpus.

    Args:
        team: The processes that train; this one alone if unset.

    Raises:
        InputError: A corpus that can be read only once, a model that cannot be used, or a step that
            does not divide among the processes.
    """
    team = team or Team()
    device = pick_device(team.context.device(cfg.device))
    _check_shares(cfg, team)
    _check_corpora(cfg)
    checkpoint, tokenizer = None, None
    if cfg.model is not None:
        checkpoint, tokenizer = _open(cfg.model, cfg.seq_len, cfg.target)
    if cfg.sft_corpus is not None and not getattr(tokenizer, "chat_template", None):
        raise InputError(
            f"{cfg.model}: its tokenizer has no chat template, which --sft-corpus needs; add the "
            "model's chat_template.jinja"
        )
    return SparsifyPlan(
        out=Path(os.path.realpath(cfg.out)),
        checkpoint=checkpoint,
        tokenizer=tokenizer,
        preset=None if cfg.preset is None else PRESETS[cfg.preset],
        corpus=cfg.corpus,
        sft_corpus=cfg.sft_corpus,
        eval_tokens=cfg.eval_tokens,
        seq_len=cfg.seq_len,
        long_documents=cfg.long_documents,
        batch_size=cfg.batch_size,
        micro_batch=cfg.micro_batch,
        checkpoint_activations=cfg.checkpoint_activations,
        steps=cfg.steps,
        pretrain_steps=cfg.pretrain_steps,
        sft_steps=cfg.sft_steps,
        lr=cfg.peak_lr,
        sft_lr=cfg.peak_sft_lr,
        stages=TABLES[cfg.stages],
        target=cfg.target,
        max_increase=cfg.max_perplexity_increase,
        l1=cfg.last_l1,
        shift_tolerance=cfg.shift_tolerance,
        baselines=cfg.baselines,
        compile=cfg.compile and device.type == "cuda" and not cfg.checkpoint_activations,
        device=device,
        dtype=torch.float16 if checkpoint is None else saved_dtype(checkpoint),
        seed=cfg.seed,
        team=team,
        options=_shared_options(cfg, checkpoint),
        run=begin_run("sparsify", cfg, checkpoint=checkpoint, device=device, **_settled(cfg)),
    )


def _settled(cfg: SparsifyConfig) -> dict[str, Any]:
    """Return what options that may be unset have become."""
    return {
        "tokens": cfg.steps * cfg.step_tokens,
        "target_sparsity": cfg.target,
        "l1": cfg.last_l1,
        "lr": cfg.peak_lr,
        "sft_tokens": cfg.sft_steps * cfg.step_tokens,
        "sft_lr": cfg.peak_sft_lr,
    }


def _open(model: str, seq_len: int, target: float | None) -> tuple[Checkpoint, Tokenizer]:
    checkpoint, tokenizer = open_model(model)
    refuse_experts(
        checkpoint.config, model, "ProSparse training is for dense FFNs alone; give a dense model"
    )
    check_seq_len(seq_len, empty_model(checkpoint.config), model)
    family, name = family_of(checkpoint.config, model), activation_name(checkpoint.config)
    if name == "relu2":
        raise InputError(
            f"{model}: {family.act_key} is 'relu2', which is sparse already, and sparsify would "
            "put ReLU in its place; use the model as it is (collect, train, report, evaluate)"
        )
    if rounds_online(checkpoint.config):
        raise InputError(
            f"{model}: its weights are rounded in every forward pass (quantization_config), which "
            "sparsify does not train; give a model without it"
        )
    if name in SPARSE:
        activation_rule(checkpoint.config, model)
    if name == "drelu" and target is not None:
        raise InputError(
            f"{model}: its dReLU has no threshold that could reach a sparsity of {target:g}; give "
            "--l1, for ProSparse's recipe"
        )
    return checkpoint, tokenizer


def saved_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """Return float16 or bfloat16 for a model that transformers loads in it, else float32.

    The config's dtype counts, and that of the FFN's weights where the config has none.
    """
    dtype = checkpoint.config.dtype
    if dtype is None:
        family = family_of(checkpoint.config, checkpoint.source)
        dtype = checkpoint.tensor(f"{family.layers}.0.{family.up}.weight").dtype
    return dtype if dtype in (torch.float16, torch.bfloat16) else torch.float32


def activation_name(config: PreTrainedConfig) -> Any:
    """Return the activation that a model's config names."""
    return getattr(config, family_of(config, "model").act_key, None)


def _shared_options(cfg: SparsifyConfig, checkpoint: Checkpoint | None) -> dict[str, Any]:
    resolved = ("out", "model", "tokens", "sft_tokens", "target_sparsity", "l1", "lr")
    free_to_change = ("device", "compile", "micro_batch", "checkpoint_activations", "dry_run")
    left_out = {*resolved, *free_to_change}
    options = {name: v for name, v in asdict(cfg).items() if name not in left_out}
    return options | {
        "corpus": _distinct_name(cfg.corpus),
        "sft_corpus": None if cfg.sft_corpus is None else _distinct_name(cfg.sft_corpus),
        "fingerprint": checkpoint.fingerprint if checkpoint else None,
        "steps": cfg.steps,
        "target_sparsity": cfg.target,
        "l1": cfg.last_l1,
        "lr": cfg.peak_lr,
        "sft_steps": cfg.sft_steps or None,
        "sft_lr": cfg.peak_sft_lr if cfg.sft_steps else None,
    }


def _distinct_name(corpus: str) -> str:
    path = str(Path(corpus).expanduser().absolute())
    digest = blake2b(path.encode(errors="surrogateescape"), digest_size=4).hexdigest()
    return publishable_name(corpus, f"#{digest}")


def publishable_name(corpus: str, suffix: str = "") -> str:
    """Return a corpus's or model's name without local folders: the last part of a path, plus
    `suffix`."""
    path = Path(corpus).expanduser()
    local = corpus.startswith(("/", ".", "~")) or path.suffix.lower() in SUFFIXES or path.exists()
    return f"{path.name}{suffix}" if local or set("*?[") & set(corpus) else corpus

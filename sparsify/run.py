"""The sparsify stage: pre-train a preset or load a model, then train it with ProSparse.

    pre-train (SiLU) -> substitute ReLU -> progressive L1 -> fine-tune on chats
    -> choose the FATReLU threshold

With baselines, the SiLU original, plain ReLU and ReLU with a fixed L1 weight continue from the same
weights, over the same batches, at the same learning rates, so that only the activation and the L1
term differ.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import Any

import lightning as L
import torch

from sparsecast.core.errors import InputError
from sparsecast.core.files import check_new_folder, new_folder, write_json
from sparsecast.core.lock import clear_lock, lock_folder
from sparsecast.core.messages import log
from sparsecast.core.models.activations import ActivationRule
from sparsecast.core.models.loading import max_positions, set_activation
from sparsecast.sparsify.card import write_card
from sparsecast.sparsify.chats import answer_perplexity
from sparsecast.sparsify.choose_threshold import Tried, choose_activation
from sparsecast.sparsify.config import SparsifyConfig
from sparsecast.sparsify.dry_run import show_forecast
from sparsecast.sparsify.figure import FIGURE, write_figure
from sparsecast.sparsify.fine_tuning import fine_tune
from sparsecast.sparsify.measure import Score, score
from sparsecast.sparsify.phases import AFTER, train_all
from sparsecast.sparsify.plan import SparsifyPlan, make_plan, publishable_name
from sparsecast.sparsify.prepare import TrainingSetup, check_fits, prepare
from sparsecast.sparsify.samples import Sample, choose_prompts, continue_prompts
from sparsecast.sparsify.save import check_saved, write_model
from sparsecast.sparsify.training.curve_table import CURVES, copy_curves, read_tables
from sparsecast.sparsify.training.fit import follow
from sparsecast.sparsify.training.team import team
from sparsecast.sparsify.work_folder import (
    FACTS,
    WorkFolder,
    is_finished,
    work_folder,
    work_path,
)


def sparsify(cfg: SparsifyConfig) -> Path:
    """Train a sparse model, save it under `cfg.out`, and return that folder.

    With `cfg.dry_run` it prints what the run will take, and writes nothing.

    An interrupted run resumes from `.<out>.work` beside `cfg.out`. A finished model with the same
    options is kept. Before the folder gets its name, the saved model is loaded and compared with
    the measured one.

    Started by torchrun, its processes share weights, gradients, moments and the sequences of every
    step equally; process 0 alone measures and saves.

    Memory per device of N: 16 / N bytes per parameter (float32 weights, gradients, two AdamW
    moments), the gathered weights of a decoder layer and of embedding and head, the activations of
    `micro_batch` sequences, and about 1 GB of logits. A 7B takes 112 / N GB before activations.
    When it measures, process 0 holds the whole model in float32, 28 GB for a 7B; when it writes a
    checkpoint, 16 bytes per parameter in main memory. The tokens of the corpus stay on disk.

    Raises:
        InputError: The model or corpus does not exist, or the family is not supported; `cfg.out`
            holds a model or an unfinished run with other options, or another run writes to it; the
            number of processes does not divide the sequences of a step; the disk is too small; or
            training diverges.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    with team() as joined:
        if joined.context.leads:
            plan = make_plan(cfg, joined)
            if cfg.dry_run:
                show_forecast(plan)
                check_fits(plan, work_path(plan.out))
                return plan.out
            return _lead(plan)
        follow(joined, cfg.device)
        return Path(os.path.realpath(cfg.out))


def _lead(plan: SparsifyPlan) -> Path:
    """Run the stage; other processes take part in the training alone."""
    out = plan.out
    if is_finished(out, plan.options):
        shutil.rmtree(work_path(out), ignore_errors=True)
        clear_lock(out)
        return out
    check_new_folder(out)
    check_fits(plan, work_path(out))
    with lock_folder(out, "sparsify run"):
        if not is_finished(out, plan.options):
            with work_folder(out, plan.options) as work:
                _run(plan, work)
            log.info((out / "README.md").read_text(encoding="utf-8"))
    return out


def _run(plan: SparsifyPlan, work: WorkFolder) -> None:
    L.seed_everything(plan.seed, verbose=False)
    torch.set_float32_matmul_precision("high")
    setup = prepare(plan, work)
    before: list[Sample] = []

    def keep_original(name: str) -> None:
        if name.endswith(" original"):
            before.extend(_samples(plan, setup))

    trained = train_all(plan, setup, work, keep_original)
    scores = trained.scores
    fine_tuning = fine_tune(plan, setup, work, scores)
    rule, tried = choose_activation(plan, setup, trained)
    _round_weights(setup.model, plan.dtype)  # score the weights that are saved
    set_activation(setup.model, rule)
    after = AFTER if tried and plan.target is None else "as saved"
    final = scores[after] = score(setup.model, setup.held_out)
    if not isfinite(final.perplexity):
        dtype = str(plan.dtype).removeprefix("torch.")
        raise InputError(
            f"{plan.out}: rounded to {dtype} the model's perplexity is {final.perplexity}; its "
            f"weights are beyond the range of {dtype}, start from another model"
        )
    if setup.chats is not None and fine_tuning is not None:
        fine_tuning["answer_perplexity"]["saved"] = answer_perplexity(
            setup.model, setup.chats.held_out_N2S
        )
    facts = _facts(plan, setup, rule, scores, tried)
    facts |= {"perplexity_bound": trained.bound, "fine_tuning": fine_tuning}
    _save(plan, setup, rule, scores, facts, work, before)


def _round_weights(model: Any, dtype: torch.dtype) -> None:
    """Round the weights in place; buffers that no file stores, such as rope's, stay as they are."""
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.copy_(value.to(dtype))


def _save(
    plan: SparsifyPlan,
    setup: TrainingSetup,
    rule: ActivationRule,
    scores: Mapping[str, Score],
    facts: Mapping[str, Any],
    work: WorkFolder,
    before: Sequence[Sample],
) -> None:
    """Write the model folder: weights, tokenizer, facts, curves and card.

    Args:
        before: What the original made of the same prompts; empty without baselines.
    """
    samples = _samples(plan, setup)
    batch, texts = setup.held_out[0], setup.sample_texts
    expected = score(setup.model, [batch])
    with new_folder(plan.out) as folder:
        write_model(setup.model, plan.dtype, rule, setup.kept, folder)
        setup.model.to("meta")  # frees its memory for the loaded copy
        check_saved(folder, setup.tokenizer, batch, expected, texts, plan.device)
        write_json(folder / FACTS, facts)
        if tables := read_tables(work.path / CURVES):  # else trained by an earlier version
            copy_curves(work.path / CURVES, folder / CURVES)
            write_figure(folder / CURVES / FIGURE, tables, scores)
        write_card(folder, plan.out.name, scores, samples, before)
        plan.run.write(folder)


def _samples(plan: SparsifyPlan, setup: TrainingSetup) -> list[Sample]:
    limit = int(min(max_positions(setup.model), plan.seq_len))
    prompts = choose_prompts(setup.openings, setup.tokenizer, limit // 2)
    return continue_prompts(setup.model, setup.tokenizer, prompts, limit, plan.seed)


def _facts(
    plan: SparsifyPlan,
    setup: TrainingSetup,
    rule: ActivationRule,
    scores: Mapping[str, Score],
    tried: Tried,
) -> dict[str, Any]:
    prosparse = plan.target is None or plan.baselines
    return {
        "model": None if plan.checkpoint is None else publishable_name(plan.checkpoint.source),
        "parameters": sum(p.numel() for p in setup.model.parameters()),
        "model_type": setup.model.config.model_type,
        "tokens": plan.tokens,
        "corpus": publishable_name(plan.corpus),
        "corpus_tokens": setup.corpus_tokens,
        "target_sparsity": plan.target,
        "max_perplexity_increase": plan.max_increase,
        "l1": plan.l1 if prosparse else None,
        "lr": plan.lr,
        "activation": rule.name,
        "threshold": rule.threshold,
        "shift_tolerance": plan.shift_tolerance if prosparse else None,
        "held_out": {name: asdict(value) for name, value in scores.items()},
        "calibration_sweep": [
            {"threshold": t, "perplexity": s.perplexity, "sparsity": s.sparsity} for t, s in tried
        ],
        "options": plan.options,
    }

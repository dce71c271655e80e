"""The stage: SiLU pre-training where there is no model yet, then ProSparse.

    pre-train (SiLU) -> substitute ReLU -> progressive L1 -> choose the FATReLU threshold

With baselines, the SiLU original and plain ReLU go on from the same pre-trained weights over the
same batches at the same learning rates, so that only the activation and the L1 term differ.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from math import isfinite
from pathlib import Path
from typing import Any

import lightning as L
import torch
from transformers import GenerationConfig

from sparsecast.core.distributed import int_from_environment
from sparsecast.core.errors import InputError
from sparsecast.core.files import check_new_folder, new_folder, write_json
from sparsecast.core.lock import lock_folder
from sparsecast.core.messages import log
from sparsecast.core.models.activations import ActivationRule
from sparsecast.core.models.loading import max_positions, set_activation
from sparsecast.sparsify.card import Sample, write_card
from sparsecast.sparsify.config import SparsifyConfig
from sparsecast.sparsify.measure import Score, score, sweep
from sparsecast.sparsify.phases import train_all
from sparsecast.sparsify.save import check_saved, write_model
from sparsecast.sparsify.start import Opened, Start, open_source, prepare
from sparsecast.sparsify.work_folder import (
    FACTS,
    Work,
    is_finished,
    options_of,
    publishable_name,
    unfinished_folder,
    work_folder,
)

PROMPTS = 3
PROMPT_TOKENS = 12
SAMPLE_TOKENS = 120


def sparsify(cfg: SparsifyConfig) -> Path:
    """Train and save a FATReLU model under `cfg.out`; returns that folder.

    An interrupted run goes on where it stopped, from `.<out>.work` beside `cfg.out`; a finished
    one of the same options is kept. What was saved is loaded again and compared with what was
    measured before it gets its name.

    Memory: the model in float32 with its gradients and two AdamW moments (16 bytes a parameter),
    the activations of one step, and 4 bytes per token of the corpus, on one device.

    Raises:
        InputError: No such model or corpus, a family without a row in the table, a model or an
            unfinished run under `cfg.out` that has other options, another run that is writing
            there, no room on the disk, or training that diverges.
    """
    if (size := int_from_environment("WORLD_SIZE", 1, least=1)) > 1:
        raise InputError(
            f"sparsify runs in one process, but torchrun has started {size}; start it without"
        )
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    cfg = replace(cfg, out=Path(os.path.realpath(cfg.out)))
    opened = open_source(cfg)
    options = options_of(cfg, opened and opened[0])
    if is_finished(cfg.out, options):
        shutil.rmtree(unfinished_folder(cfg.out), ignore_errors=True)
        return cfg.out
    check_new_folder(cfg.out)
    with lock_folder(cfg.out, "sparsify run"):
        if not is_finished(cfg.out, options):
            with work_folder(cfg.out, options) as work:
                _run(cfg, opened, options, work)
            log.info((cfg.out / "README.md").read_text(encoding="utf-8"))
    return cfg.out


def _run(cfg: SparsifyConfig, opened: Opened | None, options: dict[str, Any], work: Work) -> None:
    L.seed_everything(cfg.seed, verbose=False)
    torch.set_float32_matmul_precision("high")
    start = prepare(cfg, opened, work)
    scores = train_all(cfg, start, work)
    rule, tried = _shift(cfg, start)
    _round(start.model)  # so that what is scored is what is saved
    set_activation(start.model, rule)
    after = "ProSparse after the shift" if tried else "ProSparse as saved"
    final = scores[after] = score(start.model, start.held_out)
    if not isfinite(final.perplexity):
        raise InputError(
            f"{cfg.out}: rounded to float16 the model's perplexity is {final.perplexity}; its "
            "weights are beyond the range of float16, start from another model"
        )
    facts = _facts(cfg, start, scores, rule, tried) | {"options": options}
    samples = _samples(cfg, start)
    batch, texts = start.held_out[0], start.texts
    expected = score(start.model, [batch])
    with new_folder(cfg.out) as folder:
        write_model(start.model, rule, start.kept, folder)
        start.model.to("meta")  # makes room for what is loaded now
        check_saved(folder, start.tokenizer, batch, expected, texts, cfg.device)
        write_json(folder / FACTS, facts)
        write_card(folder, cfg.out.name, scores, samples)


def _shift(cfg: SparsifyConfig, start: Start) -> tuple[ActivationRule, list[tuple[float, Score]]]:
    """The activation to save, and what was tried; dReLU has no threshold to shift."""
    if start.rule.on_up:
        return start.rule, []
    threshold, tried = sweep(start.model, start.calibration, cfg.shift_tolerance)
    rounded = float(f"{threshold:.3g}")
    return (ActivationRule("fatrelu", rounded) if rounded else start.rule), tried


def _round(model: Any) -> None:
    """To the numbers of float16, without the buffers that no file holds (rope's frequencies)."""
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.copy_(value.half())


def _samples(cfg: SparsifyConfig, start: Start) -> list[Sample]:
    """How the model goes on from the first tokens of held-out documents."""
    batch = start.held_out[0]
    samples = []
    for ids_S, keep_S in zip(batch.ids_BS[:PROMPTS], batch.keep_BS[:PROMPTS], strict=True):
        prompt = ids_S[keep_S][:PROMPT_TOKENS]
        room = min(SAMPLE_TOKENS, int(min(max_positions(start.model), cfg.seq_len)) - len(prompt))
        if room > 0:
            samples.append(_sample(cfg, start, prompt[None], room))
    return samples


def _sample(cfg: SparsifyConfig, start: Start, prompt_BS: torch.Tensor, tokens: int) -> Sample:
    torch.manual_seed(cfg.seed)
    config = start.model.config
    generation: Any = GenerationConfig
    how = generation(
        max_new_tokens=tokens,
        do_sample=True,
        temperature=0.7,
        top_k=40,
        top_p=1.0,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.eos_token_id if isinstance(config.eos_token_id, int) else 0,
    )
    prompt_BS = prompt_BS.to(start.device)
    out_BS = start.model.generate(
        prompt_BS, generation_config=how, attention_mask=torch.ones_like(prompt_BS)
    )
    parts: Sequence[torch.Tensor] = (prompt_BS[0], out_BS[0, prompt_BS.shape[1] :])
    return Sample(*("".join(start.tokenizer.decode(p, skip_special_tokens=True)) for p in parts))


def _facts(
    cfg: SparsifyConfig,
    start: Start,
    scores: dict[str, Score],
    rule: ActivationRule,
    tried: list[tuple[float, Score]],
) -> dict[str, Any]:
    return {
        "parameters": sum(p.numel() for p in start.model.parameters()),
        "model_type": start.model.config.model_type,
        "tokens": cfg.steps * cfg.step_tokens,
        "corpus": publishable_name(cfg.corpus),
        "corpus_tokens": start.rows_NS.numel(),
        "l1": cfg.last_l1,
        "lr": cfg.peak_lr,
        "activation": rule.name,
        "threshold": rule.threshold,
        "shift_tolerance": cfg.shift_tolerance,
        "held_out": {name: asdict(value) for name, value in scores.items()},
        "calibration_sweep": [{"threshold": t, **asdict(s)} for t, s in tried],
    }

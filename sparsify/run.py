"""The stage: SiLU pre-training where there is no model yet, then ProSparse.

    pre-train (SiLU) -> substitute ReLU -> progressive L1 -> choose the FATReLU threshold

With baselines, the SiLU original and plain ReLU go on from the same pre-trained weights over the
same batches at the same learning rates, so that only the activation and the L1 term differ.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import torch

from sparsecast.collect.activations import ActivationRule
from sparsecast.collect.atomic import new_folder, read_json, write_json
from sparsecast.collect.errors import InputError
from sparsecast.collect.models import set_activation
from sparsecast.collect.progress import console
from sparsecast.collect.tokens import encode
from sparsecast.sparsify.card import Sample, write_card
from sparsecast.sparsify.config import SparsifyConfig
from sparsecast.sparsify.measure import Score, score, sweep
from sparsecast.sparsify.phases import train_all
from sparsecast.sparsify.start import Start, prepare

PROMPTS = ("Return the", "Compute the mean of", "def read_file(path):\n")


def sparsify(cfg: SparsifyConfig) -> Path:
    """Train and save a FATReLU model under `cfg.out`; returns that folder.

    An interrupted run goes on where it stopped, from `.<out>.work` beside `cfg.out`.

    Memory: the model in float32 with its gradients and two AdamW moments (16 bytes a parameter),
    the activations of one step, and 4 bytes per token of the corpus, on one device.

    Raises:
        InputError: No such model or corpus, a family without a row in the table, or an
            interrupted run under `cfg.out` that was started with other options.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    L.seed_everything(cfg.seed, verbose=False)
    torch.set_float32_matmul_precision("high")
    work = cfg.out.with_name(f".{cfg.out.name}.work")
    with new_folder(cfg.out) as folder:
        _check_options(cfg, work)
        start = prepare(cfg, work)
        scores = train_all(cfg, start, work)
        threshold, tried = sweep(start.model, start.calibration, cfg.shift_tolerance)
        rule = ActivationRule("fatrelu", float(f"{threshold:.3g}"))
        start.model.half().float()  # so that what is scored is what is saved
        set_activation(start.model, rule)
        scores["ProSparse after the shift"] = score(start.model, start.held_out)
        samples = [_sample(cfg, start, prompt) for prompt in PROMPTS]
        _save(start.model, rule, folder)
        for path in start.tokenizer_files:
            shutil.copy(path, folder / path.name)
        write_json(folder / "sparsify.json", _record(cfg, start, scores, rule, tried))
        write_card(folder, cfg.out.name, scores, samples)
    shutil.rmtree(work, ignore_errors=True)
    console.print((cfg.out / "README.md").read_text(encoding="utf-8"), markup=False)
    return cfg.out


def _sample(cfg: SparsifyConfig, start: Start, prompt: str) -> Sample:
    torch.manual_seed(cfg.seed)
    ids = torch.tensor([encode(start.tokenizer, prompt, cfg.seq_len)])
    out = start.model.generate(
        ids.to(start.device), max_new_tokens=120, do_sample=True, temperature=0.7, top_k=40
    )
    text = start.tokenizer.decode(out[0], skip_special_tokens=True)
    return Sample(prompt, "".join(text))


def _save(model: Any, rule: ActivationRule, folder: Path) -> None:
    model.config.hidden_act = rule.name
    model.config.hidden_act_param = rule.threshold
    model.half().save_pretrained(folder)


def _record(
    cfg: SparsifyConfig,
    start: Start,
    scores: dict[str, Score],
    rule: ActivationRule,
    tried: list[tuple[float, Score]],
) -> dict[str, Any]:
    return {
        "parameters": sum(p.numel() for p in start.model.parameters()),
        "tokens": start.steps * cfg.batch_tokens,
        "corpus": cfg.corpus,
        "corpus_tokens": start.rows_NS.numel(),
        "l1": start.l1,
        "lr": start.lr,
        "threshold": rule.threshold,
        "shift_tolerance": cfg.shift_tolerance,
        "held_out": {name: asdict(value) for name, value in scores.items()},
        "calibration_sweep": [{"threshold": t, **asdict(s)} for t, s in tried],
    }


def _check_options(cfg: SparsifyConfig, work: Path) -> None:
    options = json.loads(json.dumps(asdict(cfg), default=str))
    path = work / "options.json"
    if path.is_file():
        before = read_json(path, "the options of an interrupted run")
        changed = [
            f"{k} was {before.get(k)!r}, now {v!r}"
            for k, v in options.items()
            if before.get(k) != v
        ]
        if changed:
            raise InputError(
                f"{work}: holds an interrupted run with other options ({'; '.join(changed)}); "
                "repeat those options to resume, or remove the folder"
            )
        return
    work.mkdir(parents=True, exist_ok=True)
    write_json(path, options)

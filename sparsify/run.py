"""The stage: SiLU pre-training where there is no model yet, then ProSparse.

    pre-train (SiLU) -> substitute ReLU -> progressive L1 -> choose the FATReLU threshold

With baselines, the SiLU original and plain ReLU go on from the same pre-trained weights over the
same batches at the same learning rates, so that only the activation and the L1 term differ.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerBase as Tokenizer

from sparsecast.collect.activations import ActivationRule
from sparsecast.collect.atomic import new_folder, read_json, write_json
from sparsecast.collect.checkpoint import Checkpoint
from sparsecast.collect.corpus import documents
from sparsecast.collect.errors import InputError
from sparsecast.collect.families import family_of
from sparsecast.collect.models import load_tokenizer, pick_device, set_activation
from sparsecast.collect.progress import console
from sparsecast.collect.splits import assign
from sparsecast.collect.tokens import TokenBatch, batches
from sparsecast.sparsify.card import Sample, write_card
from sparsecast.sparsify.config import PRESETS, Preset, SparsifyConfig
from sparsecast.sparsify.measure import Score, score, sweep
from sparsecast.sparsify.module import Phase, SparsifyModule
from sparsecast.sparsify.text import Batches, sequences
from sparsecast.sparsify.tokenizer import train_tokenizer

CHECKPOINT_STEPS = 500
TOKENIZER_DOCUMENTS = 6_000
PROMPTS = ("Return the", "Compute the mean of", "def read_file(path):\n")


def sparsify(cfg: SparsifyConfig) -> Path:
    """Train and save a FATReLU model under `cfg.out`; returns that folder.

    Memory: the model in float32 with its gradients and two AdamW moments (16 bytes a parameter),
    the activations of one step, and 4 bytes per token of the corpus.

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
        run = _prepare(cfg, work)
        scores = _train_all(run)
        console.print(f"choosing the FATReLU threshold at +{cfg.shift_tolerance:.2%} perplexity")
        threshold, tried = sweep(run.model, run.calibration, cfg.shift_tolerance)
        threshold = float(f"{threshold:.3g}")
        rule = ActivationRule("fatrelu", threshold)
        run.model.half().float()  # so that what is scored is what is saved
        set_activation(run.model, rule)
        scores["ProSparse after the shift"] = score(run.model, run.held_out)
        samples = [_sample(run, prompt) for prompt in PROMPTS]
        _save(run.model, rule, folder)
        for path in run.tokenizer_files:
            shutil.copy(path, folder / path.name)
        write_json(folder / "sparsify.json", _record(cfg, run, scores, threshold, tried))
        write_card(folder, scores, samples)
    shutil.rmtree(work, ignore_errors=True)
    console.print((cfg.out / "README.md").read_text(encoding="utf-8"), markup=False)
    return cfg.out


@dataclass
class Run:
    """What the phases share."""

    cfg: SparsifyConfig
    work: Path
    model: Any
    tokenizer: Tokenizer
    tokenizer_files: list[Path]
    rows_NS: Tensor
    calibration: list[TokenBatch]
    held_out: list[TokenBatch]
    device: torch.device
    tokens: int
    lr: float
    l1: float

    @property
    def steps(self) -> int:
        return max(10, self.tokens // self.cfg.batch_tokens)

    @property
    def pretrain_steps(self) -> int:
        return int(self.steps * self.cfg.pretrain_share) if self.cfg.preset else 0


def _prepare(cfg: SparsifyConfig, work: Path) -> Run:
    device = pick_device(cfg.device)
    preset = PRESETS[cfg.preset] if cfg.preset else None
    if preset is not None:
        source = work / "tokenizer"
        if not (source / "tokenizer.json").is_file():
            console.print(f"training a tokenizer of {preset.vocab_size} pieces")
            texts = islice(_train_texts(cfg.corpus), TOKENIZER_DOCUMENTS)
            train_tokenizer(texts, preset.vocab_size, source)
        model, tokenizer = _new_model(preset, source, cfg.seq_len)
    else:
        assert cfg.model is not None
        checkpoint = Checkpoint(cfg.model)
        family_of(checkpoint.config, cfg.model)
        source, tokenizer = checkpoint.folder, load_tokenizer(checkpoint)
        model = _load_for_training(checkpoint)
    tokens = cfg.tokens or (preset.tokens if preset else 100_000_000)
    rows = _rows(cfg, work, tokenizer, tokens)
    evaluation = list(
        batches(
            assign(documents(cfg.corpus)),
            tokenizer,
            {"calibration": cfg.eval_tokens, "held-out": cfg.eval_tokens},
            seq_len=cfg.seq_len,
            batch_size=32,
        )
    )
    return Run(
        cfg=cfg,
        work=work,
        model=model.to(device),
        tokenizer=tokenizer,
        tokenizer_files=sorted(source.glob("tokenizer*")),
        rows_NS=rows.to(device),
        calibration=[batch for batch in evaluation if batch.split == "calibration"],
        held_out=[batch for batch in evaluation if batch.split == "held-out"],
        device=device,
        tokens=tokens,
        lr=cfg.lr or (preset.lr if preset else 3e-5),
        l1=(preset.l1 if preset else 0.1) if cfg.l1 is None else cfg.l1,
    )


def _train_all(run: Run) -> dict[str, Score]:
    """Run every phase; leaves the ProSparse weights, before the shift, in `run.model`."""
    model, start, stop = run.model, run.pretrain_steps, run.steps
    optimizer = None
    if start:
        optimizer = _fit(run, _phase(run, "pre-training", 0, start), None)
    trunk = {name: value.clone() for name, value in model.state_dict().items()}
    silu = model.model.layers[0].mlp.act_fn
    branches: list[tuple[str, Any, float]] = []
    if run.cfg.baselines:
        branches = [("SiLU original", silu, 0.0), ("plain ReLU", torch.nn.ReLU(), 0.0)]
    branches.append(("ProSparse before the shift", torch.nn.ReLU(), run.l1))
    scores = {}
    for name, act, l1 in branches:
        model.load_state_dict(trunk)
        for layer in model.model.layers:
            layer.mlp.act_fn = act
        _fit(run, _phase(run, name, start, stop, l1), optimizer)
        result = scores[name] = score(model, run.held_out)
        console.print(f"{name}: perplexity {result.perplexity:.3f}, sparsity {result.sparsity:.2%}")
    return scores


def _phase(run: Run, name: str, start: int, stop: int, l1: float = 0.0) -> Phase:
    warmup = min(500, run.steps // 20 + 1)
    span = run.steps - run.pretrain_steps
    return Phase(
        name=name,
        start=start,
        stop=stop,
        l1=l1,
        lr=run.lr,
        warmup=warmup,
        decay_from=run.steps - int(0.5 * span),
    )


def _fit(run: Run, phase: Phase, optimizer: dict[str, Any] | None) -> dict[str, Any]:
    """Train one phase, or load it if it was finished before; returns the optimiser's state."""
    slug = phase.name.replace(" ", "-")
    done, last = run.work / f"{slug}.pt", run.work / f"{slug}.ckpt"
    if done.is_file():
        saved = torch.load(done, map_location=run.device, weights_only=True)
        run.model.load_state_dict(saved["model"])
        state: dict[str, Any] = saved["optimizer"]
        return state
    on_gpu = run.device.type == "cuda"
    module = SparsifyModule(run.model, phase, optimizer, compile=on_gpu and run.cfg.compile)
    step = 0
    if last.is_file():
        step = torch.load(last, map_location="cpu", weights_only=True)["global_step"]
        console.print(f"{phase.name}: resuming at step {step:,}")
    data = Batches(
        run.rows_NS, run.cfg.batch_tokens // run.cfg.seq_len, run.cfg.seed, phase.start + step
    )
    console.print(f"{phase.name}: {phase.stop - phase.start:,} steps")
    trainer = L.Trainer(
        max_steps=phase.stop - phase.start,
        accelerator="gpu" if on_gpu else "cpu",
        devices=1,
        precision="bf16-mixed" if on_gpu else "32-true",
        logger=False,
        enable_model_summary=False,
        callbacks=[
            TQDMProgressBar(refresh_rate=20),
            ModelCheckpoint(
                dirpath=run.work,
                filename=slug,
                every_n_train_steps=CHECKPOINT_STEPS,
                save_top_k=1,
                enable_version_counter=False,
            ),
        ],
    )
    try:
        trainer.fit(
            module,
            DataLoader(data, batch_size=None),
            ckpt_path=str(last) if step else None,
            weights_only=True,
        )
    finally:
        module.remove_hooks()
    run.model.to(run.device)
    state = trainer.optimizers[0].state_dict()
    part = done.with_suffix(".part")
    torch.save({"model": run.model.state_dict(), "optimizer": state}, part)
    part.replace(done)
    last.unlink(missing_ok=True)
    return state


def _new_model(preset: Preset, tokenizer_folder: Path, seq_len: int) -> tuple[Any, Tokenizer]:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    config = LlamaConfig(
        hidden_size=preset.hidden_size,
        intermediate_size=preset.ffn_width,
        num_hidden_layers=preset.layers,
        num_attention_heads=preset.heads,
        num_key_value_heads=preset.kv_heads,
        vocab_size=len(tokenizer),
        max_position_embeddings=seq_len,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config), tokenizer


def _load_for_training(checkpoint: Checkpoint) -> Any:
    return AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32)


def _rows(cfg: SparsifyConfig, work: Path, tokenizer: Tokenizer, limit: int) -> Tensor:
    path = work / "tokens.safetensors"
    if path.is_file():
        return load_file(path)["rows"]
    rows = sequences(_train_texts(cfg.corpus), tokenizer, cfg.seq_len, limit)
    save_file({"rows": rows}, path)
    return rows


def _train_texts(corpus: str) -> Iterator[str]:
    docs = assign(documents(corpus, workers=os.cpu_count() or 1))
    return (doc.text for name, doc in docs if name == "train")


def _sample(run: Run, prompt: str) -> Sample:
    torch.manual_seed(run.cfg.seed)
    ids = torch.tensor(
        [
            [
                run.tokenizer.bos_token_id,
                *run.tokenizer(prompt, add_special_tokens=False)["input_ids"],
            ]
        ]
    )
    out = run.model.generate(
        ids.to(run.device), max_new_tokens=120, do_sample=True, temperature=0.7, top_k=40
    )
    return Sample(prompt, run.tokenizer.decode(out[0], skip_special_tokens=True))


def _save(model: Any, rule: ActivationRule, folder: Path) -> None:
    model.config.hidden_act = rule.name
    model.config.hidden_act_param = rule.threshold
    model.half().save_pretrained(folder)


def _record(
    cfg: SparsifyConfig,
    run: Run,
    scores: dict[str, Score],
    threshold: float,
    tried: list[tuple[float, Score]],
) -> dict[str, Any]:
    return {
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "tokens": run.steps * cfg.batch_tokens,
        "corpus": cfg.corpus,
        "corpus_tokens": run.rows_NS.numel(),
        "l1": run.l1,
        "lr": run.lr,
        "threshold": threshold,
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

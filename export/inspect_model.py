"""What a model is, what every stage and PowerInfer can do with it, and the truth check.

The facts come from config.json and the headers of the weights; the truth check alone loads the
model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from rich.table import Table
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from sparsecast.collect.inspect import InspectConfig
from sparsecast.core.disk import format_bytes
from sparsecast.core.errors import InputError
from sparsecast.core.messages import log, show
from sparsecast.core.models.activations import ActivationRule
from sparsecast.core.models.bitnet import check_compiles, rounds_online
from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.core.models.experts import install_loops
from sparsecast.core.models.families import activation_rule, family_of, lost_threshold_warning
from sparsecast.core.models.loading import (
    build_model,
    check_checkpoint,
    embedding_rows,
    max_positions,
    pick_device,
    pick_dtype,
    set_activation,
)
from sparsecast.core.models.pretrained import empty_model
from sparsecast.core.models.remote_configs import ignored_activation
from sparsecast.core.models.shape import ModelShape, model_shape
from sparsecast.core.models.truth_check import TruthCheck, candidates, check_activation, fits_in
from sparsecast.core.models.weight_files import tensor_files
from sparsecast.core.progress import progress_bar
from sparsecast.core.text.corpus import read_documents, start_reading
from sparsecast.core.text.splits import assign_splits
from sparsecast.core.text.tokens import token_batches
from sparsecast.core.tokenizers.files import sentencepiece_file
from sparsecast.core.tokenizers.loading import load_tokenizer
from sparsecast.export.read.inspect_file import plain
from sparsecast.export.write.hparams import read_hparams
from sparsecast.export.write.vocab_reader import read_vocabulary

SEQ_LEN = 512
BATCH = 2
LEAST_POSITIONS = 8
"""With fewer, hardly a token of a document is predicted."""
MOST_LAYERS = 1_000
"""Of a config whose weights are unusable, so that nothing bounds what it describes."""


def model_values(cfg: InspectConfig) -> dict[str, Any]:
    """Describe the model that `cfg.path` names; see docs/file-formats.md for the keys.

    Raises:
        InputError: No such model, an unusable config, or a family without a row; no held-out text
            in the corpus.
    """
    source = str(cfg.path)
    checkpoint = Checkpoint(source)
    config: Any = checkpoint.config
    family = family_of(config, source)
    weights = _reason(checkpoint, lambda: checkpoint.check())
    outline = None if weights and config.num_hidden_layers > MOST_LAYERS else _outline(config)
    named = getattr(config, family.act_key, None)
    inexact = _reason(checkpoint, lambda: activation_rule(config, source))
    tokenizer = _tokenizer_values(checkpoint)
    usable = weights or _reason(checkpoint, lambda: check_checkpoint(checkpoint))
    unknown = inexact if named == "fatrelu" or named not in ACT2FN else None
    values = {
        "kind": "checkpoint",
        "path": source,
        "family": config.model_type,
        "model_type": checkpoint.raw_config.get("model_type"),
        "shape": None if outline is None else _shape(outline),
        "parameters": None if outline is None else outline.num_parameters(),
        "bytes": None if weights else _stored_bytes(checkpoint),
        "dtype": None if weights else _stored_dtype(checkpoint),
        "tied": bool(config.tie_word_embeddings),
        "positions": getattr(config, "max_position_embeddings", None),
        "activation": {
            "name": named,
            "threshold": None if inexact else activation_rule(config, source).threshold,
            "source": _activation_source(checkpoint, family.act_key),
        },
        "warning": lost_threshold_warning(config, source),
        "input": family.convention,
        "tokenizer": tokenizer,
        "weights": weights,
        "stages": _stages(config, usable, weights, inexact),
        "powerinfer": _powerinfer(checkpoint),
        "check": None,
        "not_checked": usable or unknown if cfg.check else "left out by --check false",
    }
    values["stages"]["export"] = values["powerinfer"]["model"] or values["powerinfer"]["vocabulary"]
    if values["not_checked"] is None and (values["positions"] or SEQ_LEN) < LEAST_POSITIONS:
        values["not_checked"] = f"max_position_embeddings is below {LEAST_POSITIONS}"
    if values["not_checked"] is None:
        rule: Any = named if inexact else activation_rule(config, source)
        values |= _check(cfg, checkpoint, rule)
    return values


def _reason(checkpoint: Checkpoint, check: Callable[[], object]) -> str | None:
    """Run a check; return why it failed, without the model's name in front."""
    try:
        check()
    except InputError as error:
        text = str(error)
        for name in (checkpoint.source, str(checkpoint.folder)):
            text = text.removeprefix(f"{name}: ")
        return text
    return None


def _outline(config: Any) -> PreTrainedModel | None:
    try:
        return empty_model(config)
    except Exception:  # a model's class meets absurd fields, each in its own way
        return None


def _shape(outline: PreTrainedModel) -> dict[str, int] | None:
    shape: ModelShape | None = model_shape(outline) if fits_in(outline) else None
    return None if shape is None else {key: size for key, size in asdict(shape).items() if size}


def _stored_bytes(checkpoint: Checkpoint) -> int:
    return sum(path.stat().st_size for path in set(tensor_files(checkpoint.folder).values()))


def _stored_dtype(checkpoint: Checkpoint) -> str:
    """The first tensor's."""
    _, tensor = next(checkpoint.tensors())
    return str(tensor.dtype).removeprefix("torch.")


def _activation_source(checkpoint: Checkpoint, key: str) -> str:
    raw = checkpoint.raw_config
    if (named := ignored_activation(raw)) is not None:
        return f"the code of this type; config.json says {named!r}, which it ignores"
    return (
        f"{key} in config.json" if key in raw else f"the default of {checkpoint.config.model_type}"
    )


def _tokenizer_values(checkpoint: Checkpoint) -> dict[str, Any]:
    try:
        tokenizer: Any = load_tokenizer(checkpoint)
    except InputError as error:
        return {"reason": str(error).removeprefix(f"{checkpoint.folder}: ")}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    kind = type(tokenizer).__name__ if backend is None else type(backend.model).__name__
    if sentencepiece_file(checkpoint.folder) is not None:
        kind += " with tokenizer.model"
    return {
        "reason": None,
        "class": type(tokenizer).__name__,
        "kind": kind,
        "size": len(tokenizer),
        "bos": tokenizer.bos_token,
        "eos": tokenizer.eos_token,
        "chat_template": bool(tokenizer.chat_template),
    }


def _stages(
    config: Any, usable: str | None, weights: str | None, inexact: str | None
) -> dict[str, str | None]:
    """Return why each stage cannot use the model, None where it can."""
    recorded = usable or inexact
    family, rounds = family_of(config, "model"), rounds_online(config)
    dense_alone = untrained = unreplaced = None
    if family.experts is not None:
        dense_alone = f"is a mixture of experts ({config.model_type}); only dense FFNs work there"
    if rounds:
        unreplaced = "its weights are rounded in every forward pass, which the kernels do not do"
        untrained = "its weights are rounded in every forward pass, which sparsify does not train"
    named = getattr(config, family.act_key, None)
    if named == "fatrelu":
        untrained = untrained or inexact
    if named == "relu2":
        untrained = f"{family.act_key} is 'relu2', which is sparse already; use the model as it is"
    names = ("collect", "train", "report", "evaluate")
    return {
        **dict.fromkeys(names, recorded),
        "sparsify": usable or dense_alone or untrained,
        "sparsify_model": weights or inexact or dense_alone or unreplaced,
    }


def _powerinfer(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the engine's architecture, and why it cannot run the model or read its vocabulary."""
    found: dict[str, Any] = {"architecture": None, "model": None, "vocabulary": None, "notes": []}

    def read() -> None:
        found["architecture"] = read_hparams(checkpoint).arch

    def vocabulary() -> None:
        found["notes"] = read_vocabulary(checkpoint, checkpoint.config.vocab_size).notes

    found["model"] = _reason(checkpoint, read)
    found["vocabulary"] = _reason(checkpoint, vocabulary)
    return found


def _check(
    cfg: InspectConfig, checkpoint: Checkpoint, rule: ActivationRule | str
) -> dict[str, Any]:
    """Load the model and run the truth check on held-out documents."""
    documents = start_reading(cfg.corpus, assign_splits(read_documents(cfg.corpus)))
    device = pick_device(cfg.device)
    dtype = pick_dtype(cfg.dtype, checkpoint.config.dtype, device)
    try:
        model: Any = build_model(checkpoint, dtype)
        if rounds_online(checkpoint.config):
            check_compiles(device)
    except InputError as error:
        return {"not_checked": str(error).removeprefix(f"{checkpoint.folder}: ")}
    model.to(device).eval()
    if not fits_in(model):
        return {"not_checked": "its FFNs are not of one kind"}
    if family_of(checkpoint.config, "model").experts is not None:
        install_loops(model, relu_up=False)
    if isinstance(rule, ActivationRule):
        set_activation(model, rule)
    batches = list(
        token_batches(
            documents,
            load_tokenizer(checkpoint),
            {"held-out": cfg.tokens},
            seq_len=int(min(SEQ_LEN, max_positions(model))),
            batch_size=BATCH,
            vocabulary=embedding_rows(model),
        )
    )
    if not batches:
        raise InputError(f"{cfg.corpus}: has no held-out document; give more text, in more files")
    tried = candidates(rule, gated=family_of(checkpoint.config, "model").gate is not None)
    with progress_bar("truth check", len(tried)) as progress:
        check = check_activation(
            model,
            batches,
            tried,
            vocabulary=embedding_rows(model),
            on_pass=progress.advance,
        )
    return {"check": _check_values(check, cfg.corpus)}


def _check_values(check: TruthCheck, corpus: str) -> dict[str, Any]:
    verdict = check.verdict
    rows = []
    for score in check.scores:
        gain, error = score.difference(check.configured)
        perplexity = score.perplexity
        rows.append(
            {
                "activation": score.candidate.name,
                "perplexity": perplexity if math.isfinite(perplexity) else None,
                "zeros": 1 - score.active,
                "difference": gain if math.isfinite(gain) else None,
                "error": error,
            }
        )
    return {
        "verdict": verdict.kind,
        "best": verdict.best,
        "text": verdict.text,
        "corpus": corpus,
        "tokens": check.tokens,
        "zeros": check.configured.zeros,
        "activations": rows,
    }


def show_model(values: dict[str, Any]) -> None:
    """Log what `model_values` returns."""
    log.info(plain(values["path"]), extra={"style": "bold"})
    for name, fact in _facts(values).items():
        log.info(f"  {name:<11}{plain(fact)}")
    table = Table(title="what works", title_justify="left")
    table.add_column("stage")
    table.add_column("", overflow="fold")
    alike: dict[str | None, list[str]] = {}
    for name, reason in values["stages"].items():
        alike.setdefault(reason, []).append(name)
    for reason, names in alike.items():
        table.add_row(", ".join(names), "yes" if reason is None else f"no: {plain(reason)}")
    show(table)
    if values["warning"] is not None:
        log.warning(plain(values["warning"]))
    for note in values["powerinfer"]["notes"]:
        log.info(f"PowerInfer: {plain(note)}")
    if (check := values["check"]) is None:
        log.info(f"truth check: {plain(values['not_checked'])}")
        return
    _show_check(check)


def _facts(values: dict[str, Any]) -> dict[str, str]:
    shape, tokenizer, activation = values["shape"], values["tokenizer"], values["activation"]
    family = str(values["family"])
    if values["model_type"] != values["family"]:
        family += f" (config.json's model_type is {values['model_type']})"
    facts = {"family": family}
    if shape is not None:
        facts["shape"] = (
            f"{shape['layers']} layers, hidden {shape['hidden_size']}, FFN {shape['ffn_width']}, "
            f"{shape['ffn_matrices']} matrices"
            + (
                f", {shape['experts']} experts, {shape['experts_per_token']} per token"
                if "experts" in shape
                else ""
            )
        )
    if values["parameters"] is not None:
        facts["size"] = f"{values['parameters']:,} parameters" + (
            ", embeddings tied" if values["tied"] else ""
        )
    if values["weights"] is None:
        facts["weights"] = f"{values['dtype']}, {format_bytes(values['bytes'])}"
    else:
        facts["weights"] = values["weights"]
    threshold = f" {activation['threshold']:g}" if activation["threshold"] else ""
    facts["activation"] = f"{activation['name']}{threshold}, from {activation['source']}"
    facts["input"] = values["input"]
    facts["tokenizer"] = tokenizer["reason"] or (
        f"{tokenizer['kind']}, {tokenizer['size']:,} tokens, BOS {tokenizer['bos'] or 'none'}, "
        f"{'a' if tokenizer['chat_template'] else 'no'} chat template"
    )
    engine = values["powerinfer"]
    facts["PowerInfer"] = engine["model"] or f"architecture {engine['architecture']}"
    if engine["vocabulary"] is not None:
        facts["PowerInfer"] += f"; {engine['vocabulary']}"
    return facts


def _show_check(check: dict[str, Any]) -> None:
    title = f"{check['tokens']:,} held-out tokens of {check['corpus']}"
    table = Table(title=title, title_justify="left")
    for name in ("activation", "perplexity", "zeros", "log-likelihood lost"):
        table.add_column(name, justify="left" if name == "activation" else "right")
    for row in check["activations"]:
        value = "overflows" if row["perplexity"] is None else f"{row['perplexity']:,.4g}"
        lost = "" if row["difference"] is None else f"{row['difference']:+.4f} ± {row['error']:.4f}"
        table.add_row(row["activation"], value, f"{row['zeros']:.4f}", lost)
    show(table)
    zeros = ", ".join(f"{share:.3f}" for share in check["zeros"])
    log.info(f"zeros of x1 per layer as configured: {zeros}")
    (log.info if check["verdict"] == "fits" else log.warning)(check["text"])

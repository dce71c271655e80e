"""The bundle's README.md: what it is, its predictors' scores, and how to run it."""

from __future__ import annotations

from statistics import fmean

from sparsecast.core.models.scales import Scales
from sparsecast.export.bundle import GPUIDX_SUFFIX, SUFFIX
from sparsecast.export.commands import run_notes
from sparsecast.export.plan import ExportPlan
from sparsecast.export.write.hot_cold import BLOCK, Split
from sparsecast.export.write.hparams import HParams

FORMATS = {
    "f16": "f16",
    "f32": "f32 (the down projection in f16)",
    "q4_0": "q4_0 (the output matrix in q8_0)",
}
RELU_NOTE = (
    "The model computes {rule}; PowerInfer computes plain ReLU, so neurons whose gate lies between "
    "0 and {threshold:g} also contribute there. `sparsecast evaluate` gives the perplexity of both "
    "(`predicted`: the model's own activation; `bundle`: this file)."
)


def model_card(plan: ExportPlan) -> str:
    """Return the card as Markdown."""
    model, hparams, manifest = plan.checkpoint.source, plan.hparams, plan.predictors.manifest
    parts = [
        f"# {plan.file.removesuffix(SUFFIX)} for PowerInfer",
        f"`{model}` ({hparams.layers} layers, hidden size {hparams.hidden}, FFN {hparams.ffn}) "
        f"with one activation predictor per layer, written by `sparsecast export` in "
        f"{FORMATS[plan.dtype]}. A neuron is computed when its predictor's output is at least "
        f"{plan.predictors.threshold:g}.",
        "## Run it",
        *run_notes(plan),
    ]
    if notes := text_notes(plan):
        parts += ["## Text", *notes]
    if hparams.activation.threshold > 0:
        parts += ["## Activation", relu_note(hparams)]
    if hparams.scales is not None:
        parts += ["## Scales", scales_note(hparams.scales)]
    if hparams.window is not None:
        parts += ["## Attention", window_note(hparams)]
    if plan.mismatches:
        parts += ["## Predictors of another model", mismatch_note(plan.mismatches)]
    parts += ["## Predictors", *_scores(plan), "## Hot and cold neurons", *_hot_cold(plan)]
    named = "" if manifest is not None and not plan.mismatches else f" --model {model}"
    check = f"sparsecast verify .{named} --engine PATH_TO_POWERINFER_BUILD"
    parts += ["## Check it", f"```\n{check}\n```"]
    return "\n\n".join(parts) + "\n"


def text_notes(plan: ExportPlan) -> list[str]:
    """Say how the engine treats text differently, and how much text that concerns."""
    notes, differences = list(plan.vocabulary.notes), plan.vocabulary.differences
    if differences:
        notes.append(f"The model's tokenizer {'; '.join(differences)}; the engine does not.")
    if plan.other_tokens is not None:
        notes.append(
            f"Of a text the engine makes other tokens than the model was trained on: of "
            f"{plan.other_tokens}. It is right for token ids: where that matters, tokenize with "
            "the model's tokenizer and give the engine ids."
        )
    return notes


def split_note(split: Split) -> str:
    """Say which neurons a GPU build will keep on the GPU."""
    budget, total = split.budget, split.width * len(split.hot)
    if split.neurons:
        return (
            f"On the GPU: {split.neurons:,} of {total:,} neurons, {split.nbytes / 2**20:,.1f} MiB, "
            f"with {split.share:.1%} of the recorded activations"
        )
    need = budget.before + 2 * budget.half_cache + BLOCK * budget.neuron
    return (
        "On the GPU: no neuron; the FFN stays on the CPU. Attention, predictors, norms and output "
        f"take {budget.before / 2**30:.3g} GiB, the KV cache {2 * budget.half_cache / 2**30:.3g}, "
        f"a block of {BLOCK} neurons {BLOCK * budget.neuron / 2**30:.3g}: it takes a --vram-budget "
        f"of {need / 2**30:.3g}, {budget.given / 2**30:.3g} were given"
    )


def mismatch_note(mismatches: list[str]) -> str:
    """Say what --force accepted."""
    return (
        f"The predictors were {'; '.join(mismatches)}. The export was forced with `--force`: only "
        "their shapes are known to fit, and their recall and sparsity were measured on the model "
        "they come from. `sparsecast verify` gives the perplexity of this bundle beside the "
        "model's."
    )


def window_note(hparams: HParams) -> str:
    """Say how the engine treats a model with a sliding window."""
    return (
        f"The model attends to the last {hparams.window} tokens; PowerInfer attends to all, so its "
        "results differ on longer texts."
    )


def scales_note(scales: Scales) -> str:
    """Say which factors became part of the weights."""
    attention = "" if scales.attention == 1.0 else f", q by {scales.attention:g}"
    return (
        "The model scales embeddings, residuals and logits while it runs, the engine's llama does "
        f"not. Here the scales are part of the weights: the embedding is multiplied by "
        f"{scales.embedding:g}, the output matrix divided by {scales.logits:g}, the output of "
        f"attention and the down projection multiplied by {scales.residual:g}{attention}. "
        "Predictors and activation counts are the same in both forms."
    )


def relu_note(hparams: HParams) -> str:
    """Say how the engine treats a FATReLU model."""
    return RELU_NOTE.format(rule=hparams.activation, threshold=hparams.activation.threshold)


def _hot_cold(plan: ExportPlan) -> list[str]:
    if plan.counts is None:
        return [
            "No `activation/` folder: the bundle was exported without `--activations`, so a GPU "
            "build of PowerInfer keeps the whole FFN on the CPU. A CPU build does not use these "
            "files."
        ]
    parts = [
        "`activation/activation_<i>.pt` counts how often each neuron fired; from these counts a "
        "GPU build of PowerInfer decides which neurons to keep in GPU memory."
    ]
    if plan.split is not None and plan.gpu is not None:
        parts.append(
            f"`{plan.file}{GPUIDX_SUFFIX}` is that decision for `--vram-budget {plan.gpu.gib:.9g} "
            f"-c {plan.gpu.context}`. {split_note(plan.split)}. The engine uses it where at least "
            "that much memory is free for neurons, even if more is: export again for another "
            "budget. With less memory, or with `--reset-gpu-index`, it runs its own solver, "
            "whose file replaces this one."
        )
    return parts


def _scores(plan: ExportPlan) -> list[str]:
    layers, manifest, traffic = plan.predictors.layers, plan.predictors.manifest, plan.traffic
    if manifest is None or traffic is None:
        ranks = [predictor.rank for predictor in layers]
        return [
            f"Ranks {ranks}. They came without a manifest: their model, their input and their "
            "scores are unknown, only their shapes are known to fit. `sparsecast report` scores "
            "them."
        ]
    rows = [
        (predictor.rank, scores["recall"], scores["predicted_sparsity"], share)
        for predictor, scores, share in zip(
            layers, manifest.calibration, traffic.reported, strict=True
        )
    ]
    formats = "/".join(sorted({predictor.dtype for predictor in layers}))
    means = [fmean(column) for column in zip(*rows, strict=True)]
    lines = ["| layer | rank | recall | predicted sparsity | traffic |", "|---|---|---|---|---|"]
    for i, (rank, recall, sparsity, share) in enumerate(rows):
        lines.append(f"| {i} | {rank} | {recall:.4f} | {sparsity:.4f} | {share:.4f} |")
    lines.append(f"| mean | {means[0]:g} | {means[1]:.4f} | {means[2]:.4f} | {means[3]:.4f} |")
    text = [
        "\n".join(lines),
        "Measured on the calibration split; `sparsecast report` gives held-out scores. Traffic is "
        "bytes of FFN and predictor weights read per token over those of the dense FFN, with FFN "
        f"weights in f16 and predictors in {formats}: predictor share + 1 - predicted sparsity. "
        "Lower is better, 1 is dense.",
    ]
    if not traffic.in_f16:
        text.append(
            f"With the types of this file ({traffic.types}) the mean traffic is "
            f"{fmean(traffic.own):.4f}."
        )
    return text

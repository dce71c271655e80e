"""The bundle's README.md: what it is, its predictors' scores, and how to run it."""

from __future__ import annotations

from statistics import fmean

from sparsecast.export.bundle import GPUIDX_SUFFIX
from sparsecast.export.config import ExportConfig
from sparsecast.export.traffic import Traffic
from sparsecast.export.write.hot_cold import BLOCK, Split
from sparsecast.export.write.hparams import HParams
from sparsecast.export.write.vocab import Vocabulary
from sparsecast.predictors.checkpoint import PredictorSet

FORMATS = {
    "f16": "f16",
    "f32": "f32 (the down projection in f16)",
    "q4_0": "q4_0 (the output matrix in q8_0)",
}
SPACE_NOTE = " The text begins with a space, because `main` adds none and the model has seen one."
RELU_NOTE = (
    "The model computes {rule}; PowerInfer computes plain ReLU, so neurons whose gate lies between "
    "0 and {threshold:g} also contribute there. `sparsecast evaluate` gives the perplexity of both "
    "(`predicted`: the model's own activation; `bundle`: this file)."
)


def model_card(
    file: str,
    hyper: HParams,
    vocabulary: Vocabulary,
    predictors: PredictorSet,
    foreign: list[str],
    cfg: ExportConfig,
    split: Split | None,
    traffic: Traffic | None,
) -> str:
    """Markdown.

    Args:
        file: The GGUF's name.
        foreign: See `belonging.differences`.
    """
    model, dtype = cfg.model, cfg.dtype
    pieces = vocabulary.model == "llama"
    parts = [
        f"# {file.removesuffix('.powerinfer.gguf')} for PowerInfer",
        f"`{model}` ({hyper.layers} layers, hidden size {hyper.hidden}, FFN {hyper.ffn}) with one "
        f"activation predictor per layer, written by `sparsecast export` in {FORMATS[dtype]}. A "
        f"neuron is computed when its predictor's output is at least {predictors.threshold:g}.",
        "## Run it",
        f"```\nmain -m {file} -t 1 -n 64 --temp 0 --repeat-penalty 1.0 "
        f'-p "{" " if pieces else ""}..."\n```',
        "`main` is PowerInfer's binary. One thread, because its CPU down projection adds the "
        "threads' partial sums without a lock: with more, results change from run to run."
        + (SPACE_NOTE if pieces else ""),
    ]
    if vocabulary.notes:
        parts += ["## Text", *vocabulary.notes]
    if hyper.activation.threshold > 0:
        parts += ["## Activation", relu_note(hyper)]
    if hyper.window is not None:
        parts += ["## Attention", window_note(hyper)]
    if foreign:
        parts += ["## Predictors of another model", foreign_note(foreign)]
    parts += ["## Predictors", *_scores(predictors, traffic), "## Hot and cold neurons"]
    parts += _hot_cold(file, cfg, split)
    named = "" if predictors.manifest is not None and not foreign else f" --model {model}"
    check = f"sparsecast verify .{named} --engine PATH_TO_POWERINFER_BUILD"
    parts += ["## Check it", f"```\n{check}\n```"]
    return "\n\n".join(parts) + "\n"


def split_note(split: Split) -> str:
    """What a GPU build will keep on the GPU."""
    budget, total = split.budget, split.width * len(split.hot)
    if split.neurons:
        return (
            f"On the GPU: {split.neurons:,} of {total:,} neurons, {split.nbytes / 2**20:,.1f} MiB, "
            f"with {split.share:.1%} of the recorded activations"
        )
    need = budget.before + 2 * budget.half_cache + BLOCK * budget.neuron
    return (
        "On the GPU: no neuron, the FFN stays on the CPU. Attention, predictors, norms and output "
        f"take {budget.before / 2**30:.3g} GiB, the KV cache {2 * budget.half_cache / 2**30:.3g}, "
        f"a block of {BLOCK} neurons {BLOCK * budget.neuron / 2**30:.3g}: it takes a --vram-budget "
        f"of {need / 2**30:.3g}, {budget.given / 2**30:.3g} were given"
    )


def foreign_note(foreign: list[str]) -> str:
    """What --force set aside."""
    return (
        f"The predictors were {'; '.join(foreign)}. The export was forced with `--force`: only "
        "their shapes are known to fit, and what is said of their recall and sparsity is of where "
        "they come from. `sparsecast verify` gives the perplexity of this bundle beside the "
        "model's."
    )


def window_note(hyper: HParams) -> str:
    """What a model with a sliding window becomes in the engine."""
    return (
        f"The model attends to the last {hyper.window} tokens; PowerInfer attends to all, so longer"
        " texts come out otherwise."
    )


def relu_note(hyper: HParams) -> str:
    """What a FATReLU model becomes in the engine."""
    return RELU_NOTE.format(rule=hyper.activation, threshold=hyper.activation.threshold)


def _hot_cold(file: str, cfg: ExportConfig, split: Split | None) -> list[str]:
    if cfg.activations is None:
        return [
            "No `activation/` folder: it was exported without `--activations`, so a GPU build of "
            "PowerInfer keeps the whole FFN on the CPU. A CPU build does not use these files."
        ]
    parts = [
        "`activation/activation_<i>.pt` counts how often each neuron fired; a GPU build of "
        "PowerInfer decides by it which neurons to keep in GPU memory."
    ]
    if split is not None:
        parts.append(
            f"`{file}{GPUIDX_SUFFIX}` is that decision, made for `--vram-budget "
            f"{cfg.vram_budget:g} -c {cfg.vram_context}`. {split_note(split)}. The engine takes it "
            "where at least so much memory is free for neurons, even if more is: export again for "
            "another budget. Where less is, or with `--reset-gpu-index`, it decides again by its "
            "own solver. Unless every layer is whole on the GPU, it refuses to run with one "
            "thread; give it `-t 2`."
        )
    return parts


def _scores(predictors: PredictorSet, traffic: Traffic | None) -> list[str]:
    manifest = predictors.manifest
    if manifest is None or traffic is None:
        ranks = [predictor.rank for predictor in predictors.layers]
        return [
            f"Ranks {ranks}. They came without a manifest: for which model they were trained, on "
            "what input and with what scores is not known, only their shapes are known to fit. "
            "`sparsecast report` scores them."
        ]
    rows = [
        (predictor.rank, scores["recall"], scores["predicted_sparsity"], share)
        for predictor, scores, share in zip(
            predictors.layers, manifest.calibration, traffic.reported, strict=True
        )
    ]
    formats = "/".join(sorted({predictor.dtype for predictor in predictors.layers}))
    means = [fmean(column) for column in zip(*rows, strict=True)]
    lines = ["| layer | rank | recall | predicted sparsity | traffic |", "|---|---|---|---|---|"]
    for i, (rank, recall, sparsity, share) in enumerate(rows):
        lines.append(f"| {i} | {rank} | {recall:.4f} | {sparsity:.4f} | {share:.4f} |")
    lines.append(f"| mean | {means[0]:g} | {means[1]:.4f} | {means[2]:.4f} | {means[3]:.4f} |")
    text = [
        "\n".join(lines),
        "Measured on the calibration split; held-out scores are in `sparsecast report`. Traffic is "
        "bytes of FFN and predictor weights read per token over those of the dense FFN, with FFN "
        f"weights in f16 and predictors in {formats}: predictor share + 1 - predicted sparsity; "
        "lower is better, 1 is dense.",
    ]
    if not traffic.in_f16:
        text.append(
            f"Of the types in this file ({traffic.types}) the mean traffic is "
            f"{fmean(traffic.own):.4f}."
        )
    return text

"""The bundle's README.md: what it is, its predictors' scores, and how to run it."""

from __future__ import annotations

from statistics import fmean

from sparsecast.export.hyper import Hyper
from sparsecast.predictors.checkpoint import PredictorSet

RELU_NOTE = (
    "The model computes {rule}; PowerInfer computes plain ReLU, so neurons whose gate lies between "
    "0 and {threshold:g} also contribute there. `sparsecast evaluate` gives the perplexity of both "
    "(`predicted`: the model's own activation; `bundle`: this file)."
)


def model_card(
    file: str, model: str, hyper: Hyper, predictors: PredictorSet, *, dtype: str, hot_cold: bool
) -> str:
    """Markdown; `file` is the GGUF's name, `hot_cold` whether activation/ was written."""
    parts = [
        f"# {file.removesuffix('.powerinfer.gguf')} for PowerInfer",
        f"`{model}` ({hyper.layers} layers, hidden size {hyper.hidden}, FFN {hyper.ffn}) with one "
        f"activation predictor per layer, written by `sparsecast export` in {dtype}. A neuron is "
        f"computed when its predictor's output is at least {predictors.threshold:g}.",
        "## Run it",
        f'```\nmain -m {file} -t 1 -n 64 --temp 0 --repeat-penalty 1.0 -p " ..."\n```',
        "`main` is PowerInfer's binary. One thread, because its CPU down projection adds the "
        "threads' partial sums without a lock: with more, results change from run to run. The "
        "text begins with a space, because `main` adds none and the model has seen one.",
    ]
    if hyper.activation.threshold > 0:
        parts += ["## Activation", relu_note(hyper)]
    parts += ["## Predictors", *_scores(hyper, predictors, dtype), "## Hot and cold neurons"]
    parts.append(
        "`activation/activation_<i>.pt` counts how often each neuron fired; a GPU build of "
        "PowerInfer decides by it which neurons to keep in GPU memory."
        if hot_cold
        else "No `activation/` folder: it was exported without `--activations`, so a GPU build of "
        "PowerInfer keeps the whole FFN on the CPU. A CPU build does not use these files."
    )
    parts += ["## Check it", "```\nsparsecast verify . --engine PATH_TO_POWERINFER_BUILD\n```"]
    return "\n\n".join(parts) + "\n"


def relu_note(hyper: Hyper) -> str:
    """What a FATReLU model becomes in the engine."""
    return RELU_NOTE.format(rule=hyper.activation, threshold=hyper.activation.threshold)


def predictor_share(hyper: Hyper, rank: int, weight_bytes: float = 2.0) -> float:
    """Bytes of one layer's predictor in f16 over its FFN's, at `weight_bytes` per FFN weight."""
    return 2 * rank * (hyper.hidden + hyper.ffn) / (weight_bytes * 3 * hyper.hidden * hyper.ffn)


def _scores(hyper: Hyper, predictors: PredictorSet, dtype: str) -> list[str]:
    ranks = [predictor.rank for predictor in predictors.layers]
    manifest = predictors.manifest
    if manifest is None:
        return [f"Ranks {ranks}. They came without scores; `sparsecast report` measures them."]
    lines = [
        "| layer | rank | recall | predicted sparsity | traffic |",
        "|---|---|---|---|---|",
    ]
    rows = []
    for rank, scores in zip(ranks, manifest.calibration, strict=True):
        recall, sparsity = scores["recall"], scores["predicted_sparsity"]
        rows.append((rank, recall, sparsity, predictor_share(hyper, rank) + 1 - sparsity))
    for i, (rank, recall, sparsity, traffic) in enumerate(rows):
        lines.append(f"| {i} | {rank} | {recall:.4f} | {sparsity:.4f} | {traffic:.4f} |")
    means = [fmean(column) for column in zip(*rows, strict=True)]
    lines.append(f"| mean | {means[0]:g} | {means[1]:.4f} | {means[2]:.4f} | {means[3]:.4f} |")
    text = [
        "\n".join(lines),
        "Measured on the calibration split; held-out scores are in `sparsecast report`. Traffic is "
        "bytes of FFN and predictor weights read per token over those of the dense FFN, with FFN "
        "weights in f16 and predictors in f16: predictor share + 1 - predicted sparsity; lower is "
        "better, 1 is dense.",
    ]
    if dtype == "f32":
        shares = fmean(predictor_share(hyper, rank, 10 / 3) for rank in ranks)
        text.append(
            f"Of the types in this file (gate and up f32, down f16, predictors f16) the mean "
            f"traffic is {shares + 1 - means[2]:.4f}."
        )
    return text

"""The bundle's README.md: what it is, its predictors' scores, and how to run it."""

from __future__ import annotations

from statistics import fmean

from sparsecast.export.hyper import Hyper
from sparsecast.export.traffic import Traffic
from sparsecast.predictors.checkpoint import PredictorSet

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


def model_card(
    file: str,
    model: str,
    hyper: Hyper,
    predictors: PredictorSet,
    *,
    dtype: str,
    traffic: Traffic | None,
    hot_cold: bool,
) -> str:
    """Markdown; `file` is the GGUF's name, `hot_cold` whether activation/ was written."""
    parts = [
        f"# {file.removesuffix('.powerinfer.gguf')} for PowerInfer",
        f"`{model}` ({hyper.layers} layers, hidden size {hyper.hidden}, FFN {hyper.ffn}) with one "
        f"activation predictor per layer, written by `sparsecast export` in {FORMATS[dtype]}. A "
        f"neuron is computed when its predictor's output is at least {predictors.threshold:g}.",
        "## Run it",
        f'```\nmain -m {file} -t 1 -n 64 --temp 0 --repeat-penalty 1.0 -p " ..."\n```',
        "`main` is PowerInfer's binary. One thread, because its CPU down projection adds the "
        "threads' partial sums without a lock: with more, results change from run to run. The "
        "text begins with a space, because `main` adds none and the model has seen one.",
    ]
    if hyper.activation.threshold > 0:
        parts += ["## Activation", relu_note(hyper)]
    parts += ["## Predictors", *_scores(predictors, traffic), "## Hot and cold neurons"]
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


def _scores(predictors: PredictorSet, traffic: Traffic | None) -> list[str]:
    manifest = predictors.manifest
    if manifest is None or traffic is None:
        ranks = [predictor.rank for predictor in predictors.layers]
        return [f"Ranks {ranks}. They came without scores; `sparsecast report` measures them."]
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

"""The README.md beside a GGUF for llama.cpp: what it is, where it differs, and how to run it."""

from __future__ import annotations

from sparsecast.export.to_gguf.plan import GGUF, GGUFPlan

FORMATS = {
    "f16": "f16",
    "f32": "f32",
    "q8_0": "q8_0",
    "q4_0": "q4_0 (the output matrix in q8_0)",
}


def gguf_card(plan: GGUFPlan) -> str:
    """Return the card as Markdown."""
    hparams = plan.hparams
    parts = [
        f"# {plan.file.removesuffix(GGUF)} for llama.cpp",
        f"`{plan.checkpoint.source}` ({hparams.layers} layers, hidden size {hparams.hidden}, FFN "
        f"{hparams.ffn}), written by `sparsecast export --format gguf` in {FORMATS[plan.dtype]}. "
        "llama.cpp's `llama` computes SiLU, so the file names the architecture `smallthinker`, "
        "whose experts compute ReLU: it has one expert, which is the model's FFN. It holds no "
        "predictors, and llama.cpp computes every neuron.",
        "## Run it",
        f'```\nllama-completion -m {plan.file} -n 64 --temp 0 -no-cnv -p "..."\n```',
    ]
    if notes := gguf_notes(plan):
        parts += ["## What differs from the model", *notes]
    return "\n\n".join(parts) + "\n"


def gguf_notes(plan: GGUFPlan) -> list[str]:
    """Say where llama.cpp computes something else than the model."""
    hparams, tokens = plan.hparams, plan.tokens
    notes = [] if plan.lost_threshold is None else [plan.lost_threshold]
    if hparams.overridden is not None:
        notes.append(
            f"The model's config says {hparams.overridden}; --activation-threshold 0 made it a "
            "ReLU model here, which is another: compare its perplexity before using it."
        )
    if hparams.window is not None:
        notes.append(
            f"The model attends to the last {hparams.window} tokens, llama.cpp's smallthinker to "
            f"all: the file's context is {hparams.context} tokens, within which both are the same."
        )
    notes += tokens.vocabulary.notes
    if tokens.vocabulary.differences:
        found = "; ".join(tokens.vocabulary.differences)
        notes.append(f"The model's tokenizer {found}; llama.cpp does not.")
    if tokens.other is not None:
        notes.append(
            f"Of a text llama.cpp makes other tokens than the model was trained on: of "
            f"{tokens.other}. It is right for token ids: where that matters, tokenize with the "
            "model's tokenizer and give llama-server ids."
        )
    return notes

"""The model card of a sparsified model: scores side by side, samples, how to load it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from sparsecast.collect.atomic import read_json, write_text
from sparsecast.collect.builtin import PACKAGES
from sparsecast.sparsify.measure import Score


class Sample(NamedTuple):
    prompt: str
    text: str


def _corpus(name: str) -> str:
    if name != "builtin":
        return f"`{name}`."
    return (
        "sources and docstrings of the Python standard library (PSF-2.0)\nand of these packages, "
        f"all under Apache, BSD, MIT or PSF licences:\n{', '.join(PACKAGES)}."
    )


def write_card(
    folder: Path, name: str, scores: Mapping[str, Score], samples: Sequence[Sample]
) -> None:
    """Write README.md into a model's folder; sparsify.json must be there already."""
    facts = read_json(folder / "sparsify.json", "what sparsify measured")
    reference = scores.get("SiLU original")
    rows = [
        f"| {row} | {s.sparsity:.2%} | {s.perplexity:.3f} | "
        + (f"{s.perplexity / reference.perplexity - 1:+.2%} |" if reference else "- |")
        for row, s in scores.items()
    ]
    quoted = "\n\n".join(
        f"Prompt `{s.prompt.strip()}`:\n\n```text\n{s.text.strip()}\n```" for s in samples
    )
    write_text(
        folder / "README.md",
        f"""# {name}

A ReLU-sparse LLaMA of {facts["parameters"] / 1e6:.1f}M parameters, trained by `sparsecast sparsify`
with ProSparse's recipe (arXiv 2402.13516): ReLU substitution, progressive L1 regularisation, and a
FATReLU threshold of {facts["threshold"]:g}.

| model | sparsity | held-out perplexity | against SiLU |
|---|---|---|---|
{chr(10).join(rows)}

Every row trained on {facts["tokens"] / 1e6:.0f}M tokens, from the same start, over the same
batches. Sparsity is the share of zeros in act(gate) * up, the mean over layers, on held-out
documents.

Text: {facts["corpus_tokens"] / 1e6:.1f}M tokens of {_corpus(facts["corpus"])}

## Load

`hidden_act` is `fatrelu`, which transformers does not know, so import sparsecast first:

```python
from sparsecast.collect.models import load_model

model, tokenizer = load_model("path/to/this/folder")
```

## Samples

Temperature 0.7, top-k 40, nothing picked by hand.

{quoted}
""",
    )

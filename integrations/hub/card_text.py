"""The card's text for people: what it is, how to use it, and its figures."""

from __future__ import annotations

import re
from collections.abc import Sequence

from sparsecast.integrations.hub.facts import Facts

TRAFFIC = (
    "FFN traffic: bytes of FFN and predictor weights read per token over those of the dense FFN in "
    "f16. Lower is better, 1 is dense. The exact path reads every gate and the rest only where it "
    "fires."
)


def new_text(facts: Facts, repo: str, base_model: str | None) -> str:
    """Return the text of a card for a folder that has none."""
    if facts.kind == "predictors":
        return _predictors(facts, repo, base_model)
    if facts.kind == "activations":
        return _activations(facts, repo, base_model)
    return f"# {repo.rpartition('/')[2]}\n\n{_model(facts, base_model).capitalize()}.\n"


def figures_section(facts: Facts, base_model: str | None) -> str:
    """Return the section that names the model and every measured number."""
    name = "base model" if facts.kind == "model" else "model"
    rows = [(name, _model(facts, base_model)), ("fingerprint", f"`{facts.fingerprint}`")]
    if facts.kind == "model" and base_model is None and facts.model is None:
        rows = rows[1:]
    if facts.fingerprint is None:
        rows = rows[:-1]
    rows += [("activation", f"`{facts.activation}`"), ("size", facts.shape)]
    parts = ["## Figures", _table(["", ""], rows), *facts.notes]
    if facts.measures:
        scores = [
            (
                measure.name,
                f"{measure.value:{'+.2%' if 'change' in measure.name else '.4f'}}",
                f"{measure.split} of {measure.corpus}",
            )
            for measure in facts.measures
        ]
        parts.append(_table(["score", "value", "measured on"], scores))
        if any(measure.type == "traffic" for measure in facts.measures):
            parts.append(TRAFFIC)
    return "\n\n".join(parts) + "\n"


def without_figures(text: str) -> str:
    """Return a card's text without the section of an earlier push."""
    return re.sub(r"\n## Figures\n\n\|  \|  \|\n.*?(?=\n## |\Z)", "", text, flags=re.DOTALL)


def _predictors(facts: Facts, repo: str, base_model: str | None) -> str:
    model = base_model or "PATH_TO_THE_MODEL"
    parts = [
        f"# {repo.rpartition('/')[2]}",
        f"One activation predictor per layer for {_model(facts, base_model)}, trained by "
        "`sparsecast train`. Before an FFN runs, its predictor says which neurons will fire; "
        "PowerInfer and sparsecast compute those alone. Each `model_<i>.pt` holds two matrices in "
        "the layout of PowerInfer's predictors.",
        "## Use",
        f"```bash\npip install sparsecast\n"
        f"sparsecast evaluate --model {model} --predictors {repo}\n"
        f"sparsecast export --model {model} --predictors {repo} --out bundle\n```",
        f"```python\nfrom sparsecast.kernels.in_models.sparsify import sparsify_model\n\n"
        f'sparsify_model(model, "{repo}")\n```',
    ]
    if facts.layers:
        names = ("rank", "recall", "predicted_sparsity", "traffic")
        rows = [
            (str(i), *(_cell(name, row[name]) for name in names))
            for i, row in enumerate(facts.layers)
        ]
        heads = ["layer", "rank", "recall", "predicted sparsity", "FFN traffic"]
        parts += ["## Layers", "Measured on the calibration split.", _table(heads, rows)]
    return "\n\n".join(parts)


def _activations(facts: Facts, repo: str, base_model: str | None) -> str:
    rows = [
        (f"{row['layer']:g}", *(f"{row[name]:.4f}" for name in ("true_sparsity", "p5", "p95")))
        for row in facts.layers
    ]
    return "\n\n".join(
        [
            f"# {repo.rpartition('/')[2]}",
            f"Which FFN neurons fire in {_model(facts, base_model)}, recorded by `sparsecast "
            "collect`: in `stats.safetensors`, for every layer, on how many tokens each neuron "
            "fired and how many neurons fired on each token.",
            f"```bash\npip install sparsecast\nsparsecast inspect {repo}\n```",
            "## Layers",
            "True sparsity of single tokens: mean, and 5th and 95th percentile.",
            _table(["layer", "mean", "p5", "p95"], rows),
        ]
    )


def _model(facts: Facts, base_model: str | None) -> str:
    if base_model is not None:
        return f"[{base_model}](https://huggingface.co/{base_model})"
    return "a model without a published name" if facts.model is None else f"`{facts.model}`"


def _cell(name: str, value: float) -> str:
    return f"{value:g}" if name == "rank" else f"{value:.4f}"


def _table(heads: list[str], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in lines
    )

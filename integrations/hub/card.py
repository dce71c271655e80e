"""The model card: metadata that the Hub understands, in front of a text for people.

A README.md in the folder keeps its text; what it says in its own metadata wins over what is
derived here, but for the options of this command.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from sparsecast.core.errors import InputError, reason_of
from sparsecast.core.text.corpus_files import SUFFIXES
from sparsecast.integrations.hub.card_text import figures_section, new_text, without_figures
from sparsecast.integrations.hub.facts import Facts, Measure
from sparsecast.integrations.hub.public import is_local

TAGS = {
    "activations": ["activations"],
    "predictors": ["powerinfer", "predictors"],
    "bundle": ["powerinfer", "gguf", "predictors"],
    "model": [],
}
"""Tags of each kind, besides those of all."""
RELATIONS = {"predictors": "adapter", "bundle": "quantized", "model": "finetune"}
"""What each kind is to its base model, in the Hub's words: `adapter` for weights that work beside
the model's own, `quantized` for its weights in another format. Activations are none of these."""


@dataclass
class CardInputs:
    """What goes into a card; every name in it may be published."""

    facts: Facts
    repo: str
    base_model: str | None
    datasets: Sequence[str]
    """Hub ids of those texts behind it, or of its scores, that are on the Hub."""
    license: str | None
    text: str | None
    """The folder's README.md; None if there is none."""
    explicit: Sequence[str] = field(default_factory=tuple)
    """Metadata that the user gave as options, which win over the README's own."""
    loads_in_transformers: bool = False


def build_card(inputs: CardInputs, where: Path) -> ModelCard:
    """Build the card.

    Args:
        where: The folder's README.md, for the error.

    Raises:
        InputError: The README's own metadata is no metadata.
    """
    text = (
        inputs.text
        if inputs.text is not None
        else new_text(inputs.facts, inputs.repo, inputs.base_model)
    )
    if not text.lstrip().startswith("---"):
        text = f"---\n{{}}\n---\n{text}"
    try:
        card = ModelCard(text)
    except (ValueError, yaml.YAMLError, TypeError) as error:
        raise InputError(
            f"{where}: its metadata between the lines --- cannot be read ({reason_of(error)}); "
            "correct or remove it"
        ) from error
    figures = figures_section(inputs.facts, inputs.base_model)
    card.text = f"{without_figures(card.text).rstrip()}\n\n{figures}"
    card.data = _merged(card.data, _metadata(inputs), inputs.explicit)
    return card


def metadata_of(data: Any) -> dict[str, Any]:
    """Return a card's metadata as the Hub reads it."""
    return dict(data.to_dict())


def _metadata(inputs: CardInputs) -> ModelCardData:
    facts, kind = inputs.facts, inputs.facts.kind
    own = map(dataset_id, facts.corpora)
    rule = facts.activation.partition("(")[0]
    fields: dict[str, Any] = {
        "license": inputs.license,
        "library_name": _library(inputs),
        "pipeline_tag": "text-generation" if kind in ("model", "bundle") else None,
        "tags": ["sparsecast", "activation-sparsity", rule, *TAGS[kind]],
        "datasets": [name for name in own if name in inputs.datasets] or None,
    }
    if inputs.base_model is not None and kind in RELATIONS:
        fields |= {"base_model": inputs.base_model, "base_model_relation": RELATIONS[kind]}
    if facts.measures:
        fields |= {
            "model_name": inputs.repo.rpartition("/")[2],
            "eval_results": [_result(measure, inputs.datasets) for measure in facts.measures],
        }
    return ModelCardData(**{key: value for key, value in fields.items() if value is not None})


def _library(inputs: CardInputs) -> str:
    """Return what loads it: the Hub shows that library's code beside the card."""
    if inputs.facts.kind == "bundle":
        return "powerinfer"
    return "transformers" if inputs.loads_in_transformers else "sparsecast"


def _merged(theirs: Any, ours: ModelCardData, explicit: Sequence[str]) -> ModelCardData:
    """Merge metadata: theirs wins, tags are joined, scores are ours."""
    old, new = metadata_of(theirs), metadata_of(ours)
    fields = new | {key: value for key, value in old.items() if key not in explicit}
    tags = old.get("tags") or []
    fields["tags"] = [*new["tags"], *([tags] if isinstance(tags, str) else tags)]
    if "model-index" in new:
        fields["model-index"] = new["model-index"]
    if fields.get("base_model") != new.get("base_model") and "base_model_relation" not in old:
        fields.pop("base_model_relation", None)
    return ModelCardData(**fields)


def _result(measure: Measure, datasets: Sequence[str]) -> EvalResult:
    name = dataset_id(measure.corpus)
    return EvalResult(
        task_type="text-generation",
        task_name="Text Generation",
        dataset_type=name if name and name in datasets else measure.corpus,
        dataset_name=measure.corpus,
        dataset_split=measure.split,
        metric_type=measure.type,
        metric_name=measure.name,
        metric_value=round(measure.value, 6),
    )


def dataset_id(corpus: str) -> str | None:
    """Return the hub id of a corpus; None for a file, a folder or the builtin text."""
    name = corpus.partition("@")[0].partition(":")[0]
    local = "#" in name or Path(name).suffix.lower() in SUFFIXES or is_local(corpus)
    if local or name in ("builtin", "-", ""):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name

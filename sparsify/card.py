"""Write the model card of a sparse model: scores, text samples, and how to load it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import starmap, zip_longest
from pathlib import Path
from statistics import median
from typing import Any

from sparsecast.core.files import read_json, write_text
from sparsecast.core.models.families import FAMILIES
from sparsecast.core.text.builtin import PACKAGES
from sparsecast.sparsify.figure import FIGURE
from sparsecast.sparsify.measure import Score
from sparsecast.sparsify.samples import Sample
from sparsecast.sparsify.training.curve_table import CURVES, TENSORBOARD


def write_card(
    folder: Path,
    name: str,
    scores: Mapping[str, Score],
    samples: Sequence[Sample],
    before: Sequence[Sample] = (),
) -> None:
    """Write README.md into a model's folder, which must contain sparsify.json.

    Args:
        before: What the original made of the prompts of `samples`; empty if it was not trained.
    """
    facts = read_json(folder / "sparsify.json", "what sparsify measured")
    original = next((row for row in scores if row.endswith(" original")), None)
    rows = [_row(row, s, scores[original] if original else None) for row, s in scores.items()]
    quoted = "\n\n".join(starmap(_sample, zip_longest(samples, before)))
    write_text(
        folder / "README.md",
        f"""# {name}

A ReLU-sparse {_FAMILIES.get(facts["model_type"], facts["model_type"])} of \
{count(facts["parameters"])} parameters, trained by `sparsecast sparsify`
{_recipe(facts)}.

| model | sparsity | of layers: min / median / max | dead neurons | held-out perplexity | \
against {original.split()[0] if original else "original"} |
|---|---|---|---|---|---|
{chr(10).join(rows)}

Every row trained on {count(facts["tokens"])} tokens, from the same start, over the same
batches. Sparsity is the share of zeros in the input of the down projection, the mean over layers,
on held-out documents; a dead neuron fires for none of their tokens. `sparsify.json` has both for
every layer.{_fine_tuning(facts)}

Text: {count(facts["corpus_tokens"])} tokens of {_corpus(facts["corpus"])}

{_curves(folder)}## Load

{_loading(facts)}

## Samples

Temperature 0.7, top-k 40, nothing picked by hand.

{quoted}
""",
    )


def _row(name: str, score: Score, original: Score | None) -> str:
    change = f"{score.perplexity / original.perplexity - 1:+.2%}" if original else "-"
    layers = score.layer_sparsity
    spread = " / ".join(f"{pick(layers):.2%}" for pick in (min, median, max))
    return (
        f"| {name} | {score.sparsity:.2%} | {spread} | {sum(score.dead_neurons):,} | "
        f"{score.perplexity:.3f} | {change} |"
    )


_FAMILIES = {"llama": "LLaMA", "opt": "OPT", "falcon": "Falcon"}


def count(number: int) -> str:
    """Format a number of tokens or parameters, such as 6.8M."""
    return f"{number / 1e6:,.1f}M" if number >= 1e6 else f"{number:,}"


def _curves(folder: Path) -> str:
    if not (folder / CURVES / FIGURE).is_file():
        return ""
    return f"""## Curves

![loss, lambda and sparsity over the tokens of the training]({CURVES}/{FIGURE})

Behind the figure: a CSV file per training in `{CURVES}`, and the same for
`tensorboard --logdir {CURVES}/{TENSORBOARD}`.

"""


def _corpus(name: str) -> str:
    if name != "builtin":
        return f"`{name}`."
    return (
        "sources and docstrings of the Python standard library (PSF-2.0)\nand of these packages, "
        f"all under Apache, BSD, MIT or PSF licenses:\n{', '.join(PACKAGES)}."
    )


def _fine_tuning(facts: Mapping[str, Any]) -> str:
    tuned = facts.get("fine_tuning")
    if tuned is None:
        return ""
    answers = tuned["answer_perplexity"]
    return (
        f"\n\nThe last two rows were then fine-tuned on {count(tuned['tokens'])} tokens of chats, "
        f"`{tuned['corpus']}`,\nwith the loss on the assistant's answers alone. The perplexity of "
        f"held-out answers was\n{answers['before']:.3f} before, {answers['after']:.3f} after, and "
        f"is {answers['saved']:.3f} in the model as saved."
    )


def _recipe(facts: Mapping[str, Any]) -> str:
    if facts.get("target_sparsity") is None:
        return (
            "with ProSparse's recipe (arXiv 2402.13516): ReLU substitution, progressive L1 "
            f"regularization, and\n{_shift(facts)}"
        )
    bound, increase = "", facts["max_perplexity_increase"]
    if increase is not None:
        allowed = f"at most {increase:.2%} above that of the dense start"
        bound = f", while calibration perplexity was\n{allowed}"
    return (
        "with a FATReLU threshold (arXiv 2402.13516) that rose during training towards a sparsity "
        f"of\n{facts['target_sparsity']:.2%}{bound}.\n{_threshold(facts)}"
    )


def _threshold(facts: Mapping[str, Any]) -> str:
    if facts["activation"] == "fatrelu":
        return f"The one it is saved with, {facts['threshold']:g}, was chosen on calibration text"
    relu, *others = facts["calibration_sweep"]
    bound = facts["perplexity_bound"]
    if bound is not None and relu["perplexity"] > bound:
        why = "plain ReLU alone costs more perplexity than was allowed"
    elif others:
        why = "every one that was tried costs more perplexity than was allowed"
    else:
        why = "plain ReLU is as sparse"
    return f"It is saved without one: {why}"


def _shift(facts: Mapping[str, Any]) -> str:
    if facts["activation"] == "fatrelu":
        return f"a FATReLU threshold of {facts['threshold']:g}"
    if facts["activation"] == "drelu":
        return "ReLU on gate and up, which have no threshold to shift"
    return "no FATReLU threshold: every one that was tried costs more perplexity than was allowed"


def _loading(facts: Mapping[str, Any]) -> str:
    field, act = FAMILIES[facts["model_type"]].act_key, facts["activation"]
    if act in _KNOWN:
        return (
            f"`{field}` is `{act}`: transformers loads this model by itself, and sparsecast by\n\n"
            + _BY_SPARSECAST
        )
    return (
        f"`{field}` is `{act}`, which transformers does not know: its own loader stops with a\n"
        "KeyError, unless sparsecast is installed and imported first:\n\n"
        f"{_BY_TRANSFORMERS}\n\nOr load it as the stages of sparsecast do:\n\n{_BY_SPARSECAST}"
    )


_KNOWN = ("relu", "relu2")
"""The activations that transformers has."""
_BY_SPARSECAST = """```python
from sparsecast.core.models.loading import load_model

model, tokenizer = load_model("path/to/this/folder")
```"""
_BY_TRANSFORMERS = """```python
import sparsecast.integrations.transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```"""


def _sample(sample: Sample, before: Sample | None) -> str:
    begun, goes_on = "The beginning of a held-out document", "goes on"
    if sample.chat:
        begun, goes_on = "What the user says in a held-out chat", "answers"
    parts = [f"{begun}:", _fenced(sample.prompt)]
    if before is not None:
        parts += [f"how the original {goes_on} after as many tokens:", _fenced(before.text)]
    return "\n\n".join([*parts, f"and how the model {goes_on}:", _fenced(sample.text)])


def _fenced(text: str) -> str:
    """Put text into a Markdown fence that is longer than any in the text."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text.strip()}\n{fence}"

"""Save a sparse model with its tokenizer, and check that both load as they were measured.

The tokenizer's files are copied and compared before training starts, so that an unusable copy is
found in seconds rather than days.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from math import isclose
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from sparsecast.core.errors import InputError
from sparsecast.core.models.activations import ActivationRule
from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.core.models.families import activation_rule, family_of
from sparsecast.core.models.loading import load_model
from sparsecast.core.text.tokens import TokenBatch, encode
from sparsecast.core.tokenizers.loading import load_tokenizer
from sparsecast.sparsify.measure import Score, score

_GEMMA = {"hidden_act", "hidden_activation"}
"""Published Gemma configs have both, and which one counts depends on the program that reads it."""


def set_config_activation(config: PreTrainedConfig, rule: ActivationRule) -> None:
    """Write the activation into the config field that the model's family uses."""
    key = family_of(config, "model").act_key
    also = {name for name in _GEMMA if key in _GEMMA and getattr(config, name, None) is not None}
    for name in {key} | also:
        setattr(config, name, rule.name)
    if rule.name == "fatrelu":
        config.hidden_act_param = rule.threshold
    elif hasattr(config, "hidden_act_param"):
        del config.hidden_act_param


def check_kept(
    tokenizer: Tokenizer, config: PreTrainedConfig, folder: Path, texts: Iterable[str]
) -> None:
    """Check before training that config and tokenizer load again unchanged.

    Args:
        config: Config with a sparse activation. It is written to `folder`, where it decides the
            tokenizer's class if the tokenizer's files do not.
        texts: Texts that must get the same ids.

    Raises:
        InputError: The config or the tokenizer changes.
    """
    config.save_pretrained(folder)
    checkpoint = Checkpoint(str(folder))
    where = tokenizer.name_or_path
    found, meant = (activation_rule(c, where) for c in (checkpoint.config, config))
    if found != meant:
        raise InputError(f"{where}: the sparse config would be read as {found}, not as {meant}")
    if different := tokenizer_differences(tokenizer, load_tokenizer(checkpoint), texts):
        raise InputError(
            f"{where}: a copy of this tokenizer's files gives {different}; load it and save it "
            "with save_pretrained beside the weights first"
        )


def tokenizer_differences(a: Tokenizer, b: Tokenizer, texts: Iterable[str]) -> str | None:
    """Describe the first difference between two tokenizers; None if there is none."""
    pairs: dict[str, tuple[Any, Any]] = {
        "another number of tokens": (len(a), len(b)),
        "other special tokens": (a.special_tokens_map, b.special_tokens_map),
        "other added tokens": (a.get_added_vocab(), b.get_added_vocab()),
        "another chat template": (a.chat_template, b.chat_template),
    }
    for what, (mine, other) in pairs.items():
        if mine != other:
            return what
    for text in (" ".join(a.all_special_tokens), *texts):
        limit = len(text) + 1
        if (
            encode(a, text, limit) != encode(b, text, limit)
            or a(text)["input_ids"] != (b(text)["input_ids"])
        ):
            return f"other ids for the text that begins {text[:40]!r}"
    return None


def write_model(
    model: Any, dtype: torch.dtype, rule: ActivationRule, kept: Path, folder: Path
) -> None:
    """Convert a model to `dtype` in place and save it with the files of `copies.keep_files`."""
    set_config_activation(model.config, rule)
    # transformers refuses to write some published generation_config.json files.
    model.generation_config = GenerationConfig.from_model_config(model.config)
    model.to(dtype).save_pretrained(folder)
    for path in folder.glob("*.safetensors"):  # safetensors makes them private
        path.chmod((folder / "config.json").stat().st_mode)
    shutil.copytree(kept, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("config.json"))


def check_saved(
    folder: Path,
    tokenizer: Tokenizer,
    batch: TokenBatch,
    expected: Score,
    texts: Sequence[str],
    device: torch.device,
) -> None:
    """Load the saved model as every stage does and compare it with the measured one.

    Args:
        expected: Score of the saved weights on `batch`, in float32.

    Raises:
        RuntimeError: The loaded model or tokenizer differs.
    """
    try:
        model, again = load_model(str(folder), device=str(device), dtype="float32")
    except InputError as error:
        raise RuntimeError(f"the saved model cannot be loaded again ({error})") from error
    if different := tokenizer_differences(tokenizer, again, texts):
        raise RuntimeError(f"the saved tokenizer gives {different}")
    found = score(model, [batch])
    if not isclose(found.sparsity, expected.sparsity, abs_tol=1e-4) or not isclose(
        found.perplexity, expected.perplexity, rel_tol=1e-3
    ):
        raise RuntimeError(
            f"the saved model is not the one that was measured: sparsity {found.sparsity:.2%} and "
            f"perplexity {found.perplexity:.3f} on a batch, expected {expected.sparsity:.2%} and "
            f"{expected.perplexity:.3f}"
        )

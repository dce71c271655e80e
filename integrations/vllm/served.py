"""Which activation a model is served with, and where it is computed.

ProSparse's instructions for vLLM set the environment variable ACT_INFO, to `relu` or to
`fatrelu_T` with FATReLU's threshold T. Here the config decides, and ACT_INFO overrides it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from sparsecast.core.errors import InputError
from sparsecast.core.models.activations import ActivationRule
from sparsecast.core.models.families import LARGEST_THRESHOLD
from sparsecast.core.options import short_repr

SPARSE = ("relu", "fatrelu", "drelu", "relu2")
OPTION = "sparse_ffn"
"""The key in vLLM's --additional-config."""
WAYS = ("dense", "exact")


def served_rule(
    config: Any, dtype: torch.dtype, environment: Mapping[str, str] = os.environ
) -> tuple[ActivationRule | None, list[str]]:
    """Return the activation to serve a model with, and warnings.

    Args:
        config: A LLaMA's or Mistral's, with `hidden_act` and for FATReLU `hidden_act_param`.
        dtype: The model's, in which a threshold must be finite.
        environment: Where ACT_INFO is looked up.

    Returns:
        None for an activation that is not sparse: the model is vLLM's business.

    Raises:
        InputError: FATReLU without a usable threshold, or an ACT_INFO that is no activation.
    """
    where = str(getattr(config, "name_or_path", "") or "config.json")
    rule: ActivationRule | None
    if value := environment.get("ACT_INFO", "").strip():
        rule = parse_act_info(value)
        warnings = _contradiction(config, rule, value, where)
    else:
        rule = config_rule(config, where)
        warnings = _lost_threshold(config, where)
    if rule is not None and not torch.tensor(rule.threshold).to(dtype).isfinite():
        raise InputError(
            f"{where}: FATReLU's threshold {rule.threshold:g} is infinite in "
            f"{str(dtype).removeprefix('torch.')}, so nothing would ever fire; expected at most "
            f"{torch.finfo(dtype).max:g}"
        )
    return rule, warnings


def parse_act_info(value: str) -> ActivationRule:
    """Return the activation that ACT_INFO names: relu, or fatrelu_T.

    Raises:
        InputError: Anything else, or a threshold that is no number from 0.
    """
    name, _, number = value.partition("_")
    if value == "relu":
        return ActivationRule("relu")
    try:
        threshold = float(number)
    except ValueError:
        threshold = -1.0
    if name != "fatrelu" or not 0 <= threshold <= LARGEST_THRESHOLD:
        raise InputError(
            f"ACT_INFO: got {short_repr(value)}, expected relu, or fatrelu_ and a threshold from "
            "0, such as fatrelu_0.01; unset it to serve the activation that config.json names"
        )
    return ActivationRule("fatrelu", threshold)


def config_rule(config: Any, where: str) -> ActivationRule | None:
    """Return the activation that a config names; None if it is not sparse.

    Raises:
        InputError: FATReLU without a usable threshold.
    """
    name = getattr(config, "hidden_act", None)
    if name not in SPARSE:
        return None
    if name != "fatrelu":
        return ActivationRule(name)
    param = getattr(config, "hidden_act_param", None)
    number = isinstance(param, int | float) and not isinstance(param, bool)
    if param is None or not number or not 0 <= param <= LARGEST_THRESHOLD:
        raise InputError(
            f"{where}: hidden_act is 'fatrelu' but hidden_act_param is {short_repr(param)}, "
            f"expected a number from 0 to {LARGEST_THRESHOLD:.3g}; give the threshold in the "
            f"environment, such as ACT_INFO=fatrelu_0.01"
        )
    return ActivationRule("fatrelu", float(param))


def _contradiction(config: Any, rule: ActivationRule, value: str, where: str) -> list[str]:
    try:
        named = config_rule(config, where)
    except InputError:  # a threshold that the config has lost, which ACT_INFO gives
        return []
    if named == rule:
        return []
    said = short_repr(getattr(config, "hidden_act", None)) if named is None else str(named)
    return [
        f"{where}: config.json says {said}, but ACT_INFO={value} is set; serving {rule}. Unset "
        f"ACT_INFO to serve what config.json says"
    ]


def _lost_threshold(config: Any, where: str) -> list[str]:
    if getattr(config, "hidden_act", None) != "relu" or not hasattr(config, "scale_emb"):
        return []
    return [
        f"{where}: hidden_act is 'relu' beside fields of MiniCPM (scale_emb); the conversion to "
        f"LLaMA format loses FATReLU's threshold. MiniCPM-S-1B has 0.03: set "
        f"ACT_INFO=fatrelu_0.03"
    ]


def write_rule(config: Any, rule: ActivationRule) -> None:
    """Write what is served into the config: vLLM's cache of compiled graphs goes by it."""
    config.hidden_act = rule.name
    if rule.name == "fatrelu":
        config.hidden_act_param = rule.threshold
    elif hasattr(config, "hidden_act_param"):
        del config.hidden_act_param


def wanted_way(additional_config: Any) -> str:
    """Return how FFNs are computed, dense or exact, from vLLM's --additional-config.

    Raises:
        InputError: Another value.
    """
    found = additional_config.get(OPTION) if isinstance(additional_config, dict) else None
    if found is not None and found not in WAYS:
        raise InputError(
            f"--additional-config: {OPTION} is {short_repr(found)}, expected one of "
            f"{', '.join(WAYS)}"
        )
    return found or "dense"

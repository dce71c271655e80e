"""What vLLM is to serve: the config, ACT_INFO, and what vLLM is told of us. Without vLLM."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sparsecast.core.errors import InputError
from sparsecast.core.models.activations import ActivationRule
from sparsecast.integrations.vllm.served import served_rule, wanted_way, write_rule

FATRELU = {"hidden_act": "fatrelu", "hidden_act_param": 0.0741}


def served(fields: dict, act_info: str | None = None, dtype: torch.dtype = torch.float32):
    config = SimpleNamespace(name_or_path="m", **fields)
    return served_rule(config, dtype, {} if act_info is None else {"ACT_INFO": act_info})


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({"hidden_act": "relu"}, ActivationRule("relu")),
        ({"hidden_act": "relu2"}, ActivationRule("relu2")),
        ({"hidden_act": "drelu"}, ActivationRule("drelu")),
        ({"hidden_act": "drelu", "hidden_act_param": 0.3}, ActivationRule("drelu")),
        (FATRELU, ActivationRule("fatrelu", 0.0741)),
        ({"hidden_act": "fatrelu", "hidden_act_param": 0}, ActivationRule("fatrelu", 0.0)),
        ({"hidden_act": "silu"}, None),
        ({"hidden_act": None}, None),
        ({}, None),
    ],
)
def test_the_config_decides(fields, rule):
    assert served(fields) == (rule, [])
    assert served(fields, "") == (rule, [])


@pytest.mark.parametrize("param", [None, "0.1", True, -0.1, float("nan"), 1e39])
def test_fatrelu_without_a_threshold_is_refused(param):
    fields = {"hidden_act": "fatrelu", "hidden_act_param": param}
    with pytest.raises(InputError, match="^m: hidden_act is 'fatrelu' but hidden_act_param is"):
        served(fields)
    assert served(fields, "fatrelu_0.01") == (ActivationRule("fatrelu", 0.01), [])


@pytest.mark.parametrize(
    ("act_info", "rule"),
    [
        ("relu", ActivationRule("relu")),
        (" relu\n", ActivationRule("relu")),
        ("fatrelu_0.01", ActivationRule("fatrelu", 0.01)),
        ("fatrelu_1e-2", ActivationRule("fatrelu", 0.01)),
        ("fatrelu_0", ActivationRule("fatrelu", 0.0)),
    ],
)
def test_act_info_is_prosparses(act_info, rule):
    assert served({"hidden_act": rule.name, "hidden_act_param": rule.threshold}, act_info) == (
        rule,
        [],
    )


@pytest.mark.parametrize(
    "act_info",
    ["silu", "fatrelu", "fatrelu_", "fatrelu_x", "fatrelu_-1", "fatrelu_nan", "fatrelu_inf"],
)
def test_an_act_info_that_names_no_activation_is_refused(act_info):
    with pytest.raises(InputError, match=f"^ACT_INFO: got '{act_info}', expected relu, or fatrel"):
        served(FATRELU, act_info)


@pytest.mark.parametrize(
    ("fields", "act_info", "said"),
    [
        (FATRELU, "relu", r"fatrelu\(0.0741\)"),
        (FATRELU, "fatrelu_0.01", r"fatrelu\(0.0741\)"),
        ({"hidden_act": "relu"}, "fatrelu_0.01", "relu"),
        ({"hidden_act": "drelu"}, "relu", "drelu"),
        ({"hidden_act": "silu"}, "relu", "'silu'"),
    ],
)
def test_act_info_wins_with_a_warning(fields, act_info, said):
    rule, (warning,) = served(fields, act_info)
    assert rule is not None
    assert rule.name == act_info.partition("_")[0]
    expected = f"m: config.json says {said}, but ACT_INFO={act_info} is set; serving {rule.name}"
    assert re.match(expected, warning)


def test_a_minicpm_that_lost_its_threshold_is_named():
    rule, (warning,) = served({"hidden_act": "relu", "scale_emb": 12})
    assert rule == ActivationRule("relu")
    assert "ACT_INFO=fatrelu_0.03" in warning
    assert served({"hidden_act": "fatrelu", "hidden_act_param": 0.03, "scale_emb": 12})[1] == []


def test_a_threshold_that_is_infinite_in_the_dtype_is_refused():
    fields = {"hidden_act": "fatrelu", "hidden_act_param": 1e6}
    assert served(fields)[0] == ActivationRule("fatrelu", 1e6)
    with pytest.raises(InputError, match="threshold 1e\\+06 is infinite in float16"):
        served(fields, dtype=torch.float16)


def test_what_is_served_is_written_into_the_config():
    """Two thresholds, or two activations, are two graphs in vLLM's cache."""
    config = SimpleNamespace(**FATRELU)
    write_rule(config, ActivationRule("fatrelu", 0.5))
    assert vars(config) == {"hidden_act": "fatrelu", "hidden_act_param": 0.5}
    write_rule(config, ActivationRule("relu"))
    assert vars(config) == {"hidden_act": "relu"}


@pytest.mark.parametrize(
    ("given", "way"), [({}, "dense"), (None, "dense"), ({"sparse_ffn": "exact"}, "exact")]
)
def test_the_way_is_an_additional_config(given, way):
    assert wanted_way(given) == way


@pytest.mark.parametrize("value", ["predicted", True, {}])
def test_another_way_is_refused(value):
    with pytest.raises(InputError, match="^--additional-config: sparse_ffn is .*dense, exact"):
        wanted_way({"sparse_ffn": value})


def test_the_plugin_is_an_entry_point_of_vllms():
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    (point,) = project["entry-points"]["vllm.general_plugins"].values()
    module, _, name = point.partition(":")
    assert callable(getattr(import_module(module), name))


REGISTER = """
import sys, types
vllm = types.ModuleType("vllm")
rows = {}
class ModelRegistry:
    register_model = staticmethod(rows.__setitem__)
vllm.ModelRegistry = ModelRegistry
sys.modules["vllm"] = vllm
before = set(sys.modules)
from sparsecast.integrations.vllm import plugin
print(sorted(name for name in set(sys.modules) - before if "." in name))
print("torch" in sys.modules, "transformers" in sys.modules)
plugin.register()
plugin.register()
print(rows == plugin.CLASSES)
print(sorted(name for name in sys.modules if name.startswith("sparsecast.")))
from transformers import AutoConfig
config = AutoConfig.for_model("sparsellama").from_dict({"hidden_act": "fatrelu"})
print(type(config).__name__, config.model_type, config.architectures, config.hidden_act)
"""


def test_registering_is_cheap_and_repeatable():
    """Finding the plug-in imports nothing, and registering nothing but what vLLM has."""
    done = subprocess.run(
        [sys.executable, "-c", REGISTER], capture_output=True, text=True, check=True
    )
    found, light, rows, ours, config = done.stdout.splitlines()
    assert found == "['sparsecast.integrations', 'sparsecast.integrations.vllm', " + (
        "'sparsecast.integrations.vllm.plugin']"
    )
    assert light == "False False"
    assert rows == "True"
    assert "core" not in ours
    assert "sparsecast.integrations.sparsellama" in ours
    assert config == "LlamaConfig llama ['LlamaForCausalLM'] fatrelu"

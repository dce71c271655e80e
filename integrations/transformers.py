"""Sparse checkpoints in transformers itself: importing this module is enough.

    import sparsecast.integrations.transformers
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("FOLDER")

transformers builds an activation from its name alone (`ACT2FN[config.hidden_act]`), so FATReLU does
not see `hidden_act_param`, and dReLU does not see up. Both are completed while the model is built:
torch calls a hook of ours whenever a module gets a child
(`register_module_module_registration_hook`). When a model gets its list of decoder layers, their
FATReLUs get the config's threshold, and up gets the other ReLU of dReLU. Nothing of transformers is
replaced. A model without these activations is built as before. In a family without a row in
core/models/families.py, in a mixture with dReLU, and without a usable `hidden_act_param` the
activations refuse to run.

`sparsellama`, ProSparse's own type, is read as the LLaMA that it is (sparsellama.py).
"""

from __future__ import annotations

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import PreTrainedConfig, PreTrainedModel

from sparsecast.core.models.activations import DReLU, FATReLU, relu_output
from sparsecast.core.models.families import FAMILIES, LARGEST_THRESHOLD, Family
from sparsecast.integrations import sparsellama


def _complete(layer: nn.Module, family: Family, config: PreTrainedConfig) -> None:
    """Give the FATReLU or dReLU of one decoder layer what its name does not say.

    Without a usable `hidden_act_param`, and in experts, whose up is no module of its own, they stay
    as they are, which is to refuse to run: `load_model` can still complete them.
    """
    for act in layer.modules():
        if isinstance(act, FATReLU) and act.threshold is None:
            act.threshold = _threshold(config)
        elif isinstance(act, DReLU) and not act.on_up and family.experts is None:
            layer.get_submodule(family.up).register_forward_hook(relu_output)
            act.on_up = True


def _threshold(config: PreTrainedConfig) -> float | None:
    param = getattr(config, "hidden_act_param", None)
    if not isinstance(param, int | float) or isinstance(param, bool):
        return None
    return float(param) if 0 <= param <= LARGEST_THRESHOLD else None


_UP = frozenset(family.up.rpartition(".")[2] for family in FAMILIES.values())


def _on_registration(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    """Complete the decoder layers of a model that is being built.

    What quantization puts in the place of up gets the hook that up had.
    """
    if isinstance(child, nn.ModuleList) and isinstance(parent, PreTrainedModel):
        family = FAMILIES.get(getattr(parent.config, "model_type", None) or "")
        if family is not None and name == family.layers.rpartition(".")[2]:
            for layer in child:
                _complete(layer, family, parent.config)
    elif name in _UP and child is not None:
        on_up = (act.on_up for act in parent.children() if isinstance(act, DReLU))
        if any(on_up) and relu_output not in child._forward_hooks.values():
            child.register_forward_hook(relu_output)


register_module_module_registration_hook(_on_registration)
sparsellama.register()

"""The entry point of vLLM's plug-ins: tell vLLM which classes serve LLaMA and Mistral.

vLLM calls `register` in every process that it starts: the front end, the engine, the workers, and
one that only looks at a model's class. So this module imports nothing, and `register` only what
vLLM has imported already; a model's class is imported when such a model is served.
"""

from __future__ import annotations

CLASSES = {
    "LlamaForCausalLM": "sparsecast.integrations.vllm.models:SparseLlamaForCausalLM",
    "MistralForCausalLM": "sparsecast.integrations.vllm.models:SparseMistralForCausalLM",
}
"""Architecture in config.json to the class that replaces vLLM's; with SiLU both are the same."""


def register() -> None:
    """Register the classes and the type sparsellama; may be called any number of times."""
    from vllm import ModelRegistry

    from sparsecast.integrations import sparsellama

    for architecture, place in CLASSES.items():
        ModelRegistry.register_model(architecture, place)
    sparsellama.register()

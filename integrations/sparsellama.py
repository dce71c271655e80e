"""ProSparse's type sparsellama, read by transformers' own LlamaConfig; its remote code is not run.

This imports nothing else of sparsecast, so that a process that only registers pays for nothing.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, LlamaConfig

MODEL_TYPE = "sparsellama"


class SparseLlamaConfig(LlamaConfig):  # type: ignore[no-untyped-call]
    """Reads a config.json of the type sparsellama as a `LlamaConfig`; it has no instances."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build a `LlamaConfig`, or what `LlamaConfig.from_dict` gives for these arguments."""
        fields = {name: value for name, value in config_dict.items() if name != "auto_map"}
        fields |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
        return LlamaConfig.from_dict(fields, **kwargs)


def register() -> None:
    """Let transformers read such a config; may be called again."""
    AutoConfig.register(MODEL_TYPE, SparseLlamaConfig, exist_ok=True)

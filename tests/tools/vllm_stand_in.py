"""A module `vllm` that behaves like vLLM where `bench vllm` touches it, and tells what it got.

Each process adds a line of JSON to $STAND_IN_TOLD. $STAND_IN_FAILS is the log of one that fails;
$STAND_IN_STARTS=1 leaves a process of its own behind.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

__version__ = "0.0.stand-in"
SamplingParams = SimpleNamespace


class LLM:
    def __init__(self, model: str, **options: object) -> None:
        self.calls: list[list[int]] = []
        self.told = {"model": model, "options": options, "calls": self.calls}
        self.told["config"] = json.loads(Path(model, "config.json").read_text())
        weights = Path(model, "model.safetensors").resolve()
        self.told |= {"weights": str(weights), "folder": os.environ["VLLM_CACHE_ROOT"]}
        self.told["plugins"] = plugins = os.environ.get("VLLM_PLUGINS")
        found = plugins is None or "sparsecast" in plugins.split(",")
        if not found and self.told["config"]["hidden_act"] != "silu":
            raise ValueError("Unsupported activation. Only silu is supported for now.")
        if os.environ.get("STAND_IN_STARTS"):
            self.told["started"] = subprocess.Popen(["sleep", "600"]).pid
        if log := os.environ.get("STAND_IN_FAILS"):
            sys.exit(log)
        if options.get("additional_config"):
            sys.stdout.write(
                "WARNING [m.py:1] sparse_ffn is exact, but FFNs stay dense: of a reason\n"
            )

    def generate(
        self, prompts: list[dict[str, list[int]]], params: SimpleNamespace, use_tqdm: bool
    ) -> list[SimpleNamespace]:
        self.calls.append([len(prompt["prompt_token_ids"]) for prompt in prompts])
        assert params.temperature == 0
        assert params.ignore_eos
        if len(self.calls) == 6:
            with Path(os.environ["STAND_IN_TOLD"]).open("a") as file:
                file.write(json.dumps(self.told) + "\n")
        answer = SimpleNamespace(token_ids=[7] * params.max_tokens)
        return [SimpleNamespace(outputs=[answer]) for _ in prompts]

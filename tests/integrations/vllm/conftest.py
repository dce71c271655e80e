"""The shipped model with other activations, vLLM in a process of its own, and transformers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from vllm_reference import Reference

from sparsecast.core.models.location import TINY_PROSPARSE

SCRIPT = Path(__file__).parents[2] / "tools" / "vllm_generate.py"
PROMPTS = [
    [1, *(2 + (seed * 131 + 37 * step * step) % 1900 for step in range(length))]
    for seed, length in enumerate([3, 5, 8, 9, 12, 17, 20, 31])
]
TOKENS = 64


@pytest.fixture
def variant(tmp_path):
    """A copy of tiny-prosparse with other fields in its config: (name, fields) to a folder."""

    def make(name: str, **fields: object) -> Path:
        folder = tmp_path / name
        shutil.copytree(TINY_PROSPARSE, folder)
        path = folder / "config.json"
        config = json.loads(path.read_text()) | fields
        if config["hidden_act"] != "fatrelu":
            del config["hidden_act_param"]
        path.write_text(json.dumps(config))
        return folder

    return make


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """What vLLM needs on a CPU without a network; compiled graphs go to a folder of the session."""
    pytest.importorskip("vllm", reason="make test-vllm makes an environment with vLLM")
    cache = tmp_path_factory.mktemp("vllm-cache")
    return {
        **{name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CACHE_ROOT": str(cache),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture
def serve(environment, tmp_path):
    """Generate by vLLM: (folder, environment, options of `vllm.LLM`) to ids, logprobs and log."""

    def generate(model: Path, env: dict[str, str] | None = None, **options: object) -> dict:
        options = {"model": str(model), "dtype": "float32", "max_model_len": 256, **options}
        job, result = tmp_path / "job.json", tmp_path / "result.json"
        job.write_text(json.dumps({"prompts": PROMPTS, "tokens": TOKENS, "options": options}))
        done = subprocess.run(
            [sys.executable, str(SCRIPT), str(job), str(result)],
            env={**environment, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", **(env or {})},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        log = done.stdout + done.stderr
        assert done.returncode == 0, log[-4000:]
        return {**json.loads(result.read_text()), "log": log}

    return generate


@pytest.fixture(scope="session")
def reference():
    """Generate greedily by transformers, in float32."""
    from transformers import AutoModelForCausalLM

    import sparsecast.integrations.transformers  # noqa: F401

    @torch.no_grad()
    def generate(
        folder: Path, prompts: list[list[int]] = PROMPTS, tokens: int = TOKENS
    ) -> Reference:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        model.generation_config.eos_token_id = None
        found: list[torch.Tensor] = []
        for layer in model.model.layers:
            if (cut := getattr(layer.mlp.act_fn, "threshold", None)) is not None:
                layer.mlp.gate_proj.register_forward_hook(
                    lambda _m, _x, gate, cut=cut: found.append((gate - cut).abs().amin(-1)[0])
                )
        rows = []
        for prompt in prompts:
            ids = model.generate(torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False)
            found.clear()
            logits = model(ids).logits[0, len(prompt) - 1 : -1]
            new = ids[0, len(prompt) :]
            margin = torch.stack(found).amin(0) if found else torch.full((ids.shape[1],), torch.inf)
            margin = margin.cummin(0).values[len(prompt) - 1 : -1]
            rows.append((new, logits.log_softmax(-1).gather(1, new[:, None])[:, 0], margin))
        new, logprobs, margins = (torch.stack(part) for part in zip(*rows, strict=True))
        return Reference(new.tolist(), logprobs, margins)

    return generate

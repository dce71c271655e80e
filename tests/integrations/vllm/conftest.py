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
            env={**environment, **(env or {})},
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
    """Greedy ids and their log-probabilities by transformers, in float32."""
    from transformers import AutoModelForCausalLM

    import sparsecast.integrations.transformers  # noqa: F401

    @torch.no_grad()
    def generate(
        folder: Path, prompts: list[list[int]] = PROMPTS, tokens: int = TOKENS
    ) -> tuple[list[list[int]], torch.Tensor]:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        ids, scores = [], []
        for prompt in prompts:
            out = model.generate(
                torch.tensor([prompt]),
                max_new_tokens=tokens,
                min_new_tokens=0,
                do_sample=False,
                eos_token_id=-1,
                output_logits=True,
                return_dict_in_generate=True,
            )
            new = out.sequences[0, len(prompt) :]
            logprobs = torch.stack(out.logits, 1)[0].log_softmax(-1)
            ids.append(new.tolist())
            scores.append(logprobs.gather(1, new[:, None])[:, 0])
        return ids, torch.stack(scores)

    return generate

"""`bench vllm` with vLLM itself. `make test-vllm` runs this."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest

from sparsecast.cli.bench.vllm import BenchVllmConfig, bench_vllm
from sparsecast.core.errors import InputError

pytestmark = pytest.mark.vllm


@pytest.fixture
def scratch(environment, monkeypatch):
    """The folder of the benchmark's temporary files; vLLM's sockets need a short path."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield folder


def test_a_sparse_model_is_timed_beside_silu(scratch, tmp_path):
    cfg = BenchVllmConfig(
        model="tiny-prosparse", prompts=2, tokens=8, rounds=1, json=tmp_path / "b.json"
    )
    values = bench_vllm(cfg)
    assert json.loads(cfg.json.read_text()) == values
    assert values["activation"] == "fatrelu(0.0741)"
    assert values["vllm"]
    assert [row["kind"] for row in values["rows"]] == ["silu", "dense"]
    for row in values["rows"]:
        assert 0 < row["import_s"] < row["start_s"]
        assert row["tokens_per_s"] > 0
    assert not list(Path(scratch).iterdir())


def test_what_vllm_says_of_a_failure_is_told(scratch, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "100000")
    with pytest.raises(InputError, match=r"silu: vLLM failed \(exit 1\): \w*Error: ") as told:
        bench_vllm(BenchVllmConfig(model="tiny-prosparse", prompts=1, tokens=2, rounds=1))
    assert "root cause above" not in str(told.value)

"""What `bench vllm` runs and reports, with a stand-in for vLLM; the real one is in
tests/integrations/vllm."""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sparsecast.cli.bench import vllm as bench
from sparsecast.cli.bench import vllm_child
from sparsecast.cli.bench.vllm import BenchVllmConfig, bench_vllm
from sparsecast.cli.bench.vllm_runs import reason_in
from sparsecast.cli.main import main
from sparsecast.core.errors import InputError
from sparsecast.core.text.corpus import Document

STAND_IN = Path(__file__).parents[1] / "tools" / "vllm_stand_in.py"


@pytest.fixture
def told(tmp_path, monkeypatch):
    """Put the stand-in in vLLM's place; returns what its processes told so far."""
    site, scratch = tmp_path / "site", tmp_path / "scratch"
    site.mkdir()
    scratch.mkdir()
    shutil.copy(STAND_IN, site / "vllm.py")
    monkeypatch.setenv("PYTHONPATH", str(site))
    monkeypatch.setenv("STAND_IN_TOLD", str(tmp_path / "told"))
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    monkeypatch.setattr(bench, "find_spec", lambda name: name)
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    documents = [Document("k", f"def number_{i}(self):\n" * (1 + i)) for i in range(9)]
    monkeypatch.setattr(bench, "read_documents", lambda name: iter(documents))
    yield lambda: [json.loads(line) for line in (tmp_path / "told").read_text().splitlines()]
    assert not list(scratch.iterdir())


@pytest.fixture
def cfg(model_folder, tmp_path):
    return BenchVllmConfig(
        model=str(model_folder), prompts=3, tokens=5, rounds=2, json=tmp_path / "b.json"
    )


def test_rows_take_turns_in_processes_of_their_own(cfg, told, model_folder):
    values = bench_vllm(cfg)

    assert json.loads(cfg.json.read_text()) == values
    assert values["vllm"] == "0.0.stand-in"
    assert values["activation"] == "fatrelu(0.2)"
    assert [row["kind"] for row in values["rows"]] == ["silu", "dense"]
    silu, dense = (row["runs"] for row in values["rows"])
    for row in values["rows"]:
        runs = row["runs"]
        assert all(0 < a < b for a, b in zip(runs["import_s"], runs["start_s"], strict=True))
        assert row["first_start_s"] not in runs["start_s"]
        assert row["start_s"] == sum(runs["start_s"]) / 2
        for key, of in (("start_over_silu", "start_s"), ("over_silu", "tokens_per_s")):
            ratios = [a / b for a, b in zip(runs[of], silu[of], strict=True)]
            assert row[key] == pytest.approx(sum(ratios) / 2)
    assert silu != dense

    runs = told()
    acts = [run["config"]["hidden_act"] for run in runs]
    assert acts == ["silu", "fatrelu", "silu", "fatrelu", "fatrelu", "silu"]
    assert {run["weights"] for run in runs} == {str(model_folder / "model.safetensors")}
    assert len({run["folder"] for run in runs}) == 2
    given = json.loads((model_folder / "config.json").read_text())
    assert runs[1]["config"] == given
    assert runs[0]["config"] == {
        **{name: value for name, value in given.items() if name != "hidden_act_param"},
        "hidden_act": "silu",
    }
    for run in runs:
        assert run["options"] == {"dtype": "auto", "max_model_len": 37}
        assert run["calls"] == [runs[0]["calls"][0]] * 6
        assert sum(run["calls"][0]) == values["prompt_tokens"]
    assert len(set(runs[0]["calls"][0])) > 1
    assert max(runs[0]["calls"][0]) <= 32


def test_a_gpu_has_a_row_of_exact_ffns(cfg, told, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    values = bench_vllm(replace(cfg, rounds=1))
    assert [row["kind"] for row in values["rows"]] == ["silu", "dense", "exact"]
    assert [row["dense_because"] for row in values["rows"]] == [None, None, "of a reason"]
    assert "exact: FFNs stayed dense: of a reason" in caplog.text
    assert values["device"] == "A GPU"
    given = [run["options"].get("additional_config") for run in told()]
    assert given == [None, None, {"sparse_ffn": "exact"}] * 2


def test_seconds_and_tokens_are_counted_as_told(monkeypatch, tmp_path):
    """Against a clock of ours; the slow first generation is no part of the speed."""
    clock = SimpleNamespace(
        monotonic=iter([13.0, 20.0]).__next__,
        perf_counter=iter([20.0, 29.0, 30.0, 32.0, 40.0, 41.0, 50.0, 54.0]).__next__,
    )
    monkeypatch.setattr(vllm_child, "time", clock)
    made = [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[1] * 6)])] * 2
    llm = SimpleNamespace(generate=lambda *_, **__: made)
    fake = SimpleNamespace(LLM=lambda **_: llm, SamplingParams=dict, __version__="1")
    monkeypatch.setitem(sys.modules, "vllm", fake)
    job = {"options": {}, "prompts": [[1], [2]], "tokens": 6, "runs": 3}
    (tmp_path / "job").write_text(json.dumps(job))
    vllm_child.main("10.0", str(tmp_path / "job"), str(tmp_path / "result"))
    assert json.loads((tmp_path / "result").read_text()) == {
        "vllm": "1",
        "import_s": 3.0,
        "start_s": 10.0,
        "tokens_per_s": statistics.median([12 / 2, 12 / 1, 12 / 4]),
    }


def test_a_failure_is_one_line_and_leaves_no_process(cfg, told, monkeypatch, capsys):
    monkeypatch.setenv("STAND_IN_FAILS", "ValueError: no room for the cache")
    with pytest.raises(SystemExit) as done:
        main(["bench", "vllm", "--model", cfg.model, "--tokens", "5"])
    assert done.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "silu: vLLM failed (exit 1): ValueError: no room for the cache; start" in error


def test_what_vllm_has_started_ends_with_it(cfg, told, monkeypatch):
    monkeypatch.setenv("STAND_IN_STARTS", "1")
    bench_vllm(replace(cfg, rounds=1))
    for run in told():
        stat = Path(f"/proc/{run['started']}/stat")
        assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


def test_silu_is_served_without_our_plugin_alone(cfg, told, monkeypatch):
    bench_vllm(replace(cfg, rounds=1))
    monkeypatch.setenv("VLLM_PLUGINS", "sparsecast,other")
    bench_vllm(replace(cfg, rounds=1))
    silu, dense, *_ = (run["plugins"] for run in told())
    assert dense is None
    assert "sparsecast" not in silu.split(",")
    assert [run["plugins"] for run in told()[4:6]] == ["other", "sparsecast,other"]


def test_a_plugin_that_is_left_out_is_told(cfg, told, monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    with pytest.raises(InputError, match="Unsupported activation. Only silu"):
        bench_vllm(cfg)


def test_the_engines_error_is_told_and_not_the_one_that_points_to_it():
    log = """
(EngineCore pid=12) ERROR 11-30 14:01:02 [core.py:9] Traceback (most recent call last):
(EngineCore pid=12) ERROR 11-30 14:01:02 [core.py:9]   File "a.py", line 1, in f
(EngineCore pid=12) ERROR 11-30 14:01:02 [core.py:9] ValueError: the cache is too small
Traceback (most recent call last):
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""
    assert reason_in(log) == "ValueError: the cache is too small"
    pydantic = "pydantic.ValidationError: 1 validation error for A\n  Value error, too long\nb"
    assert reason_in(pydantic) == (
        "pydantic.ValidationError: 1 validation error for A Value error, too long"
    )
    assert reason_in("Killed\n\n") == "Killed"
    assert reason_in("") == "it printed nothing"


def test_what_cannot_be_timed_is_refused(cfg, told, model_folder, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"/empty: no config.json in this folder"):
        bench_vllm(replace(cfg, model=str(tmp_path / "empty")))
    folder = tmp_path / "m"
    shutil.copytree(model_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    for fields, message in (
        ({"hidden_act": "silu"}, "m: hidden_act is 'silu', expected one of relu, fatrelu"),
        ({"architectures": ["AForCausalLM"]}, r'm: architectures is \["AForCausalLM"\], expected'),
    ):
        (folder / "config.json").write_text(json.dumps(config | fields))
        with pytest.raises(InputError, match=message):
            bench_vllm(replace(cfg, model=str(folder)))
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="vLLM is not installed beside .*; `make .venv-vllm/.ins"):
        bench_vllm(cfg)


def test_prosparses_own_type_is_a_llama_to_vllm_alone(cfg, told, model_folder, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(model_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    own = {"model_type": "sparsellama", "architectures": ["SparseLlamaForCausalLM"]}
    code = {"auto_map": {"AutoConfig": "configuration_sparsellama.SparseLlamaConfig"}}
    (folder / "config.json").write_text(json.dumps(config | own | code))
    bench_vllm(replace(cfg, model=str(folder), rounds=1))
    silu, dense = (run["config"] for run in told()[:2])
    assert dense == config | own | code
    assert (silu["model_type"], silu["architectures"]) == ("llama", ["LlamaForCausalLM"])
    assert "auto_map" not in silu

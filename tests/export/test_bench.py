"""The dense file against the bundle it comes from, and what the benchmark makes of an engine."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparsecast.cli.bench import engine_bandwidth, engine_machine
from sparsecast.cli.bench.engine import BenchEngineConfig, bench_engine
from sparsecast.core.errors import InputError
from sparsecast.export.bundle import bundle_file
from sparsecast.export.engine.process import EngineError
from sparsecast.export.read.reader import GGUFFile
from sparsecast.export.write.dense import write_dense

FAKE = """#!/bin/sh
[ "$1" = --help ] && exit 0
echo "x: prompt eval time = 6.61 ms / 3 tokens ( 2.2 ms per token, 9999.0 tokens per second)" >&2
case "$2" in *-dense.gguf) rate=30;; *) rate=20;; esac
[ -n "$LLAMA_SPARSE_PRED_THRESHOLD" ] && rate=10
echo "$@" >> ENGINE_LOG
echo "x:  eval time =  110.31 ms /   199 runs (0.55 ms per token, $rate.50 tokens per second)" >&2
"""


@pytest.fixture(autouse=True)
def _small_copies(monkeypatch):
    monkeypatch.setattr(engine_bandwidth, "COPIED", 2**20)
    monkeypatch.setattr(engine_machine, "usable_cores", lambda: 4)


def fake_engine(folder: Path, script: str = FAKE) -> Path:
    (folder / "bin").mkdir(parents=True)
    program = folder / "bin" / "main"
    program.write_text(script.replace("ENGINE_LOG", str(folder / "calls")))
    program.chmod(0o755)
    return folder


@pytest.mark.parametrize("source", ["bundle_folder", "quantized"])
def test_the_dense_file_is_the_bundle_without_its_predictors(request, source, tmp_path):
    sparse = GGUFFile(bundle_file(request.getfixturevalue(source)))
    write_dense(sparse, tmp_path / "dense.gguf")
    dense = GGUFFile(tmp_path / "dense.gguf")
    assert dense.magic == b"GGUF"
    missing = {key for key in sparse.keys if dense.keys.get(key) != sparse.keys[key]}
    assert missing == {"powerinfer.sparse_threshold"}
    assert all(dense.key_types[key] == sparse.key_types[key] for key in dense.keys)
    for name in sparse.entries:
        if ".fc1." in name or ".fc2." in name:
            assert name not in dense.entries
        elif "ffn_down_t" in name:
            down = dense.tensor(name.replace("ffn_down_t", "ffn_down"))
            assert torch.equal(down, sparse.tensor(name).T)
        else:
            assert torch.equal(dense.tensor(name), sparse.tensor(name))
            assert dense.entries[name].type == sparse.entries[name].type
    with pytest.raises(InputError, match="is a dense GGUF"):
        write_dense(dense, tmp_path / "again.gguf")


def test_rates_are_the_engines_own_and_the_runs_what_they_say(bundle_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA_SPARSE_PRED_THRESHOLD", "7")
    engine = fake_engine(tmp_path / "build")
    cfg = BenchEngineConfig(
        bundle=bundle_folder,
        engine=engine,
        tokens=600,
        rounds=2,
        threads=[3],
        json=tmp_path / "b.json",
    )
    values = bench_engine(cfg)
    assert json.loads(cfg.json.read_text()) == values
    rows = {row["kind"]: row for row in values["rows"]}
    rates = {"dense": 30.5, "all_active": 10.5, "predictors": 20.5}
    assert {kind: row["tokens_per_s"] for kind, row in rows.items()} == rates
    assert {kind: row["runs"] for kind, row in rows.items()} == {
        k: [v] * 2 for k, v in rates.items()
    }
    assert rows["predictors"]["over_dense"] == 20.5 / 30.5
    assert rows["predictors"]["over_all_active"] == 20.5 / 10.5
    for row in rows.values():
        absent = ("vram_budget", "vram_gib", "over_llama_cpp", "gpu_layers", "gpu_neurons")
        assert [row[key] for key in absent] == [None] * 5
        assert row["gpu_bytes_per_token"] == 0
        reached = row["tokens_per_s"] * row["host_bytes_per_token"] / 1e9
        assert row["of_copy_bandwidth"] == pytest.approx(reached / values["copy_gb_per_s"]["3"])
    assert values["bundles"] == {str(bundle_folder): str(bundle_folder)}
    calls = (engine / "calls").read_text().splitlines()
    assert len(calls) == 6
    for call in calls:
        assert "-t 3 " in call
        assert "-n 600 " in call
        assert "-c 768 -b 768 " in call
    assert sum("dense.gguf" in call for call in calls) == 2


def test_an_engine_that_fails_and_folders_without_a_bundle_are_told(bundle_folder, tmp_path):
    failing = "#!/bin/sh\n[ $1 = --help ] && exit 0\necho oh dear >&2\nexit 3\n"
    broken = fake_engine(tmp_path / "broken", failing)
    cfg = BenchEngineConfig(bundle=bundle_folder, engine=broken, rounds=1)
    with pytest.raises(EngineError, match=r"main gave no timing \(exit 3\): oh dear"):
        bench_engine(cfg)
    dead = fake_engine(tmp_path / "dead", "#!/bin/sh\necho no libcuda.so >&2\nexit 127\n")
    with pytest.raises(EngineError, match=r"cannot be run \(exit 127\): no libcuda.so"):
        bench_engine(replace(cfg, engine=dead))
    with pytest.raises(InputError, match="holds 0 files"):
        bench_engine(replace(cfg, bundle=tmp_path))
    with pytest.raises(InputError, match="no executable bin/main"):
        bench_engine(replace(cfg, engine=tmp_path))
    with pytest.raises(InputError, match="--tokens: must be at least 2, got 1"):
        replace(cfg, tokens=1)
    text = fake_engine(tmp_path / "text", "of another machine\n")
    with pytest.raises(InputError, match=r"--engine: .*: cannot be run \(Exec format error\)"):
        bench_engine(replace(cfg, engine=text))


def test_more_threads_than_cores_are_refused(bundle_folder, tmp_path):
    engine = fake_engine(tmp_path / "build")
    cfg = BenchEngineConfig(bundle=bundle_folder, engine=engine, rounds=1, threads=[1, 5])
    with pytest.raises(InputError, match=r"--threads 5: .* 4 core\(s\), .*; take --threads 4 or"):
        bench_engine(cfg)
    assert not (engine / "calls").exists()


def test_what_the_machine_or_the_bundle_lacks_is_told(bundle_folder, tmp_path, monkeypatch, capsys):
    engine = fake_engine(tmp_path / "build")
    cfg = BenchEngineConfig(bundle=bundle_folder, engine=engine, tokens=20, rounds=1)
    size = bundle_file(bundle_folder).stat().st_size
    monkeypatch.setattr(engine_machine, "total_memory", lambda: 2 * size)
    bench_engine(cfg)
    assert "the rows' files take" not in capsys.readouterr().err
    monkeypatch.setattr(engine_machine, "total_memory", lambda: size)
    bench_engine(cfg)
    assert "the rows' files take" in " ".join(capsys.readouterr().err.split())
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(bundle_file(bundle_folder), bare)
    rows = bench_engine(replace(cfg, bundle=bare))["rows"]
    assert [row["host_bytes_per_token"] is None for row in rows] == [False, False, True]
    assert "predictor: no manifest" in " ".join(capsys.readouterr().err.split())
    monkeypatch.setattr(engine_machine, "free_bytes", lambda folder: size // 2)
    with pytest.raises(InputError, match="its dense form takes .* of disk.*; .* set TMPDIR"):
        bench_engine(cfg)


@pytest.mark.engine
def test_the_engine_runs_all_three_with_every_number_of_threads(engine, bundle_folder):
    values = bench_engine(
        BenchEngineConfig(bundle=bundle_folder, engine=engine, tokens=20, rounds=1, threads=[1, 2])
    )
    found = [(row["threads"], row["kind"]) for row in values["rows"]]
    assert found == [(t, kind) for t in (1, 2) for kind in ("dense", "all_active", "predictors")]
    assert all(row["tokens_per_s"] > 1 and row["vram_used"] is None for row in values["rows"])


@pytest.mark.engine
def test_a_cpu_build_of_the_engine_is_known_as_one(engine, bundle_folder):
    with pytest.raises(InputError, match="is a CPU build of PowerInfer, which ignores budgets"):
        bench_engine(BenchEngineConfig(bundle=bundle_folder, engine=engine, vram_budget=["50%"]))

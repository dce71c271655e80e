"""llama.cpp's dense decode beside PowerInfer's: what is run, what is read, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparsecast.cli.bench import engine_bandwidth, engine_machine
from sparsecast.cli.bench.engine import BenchEngineConfig, bench_engine
from sparsecast.core.errors import InputError
from sparsecast.export.bundle import bundle_file
from sparsecast.export.config import ExportConfig
from sparsecast.export.engine.process import EngineError
from sparsecast.export.read.reader import GGUFFile
from sparsecast.export.run import export
from sparsecast.export.write.dense import write_dense
from sparsecast.integrations.llama_cpp.llama_bench import dense_rate, find_llama_bench

MAIN = """#!/bin/sh
[ "$1" = --help ] && exit 0
rate=20
case "$2" in *-dense.gguf) rate=30;; esac
[ -n "$LLAMA_SPARSE_PRED_THRESHOLD" ] && rate=10
echo main >> CALLS
echo "x:  eval time =  110.31 ms /   199 runs (0.55 ms per token, $rate.50 tokens per second)" >&2
"""
BENCH = """#!/bin/sh
echo "$@" >> CALLS
cat <<END
REPLY
END
"""
RUN = {
    "build_commit": "abc",
    "build_number": 7,
    "backends": "CPU",
    "n_gen": 30,
    "n_threads": 2,
    "avg_ts": 41.0,
}


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text.replace("CALLS", str(path.parents[1] / "calls")))
    path.chmod(0o755)
    return path


def llama_bench(folder: Path, reply: object) -> Path:
    text = reply if isinstance(reply, str) else json.dumps(reply)
    return script(folder / "bin" / "llama-bench", BENCH.replace("REPLY", text))


@pytest.fixture(autouse=True)
def _small_copies(monkeypatch):
    monkeypatch.setattr(engine_bandwidth, "COPIED", 2**20)
    monkeypatch.setattr(engine_machine, "usable_cores", lambda: 4)


@pytest.fixture
def cfg(bundle_folder, tmp_path) -> BenchEngineConfig:
    script(tmp_path / "build" / "bin" / "main", MAIN)
    llama_bench(tmp_path / "build", [RUN])
    build = tmp_path / "build"
    return BenchEngineConfig(
        bundle=bundle_folder, engine=build, llama_bench=build, tokens=30, threads=[2], rounds=2
    )


def test_one_table_of_interleaved_rounds_and_ratios_to_llama_cpp(cfg, capsys, tmp_path):
    values = bench_engine(cfg)
    rates = {"llama_cpp": 41.0, "dense": 30.5, "all_active": 10.5, "predictors": 20.5}
    assert {row["kind"]: row["tokens_per_s"] for row in values["rows"]} == rates
    assert [row["over_llama_cpp"] for row in values["rows"]] == [r / 41.0 for r in rates.values()]
    assert values["llama_cpp_build"] == "7 (abc)"
    assert values["rows"][0]["runs"] == [41.0, 41.0]
    calls = (tmp_path / "build" / "calls").read_text().splitlines()
    assert [call == "main" for call in calls] == [False, True, True, True] * 2
    words = calls[0].split()
    assert words[0] == "-m"
    assert words[2:] == ["-p", "0", "-n", "30", "-r", "1", "-t", "2", "-ngl", "0", "-o", "json"]
    screen = capsys.readouterr().err
    assert "beside llama.cpp dense" in screen
    assert "0.50 times llama.cpp" in screen


def test_a_program_that_is_not_todays_llama_bench_is_told_in_one_line(cfg, tmp_path):
    old = {key: value for key, value in RUN.items() if key != "backends"}
    for number, (reply, message) in enumerate(
        (
            ([old], "PowerInfer's own llama-bench or one from before 2025"),
            ([], "gave no JSON of one run"),
            ("hello", "gave no JSON of one run"),
            ([RUN, RUN], "gave no JSON of one run"),
            ({"backends": 1}, "gave no JSON of one run"),
            ([RUN | {"n_gen": 29}], "tokens/s of 30 tokens by 2 thread"),
            ([RUN | {"n_threads": 1}], "tokens/s of 30 tokens by 2 thread"),
            ([RUN | {"avg_ts": "fast"}], "tokens/s of 30 tokens"),
            ([RUN | {"avg_ts": 0}], "tokens/s of 30 tokens"),
            ([RUN | {"avg_ts": True}], "tokens/s of 30 tokens"),
        )
    ):
        path = llama_bench(tmp_path / str(number), reply)
        with pytest.raises(InputError, match=message) as caught:
            bench_engine(replace(cfg, llama_bench=path))
        assert "\n" not in str(caught.value)


def test_what_cannot_be_run_or_fails_is_told(cfg, tmp_path):
    with pytest.raises(InputError, match="no executable file"):
        find_llama_bench(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no executable bin/llama-bench in it"):
        find_llama_bench(tmp_path)
    program = script(tmp_path / "x" / "bin" / "llama-bench", "no script")
    program.write_bytes(b"\x7fELF nothing")
    with pytest.raises(InputError, match="cannot be run"):
        dense_rate(program, tmp_path / "m.gguf", 30, 2, str(tmp_path))
    failing = script(tmp_path / "y" / "bin" / "llama-bench", "#!/bin/sh\necho no RAM >&2\nexit 4\n")
    with pytest.raises(EngineError, match=r"llama-bench failed \(exit 4\): no RAM"):
        bench_engine(replace(cfg, llama_bench=failing))


def test_a_bamboo_becomes_the_llama_that_llama_cpp_knows(random_export, tmp_path):
    sparse = GGUFFile(bundle_file(random_export("bamboo")))
    write_dense(sparse, tmp_path / "dense.gguf", "llama")
    dense = GGUFFile(tmp_path / "dense.gguf")
    assert dense.keys["general.architecture"] == "llama"
    assert not any(key.startswith("bamboo.") for key in dense.keys)
    assert dense.keys["llama.block_count"] == sparse.keys["bamboo.block_count"]
    name = "blk.0.ffn_up.weight"
    assert torch.equal(dense.tensor(name), sparse.tensor(name))


def test_an_opt_which_llama_cpp_lacks_is_refused(cfg, random_export):
    with pytest.raises(InputError, match="'opt', which llama.cpp does not have; leave"):
        bench_engine(replace(cfg, bundle=random_export("opt")))


@pytest.fixture
def random_export(zoo, random_predictors, tmp_path):
    """Family to its bundle, with random predictors."""

    def made(name: str) -> Path:
        model = str(zoo(name))
        predictors = random_predictors(tmp_path / "p", model)
        cfg = ExportConfig(model=model, predictors=predictors, out=tmp_path / "b")
        return export(cfg).parent

    return made


@pytest.mark.llama_cpp
@pytest.mark.parametrize("family", ["llama-grouped", "bamboo", "falcon-7b"])
def test_llama_bench_decodes_the_dense_file(llama_cpp, random_export, family, tmp_path):
    sparse = GGUFFile(bundle_file(random_export(family)))
    arch = {"bamboo": "llama"}.get(family)
    write_dense(sparse, tmp_path / "dense.gguf", arch)
    program = find_llama_bench(llama_cpp)
    found = dense_rate(program, tmp_path / "dense.gguf", 8, 1, str(tmp_path))
    assert found.tokens_per_s > 1


@pytest.mark.engine
@pytest.mark.llama_cpp
def test_both_engines_in_one_run(engine, llama_cpp, bundle_folder, tmp_path):
    values = bench_engine(
        BenchEngineConfig(
            bundle=bundle_folder, engine=engine, llama_bench=llama_cpp, tokens=20, rounds=1
        )
    )
    assert min(row["tokens_per_s"] for row in values["rows"]) > 1
    dense = tmp_path / "dense.gguf"
    write_dense(GGUFFile(bundle_file(bundle_folder)), dense)
    with pytest.raises(InputError, match="PowerInfer's own llama-bench"):
        dense_rate(find_llama_bench(engine), dense, 8, 1, str(tmp_path))

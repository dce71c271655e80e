"""Budgets of GPU memory in `bench engine`, with a stand-in for a GPU build of PowerInfer.

The stand-in prints what the engine prints, by the format strings in its llama.cpp and common.cpp.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sparsecast.cli.bench import engine_bandwidth, engine_machine
from sparsecast.cli.bench.engine import BenchEngineConfig, Labelled, bench_bundles, bench_engine
from sparsecast.cli.bench.engine_bytes import dense_bytes, sparse_bytes
from sparsecast.cli.bench.engine_log import read_run
from sparsecast.core.errors import InputError
from sparsecast.export.bundle import bundle_file
from sparsecast.export.config import ExportConfig
from sparsecast.export.engine.process import EngineError
from sparsecast.export.read.reader import GGUFFile
from sparsecast.export.run import export
from sparsecast.export.write.vram import gib_for

MAIN = """#!/bin/sh
here=${0%/*}
if [ "$1" = --help ]; then
    echo "usage: $0 [options]"
    echo "  --vram-budget N       VRAM budget in GiB (default: -1, -1 = available VRAM)"
    echo "  -nommq, --no-mul-mat-q"
    echo "                        use cuBLAS instead of custom mul_mat_q CUDA kernels."
    exit 0
fi
ngl=0
for word in "$@"; do
    case "$before" in -t) threads=$word;; -ngl) ngl=$word;; --vram-budget) budget=$word;; esac
    before=$word
done
printf '%s\\t' "$@" >> "$here/calls"
readlink -f "$2" >> "$here/calls"
[ -f "$2.generated.gpuidx" ] && cp "$2.generated.gpuidx" "$here/$budget.gpuidx"
[ -f "$here/told" ] && cat "$here/told" >&2
speed="    0.55 ms per token, $((1000 * threads + ngl)).50 tokens per second"
echo "llama_print_timings:        eval time =     110.31 ms /   199 runs   ($speed)" >&2
"""
BENCH = """#!/bin/sh
printf '%s\\t' "$@" >> "${0%/*}/bench-calls"
echo >> "${0%/*}/bench-calls"
echo '[{"build_commit": "abc", "build_number": 7, "backends": "BACKENDS", "n_gen": '
echo "$6, \\"n_threads\\": ${10}, \\"avg_ts\\": 41.0}]"
"""
GIB, MIB = 2**30, 2**20
LAYERS, HIDDEN, KV, WIDTH, VOCAB, RANK = 3, 64, 32, 1280, 512, 16
NORM = HIDDEN * 4
ATTENTION = (HIDDEN + KV + KV + HIDDEN) * HIDDEN * 2
PREDICTOR = (RANK * HIDDEN + WIDTH * RANK) * 2
OUTPUT = VOCAB * HIDDEN * 2
FFN_ROW = 3 * HIDDEN * 2
FIXED = LAYERS * (2 * NORM + ATTENTION + PREDICTOR) + NORM + OUTPUT
"""What the engine places before the KV cache; the bundle is in f16."""
NEURON = FFN_ROW + 4
HALF_CACHE = LAYERS * 512 * KV * 2
LLAMA_CPP_CACHE = 256 * 2 * KV * 2
"""Keys and values of a layer and 256 tokens; three layers of it are one HALF_CACHE."""
DENSE_LAYER = 2 * NORM + ATTENTION + WIDTH * FFN_ROW


@pytest.fixture(autouse=True)
def _small_copies(monkeypatch):
    monkeypatch.setattr(engine_bandwidth, "COPIED", 2**20)
    monkeypatch.setattr(engine_machine, "usable_cores", lambda: 4)


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def cfg(bundle_folder, tmp_path) -> BenchEngineConfig:
    program(tmp_path / "build" / "bin" / "main", MAIN)
    return BenchEngineConfig(
        bundle=bundle_folder,
        engine=tmp_path / "build",
        tokens=30,
        rounds=1,
        threads=[2],
        vram_budget=["100%"],
    )


def calls(cfg: BenchEngineConfig, name: str = "calls") -> list[list[str]]:
    return [line.split("\t") for line in (cfg.engine / "bin" / name).read_text().splitlines()]


def after(call: list[str], option: str) -> str:
    return call[call.index(option) + 1]


def bytes_of(gib: str) -> int:
    """As the engine reads --vram-budget: a float times 2^30."""
    return int(float(np.float32(gib)) * GIB)


def test_lists_make_one_row_of_each_kind_per_place(cfg):
    cfg = replace(cfg, threads=[2, 3], vram_budget=["0", "25%", "3.5"])
    program(cfg.engine / "bin" / "llama-bench", BENCH.replace("BACKENDS", "CUDA"))

    rows = bench_engine(replace(cfg, llama_bench=cfg.engine))["rows"]

    layers = (0, 1, 6)
    kinds = ("llama_cpp", "dense", "all_active", "predictors")
    places = [(t, b) for t in (2, 3) for b in ("0", "25%", "3.5")]
    found = [(row["threads"], row["vram_budget"], row["kind"]) for row in rows]
    assert found == [(*place, kind) for place in places for kind in kinds]
    dense = {p: 1000 * p[0] + ngl + 0.5 for p, ngl in zip(places, layers * 2, strict=True)}
    for (threads, budget, _), row in zip(found, rows, strict=True):
        assert row["over_dense"] == row["tokens_per_s"] / dense[threads, budget]
        assert row["over_llama_cpp"] == row["tokens_per_s"] / 41.0
        assert row["of_copy_bandwidth"] is None
    assert [after(call, "-t") for call in calls(cfg)] == ["2"] * 9 + ["3"] * 9
    assert [after(call, "-ngl") for call in calls(cfg, "bench-calls")] == ["0", "2", "4"] * 2


def test_a_share_of_neurons_becomes_gib_by_the_formula(cfg, bundle_folder):
    """25 % of 15 blocks of 256 are 4 blocks, beside all that comes first."""
    rows = bench_engine(replace(cfg, vram_budget=["0%", "25%", "100%"]))["rows"]

    sparse = [row for row in rows if row["kind"] == "predictors"]
    asked = [after(call, "--vram-budget") for call in calls(cfg) if "--vram-budget" in call]
    for blocks, row, told in zip((0, 4, 15), sparse, asked[1::2], strict=True):
        need = FIXED + 2 * HALF_CACHE + blocks * 256 * NEURON
        assert 0 <= bytes_of(told) - need < 64
        assert row["vram_planned"] == need
        assert row["gpu_neurons"] == blocks * 256 / (LAYERS * WIDTH)
        split = GGUFFile(cfg.engine / "bin" / f"{told}.gpuidx")
        assert split.keys["split.vram_capacity"] == blocks * 256 * NEURON
        chosen = [split.tensor(f"blk.{i}.gpu_bucket").long() for i in range(LAYERS)]
        counts = [
            torch.load(bundle_folder / "activation" / f"activation_{i}.pt", weights_only=True)
            for i in range(LAYERS)
        ]
        sums = torch.stack([c.sort(descending=True).values.view(-1, 256).sum(1) for c in counts])
        best = sums.flatten().topk(blocks).values.sum()
        assert sum(c[k].sum() for c, k in zip(counts, chosen, strict=True)) == best
    model = bundle_file(bundle_folder).resolve()
    assert {call[-1] for call in calls(cfg) if "--vram-budget" in call} == {str(model)}


def test_gib_are_passed_on_and_0_leaves_all_on_the_cpu(cfg):
    rows = bench_engine(replace(cfg, vram_budget=["0", "3.5"]))["rows"]

    asked = [after(call, "--vram-budget") for call in calls(cfg) if "--vram-budget" in call]
    assert asked == ["0", "0", "3.5", "3.5"]
    none, much = (row for row in rows if row["kind"] == "predictors")
    assert (none["gpu_neurons"], none["vram_planned"], none["gpu_bytes_per_token"]) == (0, 0, 0)
    assert (much["gpu_neurons"], much["host_bytes_per_token"]) == (1, HIDDEN * 2)


@pytest.mark.parametrize(
    ("given", "ngl", "llama_cpp"),
    [
        (0, 0, 0),
        (DENSE_LAYER - 1, 0, 1),
        (2 * DENSE_LAYER, 2, 2),
        (3 * DENSE_LAYER + NORM + OUTPUT - 1, 3, 3),
        (3 * DENSE_LAYER + NORM + OUTPUT, 4, 3),
        (3 * DENSE_LAYER + NORM + OUTPUT + 3 * LLAMA_CPP_CACHE - 1, 4, 3),
        (3 * DENSE_LAYER + NORM + OUTPUT + 3 * LLAMA_CPP_CACHE, 5, 4),
        (3 * DENSE_LAYER + NORM + OUTPUT + 2 * HALF_CACHE, 6, 4),
    ],
)
def test_dense_models_get_the_layers_that_fit(cfg, given, ngl, llama_cpp):
    program(cfg.engine / "bin" / "llama-bench", BENCH.replace("BACKENDS", "CUDA"))
    budget = [f"{given / GIB:.12f}"]
    cfg = replace(cfg, llama_bench=cfg.engine, vram_budget=budget)

    rows = {row["kind"]: row for row in bench_engine(cfg)["rows"]}

    assert (rows["dense"]["gpu_layers"], rows["llama_cpp"]["gpu_layers"]) == (ngl, llama_cpp)
    assert after(next(c for c in calls(cfg) if "-ngl" in c), "-ngl") == str(ngl)
    assert after(calls(cfg, "bench-calls")[0], "-ngl") == str(llama_cpp)
    head = HIDDEN * 2
    on_gpu = min(ngl, LAYERS) * DENSE_LAYER + (NORM + OUTPUT) * (ngl > LAYERS)
    total = head + LAYERS * DENSE_LAYER + NORM + OUTPUT
    read = [rows["dense"][f"{place}_bytes_per_token"] for place in ("host", "gpu")]
    assert read == [total - on_gpu, on_gpu]


def test_bytes_per_token_by_hand(bundle_folder):
    file = GGUFFile(bundle_file(bundle_folder))
    ffn = LAYERS * WIDTH * FFN_ROW
    dense = HIDDEN * 2 + LAYERS * (2 * NORM + ATTENTION) + NORM + OUTPUT

    assert dense_bytes(file) == (dense + ffn, 0)
    half = sparse_bytes(file, 0.5, fixed_on_gpu=False, ffn_on_gpu=0)
    assert half == (dense + LAYERS * PREDICTOR + ffn // 2, 0)
    split = sparse_bytes(file, 0.5, fixed_on_gpu=True, ffn_on_gpu=0.75)
    assert split == (HIDDEN * 2 + ffn // 8, FIXED + 3 * ffn // 8)


def test_the_share_on_the_gpu_is_that_of_activations_with_predictors(cfg, bundle_folder):
    values = bench_bundles(
        [Labelled("ours", bundle_folder, 0.9)], replace(cfg, vram_budget=["25%"])
    )
    rows = {row["kind"]: row for row in values["rows"]}

    split = GGUFFile(next((cfg.engine / "bin").glob("*.gpuidx")))
    fired = hot = 0.0
    for i in range(LAYERS):
        path = bundle_folder / "activation" / f"activation_{i}.pt"
        count_F = torch.load(path, weights_only=True)
        fired += count_F.sum().item()
        hot += count_F[split.tensor(f"blk.{i}.gpu_bucket").long()].sum().item()
    ffn = LAYERS * WIDTH * FFN_ROW
    read = rows["predictors"]["gpu_bytes_per_token"] - FIXED
    assert read == pytest.approx(0.1 * ffn * hot / fired, abs=1)
    assert rows["all_active"]["gpu_bytes_per_token"] - FIXED == pytest.approx(ffn * 4 / 15, abs=1)


def test_bundles_share_one_dense_model(cfg, bundle_folder, quantized, tmp_path):
    other = Path(shutil.copytree(quantized, tmp_path / "ours"))
    shutil.copytree(bundle_folder / "activation", other / "activation")
    bundles = [Labelled("recipe", bundle_folder), Labelled("ours", other)]

    values = bench_bundles(bundles, cfg)

    found = [(row["kind"], row["label"]) for row in values["rows"]]
    kinds = [("all_active", "recipe"), ("predictors", "recipe"), ("predictors", "ours")]
    assert found == [("dense", None), *kinds]
    assert values["bundles"] == {"recipe": str(bundle_folder), "ours": str(other)}
    planned = [row["vram_planned"] for row in values["rows"][-2:]]
    assert planned[0] > planned[1]
    assert len({call[-1] for call in calls(cfg)}) == 3


def test_bundles_that_cannot_share_a_table_are_refused(
    cfg, bundle_folder, model_folder, predictors, tmp_path
):
    small = ExportConfig(
        model=str(model_folder), predictors=predictors, out=tmp_path / "b", dtype="q4_0"
    )
    other = export(small).parent

    with pytest.raises(InputError, match="has other weights than .*; time them one by one"):
        bench_bundles([Labelled("a", bundle_folder), Labelled("b", other)], cfg)
    with pytest.raises(InputError, match=r"two have one label: \['a', 'a'\]"):
        bench_bundles([Labelled("a", bundle_folder), Labelled("a", other)], cfg)


TOLD = """
llm_load_sparse_model_tensors: offloaded layers from VRAM budget(4294967296 bytes): 35/32
llm_load_sparse_model_tensors: mem required  = 8000.00 MB
llm_load_sparse_model_tensors: VRAM used: {weights:.2f} MB
llama_kv_cache_init: offloading v cache to GPU
llama_kv_cache_init: VRAM kv self = {cache:.2f} MB
llm_load_gpu_split: offloaded {ffn:.2f} MiB of FFN weights to GPU
llama_new_context_with_model: VRAM scratch buffer: 70.53 MB
llama_new_context_with_model: total VRAM used: 9999.00 MB (model: 9000.00 MB, context: 999.00 MB)
"""


def test_the_engines_memory_stands_beside_the_plan(cfg, capsys):
    memory = {"weights": FIXED, "cache": 2 * HALF_CACHE, "ffn": LAYERS * WIDTH * FFN_ROW}
    told = TOLD.format(**{name: value / MIB for name, value in memory.items()})
    (cfg.engine / "bin" / "told").write_text(told)

    row = bench_engine(cfg)["rows"][-1]

    assert row["vram_used"] == pytest.approx(sum(memory.values()), abs=3 * 0.005 * MIB)
    assert row["vram_used"] == pytest.approx(row["vram_planned"], rel=0.02)
    assert row["vram_scratch"] == round(70.53 * MIB)
    assert "were planned" not in capsys.readouterr().err
    (cfg.engine / "bin" / "told").write_text(told.replace("VRAM kv self", "no line"))
    bench_engine(cfg)
    screen = " ".join(capsys.readouterr().err.split())
    assert "predictors, 2 thread(s), --vram-budget 100%: the engine put" in screen


def test_a_split_that_the_engine_did_not_take_is_no_row():
    rate = "eval time = 1.0 ms / 9 runs (0.1 ms per token, 9.50 tokens per second)\n"
    refused = (
        "llm_load_gpu_split_with_budget: error: failed to apply previously generated gpu split "
        "from 'm.powerinfer.gguf.generated.gpuidx'\n"
    )
    assert read_run(0, rate) == (9.5, None, None, None)
    with pytest.raises(EngineError, match="did not take the gpuidx file"):
        read_run(0, refused + rate)


def test_a_failed_run_is_told_by_the_line_that_names_the_error():
    out_of_memory = "CUDA error 2 at ggml-cuda.cu:9322: out of memory"
    with pytest.raises(EngineError, match=rf"no timing \(exit 1\): {out_of_memory}"):
        read_run(1, f"llm_load_vocab: fine\n{out_of_memory}\ncurrent device: 0\n")


def test_a_model_that_is_not_loaded_is_told_by_its_reason():
    said = "error loading model: CUDA is not loaded"
    after = "llama_init_from_gpt_params: error: failed to load model 'm.gguf'"
    with pytest.raises(EngineError, match=rf"no timing \(exit 1\): {said}"):
        read_run(1, f"{said}\n{after}\n")


def test_a_row_that_fails_does_not_take_the_others_with_it(cfg, capsys, tmp_path):
    failing = MAIN.replace(
        "ngl=0\n", 'ngl=0\ncase "$*" in *-dense*) echo no RAM >&2; exit 3;; esac\n'
    )
    program(cfg.engine / "bin" / "main", failing)
    cfg = replace(cfg, rounds=3, json=tmp_path / "b.json")

    with pytest.raises(EngineError, match=r"1 of 3 rows failed, .*timing \(exit 3\): no RAM"):
        bench_engine(cfg)

    dense, _, predictors = json.loads(cfg.json.read_text())["rows"]
    assert (dense["tokens_per_s"], dense["runs"]) == (None, [])
    assert "no RAM" in dense["error"]
    assert (predictors["runs"], predictors["error"]) == ([2000.5] * 3, None)
    assert (predictors["over_dense"], predictors["over_all_active"]) == (None, 1.0)
    assert len(calls(cfg)) == 6
    screen = " ".join(capsys.readouterr().err.split())
    assert "dense, 2 thread(s), --vram-budget 100%: main gave no timing (exit 3): no RAM" in screen
    assert "with predictors 1.00 times everything active" in screen


@pytest.mark.parametrize("nbytes", [0, 1, 2**24 + 1, 3_758_096_385, 8 * GIB - 1, 14 * GIB + 7])
def test_a_budget_holds_its_bytes_and_hardly_more(nbytes):
    given = bytes_of(f"{gib_for(nbytes):.9g}")
    assert nbytes <= given <= nbytes * (1 + 2**-23)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vram_budget": ["101%"]}, "got '101%', expected GiB such as 3.5, or a share"),
        ({"vram_budget": ["-1"]}, "--vram-budget: got '-1'"),
        ({"vram_budget": ["nan"]}, "--vram-budget: got 'nan'"),
        ({"vram_budget": ["much"]}, "--vram-budget: got 'much'"),
        ({"vram_budget": ["%"]}, "--vram-budget: got '%'"),
        ({"vram_budget": []}, "--vram-budget: is empty"),
        ({"vram_budget": ["1", "1"]}, "--vram-budget: names a value twice"),
        ({"threads": [2, 2]}, "--threads: names a value twice"),
        ({"threads": [0]}, "--threads: must be at least 1, got 0"),
    ],
)
def test_lists_that_make_no_sense_are_refused(cfg, options, message):
    with pytest.raises(InputError, match=message):
        replace(cfg, **options)


def test_builds_and_budgets_that_do_not_go_together(cfg):
    with pytest.raises(InputError, match="is a GPU build of PowerInfer, .*; give --vram-budget"):
        bench_engine(replace(cfg, vram_budget=None))
    program(cfg.engine / "bin" / "llama-bench", BENCH.replace("BACKENDS", "CPU"))
    with pytest.raises(InputError, match=r"is a CPU build \(backends: CPU\), but --vram-budget"):
        bench_engine(replace(cfg, llama_bench=cfg.engine))
    program(cfg.engine / "bin" / "main", MAIN.replace("-nommq, --no-mul-mat-q", ""))
    with pytest.raises(InputError, match="is a CPU build of PowerInfer, which ignores budgets"):
        bench_engine(cfg)
    assert not (cfg.engine / "bin" / "calls.gpuidx").exists()


def test_one_thread_only_where_the_ffn_is_whole_on_the_gpu(cfg):
    bench_engine(replace(cfg, threads=[1]))
    for budget in ("0", "0%", "50%"):
        with pytest.raises(InputError, match=f"--threads 1: .* and --vram-budget {budget} leaves"):
            bench_engine(replace(cfg, threads=[2, 1], vram_budget=["100%", budget]))


def test_bundles_without_counts_or_for_no_gpu_are_refused(cfg, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    model = bundle_file(cfg.bundle)
    (bare / model.name).symlink_to(model)
    with pytest.raises(InputError, match="no activation counts, .*; export the bundle again with"):
        bench_engine(replace(cfg, bundle=bare))
    broken = bare / "activation"
    broken.mkdir()
    for i in range(LAYERS):
        torch.save(torch.zeros(7), broken / f"activation_{i}.pt")
    with pytest.raises(InputError, match=r"has shape \(7,\), expected \(1280,\)"):
        bench_engine(replace(cfg, bundle=bare))

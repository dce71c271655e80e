"""`bench engine --shape`: its bundles, its options, and what it leaves behind."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from sparsecast.cli.bench import engine_bandwidth, engine_machine, engine_shape
from sparsecast.cli.bench.engine import BenchEngineConfig, bench_engine
from sparsecast.cli.bench.export_model import ModelShape
from sparsecast.core.errors import InputError
from tests.export.test_bench_budgets import MAIN, calls, program

SMALL = ModelShape(hidden=512, ffn=1280, layers=3, heads=4, kv_heads=2, vocab=1280)
ASKED = {"public recipe": (0.9346, 0.7524), "ours": (0.95, 0.805)}


@pytest.fixture(autouse=True)
def _small(monkeypatch, tmp_path):
    """A small shape, and temporary folders where the test can see them."""
    monkeypatch.setattr(engine_bandwidth, "COPIED", 2**20)
    monkeypatch.setattr(engine_machine, "usable_cores", lambda: 4)
    monkeypatch.setitem(engine_shape.SHAPES, "1b", SMALL)
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))


@pytest.fixture
def cfg(tmp_path) -> BenchEngineConfig:
    program(tmp_path / "build" / "bin" / "main", MAIN)
    return BenchEngineConfig(
        shape="1b", engine=tmp_path / "build", tokens=30, rounds=1, threads=[2],
        vram_budget=["0%", "100%"], json=tmp_path / "table.json",
    )  # fmt: skip


def test_both_recipes_stand_beside_one_dense_model(cfg, tmp_path):
    values = bench_engine(cfg)

    found = [(row["kind"], row["label"], row["vram_budget"]) for row in values["rows"]]
    kinds = (("dense", None), ("all_active", "public recipe"), ("predictors", "public recipe"))
    each = (*kinds, ("predictors", "ours"))
    assert found == [(*kind, budget) for budget in ("0%", "100%") for kind in each]
    assert json.loads((tmp_path / "table.json").read_text()) == values
    assert (values["shape"], values["dtype"]) == ("1b", "f16")
    assert values["bundles"] == {"public recipe": None, "ours": None}
    assert os.listdir(tmp_path / "scratch") == []


def test_the_bytes_are_those_of_what_the_predictors_do(cfg):
    values = bench_engine(cfg)

    ffn = 3 * 3 * 1280 * 512 * 2
    ours, public = (320 * (512 + 1280) * 18 // 32, 128 * (512 + 1280) * 2)
    read = {}
    for label, (recall, sparsity) in ASKED.items():
        measured = values["points"][label]["measured"]
        assert measured["recall"] == pytest.approx(recall, abs=0.01)
        assert measured["predicted_sparsity"] == pytest.approx(sparsity, abs=0.01)
        assert values["points"][label]["asked"]["recall"] == recall
        (row,) = (
            row
            for row in values["rows"]
            if (row["kind"], row["label"], row["vram_budget"]) == ("predictors", label, "0%")
        )
        assert row["host_bytes_per_token"] == pytest.approx(
            512 * 2 + ffn * (1 - measured["predicted_sparsity"]), abs=2
        )
        read[label] = row["gpu_bytes_per_token"]
    assert read["public recipe"] - read["ours"] == 3 * (public - ours)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, "--bundle, --shape: give one of them"),
        ({"bundle": Path("b"), "shape": "1b"}, "--bundle, --shape: give one of them"),
        ({"bundle": Path("b"), "dtype": "q4_0"}, "--dtype q4_0: is for --shape"),
    ],
)
def test_options_that_do_not_go_together(changes, told):
    with pytest.raises(InputError, match=told):
        BenchEngineConfig(engine=Path("e"), **changes)


def test_nothing_is_written_where_it_cannot_be_used(cfg, tmp_path, monkeypatch):
    monkeypatch.setattr(engine_machine, "free_bytes", lambda folder: 1_000_000)
    with pytest.raises(InputError, match="--shape 1b: in f16 takes .* MB of disk.*TMPDIR"):
        bench_engine(cfg)
    with pytest.raises(InputError, match="--threads 1: a GPU build .* --vram-budget 0% leaves"):
        bench_engine(replace(cfg, threads=[1]))
    with pytest.raises(InputError, match="--llama-bench: .*none: no executable file"):
        bench_engine(replace(cfg, llama_bench=tmp_path / "none"))
    (cfg.engine / "bin" / "main").unlink()
    with pytest.raises(InputError, match="no executable bin/main"):
        bench_engine(cfg)
    assert os.listdir(tmp_path / "scratch") == []
    with pytest.raises(FileNotFoundError):
        calls(cfg)

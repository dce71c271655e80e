"""The random model is one that exports, and the benchmark runs what it says it runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparsecast.cli.bench.export import BenchExportConfig, bench_export
from sparsecast.cli.bench.export_model import SHAPES, write_random
from sparsecast.cli.bench.export_runs import BenchError
from sparsecast.core.errors import InputError
from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.export.config import ExportConfig, VerifyConfig
from sparsecast.export.run import export
from sparsecast.export.verify import verify

CONVERTER = """#!/bin/sh
[ "$2" = --help ] && exit 0
echo "$@" >> {calls}
echo "oh dear" >&2
{write}
"""


@pytest.fixture(scope="module")
def random_model(tmp_path_factory) -> Path:
    """A folder with `model` and `predictors`; not to be written to."""
    folder = tmp_path_factory.mktemp("random")
    write_random(SHAPES["tiny"], folder / "model", folder / "predictors")
    return folder


def converter(folder: Path, write: str) -> Path:
    """A Python that runs no converter but `write`; its arguments go to `calls`."""
    program = folder / "python"
    program.write_text(CONVERTER.format(calls=folder / "calls", write=write))
    program.chmod(0o755)
    return program


def test_a_random_model_is_a_sharded_one_that_verify_knows(random_model, corpus, tmp_path):
    written = sum(p.stat().st_size for p in random_model.rglob("*") if p.suffix != ".json")
    assert SHAPES["tiny"].nbytes == pytest.approx(written, rel=0.02)
    checkpoint = Checkpoint(str(random_model / "model"))
    assert {tensor.dtype for _, tensor in checkpoint.tensors()} == {torch.bfloat16}

    cfg = ExportConfig(
        model=str(random_model / "model"),
        predictors=random_model / "predictors",
        out=tmp_path / "b",
    )
    export(cfg)
    result = verify(VerifyConfig(bundle=cfg.out, model=cfg.model, corpus=str(corpus), tokens=256))

    # transformers puts no space before a text that begins with one, the engine does.
    assert {c.name for c in result.checks if not c.ok} <= {"tokens"}


@pytest.mark.slow
def test_the_runs_are_export_a_copy_and_the_converter(random_model, tmp_path):
    cfg = BenchExportConfig(
        model=str(random_model / "model"),
        predictors=random_model / "predictors",
        rounds=2,
        convert=tmp_path / "convert.py",
        converter_python=str(converter(tmp_path, 'head -c 100 /dev/zero > "$5"')),
        folder=tmp_path,
        json=tmp_path / "b.json",
    )

    values = bench_export(cfg)

    assert json.loads((tmp_path / "b.json").read_text()) == values
    assert {name: len(times) for name, times in values["runs"].items()} == {
        "export": 2,
        "process": 2,
        "cp": 2,
        "convert": 2,
    }
    weights = SHAPES["tiny"].nbytes / 1e6
    assert values["mb"] == pytest.approx(weights, rel=0.05)
    assert values["bound_mb"] == 2 * 4 * 2048 * 256 / 1e6 + 100
    assert 0 <= values["peak_mb"] < values["bound_mb"]
    assert values["seconds"]["export"] < values["seconds"]["process"]
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 2
    for call in calls:
        assert call.startswith(f"{cfg.convert} --outtype f16 --outfile ")
        assert call.endswith(f"{cfg.model} {cfg.predictors}")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"python", "calls", "b.json"}


@pytest.mark.slow
def test_what_fails_is_told(random_model, tmp_path):
    cfg = BenchExportConfig(shape="tiny", rounds=1, folder=tmp_path)

    with pytest.raises(InputError, match=r"no-such-python convert.py --help` fails .*numpy<2"):
        bench_export(replace(cfg, convert=Path("convert.py"), converter_python="no-such-python"))
    silent = str(converter(tmp_path, "exit 0"))
    with pytest.raises(BenchError, match="convert.py wrote no file: oh dear"):
        bench_export(replace(cfg, convert=Path("convert.py"), converter_python=silent))
    broken = tmp_path / "broken"
    broken.mkdir()
    gone = replace(cfg, model=str(random_model / "model"), predictors=broken)
    with pytest.raises(BenchError, match="the export failed: .*no model_0.pt in it"):
        bench_export(gone)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"shape": "2b"}, "--shape: got '2b', expected tiny, 1b"),
        ({"model": "m"}, "--model and --predictors: give both"),
        ({"dtype": "q8_0"}, "--dtype: got 'q8_0'"),
        ({"dtype": "q4_0", "convert": Path("c")}, "--convert: writes f16"),
        ({"rounds": 0}, "--rounds: must be at least 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, reason):
    with pytest.raises(InputError, match=reason):
        BenchExportConfig(**options)


def test_too_small_a_disk_is_refused_before_it_is_filled(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10**6}))

    with pytest.raises(InputError, match="needs 32 MB, but only 1 MB are free"):
        bench_export(BenchExportConfig(shape="tiny", folder=tmp_path))
    assert list(tmp_path.iterdir()) == []

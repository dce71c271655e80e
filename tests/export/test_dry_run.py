"""--dry-run of export tells what the run then takes, and leaves no trace."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sparsecast.cli.main import main
from sparsecast.core import disk
from sparsecast.core.errors import InputError
from sparsecast.export.config import ExportConfig
from sparsecast.export.dry_run import forecast
from sparsecast.export.run import export


@pytest.fixture
def asked(model_folder, predictors, tmp_path):
    return ExportConfig(model=str(model_folder), predictors=predictors, out=tmp_path / "bundle")


@pytest.mark.parametrize("options", [{}, {"dtype": "q4_0"}, {"format": "gguf", "dtype": "q8_0"}])
def test_it_tells_what_the_run_then_takes(asked, tmp_path, capfd, options):
    if "format" in options:
        options = options | {"predictors": None, "activation_threshold": 0.0}
        asked = replace(asked, **options)
    cfg = replace(asked, **options)

    found = forecast(replace(cfg, dry_run=True))

    assert not list(tmp_path.iterdir())
    assert found is not None
    assert found.seconds["the model"] > 0
    assert (found.seconds["predictors"] > 0) == ("format" not in options)
    export(cfg)
    taken = sum(path.stat().st_size for path in cfg.out.rglob("*") if path.is_file())
    assert found.disk == pytest.approx(taken, rel=0.1)
    assert forecast(cfg) is None
    assert "already exported" in capfd.readouterr().err
    with pytest.raises(InputError, match=r"dry_run: .*export\.dry_run\.forecast"):
        export(replace(cfg, dry_run=True))


def test_the_command_refuses_what_the_disk_cannot_hold(asked, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(disk, "free_bytes", lambda _: 100_000)
    args = ["--model", asked.model, "--predictors", str(asked.predictors), "--out", str(asked.out)]
    with pytest.raises(SystemExit) as ended:
        main(["export", *args, "--dry-run"])
    assert ended.value.code == 2
    told = " ".join(capfd.readouterr().err.split())
    assert "not measured, since the run does not fit sparsecast: " in told
    assert "the bundle needs" in told
    assert told.endswith("but only 100 kB are free there; make room, choose another --out")
    assert not list(tmp_path.iterdir())

"""collect warns of an activation that does not fit, and records the same bytes as without."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from sparsecast.collect import first_batch, recording
from sparsecast.collect.config import CollectConfig
from sparsecast.collect.run import collect
from sparsecast.core.models.location import TINY_PROSPARSE
from sparsecast.core.text.tokens import TokenBatch


@pytest.fixture
def lost(tmp_path) -> Path:
    """The model that ships, without its threshold."""
    folder = Path(shutil.copytree(TINY_PROSPARSE, tmp_path / "lost"))
    raw = json.loads((folder / "config.json").read_text())
    raw.pop("hidden_act_param")
    (folder / "config.json").write_text(json.dumps(raw | {"hidden_act": "relu"}))
    return folder


def test_a_lost_threshold_is_warned_of_in_one_line(lost, corpus, tmp_path, capsys, monkeypatch):
    def run(out: str, **changes: object):
        cfg = {"model": str(lost), "corpus": str(corpus), "tokens": 800, "seq_len": 128}
        store = collect(CollectConfig(**cfg, out=tmp_path / out, device="cpu", **changes))
        told = [line for line in capsys.readouterr().err.splitlines() if "fits better" in line]
        return store, told

    store, told = run("a")
    assert len(told) == 1
    assert "config says relu; fatrelu(0.03) fits better" in told[0]
    assert "needs --activation-threshold 0.03" in told[0]

    monkeypatch.setattr(recording, "warn_of_activation", lambda *_: None)
    again, told = run("b")
    assert told == []
    for path in store.folder.glob("*.safetensors"):
        assert path.read_bytes() == (again.folder / path.name).read_bytes()


def test_a_resumed_run_does_not_repeat_it(model_folder, corpus, tmp_path, monkeypatch):
    checked: list[object] = []
    monkeypatch.setattr(recording, "warn_of_activation", lambda *args: checked.append(args))
    cfg = CollectConfig(
        model=str(model_folder), corpus=str(corpus), out=tmp_path / "a", tokens=600, device="cpu",
        seq_len=64,
    )  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr("sparsecast.collect.run.complete", lambda *_: pytest.fail("stopped here"))
        with pytest.raises(pytest.fail.Exception):
            collect(cfg)
    assert len(checked) == 1
    assert collect(cfg).manifest.tokens() == 600
    assert len(checked) == 1


def test_it_reads_the_first_rows_up_to_itschecked_tokens():
    ids = torch.arange(40).view(4, 10)
    batch = TokenBatch("train", ids, ids > 0)
    assert torch.equal(first_batch._first_rows(batch, 25).ids_BS, ids[:2])
    assert torch.equal(first_batch._first_rows(batch, 7).ids_BS, ids[:1, :7])
    assert [first_batch.checked_tokens(n) for n in (60, 40_000, 10**9)] == [384, 625, 1024]

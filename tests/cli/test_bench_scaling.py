"""`bench scaling`: its arithmetic, each stage's real work on two processes, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from sparsecast.cli.bench import scaling, scaling_launch
from sparsecast.cli.bench.scaling import BenchScalingConfig, bench_scaling, with_shares
from sparsecast.cli.bench.scaling_launch import Result, RunError, run_processes
from sparsecast.core.errors import InputError

TWO_RANKS = """
import json, os, sys
from pathlib import Path
from sparsecast.cli.bench import scaling_rank, scaling_stages, scaling_work
from sparsecast.cli.bench.export_model import ModelShape
from sparsecast.core.distributed import distributed_context
from sparsecast.sparsify.training.sharding import local
scaling_work.SHAPES["tiny"] = scaling_work.Sizes(ModelShape(64, 96, 3, 2, 2, 101), 8, 2, 64, 4, 1)
def note(*values):
    with open(Path(folder, "note-" + os.environ["RANK"]), "a") as file:
        print(json.dumps(values), file=file)

submitting = scaling_stages.submitting
def submitted(model, shape, units, writer):
    note([unit.number for unit in units])
    submitting(model, shape, units, writer)
scaling_stages.submitting = submitted

training = scaling_stages.training
def trained(start, batches, *args):
    note(len(start.fc1_LRD), list(batches[0].x_LBD.shape))
    return training(start, batches, *args)
scaling_stages.training = trained

step = scaling_stages._RandomShares.training_step
def stepped(self, batch, index):
    weights = list(self.parameters())
    mine = sum(local(weight).numel() for weight in weights)
    finite = all(bool(local(weight).isfinite().all()) for weight in weights)
    note(list(batch.shape), mine, sum(weight.numel() for weight in weights), finite)
    return step(self, batch, index)
scaling_stages._RandomShares.training_step = stepped

with distributed_context():
    for stage in ("collect", "train", "sparsify"):
        folder = os.path.join(FOLDER, stage)
        os.makedirs(folder, exist_ok=True)
        scaling_rank.main(stage, "tiny", "2", "3", "cpu", folder)
sys.exit(0)
"""
"""All stages of a model of three layers, with what each process has to do noted down."""


@pytest.fixture(scope="module")
def two(ranks_forked, tmp_path_factory):
    """Run all stages on two processes: by stage, the notes of each and the amount of a round."""
    folder = tmp_path_factory.mktemp("two")
    ranks = ranks_forked(2, [], TWO_RANKS.replace("FOLDER", repr(str(folder))))
    errors = [rank.communicate(100)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors
    found = {}
    for of_stage in folder.iterdir():
        notes = [(of_stage / f"note-{rank}").read_text().splitlines() for rank in (0, 1)]
        results = [json.loads((of_stage / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
        for result in results:
            assert len(result["seconds"]) == 2
            assert min(result["seconds"]) > 0
            assert result["peak_bytes"] > 1 << 20
        assert results[0]["amount"] == results[1]["amount"]
        noted = [[json.loads(line) for line in lines] for lines in notes]
        found[of_stage.name] = noted, results[0]["amount"]
    return found


def test_two_processes_record_every_other_batch(two):
    notes, amount = two["collect"]
    assert amount == 3 * 2 * 8  # batches, sequences, tokens
    assert notes == [[[[0, 2]]] * 3, [[[1]]] * 3]  # a warm-up and two rounds


def test_two_processes_train_every_other_layer(two):
    notes, amount = two["train"]
    assert amount == 3 * 64 * 3  # steps, tokens, layers
    assert notes == [[[2, [2, 64, 64]]], [[1, [1, 64, 64]]]]


def test_two_processes_share_weights_and_sequences(two):
    notes, amount = two["sparsify"]
    assert amount == 3 * 4 * 32  # steps, sequences, tokens
    assert [len(steps) for steps in notes] == [2 + 2 * 3] * 2
    for (shape_0, mine_0, whole, finite_0), (shape_1, mine_1, _, finite_1) in zip(
        *notes, strict=True
    ):
        assert shape_0 == shape_1 == [2, 32]
        assert mine_0 + mine_1 == whole
        assert mine_1 > whole // 3
        assert [finite_0, finite_1] == [True, True]


def test_shares_are_of_the_fewest_processes():
    def row(processes, rate):
        return {"processes": processes, "rate": rate}

    found = with_shares([row(1, 100.0), row(2, 190.0), row(8, 600.0)])
    assert [r["speedup"] for r in found] == pytest.approx([1, 1.9, 6])
    assert [r["of_linear"] for r in found] == pytest.approx([1, 0.95, 0.75])
    found = with_shares([row(1, None), row(2, 50.0), row(8, 160.0)])  # one did not fit
    assert [r["speedup"] for r in found] == [None, 1, 3.2]
    assert [r["of_linear"] for r in found] == [None, 1, pytest.approx(0.8)]


def test_a_round_ends_with_its_last_process():
    ranks = [
        {"seconds": [2.0, 4.0], "amount": 80, "peak_bytes": 5},
        {"seconds": [1.0, 8.0], "amount": 80, "peak_bytes": 7},
    ]
    assert scaling_launch._result(ranks) == Result([40.0, 10.0], [5, 7])


@pytest.fixture
def cfg(tmp_path):
    return BenchScalingConfig(
        stages=["collect", "train"], processes=[3, 1], device="cpu", steps=2,
        json=tmp_path / "s.json",
    )  # fmt: skip


@pytest.fixture
def started(monkeypatch):
    """Every run that was started, on a machine of three cores."""
    calls = []

    def run(count, arguments, threads):
        calls.append((count, *arguments, threads))
        if arguments[0] == "train" and count == 3:
            raise RunError("no memory")
        return Result([10.0 * count, 20.0 * count, 90.0 * count], [count, 2**30])

    monkeypatch.setattr(scaling, "run_processes", run)
    monkeypatch.setattr(scaling, "usable_cores", lambda: 3)
    return calls


def test_what_failed_is_told_behind_the_others(cfg, started, capfd):
    with pytest.raises(RunError, match="1 of 4 runs failed, the first train with 3 .*: no memory"):
        bench_scaling(cfg)
    assert started == [
        (1, "collect", "tiny", "3", "24", "cpu", 1),
        (3, "collect", "tiny", "3", "24", "cpu", 1),
        (1, "train", "tiny", "3", "20", "cpu", 1),
        (3, "train", "tiny", "3", "20", "cpu", 1),
    ]
    rows = json.loads(cfg.json.read_text())["rows"]
    assert [row["rate"] for row in rows] == [20, 60, 20, None]
    assert [row["of_linear"] for row in rows] == [1, 1, 1, None]
    assert [row["peak_bytes"] for row in rows] == [2**30] * 3 + [None]
    told = capfd.readouterr().err
    assert "60" in told
    assert "failed" in told


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"processes": [4]}, "--processes: got 4, but this machine has 3 cores"),
        ({"processes": [0, 1]}, "--processes: must be at least 1, got 0"),
        ({"processes": [2, 2]}, "--processes: got [2, 2], expected each once"),
        ({"stages": []}, "--stages: is empty"),
        ({"processes": [8]}, "--processes: got 8, but train shares 6 layers of tiny"),
        ({"stages": ["sparsify"], "processes": [3]}, "sparsify shares 8 sequences of a step"),
        ({"stages": ["export"]}, "--stages: "),
        ({"shape": "70b"}, "--shape: "),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(started, changes, told):
    with pytest.raises(InputError) as refused:
        bench_scaling(BenchScalingConfig(**{"device": "cpu", **changes}))
    assert told in str(refused.value)
    assert started == []


def test_more_processes_than_gpus_are_refused(started, monkeypatch):
    monkeypatch.setattr(scaling, "pick_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match="got 2, but this machine has 1 GPU; expected at most one"):
        bench_scaling(BenchScalingConfig(processes=[1, 2]))
    assert started == []


@pytest.fixture
def launcher(monkeypatch, tmp_path):
    """Put a shell script in torchrun's place."""

    def put(script: str) -> None:
        path = tmp_path / "launcher"
        path.write_text(f"#!/bin/bash\nfolder=${{@: -1}}\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr(scaling_launch.sys, "executable", str(path))

    return put


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("echo 'no room' > $folder/error-1.txt; echo torchrun is sorry; exit 1", "no room"),
        ("echo a banner; echo killed by signal 9 >&2; exit 1", "killed by signal 9"),
        ("exit 3", "it printed nothing"),
    ],
)
def test_a_process_that_fails_says_why(launcher, script, told):
    launcher(script)
    with pytest.raises(RunError) as failed:
        run_processes(2, ["collect"], 1)
    assert str(failed.value) == told


@pytest.fixture
def interruptible():
    """A background job of a shell ignores SIGINT from its start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_ends_the_processes(launcher, tmp_path):
    launcher(f"echo $$ > {tmp_path}/pid; exec sleep 100")

    def interrupt():
        while not (tmp_path / "pid").exists():
            time.sleep(0.01)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    threading.Thread(target=interrupt).start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_processes(2, ["collect"], 1)
    assert time.monotonic() - began < 50
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


@pytest.mark.slow
def test_torchrun_starts_all_of_it(tmp_path):
    cfg = BenchScalingConfig(
        processes=[2, 1], steps=1, rounds=2, device="cpu", json=tmp_path / "s.json"
    )
    values = bench_scaling(cfg)
    assert values == json.loads(cfg.json.read_text())
    assert [(row["stage"], row["processes"]) for row in values["rows"]] == [
        (stage, count) for stage in ("collect", "train", "sparsify") for count in (1, 2)
    ]
    for row in values["rows"]:
        assert row["error"] is None
        assert len(row["runs"]) == 2
        assert row["rate"] == pytest.approx(sum(row["runs"]) / 2)


@pytest.mark.slow
def test_a_signal_ends_torchruns_processes_too(tmp_path):
    command = ["bench", "scaling", "--device", "cpu", "--processes", "2", "--steps", "100000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "sparsecast", *command, "--stages", "sparsify"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )

    def of_run() -> list[Path]:
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                if str(tmp_path) in path.read_text():
                    found.append(path)
            except OSError:
                continue
        return found

    limit = time.monotonic() + 200
    while not list(tmp_path.rglob("tokens.*")):  # training is about to begin
        assert process.poll() is None
        assert time.monotonic() < limit
        time.sleep(0.2)
    time.sleep(3)
    assert len(of_run()) == 3
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(60)
    assert process.returncode == 143
    assert "interrupted" in told
    assert of_run() == []
    assert not list(tmp_path.glob("sparsecast-*"))

"""Starts that fail bind nobody, finished runs are kept, interrupted ones go on, disks fill up."""

from __future__ import annotations

import json
import os
import re
import signal
from contextlib import contextmanager
from resource import RLIMIT_FSIZE, getrlimit, setrlimit

import pytest
import torch

from sparsecast.collect.output import lock_output
from sparsecast.core import disk, lightning
from sparsecast.core.errors import InputError
from sparsecast.core.models.loading import load_model
from sparsecast.sparsify import run
from sparsecast.sparsify.plan import make_plan
from sparsecast.sparsify.run import sparsify
from sparsecast.sparsify.training import fit

CHAT = '{"messages": [{"role": "user", "content": "Explain %d in short"}]}\n'


@contextmanager
def largest_file(nbytes: int):
    """No file may grow beyond this, as if the disk ended there."""
    before = getrlimit(RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    setrlimit(RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        setrlimit(RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


def left(folder):
    return sorted(path.name for path in folder.iterdir() if path.name.startswith((".out", "out")))


def test_a_start_that_fails_leaves_nothing_and_binds_nobody(dense, options, tmp_path):
    source = str(dense())
    with pytest.raises(InputError, match="no such file"):
        sparsify(options(model=source, corpus=str(tmp_path / "none.txt")))
    assert left(tmp_path) == []

    (tmp_path / ".out.work").mkdir()  # killed before anything was trained
    (tmp_path / ".out.work" / "options.json").write_text('{"seed": 1}')
    (tmp_path / ".out.work" / "tokens.uint16").write_bytes(b"half")

    assert sparsify(options(model=source)).is_dir()
    assert left(tmp_path) == ["out"]


def test_chats_without_a_template_are_refused_before_training(dense, options, tmp_path):
    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(CHAT % i for i in range(20)))

    with pytest.raises(InputError, match="no chat template"):
        sparsify(options(model=str(dense()), corpus=str(chats)))
    with pytest.raises(InputError, match="tokenizer of a --preset has no template"):
        sparsify(options(preset="tiny", corpus=str(chats)))
    assert left(tmp_path) == []


def test_a_trained_run_refuses_other_options_and_an_unreadable_record(options, dense, tmp_path):
    work = tmp_path / ".out.work"
    work.mkdir()
    (work / "ProSparse-before-the-shift.ckpt").write_bytes(b"")
    (work / "options.json").write_text('{"seed": 1}')
    source = str(dense())

    with pytest.raises(InputError, match=r"seed was 1, now 0"):
        sparsify(options(model=source))
    (work / "options.json").unlink()
    with pytest.raises(InputError, match="the options of an unfinished run"):
        sparsify(options(model=source))


def test_a_finished_model_is_kept_or_its_difference_named(dense, options, capsys, tmp_path):
    source = dense()
    out = sparsify(options(model=str(source)))
    before = (out / "model.safetensors").stat().st_mtime_ns

    assert sparsify(options(model=str(source), tokens=300)) == out  # four steps as well
    assert "already sparsified with these options" in capsys.readouterr().err
    for changes, match in (
        ({"seed": 2}, "seed was 0, now 2"),
        ({"tokens": 512}, "steps was 4, now 8"),
        ({"corpus": "builtin"}, r"corpus was 'short0#\w{8}', now 'builtin'"),
        ({"model": str(dense(act="gelu", initializer_range=0.3))}, "fingerprint was"),
    ):
        with pytest.raises(InputError, match=f"{match}.*choose another --out"):
            sparsify(options(**{"model": str(source)} | changes))
    assert (out / "model.safetensors").stat().st_mtime_ns == before
    (out / "sparsify.json").write_text("{}")
    with pytest.raises(InputError, match="options were not written down"):
        sparsify(options(model=str(source)))


def test_other_files_are_not_replaced(dense, options, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")

    with pytest.raises(InputError, match="holds other files"):
        sparsify(options(model=str(dense())))


def test_a_second_run_into_one_folder_is_told_so(dense, options, tmp_path):
    with (
        lock_output(tmp_path / "out", "sparsify run"),
        pytest.raises(InputError, match="another sparsify run is writing it"),
    ):
        sparsify(options(model=str(dense())))


@pytest.mark.parametrize("kind", ["-", "fifo"])
def test_a_corpus_that_can_be_read_once_is_refused(dense, options, tmp_path, kind):
    if kind == "fifo":
        os.mkfifo(tmp_path / "fifo")
        kind = str(tmp_path / "fifo")

    with pytest.raises(InputError, match="reads its corpus more than once"):
        sparsify(options(model=str(dense()), corpus=kind))


def test_a_full_disk_says_what_is_needed_kept_and_next(dense, options, tmp_path, monkeypatch):
    monkeypatch.setattr(fit, "CHECKPOINT_STEPS", 2)
    cfg = options(model=str(dense()))
    save, calls = lightning.save_torch, iter(range(9))

    def filling(value, path):
        with largest_file(2**12 if next(calls) else 2**30):  # at the second file
            save(value, path)

    monkeypatch.setattr(fit, "save_torch", filling)
    monkeypatch.setattr(lightning, "save_torch", filling)
    with pytest.raises(
        OSError, match=r"\(ProSparse-before-the-shift.pt: File too large\)"
    ) as caught:
        sparsify(cfg)

    told = str(caught.value)
    assert told.startswith(f"{tmp_path}: ")
    assert re.search(
        r"the run needs \d+ kB of disk, [\d.]+ .B are free there now; make room; ", told
    )
    assert told.endswith("the same command goes on from the last checkpoint")
    assert not list(tmp_path.rglob("*.part"))
    monkeypatch.undo()
    assert sparsify(cfg).is_dir()
    assert left(tmp_path) == ["out"]


def test_no_room_for_tokens_or_the_model_is_told_too(dense, options, tmp_path):
    cfg = options(model=str(dense()), seed=3)
    with largest_file(2**10), pytest.raises(OSError, match="nothing is left behind"):
        sparsify(cfg)
    assert left(tmp_path) == []


def test_a_disk_that_cannot_hold_the_run_is_refused_before_training(
    dense, options, tmp_path, monkeypatch
):
    monkeypatch.setattr(disk, "free_bytes", lambda folder: 1000)

    with pytest.raises(InputError, match=r"the run needs \d+ kB, but only 1 kB are free"):
        sparsify(options(model=str(dense())))
    assert left(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_behind_a_whole_step(dense, options, monkeypatch, number):
    step, calls = fit.SparsifyModule.training_step, iter(range(99))

    def interrupted(self, batch, index):
        if next(calls) == 1:
            os.kill(os.getpid(), number)
        return step(self, batch, index)

    monkeypatch.setattr(fit.SparsifyModule, "training_step", interrupted)
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    cfg = options(model=str(dense()))

    with pytest.raises(KeyboardInterrupt, match="goes on from the last checkpoint"):
        sparsify(cfg)

    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    last = cfg.out.with_name(".out.work") / "ProSparse-before-the-shift.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 2


PLACES = (
    "pre-training",
    "SiLU",
    "plain ReLU",
    "fixed L1",
    "ProSparse",
    "choose_activation",
    "write_model",
)


def test_interrupted_everywhere_it_ends_as_an_uninterrupted_run(options, monkeypatch, tmp_path):
    """Weights, threshold and scores are the same, whatever random numbers were drawn before."""
    monkeypatch.setattr(fit, "CHECKPOINT_STEPS", 1)
    changes = {"preset": "micro", "baselines": True, "tokens": 640, "lr": None}
    whole = sparsify(options(**changes, out=tmp_path / "whole"))
    cfg = options(**changes, out=tmp_path / "parts")

    for where in PLACES:
        with monkeypatch.context() as patched:
            _interrupt(patched, where)
            with pytest.raises(KeyboardInterrupt):
                sparsify(cfg)
        assert not cfg.out.exists()
        torch.rand(7)
    parts = sparsify(cfg)

    a, b = (json.loads((out / "sparsify.json").read_text()) for out in (whole, parts))
    assert a == b
    a, b = (load_model(str(out), device="cpu")[0].state_dict() for out in (whole, parts))
    assert all(torch.equal(a[name], b[name]) for name in a)


def _interrupt(patched, where):
    step = fit.SparsifyModule.training_step

    def stopped(*_args):
        raise KeyboardInterrupt

    def interrupted(self, batch, index):
        if self.phase.name.startswith(where) and self.global_step == 1:
            raise KeyboardInterrupt
        return step(self, batch, index)

    if hasattr(run, where):
        patched.setattr(run, where, stopped)
    else:
        patched.setattr(fit.SparsifyModule, "training_step", interrupted)


def test_a_run_that_diverges_says_so_and_binds_nobody(dense, options, tmp_path):
    source = str(dense())
    with pytest.raises(InputError, match=r"--lr 1e\+30: training diverged"):
        sparsify(options(model=source, lr=1e30))
    assert left(tmp_path) == []

    assert sparsify(options(model=source)).is_dir()


def test_an_l1_that_silences_everything_is_named(dense, options, tmp_path):
    with pytest.raises(InputError, match=r"--l1 1e\+06: no neuron"):
        sparsify(options(model=str(dense("opt", "relu")), l1=1e6, lr=0.5, tokens=5120))
    assert left(tmp_path) == []


@pytest.mark.slow
def test_a_fixed_l1_that_silences_everything_is_a_result(dense, options, monkeypatch, capsys):
    """The baseline's weight is there from the first step, ProSparse's grows: only one must hold."""
    step = fit.SparsifyModule.training_step

    def silenced(self, batch, index):
        if self.phase.stages is None:
            with torch.no_grad():
                self.model.model.layers[0].mlp.gate_proj.weight.zero_()
        return step(self, batch, index)

    monkeypatch.setattr(fit.SparsifyModule, "training_step", silenced)
    out = sparsify(options(model=str(dense()), baselines=True, lr=1e-9))

    held_out = json.loads((out / "sparsify.json").read_text())["held_out"]
    assert held_out["fixed L1"]["sparsity"] == 1
    assert held_out["ProSparse before the shift"]["sparsity"] < 1
    assert "no neuron of fixed L1 fires any more" in capsys.readouterr().err


@pytest.mark.slow
def test_disk_is_reserved_for_every_training(options, monkeypatch, tmp_path):
    cfg = options(preset="micro", baselines=True, lr=None)
    _interrupt(monkeypatch, "write_model")

    with pytest.raises(KeyboardInterrupt):
        sparsify(cfg)

    finished = list((tmp_path / ".out.work").glob("*.pt"))
    assert len(finished) == make_plan(cfg).phases == 5


def test_scores_are_computed_on_the_device_of_the_training(dense, options, monkeypatch):
    """Lightning leaves a model that it trained on a GPU on the CPU."""
    moves = []
    trained, move = fit._fit, torch.nn.Module.to

    def fitted(task, team, device, model, optimizer):
        state = trained(task, team, device, model, optimizer)
        model.to = lambda where: (moves.append(where), move(model, where))[1]
        return state

    monkeypatch.setattr(fit, "_fit", fitted)

    sparsify(options(model=str(dense())))

    assert moves[:1] == [torch.device("cpu")]

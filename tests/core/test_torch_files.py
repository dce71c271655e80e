"""A file appears whole or not at all, and what the system says of a full disk is not lost."""

from __future__ import annotations

import errno
import resource
import signal
from contextlib import contextmanager

import lightning as L
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel

from sparsecast.core.errors import InputError
from sparsecast.core.lightning import StagedCheckpoints
from sparsecast.core.torch_files import load_torch, save_torch

VALUE = {"a": torch.zeros(2**18)}


@contextmanager
def largest_file(nbytes: int):
    """No file may grow beyond this, as if the disk ended there."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


def test_a_failed_save_leaves_what_was_there(tmp_path):
    path = tmp_path / "x.pt"
    save_torch({"a": torch.ones(2)}, path)

    with largest_file(2**16), pytest.raises(OSError, match="File too large") as failed:
        save_torch(VALUE, path)
    assert (failed.value.errno, failed.value.filename) == (errno.EFBIG, str(path))

    assert torch.equal(torch.load(path, weights_only=True)["a"], torch.ones(2))
    assert list(tmp_path.iterdir()) == [path]


def test_lightning_stages_nothing_in_the_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))  # nothing can be made there
    trainer = L.Trainer(
        plugins=[StagedCheckpoints()], accelerator="cpu", devices=1, logger=False, max_steps=0
    )
    trainer.fit(BoringModel())

    (tmp_path / "kept").mkdir()
    trainer.save_checkpoint(tmp_path / "kept" / "x.ckpt")

    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["x.ckpt"]
    assert "state_dict" in torch.load(tmp_path / "kept" / "x.ckpt", weights_only=True)


def test_a_damaged_name_of_a_part_does_not_fill_the_message(tmp_path):
    """zipfile's words hold the name as the file has it, up to all that comes behind it."""
    path = tmp_path / "model.pt"
    save_torch({"weight": torch.ones(64, 64)}, path)
    raw = bytearray(path.read_bytes())
    raw[6:8] = bytes(2)  # of the first part: its name is not UTF-8
    raw[26:28] = (len(raw) // 2).to_bytes(2, "little")  # and so long
    path.write_bytes(raw)
    with pytest.raises(InputError, match="its table of parts is damaged") as refused:
        load_torch(path, "tensors", "copy it again")
    assert "File name in directory)" in str(refused.value)
    assert len(str(refused.value)) < 200 + len(str(path))

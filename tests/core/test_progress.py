"""The progress bar of every stage: live on a terminal, one line where nobody watches."""

from __future__ import annotations

import io
import logging
import warnings

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from sparsecast.core import progress
from sparsecast.core.lightning import TrainingBar, quiet_lightning
from sparsecast.core.progress import progress_bar


@pytest.fixture
def screen(monkeypatch) -> io.StringIO:
    file = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=file, width=40, markup=False))
    return file


@pytest.mark.parametrize("total", [3_000_000_000, None])
def test_a_log_gets_one_line_however_narrow_it_is(screen, total):
    with progress_bar("[bold]weights", total) as running:
        for _ in range(3):
            running.advance(1_000_000_000, "mean |x1| 0.25, [nll] 3.125, and much more to say")
    want = "100%, 3,000,000,000 of 3,000,000,000" if total else "3,000,000,000"
    note = "mean |x1| 0.25, [nll] 3.125, and much more to say"
    assert screen.getvalue() == f"[bold]weights: {want} in 0:00, {note}\n"


def test_a_log_says_where_an_interrupt_came(screen):
    def interrupted() -> None:
        with progress_bar("check", 4) as running:
            running.advance()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert screen.getvalue() == "check: 25%, 1 of 4 in 0:00\n"


def test_a_long_run_writes_a_line_a_minute(screen, monkeypatch):
    seconds = iter(range(0, 1000, 25))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(seconds))
    with progress_bar("check", 6) as running:
        for _ in range(6):
            running.advance()
    times = [line.rpartition(" in ")[2] for line in screen.getvalue().splitlines()]
    assert times == ["1:40", "3:20", "3:45"]


def test_an_invisible_bar_says_nothing(screen):
    with progress_bar("check", 4, visible=False) as running:
        running.advance()
    assert screen.getvalue() == ""


class Tiny(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        loss = (self.weight * batch).sum()
        self.log("loss", loss.detach(), prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Broken(Callback):
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        raise ValueError("broken")


@pytest.mark.parametrize("broken", [False, True])
def test_training_shows_the_same_bar_and_lightning_nothing(
    screen, monkeypatch, capfd, caplog, tmp_path, broken
):
    monkeypatch.setattr("sparsecast.core.lightning.progress_bar", progress_bar)
    callbacks = [TrainingBar("train"), *([Broken()] if broken else [])]
    level = logging.getLogger("lightning.pytorch").level
    with warnings.catch_warnings(record=True) as warned, quiet_lightning():
        trainer = L.Trainer(
            max_epochs=2,
            accelerator="cpu",
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        data = torch.utils.data.DataLoader([2.0] * 12, batch_size=4)
        if broken:
            with pytest.raises(ValueError, match="broken"):
                trainer.fit(Tiny(), data)
        else:
            trainer.fit(Tiny(), data)
    count = "50%, 3 of 6" if broken else "100%, 6 of 6"
    assert screen.getvalue() == f"train: {count} in 0:00, loss 8\n"
    theirs = [record for record in caplog.records if record.name != "sparsecast"]
    assert (capfd.readouterr(), theirs, warned) == (("", ""), [], [])
    assert logging.getLogger("lightning.pytorch").level == level


@pytest.mark.parametrize("name", ["a[/b]", "[red]", "x[0]"])
def test_brackets_are_text(capsys, name):
    progress.console.print(f"/data/{name}: done", soft_wrap=True)
    table = Table(title=name)
    table.add_column(name)
    table.add_row(name)
    progress.console.print(table)
    printed = capsys.readouterr().err
    assert f"/data/{name}: done" in printed
    assert printed.count(name) == 4


def test_a_bar_can_be_switched_off(capsys, monkeypatch):
    monkeypatch.setenv("SPARSECAST_DISABLE_PROGRESS", "1")
    with progress.progress_bar("work", 3) as bar:
        bar.advance(3)
    assert capsys.readouterr() == ("", "")

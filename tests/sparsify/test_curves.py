"""The curves hold what every step computed, resume without gaps, and are drawn on one page."""

from __future__ import annotations

import csv
import socket
from collections import defaultdict
from math import cos, nan, pi

import pytest
import torch
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sparsecast.sparsify import run
from sparsecast.sparsify.figure import draw_curves
from sparsecast.sparsify.measure import Score
from sparsecast.sparsify.run import sparsify
from sparsecast.sparsify.training import curves, fit
from sparsecast.sparsify.training.curve_table import Row, read_tables

PROSPARSE = "ProSparse before the shift"
SHIFTED = "ProSparse after the shift"


def rows_of(path):
    with path.open(newline="") as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


@pytest.fixture
def every(monkeypatch):
    """Set the number of steps from one row to the next."""

    def choose(steps):
        monkeypatch.setattr(curves, "ROWS", 1)
        monkeypatch.setattr(curves, "MOST_STEPS", steps)

    return choose


class Watch:
    """Keep by plain hooks what every step saw, per phase."""

    def __init__(self, monkeypatch) -> None:
        self.steps = defaultdict(list)
        train = fit.SparsifyModule.training_step

        def step(module, ids_BS, index):
            found = {"x1": [], "logits": []}
            self.steps[module.phase.name].append(found)
            layers = [layer.mlp for layer in module.model.model.layers]
            handles = [
                layer.down_proj.register_forward_pre_hook(
                    lambda _, args: found["x1"].append(args[0].detach())
                )
                for layer in layers
            ]
            weight_VD = module.model.lm_head.weight
            handles.append(
                module.model.model.register_forward_hook(
                    lambda _m, _a, out: found["logits"].append(
                        (out.last_hidden_state @ weight_VD.T).detach()
                    )
                )
            )
            if module.global_step >= 3:
                layers[0].gate_proj.weight.data[9] = 0  # has fired before
            loss = train(module, ids_BS, index)
            for handle in handles:
                handle.remove()
            (optimizer,) = module.trainer.optimizers
            found |= {"ids": ids_BS, "total": loss.item(), "lr": optimizer.param_groups[0]["lr"]}
            return loss

        monkeypatch.setattr(fit.SparsifyModule, "training_step", step)


def expected(steps):
    """A row's values by hand, in float64, from the steps it covers."""
    losses, l1s, zeros = [], [], []
    for found in steps:
        logits = found["logits"][0].double().log_softmax(-1)
        losses.append(-logits.gather(-1, found["ids"][:, 1:, None]).mean())
        l1s.append(sum(x1.double().abs().mean() for x1 in found["x1"]))
        zeros.append([(x1 == 0).double().mean() for x1 in found["x1"]])
    n_layers = len(zeros[0])
    row = {"loss": sum(losses) / len(steps), "l1": sum(l1s) / len(steps)}
    for layer in range(n_layers):
        row[f"sparsity_{layer}"] = sum(z[layer] for z in zeros) / len(steps)
        seen = torch.cat([found["x1"][layer].flatten(0, 1) for found in steps])
        row[f"dead_{layer}"] = sum(not column.any() for column in seen.T)
    row["sparsity"] = sum(row[f"sparsity_{layer}"] for layer in range(n_layers)) / n_layers
    last = steps[-1]
    row["lr"] = last["lr"]
    row["lambda"] = (last["total"] - losses[-1]) / l1s[-1]
    row |= {"threshold": 0, "wanted": 0}
    return {name: float(value) for name, value in row.items()}


def test_rows_are_the_means_of_their_steps(dense, options, monkeypatch, every):
    every(3)
    watch = Watch(monkeypatch)
    source = dense(num_hidden_layers=2)
    weights = load_file(source / "model.safetensors")
    weights["model.layers.1.mlp.gate_proj.weight"][:5] = 0  # and no gradient behind a ReLU
    save_file(weights, source / "model.safetensors", {"format": "pt"})

    out = sparsify(options(model=str(source), tokens=64 * 8, l1=2.0, baselines=True))

    names = ["SiLU original", "plain ReLU", "fixed L1", PROSPARSE]
    assert list(watch.steps) == names
    for name in names:
        rows = rows_of(out / "curves" / f"{name.replace(' ', '_')}.csv")
        assert [row.pop("step") for row in rows] == [3, 6, 8]
        assert [row.pop("tokens") for row in rows] == [192, 384, 512]
        for row, part in zip(rows, (slice(0, 3), slice(3, 6), slice(6, 8)), strict=True):
            assert row == pytest.approx(expected(watch.steps[name][part]), rel=2e-4, abs=2e-4)
    fixed, grown = (
        [row["lambda"] for row in rows_of(out / "curves" / f"{name}.csv")]
        for name in ("fixed_L1", "ProSparse_before_the_shift")
    )
    assert fixed == [2, 2, 2]
    eta = (1 - cos(pi * (3 / 8 * 16_500 - 6_000) / 4_000)) / 2  # step 3 of 8 is in stage 2
    assert grown[0] == pytest.approx(2 / 0.2 * (0.005 + 0.045 * eta), rel=1e-4)
    assert min(row["dead_1"] for row in rows) >= 5
    assert rows[1]["dead_0"] > rows[0]["dead_0"]


def test_a_phase_has_many_rows_and_a_long_one_waits_fifty_steps():
    def steps_between(steps):
        made = fit.Phase(name="p", start=0, stop=steps, l1=0.0, lr=1.0, warmup=0, decay_from=steps)
        return curves.Curves(fit.Path("x"), made, 1)._every

    assert [steps_between(n) for n in (1, 199, 400, 10_000, 10**6)] == [1, 1, 2, 50, 50]


@pytest.mark.slow
def test_killed_runs_have_the_curves_of_an_uninterrupted_one(options, monkeypatch, tmp_path, every):
    """Killed before the first checkpoint, within a row, and beyond a row that must be dropped."""
    every(3)
    monkeypatch.setattr(fit, "CHECKPOINT_STEPS", 4)
    changes = {"preset": "micro", "tokens": 64 * 20, "lr": None, "baselines": True}
    whole = sparsify(options(**changes, out=tmp_path / "whole"))
    cfg = options(**changes, out=tmp_path / "parts")
    work = tmp_path / ".parts.work" / "curves"

    for phase in ("pre-training", "fixed L1", PROSPARSE):
        for step in (3, 5, 7):
            with monkeypatch.context() as patch:
                _kill(patch, phase, step)
                with pytest.raises(KeyboardInterrupt):
                    sparsify(cfg)
    table = work / "ProSparse_before_the_shift.csv"
    assert [row["step"] for row in rows_of(table)] == [11, 14]  # the checkpoint is at 12
    table.write_text(table.read_text() + "1")  # of step 17, cut by a crash
    parts = sparsify(cfg)

    tables = sorted(path.name for path in (whole / "curves").glob("*.csv"))
    assert len(tables) == 5
    for name in tables:
        assert (parts / "curves" / name).read_bytes() == (whole / "curves" / name).read_bytes()
    for out in (whole, parts):
        for name, rows in read_tables(out / "curves").items():
            told = events_of(out / "curves" / "tensorboard" / name.replace(" ", "_"))
            for tag, value in _tags(rows).items():
                assert told[tag] == pytest.approx(value, rel=1e-4, abs=1e-6), (name, tag)


def _kill(patch, phase, step):
    train = fit.SparsifyModule.training_step

    def killed(self, batch, index):
        if (self.phase.name, self.global_step) == (phase, step):
            raise KeyboardInterrupt  # at once, unlike a signal: nothing is saved any more
        return train(self, batch, index)

    patch.setattr(fit.SparsifyModule, "training_step", killed)


def events_of(folder):
    """What TensorBoard shows: tag to step to value."""
    read = EventAccumulator(str(folder)).Reload()
    told = {tag: read.Scalars(tag) for tag in read.Tags()["scalars"]}
    assert all(len({e.step for e in events}) == len(events) for events in told.values())
    return {tag: {e.step: e.value for e in events} for tag, events in told.items()}


def _tags(rows):
    columns = {"loss": "loss", "l1": "l1", "lambda": "weight", "lr": "lr", "sparsity": "sparsity"}
    tags = {tag: {row.step: getattr(row, field) for row in rows} for tag, field in columns.items()}
    for layer in range(len(rows[0].dead_L)):
        for tag, field in (("sparsity_of_layers", "sparsity_L"), ("dead_neurons", "dead_L")):
            values = {row.step: getattr(row, field)[layer] for row in rows}
            tags[f"{tag}/{layer}"] = values
    return tags


def test_event_files_do_not_name_the_machine(dense, options):
    out = sparsify(options(model=str(dense())))

    files = [path for path in (out / "curves" / "tensorboard").rglob("*") if path.is_file()]
    assert [path.name for path in files] == ["events.out.tfevents.0000"]
    assert socket.gethostname().encode() not in files[0].read_bytes()


def test_a_run_without_curves_still_becomes_a_model(dense, options, monkeypatch):
    """Trained to the end by a version that wrote none."""
    monkeypatch.setattr(run, "read_tables", lambda folder: {})

    out = sparsify(options(model=str(dense())))

    assert not (out / "curves").exists()
    assert "curves" not in (out / "README.md").read_text()


@pytest.mark.slow
def test_the_compiled_step_has_the_curves_of_the_eager_one(dense, options, monkeypatch, tmp_path):
    eager = sparsify(options(model=str(dense()), out=tmp_path / "eager"))
    make = fit.SparsifyModule

    def compiled(*args, **kwargs):
        return make(*args, **kwargs | {"compile": True})

    monkeypatch.setattr(fit, "SparsifyModule", compiled)
    out = sparsify(options(model=str(dense()), out=tmp_path / "compiled"))

    name = "curves/ProSparse_before_the_shift.csv"
    for a, b in zip(rows_of(out / name), rows_of(eager / name), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)


RAISED_ROWS = [
    Row(step, 64 * step, 4.0, 0.1, 0.0, 1e-3, (0.6, 0.8), (0, 0), threshold=0.25) for step in (1, 2)
]


def table(first, losses, sparsity):
    """Rows of two layers, the second one twice as dense."""
    return [
        Row(step, 64 * step, loss, 0.1, 0.5, 1e-3, (share, 2 * share - 1), (0, 0))
        for step, (loss, share) in enumerate(zip(losses, sparsity, strict=True), first)
    ]


def test_the_page_has_a_line_for_every_phase_and_a_mark_for_the_shift():
    tables = {
        PROSPARSE: table(3, [5.0, 4.0, 3.5], [0.6, 0.7, 0.9]),
        "SiLU original": table(3, [4.0, 3.5, 3.0], [0.5, 0.5, 0.5]),
        "pre-training": table(1, [9.0, 6.0], [0.5, 0.5]),
    }
    shares = {"SiLU original": 0.0, PROSPARSE: 0.85, SHIFTED: 0.93}
    scores = {name: Score(2.0, share, (share,), (0,)) for name, share in shares.items()}

    figure = draw_curves(tables, scores)

    loss, weight, sparsity, layers, *_ = figure.axes
    names = ["pre-training", "SiLU original", PROSPARSE]
    assert [line.get_label() for line in loss.lines] == names
    assert [list(line.get_xdata()) for line in weight.lines] == [
        [64, 128],
        [192, 256, 320],
        [192, 256, 320],
    ]
    mean, mark = sparsity.lines[2:]
    assert list(mean.get_ydata()) == pytest.approx([0.4, 0.55, 0.85])
    assert (list(mark.get_xdata()), list(mark.get_ydata())) == ([320], [0.93])
    assert SHIFTED in mark.get_label()
    (mesh,) = layers.collections
    expected = torch.tensor([[0.6, 0.7, 0.9], [0.2, 0.4, 0.8]]).flatten().tolist()
    assert mesh.get_array().flatten().tolist() == pytest.approx(expected)


def test_every_mark_has_a_sign_of_its_own_and_the_color_of_its_training():
    raised = "raised threshold"
    tables = {
        PROSPARSE: table(1, [5.0, 4.0], [0.6, 0.7]),
        raised: table(1, [5.0, 4.0], [0.6, 0.9]),
    }
    shares = {PROSPARSE: 0.7, SHIFTED: 0.75, raised: 0.88, "fine-tuned": 0.87, "as saved": 0.9}
    scores = {name: Score(2.0, share, (share,), (0,)) for name, share in shares.items()}

    lines = draw_curves(tables, scores).axes[2].lines

    of = {line.get_label().removesuffix(", on held-out text"): line for line in lines[2:]}
    assert list(of) == [SHIFTED, "fine-tuned", "as saved"]
    assert len({mark.get_marker() for mark in of.values()}) == 3
    assert of[SHIFTED].get_color() == lines[0].get_color()
    assert of["as saved"].get_color() == of["fine-tuned"].get_color() == lines[1].get_color()


def test_the_wanted_sparsity_is_dotted_from_where_it_is_known():
    rows = [row._replace(wanted=wanted) for row, wanted in zip(RAISED_ROWS, (0, 0.7), strict=True)]
    scores = {"raised threshold": Score(2.0, 0.8, (0.8,), (0,))}

    weight, sparsity = draw_curves({"raised threshold": rows}, scores).axes[1:3]

    dotted = [line for line in sparsity.lines if line.get_linestyle() == ":"]
    assert [list(line.get_ydata()) for line in dotted] == [[pytest.approx(nan, nan_ok=True), 0.7]]
    assert list(weight.lines[0].get_ydata()) == [0.25, 0.25]


def test_the_card_shows_the_page(dense, options):
    out = sparsify(options(model=str(dense()), tokens=64))  # one step, one row

    assert (out / "curves" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "](curves/curves.png)" in (out / "README.md").read_text()


RANKS = """
import os
from pathlib import Path
import lightning as L
import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM
from sparsecast.core.lightning import cluster_environment
from sparsecast.sparsify.training import curves
from sparsecast.sparsify.training.lightning_module import Phase, SparsifyModule

rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
curves.ROWS, curves.MOST_STEPS = 1, 2
torch.manual_seed(1)
sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 64}
model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, hidden_act="relu"))
batches = torch.randint(64, (5, 4, 2)).chunk(size, 1)[rank]
phase = Phase(name="p", start=10, stop=15, l1=1.0, lr=1e-2, warmup=1, decay_from=15)
trainer = L.Trainer(
    accelerator="cpu",
    devices=size,
    strategy="ddp" if size > 1 else "auto",
    max_steps=5,
    logger=False,
    enable_checkpointing=False,
    use_distributed_sampler=False,
    plugins=[cluster_environment()],
    callbacks=[curves.Curves(Path(os.environ["FOLDER"]), phase, 8)],
)
trainer.fit(SparsifyModule(model, phase), DataLoader(list(batches), batch_size=None))
os._exit(0)
"""


@pytest.mark.slow
def test_two_processes_write_the_curves_of_one(ranks_forked, tmp_path):
    """Each has half of every batch; neurons are dead that fire in neither half."""
    tables = []
    for count in (1, 2):
        folder = tmp_path / str(count)
        code = f"os.environ['FOLDER'] = {str(folder)!r}\n{RANKS}"
        for process in ranks_forked(count, [], code):
            _, told = process.communicate()
            assert process.returncode == 0, told
        tables.append(rows_of(folder / "p.csv"))
        assert len(events_of(folder / "tensorboard" / "p")["loss"]) == 3

    alone, both = tables
    assert [row["step"] for row in both] == [12, 14, 15]
    for a, b in zip(alone, both, strict=True):
        assert b == pytest.approx(a, rel=1e-4)
    assert alone[-1]["dead_0"] > 0

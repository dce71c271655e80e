"""Layers or batches, distributed over two processes of one torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch

from sparsecast.core.distributed import DistributedContext
from sparsecast.core.errors import InputError
from sparsecast.predictors.checkpoint import load_predictors
from sparsecast.predictors.config import TrainConfig
from sparsecast.predictors.layer_data import layer_batches
from sparsecast.predictors.predictor import Predictor
from sparsecast.predictors.training.data import TokenBlocks
from sparsecast.predictors.training.layer_parallel import gather_layers, layers_of_process


def arguments(cfg) -> list[str]:
    options = ["train"]
    for name, value in asdict(cfg).items():
        if value is not None:
            text = str(value).lower() if value is True else str(value)
            options += [f"--{name.replace('_', '-')}", text]
    return options


@pytest.fixture
def run(ranks_forked):
    """(exit codes, joined standard errors) of so many processes of one CPU thread, whose sums round
    alike."""

    def run(cfg, processes: int) -> tuple[list[int], str]:
        ranks = ranks_forked(processes, arguments(cfg))
        errors = [rank.communicate()[1] for rank in ranks]
        return [rank.returncode for rank in ranks], "".join(errors)

    return run


def torchrun(cfg, processes: int) -> tuple[list[int], str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "sparsecast.cli.main", *arguments(cfg)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        timeout=300,
    )
    return [done.returncode] * processes, done.stderr


def same_by_one_and_two(run, cfg, tmp_path) -> str:
    """Train into "one" by one process and "two" by two; what the latter told."""
    codes, error = run(cfg, 1)
    assert codes == [0], error
    codes, told = run(replace(cfg, out=tmp_path / "two"), 2)
    assert codes == [0, 0], told
    one, two = (load_predictors(tmp_path / name) for name in ("one", "two"))
    assert one.manifest == two.manifest
    for a, b in zip(one.layers, two.layers, strict=True):
        for x, y in zip(a.weights, b.weights, strict=True):
            assert torch.equal(x, y)
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two"}
    return told


def test_two_processes_train_the_layers_that_one_does(recipe, tmp_path, run):
    changes = {"predictor_dtype": "q4_0", "target_perplexity": None}
    cfg = replace(recipe, epochs=2, out=tmp_path / "one", **changes)
    told = same_by_one_and_two(run, cfg, tmp_path)
    assert (tmp_path / "two" / "logs" / "version_0" / "metrics.csv").is_file()
    assert " ".join(told.split()).count("on the calibration split recall") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{"predictor_dtype": "q4_0"}, {"recipe": "reference", "target_recall": None}],
    ids=["q4_0", "reference"],
)
def test_torchruns_two_processes_train_the_layers_that_one_does(recipe, tmp_path, changes):
    cfg = replace(recipe, epochs=2, out=tmp_path / "one", **changes)
    told = same_by_one_and_two(torchrun, cfg, tmp_path)
    assert " ".join(told.split()).count("on the calibration split recall") == 1


@pytest.mark.slow
def test_half_batches_on_two_processes_equal_whole_batches(recipe, synthetic, tmp_path, run):
    """The split has 188 blocks; two batches of two blocks per step replace one of four."""
    cfg = replace(recipe, epochs=2, target_recall=0.9)
    codes, error = run(replace(cfg, out=tmp_path / "one", batch_size=128), 1)
    assert codes == [0], error
    split = replace(cfg, out=tmp_path / "two", batch_size=64, data_parallel=True)
    codes, error = run(split, 2)
    assert codes == [0, 0], error
    one, two = (load_predictors(tmp_path / name) for name in ("one", "two"))
    for layer in (0, 1):
        for x_TD, _ in layer_batches(synthetic, "held-out", layer):
            a, b = (p.layers[layer].logits(x_TD) for p in (one, two))
            # Blocks at the end of a shard are shorter, so the mean of two means differs a little.
            assert ((a >= 0) == (b >= 0)).float().mean() > 0.998
            torch.testing.assert_close(a / a.std(), b / b.std(), rtol=0, atol=0.05)
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two"}


def test_shares_are_equally_long_and_cover_the_split(synthetic):
    def rows(share: tuple[int, int]) -> list[bytes]:
        batches = TokenBlocks(synthetic, "train", 64, seed=1, share=share)
        assert len(list(batches)) == len(batches)
        return [batch.x_LBD.numpy().tobytes() for batch in batches]

    whole = rows((0, 1))
    assert len(whole) == 94
    parts = [rows((i, 3)) for i in range(3)]
    assert [len(part) for part in parts] == [31, 31, 31]
    assert [part[k] for k in range(31) for part in parts] == whole[:93]


def test_a_missing_layer_is_named(tmp_path):
    """Two machines that do not share a disk."""
    own = {layer: Predictor(torch.ones(5, 8), torch.rand(9, 5)) for layer in (0, 1)}
    context = type("C", (), {"size": 2, "leads": True, "wait": lambda self: None})()

    def plan(layers: int) -> SimpleNamespace:
        return SimpleNamespace(
            context=context, work=tmp_path, ranks=[5] * layers, data_parallel=False
        )

    with pytest.raises(InputError, match=r"lacks layers \[2\]"):
        gather_layers(plan(3), own)
    done = gather_layers(plan(2), own)
    assert torch.equal(done[1].fc2_FR, own[1].fc2_FR)


@pytest.mark.slow
def test_online_two_processes_train_the_layers_that_one_does(model_folder, corpus, tmp_path, run):
    cfg = TrainConfig(
        model=str(model_folder),
        corpus=str(corpus),
        out=tmp_path / "one",
        tokens=2_000,
        seq_len=256,
        epochs=2,
        batch_size=128,
        rank=32,
        device="cpu",
    )
    same_by_one_and_two(run, cfg, tmp_path)


def test_every_layer_has_one_process():
    layers = list(range(7))
    shares = [layers_of_process(layers, DistributedContext(rank, 3), False) for rank in range(3)]
    assert sorted(layer for share in shares for layer in share) == layers
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert layers_of_process(layers, DistributedContext(2, 3), True) == layers


def test_more_processes_than_layers_are_refused(recipe, tmp_path, run):
    codes, error = run(replace(recipe, out=tmp_path / "pred"), 3)
    assert codes == [2, 2, 2]
    told = [line for line in error.splitlines() if line.startswith("sparsecast: ")]
    assert len(told) == 1
    assert "3 processes share 2 layers" in told[0]
    assert "--data-parallel true" in told[0]
    assert list(tmp_path.iterdir()) == []

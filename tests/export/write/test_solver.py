"""PowerInfer's own solver and exporter on the same counts; need cvxopt and PowerInfer's sources."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from sparsecast.export.write.gpuidx import write_gpuidx
from sparsecast.export.write.hot_cold import BLOCK, blocks_per_layer, hottest, split_for
from sparsecast.export.write.vram import Budget


@pytest.fixture
def sources(engine) -> Path:
    """PowerInfer's repository, above its build folder."""
    pytest.importorskip("cvxopt.glpk")
    found = [folder for folder in engine.resolve().parents if (folder / "powerinfer-py").is_dir()]
    if not found:
        pytest.skip("no powerinfer-py above POWERINFER_BUILD")
    return found[0]


def save(folder: Path, counts: list[torch.Tensor]) -> Path:
    folder.mkdir()
    for i, count_F in enumerate(counts):
        torch.save(count_F.float(), folder / f"activation_{i}.pt")
    return folder


@pytest.mark.engine
@pytest.mark.parametrize("seed", range(20))
def test_powerinfers_solver_finds_the_same(seed, sources, tmp_path, monkeypatch):
    """Counts per layer where no other block sum equals the last one taken, else the total."""
    monkeypatch.syspath_prepend(str(sources / "powerinfer-py"))
    solve = import_module("powerinfer.solver").solve_gpu_split
    generator = torch.Generator().manual_seed(seed)
    layers, blocks = 12 + seed % 5, 4 + seed % 3
    # Sums of 256 stay below 2^24, so PowerInfer's float32 is exact; every fourth problem has ties.
    largest = 2 if seed % 4 == 3 else 60_000
    counts_LF = torch.randint(0, largest, (layers, blocks * BLOCK), generator=generator)
    counts_LF = counts_LF * torch.rand(layers, 1, generator=generator).add(0.1).clamp(max=1)
    counts = list(counts_LF.long())
    capacity = int(torch.randint(0, layers * blocks * BLOCK, (), generator=generator))

    theirs = solve(
        activation_path=str(save(tmp_path / "activation", counts)),
        neuron=blocks * BLOCK,
        capacity=capacity,
        layer=layers,
        batch=BLOCK,
        threshold=0,
    )
    ours = [k * BLOCK for k in blocks_per_layer(counts, capacity // BLOCK)]

    def total(sizes: list[int]) -> int:
        pairs = zip(counts, sizes, strict=True)
        return sum(int(count_F[hottest(count_F, k)].sum()) for count_F, k in pairs)

    assert total(ours) == total([int(k) for k in theirs])
    sums = torch.cat([c.sort(descending=True).values.view(-1, BLOCK).sum(1) for c in counts])
    around = sums.sort(descending=True).values[capacity // BLOCK - 1 :][:2]
    if len(set(around.tolist())) == 2:
        assert ours == [int(k) for k in theirs]


@pytest.mark.engine
def test_powerinfers_exporter_writes_the_same_bytes(sources, tmp_path):
    """Three layers: from eleven on its exporter takes another layer's counts."""
    generator = torch.Generator().manual_seed(0)
    counts = [torch.randperm(1280, generator=generator) * factor for factor in (1, 2, 3)]
    split = split_for(Budget(given=1600 * 100, before=0, half_cache=2**40, neuron=100), counts)
    write_gpuidx(tmp_path / "ours.gpuidx", split)
    paths = [sources / "powerinfer-py", sources / "gguf-py", *sys.path]

    options = {
        "activation": save(tmp_path / "activation", counts),
        "layer": 3,
        "neuron": 1280,
        "capacity": 1600,
        "vram-capacity": split.nbytes,
        "output": tmp_path / "theirs.gpuidx",
    }
    subprocess.run(
        [sys.executable, "-m", "powerinfer"]
        + [word for name, value in options.items() for word in (f"--{name}", str(value))],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "NO_LOCAL_GGUF": "1"},
        check=True,
        capture_output=True,
    )

    assert [len(hot_K) for hot_K in split.hot] == [0, 768, 768]
    ours, theirs = (tmp_path / f"{who}.gpuidx" for who in ("ours", "theirs"))
    assert ours.read_bytes() == theirs.read_bytes()

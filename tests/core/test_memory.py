"""Memory that a process may have, and what it takes."""

from __future__ import annotations

import sys

import pytest
import torch

from sparsecast.core import memory
from sparsecast.core.errors import InputError
from sparsecast.core.machine import total_memory
from sparsecast.core.memory import check_memory, held, host_limit, watch_memory

CPU = torch.device("cpu")
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@linux
def test_the_peak_of_a_block_is_seen_after_it_is_freed():
    before = held().own
    with watch_memory() as peak:
        torch.ones(50_000_000).add_(1)
    assert peak.own - before == pytest.approx(200e6, rel=0.1)
    assert held().own - before < 50e6


@linux
def test_a_mapped_file_is_not_the_process_s_own(tmp_path):
    torch.save(torch.ones(25_000_000), tmp_path / "w.pt")
    before = held()
    mapped = torch.load(tmp_path / "w.pt", mmap=True)
    assert mapped.sum() == 25_000_000
    assert held().files - before.files == pytest.approx(100e6, rel=0.1)
    assert held().own - before.own < 20e6


@linux
def test_the_limit_is_at_most_ram_and_swap():
    limit, ram = host_limit(), total_memory()
    assert limit is not None
    assert ram is not None
    assert 0 < limit < 100 * ram


@pytest.mark.parametrize(
    ("line", "files", "limits"),
    [
        ("0::/a/b", {"a/b/memory.max": "5000", "a/memory.max": "max"}, [5000]),
        ("0::/a/b", {"a/b/memory.max": "5000", "a/b/memory.swap.max": "70"}, [5070]),
        ("0::/a/b", {"a/b/memory.max": "5000", "a/b/memory.swap.max": "max"}, []),
        ("0::/hidden", {"memory.max": "7000"}, [7000]),
        ("4:memory:/a", {"memory/a/memory.limit_in_bytes": "900"}, [900]),
        ("4:memory:/a", {"memory/a/memory.limit_in_bytes": str(2**63 - 4096)}, []),
        ("4:cpu:/a", {"cpu/a/memory.limit_in_bytes": "900"}, []),
        ("0::/", {}, []),
    ],
)
def test_limits_of_cgroups(tmp_path, line, files, limits):
    (tmp_path / "proc").write_text(line + "\n")
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert memory._cgroup_limits(tmp_path / "proc", tmp_path) == limits


def test_more_than_there_is_at_all_is_refused(monkeypatch):
    monkeypatch.setattr(memory, "host_limit", lambda: 8_000_000)
    check_memory("out: the model", CPU, host=8_000_000, instead="rest")
    with pytest.raises(
        InputError,
        match=r"^out: the model needs 9 MB of memory, but this process can get 8 MB in all; rest$",
    ):
        check_memory("out: the model", CPU, host=9_000_000, instead="rest")
    monkeypatch.setattr(memory, "host_limit", lambda: None)
    check_memory("out: the model", CPU, host=10**18, instead="rest")


def test_so_is_more_than_a_gpu_has(monkeypatch):
    monkeypatch.setattr(memory, "device_limit", lambda device: 8_000_000)
    with pytest.raises(InputError, match="needs 9 MB of memory, but cuda:1 has 8 MB in all"):
        check_memory("out", torch.device("cuda:1"), on_device=9_000_000, instead="rest")

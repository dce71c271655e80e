"""What the environment says of other processes, refused before anybody is waited for."""

from __future__ import annotations

import os
import socket
from contextlib import nullcontext
from datetime import timedelta

import pytest

from sparsecast.core import distributed
from sparsecast.core.distributed import DistributedContext, check_shared, distributed_context
from sparsecast.core.errors import InputError

LAUNCHED = {
    "WORLD_SIZE": "2",
    "RANK": "0",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "2",
}


@pytest.fixture(autouse=True)
def _alone(monkeypatch) -> None:
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("size", [None, "1"])
def test_one_process_is_alone_whatever_its_rank(size, monkeypatch):
    monkeypatch.setenv("RANK", "x")
    if size is not None:
        monkeypatch.setenv("WORLD_SIZE", size)
    with distributed_context() as ranks:
        assert ranks == DistributedContext()


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("WORLD_SIZE", "x", "a whole number"),
        ("WORLD_SIZE", "", "a whole number"),
        ("WORLD_SIZE", "-1", "a whole number"),
        ("WORLD_SIZE", "0", "a number from 1 to"),
        ("WORLD_SIZE", "٣", "a whole number"),
        ("WORLD_SIZE", "9" * 5000, "a whole number"),
        ("RANK", "x", "a whole number"),
        ("RANK", "2", "a number from 0 to 1;"),
        ("MASTER_PORT", "http", "a whole number"),
        ("MASTER_PORT", "65536", "a number from 0 to 65,535"),
        ("LOCAL_RANK", "1.0", "a whole number"),
        ("LOCAL_WORLD_SIZE", "3", "a number from 1 to 2;"),
    ],
)
def test_a_variable_that_is_no_number_is_named(name, value, expected, monkeypatch):
    for variable, text in (LAUNCHED | {name: value}).items():
        monkeypatch.setenv(variable, text)
    with pytest.raises(InputError, match=f"^{name}=.* expected {expected}"), distributed_context():
        pass


@pytest.mark.parametrize("name", ["RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_half_a_launch_is_none(name, monkeypatch):
    for variable, text in LAUNCHED.items():
        if variable != name:
            monkeypatch.setenv(variable, text)
    with (
        pytest.raises(InputError, match=f"WORLD_SIZE=2 in the environment, but no {name}"),
        distributed_context(),
    ):
        pass


@pytest.mark.parametrize(
    ("rank", "told"),
    [("0", "^1 of 2 ranks have started within"), ("1", "^no rank 0 has started at")],
)
def test_a_rank_that_never_starts_is_not_waited_for_forever(rank, told, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    for variable, text in (LAUNCHED | {"RANK": rank, "MASTER_PORT": port}).items():
        monkeypatch.setenv(variable, text)
    monkeypatch.setattr(distributed, "JOIN", timedelta(seconds=1))
    with pytest.raises(ConnectionError, match=told), distributed_context():
        pass


def test_a_shared_folder_may_be_where_nobody_may_list(monkeypatch, tmp_path):
    def refused(_):
        raise PermissionError

    monkeypatch.setattr(os, "listdir", refused)
    monkeypatch.setattr(distributed, "SHOWN", 0)
    monkeypatch.setattr(DistributedContext, "together", lambda _: nullcontext())
    ranks = DistributedContext(1, 2)
    check_shared(tmp_path, ranks)
    with pytest.raises(InputError, match="absent: rank 0 has made this folder, but rank 1 on "):
        check_shared(tmp_path / "absent", ranks)

"""Broken activation stores, as `report` and `train` read them, and through `inspect`."""

from __future__ import annotations

import pytest
from broken.runner import assert_message, command, judge, refused
from broken.store import CASES

from sparsecast.collect.store.store import ActivationStore
from sparsecast.core.errors import InputError


def read_all(folder):
    store = ActivationStore(folder)
    store.stats()
    for split in ("train", "calibration", "held-out"):
        for shard in range(len(store.shards(split))):
            store.tokens(split, shard)
            for layer in store.manifest.layers:
                store.rows(split, shard, layer)
                store.energies(split, shard, layer)


def show(folder):
    """Damage in shards is listed, with exit code 1."""
    try:
        command("inspect", "{}")(folder)
    except AssertionError as error:
        if "exit code 1" not in str(error) or "failed" in str(error):
            raise
        raise InputError(f"{folder}: damage is listed") from error


@pytest.mark.parametrize("read", [read_all, show])
def test_the_sound_store_is_read(read, sound_store):
    assert refused(read, sound_store) is None


@pytest.mark.parametrize("case", CASES, ids=str)
def test_broken(case, sound_store, copy_of, tmp_path):
    judge(case, read_all, copy_of(sound_store, tmp_path / "acts"))


@pytest.mark.parametrize("case", [case for case in CASES if "sealed" in case.name], ids=str)
def test_inspect_shows_or_refuses_it(case, sound_store, copy_of, tmp_path):
    folder = copy_of(sound_store, tmp_path / "acts")
    case.damage(folder)
    if (told := refused(show, folder)) is not None:
        assert_message(told, folder)

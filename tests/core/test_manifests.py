"""What the manifests of activations and of predictors share."""

from __future__ import annotations

from dataclasses import make_dataclass

import pytest

from sparsecast.core.errors import InputError
from sparsecast.core.manifests import check_keys, check_version, is_shallow


def test_versions_and_keys(tmp_path):
    kind = make_dataclass("Manifest", ["a", "b"])
    path = tmp_path / "manifest.json"
    check_version(path, {"format_version": 3}, 3, "collect again")
    check_keys(path, {"a": 1, "b": 2}, kind, "collect again")
    with pytest.raises(
        InputError, match="version 4, but this sparsecast reads up to 3: it was wri"
    ):
        check_version(path, {"format_version": 4}, 3, "collect again")
    with pytest.raises(InputError, match="damaged, it lacks 'b'; collect again"):
        check_keys(path, {"a": 1}, kind, "collect again")
    with pytest.raises(InputError, match="damaged, it has an unknown 'c'; collect again"):
        check_keys(path, {"a": 1, "b": 2, "c": 3}, kind, "collect again")


@pytest.mark.parametrize("levels", [10, 600, 100_000])
def test_depth(levels):
    value = 1
    for i in range(levels):
        value = [value] if i % 2 else {"a": value}
    assert is_shallow(value) == (levels == 10)

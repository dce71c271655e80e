"""Configurations made in Python: what each field takes, and that all of them check alike."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest

from sparsecast.cli.stages import STAGES, load
from sparsecast.collect.config import CollectConfig
from sparsecast.core.errors import InputError
from sparsecast.core.options import without_none
from sparsecast.export.config import VerifyConfig
from sparsecast.predictors.config import ReportConfig, TrainConfig

OTHERS = {"sparsify"}
"""Stages whose options need more than these values to be accepted."""
NEEDED = {
    "convert": {"to": "llama"},
    "train": {"activations": "a"},
    "evaluate": {"tasks": ["t"], "corpus": "c"},
    "export": {"predictors": "p"},
    "bench engine": {"bundle": "b"},
    "bench export": {"model": "m", "predictors": "p"},
}


def made(name: str, **given: object) -> object:
    """The configuration of a stage, with a word for whatever it requires."""
    kind = load(STAGES[name].config)
    needed = [f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING]
    lists = {
        f.name for f in dataclasses.fields(kind) if f.default_factory is not dataclasses.MISSING
    }
    words = {key: "w" for key in needed if key not in lists}
    return kind(**(words | NEEDED.get(name, {}) | given))


def options(kind: object) -> list[tuple[str, str]]:
    found = []
    for name in STAGES.keys() - OTHERS:
        config = load(STAGES[name].config)
        for key, hint in get_type_hints(config).items():
            if without_none(hint) is kind:
                found.append((name, key))
    return sorted(found)


@pytest.mark.parametrize(("stage", "name"), options(Path))
def test_every_path_may_be_a_str(stage, name):
    config = made(stage, **{name: "x/y"})
    assert getattr(config, name) == Path("x/y")
    assert isinstance(getattr(config, name), Path)
    with pytest.raises(InputError, match="expected a path"):
        made(stage, **{name: ""})


@pytest.mark.parametrize(("stage", "name"), options(int))
@pytest.mark.parametrize("value", [-1, 2**70, 2.0, True, "5", float("nan")], ids=repr)
def test_no_whole_number_is_any_of_these(stage, name, value):
    with pytest.raises(InputError, match=f"^--{name.replace('_', '-')}: .*, (got|expected)"):
        made(stage, **{name: value})


@pytest.mark.parametrize(("stage", "name"), options(float))
@pytest.mark.parametrize("value", [float("nan"), float("inf"), "0.5", True, 10**400, -0.5], ids=str)
def test_no_number_is_any_of_these(stage, name, value):
    with pytest.raises(InputError, match=f"^--{name.replace('_', '-')}: "):
        made(stage, **{name: value})


def test_equal_requests_are_equal():
    given = CollectConfig(model=Path("m"), corpus="c", out="o", tokens=np.int64(99), layers=(2, 0))
    assert given == CollectConfig(model="m", corpus="c", out=Path("o"), tokens=99, layers=[0, 2])
    assert type(given.tokens) is int


def test_a_word_among_paths_stays_a_word():
    config = ReportConfig(
        predictors="p", activations="a", out="o", model="m", against=["sign", "./sign", "b"]
    )
    assert config.against == ["sign", Path("sign"), Path("b")]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"lr": 0.0}, r"--lr: must be in \(0, inf\), got 0.0"),
        ({"target_recall": 1.5}, r"--target-recall: must be in \(0, 1\), got 1.5"),
        ({"epochs": 0}, "--epochs: must be at least 1, got 0"),
        ({"batch_size": 0}, "--batch-size: must be at least 32, got 0"),
        ({"seed": 2**32}, "--seed: must be at most 4,294,967,295, got 4294967296"),
        ({"recipe": "ours"}, "--recipe: got 'ours', expected default, reference, svd"),
        ({"rank": 2**31}, "--rank: must be at most 2,147,483,647"),
        ({"device": "a\0b"}, "--device: got .*, expected text"),
        ({"out": b"x"}, "--out: got b'x', expected a path"),
    ],
)
def test_what_training_refuses(options, match):
    with pytest.raises(InputError, match=match):
        TrainConfig(**{"out": "o", "activations": "a"} | options)


def test_a_long_value_is_cut_in_a_message():
    with pytest.raises(InputError) as info:
        VerifyConfig(bundle="b", tokens="9" * 10_000)
    assert len(str(info.value)) < 200

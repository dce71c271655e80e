"""Mutations of valid files, a few in every run of the tests; `make fuzz` makes many."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from broken.fuzz import TARGETS, check, mutated
from broken.runner import assert_message, refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsecast.core.models.config_checks import check_fields
from sparsecast.predictors.manifest import read_manifest

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


@pytest.mark.parametrize("name", TARGETS)
def test_mutated_files_are_read_or_refused(name):
    make, read = TARGETS[name]

    @settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(mutated(make()))
    def one(data: bytes) -> None:
        check(read, data)

    one()


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_manifest_with_any_value_is_refused(data, make_predictors, sealed, tmp_path_factory):
    folder = make_predictors(tmp_path_factory.mktemp("pred") / "p")
    fields = sorted(set(json.loads((folder / "manifest.json").read_text())) - {"checksums"})
    name, value = data.draw(st.sampled_from(fields)), data.draw(JSON)
    told = refused(read_manifest, sealed(folder, **{name: value}))
    if told is not None:
        assert told.isprintable()
        assert "manifest.json" in told


@settings(deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(
            [
                "hidden_size",
                "rope_parameters",
                "rms_norm_eps",
                "architectures",
                "rope_scaling",
                "num_hidden_layers",
                "scale_emb",
            ]
        ),
        JSON,
    )
)
def test_a_config_with_any_value_is_read_or_refused(raw):
    told = refused(lambda path: check_fields(raw, path), Path("config.json"))
    if told is not None:
        assert_message(told, Path("config.json"))

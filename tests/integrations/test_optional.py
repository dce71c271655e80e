"""A missing optional package is one line that says how to install it."""

from __future__ import annotations

import math
import sys

import pytest

from sparsecast.core.errors import InputError
from sparsecast.integrations.optional import optional


def test_an_installed_module_is_imported():
    assert optional("math", option="--tasks", extra="lm-eval") is math


def test_a_missing_package_names_the_option_and_the_extra():
    with pytest.raises(InputError) as error:
        optional("no_such_package.part", option="--tasks", extra="lm-eval")
    assert str(error.value) == (
        "--tasks needs the package no_such_package, which is not installed; "
        "run: pip install 'sparsecast[lm-eval]'"
    )


def test_what_an_installed_package_lacks_is_its_own_error(tmp_path, monkeypatch):
    """Installing the extra again would not help."""
    (tmp_path / "half_installed.py").write_text("import no_such_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "half_installed", raising=False)
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        optional("half_installed", option="--tasks", extra="lm-eval")

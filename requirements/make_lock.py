"""`make lock`: write requirements/test.lock and docs/licences.md from what is installed.

Both start at sparsecast and its extra `dev`, and follow the metadata of what is installed. The lock
is a file of constraints: for its sake pip installs no package, but none in another version either.
It has no hashes, since what is installed does not know those of other systems' wheels. Local
versions such as 2.13.0+cpu are cut, so that it also serves machines with another build of torch.
"""

from __future__ import annotations

import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

LOCK = Path(__file__).with_name("test.lock")
LICENCES = Path(__file__).parents[1] / "docs" / "licences.md"
ROOT = ("sparsecast", "dev")
HEAD = """\
# Versions with which the tests pass, on Linux and Python {python}. Made by `make lock` from what is
# installed; other systems and Pythons may lack one of them, and some need others besides.
"""
PAGE = """\
# Licences of dependencies

What `pip install sparsecast` brings on Linux without a GPU, and what its extra `dev` adds, as
their own metadata say. Made by `make lock` from what is installed: `requirements/make_lock.py`
follows the requirements and reads the licences with Python's importlib.metadata. sparsecast
contains no code of theirs, and its own licence is Apache-2.0.

torch for CUDA also brings NVIDIA's libraries, under NVIDIA's own terms.

| package | licence |
|---|---|
"""
MOST = 60
"""Characters of a licence's name; some metadata hold the whole text."""


def installed() -> dict[str, Distribution]:
    """Return what the tests need, by name, without sparsecast itself."""
    found: dict[str, Distribution] = {}
    todo = [ROOT]
    seen = set()
    while todo:
        name, extra = todo.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:
            sys.exit(f"{name} is not installed: run `make test` first")
        for line in found[name].requires or ():
            asked = Requirement(line)
            markers = [{"extra": ""}, {"extra": extra}]
            if asked.marker is None or any(map(asked.marker.evaluate, markers)):
                below = canonicalize_name(asked.name)
                todo += [(below, ""), *((below, one) for one in asked.extras)]
    del found[ROOT[0]]
    return dict(sorted(found.items()))


def lock(packages: dict[str, Distribution]) -> str:
    """Return the lock file."""
    head = HEAD.format(python=f"{sys.version_info.major}.{sys.version_info.minor}")
    lines = (f"{name}=={Version(p.version).public}\n" for name, p in packages.items())
    return head + "".join(lines)


def licences(packages: dict[str, Distribution]) -> str:
    """Return the page of licences."""
    return PAGE + "".join(f"| {name} | {licence(p)} |\n" for name, p in packages.items())


def licence(package: Distribution) -> str:
    """Return a package's licence: the expression, the classifiers, or the first line of text."""
    fields = package.metadata
    if expression := fields.get("License-Expression"):
        return expression
    mark = "License :: "
    classes = [c for c in fields.get_all("Classifier") or [] if c.startswith(mark)]
    names = [c.rpartition(" :: ")[2] for c in classes if c != f"{mark}OSI Approved"]
    if names:
        return ", ".join(sorted(names))
    text = (fields.get("License") or "").strip().split("\n")[0].strip()
    return text[:MOST].replace("|", "/") or "not named in its metadata"


if __name__ == "__main__":
    there = installed()
    LOCK.write_text(lock(there), encoding="utf-8", newline="\n")
    LICENCES.write_text(licences(there), encoding="utf-8", newline="\n")

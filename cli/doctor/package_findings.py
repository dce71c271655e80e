"""Judge the packages that every installation has: their versions, and whether they import."""

from __future__ import annotations

from sparsecast.cli.doctor.finding import Finding, State
from sparsecast.cli.doctor.imports import Imports
from sparsecast.cli.doctor.packages import Package, unmet

GPU_ONLY = "triton"
"""What no stage needs without a GPU."""


def package_findings(wanted: list[Package], imports: Imports) -> list[Finding]:
    """Judge each package.

    Args:
        wanted: From `packages`.
        imports: What happened when those that are installed were imported.
    """
    gpu = bool(imports.torch.get("gpus"))
    return [_finding(package, imports.errors.get(package.module), gpu) for package in wanted]


def _finding(package: Package, error: str | None, gpu: bool) -> Finding:
    name, found = package.name, package.found or ""
    needed: State = "fix" if gpu or name != GPU_ONLY else "note"
    values = {"version": package.found, "wanted": package.wanted}
    if package.fit == "missing":
        told = f"missing, expected {package.wanted or 'any version'}"
        return Finding("packages", name, needed, told, package.remedy, values)
    if error is not None:
        again = f"pip install --force-reinstall '{name}{package.wanted}'"
        told = f"{found} cannot be imported: {error}"
        return Finding("packages", name, needed, told, again, values)
    if package.fit in ("too old", "too new"):
        told = f"{found} is {package.fit}, expected {package.wanted}"
        return Finding("packages", name, needed, told, package.remedy, values)
    if lacking := unmet(name):
        again = f"pip install --upgrade --upgrade-strategy only-if-needed '{name}{package.wanted}'"
        return Finding("packages", name, needed, f"{found} {lacking}", again, values)
    return Finding("packages", name, "ok", found, values=values)

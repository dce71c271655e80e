"""`sparsecast doctor`: what this machine can do, and what to install.

It works where other commands do not: of packages it imports in this process those of Python alone
and `packaging`, and reports one that is missing or broken in a line.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from sparsecast.cli.doctor.builds import build_findings
from sparsecast.cli.doctor.config import DoctorConfig
from sparsecast.cli.doctor.finding import Finding, one_line
from sparsecast.cli.doctor.gpu import driver, gpu_findings, kernel_findings
from sparsecast.cli.doctor.imports import Imports, import_all, split_groups
from sparsecast.cli.doctor.machine import (
    compiler_finding,
    cpu_finding,
    disk_findings,
    memory_finding,
)
from sparsecast.cli.doctor.optional_parts import optional_findings
from sparsecast.cli.doctor.package_findings import package_findings
from sparsecast.cli.doctor.packages import Package, packages, python_finding
from sparsecast.cli.doctor.screen import screen_text
from sparsecast.cli.terminal import print_output
from sparsecast.core.files import check_writable_file, write_json


@dataclass(frozen=True)
class Diagnosis:
    """All findings."""

    findings: list[Finding]

    @property
    def ok(self) -> bool:
        """Whether all works that every stage needs, and all that the user named."""
        return not self.to_do

    @property
    def to_do(self) -> list[str]:
        """What to do, a line for each finding of the state fix."""
        return [
            f"{finding.name}: {finding.to_do or finding.found}"
            for finding in self.findings
            if finding.state == "fix"
        ]

    def values(self) -> dict[str, Any]:
        """Return what --json writes."""
        rows = [asdict(finding) for finding in self.findings]
        return {"ok": self.ok, "to_do": self.to_do, "findings": rows}


def doctor(cfg: DoctorConfig) -> Diagnosis:
    """Look at this machine and print what was found.

    Raises:
        InputError: --json cannot be written.
    """
    if cfg.json is not None:
        check_writable_file(cfg.json, "--json")
    found = diagnose(cfg)
    print_output(screen_text(found.findings, found.to_do))
    if cfg.json is not None:
        write_json(cfg.json, found.values())
    return found


def diagnose(cfg: DoctorConfig) -> Diagnosis:
    """Look at this machine. Whatever is broken becomes a finding; nothing is raised."""
    findings = _guarded("python", lambda: [python_finding()])
    try:
        wanted = packages()
    except Exception as error:
        wanted = []
        findings.append(_no_ranges(error))
    with ThreadPoolExecutor() as pool:
        imports = pool.submit(_imports, wanted)
        smi = pool.submit(driver)
        compiler = _later(pool, "compiler", lambda: [compiler_finding()])
        builds = _later(
            pool, "engines", lambda: build_findings(cfg.engine, cfg.llama_bench, os.environ)
        )
        facts = imports.result().torch
        findings += package_findings(wanted, imports.result())
        findings += _guarded("gpu", lambda: gpu_findings(facts, smi.result()))
        findings += _guarded("kernels", lambda: kernel_findings(facts))
        findings += compiler.result()
        findings += _guarded("cpu", lambda: [cpu_finding(facts.get("threads"))])
        findings += _guarded("memory", lambda: [memory_finding()])
        findings += _guarded("disk", disk_findings)
        findings += builds.result()
    findings += _guarded("extras", optional_findings) if wanted else []
    return Diagnosis(findings)


def _imports(wanted: list[Package]) -> Imports:
    installed = [package.module for package in wanted if package.fit != "missing"]
    return import_all(split_groups(installed))


def _no_ranges(error: Exception) -> Finding:
    told = f"the ranges of its packages are not known: {type(error).__name__}: {one_line(error)}"
    advice = "pip install packaging, and install sparsecast by pip"
    return Finding("packages", "sparsecast", "fix", told, advice)


def _later(
    pool: ThreadPoolExecutor, part: str, look: Callable[[], list[Finding]]
) -> Future[list[Finding]]:
    return pool.submit(_guarded, part, look)


def _guarded(part: str, look: Callable[[], list[Finding]]) -> list[Finding]:
    """Turn an error of `look` into a finding."""
    try:
        return look()
    except Exception as error:
        told = f"cannot be looked at: {type(error).__name__}: {one_line(error)}"
        return [Finding(part, part, "note", told)]

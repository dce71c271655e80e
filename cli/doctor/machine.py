"""Cores, memory, disk and the C++ compiler of this machine."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path

from sparsecast.cli.doctor.finding import Finding, one_line
from sparsecast.core.machine import total_memory, usable_cores

GIB = 2**30
LITTLE_DISK = 5 * GIB
"""Less free disk than this is told: tiny-prosparse needs less, no 1B model does."""
SOURCE = "#include <Python.h>\n#include <vector>\nstd::vector<int> numbers() { return {1}; }\n"
COMPILE_TIMEOUT = 60
LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


def gib(nbytes: float) -> str:
    """Format bytes, such as 15.3 GiB."""
    return f"{nbytes / GIB:,.3g} GiB" if nbytes < 1000 * GIB else f"{nbytes / GIB:,.0f} GiB"


def cpu_finding(threads: int | None) -> Finding:
    """Count cores.

    Args:
        threads: What torch uses, None if that is not known.
    """
    cores, usable = os.cpu_count() or 1, usable_cores()
    text = f"{cores} core{'s' * (cores > 1)}"
    if usable < cores:
        text += f", of which this process may use {usable}"
    if threads is not None:
        text += f"; torch uses {threads} thread{'s' * (threads > 1)}"
    values = {"cores": cores, "usable_cores": usable, "threads": threads}
    return Finding("cpu", platform.machine() or "CPU", "ok", text, values=values)


def memory_finding() -> Finding:
    """Measure memory, where the system says."""
    total, free = memory_bytes()
    limit = memory_limit()
    values = {"bytes": total, "free_bytes": free, "limit_bytes": limit}
    if total is None:
        return Finding("memory", "memory", "note", "this system does not say", values=values)
    text = gib(total) if free is None else f"{gib(total)}, {gib(free)} of it available"
    if limit is not None and limit < total:
        text += f"; this container may use {gib(limit)}"
    return Finding("memory", "memory", "ok", text, values=values)


def memory_bytes() -> tuple[int | None, int | None]:
    """Return total and available bytes of memory, None where the system does not say."""
    total, free = total_memory(), None
    if total is None:
        return None, None
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return total, free


def memory_limit() -> int | None:
    """Return the bytes that this container may use, None where nothing limits them.

    A limit of cgroup v1 is always a number, and one beyond the machine's memory limits nothing.
    """
    for path in LIMITS:
        try:
            return int(path.read_text(encoding="ascii"))
        except (OSError, ValueError):  # `max` is no number
            continue
    return None


def disk_findings() -> list[Finding]:
    """Measure free disk of the current folder, and of the one for temporary files."""
    places = [("current folder", os.getcwd), ("temporary files", tempfile.gettempdir)]
    return [_disk_finding(name, place) for name, place in places]


def _disk_finding(name: str, place: Callable[[], str]) -> Finding:
    try:
        folder = place()
        free = shutil.disk_usage(folder).free
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        help_ = "set TMPDIR to a folder of yours" if name != "current folder" else "cd to another"
        return Finding("disk", name, "fix", f"cannot be written ({one_line(error)})", help_)
    text, values = f"{folder}: {gib(free)} free", {"folder": folder, "free_bytes": free}
    if free < LITTLE_DISK:
        advice = "activations and bundles of a 7B model take tens of GiB"
        return Finding("disk", name, "note", text, advice, values)
    return Finding("disk", name, "ok", text, values=values)


def compiler_finding() -> Finding:
    """Compile a C++ file that includes Python.h, as torch.compile and Triton do."""
    program = _compiler()
    found = shutil.which(program[0]) if program else None
    if found is None:
        told = f"no {program[0]}" if program else "CXX is empty"
        return _no_compiler(f"{told}; torch.compile works without, but slower")
    if platform.system() == "Windows":
        return Finding("compiler", "C++", "ok", found)
    include = sysconfig.get_path("include")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(SOURCE, encoding="utf-8")
        command = [*program, "-I", include, "-c", str(source), "-o", str(Path(folder, "probe.o"))]
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=COMPILE_TIMEOUT,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return _no_compiler(f"{found} cannot be run ({one_line(error)})")
    if done.returncode == 0:
        return Finding("compiler", "C++", "ok", f"{found} compiles with Python's headers")
    told = done.stderr.decode(errors="replace")
    if "Python.h" in told:
        return _no_compiler(f"{found} works, but {include} has no Python.h", headers=True)
    return _no_compiler(f"{found} fails ({one_line(told)})")


def _compiler() -> list[str]:
    default = {"Windows": "cl", "Darwin": "clang++"}.get(platform.system(), "g++")
    return shlex.split(os.environ.get("CXX", default))


def _no_compiler(found: str, headers: bool = False) -> Finding:
    here = platform.system()
    compiler = {"Darwin": "xcode-select --install", "Windows": "install Visual Studio's C++ tools"}
    advice = compiler.get(here, "install g++ (Debian, Ubuntu: apt install g++), or name it by CXX")
    if headers:
        minor = f"{sys.version_info.major}.{sys.version_info.minor}"
        advice = f"install Python's headers (Debian, Ubuntu: apt install python{minor}-dev)"
    return Finding("compiler", "C++", "note", found, advice)

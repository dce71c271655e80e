"""run.json: how an output was made, so that `sparsecast rerun` can make it again.

It appears with the output that it describes, but no checksum covers it: time and machine stand in
it, so it differs between runs whose other files are the same. `sparsecast push` leaves it out,
because it holds paths of this machine. docs/file-formats.md lists its keys.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from sparsecast.core.distributed import int_from_environment
from sparsecast.core.errors import InputError
from sparsecast.core.files import read_json, write_json
from sparsecast.core.machine import cpu_name, usable_cores
from sparsecast.core.manifests import (
    check_keys,
    check_version,
    is_count,
    is_number,
    is_shallow,
    is_text,
    stated_checksum,
)
from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.core.options import MOST_SEED
from sparsecast.core.run_inputs import fingerprint_inputs

RUN = "run.json"
FORMAT_VERSION = 1
PACKAGES = (
    "sparsecast",
    "torch",
    "lightning",
    "transformers",
    "tokenizers",
    "datasets",
    "numpy",
    "triton",
)
"""Packages whose versions may change numbers; triton where it is installed."""
WANT = "the record of a run, which commands write beside their output"
AGAIN = "run the command by hand"
DATE = "%Y-%m-%dT%H:%M:%SZ"


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What run.json holds."""

    command: str
    options: dict[str, Any]
    """Every option as the command took it: given or default."""
    resolved: dict[str, Any]
    """What the command made of options that were `auto` or unset."""
    directory: str
    """Where the command ran; relative paths in `options` start there."""
    seed: int | None
    """None for a command that draws no random numbers."""
    inputs: dict[str, Any]
    """Option to the fingerprint of what it names; see core/run_inputs.py."""
    result: str | None
    """The checksum that the output's own manifest states; None without a manifest."""
    versions: dict[str, str]
    machine: dict[str, Any]
    date: str
    """When it was finished, in UTC."""
    seconds: float
    """Since its inputs were opened; of a resumed run, since it went on."""
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True, kw_only=True)
class Run:
    """A command that has opened its inputs and has yet to write its output."""

    command: str
    options: dict[str, Any]
    directory: str
    inputs: dict[str, Any]
    resolved: dict[str, Any]
    began: float
    """By `time.monotonic`."""

    def resolve(self, **values: Any) -> Run:
        """Add what became of further options."""
        return replace(self, resolved=self.resolved | plain(values))

    def record(self, result: str | None = None, *, threads: int | None = None) -> RunRecord:
        """Describe the run, which ends now.

        Args:
            threads: CPU threads that computed, if not as many as now.
        """
        on_gpu = str(self.resolved.get("device", "")).startswith("cuda")
        return RunRecord(
            command=self.command,
            options=self.options,
            resolved=self.resolved,
            directory=self.directory,
            seed=self.options.get("seed"),
            inputs=self.inputs,
            result=result,
            versions=versions_of(self.options),
            machine=this_machine(gpus=on_gpu, threads=threads),
            date=datetime.now(UTC).strftime(DATE),
            seconds=round(time.monotonic() - self.began, 3),
        )

    def write(self, folder: Path, *, threads: int | None = None) -> None:
        """Write run.json into a folder that is complete but for it."""
        record = self.record(stated_checksum(folder), threads=threads)
        write_json(folder / RUN, asdict(record))


def begin_run(
    command: str, config: Any, *, checkpoint: Checkpoint | None = None, **resolved: Any
) -> Run:
    """Note what a command was given, and fingerprint its inputs.

    Args:
        config: The command's options.
        checkpoint: `config.model`, if it is open already.
        resolved: What became of options that were `auto` or unset.

    Raises:
        InputError: An input is not there, or cannot be read.
    """
    options = {field.name: getattr(config, field.name) for field in fields(config)}
    return Run(
        command=command,
        options=plain(options),
        directory=os.getcwd(),
        inputs=fingerprint_inputs(config, checkpoint),
        resolved=plain(resolved),
        began=time.monotonic(),
    )


def plain(value: Any) -> Any:
    """Return a value of options as JSON has it: paths and devices as text."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, os.PathLike | torch.device) else value


def versions_of(options: Mapping[str, Any]) -> dict[str, str]:
    """Return the versions of Python and of the packages that compute."""
    found = {"python": platform.python_version()}
    for name in (*PACKAGES, *(["lm_eval"] if options.get("tasks") else [])):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def this_machine(*, gpus: bool, threads: int | None = None) -> dict[str, Any]:
    """Describe what of this machine and of its use may change numbers.

    Args:
        gpus: Whether GPUs compute; else none is named, and CUDA is left alone.
    """
    count = torch.cuda.device_count() if gpus else 0
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads() if threads is None else threads,
        "gpus": [torch.cuda.get_device_name(index) for index in range(count)],
        "processes": int_from_environment("WORLD_SIZE", 1, least=1),
    }


def read_run(path: Path) -> RunRecord:
    """Read a run.json, the one in a folder, or the record under `run` in evaluate's JSON.

    Raises:
        InputError: There is none, it is of another version, or no command could have written it.
    """
    if path.is_dir():
        if not os.path.lexists(path / RUN):
            raise InputError(
                f"{path}: holds no {RUN}, expected {WANT}; an older sparsecast wrote none: {AGAIN}"
            )
        path /= RUN
    value = read_json(path, WANT)
    if "command" not in value and isinstance(value.get("run"), dict):
        value = value["run"]
    if "command" not in value:
        raise InputError(f"{path}: names no command, expected {WANT}; if it is evaluate's: {AGAIN}")
    check_version(path, value, FORMAT_VERSION, AGAIN)
    check_keys(path, value, RunRecord, AGAIN)
    record = RunRecord(**value)
    if (name := _senseless(record)) is not None:
        raise InputError(f"{path}: damaged or edited, its {name} makes no sense; {AGAIN}")
    return record


def _senseless(record: RunRecord) -> str | None:
    """Name a field that no command could have written; None if there is none."""
    machine, seed = record.machine, record.seed
    rules: dict[str, bool] = {
        "command": is_text(record.command),
        "directory": is_text(record.directory)
        and _is_usable(record.directory)
        and os.path.isabs(record.directory),
        "seed": seed is None or (is_count(seed, least=0) and seed <= MOST_SEED),
        **{
            name: isinstance(value := getattr(record, name), dict)
            and is_shallow(value)
            and _is_usable(value)
            for name in ("options", "resolved", "inputs")
        },
        "result": record.result is None or is_text(record.result),
        "versions": isinstance(record.versions, dict)
        and all(map(is_text, record.versions.values())),
        "machine": isinstance(machine, dict)
        and all(is_text(machine.get(name)) for name in ("system", "cpu", "cpu_capability"))
        and all(is_count(machine.get(name)) for name in ("cores", "threads", "processes"))
        and isinstance(gpus := machine.get("gpus"), list)
        and all(map(is_text, gpus)),
        "date": _is_date(record.date),
        "seconds": is_number(record.seconds) and record.seconds >= 0,
    }
    return next((name for name, sound in rules.items() if not sound), None)


def _is_usable(value: Any) -> bool:
    """Return whether the system takes every text in a JSON value as a name."""
    if isinstance(value, dict):
        return _is_usable([*value, *value.values()])
    if isinstance(value, list):
        return all(map(_is_usable, value))
    try:
        return not isinstance(value, str) or (is_text(value) and b"\0" not in os.fsencode(value))
    except UnicodeEncodeError:
        return False


def _is_date(value: Any) -> bool:
    if not is_text(value):
        return False
    try:
        datetime.strptime(value, DATE)
    except ValueError:
        return False
    return True

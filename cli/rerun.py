"""`sparsecast rerun`: run a command again with the options that its run.json records.

Inputs must be those of the recorded run; other versions and another machine are told. On a CPU
the command gets as many threads as it had, because sums round differently with others.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import chdir, contextmanager, suppress
from dataclasses import MISSING, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from sparsecast.cli.stages import STAGES, load
from sparsecast.cli.suggestions import did_you_mean
from sparsecast.cli.terminal import process_rank
from sparsecast.core.earlier_runs import ADDED
from sparsecast.core.errors import InputError, one_line
from sparsecast.core.machine import usable_cores
from sparsecast.core.messages import log
from sparsecast.core.models.loading import pick_device
from sparsecast.core.options import command_of, option_of, short_repr, validate_fields
from sparsecast.core.run_inputs import describe_changes, fingerprint_inputs
from sparsecast.core.run_record import DATE, RUN, RunRecord, read_run, this_machine, versions_of

COMMANDS = ("collect", "train", "report", "evaluate", "export", "convert", "sparsify")
"""Those that write a run.json."""
EPOCH = "SOURCE_DATE_EPOCH"


@dataclass(frozen=True, kw_only=True)
class RerunConfig:
    """Run a command again with the options that run.json records, from any folder.

    Refused where an input has changed since; other versions and another machine are told, because
    numbers may differ then. On the same CPU, collect, export and report write the same bytes and
    train the same weights. Anybody can write a run.json: read whose command it is that you run.
    """

    run: Path
    """A run.json, the folder that holds one, or the JSON of `sparsecast evaluate`."""

    out: Path | None = None
    """New folder to write, for evaluate a file. Unset: where the recorded run wrote, if nothing is
    there any more."""

    def __post_init__(self) -> None:
        validate_fields(self)


def rerun(cfg: RerunConfig) -> Any:
    """Compare the inputs with the recorded ones, run the command, and compare its result.

    Returns:
        What the command's function returns.

    Raises:
        InputError: No run.json, or one that no command has written; an input that has changed; an
            output that is there already; or what the command raises.
    """
    record = read_run(cfg.run)
    out = None if cfg.out is None else cfg.out.expanduser().absolute()
    with _silent_unless_leading(), chdir(_directory(record)):
        config = config_of(record, cfg.run, out)
        _check_output(record, config)
        _check_inputs(record, config, cfg.run)
        with _threads_of(record), _date_of(record):
            _tell_differences(record)
            log.info(one_line(command_of(record.command, config)), extra={"style": "italic"})
            result = load(STAGES[record.command].run)(config)
        if record.result is not None:
            _compare_result(record, config.out)
        return result


@contextmanager
def _silent_unless_leading() -> Iterator[None]:
    """Under torchrun, let the leading process alone speak, and the others end without a word."""
    if not process_rank():
        yield
        return
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    except InputError as error:
        raise SystemExit(2) from error
    finally:
        log.setLevel(level)


def _directory(record: RunRecord) -> str:
    """Return where the command is run: there where it ran, or here if that is gone."""
    if os.path.isdir(record.directory):
        return record.directory
    log.warning(f"{record.directory}: is no more, so relative paths start in {os.getcwd()}")
    return os.getcwd()


@contextmanager
def _threads_of(record: RunRecord) -> Iterator[None]:
    """Use as many CPU threads as the recorded run, if there are so many cores."""
    threads, before = record.machine["threads"], torch.get_num_threads()
    if threads == before or threads > usable_cores():
        yield
        return
    log.info(f"CPU threads: {threads}, as the recorded run had")
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _date_of(record: RunRecord) -> Iterator[None]:
    """Let a report state the date of the recorded one, unless the user has set one."""
    if EPOCH in os.environ:
        yield
        return
    moment = datetime.strptime(record.date, DATE).replace(tzinfo=UTC)
    with suppress(KeyError, TypeError, ValueError):  # only a report states one
        moment = datetime.fromisoformat(record.resolved["date"]).replace(tzinfo=UTC)
    os.environ[EPOCH] = str(max(0, int(moment.timestamp())))
    try:
        yield
    finally:
        del os.environ[EPOCH]


def config_of(record: RunRecord, path: Path, out: Path | None) -> Any:
    """Build the command's options from the recorded ones.

    Args:
        path: Of the record, for messages.
        out: What --out gives, absolute.

    Raises:
        InputError: No command that writes a run.json, an option that it lacks, or a value that it
            does not take.
    """
    if record.command not in COMMANDS:
        raise InputError(
            f"{path}: its command is {short_repr(record.command)}, expected one of "
            f"{', '.join(COMMANDS)}"
        )
    kind = load(STAGES[record.command].config)
    known = {field.name: field for field in fields(kind)}
    if stray := record.options.keys() - known:
        name = min(stray)
        raise InputError(
            f"{path}: sparsecast {record.command} has no option "
            f"{short_repr(name)}{did_you_mean(name, known)}; the record is of sparsecast "
            f"{short_repr(record.versions.get('sparsecast'))}"
        )
    needed = [n for n, f in known.items() if f.default is f.default_factory is MISSING]
    if missing := [name for name in needed if name not in record.options]:
        raise InputError(f"{path}: {option_of(missing[0])} is missing, expected all options")
    if record.options.get("dry_run"):
        raise InputError(f"{path}: --dry-run is true, but a dry run leaves no record")
    # A null that is no default stands for nothing that the option can be.
    nulls = [n for n, v in record.options.items() if v is None and known[n].default is not None]
    if nulls:
        raise InputError(f"{path}: {option_of(nulls[0])} is null, expected a value")
    options = {name: was for name, was in ADDED.items() if name in known} | record.options
    on_cpu = options.get("device") == "auto" and record.resolved.get("device") == "cpu"
    if on_cpu and options.get("device_map") is None:
        options["device"] = "cpu"
    target = _target(kind)
    if out is not None:
        options |= {"json": None, target: out} if "json" in known else {target: out}
    try:
        return kind(**options)
    except (InputError, TypeError) as error:
        raise InputError(f"{path}: {record.command} does not take its options: {error}") from error


def _target(kind: type[Any]) -> str:
    """Return the option that names a command's output: --out, or --json of evaluate."""
    return "out" if any(field.name == "out" for field in fields(kind)) else "json"


def _check_output(record: RunRecord, config: Any) -> None:
    """Refuse an output that is there: another run would keep it, or overwrite a file."""
    target = _target(type(config))
    if getattr(config, target) is None:
        raise InputError(f"--out: the recorded {record.command} wrote no file; give one")
    for name in {target, "json"}:
        path = getattr(config, name, None)
        if path is None or not os.path.lexists(path):
            continue
        if path.is_dir() and not path.is_symlink() and not any(path.iterdir()):
            continue
        raise InputError(
            f"{path}: is there already, expected a new {'folder' if name == 'out' else 'file'}; "
            "give another --out, or move it away"
        )


def _check_inputs(record: RunRecord, config: Any, path: Path) -> None:
    """Refuse inputs that have changed, and tell those that cannot be compared."""
    now = fingerprint_inputs(config)
    if changes := describe_changes(record.inputs, now):
        named = "; ".join(
            f"{option_of(change)} {short_repr(str(getattr(config, change.partition(' ')[0])))}"
            for change in changes
        )
        raise InputError(
            f"{path}: since that run its inputs have changed: {named}; restore them, or run "
            f"`sparsecast {record.command}` by hand for a run of its own"
        )
    unknown = [option_of(name) for name, value in now.items() if _is_unknown(value)]
    unknown += [option_of(name) for name in now if name not in record.inputs]
    if unknown:
        named = ", ".join(dict.fromkeys(unknown))
        log.warning(f"cannot be compared with what the recorded run read: {named}")


def _is_unknown(value: Any) -> bool:
    return value is None or (isinstance(value, list) and None in value)


def _tell_differences(record: RunRecord) -> None:
    """Warn about other versions and another machine, in a line each."""
    if parts := _differences(record.versions, versions_of(record.options)):
        log.warning(f"other versions than the recorded run's, numbers may differ: {parts}")
    on_gpu = bool(record.machine["gpus"]) and pick_device("auto").type == "cuda"
    here = this_machine(gpus=on_gpu)
    was = {name: record.machine[name] for name in here}
    if parts := _differences(was | {"cores": here["cores"]}, here):
        log.warning(f"another machine than the recorded run's, numbers may differ: {parts}")


def _differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Describe the values that differ, on one line."""
    names = [name for name in {**was, **now} if was.get(name) != now.get(name)]
    return "; ".join(f"{n} was {_shown(was.get(n))}, now {_shown(now.get(n))}" for n in names)


def _shown(value: Any) -> str:
    if value is None or value == []:
        return "none"
    return short_repr(value) if isinstance(value, list) else one_line(str(value)[:80])


def _compare_result(record: RunRecord, out: Path) -> None:
    """Tell whether the output has the checksum of the recorded one."""
    found = read_run(out / RUN).result
    if found == record.result:
        text = f"{out}: the same as the recorded run's, checksum {found}"
        log.info(text, extra={"style": "green"})
    else:
        log.warning(
            f"{out}: differs from the recorded run's, whose checksum was {record.result}; this one "
            f"is {found}"
        )

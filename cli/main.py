"""`sparsecast <stage> [options]`: one config dataclass and one function per stage.

Exit codes: 0 done, 1 failed, 2 the user must change something; 130 and 143 as a shell has them
after Ctrl-C and SIGTERM.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from sparsecast.cli.stages import STAGES, Stage, load, usage
from sparsecast.cli.suggestions import did_you_mean
from sparsecast.cli.terminal import print_error, print_output, process_rank

QUIET = {
    "TOKENIZERS_PARALLELISM": "false",
    "DATASETS_VERBOSITY": "critical",
    "HF_HUB_VERBOSITY": "error",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}
"""What other libraries read when they are imported; the user's own settings win."""


_noted: list[int] = []
"""Signals that have come."""


def main(argv: list[str] | None = None) -> None:
    """Run one stage and exit with its code."""
    args = sys.argv[1:] if argv is None else argv
    if args[:1] in (["-h"], ["--help"]) or args[:2] in (["bench", "-h"], ["bench", "--help"]):
        print_output(usage() + "\n")
        return
    if args[:1] == ["--version"]:
        from importlib.metadata import version

        print_output(version("sparsecast") + "\n")
        return
    words = 2 if args[:1] == ["bench"] else 1
    name, rest = " ".join(args[:words]), args[words:]
    if name not in STAGES:
        found = f"no stage is called {name!r}" if args else "no stage given"
        one_of = [stage for stage in STAGES if name != "bench" or stage.startswith("bench ")]
        close = "" if name == "bench" else did_you_mean(name, [*STAGES, "--help", "--version"])
        known = close or f"; expected one of {', '.join(one_of)}"
        sys.exit(print_error(found + known, 2))
    with _signals():
        code = _run(name, STAGES[name], rest)
    sys.exit(code)


@contextmanager
def _signals() -> Iterator[None]:
    """Handle SIGTERM as Ctrl-C, and note both, unless somebody else handles or ignores them.

    Afterwards they have their own handlers again: an exception raised while Python shuts down is
    a traceback.
    """
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    ours = {n: h for n, h in before.items() if h in (signal.SIG_DFL, signal.default_int_handler)}
    _noted.clear()
    for number in ours:
        signal.signal(number, _interrupt)
    try:
        yield
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)


def _interrupt(number: int, frame: object) -> NoReturn:
    """Raise an interrupt, and ignore further SIGTERMs during the clean-up."""
    from sparsecast.core.interrupts import Terminated

    _noted.append(number)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    signal.signal(number, signal.SIG_IGN)
    raise Terminated


def _run(name: str, stage: Stage, args: list[str]) -> int:
    for variable, value in QUIET.items():
        os.environ.setdefault(variable, value)
    from sparsecast.core.errors import InputError
    from sparsecast.core.interrupts import Terminated

    try:
        from sparsecast.cli.parser import parse

        config_type = load(stage.config)
        config = config_type(**parse(name, config_type, stage.positional, args))
        result = load(stage.run)(config) if stage.standalone else _run_loaded(stage, config)
    except InputError as error:
        return print_error(str(error), 2)
    except KeyboardInterrupt as stopped:
        terminated = isinstance(stopped, Terminated)
        return _interrupted(signal.SIGTERM if terminated else signal.SIGINT, str(stopped))
    except Exception as error:
        if _noted and not isinstance(error, OSError):  # C code of torch makes it another error
            return _interrupted(_noted[-1])
        if os.environ.get("SPARSECAST_TRACEBACK"):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        hint = "" if isinstance(error, OSError) else "; set SPARSECAST_TRACEBACK=1 to see where"
        if isinstance(error, ImportError):
            hint = "; `sparsecast doctor` says what is missing or broken"
        return print_error(f"{name} failed: {reason}{hint}", 1)
    return 0 if getattr(result, "ok", True) else 1


def _interrupted(number: int, told: str = "") -> int:
    told = told or "interrupted; nothing half-written is left behind, run it again"
    return 128 + number if process_rank() else print_error(told, 128 + number)


def _run_loaded(stage: Stage, config: Any) -> Any:
    """Run a stage that needs the other packages, with the package's messages on the screen."""
    from sparsecast.cli.screen import print_messages
    from sparsecast.core.distributed import int_from_environment

    int_from_environment("RANK", 0)  # Lightning converts it while it is imported
    dry_run = stage.dry_run if getattr(config, "dry_run", False) else None
    run = load(dry_run or stage.run)
    _quiet()
    print_messages()
    return run(config)


def _quiet() -> None:
    """Silence other libraries' messages except errors."""
    from transformers.utils import logging as hf_logging

    hf_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    hf_logging.disable_progress_bar()  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()

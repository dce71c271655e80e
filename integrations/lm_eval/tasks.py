"""Find and load lm-eval's tasks, and build their requests once."""

from __future__ import annotations

import difflib
import logging
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from sparsecast.core.errors import InputError, reason_of

SEED, OTHER_SEED = 0, 1234
"""lm-eval's defaults: Python's generator; numpy's, torch's, and that of the examples."""


def seed_all() -> None:
    """Seed Python's, numpy's and torch's generators as lm-eval does."""
    random.seed(SEED)
    np.random.seed(OTHER_SEED)
    torch.manual_seed(OTHER_SEED)


@contextmanager
def quiet() -> Iterator[None]:
    """Switch lm-eval's bars and messages below errors off."""
    logger, init = logging.getLogger("lm_eval"), tqdm.__init__
    level = logger.level
    logger.setLevel(logging.ERROR)

    def hidden(bar: Any, *args: Any, **options: Any) -> None:
        init(bar, *args, **options | {"disable": True})

    tqdm.__init__ = hidden
    try:
        yield
    finally:
        tqdm.__init__ = init
        logger.setLevel(level)


def load_tasks(
    names: Sequence[str],
    include_path: Path | None = None,
    num_fewshot: int | None = None,
) -> dict[str, Any]:
    """Load tasks, groups and tags by name or glob, or from .yaml files, with their data.

    Args:
        include_path: Folder whose tasks come on top of lm-eval's, and win.
        num_fewshot: Examples before each question; a task that fixes none stays at none.

    Returns:
        lm-eval's dict of `tasks` and `groups`, for `lm_eval.evaluate`.

    Raises:
        InputError: No such folder or task; data that cannot be read; a task that needs images, or
            that runs code that the model writes.
    """
    seed_all()  # some tasks shuffle while they are loaded
    if include_path is not None:
        _check_folder(include_path)
    with quiet():
        manager, found = _find(names, include_path)
        what = f"--tasks {','.join(names)}"
        try:
            loaded: dict[str, Any] = manager.load(found)
        except OSError as error:
            raise InputError(
                f"{what}: the data cannot be read ({reason_of(error)}); lm-eval gets it from the "
                "Hugging Face hub or from the files that the task names: go online, or run once "
                "where the hub can be reached and bring its cache (HF_HOME)"
            ) from error
        except Exception as error:  # a task's .yaml and its own code raise what they like
            raise InputError(
                f"{what}: lm-eval cannot load it ({type(error).__name__}: {reason_of(error)}); "
                "correct the task, or leave it out"
            ) from error
    for name, task in loaded["tasks"].items():
        _check(name, task)
        default = task.get_config("num_fewshot")
        if default is None or (num_fewshot is not None and default != 0):
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
        task.set_fewshot_seed(seed=OTHER_SEED)
    return loaded


def _check_folder(path: Path) -> None:
    if not path.is_dir():
        what = "is a file" if path.exists() else "no such folder"
        raise InputError(f"--include-path {path}: {what}; expected a folder of tasks as .yaml")
    if next(path.glob("**/*.yaml"), None) is None:
        raise InputError(
            f"--include-path {path}: has no .yaml file; expected a folder of tasks as .yaml"
        )


class _Skipped(logging.Handler):
    """Collects the files that lm-eval could not read; it says so at level DEBUG alone."""

    def __init__(self) -> None:
        super().__init__()
        self.files: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if str(record.msg).startswith("Skip"):
            self.files.append(" ".join(record.getMessage().removeprefix("Skip ").split()))


def _find(names: Sequence[str], include_path: Path | None) -> tuple[TaskManager, list[str]]:
    """Return a manager and the names of what it is to load.

    lm-eval reads all of its own tasks in some ten seconds, so those of `include_path` come first.
    """
    skipped = _Skipped()
    if include_path is not None:
        logger = logging.getLogger("lm_eval.tasks._index")
        logger.addHandler(skipped)
        logger.setLevel(logging.DEBUG)
        logger.propagate = False
        try:
            own = TaskManager(include_path=str(include_path), include_defaults=False)
        finally:
            logger.removeHandler(skipped)
            logger.setLevel(logging.NOTSET)
            logger.propagate = True
        if set(names) <= set(own.all_subtasks):
            return own, list(names)
    elif all(_is_file(name) for name in names):
        return TaskManager(include_defaults=False), list(names)
    every = TaskManager(include_path=None if include_path is None else str(include_path))
    found: list[str] = []
    for name in names:
        matches = [name] if _is_file(name) else sorted(every.match_tasks([name]))
        if not matches:
            raise _unknown(name, every.all_tasks, include_path, skipped.files)
        found += [match for match in matches if match not in found]
    return every, found


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml")) and Path(name).is_file()


def _unknown(
    name: str, known: Sequence[str], include_path: Path | None, unreadable: Sequence[str]
) -> InputError:
    near = difflib.get_close_matches(name, known, n=3)
    where = "" if include_path is None else f" or in {include_path}"
    told = [f"--tasks {name}: no task, group or tag of that name in lm-eval{where}"]
    if unreadable:
        told.append(f"lm-eval cannot read {unreadable[0][:300]}")
    if near:
        told.append(f"did you mean {' or '.join(near)}?")
    elif not unreadable:
        told.append("`python -m lm_eval ls tasks` lists those it has")
    return InputError("; ".join(told))


def _check(name: str, task: Any) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise InputError(
            f"--tasks {name}: runs code that the model writes, which is not done here; leave it out"
        )
    if getattr(task, "MULTIMODAL", False):
        raise InputError(f"--tasks {name}: needs images or sound, expected text; leave it out")


def build_requests(
    loaded: dict[str, Any], lm: Any, *, limit: float | None, chat_template: bool
) -> int:
    """Build every task's requests for good: lm-eval's evaluations after this take the same ones.

    Returns:
        How many there are, repeats included.

    Raises:
        InputError: A chat template that refuses a task's turns; a task without documents, or one
            whose answers may be as long as all that the model reads.
    """
    from lm_eval.evaluator_utils import get_sample_size

    total = 0
    for name, task in loaded["tasks"].items():
        try:
            task.build_all_requests(
                limit=get_sample_size(task, limit),
                rank=0,
                world_size=1,
                apply_chat_template=chat_template,
                fewshot_as_multiturn=chat_template,
                chat_template=lm.apply_chat_template if chat_template else None,
                tokenizer_name=lm.tokenizer_name if chat_template else "",
            )
        except Exception as error:  # templates and tasks raise what they like
            raise InputError(
                f"--tasks {name}: its requests cannot be built ({type(error).__name__}: "
                f"{reason_of(error)}); try another --num-fewshot or --chat-template, or leave it "
                "out"
            ) from error
        _check_room(name, task.instances, lm)
        total += sum(request.repeats or 1 for request in task.instances)
        task.build_all_requests = _Again(task)
    return total


def _check_room(name: str, requests: Sequence[Any], lm: Any) -> None:
    """Refuse answers that leave no room for a prompt; lm-eval would stop in the middle."""
    for request in requests:
        if request.request_type == "generate_until":
            tokens = normalize_gen_kwargs(request.args[1], lm.max_gen_toks)["max_gen_toks"]
            if tokens >= lm.max_length:
                raise InputError(
                    f"--tasks {name}: an answer may take {tokens:,} tokens, and the model reads "
                    f"{lm.max_length:,} with the prompt; lower max_gen_toks in a copy of the task "
                    "(--include-path), or leave it out"
                )


class _Again:
    """Takes the place of `build_all_requests`: forget the answers, keep the requests."""

    def __init__(self, task: Any) -> None:
        self.task = task

    def __call__(self, **_: Any) -> None:
        for request in self.task.instances:
            request.resps, request.filtered_resps = [], {}

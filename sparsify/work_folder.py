"""The work folder of a run: begun, resumed, refused or cleared, and what a disk must hold for it.

An unfinished run keeps its tokens, its finished phases and its last checkpoint in `.<out>.work`
beside its output. Until something was trained nothing there binds the next run.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from sparsecast.core.disk import check_disk_space, full_disk_errno, full_disk_error
from sparsecast.core.earlier_runs import check_unchanged, compare_options
from sparsecast.core.errors import InputError
from sparsecast.core.files import hidden_sibling, read_json, write_json
from sparsecast.core.interrupts import interrupt_like
from sparsecast.core.messages import log
from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.core.text.corpus_files import SUFFIXES
from sparsecast.sparsify.config import SparsifyConfig

FACTS = "sparsify.json"
"""Of a finished model: its options, and what was measured."""
OPTIONS = "options.json"


class Diverged(InputError):
    """Training has destroyed the model: the same options would do so again."""


@dataclass
class Work:
    """`needs` is what the whole run takes on its disk, in bytes, as far as it is known yet."""

    path: Path
    needs: float = 0.0

    @property
    def trained(self) -> bool:
        """Whether a phase or a part of one is finished."""
        return any(self.path.glob("*.pt")) or any(self.path.glob("*.ckpt"))

    def reserve(self, parameters: int, phases: int, tokens: int) -> None:
        """Refuse what the disk cannot hold.

        A phase leaves weights and two AdamW moments in float32; one more of these is the
        checkpoint under way. Tokens are int32, and the model is saved in float16.
        """
        self.needs = 12.0 * parameters * (phases + 1) + 4.0 * tokens + 2.0 * parameters
        there = sum(path.stat().st_size for path in self.path.rglob("*") if path.is_file())
        check_disk_space(self.path.parent, int(self.needs) - there, "the run")


def options_of(cfg: SparsifyConfig, checkpoint: Checkpoint | None) -> dict[str, Any]:
    """What two runs must share to be the same, without paths of this machine."""
    free_to_change = ("out", "model", "tokens", "l1", "lr", "device", "compile")
    options = {k: v for k, v in asdict(cfg).items() if k not in free_to_change}
    return options | {
        "corpus": publishable_name(cfg.corpus, "#" + _digest(cfg.corpus)),
        "fingerprint": checkpoint.fingerprint if checkpoint else None,
        "steps": cfg.steps,
        "l1": cfg.last_l1,
        "lr": cfg.peak_lr,
    }


def publishable_name(corpus: str, mark: str = "") -> str:
    """A corpus as it may be published: of a path its last part, and `mark`."""
    path = Path(corpus).expanduser()
    local = corpus.startswith(("/", ".", "~")) or path.suffix.lower() in SUFFIXES or path.exists()
    return f"{path.name}{mark}" if local or set("*?[") & set(corpus) else corpus


def _digest(corpus: str) -> str:
    path = str(Path(corpus).expanduser().absolute())
    return blake2b(path.encode(errors="surrogateescape"), digest_size=4).hexdigest()


def is_finished(out: Path, options: dict[str, Any]) -> bool:
    """Whether `out` holds the model of these options.

    Raises:
        InputError: It holds one of other options.
    """
    if not (out / FACTS).is_file():
        return False
    made = read_json(out / FACTS, "what sparsify measured").get("options")
    if not isinstance(made, dict):
        raise InputError(
            f"{out}: holds a finished model whose options were not written down; choose another "
            "--out or remove the folder"
        )
    check_unchanged(out, "a finished model", compare_options(made, options), finished=True)
    log.info(f"{out}: already sparsified with these options")
    return True


def unfinished_folder(out: Path) -> Path:
    """Where a run lives until it is finished."""
    return hidden_sibling(out, "work")


@contextmanager
def work_folder(out: Path, options: dict[str, Any]) -> Iterator[Work]:
    """The folder of a run for `out`, fresh or as it was left; it goes when the run is finished.

    Raises:
        InputError: An unfinished run that was started with other options.
        OSError: No room on the disk: how much is needed, what was kept, how to go on.
        KeyboardInterrupt: With the same words.
    """
    work = Work(unfinished_folder(out))
    _begin(work, options)
    try:
        yield work
    except BaseException as error:
        if isinstance(error, Diverged) or not work.trained:
            shutil.rmtree(work.path, ignore_errors=True)
        left = (
            "the same command goes on from the last checkpoint"
            if work.trained
            else "nothing was trained yet, nothing is left behind"
        )
        if isinstance(error, KeyboardInterrupt):
            raise interrupt_like(error, f"{out}: interrupted; {left}") from None
        if full_disk_errno(error) is not None:
            said = f"make room; {left}"
            raise full_disk_error(error, work.path.parent, work.needs, "the run", said) from error
        raise
    shutil.rmtree(work.path, ignore_errors=True)


def _begin(work: Work, options: dict[str, Any]) -> None:
    path = work.path / OPTIONS
    options = json.loads(json.dumps(options))
    if not work.trained:
        shutil.rmtree(work.path, ignore_errors=True)
    else:
        earlier = read_json(path, "the options of an unfinished run")
        changes = compare_options(earlier, options)
        check_unchanged(work.path, "an unfinished run", changes, finished=False)
    for leftover in work.path.glob(".*.part"):
        leftover.unlink()
    try:
        work.path.mkdir(parents=True, exist_ok=True)
        write_json(path, options)
    except OSError as error:
        raise InputError(
            f"{work.path}: cannot be written ({error.strerror or error}); choose another --out"
        ) from error

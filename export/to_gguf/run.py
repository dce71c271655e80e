"""Carry out `export --format gguf`: one file that stock llama.cpp runs, and its card."""

from __future__ import annotations

from pathlib import Path

from sparsecast.core.disk import check_disk_space, describe_space, explain_full_disk
from sparsecast.core.files import check_new_folder, new_folder, write_text
from sparsecast.core.lock import lock_folder
from sparsecast.core.messages import log
from sparsecast.core.progress import progress_bar
from sparsecast.core.run_record import RUN
from sparsecast.export.config import ExportConfig
from sparsecast.export.finished import finished_file
from sparsecast.export.to_gguf.card import gguf_card, gguf_notes
from sparsecast.export.to_gguf.plan import GGUF, GGUFPlan, plan_gguf
from sparsecast.export.to_gguf.writer import write_gguf

BESIDE = ("README.md", RUN)
"""What the folder holds beside the file."""
AFTER_FULL_DISK = "nothing is left behind: make room and run the same command again"


def export_gguf(cfg: ExportConfig) -> Path:
    """Write the folder and return the path of its GGUF file.

    A file that an earlier export wrote from the same inputs with the same options is kept.

    Raises:
        InputError: See `plan_gguf`; too little space on the disk; another export writing `cfg.out`;
            a file there with other inputs or options.
        OSError: The disk filled up meanwhile; nothing is left behind.
    """
    with lock_folder(check_new_folder(cfg.out, replaces=f"*{GGUF}", beside=BESIDE), "export"):
        plan = plan_gguf(cfg)
        found = finished_file(plan.out, GGUF, plan.recipe, plan.file)
        if found is not None:
            log.info(f"{plan.out}: already exported")
            return found
        _write(plan)
        for note in gguf_notes(plan):
            log.warning(note)
        mib = plan.weight_bytes / 2**20
        log.info(f"{plan.out / plan.file}: {mib:,.1f} MiB of weights in {plan.dtype}")
        return plan.out / plan.file


def _write(plan: GGUFPlan) -> None:
    need = plan.weight_bytes
    check_disk_space(plan.out, need, "the file")
    log.info(f"{plan.out}: the file takes {describe_space(plan.out, need)}")
    with (
        explain_full_disk(plan.out, need, "the file", lambda: AFTER_FULL_DISK),
        new_folder(plan.out, replaces=f"*{GGUF}", beside=BESIDE) as folder,
    ):
        with progress_bar("export", need) as progress:
            write_gguf(folder / plan.file, plan, wrote=progress.advance)
        write_text(folder / "README.md", gguf_card(plan))
        plan.run.write(folder)

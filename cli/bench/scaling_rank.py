"""One process of `sparsecast bench scaling`, started by torchrun.

Its result is rank-<i>.json in the folder of the run: `seconds` of every round, `amount` of work of
all processes in one, `peak_bytes` of this process. One that fails leaves error-<i>.txt there.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

import torch

from sparsecast.cli.bench.scaling_stages import STAGES
from sparsecast.cli.bench.scaling_work import SHAPES, Job
from sparsecast.core.distributed import distributed_context
from sparsecast.core.files import write_json
from sparsecast.core.memory import most_held
from sparsecast.core.models.loading import pick_device
from sparsecast.sparsify.training.team import backend


def main(stage: str, shape: str, rounds: str, steps: str, device_name: str, folder: str) -> None:
    """Run the stage in this process, and write what it says into `folder`."""
    rank = os.environ.get("RANK", "0")
    try:
        with distributed_context(backend() if stage == "sparsify" else "gloo") as context:
            device = pick_device(context.device(device_name))
            if device.type == "cuda":
                device = torch.device("cuda", device.index or 0)
                torch.cuda.set_device(device)
            torch.set_float32_matmul_precision("high")
            torch.manual_seed(context.rank)
            job = Job(
                sizes=SHAPES[shape],
                rounds=int(rounds),
                steps=int(steps),
                device=device,
                context=context,
                folder=Path(folder, rank),
            )
            job.folder.mkdir()
            found = STAGES[stage](job)
            peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else most_held()
            values = {**found._asdict(), "peak_bytes": peak}
            write_json(Path(folder, f"rank-{rank}.json"), values)
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        with suppress(OSError):
            Path(folder, f"error-{rank}.txt").write_text(text, encoding="utf-8")
        raise


if __name__ == "__main__":
    main(*sys.argv[1:])

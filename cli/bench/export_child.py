"""What `sparsecast bench export` times: one export, alone in its process.

Prints a JSON object twice: when the modules are imported, with the anonymous memory they take, and
when the bundle is on the disk, with the seconds since.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import cast

from sparsecast.cli.bench.export_runs import anonymous
from sparsecast.export.config import ExportConfig, ExportDtype
from sparsecast.export.run import export


def main(model: str, predictors: str, out: str, dtype: str) -> None:
    _say({"base": anonymous("self")})
    start = time.perf_counter()
    kind = cast(ExportDtype, dtype)
    export(ExportConfig(model=model, predictors=Path(predictors), out=Path(out), dtype=kind))
    _say({"seconds": time.perf_counter() - start})


def _say(value: dict[str, float]) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])

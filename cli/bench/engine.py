"""`sparsecast bench engine`: tokens per second of PowerInfer's engine on a bundle.

    predictors   the bundle as it is
    all active   the same file with a threshold below every logit
    dense        the same model without predictors, as a plain GGUF of the same types (dense.py);
                 none of a falcon, whose dense graph reads a tensor that the engine does not load

Each generates the same number of tokens from the same prompt, in turn, round by round; medians of
the engine's own timing of generation are reported. More than one thread is for speed alone: the
CPU down projection of PowerInfer's engine adds the threads' partial sums without a lock.
"""

from __future__ import annotations

import re
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from sparsecast.core.errors import InputError
from sparsecast.core.files import check_writable_file, write_json
from sparsecast.core.messages import log, show
from sparsecast.core.options import validate_fields
from sparsecast.core.progress import progress_bar
from sparsecast.export.bundle import bundle_file
from sparsecast.export.checks.metadata import check_metadata
from sparsecast.export.engine.process import EngineError, binary, last_words, run_to_end
from sparsecast.export.read.reader import GGUFFile
from sparsecast.export.write.dense import write_dense

TIMING = re.compile(r"eval time =\s+\S+ ms /\s+\d+ runs.*?([\d.]+) tokens per second")
PROMPT = " def"


@dataclass(frozen=True, kw_only=True)
class BenchEngineConfig:
    """Tokens per second of the engine with predictors, with everything active, and dense."""

    bundle: Path
    """Folder written by `sparsecast export`."""

    engine: Path
    """Build folder of PowerInfer (or its bin folder)."""

    tokens: int = 200
    """Tokens to generate in every run."""

    rounds: int = 5
    """Runs of each kind."""

    threads: int = 1
    """CPU threads of the engine."""

    json: Path | None = None
    """Write the numbers to this file."""

    def __post_init__(self) -> None:
        validate_fields(self, tokens=2, rounds=1, threads=1)


def bench(cfg: BenchEngineConfig) -> dict[str, Any]:
    """Run it; the dense file goes to a temporary folder, as large as the model.

    Raises:
        InputError: No bundle, no engine there, or see `write_dense`.
        EngineError: The engine failed.
    """
    if cfg.json is not None:
        check_writable_file(cfg.json, "--json")
    program = binary(cfg.engine, "main")
    file = GGUFFile(bundle_file(cfg.bundle))
    if not (metadata := check_metadata(file)).ok:
        raise InputError(f"{file.path}: {metadata.detail}; export it again")
    with tempfile.TemporaryDirectory(prefix="sparsecast-bench-") as scratch:
        kinds = {
            "predictors": (file.path.absolute(), False),
            "all_active": (file.path.absolute(), True),
        }
        if file.keys["general.architecture"] != "falcon":
            kinds["dense"] = (Path(scratch, "dense.gguf"), False)
            write_dense(file, kinds["dense"][0])
        rates: dict[str, list[float]] = {name: [] for name in kinds}
        with progress_bar("bench", cfg.rounds * len(kinds)) as progress:
            for _ in range(cfg.rounds):
                for name, (model, all_active) in kinds.items():
                    command = _command(cfg, program, model)
                    rates[name].append(_rate(command, scratch, all_active=all_active))
                    progress.advance()
    median: dict[str, float | None] = {n: statistics.median(runs) for n, runs in rates.items()}
    median.setdefault("dense", None)
    values = {
        "bundle": str(cfg.bundle),
        "tokens": cfg.tokens,
        "threads": cfg.threads,
        "tokens_per_s": median,
        "over_all_active": _ratio(median, "all_active"),
        "over_dense": _ratio(median, "dense"),
        "runs": rates,
    }
    _show(values)
    if cfg.json is not None:
        write_json(cfg.json, values)
    return values


def _command(cfg: BenchEngineConfig, program: Path, model: Path) -> list[str]:
    threads, tokens = str(cfg.threads), str(cfg.tokens)
    context = str(max(512, -(-(cfg.tokens + 32) // 256) * 256))
    options = ["-t", threads, "-tb", threads, "-c", context, "-b", context, "-n", tokens]
    command = [str(program), "-m", str(model), *options, "-p", PROMPT, "--temp", "0"]
    return [*command, "--repeat-penalty", "1.0", "--ignore-eos", "--log-disable", "--simple-io"]


def _rate(command: list[str], scratch: str, *, all_active: bool) -> float:
    code, _, err = run_to_end(command, scratch, all_active=all_active)
    found = TIMING.findall(err)
    if code or not found:
        raise EngineError(f"main gave no timing (exit {code}): {last_words(err)}")
    return float(found[-1])


def _ratio(median: dict[str, float | None], other: str) -> float | None:
    ours, theirs = median["predictors"], median[other]
    return None if ours is None or theirs is None else ours / theirs


def _show(values: dict[str, Any]) -> None:
    table = Table(title=f"{values['tokens']} tokens, {values['threads']} thread(s)")
    for name in ("", "tokens/s"):
        table.add_column(name, justify="right" if name else "left")
    for name, rate in values["tokens_per_s"].items():
        table.add_row(name.replace("_", " "), "-" if rate is None else f"{rate:,.1f}")
    show(table)
    told = f"with predictors {values['over_all_active']:.2f} times everything active"
    if values["over_dense"] is not None:
        told += f", {values['over_dense']:.2f} times dense"
    log.info(told)

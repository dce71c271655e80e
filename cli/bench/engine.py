"""`sparsecast bench engine`: tokens per second of PowerInfer's engine on a bundle.

    predictors   the bundle as it is
    all active   the same file with a threshold below every logit
    dense        the same model without predictors, as a plain GGUF of the same types (see
                 export/write/dense.py); not for falcon, whose dense graph reads a tensor that the
                 engine does not load

All generate the same number of tokens from the same prompt, in turn, round by round. Reported are
medians of the engine's own timing of generation. With several threads only the speed means
something: PowerInfer's CPU down projection adds the threads' partial sums without a lock.
"""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sparsecast.cli.bench.results import check_json, new_table, publish
from sparsecast.cli.bench.rounds import in_rounds, medians
from sparsecast.core.errors import InputError
from sparsecast.core.messages import log, show
from sparsecast.core.options import validate_fields
from sparsecast.export.bundle import bundle_file
from sparsecast.export.checks.metadata import check_metadata
from sparsecast.export.engine.process import EngineError, binary, last_words, run_to_end
from sparsecast.export.read.reader import GGUFFile
from sparsecast.export.write.dense import write_dense

TIMING = re.compile(r"eval time =\s+\S+ ms /\s+\d+ runs.*?([\d.]+) tokens per second")
PROMPT = " def"


@dataclass(frozen=True, kw_only=True)
class BenchEngineConfig:
    """Time PowerInfer's engine with predictors, with every neuron active, and dense."""

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


def bench_engine(cfg: BenchEngineConfig) -> dict[str, Any]:
    """Tokens per second and their ratios.

    Disk: a dense file as large as the model, in a temporary folder.

    Raises:
        InputError: No bundle or no engine there; see also `write_dense`.
        EngineError: The engine failed.
    """
    check_json(cfg.json)
    program = binary(cfg.engine, "main")
    file = GGUFFile(bundle_file(cfg.bundle))
    if not (metadata := check_metadata(file)).ok:
        raise InputError(f"{file.path}: {metadata.detail}; export it again")
    with tempfile.TemporaryDirectory(prefix="sparsecast-bench-") as scratch:
        command = _command(cfg, program, file.path.absolute())
        measures = {
            "predictors": partial(_rate, command, scratch, all_active=False),
            "all_active": partial(_rate, command, scratch, all_active=True),
        }
        if file.keys["general.architecture"] != "falcon":
            dense = Path(scratch, "dense.gguf")
            write_dense(file, dense)
            command = _command(cfg, program, dense)
            measures["dense"] = partial(_rate, command, scratch, all_active=False)
        rates = in_rounds(measures, cfg.rounds)
    median: dict[str, float | None] = {**medians(rates)}
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
    return publish(values, cfg.json, _show)


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
    title = f"{values['tokens']} tokens, {values['threads']} thread(s)"
    table = new_table("", "tokens/s", title=title)
    for name, rate in values["tokens_per_s"].items():
        table.add_row(name.replace("_", " "), "-" if rate is None else f"{rate:,.1f}")
    show(table)
    told = f"with predictors {values['over_all_active']:.2f} times everything active"
    if values["over_dense"] is not None:
        told += f", {values['over_dense']:.2f} times dense"
    log.info(told)

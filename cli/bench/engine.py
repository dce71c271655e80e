"""`sparsecast bench engine`: tokens per second of PowerInfer's engine on a bundle.

    llama.cpp    with --llama-bench: the same model without predictors by llama.cpp, the baseline
                 of PowerInfer's paper
    predictors   the bundle as it is
    all active   the same file with a threshold below every logit
    dense        the same model without predictors, as a plain GGUF of the same types (see
                 export/write/dense.py); not for falcon, whose dense graph reads a tensor that the
                 engine does not load

All generate the same number of tokens, in turn, round by round: PowerInfer from the same prompt of
a word, llama-bench from an empty context. Reported are
medians of the programs' own timing of generation. With several threads only the speed means
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
from sparsecast.integrations.llama_cpp.llama_bench import dense_rate, find_llama_bench

TIMING = re.compile(r"eval time =\s+\S+ ms /\s+\d+ runs.*?([\d.]+) tokens per second")
PROMPT = " def"
NAMES = {
    "llama_cpp": "llama.cpp, dense",
    "dense": "PowerInfer, dense",
    "all_active": "PowerInfer, all active",
    "predictors": "PowerInfer, predictors",
}
"""What is measured, in the order of a round."""
LLAMA_CPP = {"llama": "llama", "bamboo": "llama", "falcon": "falcon"}
"""A bundle's architecture to llama.cpp's of the same tensors; llama.cpp has no OPT."""


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

    llama_bench: Path | None = None
    """llama-bench of a llama.cpp build, or that build's folder: also time the dense model by
    llama.cpp, with the same types, threads and number of tokens."""

    json: Path | None = None
    """Write the numbers to this file."""

    def __post_init__(self) -> None:
        validate_fields(self, tokens=2, rounds=1, threads=1)


def bench_engine(cfg: BenchEngineConfig) -> dict[str, Any]:
    """Tokens per second and their ratios.

    Disk: a dense file as large as the model, in a temporary folder; for a bamboo and llama.cpp two.

    Raises:
        InputError: No bundle or no engine there; see also `write_dense` and `dense_rate`.
        EngineError: The engine or llama-bench failed.
    """
    check_json(cfg.json)
    main = binary(cfg.engine, "main")
    llama_bench = None if cfg.llama_bench is None else find_llama_bench(cfg.llama_bench)
    file = GGUFFile(bundle_file(cfg.bundle))
    if not (metadata := check_metadata(file)).ok:
        raise InputError(f"{file.path}: {metadata.detail}; export it again")
    builds: set[str] = set()
    with tempfile.TemporaryDirectory(prefix="sparsecast-bench-") as scratch:
        measures = {}
        if llama_bench is not None:
            dense = _dense(file, scratch, LLAMA_CPP)
            measures["llama_cpp"] = partial(_llama_cpp, cfg, llama_bench, dense, scratch, builds)
        if file.keys["general.architecture"] != "falcon":
            command = _command(cfg, main, _dense(file, scratch, {}))
            measures["dense"] = partial(_rate, command, scratch, all_active=False)
        command = _command(cfg, main, file.path.absolute())
        measures["all_active"] = partial(_rate, command, scratch, all_active=True)
        measures["predictors"] = partial(_rate, command, scratch, all_active=False)
        rates = in_rounds(measures, cfg.rounds)
    return publish(_values(cfg, rates, builds), cfg.json, _show)


def _dense(file: GGUFFile, scratch: str, renamed: dict[str, str]) -> Path:
    """Write the dense file for an engine that has other names for architectures, unless there."""
    arch = str(file.keys["general.architecture"])
    if renamed and arch not in renamed:
        raise InputError(
            f"--llama-bench: {file.path} is of the architecture {arch!r}, which llama.cpp does not "
            "have; leave the option out"
        )
    path = Path(scratch, f"{renamed.get(arch, arch)}-dense.gguf")
    if not path.exists():
        write_dense(file, path, renamed.get(arch))
    return path


def _values(
    cfg: BenchEngineConfig, rates: dict[str, list[float]], builds: set[str]
) -> dict[str, Any]:
    found = medians(rates)
    median = {name: found.get(name) for name in NAMES}
    baseline = median["llama_cpp"]
    return {
        "bundle": str(cfg.bundle),
        "tokens": cfg.tokens,
        "threads": cfg.threads,
        "tokens_per_s": median,
        "over_all_active": _ratio(median["predictors"], median["all_active"]),
        "over_dense": _ratio(median["predictors"], median["dense"]),
        "over_llama_cpp": {name: _ratio(rate, baseline) for name, rate in median.items()},
        "llama_cpp_build": ", ".join(sorted(builds)) or None,
        "runs": rates,
    }


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


def _llama_cpp(
    cfg: BenchEngineConfig, program: Path, model: Path, scratch: str, builds: set[str]
) -> float:
    rate, build = dense_rate(program, model, cfg.tokens, cfg.threads, scratch)
    builds.add(build)
    return rate


def _ratio(above: float | None, below: float | None) -> float | None:
    return None if above is None or below is None else above / below


def _show(values: dict[str, Any]) -> None:
    beside = values["llama_cpp_build"] is not None
    title = f"{values['tokens']} tokens, {values['threads']} thread(s)"
    columns = ["tokens/s", *(["times llama.cpp"] if beside else [])]
    table = new_table("", *columns, title=title)
    for name, rate in values["tokens_per_s"].items():
        if name == "llama_cpp" and not beside:
            continue
        cells = [rate, values["over_llama_cpp"][name]][: len(columns)]
        formats = ("{:,.1f}", "{:.2f}")
        row = ("-" if c is None else f.format(c) for c, f in zip(cells, formats, strict=False))
        table.add_row(NAMES[name], *row)
    show(table)
    told = f"with predictors {values['over_all_active']:.2f} times everything active"
    if values["over_dense"] is not None:
        told += f", {values['over_dense']:.2f} times dense"
    if beside:
        told += f", {values['over_llama_cpp']['predictors']:.2f} times llama.cpp"
    log.info(told)

"""`sparsecast bench vllm`: start-up and tokens per second of vLLM with our plug-in and with SiLU.

    silu     vLLM alone, on the same weights with `hidden_act` silu
    dense    our plug-in, on the checkpoint as it is
    exact    the same with `sparse_ffn` exact: on a GPU, not in float32

Every run is a fresh process. Start-up lasts from the start of the process until the engine is
ready, imports included. Then all prompts, the first tokens of documents of the builtin corpus, are
continued greedily together: once to warm up, and five times for the median, which includes the
reading of the prompts. Each row's first process finds an empty cache of compiled graphs; its
start-up is reported by itself. The others run in rounds, every second one in reverse order. Ratios
are taken within a round; medians over rounds are reported.

The checkpoint with SiLU is a temporary folder of links; all files are removed at the end.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from sparsecast.cli.bench.results import check_json, new_table, publish
from sparsecast.cli.bench.rounds import in_rounds, median_ratio, medians
from sparsecast.cli.bench.vllm_runs import Run, check_served, run_once, without_plugin, write_silu
from sparsecast.core.errors import InputError
from sparsecast.core.machine import usable_cores
from sparsecast.core.messages import log, show
from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.core.models.loading import DTYPES, open_model
from sparsecast.core.options import ModelDtype, validate_fields
from sparsecast.core.progress import progress_bar
from sparsecast.core.text.corpus import read_documents
from sparsecast.core.text.tokens import encode
from sparsecast.integrations.vllm.served import OPTION, SPARSE, served_rule

PROMPT_TOKENS = 32
"""Most tokens of a prompt."""
RUNS = 5
"""Timed generations in each process."""
TIMES = ("import_s", "start_s", "tokens_per_s")


@dataclass(frozen=True, kw_only=True)
class BenchVllmConfig:
    """Time vLLM on a sparse checkpoint, and on the same weights with SiLU."""

    model: str
    """Hugging Face id or local folder."""

    prompts: int = 8
    """Prompts that are continued together."""

    tokens: int = 64
    """Tokens to generate for each."""

    rounds: int = 3
    """Processes of each row, beside its first."""

    dtype: ModelDtype = "auto"
    """float32, float16 or bfloat16; auto is what vLLM takes."""

    json: Path | None = None
    """Write the numbers to this file."""

    def __post_init__(self) -> None:
        validate_fields(self, prompts=1, tokens=2, rounds=1)


def bench_vllm(cfg: BenchVllmConfig) -> dict[str, Any]:
    """Seconds of start-up, tokens per second, and their ratios to vLLM's with SiLU.

    Memory of this process: one tensor of the model at a time; vLLM's is its own.

    Raises:
        InputError: No vLLM beside sparsecast; see `open_model`; a model that the plug-in does not
            serve or that has no sparse activation; vLLM failed.
    """
    check_json(cfg.json)
    if find_spec("vllm") is None:
        raise InputError(
            f"bench vllm: vLLM is not installed beside {sys.executable}, expected it in the same "
            "environment as sparsecast; `make .venv-vllm/.installed` makes one for a CPU, on a GPU "
            "run `pip install vllm`"
        )
    checkpoint, tokenizer = open_model(cfg.model)
    check_served(checkpoint)
    rule, warnings = served_rule(checkpoint.config, DTYPES.get(cfg.dtype, torch.float32))
    if rule is None:
        raise InputError(
            f"{cfg.model}: hidden_act is {checkpoint.config.hidden_act!r}, expected one of "
            f"{', '.join(SPARSE)}; vLLM serves this model without the plug-in"
        )
    for warning in warnings:
        log.warning(warning)
    documents = islice(read_documents("builtin"), cfg.prompts)
    prompts = [encode(tokenizer, document.text, PROMPT_TOKENS) for document in documents]
    gpu = torch.cuda.is_available()
    with tempfile.TemporaryDirectory(prefix="sparsecast-bench-") as folder:
        first, runs = _measure(cfg, checkpoint, prompts, Path(folder), gpu)
    values = {
        "model": cfg.model,
        "activation": str(rule),
        "vllm": first["silu"].vllm,
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "cores": None if gpu else usable_cores(),
        "dtype": cfg.dtype,
        "prompts": cfg.prompts,
        "prompt_tokens": sum(map(len, prompts)),
        "tokens": cfg.tokens,
        "rows": [_row(kind, first, runs) for kind in runs],
    }
    return publish(values, cfg.json, _show)


def _measure(
    cfg: BenchVllmConfig, checkpoint: Checkpoint, prompts: list[list[int]], folder: Path, gpu: bool
) -> tuple[dict[str, Run], dict[str, list[Run]]]:
    """Run every row: the first process of each, and those of the rounds."""
    model = str(checkpoint.folder.absolute())
    options = {"dtype": cfg.dtype, "max_model_len": PROMPT_TOKENS + cfg.tokens}
    write_silu(checkpoint, folder / "silu")
    rows: dict[str, dict[str, Any]] = {"silu": {"model": str(folder / "silu")}}
    rows["dense"] = {"model": model}
    if gpu and cfg.dtype != "float32":
        rows["exact"] = {"model": model, "additional_config": {OPTION: "exact"}}
    measures: dict[str, Callable[[], Run]] = {}
    for kind, own in rows.items():
        job = {"options": options | own, "prompts": prompts, "tokens": cfg.tokens, "runs": RUNS}
        environment = without_plugin() if kind == "silu" else {}
        measures[kind] = partial(run_once, job, folder / f"{kind}-run", environment)
    first = {}
    with progress_bar("first starts", len(rows)) as progress:
        for kind, measure in measures.items():
            first[kind] = measure()
            progress.advance()
    return first, in_rounds(measures, cfg.rounds, alternate=True)


def _row(kind: str, first: dict[str, Run], runs: dict[str, list[Run]]) -> dict[str, Any]:
    """A row of the JSON report."""
    found, silu = (
        {name: [getattr(run, name) for run in runs[of]] for name in TIMES} for of in (kind, "silu")
    )
    return {
        "kind": kind,
        **medians(found),
        "first_start_s": first[kind].start_s,
        "start_over_silu": median_ratio(found["start_s"], silu["start_s"]),
        "over_silu": median_ratio(found["tokens_per_s"], silu["tokens_per_s"]),
        "dense_because": first[kind].dense_because,
        "runs": found,
    }


def _show(values: dict[str, Any]) -> None:
    where = values["device"]
    if values["cores"] is not None:
        where += f", {values['cores']} core(s)"
    table = new_table(
        "", "first start s", "start s", "import s", "of silu", "tokens/s", "of silu",
        title=f"{values['activation']}, {values['prompts']} prompts of {values['tokens']} tokens, "
        f"dtype {values['dtype']}, vLLM {values['vllm']}, {where}",
    )  # fmt: skip
    names = {"silu": "silu", "dense": "plug-in", "exact": "plug-in, exact"}
    for row in values["rows"]:
        table.add_row(
            names[row["kind"]],
            f"{row['first_start_s']:.1f}",
            f"{row['start_s']:.1f}",
            f"{row['import_s']:.1f}",
            f"{row['start_over_silu']:.2f}",
            f"{row['tokens_per_s']:,.0f}",
            f"{row['over_silu']:.2f}",
        )
    show(table)
    for row in values["rows"]:
        if row["dense_because"]:
            log.warning(f"{row['kind']}: FFNs stayed dense: {row['dense_because']}")

"""The runs of `sparsecast bench vllm`: a process for each, and the same checkpoint with SiLU."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NamedTuple

from sparsecast.core.errors import InputError
from sparsecast.core.files import write_json
from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.integrations import sparsellama
from sparsecast.integrations.vllm.plugin import CLASSES

_PREFIX = re.compile(r"^(\(\S+ pid=\d+\) )?([A-Z]+ [\d-]+ [\d:]+ (\[\S+\] )?)?")
"""What vLLM's log has before a line: the process, the level, the time and the place."""
_ERROR = re.compile(r"[\w.]*(Error|Exception|Exit|Interrupt): .")
_ELSEWHERE = "See root cause above"
_DENSE = re.compile(r"FFNs stay dense: (.+)")

_FOLDERS = ("TMPDIR", "VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
_QUIET = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}


class Run(NamedTuple):
    """One process of vLLM."""

    vllm: str
    """Its version."""
    import_s: float
    """Seconds from the start of the process until vLLM is imported."""
    start_s: float
    """Seconds from the start of the process until the engine is ready."""
    tokens_per_s: float
    """Generated tokens of all prompts per second, the median of the runs after a warm-up."""
    dense_because: str | None
    """Why FFNs that should be exact are dense; None if they are exact or should be dense."""


def check_served(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint that vLLM would not open with our plug-in, by its config.json."""
    raw = checkpoint.raw_config
    named = raw.get("architectures")
    if raw.get("model_type") != sparsellama.MODEL_TYPE and named not in [[one] for one in CLASSES]:
        raise InputError(
            f"{checkpoint.source}: architectures is {json.dumps(named)}, expected what the "
            f"plug-in serves: {' or '.join(CLASSES)}; `sparsecast convert` makes a MiniCPM a LLaMA"
        )


def write_silu(checkpoint: Checkpoint, folder: Path) -> None:
    """Make a folder of links to a checkpoint's files, with a config.json that says SiLU."""
    config = {**checkpoint.raw_config, "hidden_act": "silu"}
    for name in ("hidden_act_param", "auto_map"):
        config.pop(name, None)
    if config.get("model_type") == sparsellama.MODEL_TYPE:
        config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    folder.mkdir()
    for path in checkpoint.folder.iterdir():
        if path.is_file() and path.name != "config.json":
            (folder / path.name).symlink_to(path.resolve())
    write_json(folder / "config.json", config)


def without_plugin() -> dict[str, str]:
    """Return the environment in which vLLM loads every plug-in but ours."""
    groups = [group for group in entry_points().groups if group.startswith("vllm.")]
    names = {point.name for group in groups for point in entry_points(group=group)}
    if (wanted := os.environ.get("VLLM_PLUGINS")) is not None:
        names = set(wanted.split(","))
    return {"VLLM_PLUGINS": ",".join(sorted(names - {"sparsecast"}))}


def run_once(job: Mapping[str, Any], folder: Path, environment: Mapping[str, str]) -> Run:
    """Start vLLM in a process of its own, and generate.

    Args:
        job: See vllm_child.py.
        folder: For the job, the log, and all that vLLM keeps: compiled graphs, which later runs in
            it find, and sockets. Its path must be short, for the latter.
        environment: Set beside what this process has.

    Raises:
        InputError: vLLM failed; the text has the end of its log.
    """
    folder.mkdir(exist_ok=True)
    work, result, log = (folder / name for name in ("job.json", "result.json", "log"))
    result.unlink(missing_ok=True)
    write_json(work, job)
    command = [sys.executable, "-m", "sparsecast.cli.bench.vllm_child", str(time.monotonic())]
    env = {**os.environ, **dict.fromkeys(_FOLDERS, str(folder)), **_QUIET, **environment}
    code = _run([*command, str(work), str(result)], log, env)
    told = log.read_text("utf-8", "replace")
    if code or not result.is_file():
        raise InputError(
            f"{job['options']['model']}: vLLM failed (exit {code}): {reason_in(told)}; start "
            "`vllm serve` on this model to see all that it says"
        )
    dense = _DENSE.search(told)
    values = json.loads(result.read_text("utf-8"))
    return Run(**values, dense_because=dense[1].strip() if dense else None)


def _run(command: Sequence[str], log: Path, env: Mapping[str, str]) -> int:
    """Run to the end; nothing that vLLM has started outlives it."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=log.parent,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait()
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def reason_in(log: str) -> str:
    """Return the last error in vLLM's log that tells the reason, or the last line, in one line.

    The front end's own error only points to the engine's, which comes before it.
    """
    lines = [_PREFIX.sub("", line).rstrip() for line in log.splitlines()]
    lines = [line for line in lines if line]
    errors = [at for at, line in enumerate(lines) if _ERROR.match(line) and _ELSEWHERE not in line]
    if not errors:
        return (lines or ["it printed nothing"])[-1].strip()[:400]
    more = lines[errors[-1] + 1 : errors[-1] + 2]
    indented = [line.strip() for line in more if line.startswith(" ")]
    return " ".join([lines[errors[-1]], *indented])[:400]

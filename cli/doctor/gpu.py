"""GPUs, Triton and our kernels, from what torch and nvidia-smi say."""

from __future__ import annotations

import subprocess
from typing import Any, NamedTuple

from sparsecast.cli.doctor.finding import Finding, State
from sparsecast.cli.doctor.machine import gib

QUERY = ("--query-gpu=name,driver_version", "--format=csv,noheader")
SMI_TIMEOUT = 20
LEAST_CAPABILITY = (8, 0)
"""The lowest compute capability with bfloat16 in its tensor cores."""
OVERLAP_CAPABILITY = (9, 0)
"""From here on a kernel starts before the previous one has ended (kernels/ops/launch.py)."""


class Driver(NamedTuple):
    """What nvidia-smi says."""

    gpus: list[str]
    version: str | None


def driver() -> Driver:
    """Ask nvidia-smi for GPUs and the driver; none where it is missing or fails."""
    try:
        done = subprocess.run(
            ["nvidia-smi", *QUERY],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=SMI_TIMEOUT,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return Driver([], None)
    lines = done.stdout.decode(errors="replace").splitlines() if done.returncode == 0 else []
    rows = [line.rpartition(",") for line in lines if "," in line]
    return Driver([row[0].strip() for row in rows], rows[0][2].strip() if rows else None)


def gpu_findings(facts: dict[str, Any], there: Driver) -> list[Finding]:
    """Judge GPUs.

    Args:
        facts: From `torch_facts`.
        there: From `driver`.
    """
    if why := facts.get("error"):
        seen = f"{', '.join(there.gpus)}; " if there.gpus else ""
        return [Finding("gpu", "GPU", "note", f"{seen}torch cannot be asked: {why}")]
    if facts["gpus"]:
        return [_gpu(number, gpu, there) for number, gpu in enumerate(facts["gpus"])]
    if there.gpus:
        return [_unused(facts, there)]
    more = "; Apple's GPU is not used" if facts["mps"] else ""
    return [Finding("gpu", "GPU", "note", f"none; every stage runs on the CPU{more}")]


def _gpu(number: int, gpu: dict[str, Any], there: Driver) -> Finding:
    free = gpu["free_bytes"]
    text = f"{gpu['name']}, compute capability {gpu['capability']}, {gib(gpu['bytes'])}"
    text += "" if free is None else f" ({gib(free)} free)"
    text += f", driver {there.version}" if there.version else ""
    values = {key: gpu[key] for key in ("name", "capability", "bytes", "free_bytes")}
    values["driver"] = there.version
    if gpu["error"]:
        full = "out of memory" in gpu["error"]
        first = "free its memory (nvidia-smi names who holds it)"
        first = first if full else "update its driver, or install a torch that is built for it"
        advice = f"{first}; or hide it: CUDA_VISIBLE_DEVICES without {number}"
        return Finding("gpu", f"GPU {number}", "fix", f"{text}: {gpu['error']}", advice, values)
    return Finding("gpu", f"GPU {number}", "ok", text, values=values)


def _unused(facts: dict[str, Any], there: Driver) -> Finding:
    text = f"{', '.join(there.gpus)} (driver {there.version}), but torch does not use it: "
    if facts["built_for"] == "CPU":
        text += f"torch {facts['version']} is built for CPUs"
        advice = "install a torch for CUDA, see https://pytorch.org/get-started/locally"
    else:
        text += facts["why_no_gpu"] or "no device is visible"
        advice = f"unset CUDA_VISIBLE_DEVICES, or update the driver to one for {facts['built_for']}"
    return Finding("gpu", "GPU", "note", text, advice)


def kernel_findings(facts: dict[str, Any]) -> list[Finding]:
    """Judge Triton, and where the exact and the predicted FFN run.

    Args:
        facts: From `torch_facts`.
    """
    if "error" in facts:
        return [Finding("kernels", "sparse FFN", "note", "not tried, as torch does not work")]
    return [_triton(facts), _sparse_ffn(facts)]


def _triton(facts: dict[str, Any]) -> Finding:
    triton = facts["triton"]
    if triton["works"]:
        return Finding("kernels", "triton", "ok", triton["detail"])
    state: State = "fix" if facts["gpus"] else "note"
    if not triton["installed"]:
        found = "not installed; our kernels and torch.compile on a GPU need it"
        advice = "pip install triton, in the version that your torch asks for"
        return Finding("kernels", "triton", state, found, advice if facts["gpus"] else None)
    advice = (
        "install the triton that came with your torch, and a C compiler; its cache needs a folder "
        "that can be written (TRITON_CACHE_DIR)"
    )
    return Finding("kernels", "triton", state, f"does not compile: {triton['detail']}", advice)


def _sparse_ffn(facts: dict[str, Any]) -> Finding:
    ours = facts["kernels"]
    if ours["error"]:
        advice = "mend the packages above, then reinstall sparsecast"
        return Finding("kernels", "sparse FFN", "fix", f"not there: {ours['error']}", advice)
    on_cpu = (
        f"exact and predicted in plain torch on the CPU, 1 to {ours['max_cpu_tokens']} tokens "
        f"(auto: with {ours['max_cpu_threads']} threads at most)"
    )
    if not facts["gpus"] or not facts["triton"]["works"]:
        return Finding("kernels", "sparse FFN", "ok", on_cpu)
    text = (
        f"exact and predicted in kernels on the GPU, 1 to {ours['max_tokens']} tokens, float16 or "
        "bfloat16"
    )
    capability = min(tuple(map(int, gpu["capability"].split("."))) for gpu in facts["gpus"])
    if facts["built_for"].startswith("ROCm"):
        return Finding("kernels", "sparse FFN", "note", f"{text}; not tested on AMD's GPUs")
    if capability < LEAST_CAPABILITY:
        least = ".".join(map(str, LEAST_CAPABILITY))
        return Finding("kernels", "sparse FFN", "note", f"{text}; not tested below {least}")
    overlap = ", launches overlap" if capability >= OVERLAP_CAPABILITY else ""
    return Finding("kernels", "sparse FFN", "ok", text + overlap)

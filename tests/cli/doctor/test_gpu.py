"""What is said of GPUs, Triton and kernels, from what torch and nvidia-smi say."""

from __future__ import annotations

import subprocess
from types import SimpleNamespace

import pytest
import torch

from sparsecast.cli.doctor.gpu import Driver, driver, gpu_findings, kernel_findings
from sparsecast.cli.doctor.torch_facts import torch_facts

GPU = {
    "name": "NVIDIA H200",
    "capability": "9.0",
    "bytes": 140 * 2**30,
    "free_bytes": 139 * 2**30,
    "error": None,
}
OURS = {"error": None, "max_tokens": 16, "max_cpu_tokens": 8, "max_cpu_threads": 2}
FACTS = {
    "version": "2.13.0+cu130",
    "built_for": "CUDA 13.0",
    "threads": 2,
    "gpus": [GPU],
    "why_no_gpu": None,
    "mps": False,
    "triton": {"installed": True, "works": True, "detail": "runs kernels"},
    "kernels": OURS,
}
NO_TRITON = {"installed": False, "works": False, "detail": "No module named 'triton'"}
DRIVER = Driver(["NVIDIA H200"], "570.1")


def test_a_gpu_that_works():
    (gpu,) = gpu_findings(FACTS, DRIVER)
    assert gpu.state == "ok"
    assert gpu.found == (
        "NVIDIA H200, compute capability 9.0, 140 GiB (139 GiB free), driver 570.1"
    )
    assert gpu.values["bytes"] == 140 * 2**30
    triton, ffn = kernel_findings(FACTS)
    assert (triton.state, ffn.state) == ("ok", "ok")
    assert "in kernels on the GPU, 1 to 16 tokens" in ffn.found
    assert "overlap" in ffn.found


def test_a_gpu_that_is_full_is_to_be_freed():
    full = GPU | {"error": "CUDA error: out of memory", "free_bytes": None}
    first, second = gpu_findings(FACTS | {"gpus": [GPU, full]}, DRIVER)
    assert (first.state, second.state) == ("ok", "fix")
    assert "CUDA error: out of memory" in second.found
    assert second.to_do is not None
    assert second.to_do.startswith("free its memory (nvidia-smi names who holds it); or hide it")
    strange = GPU | {"error": "no kernel image is available for execution on the device"}
    (only,) = gpu_findings(FACTS | {"gpus": [strange]}, DRIVER)
    assert "install a torch that is built for it" in (only.to_do or "")


@pytest.mark.parametrize(
    ("facts", "there", "found", "to_do"),
    [
        (
            {"built_for": "CPU", "version": "2.13.0+cpu"},
            DRIVER,
            "torch 2.13.0+cpu is built for CPUs",
            "install a torch for CUDA",
        ),
        (
            {"why_no_gpu": "The NVIDIA driver on your system is too old"},
            DRIVER,
            "(driver 570.1), but torch does not use it: The NVIDIA driver on your system is too",
            "update the driver to one for CUDA 13.0",
        ),
        ({}, Driver([], None), "none; every stage runs on the CPU", None),
        ({"mps": True}, Driver([], None), "Apple's GPU is not used", None),
    ],
)
def test_no_gpu_is_a_note_with_its_reason(facts, there, found, to_do):
    (gpu,) = gpu_findings(FACTS | {"gpus": []} | facts, there)
    assert gpu.state == "note"
    assert found in gpu.found
    assert (to_do or "") in (gpu.to_do or "")


def test_a_torch_that_cannot_be_imported():
    (gpu,) = gpu_findings({"error": "OSError: gone"}, DRIVER)
    assert gpu.found == "NVIDIA H200; torch cannot be asked: OSError: gone"
    (kernels,) = kernel_findings({"error": "OSError: gone"})
    assert kernels.state == "note"


def test_triton_missing_or_broken():
    triton, ffn = kernel_findings(FACTS | {"gpus": [], "triton": NO_TRITON})
    assert (triton.state, ffn.state) == ("note", "ok")
    assert "in plain torch on the CPU, 1 to 8 tokens" in ffn.found
    triton, ffn = kernel_findings(FACTS | {"triton": NO_TRITON})
    assert (triton.state, ffn.state) == ("fix", "ok")
    broken = {"installed": True, "works": False, "detail": "Failed to find C compiler"}
    triton, _ = kernel_findings(FACTS | {"triton": broken})
    assert triton.state == "fix"
    assert triton.found == "does not compile: Failed to find C compiler"


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"gpus": [GPU, GPU | {"capability": "7.5"}]}, "not tested below 8.0"),
        ({"built_for": "ROCm 7.0"}, "not tested on AMD's GPUs"),
    ],
)
def test_gpus_that_nobody_tested_are_said_to_be(facts, words):
    _, ffn = kernel_findings(FACTS | facts)
    assert (ffn.state, words in ffn.found) == ("note", True)


def test_kernels_that_cannot_be_imported():
    _, ffn = kernel_findings(FACTS | {"kernels": {"error": "ImportError: no tl"}})
    assert (ffn.state, ffn.found) == ("fix", "not there: ImportError: no tl")


@pytest.mark.parametrize(
    ("code", "out", "want"),
    [
        (0, b"NVIDIA H200, 570.1\nNVIDIA H100 80GB, x, 570.1\n", 2),
        (9, b"NVIDIA-SMI has failed because it could not talk to the driver, sorry", 0),
        (0, b"", 0),
    ],
)
def test_nvidia_smi_is_read(monkeypatch, code, out, want):
    done = subprocess.CompletedProcess([], code, out, b"")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    found = driver()
    assert len(found.gpus) == want
    assert found.version == ("570.1" if want else None)


def test_no_nvidia_smi(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert driver() == Driver([], None)


@pytest.fixture
def cuda(monkeypatch) -> pytest.MonkeyPatch:
    """A torch for CUDA with two GPUs, which none of its operations can use."""
    gpu = SimpleNamespace(name="H200", major=9, minor=0, total_memory=2**37)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (2**36 + index, 2**37))

    def refuse(*_: object, **options: object) -> None:
        raise RuntimeError(f"{options['device']} is lost\nCompile with TORCH_USE_CUDA_DSA")

    monkeypatch.setattr(torch, "zeros", refuse)
    return monkeypatch


def test_torch_is_asked_for_each_gpu(cuda):
    facts = torch_facts()
    assert (facts["built_for"], facts["why_no_gpu"]) == ("CUDA 13.0", None)
    assert facts["gpus"] == [
        {
            "name": "H200",
            "capability": "9.0",
            "bytes": 2**37,
            "free_bytes": 2**36 + index,
            "error": f"cuda:{index} is lost Compile with TORCH_USE_CUDA_DSA",
        }
        for index in range(2)
    ]


def test_why_torch_uses_no_gpu(cuda):
    def fail() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old")

    cuda.setattr(torch.cuda, "init", fail)
    facts = torch_facts()
    assert (facts["gpus"], facts["why_no_gpu"]) == (
        [],
        "The NVIDIA driver on your system is too old",
    )


def test_what_torch_says_here():
    facts = torch_facts()
    assert facts["kernels"] == OURS
    assert facts["triton"]["works"], facts["triton"]["detail"]
    assert facts.keys() == FACTS.keys()

"""What torch sees of this machine's GPUs, and whether Triton and our kernels work here.

Runs in the process of try_imports.py. Nothing raises: what does not work is told in a line.
"""

from __future__ import annotations

from typing import Any

from sparsecast.cli.doctor.finding import one_line

TARGET = 90
"""Compute capability, times ten, for which the kernel is compiled where there is no GPU."""


def torch_facts() -> dict[str, Any]:
    """Return `version`, `built_for`, `threads`, `gpus`, `why_no_gpu`, `triton` and `kernels`;
    or `error` alone if torch cannot be imported."""
    try:
        import torch
    except BaseException as error:
        return {"error": f"{type(error).__name__}: {one_line(error)}"}
    cuda, hip = torch.version.cuda, torch.version.hip
    gpus, why = _gpus() if cuda or hip else ([], None)
    built = f"CUDA {cuda}" if cuda else f"ROCm {hip}" if hip else "CPU"
    return {
        "version": torch.__version__,
        "built_for": built,
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "why_no_gpu": why,
        "mps": _mps(),
        "triton": _triton(bool(gpus)),
        "kernels": _kernels(),
    }


def _gpus() -> tuple[list[dict[str, Any]], str | None]:
    import torch

    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        return [_gpu(index) for index in range(torch.cuda.device_count())], None
    except Exception as error:
        return [], one_line(error)


def _gpu(index: int) -> dict[str, Any]:
    import torch

    gpu = torch.cuda.get_device_properties(index)
    facts: dict[str, Any] = {
        "name": gpu.name,
        "capability": f"{gpu.major}.{gpu.minor}",
        "bytes": gpu.total_memory,
        "free_bytes": None,
        "error": None,
    }
    try:
        facts["free_bytes"] = torch.cuda.mem_get_info(index)[0]
        torch.zeros(1, device=f"cuda:{index}").add_(1).item()
    except Exception as error:
        facts["error"] = one_line(error)
    return facts


def _mps() -> bool:
    import torch

    try:
        return torch.backends.mps.is_available()
    except Exception:
        return False


def _triton(gpu: bool) -> dict[str, Any]:
    """Compile, and on a GPU run, a kernel of one line."""
    try:
        import triton
    except BaseException as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "triton"
        return {"installed": not missing, "works": False, "detail": one_line(error)}
    try:
        detail = _run_kernel() if gpu or triton.knobs.runtime.interpret else _compile_kernel()
    except Exception as error:
        return {"installed": True, "works": False, "detail": one_line(error)}
    return {"installed": True, "works": True, "detail": detail}


def _run_kernel() -> str:
    import torch
    import triton

    from sparsecast.cli.doctor.triton_kernel import copy_one

    interpreted = triton.knobs.runtime.interpret
    src = torch.ones(1, device="cpu" if interpreted else "cuda")
    dst = torch.zeros_like(src)
    copy_one[(1,)](src, dst)
    if dst.item() != 1:
        raise ValueError(f"a kernel that copies 1.0 wrote {dst.item()}")
    return "interprets kernels (TRITON_INTERPRET=1)" if interpreted else "runs kernels"


def _compile_kernel() -> str:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from sparsecast.cli.doctor.triton_kernel import copy_one

    source = ASTSource(fn=copy_one, signature={"src": "*fp32", "dst": "*fp32"}, constexprs={})
    compile(source, target=GPUTarget("cuda", TARGET, 32))
    return f"compiles for compute capability {TARGET / 10}, with no GPU to run it"


def _kernels() -> dict[str, Any]:
    """Import our FFNs; return why they could not be, or their limits."""
    try:
        from sparsecast.kernels.in_models.dispatch import MAX_CPU_THREADS
        from sparsecast.kernels.in_models.sparse_ffn import MAX_CPU_TOKENS
        from sparsecast.kernels.ops.launch import MAX_TOKENS
    except BaseException as error:
        return {"error": f"{type(error).__name__}: {one_line(error)}"}
    return {
        "error": None,
        "max_tokens": MAX_TOKENS,
        "max_cpu_tokens": MAX_CPU_TOKENS,
        "max_cpu_threads": MAX_CPU_THREADS,
    }

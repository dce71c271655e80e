"""Print what each kernel reads and writes before it waits for the previous one, from its PTX.

Compiles for Hopper, which needs no GPU, but a process without Triton's interpreter. Prints JSON:
for each kernel how often it waits, the arguments that it reads and writes before that, whether it
lets the next kernel start before that (null if it never does), and the instructions by which it
reads and writes the list of entries.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sparsecast.kernels.ops import down, gate, gate_up, int8_dot, predictor

D, R = 1536, 384
POINTERS = {
    "threshold": "fp32",
    **dict.fromkeys(("row", "count", "ticket", "chosen"), "*i32"),
    **dict.fromkeys(("x", "z", "first", "up", "down", "weight", "bias", "act", "x1", "y"), "*bf16"),
    **dict.fromkeys(("hidden", "norm"), "*bf16"),
    "mask": "*i16",
    **dict.fromkeys(("part", "squares"), "*fp32"),
    "out": "*i32",
    "entry": "*i64",
}
NO_NORM = {"norm": None, "squares": None, "EPS": None}
IN_CODES = {"weight": "*i32", "scale": "*fp16"}
Kernel = tuple[str, Any, dict[str, str], dict[str, Any]]


def kernels() -> Iterator[Kernel]:
    """Yield a name, the function, types that differ from `POINTERS`, and constants."""
    for early in (True, False):
        name = "codes early" if early else "codes"
        yield name, int8_dot._kernel, {}, {
            "K": D, "EARLY": early, "BLOCK_B": int8_dot.BLOCKS_PER_PROGRAM, "num_warps": 1
        }  # fmt: skip
    for pad in (1, 16):
        one_token = {} if pad == 1 else {"entry": None}
        yield f"gate {pad}", gate._kernel, {}, {"D": D, **one_token, **gate.CONFIGS[pad]}
        yield f"hidden {pad}", predictor._hidden_kernel, {}, {
            "K": D, "BITS": 16, "scale": None, **predictor.HIDDEN_CONFIGS[pad]
        }  # fmt: skip
        yield f"select {pad}", predictor._select_kernel, {}, {
            "K": R, "BITS": 16, "scale": None, **one_token, **predictor.SELECT_CONFIGS[pad]
        }  # fmt: skip
        lists = {"row": None, "x1": None} if pad == 1 else one_token
        yield f"rows {pad}", gate_up._kernel, {}, {
            "D": D, "RELU_UP": True, "act": None, "bias": None, **lists,
            "SQUARED": False, "WORDS": 256, "TICKETS": 16, **gate_up._config(pad, True, True, D),
        }  # fmt: skip
        yield f"up {pad}", gate_up._kernel, {}, {
            "D": D, "RELU_UP": True, "first": None, "bias": None, "chosen": None, **lists,
            "SQUARED": False, "WORDS": 256, "TICKETS": 16, **gate_up._config(pad, False, True, D),
        }  # fmt: skip
    for d in (D, 5120):  # blocks of 64 columns and of 128
        yield f"down 1 of {d}", down._one_token_kernel, {}, {
            "D": d, **NO_NORM, **down._one_token_config(d)
        }  # fmt: skip
    yield "down 16", down._batch_kernel, {}, {"D": D, "F": None, **NO_NORM, **down._config(D)}
    yield f"down 1 of {D} norm", down._one_token_kernel, {}, {
        "D": D, "EPS": 1e-5, **down._one_token_config(D)
    }  # fmt: skip
    yield "down 16 norm", down._batch_kernel, {}, {
        "D": D, "F": 6912, "EPS": 1e-5, **down._config(D)
    }  # fmt: skip
    for pad in (1, 2, 4, 16):
        for bits in (8, 4):
            yield f"hidden {pad} q{bits}_0", predictor._hidden_kernel, {
                **IN_CODES, "z": "*i32", "hidden": "*fp32"
            }, {"K": D, "BITS": bits, **predictor._hidden_int8_config(pad, D)}  # fmt: skip
            yield f"select {pad} q{bits}_0", predictor._select_kernel, {
                **IN_CODES, "hidden": "*i32"
            }, {
                "K": R, "BITS": bits, **({} if pad == 1 else {"entry": None}),
                **predictor._select_int8_config(pad, R),
            }  # fmt: skip


def ptx_of(function: Any, types: dict[str, str], constants: dict[str, Any], pad: int) -> str:
    constants = {**constants, "T": pad, "PDL": True}
    warps = constants.pop("num_warps")
    names = function.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    kinds = {**POINTERS, **types}
    signature = {n: "constexpr" if n in constants else kinds.get(n, "i32") for n in names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*")
    }
    compiled = triton.compile(
        ASTSource(function, signature, constants, aligned),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": warps, "launch_pdl": True},
    )
    text: str = compiled.asm["ptx"]
    return text


def before_waiting(ptx: str, arguments: list[str | None]) -> dict[str, Any]:
    """Follow pointers through registers; all of shared memory counts as one register.

    Args:
        ptx: The compiled kernel.
        arguments: Its arguments' names in order, None for those that are not pointers.
    """
    sources: dict[str, set[str]] = {}
    shared: set[str] = set()
    found: dict[str, Any] = {"waits": 0, "read": set(), "written": set(), "starts_early": None}
    found["entry"] = set()
    for line in ptx.splitlines():
        code = re.sub(r"^\s*(@!?%\w+\s+)?", "", line.split("//")[0]).strip()
        if code.startswith("griddepcontrol.wait"):
            found["waits"] += 1
        if code.startswith("griddepcontrol.launch_dependents"):
            found["starts_early"] = bool(found["starts_early"]) or found["waits"] == 0
        operation, _, operands = code.partition(" ")
        registers = re.findall(r"%\w+", operands)
        if operation.startswith("ld.param"):
            number = int(operands.rpartition("_param_")[2].rstrip("];"))
            name = arguments[number] if number < len(arguments) else "scratch"
            sources[registers[0]] = {name} if name else set()
        elif re.match(r"(ld|st|cp\.async|atom|red)\b.*global", operation):
            address = re.findall(r"%\w+", operands[operands.rindex("[") :])
            side = "read" if operation.startswith(("ld", "cp")) else "written"
            touched = set().union(*(sources.get(a, {"unknown"}) for a in address))
            if "entry" in touched:
                found["entry"].add(operation)
            if not found["waits"]:
                found[side] |= touched
        elif operation.startswith("st.shared"):
            shared |= set().union(*(sources.get(r, set()) for r in registers))
        elif operation.startswith("ld.shared"):
            sources |= dict.fromkeys(re.findall(r"%\w+", operands.partition("[")[0]), shared)
        elif registers:
            sources[registers[0]] = set().union(*(sources.get(r, set()) for r in registers[1:]))
    return {name: sorted(v) if isinstance(v, set) else v for name, v in found.items()}


def main() -> None:
    found = {}
    for name, function, types, constants in kernels():
        named = [n for n in function.arg_names if n not in {*constants, "T", "PDL"}]
        arguments = [
            n if n in POINTERS.keys() | types and n != "threshold" else None for n in named
        ]
        pad = next((int(word) for word in name.split() if word.isdigit()), 1)
        found[name] = before_waiting(ptx_of(function, types, constants, pad), arguments)
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()

"""Check names, shapes, types and finiteness of the tensors of each architecture.

The allowed types are those that sparsecast writes and that the engine computes correctly, on a CPU
and, judging by its source, on a GPU (PowerInfer's ggml.c and ggml-cuda.cu at d3ebd7c):
- products with any matrix support f32, f16, q4_0 and q8_0; a GPU's sparse products do not support
  q8_0;
- the down step treats every type but q4_0 as f16, and gives NaN or zeros for other types;
- 1-D tensors must be f32.
sparsecast does not write the k-quants that `quantize` may choose (q6_K for output.weight), and
export/read/reader.py refuses to read them.

Shape letters: V vocabulary, P positions, D hidden, K key/value width, Q = D + 2 K, F FFN width,
R predictor rank.
"""

from __future__ import annotations

from collections.abc import Iterator

from sparsecast.export.checks.base import Check
from sparsecast.export.checks.sources import parts
from sparsecast.export.read.header import Header, header_of
from sparsecast.export.read.reader import GGUFFile

PREDICTOR_SHAPES = {"fc1.weight": "RD", "fc2.weight": "FR"}
GATED = {
    "attn_norm.weight": "D",
    "attn_q.weight": "DD",
    "attn_k.weight": "KD",
    "attn_v.weight": "KD",
    "attn_output.weight": "DD",
    "ffn_norm.weight": "D",
    "ffn_gate.weight": "FD",
    "ffn_up.weight": "FD",
    "ffn_down_t.weight": "FD",
}
FALCON = {
    "attn_norm.weight": "D",
    "attn_norm.bias": "D",
    "attn_qkv.weight": "QD",
    "attn_output.weight": "DD",
    "ffn_up.weight": "FD",
    "ffn_down_t.weight": "FD",
}
OPT = {
    **{f"{norm}.{kind}": "D" for norm in ("attn_norm", "ffn_norm") for kind in ("weight", "bias")},
    **{f"attn_{x}.weight": "DD" for x in ("q", "k", "v", "output")},
    **{f"attn_{x}.bias": "D" for x in ("q", "k", "v", "output")},
    "ffn_up.weight": "FD",
    "ffn_up.bias": "F",
    "ffn_down_t.weight": "FD",
    "ffn_down_t.bias": "D",
}
SECOND_NORM = {"attn_norm_2.weight": "D", "attn_norm_2.bias": "D"}
"""Extra tensors of a falcon with two norms per layer."""
ENDS = {"token_embd.weight": "VD", "output_norm.weight": "D"}
LAYERS = {
    "llama": ({**ENDS, "output.weight": "VD"}, GATED),
    "bamboo": ({**ENDS, "output.weight": "VD"}, GATED),
    "falcon": ({**ENDS, "output_norm.bias": "D", "output.weight": "VD"}, FALCON),
    "opt": ({**ENDS, "output_norm.bias": "D", "position_embd.weight": "PD"}, OPT),
}
"""Tensors of the model and of one of its blocks."""
OPT_POSITIONS = 2050
VECTOR = ("f32",)
MATRIX = ("f16", "f32", "q4_0", "q8_0")
SPARSE = ("f16", "f32", "q4_0")
PREDICTOR = ("f16", "q8_0", "q4_0")
TYPES = {
    "ffn_gate": SPARSE,
    "ffn_up": SPARSE,
    "ffn_down_t": ("f16", "q4_0"),
    "fc1": PREDICTOR,
    "fc2": PREDICTOR,
}
"""Types of the matrices that do not support all of `MATRIX`."""
FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2}
"""general.file_type by the type of the FFN's gate."""


def check_tensors(file: GGUFFile) -> Check:
    """Check that every tensor is there, no other is, and shapes and types are right."""
    header, want, wrong = header_of(file), expected_shapes(file), []
    for name, letters in want.items():
        if name not in file.entries:
            wrong.append(f"{name} is missing")
            continue
        entry = file.entries[name]
        shape = _sizes(file, header, name, letters)
        if entry.shape != shape:
            hint = " (transposed)" if entry.shape == shape[::-1] else ""
            wrong.append(f"{name} is {entry.shape}, expected {shape}{hint}")
        types = VECTOR if len(letters) == 1 else TYPES.get(parts(name)[1], MATRIX)
        if entry.type.name not in types:
            wrong.append(f"{name} is {entry.type.name}, expected {' or '.join(types)}")
        if entry.shape[-1] % entry.type.block:
            wrong.append(
                f"{name} is {entry.type.name} in rows of {entry.shape[-1]}, expected a multiple of "
                f"{entry.type.block}: the engine misreads rows that share a block"
            )
    wrong += [f"{name} is not a tensor of this architecture" for name in file.entries.keys() - want]
    wrong += [] if wrong else _wrong_blocks_or_label(file, header)
    kinds = "/".join(
        sorted({file.entries[name].type.name for name in want if name in file.entries})
    )
    return Check("tensors", not wrong, "; ".join(wrong) or f"{len(want)} tensors in {kinds}")


def _wrong_blocks_or_label(file: GGUFFile, header: Header) -> Iterator[str]:
    """Check the FFN width against ffn_down_t's blocks, and the header's label of the types."""
    for name, entry in file.entries.items():
        if ".ffn_down_t.weight" in name and header.ffn % entry.type.block:
            yield (
                f"{name} is {entry.type.name}, whose input the engine rounds in blocks of "
                f"{entry.type.block}, but the FFN has {header.ffn} neurons: it would compute NaN"
            )
    label, kind = file.keys.get("general.file_type"), file.entries["blk.0.ffn_up.weight"].type
    if label is not None and label != FILE_TYPES[kind.name]:
        yield (
            f"general.file_type is {label}, expected {FILE_TYPES[kind.name]} for matrices in "
            f"{kind.name}"
        )


def expected_shapes(file: GGUFFile) -> dict[str, str]:
    """Return every tensor name that belongs in the file, with its shape letters."""
    header = header_of(file)
    ends, block = LAYERS[header.arch]
    block = {**block, **PREDICTOR_SHAPES}
    if header.arch == "falcon" and any(f"blk.0.{name}" in file.entries for name in SECOND_NORM):
        block = {**block, **SECOND_NORM}
    inner = {
        f"blk.{i}.{name}": shape for i in range(header.layers) for name, shape in block.items()
    }
    return {**ends, **inner}


def _sizes(file: GGUFFile, header: Header, name: str, letters: str) -> tuple[int, ...]:
    kv_width = header.head_dim * header.kv_heads
    # fc1 sets the rank; fc2 must have the same.
    fc1 = file.entries.get(name.replace("fc2", "fc1"))
    sizes = {
        "V": header.vocab,
        "P": OPT_POSITIONS,
        "D": header.hidden,
        "K": kv_width,
        "Q": header.hidden + 2 * kv_width,
        "F": header.ffn,
        "R": fc1.shape[0] if fc1 is not None else 0,
    }
    return tuple(sizes[letter] for letter in letters)


def check_finite(file: GGUFFile) -> Check:
    """Check that no tensor holds NaN or infinity."""
    wrong = [name for name in file.entries if not bool(file.tensor(name).isfinite().all())]
    detail = f"NaN or infinity in {', '.join(wrong)}" if wrong else "no NaN, no infinity"
    return Check("finite", not wrong, detail)

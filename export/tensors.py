"""Which tensors a llama bundle holds, of which shape and type.

Types are those that the engine computes rightly, on a CPU and by its source on a GPU, and that
sparsecast writes (PowerInfer's ggml.c and ggml-cuda.cu at d3ebd7c):
- products with any matrix take f32, f16, q4_0 and q8_0; a GPU's sparse ones no q8_0;
- the down step treats whatever is not q4_0 as f16, and gives NaN or zeros for other types;
- 1-D tensors must be f32.
The k-quants that `quantize` may choose (q6_K for output.weight) are not ours: reader.py refuses
them.

Shape letters: V vocabulary, D hidden, K key/value width, F FFN width, R predictor rank.
"""

from __future__ import annotations

from collections.abc import Iterator

from sparsecast.export.checks import Check
from sparsecast.export.reader import GGUFFile

GLOBAL = {"token_embd.weight": "VD", "output_norm.weight": "D", "output.weight": "VD"}
BLOCK = {
    "attn_norm": "D",
    "attn_q": "DD",
    "attn_k": "KD",
    "attn_v": "KD",
    "attn_output": "DD",
    "ffn_norm": "D",
    "ffn_gate": "FD",
    "ffn_up": "FD",
    "ffn_down_t": "FD",
    "fc1": "RD",
    "fc2": "FR",
}
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
"""Of the matrices that may not be any of `MATRIX`."""
FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2}
"""general.file_type by the type of the FFN's gate."""


def check_tensors(file: GGUFFile) -> Check:
    """Names, shapes and types, nothing missing and nothing more."""
    want, wrong = expected_shapes(file), []
    for name, letters in want.items():
        if name not in file.entries:
            wrong.append(f"{name} is missing")
            continue
        entry = file.entries[name]
        shape = _sizes(file, name, letters)
        if entry.shape != shape:
            hint = " (transposed)" if entry.shape == shape[::-1] else ""
            wrong.append(f"{name} is {entry.shape}, expected {shape}{hint}")
        short = name.removesuffix(".weight").rpartition(".")[2]
        types = VECTOR if len(letters) == 1 else TYPES.get(short, MATRIX)
        if entry.type.name not in types:
            wrong.append(f"{name} is {entry.type.name}, expected {' or '.join(types)}")
        if entry.shape[-1] % entry.type.block:
            wrong.append(
                f"{name} is {entry.type.name} in rows of {entry.shape[-1]}, expected a multiple of "
                f"{entry.type.block}: the engine reads rows that share a block wrongly"
            )
    wrong += [f"{name} is not a tensor of this architecture" for name in file.entries.keys() - want]
    wrong += [] if wrong else _wrong_blocks_or_label(file)
    kinds = "/".join(
        sorted({file.entries[name].type.name for name in want if name in file.entries})
    )
    return Check("tensors", not wrong, "; ".join(wrong) or f"{len(want)} tensors in {kinds}")


def _wrong_blocks_or_label(file: GGUFFile) -> Iterator[str]:
    """What no single tensor shows: the width that the engine rounds ffn_down_t's input along, and
    what the header says of the types."""
    width = file.keys["llama.feed_forward_length"]
    for name, entry in file.entries.items():
        if ".ffn_down_t." in name and width % entry.type.block:
            yield (
                f"{name} is {entry.type.name}, whose input the engine rounds in blocks of "
                f"{entry.type.block}, but the FFN has {width} neurons: it would compute NaN"
            )
    label, kind = file.keys.get("general.file_type"), file.entries["blk.0.ffn_gate.weight"].type
    if label is not None and label != FILE_TYPES[kind.name]:
        yield (
            f"general.file_type is {label}, expected {FILE_TYPES[kind.name]} for matrices in "
            f"{kind.name}"
        )


def expected_shapes(file: GGUFFile) -> dict[str, str]:
    """Every tensor name that belongs in the file, with its shape letters."""
    blocks = range(file.keys["llama.block_count"])
    inner = {f"blk.{i}.{name}.weight": s for i in blocks for name, s in BLOCK.items()}
    return {**GLOBAL, **inner}


def _sizes(file: GGUFFile, name: str, letters: str) -> tuple[int, ...]:
    keys = file.keys
    hidden, heads = keys["llama.embedding_length"], keys["llama.attention.head_count"]
    sizes = {
        "V": len(keys["tokenizer.ggml.tokens"]),
        "D": hidden,
        "K": hidden // heads * keys.get("llama.attention.head_count_kv", heads),
        "F": keys["llama.feed_forward_length"],
    }
    # The rank is whatever fc1 has; fc2 must have the same.
    fc1 = file.entries.get(name.replace("fc2", "fc1"))
    sizes["R"] = fc1.shape[0] if fc1 is not None else 0
    return tuple(sizes[letter] for letter in letters)

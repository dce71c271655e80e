"""The bytes of weights that an engine reads to generate one token, in host and in GPU memory.

    dense         one row of the embedding; attention, norms and output matrix; the FFN
    all active    the same, with the FFN's matrices as the PowerInfer file has them, and predictors
    predictors    the same, with (1 - P) of the FFN's bytes, P the predicted sparsity

An OPT has no output matrix and reads its embedding in its place. The KV cache, which grows with the
text, and intermediate results are left out. The engine also skips rows of the down projection whose
input is exactly 0, so the last two are upper bounds.

Of a PowerInfer file with its fixed tensors in GPU memory (export/write/vram.py), only the embedding
and the rest of the FFN are read from host memory. Of the rows read with predictors, the GPU's part
is the share of recorded activations that its neurons have; with everything active it is the share
of neurons.
"""

from __future__ import annotations

from typing import NamedTuple

from sparsecast.export.read.reader import Entry, GGUFFile
from sparsecast.export.write.vram import ON_GPU_FIRST, ROWS, tensor_kind

EMBEDDING = "token_embd.weight"
POSITIONS = "position_embd.weight"
OUTPUT = "output.weight"
PREDICTORS = ("fc1", "fc2")


class Bytes(NamedTuple):
    """Bytes per token, by the memory that they are read from."""

    host: int
    gpu: int

    @property
    def total(self) -> int:
        return self.host + self.gpu


def predicts(name: str) -> bool:
    """Whether a tensor is a predictor's, which the dense model lacks."""
    return tensor_kind(name) in PREDICTORS


def dense_bytes(file: GGUFFile, on_gpu: frozenset[str] = frozenset()) -> Bytes:
    """Return what the dense model of a PowerInfer file reads.

    Args:
        on_gpu: Names of tensors in GPU memory, see `engine_budgets.py`.
    """
    weights = {n: e for n, e in file.entries.items() if not predicts(n)}
    gpu = sum(entry.nbytes for name, entry in weights.items() if name in on_gpu)
    total = _lookups(file) + sum(e.nbytes for name, e in weights.items() if _is_read(file, name))
    return Bytes(total - gpu, gpu)


def sparse_bytes(file: GGUFFile, read: float, *, fixed_on_gpu: bool, ffn_on_gpu: float) -> Bytes:
    """Return what a PowerInfer file reads.

    Args:
        read: Share of the FFN's bytes that are read: 1 with everything active.
        fixed_on_gpu: Attention, norms, predictors and output matrix are in GPU memory.
        ffn_on_gpu: Share of those bytes that are in GPU memory.
    """
    rest = {
        n: e for n, e in file.entries.items() if tensor_kind(n) not in ROWS and _is_read(file, n)
    }
    ffn = round(read * sum(e.nbytes for n, e in file.entries.items() if tensor_kind(n) in ROWS))
    total = _lookups(file) + ffn + sum(entry.nbytes for entry in rest.values())
    gpu = round(ffn * ffn_on_gpu)
    if fixed_on_gpu:
        gpu += sum(entry.nbytes for n, entry in rest.items() if tensor_kind(n) in ON_GPU_FIRST)
    return Bytes(total - gpu, gpu)


def _is_read(file: GGUFFile, name: str) -> bool:
    """Whether the whole tensor is read for every token."""
    return name != POSITIONS and (name != EMBEDDING or OUTPUT not in file.entries)


def _lookups(file: GGUFFile) -> int:
    """The rows of the embeddings of one token."""
    tables = [file.entries[name] for name in (EMBEDDING, POSITIONS) if name in file.entries]
    return sum(map(_row, tables))


def _row(entry: Entry) -> int:
    return entry.nbytes // entry.shape[0]

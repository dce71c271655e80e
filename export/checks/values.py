"""Compare a bundle's tensors with those of its model.

Written without the exporter's code: sources.py computes what a tensor should hold. Quantized
tensors are compared by value: ours as read by export/read/reader.py, the model's as rounded by
the gguf package.

Shape letters: V vocabulary, D hidden, F FFN width; stored tensors are (rows, columns).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecast.export.checks.base import Check, same
from sparsecast.export.checks.sources import Source, interleaved_rows, module_of, parts, rounded
from sparsecast.export.checks.tensors import expected_shapes


def check_values(source: Source) -> list[Check]:
    """Compare every tensor of the model exactly; each kind is one check."""
    failed: dict[str, list[str]] = {}
    names = [n for n in expected_shapes(source.file) if module_of(source.file, n) is not None]
    for name in names:
        wrong = failed.setdefault(f"values {parts(name)[1]}", [])
        want, got = source.expected(name), source.file.tensor(name)
        if not same(want, got):
            wrong.append(f"{name}: {_cause(source, name, want, got)}")
    return [
        Check(kind, not wrong, "; ".join(wrong) or "equal to the model's, rounded")
        for kind, wrong in failed.items()
    ]


def _cause(source: Source, name: str, want: Tensor, got: Tensor) -> str:
    """Explain how `got` differs from `want`."""
    if want.shape != got.shape:
        return f"is {tuple(got.shape)}, the model's is {tuple(want.shape)}"
    if not bool(got.isfinite().all()):
        return f"holds {int((~got.isfinite()).sum())} NaN or infinite values"
    kind = source.file.entries[name].type
    flipped = source.arranged(name).t().contiguous().view(got.shape)
    if got.dim() == 2 and torch.equal(rounded(flipped, kind), got):
        return "transposed: its bytes are those of the transpose"
    if source.interleaved(name) and (cause := _row_order(source, name, want, got)):
        return cause
    if parts(name)[1] == "attn_qkv" and _same_rows(want, got):
        return "permuted wrongly: not all queries, then all keys, then all values"
    if twin := _twin(source, name, got):
        return f"equals {twin} of the model: swapped or written twice"
    flat, ours = got.flatten(), want.flatten()
    differs = (flat != ours).nonzero().flatten()
    first = int(differs[0])
    if not bool(flat[first:].any()):
        return f"truncated: only zeros from value {first} of {flat.numel()} on"
    largest = (flat.float() - ours.float()).abs().max().item()
    return f"{len(differs)} of {flat.numel()} values differ, by up to {largest:.3g}"


def _row_order(source: Source, name: str, want: Tensor, got: Tensor) -> str | None:
    raw = rounded(source.raw(name), source.file.entries[name].type)
    if same(raw, got):
        return "permuted wrongly: rows are in the model's order, not interleaved per head"
    for heads in {source.header.heads, source.header.kv_heads}:
        if len(raw) % (2 * heads) == 0 and same(raw[interleaved_rows(len(raw), heads)], got):
            return f"permuted wrongly: interleaved as if it had {heads} heads"
    return "permuted wrongly: the right rows in a wrong order" if _same_rows(want, got) else None


def _same_rows(want: Tensor, got: Tensor) -> bool:
    """Compare rows in any order, by float64 dot products with random weights."""
    generator = torch.Generator().manual_seed(0)
    weights_D = torch.randn(want.shape[1], generator=generator, dtype=torch.float64)
    sums = [(rows.double() * weights_D).sum(1).sort().values for rows in (want, got)]
    return torch.equal(*sums)


def _twin(source: Source, name: str, got: Tensor) -> str | None:
    """Find another tensor that should hold these values."""
    for other, entry in source.file.entries.items():
        if (
            other == name
            or entry.shape != tuple(got.shape)
            or module_of(source.file, other) is None
        ):
            continue
        if same(source.expected(other).to(got.dtype), got):
            return other
    return None

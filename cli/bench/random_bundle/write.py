"""Write a random bundle: a llama of any shape whose predictors are as good as asked."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from gguf import GGML_QUANT_VERSION, GGMLQuantizationType, GGUFWriter
from torch import Tensor

from sparsecast.cli.bench.export_model import ModelShape
from sparsecast.cli.bench.random_bundle.points import Point, check
from sparsecast.cli.bench.random_bundle.vocabulary import random_vocabulary
from sparsecast.cli.bench.random_bundle.weights import RandomWeights
from sparsecast.core.disk import check_disk_space, explain_full_disk
from sparsecast.core.files import check_new_folder, new_folder, write_text
from sparsecast.core.lock import lock_folder
from sparsecast.core.models.activations import ActivationRule
from sparsecast.core.progress import progress_bar
from sparsecast.export.bundle import BESIDE, SUFFIX
from sparsecast.export.run import AFTER_FULL_DISK, write_counts
from sparsecast.export.write.hparams import HParams
from sparsecast.export.write.tensor_map import Row, model_rows, predictor_names
from sparsecast.export.write.tensor_plan import PlannedTensor, type_of
from sparsecast.export.write.writer import (
    FILE_TYPES,
    KEY_THRESHOLD,
    MAGIC,
    add_hparams,
    add_origin,
    add_vocabulary,
    write_file,
)

COUNTED = 400_000
"""Tokens that the activation counts are of: as many as ProSparse's predictors were trained on."""
CONTEXT = 4096
CARD = """# Random weights

This bundle was made by `sparsecast bench engine` to time PowerInfer. Its weights are random: it
generates nonsense. Gates and predictors were made to fire as a trained model's do:

"""


def write_random_bundle(
    folder: Path, shape: ModelShape, dtype: str, point: Point, seed: int
) -> Path:
    """Write a bundle and return the path of its GGUF file.

    It has what `sparsecast export` writes, but for the predictor folder. Counts are those expected
    of 400,000 tokens. The folder appears complete or not at all; a bundle there is replaced.

    Memory: pools of 17 MB (weights.py), and blocks of 2^18 weights, whatever the shape. Without the
    imports it takes about 100 MB.

    Args:
        dtype: f16 or q4_0, for the model's matrices.
        seed: The same seed gives the same file.

    Raises:
        InputError: See `check` and `design_for`; too little space on the disk; `folder` holds other
            files, or another run is writing it.
        OSError: The disk filled up meanwhile; nothing is left behind.
    """
    check(shape, dtype, point)
    weights = RandomWeights(shape, dtype, point, seed)
    tensors = list(_tensors(shape, dtype, point, weights))
    need = sum(tensor.nbytes for tensor in tensors)
    check_disk_space(folder, need, "the random bundle")
    name = f"random-{shape.hidden}x{shape.ffn}x{shape.layers}-{dtype}{SUFFIX}"
    asked = {**shape._asdict(), **point._asdict(), "dtype": dtype, "seed": seed}
    out = check_new_folder(folder, replaces=f"*{SUFFIX}", beside=BESIDE)
    with (
        lock_folder(out, "random bundle"),
        explain_full_disk(folder, need, "the random bundle", lambda: AFTER_FULL_DISK),
        new_folder(out, replaces=f"*{SUFFIX}", beside=BESIDE) as part,
    ):
        with progress_bar(f"random {dtype} bundle", need) as progress:
            header = partial(_add_header, shape=shape, dtype=dtype, asked=asked)
            wrote = progress.advance
            write_file(part / name, "llama", header, tensors, wrote=wrote, magic=MAGIC)
        write_counts(part / "activation", _counts(shape, weights))
        lines = [f"- {key}: {value}\n" for key, value in asked.items()]
        write_text(part / "README.md", CARD + "".join(lines))
    return out / name


def bundle_bytes(shape: ModelShape, dtype: str, point: Point) -> int:
    """Return the bytes of a bundle's tensors."""
    return sum(t.nbytes for t in _tensors(shape, dtype, point, RandomWeights(shape, dtype, point)))


def _counts(shape: ModelShape, weights: RandomWeights) -> list[Tensor]:
    """Return per layer the (F,) int64 tokens of `COUNTED` on which each neuron fires."""
    layers = range(shape.layers)
    rates = (weights.design.rates(weights.neurons(layer)) for layer in layers)
    return [(COUNTED * rate_F).round().long() for rate_F in rates]


def _hparams(shape: ModelShape) -> HParams:
    return HParams(
        arch="llama",
        layers=shape.layers,
        hidden=shape.hidden,
        ffn=shape.ffn,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        vocab=shape.vocab,
        context=CONTEXT,
        eps=1e-5,
        tied=False,
        activation=ActivationRule("relu"),
    )


def _add_header(
    writer: GGUFWriter, shape: ModelShape, dtype: str, asked: dict[str, object]
) -> None:
    writer.add_name("random weights")
    add_hparams(writer, _hparams(shape))
    writer.add_file_type(FILE_TYPES[dtype])
    if dtype == "q4_0":
        writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_float32(KEY_THRESHOLD, 0.0)
    add_vocabulary(writer, random_vocabulary(shape.vocab))
    add_origin(writer, "random", json.dumps(asked, sort_keys=True), None)


def _tensors(
    shape: ModelShape, dtype: str, point: Point, weights: RandomWeights
) -> Iterator[PlannedTensor]:
    """Yield the tensors in the order of `sparsecast export`."""
    hparams = _hparams(shape)
    for row in model_rows("llama", shape.layers, tied=False, norms=hparams.norms):
        size = hparams.shape("FD" if row.target.endswith("ffn_down_t.weight") else row.shape)
        yield PlannedTensor(row.target, size, type_of(row, dtype), _loader(row, size, weights))
    kind = GGMLQuantizationType[point.format.upper()]
    for layer in range(shape.layers):
        fc1, fc2 = predictor_names(layer)
        yield PlannedTensor(fc1, (point.rank, shape.hidden), kind, weights.fc1)
        yield PlannedTensor(fc2, (shape.ffn, point.rank), kind, partial(weights.fc2, layer))


def _loader(
    row: Row, size: tuple[int, ...], weights: RandomWeights
) -> Callable[[], Tensor | Iterator[Tensor]]:
    if len(size) == 1:
        return partial(torch.ones, size)
    if row.target == "token_embd.weight":
        return weights.embedding
    if row.target.endswith("ffn_gate.weight"):
        return partial(weights.gate, int(row.target.split(".")[1]))
    return partial(weights.other, row.target, size[0])

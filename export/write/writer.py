"""Write a model with its predictors as PowerInfer's GGUF file.

A PowerInfer file is a GGUF version 3 file, alignment 32, whose first four bytes are "PWRI". 1-D
tensors are f32. Matrices are f16, f32 or q4_0; in a q4_0 file output.weight is q8_0, as
PowerInfer's `quantize` has it where rows are no multiples of 256 (an OPT has none, its embedding
serves), and in an f32 file ffn_down_t is f16: for anything but f16 and q4_0 there the engine gives
NaN without an error. Predictors are f16, q8_0 or q4_0 whatever the model is. A tensor that its
architecture does not use makes loading fail, so nothing else is written. The threshold must be an
f32. (PowerInfer's llama.cpp and ggml.h at d3ebd7c.)

Memory: one tensor at a time, as the source's memory map and at most one rearranged copy (q and k),
converted a slab at a time (stored.py); the header holds the vocabulary and the names.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gguf import (
    GGML_QUANT_SIZES,
    GGML_QUANT_VERSION,
    GGMLQuantizationType,
    GGUFValueType,
    GGUFWriter,
    LlamaFileType,
    RopeScalingType,
)
from torch import Tensor

from sparsecast.core.errors import InputError
from sparsecast.core.files import hidden_sibling
from sparsecast.core.ggml_blocks import BLOCK
from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.export.write.convert import Planned, one_thread, slabs
from sparsecast.export.write.hparams import HParams
from sparsecast.export.write.tensor_map import Layout, Row, arranged, model_rows, predictor_names
from sparsecast.export.write.vocab import Vocabulary
from sparsecast.predictors.checkpoint import PredictorSet

MAGIC = b"PWRI"
KEY_THRESHOLD = "powerinfer.sparse_threshold"
KEY_FINGERPRINT = "sparsecast.model_fingerprint"
KEY_RECIPE = "sparsecast.recipe"
"""How the bundle was made, see `finished.recipe_of`."""
KEY_ACTIVATION = "sparsecast.activation_threshold"
"""FATReLU's T of the model, which its config may lack. The engine passes over keys that it does not
know."""
FILE_TYPES = {
    "f16": LlamaFileType.MOSTLY_F16,
    "f32": LlamaFileType.ALL_F32,
    "q4_0": LlamaFileType.MOSTLY_Q4_0,
}


def plan(
    checkpoint: Checkpoint, hyper: HParams, predictors: PredictorSet, dtype: str
) -> list[Planned]:
    """The tensors in file order; nothing is read yet.

    Args:
        dtype: "f16", "f32" or "q4_0", of the model's matrices; predictors have formats of their
            own.

    Raises:
        InputError: A size that does not divide into the blocks of a quantized tensor.
    """
    if dtype == "q4_0":
        _check_blocks(hyper)
    return [*_model_part(checkpoint, hyper, dtype), *_predictor_part(predictors)]


def _check_blocks(hyper: HParams) -> None:
    """Every matrix has rows of the hidden size; the input of ffn_down_t is rounded in blocks along
    the FFN. The engine checks neither and computes nonsense or NaN."""
    for name, width in (("hidden size", hyper.hidden), ("FFN width", hyper.ffn)):
        if width % BLOCK:
            raise InputError(
                f"--dtype q4_0: weights and inputs are stored in blocks of {BLOCK}, but the "
                f"{name} is {width}, not a multiple, which the engine would read wrongly; export "
                "in f16"
            )


def _model_part(checkpoint: Checkpoint, hyper: HParams, dtype: str) -> Iterator[Planned]:
    for row in model_rows(hyper.arch, hyper.layers, tied=hyper.tied, norms=hyper.norms):
        shape = hyper.shape(row.shape)
        if row.layout is Layout.TRANSPOSED:
            shape = shape[::-1]
        kind = _kind(row, dtype)
        yield Planned(row.target, shape, kind, partial(_load, checkpoint, hyper, row))


def _kind(row: Row, dtype: str) -> GGMLQuantizationType:
    if len(row.shape) == 1:
        return GGMLQuantizationType.F32
    if dtype == "f32" and row.layout is Layout.TRANSPOSED:
        return GGMLQuantizationType.F16
    if dtype == "q4_0" and row.target == "output.weight":
        return GGMLQuantizationType.Q8_0
    return GGMLQuantizationType[dtype.upper()]


def _load(checkpoint: Checkpoint, hyper: HParams, row: Row) -> Tensor:
    return arranged(checkpoint.tensor(row.source), row.layout, hyper.heads, hyper.kv_heads)


def _predictor_part(predictors: PredictorSet) -> Iterator[Planned]:
    for i, predictor in enumerate(predictors.layers):
        kind = GGMLQuantizationType[predictor.dtype.upper()]
        block = GGML_QUANT_SIZES[kind][0]
        for name, weight in zip(predictor_names(i), predictor.weights, strict=True):
            if weight.shape[1] % block:
                raise InputError(
                    f"{name}: is {predictor.dtype}, stored in blocks of {block} along a row, but "
                    f"its rows hold {weight.shape[1]} weights, which the engine would read "
                    f"wrongly; train predictors of a rank that is a multiple of {block}, or in f16"
                )
            yield Planned(name, tuple(weight.shape), kind, partial(_same, weight))


def _same(weight: Tensor) -> Tensor:
    return weight


def write_model(
    path: Path,
    tensors: list[Planned],
    hyper: HParams,
    vocabulary: Vocabulary,
    *,
    name: str,
    fingerprint: str,
    threshold: float,
    dtype: str,
    recipe: str = "",
    wrote: Callable[[int], Any] = lambda nbytes: None,
) -> None:
    """Write the file; it appears under `path` complete and on disk, or not at all.

    Args:
        fingerprint: Of the model.
        threshold: Smallest predictor logit for which the engine computes a neuron.
        recipe: See `finished.recipe_of`, as JSON.
        wrote: Called with the bytes of each tensor.

    Raises:
        InputError: A value that its tensor's format cannot hold.
        OSError: The disk is full, or `path` cannot be written.
    """
    part = hidden_sibling(path, "part")
    writer = GGUFWriter(part, hyper.arch)
    try:
        _add_header(writer, hyper, vocabulary, name, threshold, dtype)
        writer.add_string(KEY_FINGERPRINT, fingerprint)
        if recipe:
            writer.add_string(KEY_RECIPE, recipe)
        if hyper.activation.name == "fatrelu":
            kind = GGUFValueType.FLOAT64
            writer.add_key_value(KEY_ACTIVATION, hyper.activation.threshold, kind)
        for t in tensors:
            writer.add_tensor_info(
                t.name, t.shape, np.dtype(np.float32), t.nbytes, raw_dtype=t.kind
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with one_thread():
            _write_data(writer, tensors, wrote)
        writer.close()
        _finish(part)
        os.replace(part, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with suppress(OSError):
            writer.close()
        part.unlink(missing_ok=True)


def _add_header(
    writer: GGUFWriter,
    hyper: HParams,
    vocabulary: Vocabulary,
    name: str,
    threshold: float,
    dtype: str,
) -> None:
    writer.add_name(name)
    writer.add_context_length(hyper.context)
    writer.add_embedding_length(hyper.hidden)
    writer.add_block_count(hyper.layers)
    writer.add_feed_forward_length(hyper.ffn)
    writer.add_head_count(hyper.heads)
    writer.add_head_count_kv(hyper.kv_heads)
    if hyper.rms_norm:
        writer.add_layer_norm_rms_eps(hyper.eps)
    else:
        writer.add_layer_norm_eps(hyper.eps)
    if hyper.rotates:
        writer.add_rope_dimension_count(hyper.head_dim)
        writer.add_rope_freq_base(hyper.rope_base)
    if hyper.rope_factor != 1.0:
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(hyper.rope_factor)
    writer.add_file_type(FILE_TYPES[dtype])
    if dtype == "q4_0":
        writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_float32(KEY_THRESHOLD, threshold)
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_token_list(vocabulary.tokens)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    writer.add_token_types(vocabulary.types)
    if vocabulary.model == "gpt2":
        writer.add_token_merges(vocabulary.merges)
    add = {
        "bos": writer.add_bos_token_id,
        "eos": writer.add_eos_token_id,
        "unk": writer.add_unk_token_id,
        "pad": writer.add_pad_token_id,
    }
    for kind, token in vocabulary.special.items():
        add[kind](token)


def _write_data(writer: GGUFWriter, tensors: list[Planned], wrote: Callable[[int], Any]) -> None:
    """Not by the writer's own method: numpy's tofile may lose the end of an array unnoticed on a
    full disk."""
    assert writer.fout is not None
    file = writer.fout[0]
    writer.write_padding(file, file.tell())
    for t in tensors:
        for rows in slabs(t):
            file.write(rows.data)
        writer.write_padding(file, t.nbytes)
        wrote(t.nbytes)


def _finish(path: Path) -> None:
    """Everything on disk, then the magic: until now a reader takes it for another GGUF."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())
        file.write(MAGIC)
        file.flush()
        os.fsync(file.fileno())

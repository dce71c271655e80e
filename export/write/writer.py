"""Write a model with its predictors as PowerInfer's GGUF file.

A PowerInfer file is a GGUF version 3 file, alignment 32, whose first four bytes are "PWRI". Loading
fails on a tensor that the architecture does not use, so nothing else is written. The threshold must
be an f32. (PowerInfer's llama.cpp and ggml.h at d3ebd7c; tensor_plan.py has the tensors' types.)

Memory: one tensor at a time, as the source's memory map and at most one rearranged copy (q and k),
converted a slab at a time (convert.py). The header holds the vocabulary and the tensors' names.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gguf import (
    GGML_QUANT_VERSION,
    GGUFValueType,
    GGUFWriter,
    LlamaFileType,
    RopeScalingType,
)

from sparsecast.core.files import hidden_sibling
from sparsecast.export.bundle import SUFFIX
from sparsecast.export.plan import ExportPlan
from sparsecast.export.read.other_tokens import OtherTokens
from sparsecast.export.write.convert import one_thread, slabs
from sparsecast.export.write.hparams import HParams
from sparsecast.export.write.tensor_plan import PlannedTensor
from sparsecast.export.write.vocab import Vocabulary

MAGIC = b"PWRI"
KEY_THRESHOLD = "powerinfer.sparse_threshold"
KEY_FINGERPRINT = "sparsecast.model_fingerprint"
KEY_RECIPE = "sparsecast.recipe"
"""How the bundle was made, see `ExportPlan.recipe`."""
KEY_ACTIVATION = "sparsecast.activation_threshold"
"""The model's FATReLU threshold, which its config may lack. The engine skips unknown keys."""
KEY_OTHER_TOKENS = "sparsecast.other_tokens"
"""See `OtherTokens`, as JSON."""
FILE_TYPES = {
    "f16": LlamaFileType.MOSTLY_F16,
    "f32": LlamaFileType.ALL_F32,
    "q4_0": LlamaFileType.MOSTLY_Q4_0,
}


def write_model(
    path: Path, plan: ExportPlan, *, wrote: Callable[[int], Any] = lambda nbytes: None
) -> None:
    """Write the file; it appears under `path` complete and on disk, or not at all.

    Args:
        wrote: Called with the bytes of each tensor.

    Raises:
        InputError: A value that its tensor's format cannot hold.
        OSError: The disk is full, or `path` cannot be written.
    """
    header = partial(_add_header, plan=plan)
    write_file(path, plan.hparams.arch, header, plan.tensors, wrote=wrote, magic=MAGIC)


def write_file(
    path: Path,
    arch: str,
    add_header: Callable[[GGUFWriter], None],
    tensors: list[PlannedTensor],
    *,
    wrote: Callable[[int], Any],
    magic: bytes,
) -> None:
    """Write a file of any architecture, as `write_model` does.

    Args:
        add_header: Adds every key but the architecture.
        magic: The first four bytes, written when the rest is on disk.
    """
    part = hidden_sibling(path, "part")
    writer = GGUFWriter(part, arch)
    try:
        add_header(writer)
        for t in tensors:
            writer.add_tensor_info(
                t.name, t.shape, np.dtype(np.float32), t.nbytes, raw_dtype=t.type
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with one_thread():
            _write_data(writer, tensors, wrote)
        writer.close()
        _finish(part, magic)
        os.replace(part, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with suppress(OSError):
            writer.close()
        part.unlink(missing_ok=True)


def _add_header(writer: GGUFWriter, plan: ExportPlan) -> None:
    writer.add_name(plan.file.removesuffix(SUFFIX))
    add_hparams(writer, plan.hparams)
    writer.add_file_type(FILE_TYPES[plan.dtype])
    if plan.dtype == "q4_0":
        writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_float32(KEY_THRESHOLD, plan.predictors.threshold)
    add_vocabulary(writer, plan.vocabulary)
    add_origin(writer, plan.checkpoint.fingerprint, plan.recipe_text, plan.other_tokens)
    rule = plan.hparams.activation
    if rule.name == "fatrelu":
        writer.add_key_value(KEY_ACTIVATION, rule.threshold, GGUFValueType.FLOAT64)


def add_hparams(writer: GGUFWriter, hparams: HParams) -> None:
    """Add the keys of the model's sizes, norms and rope."""
    writer.add_context_length(hparams.context)
    writer.add_embedding_length(hparams.hidden)
    writer.add_block_count(hparams.layers)
    writer.add_feed_forward_length(hparams.ffn)
    writer.add_head_count(hparams.heads)
    writer.add_head_count_kv(hparams.kv_heads)
    if hparams.rms_norm:
        writer.add_layer_norm_rms_eps(hparams.eps)
    else:
        writer.add_layer_norm_eps(hparams.eps)
    if hparams.rotary:
        writer.add_rope_dimension_count(hparams.head_dim)
        writer.add_rope_freq_base(hparams.rope_base)
    if hparams.rope_factor != 1.0:
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(hparams.rope_factor)


def add_origin(
    writer: GGUFWriter, fingerprint: str, recipe: str, other_tokens: OtherTokens | None
) -> None:
    """Add our own keys: the model, how the file was made, and whose tokens the engine changes."""
    writer.add_string(KEY_FINGERPRINT, fingerprint)
    writer.add_string(KEY_RECIPE, recipe)
    if other_tokens is not None:
        writer.add_string(KEY_OTHER_TOKENS, other_tokens.as_json)


def add_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary) -> None:
    """Add the keys of a vocabulary."""
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


def _write_data(
    writer: GGUFWriter, tensors: list[PlannedTensor], wrote: Callable[[int], Any]
) -> None:
    """Write every tensor's bytes.

    The writer's own method uses numpy's tofile, which can lose the end of an array silently on a
    full disk.
    """
    assert writer.fout is not None
    file = writer.fout[0]
    writer.write_padding(file, file.tell())
    for t in tensors:
        for rows in slabs(t):
            file.write(rows.data)
        writer.write_padding(file, t.nbytes)
        wrote(t.nbytes)


def _finish(path: Path, magic: bytes) -> None:
    """fsync the data before writing the magic, so a partial file is never taken for a bundle."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())
        file.write(magic)
        file.flush()
        os.fsync(file.fileno())

"""Write a ReLU llama as the GGUF file that stock llama.cpp runs (hparams.py says how).

Keys are those that llama.cpp's loader of smallthinker reads; `attention.sliding_window` is left out
on purpose, because with it every fourth layer would attend and rotate differently.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from gguf import (
    GGML_QUANT_VERSION,
    ExpertGatingFuncType,
    GGUFWriter,
    LlamaFileType,
    RopeScalingType,
)

from sparsecast.export.to_gguf.hparams import ReLULlama
from sparsecast.export.to_gguf.plan import GGUF, GGUFPlan
from sparsecast.export.to_gguf.tokens import LlamaCppTokens
from sparsecast.export.write.writer import FILE_TYPES as BUNDLE_TYPES
from sparsecast.export.write.writer import add_origin, add_vocabulary, write_file

ARCHITECTURE = "smallthinker"
FILE_TYPES = BUNDLE_TYPES | {"q8_0": LlamaFileType.MOSTLY_Q8_0}


def write_gguf(path: Path, plan: GGUFPlan, *, wrote: Callable[[int], Any]) -> None:
    """Write the file; it appears under `path` complete and on disk, or not at all.

    Args:
        wrote: Called with the bytes of each tensor.

    Raises:
        InputError: A value that its tensor's format cannot hold.
        OSError: The disk is full, or `path` cannot be written.
    """
    header = partial(_add_header, plan=plan)
    write_file(path, ARCHITECTURE, header, plan.tensors, wrote=wrote, magic=b"GGUF")


def _add_header(writer: GGUFWriter, plan: GGUFPlan) -> None:
    writer.add_name(plan.file.removesuffix(GGUF))
    writer.add_description("a llama with ReLU, as a SmallThinker with one expert")
    _add_hparams(writer, plan.hparams)
    writer.add_file_type(FILE_TYPES[plan.dtype])
    if plan.dtype in ("q4_0", "q8_0"):
        writer.add_quantization_version(GGML_QUANT_VERSION)
    _add_tokens(writer, plan.tokens)
    add_origin(writer, plan.checkpoint.fingerprint, plan.recipe_text, plan.tokens.other)


def _add_hparams(writer: GGUFWriter, hparams: ReLULlama) -> None:
    writer.add_context_length(hparams.context)
    writer.add_embedding_length(hparams.hidden)
    writer.add_block_count(hparams.layers)
    writer.add_feed_forward_length(hparams.ffn)
    writer.add_expert_feed_forward_length(hparams.ffn)
    writer.add_expert_count(1)
    writer.add_expert_used_count(1)
    writer.add_expert_gating_func(ExpertGatingFuncType.SOFTMAX)
    writer.add_head_count(hparams.heads)
    writer.add_head_count_kv(hparams.kv_heads)
    writer.add_key_length(hparams.head_dim)
    writer.add_value_length(hparams.head_dim)
    writer.add_layer_norm_rms_eps(hparams.eps)
    writer.add_rope_dimension_count(hparams.head_dim)
    writer.add_rope_freq_base(hparams.rope_base)
    if hparams.rope_factor != 1.0:
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(hparams.rope_factor)


def _add_tokens(writer: GGUFWriter, tokens: LlamaCppTokens) -> None:
    add_vocabulary(writer, tokens.vocabulary)
    writer.add_tokenizer_pre(tokens.pre)
    writer.add_add_bos_token(tokens.add_bos)
    writer.add_add_eos_token(False)
    if tokens.chat_template is not None:
        writer.add_chat_template(tokens.chat_template)

"""Resolve the options of `export --format gguf` into a plan: model, tokenizer and tensors."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import xxhash

from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.core.models.families import lost_threshold_warning
from sparsecast.core.run_record import Run, begin_run
from sparsecast.export.bundle import SUFFIX, file_name
from sparsecast.export.config import ExportConfig
from sparsecast.export.to_gguf.hparams import ReLULlama, read_relu_llama
from sparsecast.export.to_gguf.tensors import plan_tensors
from sparsecast.export.to_gguf.tokens import LlamaCppTokens, read_llama_cpp_tokens
from sparsecast.export.write.tensor_plan import PlannedTensor

GGUF = ".gguf"


@dataclass(frozen=True, kw_only=True)
class GGUFPlan:
    """One file, ready to be written; tensors are read as they are written."""

    out: Path
    file: str
    """Name of the GGUF file."""
    checkpoint: Checkpoint
    hparams: ReLULlama
    tokens: LlamaCppTokens
    dtype: str
    tensors: list[PlannedTensor]
    lost_threshold: str | None
    """A warning: the config seems to have lost FATReLU's threshold, and no option gives it."""
    run: Run
    """What run.json says of the export."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of the file's tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """Inputs and options that two exports must share to give the same file."""
        return {
            "sparsecast": version("sparsecast"),
            "format": "gguf",
            "model": self.checkpoint.fingerprint,
            "config": _digest(repr(self.hparams)),
            "tokenizer": _digest(repr(self.tokens)),
            "dtype": self.dtype,
        }

    @property
    def recipe_text(self) -> str:
        """The recipe as JSON, stored in the file."""
        return json.dumps(self.recipe, sort_keys=True, allow_nan=False)


def plan_gguf(cfg: ExportConfig) -> GGUFPlan:
    """Read and check every input.

    Raises:
        InputError: See `read_relu_llama`, `read_llama_cpp_tokens` and `plan_tensors`.
    """
    checkpoint = Checkpoint(cfg.model)
    hparams = read_relu_llama(checkpoint, cfg.activation_threshold)
    tokens = read_llama_cpp_tokens(checkpoint, hparams.vocab, allowed=cfg.allow_other_tokens)
    lost = lost_threshold_warning(checkpoint.config, checkpoint.source)
    return GGUFPlan(
        out=cfg.out,
        file=file_name(checkpoint.source).removesuffix(SUFFIX) + GGUF,
        checkpoint=checkpoint,
        hparams=hparams,
        tokens=tokens,
        dtype=cfg.dtype,
        tensors=plan_tensors(checkpoint, hparams, cfg.dtype),
        lost_threshold=lost if cfg.activation_threshold is None else None,
        run=begin_run("export", cfg, checkpoint=checkpoint),
    )


def _digest(text: str) -> str:
    return xxhash.xxh3_128_hexdigest(text.encode())

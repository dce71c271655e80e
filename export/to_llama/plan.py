"""Resolve a conversion: the model, the config of the LLaMA, and every tensor before it is read."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash
from torch import Tensor
from transformers import LlamaConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from sparsecast.core.errors import InputError
from sparsecast.core.files import read_json
from sparsecast.core.messages import log
from sparsecast.core.models.activations import ActivationRule
from sparsecast.core.models.checkpoint import Checkpoint, check_tied_head
from sparsecast.core.models.families import activation_rule
from sparsecast.core.models.loading import check_checkpoint
from sparsecast.core.models.pretrained import empty_model
from sparsecast.core.models.scales import HEAD, Scales, scales_of
from sparsecast.core.run_record import Run, begin_run
from sparsecast.core.tokenizers.copies import files_of
from sparsecast.export.to_llama.config import ConvertConfig

EMBEDDING = "model.embed_tokens.weight"


class FoldedTensor(NamedTuple):
    """A tensor of the LLaMA before it is read."""

    name: str
    source: str
    """Name in the model's checkpoint."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    """The stored dtype, which it keeps."""
    factor: float

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class ConvertPlan:
    """One conversion, ready to be written; tensors are read as they are written."""

    out: Path
    checkpoint: Checkpoint
    tokenizer: Tokenizer
    scales: Scales
    minicpm: bool
    """Whether texts begin with BOS, and chats are MiniCPM's."""
    config: LlamaConfig
    rule: ActivationRule | None
    """None for an activation that leaves no zeros, which `sparsify` can replace."""
    tensors: list[FoldedTensor]
    options: dict[str, Any]
    """What two conversions must share to give the same folder."""
    run: Run
    """What run.json says of the conversion."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)


def plan_conversion(cfg: ConvertConfig) -> ConvertPlan:
    """Read and check the inputs; only headers, the config and the tokenizer are read.

    Raises:
        InputError: See `check_checkpoint`; a model without scales; a tied config beside an output
            matrix that differs from the embedding; `cfg.out` is the model's own folder.
    """
    checkpoint = Checkpoint(cfg.model)
    scales = scales_of(checkpoint.config)
    if scales is None:
        raise InputError(
            f"{cfg.model}: model_type is {checkpoint.config.model_type!r}, expected a MiniCPM or a "
            "Granite, whose scales become part of the weights; there is nothing to fold, so use "
            "the model as it is"
        )
    out = Path(os.path.realpath(cfg.out))
    if out == Path(os.path.realpath(checkpoint.folder)):
        raise InputError(f"{cfg.out}: is the model's own folder, expected a new one for --out")
    tokenizer = check_checkpoint(checkpoint)
    raw = read_json(checkpoint.folder / "config.json", "the model's config")
    config: Any = checkpoint.config
    sparse = config.hidden_act in ("relu", "fatrelu", "drelu", "relu2")
    llama = llama_config(config)
    plan = ConvertPlan(
        out=out,
        checkpoint=checkpoint,
        tokenizer=tokenizer,
        scales=scales,
        minicpm="scale_emb" in raw,
        config=llama,
        rule=activation_rule(config, cfg.model) if sparse else None,
        tensors=_tensors(checkpoint, llama, scales),
        options={
            "sparsecast": version("sparsecast"),
            "model": checkpoint.fingerprint,
            "config": _digest(f"{llama.to_json_string()}{scales}".encode()),
            "tokenizer": _digest(*_contents(tokenizer, checkpoint.folder)),
            "to": cfg.to,
        },
        run=begin_run("convert", cfg, checkpoint=checkpoint),
    )
    _warn_of_leftovers(plan)
    return plan


def llama_config(config: Any) -> LlamaConfig:
    """Build the config of a LLaMA that computes what a Granite's weights do once they are folded.

    `hidden_act` and `hidden_act_param` stay: FATReLU's threshold is lost with neither.
    """
    known = LlamaConfig().to_dict()
    theirs = config.to_dict()
    fields = {name: value for name, value in theirs.items() if name in known}
    if "hidden_act_param" in theirs:
        fields["hidden_act_param"] = theirs["hidden_act_param"]
    own = {"model_type", "architectures", "transformers_version", "tie_word_embeddings"}
    fields = {name: value for name, value in fields.items() if name not in own}
    if "head_dim" not in theirs:
        fields["head_dim"] = config.hidden_size // config.num_attention_heads
    return LlamaConfig(**fields, architectures=["LlamaForCausalLM"], tie_word_embeddings=False)


def _tensors(checkpoint: Checkpoint, llama: LlamaConfig, scales: Scales) -> list[FoldedTensor]:
    head = f"{HEAD}.weight"
    tied = bool(checkpoint.config.tie_word_embeddings)
    if tied and head in checkpoint:
        check_tied_head(checkpoint, checkpoint.tensor(head), EMBEDDING)
    tensors = []
    for name in empty_model(llama).state_dict():
        source = EMBEDDING if tied and name == head else name
        found: Tensor = checkpoint.tensor(source)
        factor = scales.factor(name)
        tensors.append(FoldedTensor(name, source, tuple(found.shape), found.dtype, factor))
    return tensors


def _warn_of_leftovers(plan: ConvertPlan) -> None:
    """Name tensors that a LLaMA has no place for; buffers of old versions are no loss."""
    wanted = {tensor.name for tensor in plan.tensors}
    stored = {plan.checkpoint.stored_name(name) for name in wanted}
    left = [
        name
        for name, _ in plan.checkpoint.tensors()
        if name not in stored and not name.endswith("rotary_emb.inv_freq")
    ]
    if left:
        log.warning(
            f"{plan.checkpoint.folder}: {len(left)} tensors have no place in a llama and are left "
            f"out, {left[0]} first"
        )


def _contents(tokenizer: Tokenizer, folder: Path) -> list[bytes]:
    return [
        part
        for path in files_of(tokenizer, folder)
        for part in (path.name.encode(), path.read_bytes())
    ]


def _digest(*parts: bytes) -> str:
    digest = xxhash.xxh3_128()
    for part in parts:
        digest.update(f"{len(part)} ".encode() + part)
    return digest.hexdigest()

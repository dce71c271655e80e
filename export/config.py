"""The options of `sparsecast export` and `sparsecast verify`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sparsecast.core.errors import InputError
from sparsecast.core.options import option_of, validate_fields

ExportDtype = Literal["f16", "f32", "q4_0"]
AnyDtype = Literal["f16", "f32", "q4_0", "q8_0"]
ExportFormat = Literal["powerinfer", "gguf"]


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write a model and its predictors as a bundle that PowerInfer loads."""

    model: str
    """Hugging Face id or local folder of the model that the predictors belong to."""

    out: Path
    """Folder to write; it appears when complete."""

    predictors: Path | None = None
    """Folder written by `sparsecast train`, a predictor repository of PowerInfer, or the id of
    either on the Hub, `owner/name[@revision]`; every format but gguf needs it."""

    format: ExportFormat = "powerinfer"
    """powerinfer: a bundle for PowerInfer; gguf: a file for stock llama.cpp, which computes every
    neuron of a ReLU llama without predictors."""

    activations: Path | None = None
    """Folder written by `sparsecast collect`; adds the hot/cold files for a GPU build."""

    vram_budget: float | None = None
    """GiB of GPU memory, like PowerInfer's option of that name: also choose the neurons that stay
    on the GPU and write them to the file that a GPU build reads; needs --activations."""

    vram_context: int = 512
    """Tokens of context (PowerInfer's -c) whose KV cache shares the --vram-budget."""

    dtype: AnyDtype = "f16"
    """f16; q4_0: 4.5 bits per weight, the output matrix 8.5; f32 for comparisons (for PowerInfer
    the down projection stays f16); q8_0 with --format gguf alone. Predictors keep the format that
    they were trained for, see --predictor-dtype of `sparsecast train`."""

    activation_threshold: float | None = None
    """FATReLU threshold, for a model whose config has lost it."""

    force: bool = False
    """Accept predictors that were trained for another model, input or activation if their shapes
    fit; the card says so."""

    allow_other_tokens: bool = False
    """Accept a tokenizer that splits or normalizes text as the engine never does (Llama 3, Qwen,
    SmolLM2). The engine is right if it is given token ids; of a text it makes other tokens. The
    export counts the documents of the builtin corpus that this concerns; the card says so."""

    dry_run: bool = False
    """Print what the run would take, disk, memory and time, and leave nothing on the disk. Converts
    one layer."""

    def __post_init__(self) -> None:
        validate_fields(self, vram_context=1, activation_threshold=0)
        self._check_format()
        if self.vram_budget is not None and not 0 < self.vram_budget < 2**20:
            raise InputError(
                f"--vram-budget: got {self.vram_budget:g}, expected GiB of GPU memory, above 0"
            )
        if self.vram_budget is not None and self.activations is None:
            raise InputError(
                "--vram-budget: chooses neurons by how often they fired; give --activations too"
            )

    def _check_format(self) -> None:
        if self.format == "gguf":
            given = ("predictors", "activations", "vram_budget", "force")
            if extra := [option_of(name) for name in given if getattr(self, name)]:
                raise InputError(
                    f"--format gguf: llama.cpp runs without predictors; leave out {extra[0]}, or "
                    "write a bundle with --format powerinfer"
                )
            return
        if self.predictors is None:
            raise InputError(
                "export needs --predictors, a folder that `sparsecast train` wrote; --format gguf "
                "does without"
            )
        if self.dtype == "q8_0":
            raise InputError(
                "--dtype q8_0: only with --format gguf; a bundle for PowerInfer is f16, q4_0 or f32"
            )


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Check a bundle against its model, its predictors and the engine itself."""

    bundle: Path
    """Folder written by `sparsecast export`, or its id on the Hub, `owner/name[@revision]`."""

    model: str | None = None
    """The source model; the one named in the bundle's predictor manifest when unset."""

    engine: Path | None = None
    """Build folder of PowerInfer (or its bin folder). A CPU build runs with one thread; a GPU build
    runs with two, three times each with none, half and all neurons on the GPU."""

    corpus: str = "builtin"
    """Source of the held-out text; see `sparsecast collect --help`."""

    tokens: int = 2048
    """Held-out tokens for the perplexities."""

    max_perplexity_increase: float | None = None
    """Largest relative increase of the bundle's perplexity over the model's, such as 0.02; unset:
    the cost of random misses at the rate of the predictors' calibration."""

    activation_threshold: float | None = None
    """FATReLU threshold, for a model whose config has lost it; unset: the exported one."""

    json: Path | None = None
    """Also write the result to this file."""

    def __post_init__(self) -> None:
        validate_fields(self, tokens=256, activation_threshold=0, max_perplexity_increase=0)

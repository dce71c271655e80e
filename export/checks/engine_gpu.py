"""Compare a GPU build of the engine with ours, with none, half and all neurons on the GPU.

Each choice of neurons has a check of what the engine says of its memory and the checks of
engine.py. A GPU build needs two threads for a layer that is not whole on the GPU, and with two
threads its CPU down projection adds partial sums without a lock, so every comparison is of `RUNS`
runs: the distance between the engine's own runs is added to the bounds.

Its CUDA kernels round otherwise than its CPU kernels: half of our evaluations leave the inputs of
products in float32 (`Unrounded`), the bounds of the probabilities are `GPU_FACTOR` times our
evaluations' distance from each other, and `GPU_MOVED_SHARE` of the tokens may differ where our own
sums decide. Prompts go through the model token by token, with the kernels
that generate text; the perplexity is computed in batches, with the kernels that read prompts.

Measured on an H200 with the demo's bundle (PowerInfer d3ebd7c, CUDA 13): at the median the engine
is 2.7 times as far from our evaluations as they are from each other with no neuron on the GPU, and
2.1 times with all of them. Of 96 tokens, 0 to 3 were not ours, for two bundles and every choice of
neurons.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from sparsecast.core.errors import InputError
from sparsecast.export.checks.base import Check
from sparsecast.export.checks.engine import check_next_tokens, prompts_of, replies_to
from sparsecast.export.checks.engine_text import (
    EnginePerplexity,
    check_perplexity_by_ids,
    check_tokenization,
    compare_perplexity,
)
from sparsecast.export.checks.folders import read_all_counts
from sparsecast.export.checks.logits import degenerate
from sparsecast.export.engine.emulator import Emulator
from sparsecast.export.engine.gpu import MB, Told, gpu_options, read_told
from sparsecast.export.engine.offload import Offload, offloaded, offloads, refused_width
from sparsecast.export.engine.perturbed import Perturbed, Unrounded
from sparsecast.export.engine.process import EngineError, Launch, told_perplexity
from sparsecast.export.engine.protocol import HeldOutText, joined, perplexity
from sparsecast.export.engine.replies import Reply, Spelling
from sparsecast.export.read.header import header_of
from sparsecast.export.read.reader import GGUFFile

RUNS = 3
GPU_FACTOR = 4.0
"""In place of engine.py's `FACTOR`: our evaluations do not have all roundings of CUDA's kernels."""
GPU_MOVED_SHARE = 0.05
"""In place of engine.py's `MOVED_SHARE`."""
PROMPTS, PROMPT_LENGTH = 4, 24
"""Prompts that fit the short context of `gpu_options`."""
MEMORY_BOUND = 0.05
"""Largest share by which the memory that the engine says it uses differs from the plan."""
PRINTED = 0.0051
"""MB by which a number printed with two decimals may be off."""
Q4_0_QUIRK = (
    "; the neurons of a layer split between GPU and CPU are wrong in PowerInfer's own code: its "
    "q4_0 kernel for one token clears the value at a skipped neuron's place in the list of neurons "
    "instead of the neuron's own (`mul_mat_vec_q` in ggml-cuda.cu, by reading); give a budget that "
    "holds every neuron or none, or export in f16"
)


class GPURun(NamedTuple):
    """One choice of neurons; an entry of verify's key `gpu`."""

    on_gpu: str
    """none, half or all."""
    vram_budget: float
    """GiB."""
    neurons: int
    planned_mib: float
    """Weights and KV cache."""
    told_mib: float | None
    """The same as the engine tells it."""
    perplexity: float | None
    reference: float | None


class Compared(NamedTuple):
    """What every choice of neurons is compared on."""

    build: Path
    emulator: Emulator
    text: HeldOutText
    spelling: Spelling
    prompts_PS: Tensor
    reference: float
    """Our perplexity of the text."""


def check_gpu_engine(
    build: Path, emulator: Emulator, text: HeldOutText
) -> tuple[list[Check], EnginePerplexity | None, list[GPURun]]:
    """Compare tokenization once, and memory, perplexity and next tokens for every choice.

    Returns:
        The checks, the perplexities with all neurons on the GPU, and the runs.
    """
    file = emulator.file
    header = header_of(file)
    if why := refused_width(header.ffn):
        return [Check("engine on a GPU", True, f"not checked: {why}")], None, []
    try:
        plans = offloads(file, read_all_counts(file))
    except InputError as error:
        return [Check("engine on a GPU", False, str(error))], None, []
    prompts_PS = prompts_of(text.ids_NS, PROMPTS, PROMPT_LENGTH)
    if reason := degenerate(emulator.logits(prompts_PS)):
        return [Check("engine tokens", False, f"ours: {reason}")], None, []
    spelling = Spelling(text.tokenizer.texts, text.tokenizer.excluded)
    ours = perplexity(emulator.logits, text.ids_NS)
    compared = Compared(build, emulator, text, spelling, prompts_PS, ours)
    with offloaded(file, plans[0]) as model:
        launch = Launch(build, model, gpu_options(plans[0].gib))
        checks = [check_tokenization(launch, text.tokenizer, text.docs)]
    numbers, runs = None, []
    for plan in plans:
        found, numbers, run = _check_offload(compared, plan)
        checks += [replace(check, name=f"{check.name}, {plan.name} on GPU") for check in found]
        runs.append(run)
    return checks, numbers, runs


def _check_offload(
    compared: Compared, plan: Offload
) -> tuple[list[Check], EnginePerplexity | None, GPURun]:
    """Check one choice; the first failure of the engine to run ends it."""
    build, emulator, text = compared.build, compared.emulator, compared.text
    file = emulator.file
    run = GPURun(
        plan.name, plan.gib, plan.split.neurons, plan.planned / MB, None, None, compared.reference
    )
    with offloaded(file, plan) as model:
        at_once = Launch(build, model, gpu_options(plan.gib))
        singly = Launch(build, model, gpu_options(plan.gib, singly=True, split=plan.split.partial))
        ask = partial(told_perplexity, at_once, joined(text.docs), len(text.ids_NS))
        try:
            first, output = ask()
        except EngineError as error:
            return [Check("engine memory", False, str(error))], None, run
        told = read_told(output)
        checks = [check_memory(told, plan)]
        run = run._replace(told_mib=None if told.fixed is None else told.used)
        try:
            replies = [
                replies_to(singly, compared.spelling, compared.prompts_PS) for _ in range(RUNS)
            ]
            ran = [first, *(ask()[0] for _ in range(1, 1 if text.by_ids else RUNS))]
            overall, numbers = _perplexity(compared, singly, ran, replies)
        except EngineError as error:
            return [*checks, Check("engine tokens", False, str(error))], None, run
    prompts_PS, spelling = compared.prompts_PS, compared.spelling
    bounds = GPU_FACTOR, GPU_MOVED_SHARE
    tokens = check_next_tokens(file, spelling, prompts_PS, replies, _evaluation, *bounds)
    found = [overall, *tokens]
    run = run._replace(perplexity=numbers.perplexity, reference=numbers.reference)
    return [*checks, *explained(found, file, plan)], numbers, run


def _perplexity(
    compared: Compared, singly: Launch, ran: list[float], replies: list[list[list[Reply]]]
) -> tuple[Check, EnginePerplexity]:
    text, spelling = compared.text, compared.spelling
    if text.by_ids:
        asked = compared.prompts_PS, replies[0]
        return check_perplexity_by_ids(singly, compared.emulator, spelling, *asked)
    where = f"{len(text.ids_NS)} chunks"
    return compare_perplexity(ran, compared.reference, len(spelling.texts), where)


def _evaluation(file: GGUFFile, seed: int) -> Emulator:
    """Make one evaluation; every second one leaves inputs unrounded."""
    return (Unrounded if seed % 2 else Perturbed)(file, seed)


def check_memory(told: Told, plan: Offload) -> Check:
    """Compare the memory and the neurons that the engine tells with the plan.

    It must use the given budget and file of neurons, place all that comes first, and the neurons'
    bytes must be those planned as far as two decimals show. Weights and KV cache together may
    differ by `MEMORY_BOUND`.
    """
    split = plan.split
    before, rows = split.budget.before / MB, plan.rows / MB
    wrong = []
    if told.budget != split.budget.given:
        wrong.append(f"it read a budget of {told.budget} bytes, {split.budget.given} were given")
    if not told.placed:
        wrong.append(
            f"attention, predictors and output matrix did not fit, planned {before:.2f} MiB"
        )
    if told.refused:
        wrong.append("it did not take our file of neurons")
    if told.needs != split.nbytes:
        read = "none" if told.needs is None else f"one of {told.needs} bytes"
        wrong.append(f"of the files of neurons it read {read}, ours needs {split.nbytes} bytes")
    if told.neurons is None or abs(told.neurons - rows) > PRINTED:
        size = "no" if told.neurons is None else f"{told.neurons:.2f}"
        wrong.append(f"it moved {size} MiB of neurons to the GPU, planned {rows:.2f}")
    planned = plan.planned / MB
    if abs(told.used - planned) > max(MEMORY_BOUND * planned, PRINTED):
        wrong.append(f"it uses {told.used:.2f} MiB, more than {MEMORY_BOUND:.0%} off the plan")
    total = split.width * len(split.hot)
    detail = (
        f"--vram-budget {plan.gib:.9g}: {split.neurons:,} of {total:,} neurons, "
        f"{told.used:.2f} MiB of weights and KV cache used, {planned:.2f} planned"
    )
    if told.scratch is not None:
        detail += f"; {told.scratch:.2f} MiB for intermediate results come on top of any budget"
    return Check("engine memory", not wrong, "; ".join([detail, *wrong]))


def explained(checks: list[Check], file: GGUFFile, plan: Offload) -> list[Check]:
    """Say of failed checks where PowerInfer's known fault with q4_0 is at work."""
    quantized = file.entries["blk.0.ffn_up.weight"].type.name == "q4_0"
    if not (plan.split.partial and quantized):
        return checks
    return [
        check if check.ok else replace(check, detail=check.detail + Q4_0_QUIRK) for check in checks
    ]

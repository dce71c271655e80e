"""The convert stage: write a MiniCPM or Granite as a LLaMA and prove it equal."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from sparsecast.core.disk import (
    check_disk_space,
    describe_space,
    explain_full_disk,
    format_bytes,
)
from sparsecast.core.earlier_runs import check_unchanged, compare_options
from sparsecast.core.errors import InputError
from sparsecast.core.files import check_new_folder, new_folder, read_json, write_json
from sparsecast.core.lock import lock_folder
from sparsecast.core.messages import log
from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.core.models.families import activation_rule
from sparsecast.core.progress import progress_bar
from sparsecast.core.text.tokens import encode
from sparsecast.export.to_llama.config import ConvertConfig
from sparsecast.export.to_llama.plan import ConvertPlan, plan_conversion
from sparsecast.export.to_llama.proof import PASSES, Proof, prove
from sparsecast.export.to_llama.tokenizer import check_tokenizer, write_tokenizer
from sparsecast.export.to_llama.weights import write_weights

FACTS = "convert.json"
"""File of a finished model with the options and the proof."""
TEXTS = (
    "Before the matrices of a layer are read, a small network looks at the stream of numbers and "
    "says which of the thousands of neurons will fire; only the rows of those few are needed. On a "
    "machine whose memory is slow, that is most of the time that a word takes.",
    "def running_mean(values, width=5):\n    total, kept = 0.0, []\n    for i, value in "
    "enumerate(values):\n        total += value - (values[i - width] if i >= width else 0.0)\n"
    "        kept.append(total / min(i + 1, width))\n    return kept\n",
    "语言模型的大多数神经元在处理一个词时并不激活。如果能预先知道哪些神经元会激活，就只需要读取它们的"
    "权重，其余的可以跳过。",
    "  1. Twice 17 is 34, half of 1,024 is 512.\n  2. 3.14159 * 2 = 6.28318\n\n\tcafé, naïve, "
    "Zürich, Москва, 東京; x² + y² ≤ r² → √2 ≈ 1.41421\n",
)
"""What the proof is made on, whatever is installed: prose, code, Chinese, and numbers."""
LENGTH = 48
"""Tokens of each text at most."""
BESIDE_WEIGHTS = 64 * 10**6
"""Disk for the tokenizer's files and configs."""
AFTER_FULL_DISK = "nothing is left behind: make room and run the same command again"


def convert(cfg: ConvertConfig) -> Path:
    """Write the folder and return its path; one of the same model and options is kept.

    Memory: less than 100 MB for slabs of tensors, and for the proof three times the logits of
    192 tokens in float64, whatever the number of layers: 340 MB at 73,440 tokens of vocabulary.

    Raises:
        InputError: See `plan_conversion`; too little space on the disk; `cfg.out` holds something
            else; weights that are not finite, or not once they are folded.
        OSError: The disk filled up meanwhile; nothing is left behind.
        RuntimeError: What was written does not compute the same; nothing is left behind.
    """
    plan = plan_conversion(cfg)
    with lock_folder(plan.out, "conversion"):
        if not _is_finished(plan):
            proof = _write(plan)
            log.info(_told(plan, proof))
    return plan.out


def _is_finished(plan: ConvertPlan) -> bool:
    if not (plan.out / FACTS).is_file():
        return False
    earlier = read_json(plan.out / FACTS, "how the model was converted").get("options")
    if not isinstance(earlier, dict):
        raise InputError(
            f"{plan.out}: holds a converted model that does not say how it was made; choose "
            "another --out or remove the folder"
        )
    changes = compare_options(earlier, plan.options)
    check_unchanged(plan.out, "a converted model", changes, finished=True)
    try:
        Checkpoint(str(plan.out)).check()
    except InputError as error:
        raise InputError(
            f"{plan.out}: holds a damaged conversion ({error}); choose another --out or remove the "
            "folder"
        ) from error
    log.info(f"{plan.out}: already converted")
    return True


def _write(plan: ConvertPlan) -> Proof:
    check_new_folder(plan.out)
    need = plan.nbytes + BESIDE_WEIGHTS
    check_disk_space(plan.out, need, "the model")
    log.info(f"{plan.out}: the model takes {describe_space(plan.out, need)}")
    with (
        explain_full_disk(plan.out, need, "the model", lambda: AFTER_FULL_DISK),
        new_folder(plan.out) as folder,
    ):
        source = plan.checkpoint.folder
        write_tokenizer(plan.tokenizer, source, folder, minicpm=plan.minicpm)
        plan.config.save_pretrained(folder)
        with progress_bar("convert", plan.nbytes) as progress:
            write_weights(folder, plan.checkpoint, plan.tensors, progress.advance)
        proof = _prove(plan, folder)
        write_json(folder / FACTS, {"options": plan.options, "proof": asdict(proof)})
        plan.run.write(folder)
    return proof


def _prove(plan: ConvertPlan, folder: Path) -> Proof:
    """Open the folder as every stage does and compare it with the model."""
    written = Checkpoint(str(folder))
    written.check()
    rule = None if plan.rule is None else activation_rule(written.config, str(folder))
    check_tokenizer(plan.tokenizer, written, TEXTS, minicpm=plan.minicpm)
    docs = [encode(plan.tokenizer, text, LENGTH) for text in TEXTS]
    with progress_bar("prove", PASSES * plan.nbytes) as progress:
        return prove(plan, written, rule, docs, progress.advance)


def _told(plan: ConvertPlan, proof: Proof) -> str:
    """Say what was written and proved, and what other programs do with it."""
    kinds = {tensor.dtype for tensor in plan.tensors if tensor.factor != 1.0}
    dtypes = " and ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
    lines = [
        f"{plan.out}: proved equal on {proof.tokens} tokens of {proof.documents} texts: with "
        f"the same weights, logits differ by at most {proof.apart:.1e} of the largest.",
        f"Rounding the scaled weights to {dtypes} moves logits by up to {proof.moved:.1e} of the "
        f"largest, and the likeliest next token after {proof.changed} of {proof.tokens} tokens.",
    ]
    if plan.checkpoint.config.tie_word_embeddings:
        head = next(tensor for tensor in plan.tensors if tensor.name.startswith("lm_head"))
        lines.append(
            "The model ties its output matrix to the embedding; with scales in them they are two, "
            f"which takes {format_bytes(head.nbytes)} more."
        )
    template = plan.tokenizer.chat_template
    if plan.minicpm and template and "bos_token" not in str(template):
        lines.append(
            "The model's own chat template writes no BOS, and apply_chat_template adds none: "
            "tokenize its text with `tokenizer(text)`."
        )
    lines.append(_others(plan))
    return "\n".join(lines)


def _others(plan: ConvertPlan) -> str:
    rule = plan.rule
    if rule is None:
        return "It runs wherever a LLaMA does; `sparsecast sparsify` makes it sparse."
    if rule.name == "relu":
        return (
            "transformers runs it as it is. vLLM refuses relu in a LLaMA, llama.cpp computes SiLU "
            "instead without saying so, and PowerInfer runs what `sparsecast export` makes of it."
        )
    return (
        f"hidden_act is {rule.name!r}"
        + (f" with hidden_act_param {rule.threshold:g}" if rule.name == "fatrelu" else "")
        + ": every command of sparsecast and its load_model read that. transformers alone and vLLM "
        "stop at the name, llama.cpp computes SiLU instead without saying so, and PowerInfer "
        "computes plain ReLU from what `sparsecast export` makes of it."
    )

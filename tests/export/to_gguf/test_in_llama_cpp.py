"""Stock llama.cpp on what `--format gguf` writes: its tokens and its perplexity."""

from __future__ import annotations

import json
import math
import re
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from sparsecast.core.models.loading import load_model
from sparsecast.export.config import ExportConfig
from sparsecast.export.run import export

pytestmark = pytest.mark.llama_cpp
CHUNK, CHUNKS = 128, 12
SPECIAL = "It's 1234567 and\t89, ISN'T it?  \n\n  cafe\u0301 \u4f60\u597d\U0001f600 a_b\\n  ;; \n"


def run(program: Path, *options: str) -> str:
    done = subprocess.run([program, *options], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-500:]
    return done.stdout + done.stderr


def log_probs(llama_cpp: Path, file: Path, text: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """llama-perplexity's tokens, (N, S), and its log-probabilities behind those from S/2 on,
    (N, S/2 - 1, V), as its file of logits holds them: 16 bits from the largest to 16 below.

    What it prints is no use: its logger loses the last lines on a busy machine.
    """
    saved = file.with_suffix(".logits")
    options = ["-c", str(CHUNK), "-b", str(CHUNK), "-t", "1", "--chunks", str(CHUNKS)]
    options += ["--save-all-logits", str(saved)]
    run(llama_cpp / "llama-perplexity", "-m", str(file), "-f", str(text), *options)
    raw = saved.read_bytes()
    assert raw[:8] == b"_logits_"
    size, vocab, chunks = struct.unpack("<3i", raw[8:20])
    ids_NS = np.frombuffer(raw, np.int32, chunks * size, 20).reshape(chunks, size)
    width = 2 * ((vocab + 1) // 2) + 4
    rows = np.frombuffer(raw, np.uint16, offset=20 + ids_NS.nbytes).reshape(chunks, -1, width)
    scale, lowest = np.split(np.ascontiguousarray(rows[..., :4]).view(np.float32), 2, axis=-1)
    found = lowest + scale * rows[..., 4 : 4 + vocab]
    return torch.from_numpy(ids_NS.astype(np.int64)), torch.from_numpy(found.astype(np.float64))


def tokens(llama_cpp: Path, file: Path, text: Path, *options: str) -> list[int]:
    plain = ("--no-escape", "--no-parse-special", "--log-disable", "--ids")
    out = run(llama_cpp / "llama-tokenize", "-m", str(file), "-f", str(text), *plain, *options)
    ids: list[int] = json.loads(re.findall(r"^\[.*\]$", out, re.MULTILINE)[-1])
    return ids


def ours(tokenizer, text: str) -> list[int]:
    plain = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
    return plain["input_ids"]


def sample(corpus: Path, tmp_path: Path) -> Path:
    files = sorted(corpus.iterdir())[-20:]
    path = tmp_path / "text.txt"
    path.write_text((SPECIAL + "\n".join(f.read_text() for f in files))[:60_000].rstrip("\n"))
    return path


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("name", ["llama-grouped", "llama-tied", "granite", "llama-bytes"])
def test_tokens_and_perplexity_are_transformers(llama_cpp, zoo, corpus, tmp_path, name, kind):
    model = zoo(name)
    file = export(ExportConfig(model=str(model), format="gguf", out=tmp_path / "g", dtype=kind))
    text = sample(corpus, tmp_path)
    net, tokenizer = load_model(str(model), device="cpu", dtype="float32")[:2]
    ids = tokens(llama_cpp, file, text)
    want = ours(tokenizer, text.read_text())
    bos = [] if name.endswith("bytes") else [tokenizer.bos_token_id]
    assert ids == [*bos, *want]
    ids_NS, got_NSV = log_probs(llama_cpp, file, text)
    chunks_NS = torch.tensor(ids[: CHUNK * CHUNKS]).view(-1, CHUNK)
    assert torch.equal(ids_NS, chunks_NS)
    if bos:
        chunks_NS[:, 0] = bos[0]
    with torch.no_grad():
        logits = net(input_ids=chunks_NS).logits[:, CHUNK // 2 : -1].double()
    want_NSV = logits.log_softmax(-1)
    want_NSV = want_NSV.maximum(want_NSV.amax(-1, keepdim=True) - 16)
    next_NS = chunks_NS[:, CHUNK // 2 + 1 :, None]
    bound = {"f32": 1e-4, "f16": 2e-4, "q8_0": 0.002, "q4_0": 0.02}[kind]
    change = float((got_NSV - want_NSV).gather(-1, next_NS).mean())
    assert abs(math.exp(-change) - 1) < bound
    if kind in ("f32", "f16"):
        # llama.cpp keeps keys and values in f16
        assert (got_NSV - want_NSV).abs().max() < 0.03


def gpt4(digits: str) -> pre_tokenizers.PreTokenizer:
    pattern = (
        rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


def digits() -> pre_tokenizers.PreTokenizer:
    each = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([each, pre_tokenizers.ByteLevel(add_prefix_space=False)])


@pytest.mark.parametrize(
    ("step", "whole"),
    [(gpt4("{1,3}"), True), (gpt4("{1,3}"), False), (gpt4(""), False), (digits(), False)],
    ids=["llama-bpe", "smaug-bpe", "qwen2", "smollm"],
)
def test_the_tokens_of_every_kind(llama_cpp, byte_copy, corpus, tmp_path, step, whole):
    config = json.loads((byte_copy / "config.json").read_text())
    config |= {"hidden_act": "relu", "hidden_act_param": None}
    (byte_copy / "config.json").write_text(json.dumps(config))
    path = byte_copy / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.pre_tokenizer = step
    tokenizer.save(str(path))
    spec = json.loads(path.read_text())
    spec["model"]["ignore_merges"] = whole
    path.write_text(json.dumps(spec))
    file = export(ExportConfig(model=str(byte_copy), format="gguf", out=tmp_path / "g"))
    text = sample(corpus, tmp_path)
    own = load_model(str(byte_copy), device="cpu", dtype="float32")[1]
    assert tokens(llama_cpp, file, text) == ours(own, text.read_text())


def test_heads_of_any_size_and_linear_rope(llama_cpp, model_folder, corpus, tmp_path):
    config = LlamaConfig.from_pretrained(model_folder)
    config.head_dim, config.hidden_act, config.intermediate_size = 32, "relu", 96
    config.rope_parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 3e4}
    config.initializer_range = 0.2
    model = tmp_path / "model"
    LlamaForCausalLM(config).half().save_pretrained(model)
    for path in model_folder.glob("tokenizer*"):
        shutil.copy(path, model)
    test_tokens_and_perplexity_are_transformers(
        llama_cpp, lambda name: model, corpus, tmp_path, "wide", "f32"
    )

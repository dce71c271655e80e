"""Stand in for `perplexity` and `server` of a GPU build of PowerInfer; run under either name.

It reads its arguments and the gpuidx file as the engine does, prints the engine's lines about
memory (format strings of llama.cpp at d3ebd7c), and takes its numbers from setup.json beside it.
"""

import json
import os
import random
import re
import signal
import struct
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TextIO

HERE = Path(__file__).parent
SETUP = json.loads((HERE / "setup.json").read_text())
MB = 1024 * 1024
ASSERT = (
    "GGML_ASSERT: /src/ggml.c:16719: n_threads > 1 && "
    '"n_threads must be > 1 to enable hybrid CPU/GPU computation"'
)


def say(stream: TextIO, line: str) -> None:
    stream.write(line + "\n")


def option(name: str) -> str:
    return sys.argv[sys.argv.index(name) + 1]


def tell(function: str, text: str) -> None:
    say(sys.stderr, f"{function}: {text}")


def load() -> None:
    raw = Path(option("-m") + ".generated.gpuidx").read_bytes()
    place = raw.index(b"split.vram_capacity") + len(b"split.vram_capacity") + 4
    capacity = struct.unpack_from("<Q", raw, place)[0]
    buckets = [
        struct.unpack("<Q", m[1])[0] for m in re.finditer(rb"gpu_bucket.{4}(.{8})", raw, re.DOTALL)
    ]
    layers = SETUP["layers"]
    gib = struct.unpack("<f", struct.pack("<f", float(option("--vram-budget"))))[0]
    budget = int(gib * 1024**3) + SETUP.get("budget_off", 0)
    fits = budget >= SETUP["fixed"]
    where = "llm_load_sparse_model_tensors"
    tell(
        where,
        f"offloaded layers from VRAM budget({budget} bytes): {layers + fits}/{layers}",
    )
    tell(where, f"VRAM used: {SETUP['fixed'] * SETUP.get('fixed_times', 1) / MB:.2f} MB")
    room = budget - SETUP["fixed"] - SETUP["cache"]
    moved = sum(buckets) * SETUP["row"]
    say(sys.stdout, f"loaded gpu_idx, vram_required: {capacity}")
    if room < capacity or SETUP.get("refuses"):
        where = "llm_load_gpu_split_with_budget"
        tell(where, "error: failed to apply previously generated gpu split from 'x.gpuidx'")
        tell(where, "error: activation files under './activation' not found")
        moved = 0
    moved += SETUP.get("more_neurons", 0) * SETUP["row"]
    tell("llm_load_gpu_split", f"offloaded {moved / MB:.2f} MiB of FFN weights to GPU")
    tell("llama_kv_cache_init", f"VRAM kv self = {SETUP['cache'] / MB:.2f} MB")
    tell("llama_new_context_with_model", "VRAM scratch buffer: 3.25 MB")
    if SETUP.get("no_gpu"):
        say(sys.stdout, "\nCUDA error 100 at ggml-cuda.cu:6474: no CUDA-capable device is detected")
        say(sys.stderr, "CUDA error 100 at ggml-cuda.cu:6474: no device is detected")
        say(sys.stderr, "current device: 0")
        sys.exit(1)
    whole = all(n == SETUP["width"] for n in buckets)
    if "1" in (option("-t"), option("-tb")) and not whole:
        tell("main", ASSERT)
        sys.exit(1)
    if any(0 < n < SETUP["width"] for n in buckets) and (option("-c"), option("-b")) == ("32", "1"):
        os.kill(os.getpid(), signal.SIGSEGV)


def runs_before(name: str) -> int:
    path = HERE / f"{name}.runs"
    count = int(path.read_text()) if path.exists() else 0
    path.write_text(str(count + 1))
    return count


class Answers(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize":
            reply = json.dumps({"tokens": SETUP["tokens"][asked["content"]]})
        else:
            reply = f"data: {json.dumps(event(asked))}\n\n"
        self.send_response(200)
        self.send_header("Content-Length", str(len(reply.encode())))
        self.end_headers()
        self.wfile.write(reply.encode())

    def log_message(self, *_: object) -> None:
        pass


def moved(off: float, always: random.Random, raced: float, own: random.Random) -> float:
    return off * always.uniform(-1, 1) + raced * own.uniform(-1, 1)


def event(asked: dict) -> dict:
    """Answer; `off` moves every probability, `race` those of every third reply, a run's own."""
    prompt = asked["prompt"]
    reply = SETUP["replies"][",".join(map(str, prompt))]
    banned = len(asked["logit_bias"]) > SETUP["excluded"]
    raced = SETUP.get("race", 0.0) * (len(prompt) % 3 == RUN % 3)
    always, own = random.Random(0), random.Random(RUN)
    said = [
        {"tok_str": text, "prob": max(0.0, prob + moved(SETUP.get("off", 0.0), always, raced, own))}
        for text, prob in reply["banned" if banned else "probs"]
    ]
    said.sort(key=lambda one: -one["prob"])
    best = said[0]["tok_str"]
    content = best if banned or not reply["unsayable"] else ""
    return {"content": content, "completion_probabilities": [{"content": best, "probs": said}]}


if "--help" in sys.argv:
    say(sys.stdout, "  --vram-budget N       VRAM budget in GiB (default: -1, -1 = available VRAM)")
    say(sys.stdout, "  -nommq, --no-mul-mat-q")
    sys.exit(0)
name = Path(sys.argv[0]).name
load()
RUN = runs_before(name)
if name == "perplexity":
    value = SETUP["perplexity"] * SETUP["runs"][RUN % len(SETUP["runs"])]
    say(sys.stdout, f"Final estimate: PPL = {value:.4f} +/- 0.10000")
else:
    ThreadingHTTPServer(("127.0.0.1", int(option("--port"))), Answers).serve_forever()

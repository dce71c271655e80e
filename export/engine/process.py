"""Run PowerInfer's own binaries on a bundle, with a float32 KV cache.

With one thread unless told otherwise, because the CPU down projection adds threads' partial sums
without a lock; a GPU build takes other options, see gpu.py. Binaries run
in a scratch folder, because they write logs to their working directory, and without
LLAMA_SPARSE_PRED_THRESHOLD, which would override the file's threshold.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any, NamedTuple

from sparsecast.core.errors import InputError
from sparsecast.export.engine.protocol import CHUNK

TIMEOUT = 3600
START_TIMEOUT = 180
REPLY_TIMEOUT = 300
MOST_PROBS = 2048
"""Most probabilities in one reply: the server takes a second to print 65,000."""
THRESHOLD = "LLAMA_SPARSE_PRED_THRESHOLD"
OPTIONS = ("-t", "1", "-tb", "1", "-c", str(CHUNK), "-b", str(CHUNK), "--memory-f32")
TELLING = (
    "GGML_ASSERT",
    "CUDA error",
    "cuBLAS error",
    "not enough space in the buffer",
    "error loading model:",
)
"""What a line holds that says why a binary ended; less telling lines may follow it."""


class EngineError(RuntimeError):
    """The engine failed; the message ends with its last line of output."""


class Launch(NamedTuple):
    """How a model is given to the engine."""

    build: Path
    model: Path
    options: Sequence[str] = OPTIONS
    """Threads, context, batch and memory."""


class Next(NamedTuple):
    """The engine's distribution of the token after a prompt."""

    token: str
    """Text of the most probable token."""
    probs: list[tuple[str, float]]
    """Texts and probabilities, most probable first."""
    banned: bool
    """The most probable token was one of `unsayable`; this is the distribution without these."""


def binary(build: Path, name: str) -> Path:
    """Find `name` in a PowerInfer build folder or in its bin folder."""
    for path in (build / "bin" / name, build / name):
        if path.is_file() and os.access(path, os.X_OK):
            return path.absolute()
    raise InputError(
        f"{build}: no executable bin/{name} in it, expected the build folder of PowerInfer; build "
        f"it with `cmake -S . -B build && cmake --build build --target {name}`"
    )


def engine_perplexity(
    build: Path, model: Path, text: str, chunks: int, *, all_active: bool = False
) -> float:
    """Return the perplexity that `perplexity` prints for `text`, which may be NaN or infinite.

    Args:
        all_active: Compute every neuron, whatever the predictors say.

    Raises:
        EngineError: It failed, took too long or printed no estimate.
    """
    return told_perplexity(Launch(build, model), text, chunks, all_active=all_active)[0]


def told_perplexity(
    launch: Launch, text: str, chunks: int, *, all_active: bool = False
) -> tuple[float, str]:
    """Return the perplexity of `engine_perplexity`, and all that the binary printed.

    Raises:
        EngineError: It failed, took too long or printed no estimate.
    """
    program, model = binary(launch.build, "perplexity"), launch.model.absolute()
    command = [str(program), "-m", str(model), "-f", "text.txt"]
    with tempfile.TemporaryDirectory() as scratch:
        Path(scratch, "text.txt").write_text(text, encoding="utf-8", newline="")
        command += [*launch.options, "--chunks", str(chunks)]
        code, out, err = run_to_end(command, scratch, all_active=all_active)
    found = re.search(r"PPL = (\S+)", out)
    if code or not found:
        raise EngineError(f"perplexity gave no estimate (exit {code}): {last_words(err)}")
    return float(found[1]), out + err


def run_to_end(
    command: list[str], folder: str, *, all_active: bool = False
) -> tuple[int, str, str]:
    """Run a binary in `folder` to its end: exit code, standard output and standard error.

    Raises:
        EngineError: It took more than `TIMEOUT` seconds.
    """
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=_environment() | ({THRESHOLD: "-1e30"} if all_active else {}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=TIMEOUT,
        )
    except subprocess.TimeoutExpired as error:
        raise EngineError(f"{Path(command[0]).name} took more than {TIMEOUT} s") from error
    out, err = (stream.decode(errors="replace") for stream in (done.stdout, done.stderr))
    return done.returncode, out, err


class Server:
    """A running `server`, which gives next-token distributions and the tokens of a text."""

    def __init__(
        self, port: int, vocab: int, excluded: Sequence[int], unsayable: Sequence[int]
    ) -> None:
        self._port = port
        self._n_probs = min(vocab, MOST_PROBS)
        self._excluded = [[token, False] for token in excluded]
        self._unsayable = [[token, False] for token in unsayable]

    def tokens(self, text: str) -> list[int]:
        """Tokenize a text; ids without BOS."""
        raw = self._post("/tokenize", {"content": text})
        try:
            ids: list[int] = json.loads(raw)["tokens"]
        except (KeyError, ValueError) as error:
            raise EngineError(f"server gave no tokens: {raw[:200]!r}") from error
        return ids

    def next(self, ids: list[int], raised: Sequence[tuple[int, float]] = ()) -> Next:
        """Return the distribution after `ids`, without the excluded tokens.

        Args:
            raised: Tokens and the amounts added to their logits.

        The server drops the probabilities of tokens that are part of a character or have no text.
        If the most probable token is one of them, it is asked again with all of them forbidden.
        Its prompt cache drops such tokens too and then answers for another prompt, so it is off.
        """
        bias = [*self._excluded, *raised]
        reply = self._ask(ids, bias)
        first = reply["completion_probabilities"][:1]
        banned = not first or reply["content"] != first[0]["content"]
        if banned:
            first = self._ask(ids, bias + self._unsayable)["completion_probabilities"][:1]
        if not first:
            raise EngineError(f"server gave no probabilities after {len(ids)} tokens")
        probs = [(p["tok_str"], float(p["prob"] or 0.0)) for p in first[0]["probs"]]
        return Next(first[0]["content"], probs, banned)

    def _ask(self, ids: list[int], bias: list[Any]) -> dict[str, Any]:
        body = {
            "prompt": ids,
            "n_predict": 1,
            "temperature": 0,
            "n_probs": self._n_probs,
            "repeat_penalty": 1.0,
            "cache_prompt": False,
            "stream": True,
            "logit_bias": bias,
        }
        deadline = time.monotonic() + REPLY_TIMEOUT
        # The only slot stays busy for a moment after an answer; meanwhile replies are empty.
        while not (raw := self._post("/completion", body)) and time.monotonic() < deadline:
            time.sleep(0.002)
        events = [line[6:] for line in raw.split("\n") if line.startswith("data: ")]
        try:
            event: dict[str, Any] = json.loads(events[0])
            event["completion_probabilities"]
        except (IndexError, KeyError, ValueError) as error:
            raise EngineError(f"server gave no probabilities: {raw[:200]!r}") from error
        return event

    def _post(self, path: str, body: dict[str, Any]) -> str:
        connection = HTTPConnection("127.0.0.1", self._port, timeout=REPLY_TIMEOUT)
        try:
            connection.request("POST", path, json.dumps(body))
            return connection.getresponse().read().decode(errors="replace")
        except (OSError, HTTPException) as error:
            raise EngineError(f"server stopped answering ({error})") from error
        finally:
            connection.close()


@contextmanager
def serving(
    build: Path,
    model: Path,
    vocab: int,
    excluded: Sequence[int] = (),
    unsayable: Sequence[int] = (),
    options: Sequence[str] = OPTIONS,
) -> Iterator[Server]:
    """Run a `server` on a free loopback port for the duration of the block.

    Args:
        excluded: Tokens that must never be chosen, such as EOS.
        unsayable: Tokens that are a byte above 127 or have no text, see `Server.next`.
        options: Threads, context, batch and memory.

    Raises:
        EngineError: It did not start.
    """
    program = str(binary(build, "server"))
    port = _free_port()
    place = ["--host", "127.0.0.1", "--port", str(port)]
    with tempfile.TemporaryDirectory() as scratch, Path(scratch, "log").open("wb") as log:
        process = subprocess.Popen(
            [program, "-m", str(model.absolute()), *options, *place],
            cwd=scratch,
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
        try:
            _wait(process, port, Path(scratch, "log"))
            yield Server(port, vocab, excluded, unsayable)
        finally:
            process.kill()
            process.wait()


def _wait(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        if process.poll() is not None:
            last = last_words(log.read_text("utf-8", "replace"))
            raise EngineError(f"server did not start (exit {process.returncode}): {last}")
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1):
                return
        except OSError:
            time.sleep(0.05)
    raise EngineError(f"server was not up after {START_TIMEOUT} s")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k != THRESHOLD}


def last_words(output: str) -> str:
    """Return the line of a binary's output that says why it ended, or its last, shortened."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    telling = [line for line in lines if any(word in line for word in TELLING)]
    return (telling or lines or ["it printed nothing"])[-1][:200]

"""vLLM's HTTP server with a chat template like MiniCPM-S's. `make test-vllm` runs this."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from transformers import AutoTokenizer

pytestmark = pytest.mark.vllm

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '<用户>' + m['content'].strip() + '<AI>' }}{% else %}{{ m['content'].strip() }}"
    "{% endif %}{% endfor %}"
)
QUESTION = [{"role": "user", "content": "def area(self):"}]


@pytest.fixture
def server(environment, variant, tmp_path):
    """(folder, address) of a server of the shipped model with a chat template."""
    folder = variant("chat")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--max-model-len", "256", "--enforce-eager"]
    log = tmp_path / "server.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            command, env=environment, cwd=tmp_path, stdout=out, stderr=subprocess.STDOUT
        )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert process.poll() is None, log.read_text()[-4000:]
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5)
                break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.5)
        yield folder, address
    finally:
        process.terminate()
        process.wait(60)


def test_a_chat_streams_what_transformers_says(server, reference):
    folder, address = server
    body = {
        "model": str(folder),
        "messages": QUESTION,
        "stream": True,
        "temperature": 0,
        "max_tokens": 40,
        "ignore_eos": True,
    }
    request = urllib.request.Request(
        f"{address}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        lines = [line.decode().strip() for line in answer]
    data = [line.removeprefix("data: ") for line in lines if line]
    assert data[-1] == "[DONE]"
    deltas = [json.loads(part)["choices"][0]["delta"] for part in data[:-1]]
    said = [delta.get("content") or "" for delta in deltas]
    assert len([part for part in said if part]) > 10  # it streams

    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.encode(
        tokenizer.apply_chat_template(QUESTION, tokenize=False), add_special_tokens=False
    )
    (ids,) = reference(folder, [prompt], 40).ids
    whole, begun = (tokenizer.decode(part) for part in (prompt + ids, prompt))
    assert "".join(said) == whole[len(begun) :]

"""One small run of each stage, started in processes of its own, and what it leaves."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from sparsecast.predictors.config import TrainConfig
from sparsecast.predictors.train import train

SMALL_SHARDS = """
from sparsecast.collect.store import shard
shard.SHARD_BYTES = 400_000
"""
MICRO = """
from sparsecast.sparsify import config
from sparsecast.sparsify.training import fit
config.PRESETS["micro"] = config.Preset(hidden_size=32, ffn_width=96, layers=2, heads=2, kv_heads=1,
    vocab_size=400, tokens=1, lr=5e-3, l1=5.0)
fit.CHECKPOINT_STEPS = 3
"""
GROUP = "os.setpgid(0, 0)\n"
UNLIKE = ("logs", "tensorboard", "run.json")
"""What holds times, or one part for every start."""


@dataclass
class Stage:
    """A run that ends within seconds; its output is `out`, always under the same name."""

    name: str
    args: list[str]
    out: Path
    start: Callable[..., object]
    code: str = ""

    def run(self, code: str = "", **environment: str):
        """Start it in a process group of its own."""
        return self.start([*self.args, *self.target()], GROUP + self.code + code, **environment)

    def target(self) -> list[str]:
        return ["--json" if self.name == "evaluate" else "--out", str(self.out)]

    def content(self) -> dict[str, bytes]:
        """Every file of the output but logs and records; empty where there is no output."""
        if self.out.is_file():
            scores = {k: v for k, v in json.loads(self.out.read_bytes()).items() if k != "run"}
            return {self.out.name: json.dumps(scores).encode()}
        return {
            str(path.relative_to(self.out)): path.read_bytes()
            for path in sorted(self.out.rglob("*"))
            if path.is_file() and not set(UNLIKE) & set(path.relative_to(self.out).parts)
        }

    def left(self) -> list[str]:
        """What stands in the output's folder."""
        return sorted(path.name for path in self.out.parent.iterdir())

    def held(self) -> int:
        """Bytes that stand in the output's folder."""
        return sum(path.stat().st_size for path in self.out.parent.rglob("*"))

    def clear(self) -> None:
        shutil.rmtree(self.out.parent)
        self.out.parent.mkdir()

    def finish(self) -> dict[str, bytes]:
        """Run it to its end, and return the output."""
        process = self.run()
        _, error = process.communicate(120)
        assert process.returncode == 0, error
        return self.content()


def end_group(process, number: int = signal.SIGKILL) -> None:
    """Send a signal to a process and to those that it has started."""
    try:
        os.killpg(process.process.pid, number)
    except ProcessLookupError:  # not yet in its group, or at its end
        process.send_signal(number)


@pytest.fixture(scope="session")
def few_texts(tmp_path_factory, corpus) -> Path:
    """The first 3,000 characters of 12 files."""
    folder = tmp_path_factory.mktemp("few")
    for path in sorted(corpus.iterdir())[:12]:
        (folder / path.name).write_text(path.read_text()[:3_000])
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory, acts) -> Path:
    """Predictors of rank 32 for `model_folder`."""
    out = tmp_path_factory.mktemp("trained") / "pred"
    train(TrainConfig(activations=acts.folder, out=out, rank=32, epochs=1, device="cpu"))
    return out


@pytest.fixture
def stage(request, tmp_path, model_folder, acts, trained, corpus, few_texts, sparsecast_forked):
    """Make a `Stage` by its name, into `folder` or a new one."""
    model = ["--model", str(model_folder)]
    predictors, activations = ["--predictors", str(trained)], ["--activations", str(acts.folder)]
    cpu = ["--device", "cpu"]
    texts = ["--corpus", str(few_texts)]
    rows = ["--seq-len", "32", "--tokens", "768", "--batch-tokens", "64", "--eval-tokens", "200"]
    rows += ["--l1", "5", "--lr", "1e-2"]
    options = {
        "collect": [*model, "--corpus", str(corpus), "--tokens", "8000", "--seq-len", "128", *cpu],
        "train": [*activations, "--rank", "32", "--epochs", "6", "--batch-size", "256", *cpu],
        "sparsify": ["--preset", "micro", *texts, *rows, *cpu],
        "export": [*model, *predictors, *activations, "--dtype", "f32"],
        "report": [*predictors, *activations],
        "evaluate": [*model, *predictors, *texts, "--seq-len", "128", *cpu],
    }
    code = {"collect": SMALL_SHARDS, "sparsify": MICRO}

    def make(name: str, folder: Path | None = None) -> Stage:
        folder = folder or tmp_path / name
        folder.mkdir(exist_ok=True)
        out = folder / ("out.json" if name == "evaluate" else "out")
        return Stage(name, [name, *options[name]], out, sparsecast_forked, code.get(name, ""))

    return make

"""Random bundles by whole forward passes of the emulator, by verify's checks, and in the engine.

Shape letters: T tokens, D hidden, F FFN width.
"""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from sparsecast.cli.bench.export_model import ModelShape
from sparsecast.cli.bench.random_bundle import write
from sparsecast.cli.bench.random_bundle.measure import measured_point
from sparsecast.cli.bench.random_bundle.points import Point
from sparsecast.cli.bench.random_bundle.vocabulary import FIRST_WORD
from sparsecast.cli.bench.random_bundle.write import COUNTED, write_random_bundle
from sparsecast.core.errors import InputError
from sparsecast.core.lock import lock_folder
from sparsecast.export.bundle import bundle_file
from sparsecast.export.checks.engine_text import check_engine_perplexity
from sparsecast.export.checks.folders import check_activation_folder, read_counts
from sparsecast.export.checks.metadata import check_metadata
from sparsecast.export.checks.tensors import check_finite, check_tensors
from sparsecast.export.checks.vocab import check_vocabulary
from sparsecast.export.engine.emulator import Emulator
from sparsecast.export.engine.fired import Measured
from sparsecast.export.engine.process import binary, run_to_end
from sparsecast.export.engine.protocol import chunks_of
from sparsecast.export.read.reader import GGUFFile
from sparsecast.export.read.vocab import tokenizer_of

SHAPE = ModelShape(hidden=256, ffn=1280, layers=3, heads=4, kv_heads=2, vocab=1280)
PUBLIC = Point(96, "f16", 0.9346, 0.7524)
OURS = Point(160, "q4_0", 0.95, 0.805)
OTHER = Point(224, "q8_0", 0.8, 0.84, true_sparsity=0.85, hot_neurons=0.35)
KINDS = {
    "f16-public": ("f16", PUBLIC),
    "f16-ours": ("f16", OURS),
    "q4_0-public": ("q4_0", PUBLIC),
    "q4_0-ours": ("q4_0", OURS),
    "q4_0-other": ("q4_0", OTHER),
}


@pytest.fixture(scope="module")
def random_bundle(tmp_path_factory):
    """Write a kind of `KINDS` once; not to be written to."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            folder = tmp_path_factory.mktemp("random") / kind
            made[kind] = write_random_bundle(folder, SHAPE, *KINDS[kind], seed=1)
        return made[kind]

    return make


def ids(count: int, length: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    shape = (count // length, length)
    return torch.randint(FIRST_WORD, SHAPE.vocab, shape, generator=generator)


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_fires_and_predicts_as_asked(random_bundle, kind):
    """The emulator's residuals, which attention and the FFNs have added to."""
    point = KINDS[kind][1]
    model = Measured(GGUFFile(random_bundle(kind)), threshold=0.0)
    model.logits(ids(1024))
    for layer in range(SHAPE.layers):
        hit, fired, predicted = model.counts(layer).sum(0).tolist()
        total = 1024 * SHAPE.ffn
        assert hit / fired == pytest.approx(point.recall, abs=0.01)
        assert 1 - predicted / total == pytest.approx(point.predicted_sparsity, abs=0.01)
        assert 1 - fired / total == pytest.approx(point.true_sparsity, abs=0.01)


@pytest.mark.parametrize("kind", ["f16-public", "q4_0-ours", "q4_0-other"])
def test_the_measured_point_is_the_asked_one(random_bundle, kind):
    point = KINDS[kind][1]
    measured = measured_point(random_bundle(kind), tokens=512)
    assert measured.recall == pytest.approx(point.recall, abs=0.005)
    assert measured.predicted_sparsity == pytest.approx(point.predicted_sparsity, abs=0.005)
    assert measured.true_sparsity == pytest.approx(point.true_sparsity, abs=0.005)


class Residuals(Emulator):
    """Keep the residual before every FFN norm."""

    def __init__(self, file: GGUFFile) -> None:
        super().__init__(file)
        self.seen: list[torch.Tensor] = []

    def _skipped(self, x_TD, block):
        self.seen.append(x_TD)
        return super()._skipped(x_TD, block)


@pytest.mark.parametrize("kind", ["f16-public", "q4_0-ours"])
def test_the_residual_stays_the_embedding_and_the_logits_small(random_bundle, kind):
    file = GGUFFile(random_bundle(kind))
    model, ids_NS = Residuals(file), ids(128)

    logits_NSV = model.logits(ids_NS)

    z_TD = file.tensor("token_embd.weight")[ids_NS.flatten()].float()
    for seen_TD in model.seen:
        assert ((seen_TD - z_TD).norm(dim=1) / z_TD.norm(dim=1)).max() < 0.005
    for before_TD, after_TD in pairwise([z_TD, *model.seen]):
        assert not torch.equal(before_TD, after_TD)
    assert logits_NSV.std() == pytest.approx(2, rel=0.1)
    assert logits_NSV.abs().max() < 20


@pytest.mark.parametrize("kind", ["f16-public", "q4_0-ours"])
def test_counts_and_their_skew_are_those_of_the_gates(random_bundle, kind):
    path = random_bundle(kind)
    file, point = GGUFFile(path), KINDS[kind][1]
    z_TD = file.tensor("token_embd.weight")[FIRST_WORD:].double()
    x_TD = z_TD / z_TD.square().mean(1, keepdim=True).sqrt()
    for layer in range(SHAPE.layers):
        gate_TF = x_TD @ file.tensor(f"blk.{layer}.ffn_gate.weight").double().T
        fired_F = (gate_TF > 0).double().sum(0)
        count_F = read_counts(path.parent / f"activation/activation_{layer}.pt", SHAPE.ffn)

        rate_F = count_F.double() / COUNTED
        deviation_F = (len(z_TD) * rate_F * (1 - rate_F)).sqrt().clamp_min(1)
        assert ((fired_F - len(z_TD) * rate_F) / deviation_F).square().mean() < 1.3

        hottest_K = count_F.argsort(descending=True)[: round(SHAPE.ffn * point.hot_neurons)]
        assert fired_F[hottest_K].sum() / fired_F.sum() == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_verify_finds_nothing_wrong_with_the_file(random_bundle, kind):
    path = random_bundle(kind)
    file = GGUFFile(bundle_file(path.parent))
    checks = [check_metadata(file), check_tensors(file), check_finite(file), check_vocabulary(file)]
    checks.append(check_activation_folder(file, path.parent / "activation"))
    assert [c for c in checks if not c.ok] == []


def test_hardly_a_weight_is_subnormal(random_bundle):
    file = GGUFFile(random_bundle("f16-public"))
    for name, entry in file.entries.items():
        if entry.type.name == "f16":
            value = file.tensor(name).abs()
            subnormal = (value > 0) & (value < torch.finfo(torch.float16).smallest_normal)
            assert subnormal.float().mean() < 1e-3, name


def test_a_gate_and_its_predictor_hold_the_same_weights(random_bundle):
    """In q4_0 as in f16: what the predictor cannot know is what it does not read."""
    for kind, S in (("f16-public", 32), ("q4_0-ours", 64)):
        file = GGUFFile(random_bundle(kind))
        gate_FD, fc2_FR = (file.tensor(f"blk.1.{n}.weight").float() for n in ("ffn_gate", "fc2"))
        read_FS = gate_FD[:, 32 : 32 + S]
        units = fc2_FR.shape[1] - 2 * S
        plus_FS, minus_FS = fc2_FR[:, units : units + S], fc2_FR[:, units + S :]
        assert torch.allclose(plus_FS, read_FS, rtol=1e-3, atol=1e-5)
        assert torch.equal(minus_FS, -plus_FS)


def test_the_seed_decides_every_byte(tmp_path):
    paths = [
        write_random_bundle(tmp_path / str(i), SHAPE, "f16", PUBLIC, seed)
        for i, seed in enumerate((3, 3, 4))
    ]
    assert {path.name for path in paths} == {"random-256x1280x3-f16.powerinfer.gguf"}
    first, second, third = (path.read_bytes() for path in paths)
    assert first == second
    same = np.frombuffer(first, np.uint8) == np.frombuffer(third, np.uint8)[: len(first)]
    assert same.mean() < 0.5


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(folder, counts):
        raise KeyboardInterrupt

    monkeypatch.setattr(write, "write_counts", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_random_bundle(tmp_path / "b", SHAPE, "f16", PUBLIC, 0)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_being_written_is_refused(tmp_path):
    with lock_folder(tmp_path / "b", "test"), pytest.raises(InputError, match="is writing it"):
        write_random_bundle(tmp_path / "b", SHAPE, "f16", PUBLIC, 0)


def test_a_bundle_is_replaced_and_other_files_are_not(tmp_path):
    out = tmp_path / "b"
    write_random_bundle(out, SHAPE, "f16", PUBLIC, 0)
    path = write_random_bundle(out, SHAPE, "q4_0", PUBLIC, 0)
    assert bundle_file(out) == path
    (out / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="exists and holds other files"):
        write_random_bundle(out, SHAPE, "q4_0", PUBLIC, 0)
    assert path.exists()


MEMORY = """
import sys
from pathlib import Path
from sparsecast.cli.bench.random_bundle.points import Point
from sparsecast.cli.bench.random_bundle.write import ModelShape, write_random_bundle

def most():
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) // 1024

shape = ModelShape(hidden=2048, ffn=1280, layers=1, heads=32, kv_heads=32, vocab=20_000)
before = most()
write_random_bundle(Path(sys.argv[1]), shape, "q4_0", Point(512, "f16", 0.9346, 0.7524), 0)
print(most() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.slow
def test_memory_is_pools_and_blocks_of_rows(tmp_path):
    """Where the embedding alone takes 164 MB in float32."""
    run = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "b")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(run.stdout) < 130


@pytest.mark.engine
@pytest.mark.parametrize("kind", ["f16-public", "q4_0-ours"])
def test_the_engine_has_our_perplexity_and_generates(random_bundle, engine, kind, tmp_path):
    path = random_bundle(kind)
    file = GGUFFile(path)
    tokenizer = tokenizer_of(file)
    words = [tokenizer.texts[i] for i in ids(1024).flatten().tolist()]
    text = " ".join(words)

    check, _ = check_engine_perplexity(
        engine, file, Emulator(file), text, chunks_of(text, tokenizer, 1024)
    )
    assert check.ok, check.detail

    main = [str(binary(engine, "main")), "-m", str(path), "-t", "1", "-n", "16", "-p", " def"]
    code, _, err = run_to_end([*main, "--ignore-eos", "--temp", "0"], str(tmp_path))
    assert code == 0, err
    assert "16 runs" in err or "15 runs" in err

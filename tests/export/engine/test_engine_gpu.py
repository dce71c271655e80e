"""The engine's checks on a GPU build, with a stand-in that prints and answers as such a build."""

from __future__ import annotations

import json
import stat
import sys
from pathlib import Path

import pytest
import torch

from sparsecast.core.errors import InputError
from sparsecast.export.bundle import bundle_file
from sparsecast.export.checks import engine_gpu
from sparsecast.export.checks.engine import Position, probability_check, prompts_of
from sparsecast.export.checks.engine_gpu import (
    Q4_0_QUIRK,
    check_gpu_engine,
    check_memory,
    explained,
)
from sparsecast.export.config import VerifyConfig
from sparsecast.export.engine.emulator import Emulator
from sparsecast.export.engine.gpu import gpu_options, is_gpu_build, read_told
from sparsecast.export.engine.offload import offloaded, offloads
from sparsecast.export.engine.process import EngineError, Launch, binary, told_perplexity
from sparsecast.export.engine.protocol import joined, perplexity, read_held_out
from sparsecast.export.engine.replies import Reply, Spelling
from sparsecast.export.read.reader import GGUFFile
from sparsecast.export.read.vocab import tokenizer_of
from sparsecast.export.verify import verify

STAND_IN = Path(__file__).parents[2] / "tools" / "powerinfer_gpu.py"
LAYERS, HIDDEN, FFN, KV = 3, 64, 1280, 32
PARTS = ("memory", "perplexity", "tokens", "probabilities", "outliers")
ROW = 3 * 2 * HIDDEN
"""Bytes of a neuron's rows of gate, up and down in f16."""


@pytest.fixture(autouse=True, scope="module")
def _few_positions():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_gpu, "PROMPTS", 2)
        patch.setattr(engine_gpu, "PROMPT_LENGTH", 8)
        yield


@pytest.fixture(scope="module")
def held_out(bundle_folder, corpus):
    """The file, its text, and what an engine without a fault says of it."""
    file = GGUFFile(bundle_file(bundle_folder))
    tokenizer, emulator = tokenizer_of(file), Emulator(file)
    text = read_held_out(str(corpus), tokenizer, 512)
    prompts_PS = prompts_of(text.ids_NS, engine_gpu.PROMPTS, engine_gpu.PROMPT_LENGTH)
    spelling = Spelling(tokenizer.texts, tokenizer.excluded)
    replies = {}
    for prompt, logits_SV in zip(prompts_PS.tolist(), emulator.logits(prompts_PS), strict=True):
        for s, logits_V in enumerate(logits_SV):
            out = {*spelling.excluded, *spelling.unsayable}
            plain, banned = (spelling.distribution(logits_V, banned=b).tolist() for b in (0, 1))
            sayable = [i for i in range(len(plain)) if i not in out]
            replies[",".join(map(str, prompt[: s + 1]))] = {
                "probs": [(tokenizer.texts[i], plain[i]) for i in sayable],
                "banned": [(tokenizer.texts[i], banned[i]) for i in sayable],
                "unsayable": max(plain) > max(plain[i] for i in sayable),
            }
    said = {
        "layers": LAYERS,
        "width": FFN,
        "row": ROW,
        "fixed": sum(e.nbytes for n, e in file.entries.items() if not outside(n)),
        "cache": 2 * 4 * LAYERS * 128 * KV,
        "perplexity": perplexity(emulator.logits, text.ids_NS),
        "runs": [1.0],
        "replies": replies,
        "excluded": len(spelling.excluded),
        "tokens": {doc: tokenizer.encode(doc) for doc in text.docs},
    }
    return file, text, said


def outside(name: str) -> bool:
    """Tensors that stay in host memory: the embedding and the FFN's matrices."""
    return name.startswith("token_embd") or any(
        f".ffn_{part}." in name for part in ("gate", "up", "down_t")
    )


@pytest.fixture
def build(tmp_path, held_out):
    """Make a GPU build that differs from a faultless one as told."""

    def make(**faults: object) -> Path:
        folder = tmp_path / "build" / "bin"
        folder.mkdir(parents=True)
        for name in ("perplexity", "server"):
            script = folder / name
            script.write_text(f"#!{sys.executable} -SE\n{STAND_IN.read_text()}")
            script.chmod(script.stat().st_mode | stat.S_IXUSR)
        (folder / "setup.json").write_text(json.dumps({**held_out[2], **faults}))
        return folder.parent

    return make


@pytest.fixture
def checked(build, held_out, monkeypatch):
    """Check such a build, with half of the neurons on the GPU unless told otherwise."""

    def check(only: tuple[str, ...] = ("half",), **faults: object):
        monkeypatch.setattr(
            engine_gpu, "offloads", lambda *of: [p for p in offloads(*of) if p.name in only]
        )
        checks, numbers, runs = check_gpu_engine(
            build(**faults), Emulator(held_out[0]), held_out[1]
        )
        return {c.name: c for c in checks}, numbers, runs

    return check


def failed(checks) -> dict[str, str]:
    return {name: check.detail for name, check in checks.items() if not check.ok}


def test_a_build_that_is_right_passes_with_every_choice_of_neurons(checked, held_out):
    checks, numbers, runs = checked(("none", "half", "all"))

    assert not failed(checks)
    names = {f"engine {part}, {on} on GPU" for part in PARTS for on in ("none", "half", "all")}
    assert set(checks) == {"engine tokenization"} | names
    assert numbers.perplexity == pytest.approx(held_out[2]["perplexity"], abs=1e-4)
    assert [run.neurons for run in runs] == [0, 7 * 256, 3 * FFN]
    fixed = held_out[2]["fixed"] + held_out[2]["cache"]
    for run in runs:
        assert run.planned_mib == pytest.approx((fixed + run.neurons * ROW) / 2**20)
        assert run.told_mib == pytest.approx(run.planned_mib, abs=0.02)
        assert run.vram_budget * 2**30 >= fixed + run.neurons * (ROW + 4)
    assert "1,792 of 3,840 neurons" in checks["engine memory, half on GPU"].detail


@pytest.mark.parametrize(
    ("faults", "told"),
    [
        ({"fixed_times": 1.2}, "more than 5% off the plan"),
        ({"more_neurons": 256}, "MiB of neurons to the GPU, planned"),
        ({"refuses": True}, "it did not take our file of neurons"),
        ({"budget_off": 4096}, "it read a budget of"),
        ({"fixed_times": 1.01}, ""),
    ],
)
def test_memory_that_was_not_planned_fails(faults, told, build, held_out):
    file, text, _ = held_out
    _, half, _ = offloads(file, None)
    with offloaded(file, half) as model:
        launch = Launch(build(**faults), model, gpu_options(half.gib))
        _, output = told_perplexity(launch, joined(text.docs), 1)

    check = check_memory(read_told(output), half)

    assert check.ok == (not told)
    assert told in check.detail


def test_an_engine_that_aborts_is_told_in_its_own_words(checked):
    checks, numbers, runs = checked(no_gpu=True)

    assert numbers is None
    assert "CUDA error 100" in failed(checks)["engine memory, half on GPU"]
    assert [run.perplexity for run in runs] == [None]


def test_one_thread_would_abort(monkeypatch, checked):
    monkeypatch.setattr("sparsecast.export.engine.gpu.THREADS", "1")

    checks, _, _ = checked()

    assert "n_threads must be > 1" in failed(checks)["engine memory, half on GPU"]


def test_runs_that_differ_by_a_race_pass_and_say_so(checked):
    checks, _, _ = checked(race=0.02, runs=[1.0, 1.012, 1.01])

    assert not failed(checks)
    half = {name.partition(",")[0]: c.detail for name, c in checks.items() if "half" in name}
    assert "own runs differ by" in half["engine probabilities"]
    assert "median of 3 runs 1.20% apart" in half["engine perplexity"]


@pytest.mark.slow
def test_an_error_that_every_run_has_fails(checked):
    checks, _, _ = checked(off=0.02, runs=[1.02])

    wrong = failed(checks)
    assert "engine probabilities, half on GPU" in wrong
    assert "engine perplexity, half on GPU" in wrong


def test_an_error_beyond_the_race_fails(checked):
    checks, _, _ = checked(off=0.05, race=0.01)

    assert "engine probabilities, half on GPU" in failed(checks)


@pytest.mark.parametrize(("spread", "ok"), [(0.0, False), (2e-3, False), (4e-3, True)])
def test_what_the_engine_differs_from_itself_it_may_differ_from_us(spread, ok):
    positions = [Position(0.0, 0.0, [3e-3] * 3, [1e-6] * 6, spread)] * 10

    check = probability_check(positions)

    assert check.ok == ok
    assert ("own runs differ" in check.detail) == (spread > 0)


@pytest.mark.parametrize(
    ("times", "cpu", "gpu"), [(1.9, True, True), (3, False, True), (5, False, False)]
)
def test_a_gpu_may_be_further_from_ours_than_a_cpu(times, cpu, gpu):
    positions = [Position(0.0, 0.0, [times * 2e-3] * 3, [2e-3] * 6)] * 10

    assert probability_check(positions).ok == cpu
    assert probability_check(positions, engine_gpu.GPU_FACTOR).ok == gpu


def test_replies_that_name_other_tokens_differ_by_their_probability():
    one, other = (
        Reply([0], torch.tensor(slots), torch.tensor(probs, dtype=torch.float64), False, False)
        for slots, probs in (([3, 1], [0.5, 0.3]), ([3, 2], [0.4, 0.25]))
    )

    assert one.distance(other) == pytest.approx(0.3)
    assert one.distance(one) == 0


@pytest.mark.parametrize(("dtype", "named"), [("f16", False), ("q4_0", True)])
def test_the_known_fault_with_q4_0_is_named_for_split_layers(dtype, named, bundle_in):
    file = GGUFFile(bundle_file(bundle_in("f16", "f16", "f16", dtype=dtype)))
    checks = [engine_gpu.Check("engine tokens", ok, "far") for ok in (False, True)]

    none, half, whole = (explained(checks, file, plan) for plan in offloads(file, None))

    assert half[0].detail == "far" + (Q4_0_QUIRK if named else "")
    assert none == whole == checks
    assert half[1] == checks[1]


def test_without_counts_every_layer_is_split_and_not_at_its_first_neurons(bundle_folder):
    file = GGUFFile(bundle_file(bundle_folder))

    _, half, _ = offloads(file, None)

    assert sorted(len(hot_K) for hot_K in half.split.hot) == [512, 512, 768]
    assert all(not torch.equal(hot_K, torch.arange(len(hot_K))) for hot_K in half.split.hot)


def test_beside_the_linked_model_lies_our_split_alone(bundle_folder):
    file = GGUFFile(bundle_file(bundle_folder))
    _, half, _ = offloads(file, None)

    with offloaded(file, half) as model:
        there = {path.name for path in model.parent.iterdir()}
        index = GGUFFile(Path(f"{model}.generated.gpuidx"))
        assert there == {model.name, f"{model.name}.generated.gpuidx"}
        assert model.resolve() == file.path.resolve()
        for i, hot_K in enumerate(half.split.hot):
            assert torch.equal(index.tensor(f"blk.{i}.gpu_bucket").long(), hot_K)
    assert not model.parent.exists()


def test_a_gpu_build_is_known_by_its_help(build, tmp_path):
    program = tmp_path / "perplexity"
    program.write_text("#!/bin/sh\necho 'usage: perplexity'; echo '  --vram-budget N'; exit 1\n")
    program.chmod(0o755)
    assert not is_gpu_build(program)
    assert is_gpu_build(binary(build(), "perplexity"))
    program.write_text("#!/bin/sh\necho 'libcublas.so.13: cannot open' >&2; exit 127\n")
    with pytest.raises(EngineError, match=r"cannot be run \(exit 127\): libcublas.so.13: cannot"):
        is_gpu_build(program)
    program.write_text("of another machine\n")
    with pytest.raises(InputError, match=r"perplexity: cannot be run \(Exec format error\)"):
        is_gpu_build(program)


def test_verify_takes_that_path_and_writes_the_runs(
    build, bundle_folder, corpus, tmp_path, monkeypatch
):
    monkeypatch.setattr(engine_gpu, "RUNS", 1)
    cfg = VerifyConfig(
        bundle=bundle_folder,
        corpus=str(corpus),
        tokens=512,
        engine=build(),
        json=tmp_path / "v.json",
    )

    assert verify(cfg).ok

    value = json.loads((tmp_path / "v.json").read_text())
    assert [run["on_gpu"] for run in value["gpu"]] == ["none", "half", "all"]
    assert value["engine"]["perplexity"] == value["gpu"][2]["perplexity"]


def test_an_ffn_that_cannot_be_split_is_not_checked(checked, monkeypatch):
    monkeypatch.setattr(engine_gpu, "refused_width", lambda ffn: "no")

    checks, numbers, runs = checked()

    assert (numbers, runs) == (None, [])
    assert checks["engine on a GPU"].detail == "not checked: no"

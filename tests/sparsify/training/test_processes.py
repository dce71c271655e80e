"""Several processes train what one trains, resume each other's runs, and leave nothing behind."""

from __future__ import annotations

import json
import os
import pickle
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from sparsecast.core.distributed import DistributedContext
from sparsecast.core.errors import InputError
from sparsecast.core.models.families import FAMILIES
from sparsecast.core.options import command_of
from sparsecast.sparsify.plan import make_plan
from sparsecast.sparsify.training.sharding import without_weights
from sparsecast.sparsify.training.team import Team

MICRO = """
from sparsecast.sparsify import config
config.PRESETS["micro"] = config.Preset(hidden_size=30, ffn_width=95, layers=2, heads=3, kv_heads=1,
    vocab_size=401, tokens=1, lr=1e-3, l1=5.0)
"""
"""No size that two processes can share equally."""
STOP_BEFORE_THE_SWEEP = """
from sparsecast.sparsify import run
def stop(*_): raise KeyboardInterrupt
run.choose_activation = stop
"""
"""The work folder then holds all trained weights and moments in float32."""
STEP = """
import json
from sparsecast.sparsify.training.lightning_module import SparsifyModule
step = SparsifyModule.training_step
"""
TELL = (
    STEP
    + """
import torch
clip = torch.nn.utils.clip_grad_norm_
def clipped(parameters, most):
    norm = clip(parameters, most)
    whole = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    if os.environ.get("RANK", "0") == "0":
        with open(TOLD, "a") as file:
            print(json.dumps({"norm": whole, "most": most}), file=file)
    return norm
torch.nn.utils.clip_grad_norm_ = clipped
def told(self, batch, index):
    if self.trainer.is_global_zero:
        values = {}
        self.log = lambda name, value, **_: values.update({name: float(value)})
        loss = step(self, batch, index)
        with open(TOLD, "a") as file:
            print(json.dumps({"loss": float(loss), **values}), file=file)
        return loss
    return step(self, batch, index)
SparsifyModule.training_step = told
"""
)
COMPILED = """
import torch
from sparsecast.sparsify.training.lightning_module import SparsifyModule
init, compiler = SparsifyModule.__init__, torch.compile
def compiled(self, *args, **options): init(self, *args, **options | {"compile": True})
SparsifyModule.__init__ = compiled
torch.compile = lambda step: compiler(step, backend="aot_eager")
"""
SIGNAL = (
    STEP
    + """
def told(self, batch, index):
    if self.global_step == 1 and os.environ.get("RANK", "0") == WHICH:
        os.kill(os.getpid(), signal.SIGTERM)
    return step(self, batch, index)
SparsifyModule.training_step = told
"""
)
FAIL = (
    STEP
    + """
def told(self, batch, index):
    if os.environ.get("RANK", "0") == WHICH:
        raise RuntimeError("no memory on this one")
    return step(self, batch, index)
SparsifyModule.training_step = told
"""
)


@pytest.fixture
def arguments(options):
    """Three steps of four sequences: (out, options) to arguments of `sparsecast`."""

    def make(out: Path, **changes) -> list[str]:
        base = {"tokens": 384, "batch_tokens": 128, "lr": 1e-3, "out": out}
        return shlex.split(command_of("sparsify", options(**base | changes)))[1:]

    return make


@pytest.fixture
def run(ranks_forked, sparsecast_forked):
    """Run `sparsecast` in as many processes: their exit codes, and what they wrote."""

    def start(count: int, args: list[str], code: str = "") -> tuple[list[int | None], list[str]]:
        code = MICRO + code
        one = [sparsecast_forked(args, code)] if count == 1 else ranks_forked(count, args, code)
        errors = [process.communicate(100)[1] for process in one]
        return [process.returncode for process in one], errors

    return start


def trained(out: Path) -> dict[str, dict]:
    work = out.with_name(f".{out.name}.work")
    return {path.name: torch.load(path, weights_only=True) for path in work.glob("*.pt")}


def assert_equal(found: Path, meant: Path) -> None:
    """Weights, moments and learning rates of every phase."""
    mine, its = trained(found), trained(meant)
    assert mine.keys() == its.keys()
    for name in its:
        for state in (mine[name], its[name]):
            for key in [key for key in state["model"] if key.endswith("k_proj.bias")]:
                # Attention does not depend on it. Adam makes steps of its gradient's rounding.
                del state["model"][key]
        assert mine[name]["model"].keys() == its[name]["model"].keys()
        torch.testing.assert_close(mine[name], its[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "own"),
    [
        pytest.param(
            {"preset": "micro", "tokens": 640, "baselines": True},
            {"micro_batch": 1},
            marks=pytest.mark.slow,
        ),
        pytest.param({"model": "tied"}, {"checkpoint_activations": True}, marks=pytest.mark.slow),
        pytest.param({"model": "opt"}, {}, marks=pytest.mark.slow),
        pytest.param({"model": "falcon"}, {}, marks=pytest.mark.slow),
        (
            {"model": "llama", "tokens": 128 * 16, "target_sparsity": 0.9}
            | {"max_perplexity_increase": 0.9},
            {"checkpoint_activations": True},
        ),
    ],
    ids=["preset, accumulated", "tied, recomputed", "opt", "falcon", "raised, guarded"],
)
def test_two_processes_train_what_one_trains(run, arguments, dense, tmp_path, changes, own):
    if changes.get("model") == "tied":
        changes = {"model": str(dense(tie_word_embeddings=True))}
    elif "model" in changes:
        changes = {"model": str(dense(changes["model"], "gelu", num_hidden_layers=2))}
    told = [tmp_path / "told of one", tmp_path / "told of two"]
    codes = [f"TOLD = {str(path)!r}{TELL}{STOP_BEFORE_THE_SWEEP}" for path in told]

    one, _ = run(1, arguments(tmp_path / "one", **changes), codes[0])
    two, errors = run(2, arguments(tmp_path / "two", **changes, **own), codes[1])

    assert (one, two) == ([130], [130, 0]), errors
    assert_equal(tmp_path / "two", tmp_path / "one")
    if "target_sparsity" in changes:
        (saved,) = trained(tmp_path / "two").values()
        assert saved["raised"]["threshold"] > 0
    meant, found = ([json.loads(row) for row in path.read_text().splitlines()] for path in told)
    assert len(meant) >= 6
    assert any(row.get("norm", 0) > 1 for row in meant)  # so that clipping to 1 matters
    assert found == [pytest.approx(row, rel=1e-5) for row in meant]


@pytest.mark.slow
def test_two_processes_with_compiled_layers_train_what_one_trains(run, arguments, dense, tmp_path):
    model = str(dense("llama", "silu", num_hidden_layers=3))
    changes = {"model": model, "target_sparsity": 0.9}

    one, _ = run(1, arguments(tmp_path / "one", **changes), STOP_BEFORE_THE_SWEEP)
    two, errors = run(2, arguments(tmp_path / "two", **changes), COMPILED + STOP_BEFORE_THE_SWEEP)

    assert (one, two) == ([130], [130, 0]), errors
    assert_equal(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_processes(run, arguments, tmp_path, first, then):
    """SIGTERM at the second step of one process ends all of them behind it."""
    changes = {"preset": "micro", "tokens": 1024, "pretrain_share": 0.4}
    meant, found = tmp_path / "meant", tmp_path / "found"

    codes, _ = run(1, arguments(meant, **changes), STOP_BEFORE_THE_SWEEP)
    assert codes == [130]
    codes, errors = run(
        first, arguments(found, **changes), SIGNAL.replace("WHICH", f"'{first - 1}'")
    )
    assert codes[0] == (143 if first == 1 else 130), errors
    assert codes[1:] == [0] * (first - 1)
    last = tmp_path / ".found.work" / "pre-training.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 2
    codes, errors = run(then, arguments(found, **changes), STOP_BEFORE_THE_SWEEP)

    assert codes == [130] + [0] * (then - 1), errors
    assert "resuming at step 2" in errors[0]
    assert_equal(found, meant)


def torchrun(args: list[str], code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    script = folder / "script.py"
    head = "import os, signal, sys"
    script.write_text(f"{head}{MICRO}{code}\nfrom sparsecast.cli.main import main\nmain()\n")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [sys.executable, *launcher, str(script), *args],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )


@pytest.mark.slow
def test_a_process_that_fails_in_its_first_step_leaves_nothing(arguments, dense, tmp_path):
    """And binds nobody: torchrun ends the leading process, which clears up."""
    folder = tmp_path / "runs"
    args = arguments(folder / "out", model=str(dense()))

    done = torchrun(args, FAIL.replace("WHICH", "'1'"), tmp_path)

    assert done.returncode == 1
    assert "rank 1: sparsify failed: no memory on this one" in done.stderr
    assert done.stderr.count("sparsify failed") == 1
    assert list(folder.iterdir()) == []

    done = torchrun(args, "", tmp_path)

    assert done.returncode == 0, done.stderr
    assert [path.name for path in folder.iterdir()] == ["out"]


def test_a_leading_process_that_fails_leaves_nothing_and_ends_the_others(
    run, arguments, dense, tmp_path
):
    folder = tmp_path / "runs"

    codes, errors = run(
        2, arguments(folder / "out", model=str(dense())), FAIL.replace("WHICH", "'0'")
    )

    assert codes == [1, 1]
    assert "sparsify failed: no memory on this one" in errors[0]
    assert "failed" not in errors[1]
    assert list(folder.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "told"),
    [({"corpus": "/none.txt"}, "no such file"), ({"device": "cuda:99"}, "--device: ")],
)
def test_bad_input_is_told_once_by_all_processes(run, arguments, dense, tmp_path, changes, told):
    folder = tmp_path / "runs"

    codes, errors = run(2, arguments(folder / "out", model=str(dense()), **changes))

    assert codes == [2, 0]
    assert told in errors[0]
    assert errors[1] == ""
    assert not folder.exists() or list(folder.iterdir()) == []


@pytest.mark.slow
def test_a_run_that_diverges_ends_on_every_process(run, arguments, dense, tmp_path):
    folder = tmp_path / "runs"

    codes, errors = run(2, arguments(folder / "out", model=str(dense()), lr=1e30))

    assert codes == [2, 0]
    assert "training diverged" in errors[0]
    assert list(folder.iterdir()) == []


@pytest.mark.slow
def test_a_step_that_does_not_divide_among_processes_is_refused(options, dense):
    cfg = options(model=str(dense()), batch_tokens=128)

    with pytest.raises(InputError, match="a step has 4 sequences .* 3 processes cannot share"):
        make_plan(cfg, Team(DistributedContext(0, 3)))


@pytest.mark.parametrize("name", [n for n, family in FAMILIES.items() if not family.experts])
def test_a_model_of_any_family_travels_without_weights(name):
    """Other processes get its modules, buffers and ties."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9}
    sizes |= {
        "ffn_dim": 16,
        "intermediate_size": 16,
        "word_embed_proj_dim": 8,
        "num_key_value_heads": 1,
    }
    config = CONFIG_MAPPING[name](**sizes, pad_token_id=None, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)

    there = pickle.loads(pickle.dumps(without_weights(model)))[0]

    assert {n: (p.shape, p.device.type) for n, p in there.named_parameters()} == {
        n: (p.shape, "meta") for n, p in model.named_parameters()
    }
    for (where, mine), (_, its) in zip(there.named_buffers(), model.named_buffers(), strict=True):
        assert torch.equal(mine, its), where
    assert not any(p.is_meta for p in model.parameters())

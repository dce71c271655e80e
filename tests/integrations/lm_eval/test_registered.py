"""`--model sparsecast` of lm-eval: one mode of a model, on lm-eval's own command line."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

pytest.importorskip("lm_eval")

from lm_eval.api.registry import get_model

from sparsecast.core.errors import InputError
from sparsecast.core.models.loading import load_model
from sparsecast.integrations.lm_eval import __main__ as program
from sparsecast.integrations.lm_eval.model import OneBosLM
from sparsecast.integrations.lm_eval.registered import SparsecastLM
from sparsecast.predictors.checkpoint import load_predictors
from sparsecast.predictors.modes import MODES, in_mode

REQUESTS = [SimpleNamespace(args=("import os\nimport", " sys"), task_name="t")]
SHARED = {"batch_size": 2, "device": "cpu"}


@pytest.mark.parametrize("mode", MODES)
def test_each_mode_is_that_of_the_loop(mode, predictors):
    arguments = f"pretrained=tiny-prosparse,mode={mode},predictors={predictors}"
    lm = get_model("sparsecast").create_from_arg_string(arguments, SHARED)
    assert isinstance(lm, SparsecastLM)
    (got,) = lm.loglikelihood(REQUESTS, disable_tqdm=True)
    model, tokenizer = load_model("tiny-prosparse", device="cpu")
    plain = OneBosLM(model, tokenizer)
    with in_mode(model, load_predictors(predictors), mode):
        (want,) = plain.loglikelihood(REQUESTS, disable_tqdm=True)
    assert got == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"mode": "sparse"}, "--model_args mode: got 'sparse', expected dense, exact, predicted"),
        ({}, "--model_args mode=predicted: needs predictors; add predictors=FOLDER"),
        ({"mode": "exact", "trust_remote_code": True}, "--model_args trust_remote_code: not an"),
        ({"mode": "exact", "peft": "x"}, "--model_args peft: not an argument"),
        ({"mode": "exact", "pretrained": "./none"}, "./none: no such model folder"),
        ({"pretrained": None}, "--model_args: names no model; add pretrained=FOLDER or a hub id"),
        ({"mode": "exact", "max_length": 1}, "max_length: must be at least 2, got 1"),
    ],
)
def test_bad_arguments_are_one_line(arguments, said):
    with pytest.raises(InputError) as error:
        SparsecastLM(**{"pretrained": "tiny-prosparse", "device": "cpu"} | arguments)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_the_program_prints_one_line(monkeypatch, capsys):
    def fail() -> None:
        raise InputError("--model_args mode: got 'x'")

    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", fail)
    with pytest.raises(SystemExit) as stopped:
        program.main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "sparsecast: --model_args mode: got 'x'\n"


@pytest.mark.slow
def test_lm_evals_command_line_finds_the_model(task_folder, predictors, tmp_path):
    """It reads all of its tasks and describes the machine: half a minute."""
    words = ["-m", "sparsecast.integrations.lm_eval", "run", "--model", "sparsecast"]
    words += ["--model_args", f"pretrained=tiny-prosparse,predictors={predictors},mode=exact"]
    words += ["--tasks", "local_choice", "--include_path", str(task_folder)]
    words += ["--output_path", str(tmp_path), "--device", "cpu"]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "local_choice" in done.stdout
    (path,) = tmp_path.rglob("results_*.json")
    assert json.loads(path.read_text())["results"]["local_choice"]["sample_len"] == 4

"""--tasks beside --corpus, and what is refused before anything is loaded; lm-eval is not needed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sparsecast.cli.main import main
from sparsecast.core.errors import InputError
from sparsecast.integrations.lm_eval import run
from sparsecast.integrations.lm_eval.run import evaluate, require_lm_eval
from sparsecast.predictors.config import EvaluateConfig
from sparsecast.predictors.evaluate import evaluate as evaluate_corpus

NEEDED_WORDS = ["--model", "tiny-prosparse", "--predictors", "pred"]
NEEDED = {"model": "tiny-prosparse", "predictors": Path("pred")}


def test_the_corpus_is_builtin_only_without_tasks():
    assert EvaluateConfig(**NEEDED).corpus == "builtin"
    assert EvaluateConfig(**NEEDED, tasks=["arc_easy"]).corpus is None
    both = EvaluateConfig(**NEEDED, tasks=["arc_easy"], corpus="builtin", tokens=100)
    assert (both.corpus, both.tokens) == ("builtin", 100)


@pytest.mark.parametrize(
    ("given", "named", "needed"),
    [
        ({"limit": 5}, "--limit", "--tasks"),
        ({"num_fewshot": 0}, "--num-fewshot", "--tasks"),
        ({"chat_template": True}, "--chat-template", "--tasks"),
        ({"include_path": "x"}, "--include-path", "--tasks"),
        ({"tasks": ["a"], "tokens": 5}, "--tokens", "--corpus"),
        ({"tasks": ["a"], "seq_len": 5}, "--seq-len", "--corpus"),
        ({"tasks": ["a"], "long_documents": "cut"}, "--long-documents", "--corpus"),
    ],
)
def test_an_option_without_effect_is_refused(given, named, needed):
    with pytest.raises(InputError) as error:
        EvaluateConfig(**NEEDED, **given)
    assert str(error.value) == (f"{named}: belongs to {needed}; give that too, or leave this out")


@pytest.mark.parametrize("limit", [0, -1, "10", float("nan")])
def test_a_limit_is_a_positive_number(limit):
    with pytest.raises(InputError, match="--limit"):
        EvaluateConfig(**NEEDED, tasks=["a"], limit=limit)


def test_a_missing_lm_eval_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SystemExit) as stopped:
        main(
            ["evaluate", "--model", "tiny-prosparse", "--predictors", "pred", "--tasks", "arc_easy"]
        )
    assert stopped.value.code == 2
    assert capsys.readouterr().err == (
        "sparsecast: --tasks needs the package lm_eval, which is not installed; "
        "run: pip install 'sparsecast[lm-eval]'\n"
    )


def test_an_old_lm_eval_is_one_line(monkeypatch):
    monkeypatch.setattr(run, "optional", lambda *_, **__: None)
    monkeypatch.setattr(run, "version", lambda _: "0.4.9.1")
    with pytest.raises(InputError, match=r"needs lm-eval 0.4.13 or newer, found 0.4.9.1; run: pip"):
        require_lm_eval("--tasks")


def test_the_function_of_the_corpus_runs_no_tasks():
    with pytest.raises(InputError, match="sparsecast.integrations.lm_eval.run.evaluate"):
        evaluate_corpus(EvaluateConfig(**NEEDED, tasks=["arc_easy"]))


def test_without_tasks_the_corpus_is_evaluated(monkeypatch):
    monkeypatch.setattr(run, "evaluate_corpus", lambda cfg: {"corpus": cfg.corpus})
    assert evaluate(EvaluateConfig(**NEEDED)) == {"corpus": "builtin"}

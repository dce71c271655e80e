"""`sparsecast evaluate --tasks` from the command line, on local tasks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

from lm_eval.api.task import Task
from lm_eval.evaluator import evaluate as lm_eval_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers.processors import TemplateProcessing

from sparsecast.cli.main import main
from sparsecast.core.errors import InputError
from sparsecast.core.models.loading import load_model
from sparsecast.core.models.location import TINY_PROSPARSE
from sparsecast.integrations.lm_eval.tasks import load_tasks
from sparsecast.predictors.checkpoint import load_predictors
from sparsecast.predictors.modes import MODES, in_mode

NAMES = "local_choice,local_text,local_answer"


@pytest.fixture
def run(task_folder, predictors, tmp_path, capsys):
    """Run the command; (exit code, what --json wrote, standard error)."""

    def go(*args: str) -> tuple[int, dict | None, str]:
        out = tmp_path / "evaluate.json"
        words = ["evaluate", "--model", "tiny-prosparse", "--predictors", str(predictors)]
        words += ["--device", "cpu", "--json", str(out), *args]
        with pytest.raises(SystemExit) as stopped:
            main(words)
        err = capsys.readouterr().err
        return stopped.value.code, json.loads(out.read_text()) if out.exists() else None, err

    return go


@pytest.fixture
def built(monkeypatch):
    """Count how often tasks are loaded and their requests built."""
    calls = {"load": 0, "build_all_requests": 0}

    def count(owner, name):
        original = getattr(owner, name)

        def counted(*args, **options):
            calls[name] += 1
            return original(*args, **options)

        monkeypatch.setattr(owner, name, counted)

    count(TaskManager, "load")
    count(Task, "build_all_requests")
    return calls


def compare_with_stock(result, task_folder, predictors):
    """Stock HFLM has one BOS where the tokenizer adds it; in rolling windows, where it does not."""
    model, tokenizer = load_model("tiny-prosparse", device="cpu")
    manager = TaskManager(include_path=str(task_folder), include_defaults=False)
    bare = TemplateProcessing(single="$A", special_tokens=[])
    adding = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    for name, metric, processor in (
        ("local_choice", "acc,none", adding),
        ("local_answer", "exact_match,none", adding),
        ("local_text", "word_perplexity,none", bare),
    ):
        tokenizer.backend_tokenizer.post_processor = processor
        stock = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2)
        for mode in ("dense", "predicted"):
            with in_mode(model, load_predictors(predictors), mode):
                loaded = manager.load([name])
                loaded["tasks"][name].set_config(key="num_fewshot", value=0)
                want = lm_eval_evaluate(stock, loaded, bootstrap_iters=0)["results"][name]
            row = result["tasks"][name]["metrics"][metric][mode]
            assert row["value"] == pytest.approx(want[metric], rel=1e-5)


def test_four_modes_answer_the_same_requests(run, task_folder, predictors, built):
    code, result, screen = run("--tasks", NAMES, "--include-path", str(task_folder))
    assert code == 0
    assert built == {"load": 1, "build_all_requests": 3}
    told = {"lm_eval", "limit", "chat_template", "max_length"}
    assert set(result) == {"model", "tasks", *told, "run"}
    assert result["run"]["versions"]["lm_eval"] == result["lm_eval"]
    assert list(result["tasks"]) == NAMES.split(",")
    assert [task["documents"] for task in result["tasks"].values()] == [4, 2, 2]
    for task in result["tasks"].values():
        for row in task["metrics"].values():
            assert set(row) == {"higher_is_better", *MODES}
            assert row["exact"]["value"] == pytest.approx(row["dense"]["value"], rel=1e-4)
    choice = result["tasks"]["local_choice"]["metrics"]["acc,none"]
    assert choice["exact"]["change"] == choice["exact"]["change_stderr"] == 0
    assert choice["dense"]["stderr"] > 0
    text = result["tasks"]["local_text"]["metrics"]["word_perplexity,none"]
    assert text["predicted"]["value"] > 1.05 * text["dense"]["value"]
    assert text["bundle"]["value"] != pytest.approx(text["predicted"]["value"], rel=1e-4)
    assert "it/s" not in screen  # no bars of lm-eval's own
    lines = [line.split() for line in screen.splitlines()]
    assert ["task", "n", "metric", "dense", "exact", "predicted", "bundle"] in lines
    shown = f"{text['dense']['value']:.4f}"
    row = next(line for line in lines if line[:2] == ["local_text", "2"])
    assert row[3:5] == [shown, shown]
    assert "evaluate: 100%, 56 of 56" in screen
    compare_with_stock(result, task_folder, predictors)


def test_corpus_and_tasks_in_one_go(run, task_folder, corpus):
    args = ["--tasks", "local_choice", "--include-path", str(task_folder), "--limit", "2"]
    args += ["--corpus", str(corpus), "--tokens", "200", "--seq-len", "100"]
    code, result, screen = run(*args)
    assert code == 0
    assert result["tokens"] == 200
    assert set(result["change"]) == {"exact", "predicted", "bundle"}
    assert result["tasks"]["local_choice"]["documents"] == 2
    assert result["limit"] == 2
    assert f"perplexity on 200 held-out tokens of {corpus}" in screen
    assert "--limit 2: parts of tasks; for trying out, not for reporting" in screen


def test_examples_and_chat_template(run, task_folder, tmp_path):
    args = ["--tasks", "local_choice", "--include-path", str(task_folder)]
    code, result, screen = run(*args, "--num-fewshot", "1", "--chat-template", "true")
    assert (code, result) == (2, None)
    assert "--chat-template: the tokenizer of tiny-prosparse has no chat template" in screen
    model = tmp_path / "model"
    shutil.copytree(TINY_PROSPARSE, model)
    template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    (model / "chat_template.jinja").write_text(template)
    args += ["--model", str(model), "--chat-template", "true"]
    code, result, _ = run(*args, "--num-fewshot", "2", "--limit", "1")
    assert code == 0
    assert result["chat_template"] is True
    assert result["tasks"]["local_choice"]["num_fewshot"] == 2


@pytest.mark.usefixtures("own_tasks_alone")
def test_a_group_stands_among_its_tasks(run, task_folder, tmp_path):
    for path in task_folder.glob("local_choice.yaml"):
        (tmp_path / path.name).write_text(path.read_text())
    group = {"group": "mine", "task": ["local_choice"]}
    group["aggregate_metric_list"] = [{"metric": "acc", "weight_by_size": True}]
    (tmp_path / "mine.yaml").write_text(json.dumps(group))
    code, result, _ = run("--tasks", "mine", "--include-path", str(tmp_path), "--limit", "2")
    assert code == 0
    assert set(result["tasks"]) == {"mine", "local_choice"}
    group, task = (result["tasks"][name]["metrics"]["acc,none"] for name in result["tasks"])
    for mode in MODES:
        assert group[mode]["value"] == task[mode]["value"]


def one_line(screen: str) -> str:
    assert screen.startswith("sparsecast: ")
    assert screen.count("\n") == 1, screen
    return screen


def test_a_bad_include_path_is_one_line(run, task_folder, tmp_path):
    (tmp_path / "empty").mkdir()
    for path, said in (
        (tmp_path / "none", "no such folder"),
        (task_folder / "local_choice.yaml", "is a file"),
        (tmp_path / "empty", "has no .yaml file"),
    ):
        code, result, screen = run("--tasks", "local_choice", "--include-path", str(path))
        assert (code, result) == (2, None)
        assert f"--include-path {path}: {said}" in one_line(screen)


@pytest.fixture
def own_tasks_alone(monkeypatch):
    """Without lm-eval's own, which take it ten seconds to read."""
    init = TaskManager.__init__
    monkeypatch.setattr(
        TaskManager,
        "__init__",
        lambda self, **options: init(self, **options | {"include_defaults": False}),
    )


@pytest.mark.usefixtures("own_tasks_alone")
def test_an_unknown_task_names_those_that_are_close(run, task_folder):
    code, _, screen = run("--tasks", "local_chioce", "--include-path", str(task_folder))
    assert code == 2
    assert one_line(screen) == (
        "sparsecast: --tasks local_chioce: no task, group or tag of that name in lm-eval or in "
        f"{task_folder}; did you mean local_choice or local_text?\n"
    )
    _, _, screen = run("--tasks", "zzz", "--include-path", str(task_folder))
    assert "`python -m lm_eval ls tasks` lists those it has" in one_line(screen)


@pytest.mark.usefixtures("own_tasks_alone")
def test_a_glob_and_a_file_name_tasks_too(task_folder):
    assert list(load_tasks(["local_*"], task_folder)["tasks"]) == sorted(NAMES.split(","))
    assert list(load_tasks([str(task_folder / "local_text.yaml")])["tasks"]) == ["local_text"]


@pytest.mark.usefixtures("own_tasks_alone")
def test_a_task_that_lm_eval_cannot_read_is_named(run, tmp_path):
    (tmp_path / "mine.yaml").write_text("task: mine\ndoc_to_text: {{\n")
    code, _, screen = run("--tasks", "mine", "--include-path", str(tmp_path))
    assert code == 2
    assert f"lm-eval cannot read {tmp_path / 'mine.yaml'}" in one_line(screen)


def task_with(folder: Path, source: Path, **fields: object) -> Path:
    task = json.loads((source / "local_choice.yaml").read_text()) | {"task": "broken"} | fields
    folder.mkdir()
    (folder / "broken.yaml").write_text(json.dumps(task))
    return folder


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"dataset_kwargs": {"data_files": {"test": "/none.jsonl"}}}, "the data cannot be read"),
        ({"dataset_path": "nobody/no-such-data", "dataset_kwargs": {}}, "the data cannot be read"),
        ({"output_type": "nonsense"}, "lm-eval cannot load it (ValueError: Got invalid"),
        ({"unsafe_code": True}, "runs code that the model writes"),
        ({"doc_to_image": "{{q}}"}, "needs images or sound, expected text"),
        (
            {"output_type": "generate_until", "generation_kwargs": {"max_new_tokens": 512}},
            "--tasks broken: an answer may take 512 tokens, and the model reads 512 with the",
        ),
    ],
)
def test_a_task_that_cannot_run_is_one_line(run, task_folder, tmp_path, monkeypatch, fields, said):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = task_with(tmp_path / "tasks", task_folder, **fields)
    code, result, screen = run("--tasks", "broken", "--include-path", str(folder))
    assert (code, result) == (2, None), screen
    assert said in one_line(screen)


def test_a_task_without_a_score_is_named(run, task_folder, tmp_path):
    metrics = [{"metric": "accuraci", "aggregation": "mean", "higher_is_better": True}]
    folder = task_with(tmp_path / "tasks", task_folder, metric_list=metrics)
    code, result, screen = run("--tasks", "broken", "--include-path", str(folder))
    assert (code, result["tasks"]["broken"]["metrics"]) == (0, {})
    assert "--tasks broken: has no score" in screen
    assert (
        "has no score" not in run("--tasks", "local_choice", "--include-path", str(task_folder))[2]
    )


def test_a_file_that_cannot_be_written_is_refused_first(predictors):
    with pytest.raises(SystemExit) as stopped:
        main(
            ["evaluate", "--model", "tiny-prosparse", "--predictors", str(predictors)]
            + ["--tasks", "arc_easy", "--json", "/proc/none/e.json"]
        )
    assert stopped.value.code == 2


def test_a_chat_is_built_from_turns(task_folder):
    """Examples are turns of the template, and the template is the tokenizer's."""
    from sparsecast.integrations.lm_eval.model import OneBosLM
    from sparsecast.integrations.lm_eval.tasks import build_requests

    model, tokenizer = load_model("tiny-prosparse", device="cpu")
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    lm = OneBosLM(model, tokenizer)
    loaded = load_tasks(["local_choice"], task_folder, num_fewshot=1)
    assert build_requests(loaded, lm, limit=1, chat_template=True) == 3
    context = loaded["tasks"]["local_choice"].instances[0].args[0]
    assert context.count("[user]") == 2
    assert context.endswith("[assistant]")
    assert lm.tok_encode(context).count(1) == 1


def test_a_task_that_fixes_no_examples_keeps_none(task_folder, tmp_path):
    folder = task_with(tmp_path / "tasks", task_folder, num_fewshot=0)
    loaded = load_tasks(["broken"], folder, num_fewshot=3)
    assert loaded["tasks"]["broken"].get_config("num_fewshot") == 0
    with pytest.raises(InputError, match="no such folder"):
        load_tasks(["broken"], tmp_path / "other")

"""`sparsecast rerun`: each command that writes an output, once more, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import GraniteConfig, GraniteForCausalLM, LlamaConfig, LlamaForCausalLM

from sparsecast.cli import rerun as rerun_module
from sparsecast.cli.main import main
from sparsecast.cli.rerun import config_of
from sparsecast.core.run_record import read_run
from sparsecast.sparsify.train_tokenizer import train_tokenizer

Run = Callable[..., tuple[int, str]]
SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "hidden_act": "relu",
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
}
INPUTS = {
    "model": "--model model",
    "predictors": "--predictors pred",
    "acts": "--activations acts",
    "corpus": "--corpus corpus --seq-len 64",
}
COMMANDS = {
    "acts": "collect {model} {corpus} --out acts --tokens 600",
    "pred": "train {acts} --out pred --epochs 1 --rank 32 --predictor-dtype f16",
    "report": "report {predictors} {acts} --out report",
    "ev.json": "evaluate {model} {predictors} {corpus} --tokens 100 --json ev.json",
    "bundle": "export {model} {predictors} {acts} --out bundle --allow-other-tokens",
    "gguf": "export {model} --out gguf --format gguf --allow-other-tokens",
    "llama": "convert --model granite --to llama --out llama",
}
"""Output to the command that writes it, with relative paths."""
SPARSIFY = (
    "sparsify {model} {corpus} --out sparse --tokens 2048 --batch-tokens 512 --eval-tokens 200 "
    "--target-sparsity 0.6"
)


@pytest.fixture(scope="module")
def work(tmp_path_factory, corpus) -> Path:
    """A folder with two small models, a text, and the outputs of `COMMANDS`."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "corpus").mkdir()
    texts = [path.read_text()[:3_000] for path in sorted(corpus.iterdir())[:40]]
    for number, text in enumerate(texts):
        (folder / "corpus" / f"{number:02}.txt").write_text(text)
    for name, width in (("model", 1056), ("granite", 48)):
        (folder / name).mkdir()
        vocab = len(train_tokenizer(texts, 400, folder / name))
        sizes = SHAPE | {"intermediate_size": width, "vocab_size": vocab}
        torch.manual_seed(0)
        model = (
            LlamaForCausalLM(LlamaConfig(**sizes))
            if name == "model"
            else GraniteForCausalLM(GraniteConfig(**sizes, embedding_multiplier=2.0))
        )
        model.half().save_pretrained(folder / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in COMMANDS.values():
            assert main_exit(*command.format(**INPUTS).split()) == 0
    return folder


def main_exit(*words: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(word) for word in words])
    return int(caught.value.code or 0)


@pytest.fixture
def rerun(capsys) -> Run:
    def run(*words: object) -> tuple[int, str]:
        code = main_exit("rerun", *words)
        return code, capsys.readouterr().err

    return run


@pytest.fixture
def copied(work, tmp_path) -> Path:
    """The work folder as it is after it has been moved."""
    return Path(shutil.copytree(work, tmp_path / "moved"))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def lasting(folder: Path) -> dict[str, object]:
    """What the record of a run has in common with that of its repetition."""
    record = json.loads((folder / "run.json").read_text())
    return {key: record[key] for key in record.keys() - {"date", "seconds", "options"}}


def contents(folder: Path) -> dict[str, bytes]:
    """All but the logs, which state times, and the record itself."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "run.json" and "logs" not in path.parts
    }


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "ev.json"])
def test_the_same_again_from_another_folder(name, work, rerun, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, err = rerun(work / name, "--out", "again")
    assert code == 0, err
    assert contents(tmp_path / "again") == contents(work / name)
    assert ("the same as the recorded run's" in err) == (name in ("acts", "pred"))
    assert "may differ" not in err
    assert lasting(work / name) == lasting(tmp_path / "again")
    assert list(tmp_path.iterdir()) == [tmp_path / "again"]


@pytest.mark.slow
def test_the_same_weights_of_a_sparse_model(copied, rerun, tmp_path, monkeypatch):
    monkeypatch.chdir(copied)
    assert main_exit(*SPARSIFY.format(**INPUTS).split()) == 0
    code, err = rerun("sparse", "--out", tmp_path / "again")
    assert code == 0, err
    made, again = ((f / "model.safetensors") for f in (copied / "sparse", tmp_path / "again"))
    assert again.read_bytes() == made.read_bytes()


def test_the_same_evaluation(work, rerun, tmp_path):
    code, err = rerun(work / "ev.json", "--out", tmp_path / "again.json")
    assert code == 0, err
    made, again = (json.loads(p.read_text()) for p in (work / "ev.json", tmp_path / "again.json"))
    assert made.pop("run")["inputs"] == again.pop("run")["inputs"]
    assert made == again


@pytest.mark.slow
def test_two_processes_repeat_what_one_did_and_tell_a_refusal_once(copied, work, ranks_forked):
    for changed in (False, True):
        if changed:
            (copied / "corpus" / "00.txt").write_text("other")
            edit(copied / "acts" / "run.json", directory=str(copied))
        acts = (copied if changed else work) / "acts"
        words = ["rerun", str(acts), "--out", str(copied / f"again-{changed}")]
        processes = ranks_forked(2, words)
        errors = [process.communicate()[1] for process in processes]
        assert [process.returncode for process in processes] == [2 * changed] * 2, errors
        assert errors[1] == ""
        assert ("its inputs have changed" if changed else "processes was 1, now 2") in errors[0]
    assert contents(copied / "again-False") == contents(work / "acts")


def test_every_option_stands_in_the_record(work):
    record = json.loads((work / "pred" / "run.json").read_text())
    assert record["command"] == "train"
    assert record["directory"] == str(work)
    assert record["options"]["out"] == "pred"
    assert record["options"]["lr"] is None
    assert record["resolved"]["lr"] == 3e-3
    assert record["resolved"]["rank"] == [32, 32]
    assert record["seed"] == 0
    states = json.loads((work / "acts" / "manifest.json").read_text())["checksums"]
    assert record["inputs"] == {"activations": states["manifest.json"]}
    assert record["machine"]["threads"] == torch.get_num_threads()
    assert record["versions"]["torch"] == torch.__version__


def test_an_option_that_the_run_lacked_does_what_was_done_then(work):
    path = work / "pred"
    record = read_run(path)
    assert config_of(record, path, None).loss is None
    before = {name: value for name, value in record.options.items() if name != "loss"}
    assert config_of(replace(record, options=before), path, None).loss == "count"


def test_an_output_that_is_there_is_refused(work, rerun):
    code, err = rerun(work / "acts" / "run.json")
    assert (code, err) == (
        2,
        "sparsecast: acts: is there already, expected a new folder; give another --out, or move it "
        "away\n",
    )


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("acts", "text", "--corpus 'corpus'"),
        ("acts", "config", "--model (config) 'model'"),
        ("pred", "store", "--activations 'acts'"),
    ],
)
def test_changed_inputs_are_refused(name, change, told, copied, rerun):
    if change == "text":
        path = sorted((copied / "corpus").iterdir())[7]
        raw = path.read_bytes()
        path.write_bytes(raw[:-2] + b"!" + raw[-1:])
    elif change == "config":
        edit(copied / "model" / "config.json", rope_theta=70_000.0)
    else:
        path = copied / "acts" / "manifest.json"
        value = json.loads(path.read_text())
        edit(path, checksums=value["checksums"] | {"manifest.json": "0" * 32})
    edit(copied / name / "run.json", directory=str(copied))
    code, err = rerun(copied / name, "--out", copied / "again")
    assert code == 2
    assert err.count("\n") == 1
    assert f"its inputs have changed: {told}; restore" in err
    assert not (copied / "again").exists()


def test_what_else_has_changed_is_told(copied, rerun, monkeypatch):
    """Where the recorded output and its folder are gone, it is written again, here."""
    path = copied / "first" / "run.json"
    (copied / "acts").rename(path.parent)
    value = json.loads(path.read_text())
    machine = value["machine"] | {"cpu": "Abacus", "gpus": ["H200"], "processes": 2, "cores": 999}
    versions = value["versions"] | {"torch": "1.0"}
    edit(path, directory="/not/here", machine=machine, versions=versions, result="0" * 32)
    monkeypatch.chdir(copied)
    code, err = rerun("first")
    assert code == 0
    assert contents(copied / "acts") == contents(copied / "first")
    assert f"/not/here: is no more, so relative paths start in {copied}\n" in err
    lines = [line for line in err.splitlines() if "numbers may differ" in line]
    assert len(lines) == 2
    assert f"torch was 1.0, now {torch.__version__}" in lines[0]
    assert "cpu was Abacus, now " in lines[1]
    assert "gpus was ['H200'], now none" in lines[1]
    assert "processes was 2, now 1" in lines[1]
    assert "cores" not in lines[1]
    assert f"acts: differs from the recorded run's, whose checksum was {'0' * 32}" in err


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"command": "rerun"}, "its command is 'rerun', expected one of collect, train"),
        ({"command": "push"}, "its command is 'push', expected one of"),
        ({"command": "rm -rf /"}, "its command is 'rm -rf /', expected one of"),
        ({"options": {"tokens": 100}}, "--model is missing, expected all options"),
        ({"options": {"dry_run": True}}, "a dry run leaves no record"),
        ({"options": {"tokns": 100}}, "collect has no option 'tokns'; did you mean tokens?"),
        ({"options": {"__class__": "x"}}, "collect has no option '__class__'"),
        ({"options": {"tokens": None}}, "--tokens is null, expected a value"),
        ({"options": {"tokens": 10**30}}, "--tokens: must be at most"),
        ({"options": {"tokens": "many"}}, "--tokens: got 'many', expected a whole number"),
        ({"options": {"tokens": [1, [2]]}}, "--tokens: got [1, [2]], expected a whole number"),
        ({"options": {"model": {"a": 1}}}, "--model: got {'a': 1}, expected text"),
        ({"options": {"out": ""}}, "--out: got '', expected a path"),
    ],
)
def test_a_record_that_no_command_has_written_is_refused(changes, told, copied, rerun):
    path = copied / "acts" / "run.json"
    if "options" in changes and changes["options"] != {"tokens": 100}:
        options = json.loads(path.read_text())["options"]
        changes = {"options": options | changes["options"]}
    edit(path, **changes)
    code, err = rerun(path)
    assert code == 2
    assert err.count("\n") == 1
    assert str(path) in err
    assert told in err


def test_a_repeated_report_is_repeated_with_its_date(copied, rerun, monkeypatch):
    """The record of either states another day, and so does that of a run by SOURCE_DATE_EPOCH."""
    for made in ("report", "again"):
        edit(copied / made / "run.json", date="2031-05-06T00:00:00Z", directory=str(copied))
        code, err = rerun(copied / made, "--out", copied / ("again" if made == "report" else "yet"))
        assert code == 0, err
    assert contents(copied / "yet") == contents(copied / "report")


def test_a_record_cannot_write_to_the_terminal(copied, rerun):
    path = copied / "acts" / "run.json"
    versions = json.loads(path.read_text())["versions"] | {"torch": "\x1b[2J\nhidden"}
    edit(path, versions=versions, result="\x1b[2J", directory=str(copied))
    code, err = rerun(path, "--out", copied / "again")
    assert code == 0
    assert "torch was \\x1b[2J\\nhidden, now" in err
    assert "\x1b" not in err


def test_what_holds_no_record_is_refused(work, rerun, tmp_path):
    code, err = rerun(work / "corpus")
    assert code == 2
    assert "corpus: holds no run.json" in err
    for path in (tmp_path / "none", tmp_path / "link"):
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to("link")
        code, err = rerun(path)
        assert (code, err.count("\n")) == (2, 1)
        assert str(path) in err
    code, err = rerun(work / "acts" / "manifest.json")
    assert (code, err.count("\n")) == (2, 1)
    assert "manifest.json: names no command, expected the record of a run" in err


def test_it_has_the_threads_of_the_recorded_run(copied, rerun, tmp_path, monkeypatch):
    monkeypatch.setattr(rerun_module, "usable_cores", lambda: 64)
    before = torch.get_num_threads()
    path = copied / "report" / "run.json"
    machine = json.loads(path.read_text())["machine"] | {"threads": before + 1}
    edit(path, machine=machine)
    code, err = rerun(path, "--out", tmp_path / "again")
    assert code == 0, err
    assert (
        json.loads((tmp_path / "again" / "run.json").read_text())["machine"]["threads"]
        == before + 1
    )
    assert torch.get_num_threads() == before

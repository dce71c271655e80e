"""Code that comes with a model or a corpus never runs, and nobody is asked, in any command."""

from __future__ import annotations

import builtins
import json
import shutil
import sys
from pathlib import Path

import pytest

from sparsecast.cli.main import main

MAPS = {"AutoConfig": "conf.C", "AutoModelForCausalLM": "model.M", "AutoTokenizer": ["tok.T", None]}


class Untouched:
    """A standard input that may not be read."""

    def __getattr__(self, name: str):
        raise AssertionError(f"standard input was asked for its {name}")


@pytest.fixture
def planted(tmp_path, model_folder, corpus, monkeypatch) -> Path:
    """A folder with a model and a corpus, both with Python files that leave a mark when run."""
    code = f"open({str(tmp_path / 'ran')!r}, 'w').write('x')\n"
    model = Path(shutil.copytree(model_folder, tmp_path / "model"))
    text = Path(shutil.copytree(corpus, tmp_path / "text"))
    places = [model / name for name in ("conf.py", "model.py", "tok.py", "custom_generate.py")]
    for path in (*places, text / "text.py", text / "parquet.py", tmp_path / "parquet.py"):
        path.write_text(code)
    for name, fields in (
        ("config.json", {"model_type": "sparsellama", "auto_map": MAPS}),
        ("tokenizer_config.json", {"tokenizer_class": "T", "auto_map": MAPS}),
    ):
        raw = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps(raw | fields))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", Untouched())
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("somebody was asked"))
    return tmp_path


COMMANDS = [
    "inspect model --corpus text --tokens 300 --device cpu",
    "collect --model model --corpus text --out acts --tokens 900 --seq-len 64 --device cpu",
    "train --activations acts --model model --recipe svd --out predictors --rank 32 --device cpu",
    "report --activations acts --predictors predictors --out report",
    "evaluate --model model --predictors predictors --corpus text --tokens 64 --seq-len 32 "
    "--device cpu",
    "export --model model --predictors predictors --out bundle",
    "verify bundle --model model --corpus text --tokens 256 --max-perplexity-increase 100",
    "sparsify --model model --corpus text --out sparse --tokens 1024 --batch-tokens 512 "
    "--seq-len 64 --eval-tokens 128 --device cpu",
]


def test_no_command_runs_code_of_a_model_or_a_corpus(planted, capsys):
    for command in COMMANDS:
        with pytest.raises(SystemExit) as done:
            main(command.split())
        assert done.value.code in (0, None), (command, capsys.readouterr().err)
        assert not (planted / "ran").exists(), command


@pytest.mark.parametrize("command", [COMMANDS[0], COMMANDS[1], COMMANDS[-1]])
def test_a_model_of_its_own_code_alone_is_refused_in_one_line(command, planted, capsys):
    path = planted / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "riddle"}))
    with pytest.raises(SystemExit) as done:
        main(command.split())
    error = capsys.readouterr().err
    assert done.value.code == 2
    assert error.count("\n") == 1
    assert "model_type is 'riddle'" in error
    assert "(auto_map) is never run" in error
    assert not (planted / "ran").exists()

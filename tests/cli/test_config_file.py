"""`--config FILE.yaml`: the same options, the same words for what is wrong with them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sparsecast.cli.main import main
from sparsecast.cli.parser import parse
from sparsecast.cli.stages import STAGES, load

TEXT = """
model: m
corpus: c
out: o
seq-len: 64
batch_size: 4
layers: [2, 0]
energy: yes
activation-threshold: 1e-2
device_map: null
"""


def collect_config(*args: str) -> dict[str, object]:
    kind = load(STAGES["collect"].config)
    return vars(kind(**parse("collect", kind, None, args)))


def test_a_file_gives_what_the_command_line_does_not(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(TEXT)

    made = collect_config("--config", str(path), "--seq-len", "32", "--layers", "1")

    want = {"model": "m", "corpus": "c", "out": Path("o"), "seq_len": 32, "batch_size": 4}
    want |= {"layers": [1], "energy": True, "activation_threshold": 0.01, "device_map": None}
    assert made == made | want
    assert made["tokens"] == 400_000


def test_words_in_a_file_are_read_as_on_the_command_line(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("model: m\ncorpus: c\nout: ~/o\nlayers: 0,2\ntokens: '60'\nenergy: 'no'\n")

    made = collect_config("--config", str(path))

    assert made["out"] == Path.home() / "o"
    assert (made["layers"], made["tokens"], made["energy"]) == ([0, 2], 60, False)


def test_words_of_a_list_in_a_file_are_read_alike(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        "predictors: p\nactivations: a\nout: o\nagainst: [~/b, ./sign, sign]\nmodel: m\n"
    )
    kind = load(STAGES["report"].config)
    given = parse("report", kind, None, ["--config", str(path)])
    assert given["against"] == [Path.home() / "b", Path("sign"), "sign"]
    path.write_text("model: m\ncorpus: c\nout: o\nlayers: ['2', 0]\n")
    assert collect_config("--config", str(path))["layers"] == [0, 2]


def test_a_positional_may_stand_in_a_file(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("bundle: b\n")
    kind = load(STAGES["verify"].config)
    assert parse("verify", kind, "bundle", ["--config", str(path)]) == {"bundle": Path("b")}
    assert parse("verify", kind, "bundle", ["--config", str(path), "c"])["bundle"] == Path("c")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("tokns: 5", "c.yaml: no option is called 'tokns'; did you mean tokens?"),
        ("config: c.yaml", "c.yaml: no option is called 'config'"),
        ("1: 2", "c.yaml: no option is called 1"),
        ("tokens: many", "c.yaml: --tokens: got 'many', expected a whole number"),
        ("layers: [0, all]", "c.yaml: --layers: got 'all', expected a whole number"),
        ("layers: 0-2", "c.yaml: --layers: got '0-2', expected a whole number"),
        ("out: ~nobody-of-that-name/x", "c.yaml: --out: got '~nobody-of-that-name/x', but nobody"),
        (TEXT + "tokens: 2.5", "c.yaml: --tokens: got 2.5, expected a whole number"),
        (TEXT + "tokens: true", "--tokens: got True, expected a whole number"),
        (TEXT + "count-tokens: .nan", "--count-tokens: got nan, expected a whole number"),
        (TEXT + "activation-threshold: .inf", "--activation-threshold: got inf, expected a number"),
        (TEXT + "energy: 3", "--energy: got 3, expected true or false"),
        (TEXT + "dtype: [float32]", "--dtype: got ['float32'], expected auto, float32"),
        (TEXT + "out: 5", "--out: got 5, expected a path"),
        (TEXT + 'out: "a\\0b"', "--out: got 'a\\x00b', expected a path"),
        (TEXT + "layers: 5", "--layers: got 5, expected a list"),
        (TEXT + "layers: []", "--layers: is empty"),
        (TEXT + "layers: {0: 1}", "--layers: got {0: 1}, expected a list"),
        (TEXT + "device: 2020-01-01", "--device: got datetime.date(2020, 1, 1), expected text"),
        ("model: m", "collect: needs --corpus, --out"),
        ("", "c.yaml: holds None, expected YAML with one option a line"),
        ("- a\n- b", "c.yaml: holds ['a', 'b'], expected YAML"),
        ("a: [1", "c.yaml: is not YAML (while parsing"),
        ("[" * 2000, "c.yaml: is not YAML (nested too deeply)"),
        ("a: !!python/object/apply:os.system [id]", "c.yaml: is not YAML (could not determine"),
        ("a: \x01", "c.yaml: is not YAML (unacceptable character"),
        ("? [a, b]\n: 1", "c.yaml: is not YAML"),
    ],
)
def test_what_is_wrong_with_a_file(text, match, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(text)

    with pytest.raises(SystemExit) as exit_info:
        main(["collect", "--config", "c.yaml"])

    error = capsys.readouterr().err
    assert exit_info.value.code == 2
    assert match in error
    assert error.count("\n") == 1
    assert list(Path().iterdir()) == [Path("c.yaml")]


def test_a_file_that_is_none(tmp_path, capsys):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00\xd8")
    for name, match in (
        ("fifo", "fifo: is a FIFO"),
        ("none", "none: no such file"),
        ("bytes", "bytes: is not YAML"),
    ):
        with pytest.raises(SystemExit) as exit_info:
            main(["collect", "--config", str(tmp_path / name)])
        assert exit_info.value.code == 2
        error = capsys.readouterr().err
        assert match in error
        assert error.count(str(tmp_path / name)) == 1

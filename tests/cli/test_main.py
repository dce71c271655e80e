"""The console script: exit codes, one line per error, and help that costs no torch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from sparsecast.cli.main import main
from sparsecast.cli.parser import parse
from sparsecast.cli.stages import STAGES, load
from sparsecast.core.models.location import TINY_PROSPARSE
from sparsecast.predictors.checkpoint import PredictorSet
from sparsecast.predictors.predictor import Predictor

PACKAGES = "sorted({name.partition('.')[0] for name in sys.modules} - sys.stdlib_module_names)"


@pytest.mark.parametrize("args", [["--help"], ["bench", "--help"], ["--version"]])
def test_help_imports_no_other_package(args):
    """So it takes a tenth of a second; torch alone takes two."""
    code = f"import sys; before = {PACKAGES}; from sparsecast.cli.main import main; main({args}); "
    code += f"print([name for name in {PACKAGES} if name not in before], file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "['sparsecast']"


def test_help_lists_every_stage(capsys):
    main(["--help"])
    out = capsys.readouterr().out
    for name, stage in STAGES.items():
        assert f"  {name} " in out
        assert stage.help in out


@pytest.mark.parametrize("args", [["--help"], ["bench", "--help"], ["bench", "-h"]])
def test_benchmarks_are_among_the_stages(args, capsys):
    main(args)
    assert "bench kernels" in capsys.readouterr().out


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_documents_its_options_with_dashes(stage, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main([stage, "--help"])

    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    options = [word.strip(",[]") for word in text.split() if word.strip(",[]").startswith("--")]
    assert options
    assert [option for option in options if "_" in option] == []
    assert [word for word in ("class", "Optional", "typing", "null") if word in text] == []
    assert "--config FILE.yaml" in text


COLLECT = ["collect", "--model", str(TINY_PROSPARSE), "--corpus", "builtin", "--out", "o"]


@pytest.mark.parametrize(
    ("args", "want"),
    [
        (["--energy"], {"energy": True}),
        (["--energy", "--layers", "1"], {"energy": True, "layers": [1]}),
        (["--layers", "0,2", "--energy", "false"], {"energy": False, "layers": [0, 2]}),
        (["--layers", "[0, 2]"], {"layers": [0, 2]}),
        (["--out=~/acts"], {"out": Path.home() / "acts"}),
        (["--layers=0,2", "--energy=true"], {"layers": [0, 2], "energy": True}),
        (["--layers", "2", "0"], {"layers": [0, 2]}),
        (["--energy", "yes", "--tokens", "60"], {"energy": True, "tokens": 60}),
        (["--corpus", "-"], {"corpus": "-"}),
    ],
)
def test_options_as_people_type_them(args, want):
    stage = STAGES["collect"]
    kind = load(stage.config)
    config = kind(**parse("collect", kind, None, [*COLLECT[1:], *args]))
    assert want.items() <= vars(config).items()


REPORT = ["--predictors", "p", "--activations", "a", "--out", "o"]


@pytest.mark.parametrize(
    ("args", "want"),
    [
        (["--against", "../x/p-1", "q 2"], ["../x/p-1", "q 2"]),
        (["--against", "/x/p.1,q"], ["/x/p.1", "q"]),
        (["--against=a/p,b/é"], ["a/p", "b/é"]),
        (["--against", "a/p", "--json", "s.json"], ["a/p"]),
        (["--against", '["a/p,q"]'], ["a/p,q"]),
        (["--against", "a,", "~/b"], ["a", str(Path.home() / "b")]),
    ],
)
def test_several_folders_as_people_type_them(args, want):
    config = load(STAGES["report"].config)
    for line in ([*REPORT, *args], [*args, *REPORT]):
        made = config(**parse("report", config, None, line))
        assert made.against == [Path(path) for path in want]
        assert made.predictors == Path("p")
        assert made.json == (Path("s.json") if "--json" in args else None)


@pytest.mark.parametrize(
    ("args", "match"),
    [
        ([], "no stage given"),
        (["fly"], "no stage is called 'fly'; expected one of demo, collect"),
        (["tarin"], "no stage is called 'tarin'; did you mean train?"),
        (["bench", "kernel"], "no stage is called 'bench kernel'; did you mean bench kernels?"),
        (["bench"], "no stage is called 'bench'; expected one of bench collect, bench train"),
        (["--hlep"], "no stage is called '--hlep'; did you mean --help?"),
        (["collect"], "collect: needs --model, --corpus, --out;"),
        (
            ["collect", "--model", "m", "--corpus", "c", "--out", "o", "--tokens", "x"],
            "--tokens: got 'x', expected a whole number",
        ),
        (["collect", "--model", "m", "--corpus", "c", "--out", "o", "--tokens", "1"], "--tokens"),
        (
            ["collect", "--model", "m", "--corpus", "c", "--out", "o", "--wings", "2"],
            "called --wings;",
        ),
        (["rerun", "--run=x"], "--run is no option: give RUN without it"),
        ([*COLLECT, "--modle=x"], "no option is called --modle; did you mean --model?"),
        ([*COLLECT, "--seq_len", "9"], "no option is called --seq_len; did you mean --seq-len?"),
        ([*COLLECT, "--seq", "9"], "no option is called --seq;"),
        ([*COLLECT, "acts"], "collect: 'acts' belongs to no option;"),
        ([*COLLECT, "--layers", ""], "--layers: is empty; name one, or leave it out"),
        ([*COLLECT, "--layers", "-1"], "--layers: must be at least 0, got -1"),
        ([*COLLECT, "--layers", "[" * 5000], "--layers: got '[[["),
        ([*COLLECT, "--tokens", "9" * 5000], "--tokens: got '999"),
        ([*COLLECT, "--tokens", "9" * 40], "--tokens: must be at most 1,000,000,000,000,000, got"),
        ([*COLLECT, "--out", ""], "--out: got '', expected a path"),
        ([*COLLECT, "--out", "~nobody-of-that-name/x"], "nobody of that name has a home"),
        ([*COLLECT, "--dtype", "f16"], "--dtype: got 'f16', expected auto, float32, float16"),
        ([*COLLECT, "--layers", "1:8"], "--layers: got '1:8', expected a whole number"),
        ([*COLLECT, "--layers", "0-2"], "--layers: got '0-2', expected a whole number"),
        ([*COLLECT, "--layers=all"], "--layers: got 'all', expected a whole number"),
        ([*COLLECT, "--activation-threshold", "nan"], "-threshold: got nan, expected a number"),
        (["bench", "collect", "--corpus", "x.txt"], "--corpus: is read for --model alone"),
        ([*COLLECT, "--device", "meta"], "--device: got 'meta', expected auto, cpu, cuda"),
        ([*COLLECT, "--device-map", "nope"], "--device-map: got 'nope', expected auto, balanced"),
        ([*COLLECT, "--energy", "maybe"], "energy"),
        (["train", "--activations", "nowhere", "--out", "o"], "manifest.json: no such file"),
        (["verify", "nowhere"], "nowhere"),
        (["verify"], "verify: needs BUNDLE;"),
        (["report", *REPORT, "--against", ","], "--against: is empty; name one, or leave it out"),
        (["report", *REPORT, "--against"], "--against"),
    ],
)
def test_what_the_user_must_change_exits_with_2_and_one_line(args, match, capsys, tmp_path):
    with pytest.raises(SystemExit) as exit_info:
        main(args)

    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert match in error
    assert error.startswith("sparsecast")
    assert error.count("\n") == 1


def test_a_failure_exits_with_1_and_no_traceback(monkeypatch, capsys, tmp_path, acts):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sparsecast.predictors.train.train", full)
    with pytest.raises(SystemExit) as exit_info:
        main(["train", "--activations", str(acts.folder), "--out", str(tmp_path / "p")])

    assert exit_info.value.code == 1
    assert capsys.readouterr().err == (
        "sparsecast: train failed: [Errno 28] No space left on device\n"
    )
    assert not (tmp_path / "p").exists()


@pytest.mark.slow
def test_an_interrupt_before_the_first_shard_leaves_nothing(
    model_folder, tmp_path, sparsecast_forked
):
    args = ["collect", "--model", str(model_folder), "--corpus", "builtin"]
    args += ["--out", str(tmp_path / "acts"), "--tokens", "50000000", "--seq-len", "128"]
    process = sparsecast_forked(args)
    part = tmp_path / ".acts.part"
    deadline = time.monotonic() + 60
    while not part.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)

    process.send_signal(2)
    _, error = process.communicate(timeout=20)

    assert process.returncode == 130
    assert "Traceback" not in error
    assert "acts: interrupted; no shard was finished yet, nothing is left behind" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_signal_leaves_no_part_of_a_bundle(number, tmp_path, sparsecast_forked):
    code = f"""
import sparsecast.export.run as run
def write(*args, **options):
    os.kill(os.getpid(), {int(number)})
run.write_model = write
"""
    args = ["--model", str(TINY_PROSPARSE), "--predictors", str(tmp_path / "pred")]
    _predictors().save(tmp_path / "pred")

    done = sparsecast_forked(["export", *args, "--out", str(tmp_path / "b")], code)
    _, error = done.communicate()

    assert done.returncode == 128 + number
    assert "interrupted; nothing half-written is left behind" in error
    assert [path.name for path in tmp_path.iterdir()] == ["pred"]


def _predictors() -> PredictorSet:
    """Random predictors with the shapes of the model that ships with the package."""
    config = json.loads((TINY_PROSPARSE / "config.json").read_text())
    d, f = config["hidden_size"], config["intermediate_size"]
    one = Predictor(torch.randn(8, d), torch.randn(f, 8), "f16")
    return PredictorSet([one] * config["num_hidden_layers"], 0.0, None)


def test_the_installed_model_says_what_it_is():
    config = json.loads((TINY_PROSPARSE / "config.json").read_text())
    assert config["hidden_act"] == "fatrelu"
    assert config["hidden_act_param"] == 0.0741
    assert sum(path.stat().st_size for path in TINY_PROSPARSE.iterdir()) <= 16_000_000


@pytest.fixture
def usual_handlers():
    """Those that Python begins with; a test before may have left others."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield usual
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_that_a_library_makes_another_error_is_told_as_one(
    number, usual_handlers, monkeypatch, capsys, tmp_path
):
    """torch's C code does so with one that comes while it reads an object's type."""

    def swallow(config):
        try:
            os.kill(os.getpid(), number)
            time.sleep(10)
        except KeyboardInterrupt:
            pass
        raise TypeError("could not determine the shape of object type")

    monkeypatch.setattr("sparsecast.export.inspect.inspect", swallow)

    with pytest.raises(SystemExit) as info:
        main(["inspect", str(tmp_path)])

    assert info.value.code == 128 + number
    told = capsys.readouterr().err
    assert told.startswith("sparsecast: interrupted")
    assert told.count("\n") == 1
    assert {n: signal.getsignal(n) for n in usual_handlers} == usual_handlers


@pytest.mark.usefixtures("usual_handlers")
def test_an_error_after_an_earlier_interrupt_is_told(monkeypatch, capsys, tmp_path):
    def interrupted(config):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)

    def broken(config):
        raise TypeError("broken")

    for function, code in ((interrupted, 130), (broken, 1)):
        monkeypatch.setattr("sparsecast.export.inspect.inspect", function)
        with pytest.raises(SystemExit) as info:
            main(["inspect", str(tmp_path)])
        assert info.value.code == code
    assert "inspect failed: broken" in capsys.readouterr().err

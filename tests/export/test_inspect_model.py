"""What `sparsecast inspect MODEL` says of a model, and what it makes of those it cannot use."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from sparsecast.cli.main import main
from sparsecast.collect.inspect import InspectConfig
from sparsecast.core.errors import InputError
from sparsecast.core.models.location import TINY_PROSPARSE
from sparsecast.export.inspect import inspect
from tests.tools.mixtures import write_mixture


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def looked(tmp_path, capsys, corpus):
    """Inspect a model: (name, options) to its values as written to a file, and the words shown."""

    def run(model: str | Path, **options: object) -> tuple[dict, str]:
        capsys.readouterr()
        file = tmp_path / "i.json"
        options = {"corpus": str(corpus), "tokens": 400, "device": "cpu", **options}
        result = inspect(InspectConfig(path=model, json=file, **options))
        values = json.loads(file.read_text())
        assert values == result.values
        return values, " ".join(capsys.readouterr().err.split())

    return run


@pytest.fixture
def changed(tmp_path, model_folder):
    """A copy of a model with changed fields of its config."""

    def make(source: Path = model_folder, **fields: object) -> Path:
        folder = Path(shutil.copytree(source, tmp_path / "changed"))
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))
        return folder

    return make


def test_a_model_without_its_threshold(looked, changed):
    folder = changed(TINY_PROSPARSE, hidden_act="relu", hidden_act_param=None)
    values, text = looked(folder)

    assert (values["kind"], values["family"], values["dtype"]) == ("checkpoint", "llama", "float16")
    sizes = {"layers": 6, "hidden_size": 256, "ffn_width": 1024, "ffn_matrices": 3}
    assert values["shape"] == sizes
    assert values["parameters"] == 6_753_536
    assert values["tokenizer"]["size"] == 2048
    assert values["tokenizer"]["bos"] == "<s>"
    assert set(values["stages"].values()) == {None}
    assert values["powerinfer"]["architecture"] == "llama"
    check = values["check"]
    assert check["verdict"] == "threshold"
    assert check["best"].startswith("fatrelu(0.0")
    assert len(check["zeros"]) == 6
    assert all(0.7 < share < 0.9 for share in check["zeros"])
    assert {row["activation"] for row in check["activations"]} >= {"relu", "silu", "fatrelu(0.01)"}
    assert check["activations"][0] == {
        "activation": "relu",
        "perplexity": pytest.approx(4, abs=3),
        "zeros": pytest.approx(sum(check["zeros"]) / 6),
        "difference": 0.0,
        "error": 0.0,
    }
    assert "config says relu; fatrelu(0.0" in text


def test_a_model_with_silu_in_its_config_gets_as_far_as_it_can(looked, changed):
    folder = changed(TINY_PROSPARSE, hidden_act="silu", hidden_act_param=None)
    values, text = looked(folder)

    assert values["stages"]["sparsify"] is None
    for stage in ("collect", "train", "report", "evaluate", "sparsify_model", "export"):
        assert "`sparsecast sparsify` turns such a model" in values["stages"][stage]
    assert values["check"]["verdict"] == "wrong"
    assert values["check"]["best"] == "relu"
    assert values["check"]["zeros"] == pytest.approx([0] * 6, abs=1e-5)
    assert "config says silu; relu fits better: perplexity" in text


def test_a_random_model_raises_no_alarm(looked, changed):
    values, text = looked(changed(hidden_act="silu"))
    assert (values["check"]["verdict"], values["check"]["best"]) == ("unknown", None)
    assert "fits better" not in text


def test_without_the_check_no_weights_are_loaded(looked, changed, monkeypatch):
    monkeypatch.setattr("sparsecast.export.inspect_model.build_model", None)
    values, text = looked("tiny-prosparse", check=False)
    assert values["check"] is None
    assert "truth check: left out by --check false" in text
    assert values["activation"] == {
        "name": "fatrelu",
        "threshold": 0.0741,
        "source": "hidden_act in config.json",
    }


def test_what_the_engine_lacks_is_the_reason_of_export_alone(looked, changed):
    folder = changed(rope_parameters={"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4})
    values, _ = looked(folder, check=False)
    assert "rope type is 'yarn'" in values["stages"]["export"]
    assert values["powerinfer"]["architecture"] is None
    assert values["stages"]["collect"] is None


@pytest.mark.parametrize("lost", ["model.*", "tokenizer.*"])
def test_missing_files_are_the_reason_why_nothing_works(lost, looked, changed):
    folder = changed()
    for path in folder.glob(lost):
        path.unlink()
    values, text = looked(folder)
    assert values["check"] is None
    assert values["stages"]["collect"] is not None
    assert values["stages"]["collect"] in (values["weights"], values["tokenizer"]["reason"])
    assert (values["stages"]["sparsify_model"] is None) == (lost == "tokenizer.*")
    assert values["shape"]["layers"] == 3
    assert "no: " in text


def test_a_config_that_nothing_bounds_is_not_built(looked, changed):
    folder = changed(num_hidden_layers=10**9)
    values, _ = looked(folder)
    assert values["shape"] is None
    assert "describes 1,000,000,000 layers" in values["weights"]


@pytest.mark.parametrize("fields", [{}, {"model_type": None, "architectures": None}])
def test_an_unknown_family_gets_one_line_and_exit_code_2(fields, changed, capsys):
    folder = changed(**({"model_type": "riddle", "auto_map": {"AutoConfig": "c.C"}} | fields))
    with pytest.raises(SystemExit) as done:
        main(["inspect", str(folder)])
    error = capsys.readouterr().err
    assert done.value.code == 2
    assert error.count("\n") == 1
    assert "model_type is" in error


def test_a_name_that_is_no_path_is_looked_for_on_the_hub(monkeypatch):
    asked: set[str] = set()

    def answer(_: object, repo: str, **options: object) -> None:
        asked.add(repo)
        raise ConnectionError("no route")

    monkeypatch.setattr("sparsecast.core.hub.HfApi.model_info", answer)
    with pytest.raises(InputError, match=r"owner/name: neither a local folder.*\(no route\)"):
        inspect(InspectConfig(path=Path("owner/name")))
    assert asked == {"owner/name"}


def test_stages_that_refuse_a_model_are_not_promised(looked, changed, tmp_path, model_folder):
    """What sparsify and sparsify_model say themselves: see their own tests."""
    stages = looked(changed(hidden_act="relu2"), check=False)[0]["stages"]
    assert "sparse already" in stages["sparsify"]
    assert (stages["collect"], stages["sparsify_model"]) == (None, None)
    shutil.rmtree(tmp_path / "changed")
    values, _ = looked(changed(hidden_act="fatrelu", hidden_act_param=None))
    assert "hidden_act_param" in values["stages"]["sparsify"]

    values, text = looked(write_mixture(tmp_path / "m", "mixtral", model_folder), check=False)
    assert values["stages"]["collect"] is None
    for stage in ("sparsify", "sparsify_model", "export"):
        assert "is a mixture of experts" in values["stages"][stage]
    assert (values["shape"]["experts"], values["shape"]["experts_per_token"]) == (4, 2)
    assert "4 experts, 2 per token" in text


@pytest.mark.parametrize(
    ("fields", "reason"),
    [({"max_position_embeddings": 1}, "below 8"), ({"hidden_act": "xielu"}, "alpha_n is missing")],
)
def test_a_model_that_cannot_be_checked_is_described_all_the_same(fields, reason, looked, changed):
    values, _ = looked(changed(**fields))
    assert values["check"] is None
    assert reason in values["not_checked"]
    assert values["shape"]["layers"] == 3


def test_a_long_activation_name_is_cut(looked, changed):
    values, _ = looked(changed(hidden_act="silu\n" * 1000), check=False)
    assert max(len(reason) for reason in values["stages"].values()) < 700

"""Predictors and bundles by name: what is downloaded, from which revision, and when there is no
network."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_stand_in import TOKEN
from huggingface_hub.utils import close_session

from sparsecast.cli.main import main
from sparsecast.core.errors import InputError
from sparsecast.core.hub import hub_name, is_path, kind_of, local_folder
from sparsecast.core.models.loading import load_model
from sparsecast.core.models.location import resolve_model
from sparsecast.export.bundle import bundle_file
from sparsecast.export.config import VerifyConfig
from sparsecast.export.verify import verify
from sparsecast.kernels.in_models.sparsify import sparsify_model
from sparsecast.predictors.checkpoint import load_predictors


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def unplugged(monkeypatch):
    """Take the network away: without an answer, or by HF_HUB_OFFLINE."""

    def pull(*, offline: bool = False) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{port}")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
        close_session()  # the client asks for offline mode when it is made

    yield pull
    close_session()


def test_predictors_are_read_by_name_and_nothing_else_is_downloaded(hub, made, tmp_path):
    others = {"evil.py": b"import os", "pytorch_model.bin": b"x" * 9, "big.gguf": b"y" * 9}
    hub.add("them/p", files_of(made / "predictors") | others)

    back = load_predictors("them/p")
    here = load_predictors(made / "predictors")
    for a, b in zip(back.layers, here.layers, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.weights, b.weights, strict=True))
    cached = {path.name for path in (tmp_path / "cache").rglob("snapshots/*/*")}
    assert cached == {"config.json", "manifest.json", *(f"model_{i}.pt" for i in range(3))}


def test_predictors_of_powerinfer_without_a_manifest_are_read_too(hub, made):
    files = files_of(made / "predictors")
    hub.add("them/p", {name: data for name, data in files.items() if name.endswith(".pt")})
    assert load_predictors("them/p").manifest is None


def test_what_is_missing_is_named_in_plain_words(hub):
    with pytest.raises(InputError, match="them/none: neither a local folder nor a bundle that"):
        bundle_file(Path("them/none"))
    hub.add("them/m", {"notes.txt": b""})
    with pytest.raises(InputError, match="holds no predictors or bundle"):
        local_folder("them/m", "predictors", "bundle")


def test_a_revision_is_a_branch_or_a_commit(hub, made):
    repo = hub.add("them/p", files_of(made / "predictors"))
    first = repo.branches["main"][-1].oid
    config = {**repo.files, "config.json": b'{"sparse_threshold": 0.5}'}
    del config["manifest.json"]
    repo.commit("other/one", config)
    repo.commit("main", {"README.md": b""})
    assert load_predictors("them/p@other/one").threshold == 0.5
    assert load_predictors(f"them/p@{first}").threshold == 0.0
    with pytest.raises(InputError, match="them/p@none: neither a local folder nor predictors"):
        load_predictors("them/p@none")
    with pytest.raises(InputError, match="holds no predictors"):
        load_predictors("them/p")


def test_a_local_folder_of_that_name_wins(hub, made, tmp_path, monkeypatch):
    hub.add("them/p", {"model_0.pt": b"no predictor"})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "them").mkdir()
    (tmp_path / "them/p").symlink_to(made / "predictors")
    assert load_predictors("them/p").layer_count == 3
    assert hub.requests == []


@pytest.mark.parametrize("offline", [False, True])
def test_without_a_network_the_copy_in_the_cache_is_used(offline, hub, made, unplugged, capfd):
    files = files_of(made / "predictors") | {"README.md": b"not downloaded"}
    hub.add("them/p", files)
    hub.add("them/m", files_of(made / "model"))
    load_predictors("them/p")
    model = resolve_model("them/m")
    capfd.readouterr()

    unplugged(offline=offline)
    assert load_predictors("them/p").layer_count == 3
    assert resolve_model("them/m") == model
    said = capfd.readouterr().err
    assert ("them/p: the hub does not answer" in " ".join(said.split())) is not offline
    with pytest.raises(InputError, match="them/none: neither a local folder nor predictors"):
        load_predictors("them/none")
    with pytest.raises(InputError, match="them/p@v2: neither a local folder nor predictors"):
        load_predictors("them/p@v2")


def test_a_copy_that_was_interrupted_is_not_used(hub, made, unplugged, tmp_path):
    hub.add("them/p", files_of(made / "predictors"))
    hub.refuse = {"HEAD /them/p/resolve": 500, "GET /them/p/resolve": 500}
    with pytest.raises(InputError):
        load_predictors("them/p")
    hub.refuse = {}
    unplugged()
    with pytest.raises(InputError, match="them/p: neither a local folder nor predictors"):
        load_predictors("them/p")


def test_a_hub_that_fails_for_a_while_does_not_hide_the_cache(hub, made):
    hub.add("them/p", files_of(made / "predictors"))
    load_predictors("them/p")
    hub.refuse = {"GET /api/models/them/p": 503}
    assert load_predictors("them/p").layer_count == 3


def test_verify_and_inspect_take_a_bundle_by_name(hub, copy_of, pushed, model_folder, capfd):
    folder = copy_of("bundle")
    pushed(folder)
    there, here = (
        verify(VerifyConfig(bundle=bundle, model=str(model_folder), tokens=256)).checks
        for bundle in (Path("me/bundle"), folder)
    )
    assert [(check.name, check.ok) for check in there] == [(check.name, check.ok) for check in here]
    # random predictors do not keep their word
    assert {check.name for check in there if not check.ok} == {"decisions"}
    with pytest.raises(SystemExit) as done:
        main(["inspect", "me/bundle"])
    assert done.value.code == 0
    assert ".powerinfer.gguf" in "".join(capfd.readouterr())


def test_inspect_takes_every_kind_by_name(hub, copy_of, pushed, tmp_path):
    for kind in ("predictors", "activations", "model"):
        pushed(copy_of(kind))
        out = tmp_path / f"{kind}.json"
        with pytest.raises(SystemExit) as done:
            main(["inspect", f"me/{kind}", "--check", "false", "--json", str(out)])
        assert done.value.code == 0, kind
        assert json.loads(out.read_text())


@pytest.mark.slow
def test_evaluate_and_report_take_predictors_by_name(hub, made, acts, model_folder, tmp_path):
    hub.add("them/p", files_of(made / "predictors"))
    args = ["--predictors", "them/p", "--json", str(tmp_path / "out.json")]
    common = ["--model", str(model_folder), "--tokens", "300", "--seq-len", "128"]
    results = {}
    for name in ("them/p", str(made / "predictors")):
        args[1] = name
        with pytest.raises(SystemExit) as done:
            main(["evaluate", *args, *common])
        assert done.value.code == 0
        results[name] = json.loads((tmp_path / "out.json").read_text())
        out = str(tmp_path / Path(name).name)
        with pytest.raises(SystemExit) as done:
            main(["report", *args, "--activations", str(acts.folder), "--out", out])
        assert done.value.code == 0
        results[name]["mean"] = json.loads((tmp_path / "out.json").read_text())["mean"]
    assert results["them/p"] == results[str(made / "predictors")]


def test_sparsify_model_takes_predictors_and_bundles_by_name(hub, made, model_folder):
    hub.add("them/p", files_of(made / "predictors"))
    hub.add("them/b", files_of(made / "bundle"))
    ids = torch.arange(5, 25)[None]
    for name, folder in (("them/p", "predictors"), ("them/b", "bundle")):
        logits = []
        for source in (name, made / folder):
            model, _ = load_model(str(model_folder), device="cpu", dtype="float32")
            sparsify_model(model, source, policy="predicted")
            with torch.no_grad():
                logits.append(model(ids).logits)
        assert torch.equal(*logits)


def test_damaged_predictors_on_the_hub_are_refused(hub, made):
    files = files_of(made / "predictors")
    hub.add("them/p", files | {"model_1.pt": files["model_0.pt"]})
    with pytest.raises(InputError, match="is not the file that was trained"):
        load_predictors("them/p")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a/b", ("a/b", None)),
        ("a/b@main", ("a/b", "main")),
        ("a/b@refs/pr/1", ("a/b", "refs/pr/1")),
        ("a/b@", None),
        ("a", None),
        ("./a", None),
        ("/a/b", None),
        ("~a/b", None),
        ("a/b/c", None),
        ("a/.b", None),
        ("", None),
        ("a\\b/c", None),
    ],
)
def test_which_names_are_hub_ids(source, expected):
    assert hub_name(source) == expected
    assert is_path(source) is (expected is None)


def test_kinds_by_their_files():
    assert kind_of(["README.md", "model_0.pt", "config.json"]) == "predictors"
    assert kind_of(["m.powerinfer.gguf", "predictor/model_0.pt"]) == "bundle"
    assert kind_of(["stats.safetensors", "manifest.json"]) == "activations"
    assert kind_of(["config.json", "model.safetensors", "old/model_0.pt"]) is None


@pytest.mark.slow
def test_the_command_line_with_hf_endpoint_alone(hub, made, tmp_path):
    """In a process of its own, where huggingface_hub reads its settings itself."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "OMP_NUM_THREADS": "1",
    }
    for command in (
        ["push", str(made / "predictors"), "--repo", "cli", "--base-model", "someone/base"],
        ["inspect", "me/cli"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "sparsecast", *command],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    assert "someone/base" in done.stdout + done.stderr
    assert "model_2.pt" in hub.repos["me/cli"].files

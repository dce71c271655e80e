"""Folders that are not whole or hold secrets, repositories that hold something else, a Hub that
refuses or breaks off: one line, and nothing half-pushed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
from pathlib import Path

import pytest
from hub_stand_in import READ_TOKEN, TOKEN

from sparsecast.cli.main import main
from sparsecast.core.errors import InputError
from sparsecast.integrations.hub.config import PushConfig

KINDS = ("predictors", "activations", "bundle", "model")


def told(folder: Path, capfd, *options: str) -> tuple[int, str]:
    """Exit code and last line of `sparsecast push`."""
    with pytest.raises(SystemExit) as done:
        main(["push", str(folder), "--repo", "me/x", *options])
    error = capfd.readouterr().err
    assert "Traceback" not in error
    return done.value.code, error.strip().splitlines()[-1]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES = {
    "predictors": [("model_1.pt", flip), ("model_2.pt", os.remove), ("manifest.json", half)],
    "activations": [("stats.safetensors", flip), ("manifest.json", half)],
    "bundle": [
        ("*.gguf", half),
        ("predictor/model_0.pt", flip),
        ("predictor", shutil.rmtree),
        ("activation/activation_1.pt", os.remove),
        ("activation/activation_1.pt", half),
    ],
    "model": [("model.safetensors", half), ("tokenizer.*", os.remove), ("config.json", half)],
}


@pytest.mark.parametrize(
    ("kind", "name", "damage"),
    [(kind, *case) for kind, cases in DAMAGES.items() for case in cases],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_damaged_folder_is_refused_before_the_hub_is_asked(
    kind, name, damage, hub, copy_of, capfd
):
    folder = copy_of(kind)
    for path in sorted(folder.glob(name)):
        damage(path)
    code, line = told(folder, capfd)
    assert code == 2
    assert hub.requests == []
    assert line


def test_foreign_and_unfinished_folders_are_refused(hub, copy_of, made, tmp_path, capfd):
    empty = tmp_path / "empty"
    empty.mkdir()
    model = copy_of("model")
    (model / "sparsify.json").unlink()
    bare = copy_of("predictors")
    (bare / "manifest.json").unlink()
    part = Path(shutil.copytree(made / "predictors", tmp_path / ".p.part"))
    store = copy_of("activations")
    value = json.loads((store / "manifest.json").read_text())
    (store / "manifest.json").write_text(json.dumps(value | {"shard_tokens": {}, "checksums": {}}))
    for folder, reason in {
        empty: "holds nothing that sparsecast writes",
        tmp_path / "none": "no such file",
        bare / "config.json": "is a file, expected a folder",
        model: "neither `sparsecast sparsify` nor `convert` wrote",
        bare: "holds predictors without a manifest.json",
        part: "is unfinished work",
        store: "",
    }.items():
        code, line = told(folder, capfd)
        assert (code, reason in line) == (2, True), line
    assert hub.requests == []


def test_what_is_no_part_of_the_folder_stays_here(hub, copy_of, pushed):
    folder = copy_of("predictors")
    secrets = [".env", ".git/config", "logs/metrics.csv", "id_rsa", "token", "notes.txt", "x.py"]
    secrets += ["model_0.pt.bak", ".model_0.pt.part", "sub/model_0.pt", "a b.pt"]
    for name in secrets:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("secret")
    pushed(folder)
    files = hub.repos["me/predictors"].files
    assert set(files) == {
        ".gitattributes",
        "README.md",
        "config.json",
        "manifest.json",
        *(f"model_{i}.pt" for i in range(3)),
    }
    assert not any(b"secret" in data for data in files.values())


@pytest.mark.parametrize("name", ["model_1.pt", "README.md", "predictor", "LICENSE"])
def test_a_link_is_not_followed(name, hub, copy_of, tmp_path, capfd):
    folder = copy_of("bundle" if name == "predictor" else "predictors")
    target = tmp_path / "elsewhere"
    if (folder / name).exists():
        shutil.move(folder / name, target)
    else:
        target.write_text("secret")
    (folder / name).symlink_to(target)
    code, line = told(folder, capfd)
    assert (code, "is a link, expected a file" in line) == (2, True)
    assert hub.requests == []


def test_names_that_the_hub_does_not_take_are_refused(hub, copy_of, capfd):
    folder = copy_of("bundle")
    (gguf,) = folder.glob("*.gguf")
    for name in ("a\nb.powerinfer.gguf", "a\\b.powerinfer.gguf"):
        gguf = gguf.rename(folder / name)
        code, line = told(folder, capfd)
        assert (code, "is no name of a file on the Hub" in line) == (2, True)
    gguf.rename(folder / "ü b.powerinfer.gguf")
    assert told(folder, capfd)[0] == 0
    assert "ü b.powerinfer.gguf" in hub.repos["me/x"].files


def test_an_access_token_or_a_path_of_this_machine_is_not_pushed(
    hub, copy_of, monkeypatch, capfd, tmp_path
):
    folder = copy_of("model")
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(f"{card}\nUse {TOKEN}.\n")
    code, line = told(folder, capfd)
    assert (code, "README.md: holds an access token" in line) == (2, True)
    assert TOKEN not in line
    (folder / "README.md").write_text(f"{card}\nSee {tmp_path}/notes.\n")
    code, line = told(folder, capfd)
    assert (code, f"README.md: holds {tmp_path}" in line) == (2, True)
    assert hub.repos.keys() == {"someone/base"}


def test_an_events_file_loses_the_name_of_the_machine(hub, copy_of, pushed):
    folder = copy_of("model")
    events = folder / "curves/tensorboard/phase"
    events.mkdir(parents=True)
    (events / "events.out.tfevents.1700000000.myhost.123.0").write_bytes(b"\0" * 9)
    pushed(folder)
    found = [name for name in hub.repos["me/model"].files if "tfevents" in name]
    assert found == ["curves/tensorboard/phase/events.out.tfevents.1700000000.sparsify"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"repo": "a/b/c"}, "--repo: got 'a/b/c', expected owner/name"),
        ({"repo": "me/a--b"}, "--repo: got"),
        ({"repo": "../x"}, "--repo: got"),
        ({"base_model": "./model"}, "--base-model: got"),
        ({"base_model": "model"}, "--base-model: got 'model', expected owner/name"),
        ({"license": "my own!"}, "--license: got 'my own!'"),
        ({"branch": "refs/pr/1"}, "--branch: got 'refs/pr/1'"),
        ({"branch": "a b"}, "--branch: got 'a b'"),
    ],
)
def test_options_that_cannot_be_are_refused(options, reason):
    with pytest.raises(InputError) as refused:
        PushConfig(**{"folder": Path("p"), "repo": "me/x", **options})
    assert str(refused.value).startswith(reason)
    assert "\n" not in str(refused.value)


def test_a_license_that_the_hub_does_not_know_makes_no_repository(hub, copy_of, capfd):
    code, line = told(copy_of("predictors"), capfd, "--license", "nonsense-1.0")
    assert code == 2
    assert "the Hub refuses the card's metadata" in line
    assert '"license" must be one of' in line
    assert "me/x" not in hub.repos


def test_tokens(hub, copy_of, capfd, monkeypatch, tmp_path):
    folder = copy_of("predictors")
    monkeypatch.setenv("HF_TOKEN", "hf_nobody")
    code, line = told(folder, capfd)
    assert (code, "the token: the Hub does not know it" in line) == (2, True)
    monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
    code, line = told(folder, capfd)
    assert (code, "me/x: this token may not do that" in line) == (2, True)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    before = len(hub.requests)
    code, line = told(folder, capfd)
    assert (code, "no access token of the Hub is here" in line) == (2, True)
    assert len(hub.requests) == before


def test_somebody_elses_repository_and_a_base_model_that_is_none(hub, copy_of, capfd):
    folder = copy_of("predictors")
    code, line = told(folder, capfd, "--repo", "you/x")
    assert (code, "you/x: this token may not do that" in line) == (2, True)
    code, line = told(folder, capfd, "--base-model", "someone/none")
    assert (code, "the Hub has no model someone/none" in line) == (2, True)
    assert set(hub.repos) == {"someone/base"}


def test_no_network_is_a_failure_and_offline_a_mistake(hub, copy_of, capfd, monkeypatch):
    folder = copy_of("predictors")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{port}")
    code, line = told(folder, capfd)
    assert (code, "the Hub does not answer" in line) == (1, True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    from huggingface_hub.utils import close_session

    close_session()  # the client asks for offline mode when it is made
    try:
        code, line = told(folder, capfd)
    finally:
        close_session()
    assert (code, "HF_HUB_OFFLINE is set" in line) == (2, True)


def test_an_interrupted_push_leaves_no_half_and_the_next_sends_the_rest(hub, copy_of, capfd):
    folder = copy_of("bundle")
    hub.refuse = {"POST /api/models/me/x/commit": 503}
    code, line = told(folder, capfd)
    assert (code, "what has arrived there is kept, run the same command again" in line) == (1, True)
    assert set(hub.repos["me/x"].files) == {".gitattributes"}
    sent = list(hub.uploads)
    assert sent
    hub.refuse = {}
    assert told(folder, capfd)[0] == 0
    assert hub.uploads == sent  # nothing large was sent twice
    assert (
        hub.repos["me/x"].files["predictor/model_0.pt"]
        == (folder / "predictor/model_0.pt").read_bytes()
    )


def test_an_upload_that_breaks_off_goes_on_with_the_rest(hub, copy_of, capfd, monkeypatch):
    folder = copy_of("predictors")
    monkeypatch.setattr("sparsecast.integrations.hub.upload.GROUP", 1)  # each file alone
    last = sorted(folder.glob("model_*.pt"))[-1]
    oid = hashlib.sha256(last.read_bytes()).hexdigest()
    hub.refuse = {f"PUT /store/{oid}": 500}
    code, line = told(folder, capfd)
    assert (code, "what has arrived there is kept" in line) == (1, True)
    first = list(hub.uploads)
    assert oid not in first
    assert first
    hub.refuse = {}
    assert told(folder, capfd)[0] == 0
    assert hub.uploads == [*first, oid]


def test_pushing_the_same_again_makes_no_commit(hub, copy_of, pushed):
    folder = copy_of("predictors")
    pushed(folder)
    pushed(folder)
    assert len(hub.repos["me/predictors"].branches["main"]) == 2


def test_other_files_of_a_repository_stay_and_stale_ones_are_said(hub, copy_of, capfd):
    folder = copy_of("predictors")
    there = {"notes.md": b"mine", "LICENSE": b"text", "model_3.pt": b"old", "model_0.pt": b"old"}
    hub.add("me/x", there)
    code, line = told(folder, capfd)
    assert (code, "me/x: holds model_3.pt of an earlier push" in line) == (2, True)
    assert hub.repos["me/x"].files["model_0.pt"] == b"old"
    assert told(folder, capfd, "--replace", "true")[0] == 0
    files = hub.repos["me/x"].files
    assert (files["notes.md"], files["LICENSE"]) == (b"mine", b"text")
    assert "model_3.pt" not in files
    assert files["model_0.pt"] == (folder / "model_0.pt").read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_a_repository_of_another_kind_is_refused(kind, hub, copy_of, capfd):
    others = {"model_0.pt": b"", "stats.safetensors": b"", "m.powerinfer.gguf": b""}
    own = {"predictors": 0, "activations": 1, "bundle": 2, "model": 3}[kind]
    name = [*others, "config.json"][(own + 1) % 4]
    hub.add("me/x", {name: b"theirs"})
    code, line = told(copy_of(kind), capfd, "--replace", "true")
    assert (code, "choose another --repo" in line) == (2, True)
    assert hub.repos["me/x"].files[name] == b"theirs"


def test_a_public_repository_is_not_private(hub, copy_of, capfd):
    hub.add("me/x", {})
    code, line = told(copy_of("predictors"), capfd, "--private", "true")
    assert (code, "exists and everybody can read it" in line) == (2, True)
    assert set(hub.repos["me/x"].files) == {".gitattributes"}


def test_files_that_a_gitignore_drops_are_missed(hub, copy_of, capfd):
    hub.ignored = {"model_1.pt"}
    code, line = told(copy_of("predictors"), capfd)
    assert (code, "model_1.pt did not arrive" in line) == (2, True)


def test_a_commit_of_somebody_else_meanwhile_is_not_lost(hub, copy_of, capfd, monkeypatch):
    from huggingface_hub import HfApi

    upload = HfApi.preupload_lfs_files

    def meanwhile(self, repo_id, **options):
        hub.repos[repo_id].commit("main", {**hub.repos[repo_id].files, "theirs": b"1"})
        return upload(self, repo_id, **options)

    monkeypatch.setattr(HfApi, "preupload_lfs_files", meanwhile)
    code, line = told(copy_of("predictors"), capfd)
    assert (code, "somebody pushed to it meanwhile" in line) == (2, True)
    assert "theirs" in hub.repos["me/x"].files

"""What is pushed comes back byte for byte, whole, and without a path of this machine."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hub_stand_in import TOKEN, HubStandIn
from huggingface_hub import HfApi, ModelCard, snapshot_download

from sparsecast.cli.main import main
from sparsecast.core.errors import InputError
from sparsecast.core.manifests import manifest_checksum
from sparsecast.integrations.hub.config import PushConfig
from sparsecast.integrations.hub.push import push
from sparsecast.predictors.checkpoint import load_predictors

FILES = {
    "predictors": ["config.json", "manifest.json", *(f"model_{i}.pt" for i in range(3))],
    "activations": ["manifest.json", "stats.safetensors"],
    "bundle": [
        *(f"activation/activation_{i}.pt" for i in range(3)),
        "predictor/config.json",
        "predictor/manifest.json",
        *(f"predictor/model_{i}.pt" for i in range(3)),
    ],
    "model": [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "sparsify.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    ],
}
CHANGED = {"README.md", "manifest.json", "predictor/manifest.json"}
"""Files that name the model, which is a path here."""


@pytest.mark.parametrize("kind", FILES)
def test_what_is_pushed_comes_back_byte_for_byte(kind, hub, copy_of, pushed, model_folder):
    folder = copy_of(kind)
    result = pushed(folder, base_model="someone/base", license="mit")
    (gguf,) = [[path.name for path in folder.glob("*.gguf")]]

    found = hub.repos[f"me/{kind}"].files
    assert set(found) - {".gitattributes"} == {"README.md", *FILES[kind], *gguf}
    assert set(result.files) == set(found) - {".gitattributes"}
    back = Path(snapshot_download(f"me/{kind}"))
    for name, data in found.items():
        assert (back / name).read_bytes() == data
        if name not in CHANGED | {".gitattributes"}:
            assert data == (folder / name).read_bytes(), name
    secrets = [str(path) for path in (folder.parent, model_folder, model_folder.parent)]
    for name, data in found.items():
        assert not any(secret.encode() in data for secret in secrets), name


def test_manifests_name_the_base_model_and_have_checksums_that_fit(hub, copy_of, pushed):
    folder = copy_of("predictors")
    before = load_predictors(folder)
    pushed(folder, base_model="someone/base")

    back = load_predictors("me/predictors")
    assert back.manifest is not None
    assert before.manifest is not None
    assert back.manifest.model == "someone/base"
    assert back.manifest.recipe == {**before.manifest.recipe, "corpus": "corpus0"}
    assert back.manifest.fingerprint == before.manifest.fingerprint
    assert back.manifest.checksums["manifest.json"] == manifest_checksum(back.manifest)
    for a, b in zip(before.layers, back.layers, strict=True):
        assert all(x.equal(y) for x, y in zip(a.weights, b.weights, strict=True))


def test_a_folder_that_names_no_path_is_pushed_as_it_is(hub, copy_of, pushed, sealed):
    folder = sealed(copy_of("predictors"), model="someone/base", recipe={"corpus": "a/b:c@train"})
    pushed(folder)

    found = hub.repos["me/predictors"].files
    assert found["manifest.json"] == (folder / "manifest.json").read_bytes()
    data = ModelCard.load("me/predictors").data
    assert (data.base_model, data.base_model_relation) == ("someone/base", "adapter")
    assert data.datasets == ["a/b"]


def test_a_model_with_a_local_name_has_no_base_model_and_that_is_said(hub, copy_of, pushed, caplog):
    result = pushed(copy_of("bundle"))
    assert "which is no model on the Hub, so the card has no base_model" in caplog.text
    data = ModelCard(result.card).data
    assert data.base_model is None
    assert "base_model_relation" not in data.to_dict()
    manifest = json.loads(hub.repos["me/bundle"].files["predictor/manifest.json"])
    assert manifest["model"].startswith("model")


def test_a_name_like_a_hub_id_that_the_hub_lacks_is_no_base_model(
    hub, copy_of, pushed, sealed, caplog
):
    """Such as a relative path of the machine on which it was recorded; the same for a dataset."""
    recipe = {"corpus": "clients/acme"}
    result = pushed(sealed(copy_of("predictors"), model="out/model", recipe=recipe))
    assert "belongs to out/model, which is no model on the Hub" in caplog.text
    data = ModelCard(result.card).data
    assert (data.base_model, data.datasets) == (None, None)
    manifest = json.loads(hub.repos["me/predictors"].files["manifest.json"])
    assert (manifest["model"], manifest["recipe"]) == ("model", {"corpus": "acme"})
    assert "out/model" not in result.card
    assert "clients" not in result.card


def test_shards_are_pushed_only_where_that_is_asked_for(hub, copy_of, pushed, acts):
    pushed(copy_of("activations"), shards=True)
    shards = {path.name for path in acts.folder.glob("*-0*.safetensors")}
    found = hub.repos["me/activations"].files
    assert shards
    assert shards < set(found)
    assert all(found[name] == (acts.folder / name).read_bytes() for name in shards)


def test_of_paths_the_last_part_stays(hub, copy_of, pushed):
    pushed(copy_of("activations"))
    manifest = json.loads(hub.repos["me/activations"].files["manifest.json"])
    assert manifest["corpus"] == "corpus0"
    assert "/" not in manifest["model"]


def test_paths_in_a_bundles_card_lose_their_folders_and_nothing_else_changes(
    hub, copy_of, pushed, caplog
):
    """Such as that of a model whose predictors came without a manifest."""
    folder = copy_of("bundle")
    path = folder / "README.md"
    more = "--model /data/secret/m `~/secret/n` ../o <a/b> 1/2 https://a.b/c/d activation/x.pt\n"
    links = "[a](./predictor/config.json) [b](../b/c) [c](/data/secret/c)\n"
    path.write_text(path.read_text() + more + links)
    text = ModelCard(pushed(folder).card).text
    assert "--model m `n` o <a/b> 1/2 https://a.b/c/d activation/x.pt" in text
    assert "[a](./predictor/config.json) [b](../b/c) [c](c)" in text
    told = "of these paths the last part alone is pushed: ../o, /data/secret/c, /data/secret/m, "
    assert f"README.md: {told}~/secret/n" in caplog.text


def test_a_dry_run_shows_files_and_card_and_asks_nobody(hub, copy_of, capfd, monkeypatch):
    folder = copy_of("predictors")
    (folder / "logs").mkdir()
    (folder / "logs/metrics.csv").write_text("step\n")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(SystemExit) as done:
        main(["push", str(folder), "--repo", "me/p", "--dry-run", "true", "--license", "mit"])
    shown = capfd.readouterr().err + capfd.readouterr().out
    assert done.value.code == 0
    assert hub.requests == []
    size = (folder / "model_1.pt").stat().st_size
    assert any("model_1.pt" in line and f"{size:,}" in line for line in shown.splitlines())
    assert "stays here: logs/metrics.csv" in shown
    assert "license: mit" in shown
    assert "| recall | 0.9000 |" in shown


def test_a_dry_run_shows_the_card_that_is_pushed(hub, copy_of, pushed):
    folder = copy_of("bundle")
    dry = pushed(folder, base_model="someone/base", dry_run=True)
    real = pushed(folder, base_model="someone/base")
    assert (dry.url, dry.card, dry.files) == (None, real.card, real.files)
    assert hub.repos["me/bundle"].files["README.md"] == real.card.encode()


def test_a_repository_without_an_owner_is_ones_own(hub, copy_of, pushed):
    assert pushed(copy_of("predictors"), repo="mine").repo == "me/mine"
    assert "me/mine" in hub.repos


def test_a_client_of_another_hub_is_used_throughout(copy_of, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    folder = copy_of("predictors")
    with HubStandIn() as other:
        cfg = PushConfig(folder=folder, repo="p", license="mit")
        result = push(cfg, HfApi(endpoint=other.url, token=TOKEN))
        assert set(result.files) == set(other.repos["me/p"].files) - {".gitattributes"}
        with pytest.raises(InputError, match="the Hub refuses the card's metadata"):
            push(replace(cfg, license="x"), HfApi(endpoint=other.url, token=TOKEN))


def test_a_private_push_makes_a_private_repository(hub, copy_of, pushed):
    folder = copy_of("predictors")
    pushed(folder, private=True)
    assert hub.repos["me/predictors"].private
    pushed(folder, private=True)  # again
    assert load_predictors("me/predictors").layer_count == 3


def test_a_branch_is_made_and_main_stays(hub, copy_of, pushed):
    pushed(copy_of("predictors"), branch="rank-16/a")
    repo = hub.repos["me/predictors"]
    assert set(repo.files) == {".gitattributes"}
    assert "model_0.pt" in repo.branches["rank-16/a"][-1].files
    assert load_predictors("me/predictors@rank-16/a").layer_count == 3
    with pytest.raises(InputError, match="this repository of the hub holds no predictors"):
        load_predictors("me/predictors")

"""What `sparsecast inspect` shows, and damage found wherever it is."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from sparsecast.collect.inspect import InspectConfig, inspect
from sparsecast.collect.store.store import ActivationStore
from sparsecast.core.bitmask import unpack
from sparsecast.core.errors import InputError


def test_inspect_tells_what_is_there_and_finds_damage(acts, tmp_path):
    copy = tmp_path / "acts"
    copy.mkdir()
    for path in acts.folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    whole = inspect(InspectConfig(path=copy, json=tmp_path / "i.json"))
    assert whole.ok
    values = json.loads((tmp_path / "i.json").read_text())
    assert values == whole.values
    assert values["tokens"] == {"train": 5_400, "calibration": 300, "held-out": 300}
    for row in values["layers"]:
        masks = [
            unpack(acts.rows(split, shard, row["layer"]).mask_TP, acts.manifest.ffn_width)
            for split in values["tokens"]
            for shard in range(len(acts.shards(split)))
        ]
        assert row["true_sparsity"] == pytest.approx(1 - torch.cat(masks).float().mean().item())
        assert row["never_fired"] == (~torch.cat(masks).any(0)).sum()

    shard = copy / "train-00000.safetensors"
    raw = bytearray(shard.read_bytes())
    raw[-1000] ^= 1
    shard.write_bytes(raw)
    (copy / "calibration-00000.safetensors").unlink()
    broken = inspect(InspectConfig(path=copy))
    assert not broken.ok
    assert len(broken.values["damage"]) == 2
    assert "train-00000.safetensors: damaged" in broken.values["damage"][0]
    assert "calibration-00000.safetensors: no such file" in broken.values["damage"][1]
    quick = inspect(InspectConfig(path=copy, check=False))
    assert quick.values["damage"] == broken.values["damage"][1:]
    assert quick.values["ok"] is quick.ok is False
    assert inspect(InspectConfig(path=acts.folder, check=False)).values["ok"] is None
    with pytest.raises(
        InputError, match="holds none itself, expected activations .* give a folder in it, such as"
    ):
        inspect(InspectConfig(path=tmp_path))


@pytest.fixture
def copied(acts, tmp_path):
    copy = tmp_path / "acts"
    shutil.copytree(acts.folder, copy)
    return copy


@pytest.mark.parametrize("place", [3, 40, 500, 2_000, -1])
@pytest.mark.parametrize("name", ["held-out-00000.safetensors", "stats.safetensors"])
def test_one_flipped_bit_anywhere_is_found(copied, name, place):
    raw = bytearray((copied / name).read_bytes())
    raw[place] ^= 1
    (copied / name).write_bytes(raw)
    store = ActivationStore(copied, checked=False)
    found = [what for _, what in store.damages() if what is not None]
    assert len(found) == 1
    assert f"{name}: damaged" in found[0]


def test_inspect_shows_the_rest_when_the_statistics_are_damaged(copied):
    (copied / "stats.safetensors").write_bytes(b"")
    found = inspect(InspectConfig(path=copied))
    assert not found.ok
    assert found.values["layers"] == []


def test_a_manifest_of_another_store_is_noticed(copied):
    path = copied / "manifest.json"
    made = json.loads(path.read_text())
    made["shard_tokens"]["train"][0] += 1
    path.write_text(json.dumps(made))
    with pytest.raises(InputError, match=r"manifest\.json: damaged or edited"):
        ActivationStore(copied)
    lenient = ActivationStore(copied, checked=False)
    with pytest.raises(InputError, match=r"holds 5400 tokens, but manifest\.json says 5401"):
        lenient.rows("train", 0, 0)
    shard, own, stats = (what for _, what in lenient.damages() if what)
    assert "says 5401" in shard
    assert "manifest.json: damaged" in own
    assert "no counts of the 5,401 train tokens" in stats


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"shard_tokens": {}}, "an unfinished collection"),
        ({"shard_tokens": {"train": [1]}}, "shard_tokens makes no sense"),
        ({"shard_tokens": [1]}, "shard_tokens makes no sense"),
        ({"layers": None}, "layers makes no sense"),
        ({"layers": "012"}, "layers makes no sense"),
        ({"layers": []}, "layers makes no sense"),
        ({"x_dtype": "int3"}, "x_dtype makes no sense"),
        ({"checksums": []}, "checksums makes no sense"),
        ({"documents": {"train": "many"}}, "documents makes no sense"),
        ({"activation_threshold": "x"}, "activation_threshold makes no sense"),
        ({"energy": 1}, "energy makes no sense"),
    ],
)
def test_odd_manifests_are_refused(copied, change, match):
    path = copied / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=match):
        inspect(InspectConfig(path=copied))


@pytest.mark.parametrize(
    ("change", "files"),
    [
        ({"x_dtype": "bfloat16"}, 4),
        ({"hidden_size": 128}, 4),
        ({"ffn_width": 512}, 5),
        ({"energy": True}, 4),
        ({"activation_threshold": 0.5}, 1),
        ({"corpus": "elsewhere"}, 1),
    ],
)
def test_a_manifest_that_was_edited_is_noticed(copied, change, files):
    """By its own checksum, and by every shard where the shape is touched."""
    path = copied / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    found = inspect(InspectConfig(path=copied))
    assert not found.ok
    assert len(found.values["damage"]) == files
    assert any("manifest.json: damaged" in what for what in found.values["damage"])


def test_a_result_that_cannot_be_written_is_refused_before_the_check(copied, tmp_path):
    for bad in (tmp_path, tmp_path / "acts" / "manifest.json" / "x.json"):
        with pytest.raises(InputError, match="--json: .* cannot be written"):
            inspect(InspectConfig(path=copied, json=bad))

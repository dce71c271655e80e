"""Which file holds a model's weights, and files that are not what they seem."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sparsecast.core.errors import InputError
from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.core.models.loading import build_model, load_model, open_model
from sparsecast.core.models.weight_files import ORDER

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:ef16\nsize 4993300595\n"


EMBEDDING = "model.embed_tokens.weight"


def edit(path: Path, **fields) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def shards(folder: Path, weights: dict, *, index: dict | None = None, offset: float = 0.0) -> None:
    """The weights in two shards with an index beside whatever is there, `offset` added to each."""
    names = sorted(weights)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in parts.items():
        save_file({n: weights[n] + offset for n in held}, folder / file, {"format": "pt"})
    where = {name: file for file, held in parts.items() for name in held}
    write_index(folder, where if index is None else index)


def write_index(folder: Path, weight_map: dict) -> None:
    text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)


def refused(folder: Path, match: str) -> None:
    with pytest.raises(InputError, match=match) as caught:
        open_model(str(folder))
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)


def test_one_file_holds_the_weights_in_the_order_of_transformers(folder):
    """All four claim to; each is taken away in turn, and transformers is the oracle."""
    weights = load_file(folder / "model.safetensors")
    shards(folder, weights, offset=1.0)
    torch.save({n: w + 2 for n, w in weights.items()}, folder / "pytorch_model.bin")
    torch.save({n: w + 3 for n, w in weights.items()}, folder / "c.bin")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "c.bin")}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    seen = set()
    for offset, name in enumerate(ORDER):
        checkpoint, _ = open_model(str(folder))
        ours = checkpoint.tensor(EMBEDDING)
        theirs = AutoModelForCausalLM.from_pretrained(folder).state_dict()[EMBEDDING]
        recorded = build_model(checkpoint, torch.float16).state_dict()[EMBEDDING]

        assert torch.equal(ours, weights[EMBEDDING] + offset)
        assert torch.equal(ours, theirs)
        assert torch.equal(ours, recorded)
        seen.add(checkpoint.fingerprint)
        (folder / name).unlink()
    assert len(seen) == 4
    refused(folder, r"no model\.safetensors, pytorch_model\.bin or index of shards")


def test_a_stale_index_beside_a_whole_file_is_not_read(folder):
    write_index(folder, {"gone.weight": "model-00001-of-00008.safetensors"})
    open_model(str(folder))


@pytest.mark.parametrize(
    "file",
    ["/etc/passwd", "../m/a.safetensors", "x/../a.safetensors", "..\\a.safetensors", "..", "a.bin"],
)
def test_an_index_names_files_beside_it(file, folder):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shards(folder, weights, index=dict.fromkeys(weights, file))
    refused(folder, r"index\.json: names the file .* without a folder")


def test_a_tensor_in_two_shards_is_refused(folder):
    """transformers takes the last one, the index says the first."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shards(folder, weights)
    save_file({EMBEDDING: weights[EMBEDDING] + 1}, folder / "c.safetensors", {"format": "pt"})
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    write_index(folder, {**index, "more": "c.safetensors"})
    refused(folder, f"c.safetensors: tensor {re.escape(EMBEDDING)} is also in [ab].safetensors")


def test_other_claims_to_the_weights_are_refused(folder):
    shutil.copy(folder / "model.safetensors", folder / "other.safetensors")
    edit(folder / "config.json", transformers_weights="other.safetensors")
    refused(folder, "transformers_weights is 'other.safetensors'")
    edit(folder / "config.json", transformers_weights=None)
    (folder / "other.safetensors").rename(folder / "shard-00000-model-00001-of-00001.safetensors")
    refused(folder, "is a distributed checkpoint")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_beside_the_weights_is_refused_with_the_way_to_merge_it(name, folder):
    (folder / name).write_text("{}")
    with pytest.raises(InputError, match=rf"holds an adapter \({name}\).*merge_and_unload"):
        Checkpoint(str(folder))


@pytest.mark.parametrize("kind", ["older format", "Parameters"])
def test_weights_of_older_torch_and_of_parameters_are_read(kind, folder):
    weights = load_file(folder / "model.safetensors")
    whole = Checkpoint(str(folder)).fingerprint
    (folder / "model.safetensors").unlink()
    new = kind == "Parameters"
    saved = {n: torch.nn.Parameter(w) for n, w in weights.items()} if new else weights
    torch.save(saved, folder / "pytorch_model.bin", _use_new_zipfile_serialization=new)

    model, _ = load_model(str(folder), device="cpu")

    assert Checkpoint(str(folder)).fingerprint == whole
    assert torch.equal(model.state_dict()[EMBEDDING], weights[EMBEDDING].float())


def test_the_older_format_is_read_once_for_all_its_tensors(folder):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    torch.save(weights, path, _use_new_zipfile_serialization=False)
    checkpoint = Checkpoint(str(folder))
    checkpoint.tensor(EMBEDDING)
    path.unlink()
    for name, weight in weights.items():
        assert torch.equal(checkpoint.tensor(name), weight)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "pytorch_model.bin", "tokenizer.model", "config.json"]
)
def test_a_git_lfs_pointer_is_named(name, folder):
    if name == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
    (folder / name).write_text(POINTER)
    refused(folder, f"{re.escape(name)}: is a Git LFS pointer.*4,993,300,595 bytes.*git lfs pull")


def test_a_pointer_that_nobody_reads_is_left_alone(folder):
    (folder / "pytorch_model.bin").write_text(POINTER)
    open_model(str(folder))


@pytest.mark.parametrize("odd", [torch.zeros(2).to_sparse(), torch.zeros(2, device="meta"), 3])
def test_a_bin_file_holds_plain_tensors(odd, folder):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({**weights, "odd": odd}, folder / "pytorch_model.bin")
    refused(folder, "does not hold a dict of tensors")


def test_what_is_no_file_is_named_and_does_not_hang(folder):
    path = folder / "model.safetensors"
    path.unlink()
    os.mkfifo(path)
    refused(folder, r"model\.safetensors: is a FIFO")
    path.unlink()
    path.symlink_to(path.name)
    refused(folder, r"model\.safetensors: cannot be read \(Too many levels of symbolic links\)")


def test_weights_that_may_not_be_read_are_not_missing(model_folder, as_nobody):
    folder = Path(shutil.copytree(model_folder, as_nobody.folder / "m"))
    for path in (folder, *folder.iterdir()):
        path.chmod(0o755)
    with as_nobody():
        open_model(str(folder))
    (folder / "model.safetensors").chmod(0)
    with as_nobody():
        refused(folder, r"model\.safetensors: may not be read \(Permission denied\)")
    folder.chmod(0)
    with as_nobody():
        refused(folder, r"config\.json: may not be read")
    as_nobody.folder.chmod(0o600)
    with as_nobody():
        refused(folder, r"m: may not be read \(Permission denied\); expected a model's folder")

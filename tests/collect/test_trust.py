"""Nothing in an activation store is believed that was changed since it was written."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, fields, replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file

from sparsecast.collect.config import CollectConfig
from sparsecast.collect.inspect import InspectConfig, inspect
from sparsecast.collect.run import collect
from sparsecast.collect.store.shard import checksum
from sparsecast.collect.store.shard_reader import ShardFile, header_checksum
from sparsecast.collect.store.stats import STATS
from sparsecast.collect.store.store import ActivationStore, Manifest, read_manifest
from sparsecast.core.errors import InputError
from sparsecast.core.manifests import MANIFEST, write_manifest
from sparsecast.core.run_record import RUN

HELD = "held-out-00000.safetensors"


@pytest.fixture(scope="module")
def full(tmp_path_factory, model_folder, corpus) -> ActivationStore:
    """A store with every kind of tensor: scales, energies and counted tokens too."""
    cfg = CollectConfig(
        model=str(model_folder),
        corpus=str(corpus),
        out=tmp_path_factory.mktemp("full") / "acts",
        tokens=400,
        count_tokens=50,
        seq_len=32,
        input_dtype="int8",
        energy=True,
    )
    return collect(cfg)


@pytest.fixture
def copied(full, tmp_path) -> Path:
    return Path(shutil.copytree(full.folder, tmp_path / "acts"))


def plain(**changes: object) -> Manifest:
    made = Manifest(
        model="m", fingerprint="0" * 16, model_type="llama", config={}, dtype="float32", threads=1,
        tokenizer="none", convention="residual-before-ffn-norm", activation="relu",
        activation_threshold=0.0, corpus="none", options={}, layers=[0, 1], hidden_size=16,
        ffn_width=24, ffn_matrices=3, x_dtype="float16", energy=False,
    )  # fmt: skip
    return replace(made, **changes)


def read_all(store: ActivationStore) -> None:
    """What every stage together reads."""
    store.stats()
    for split in ("train", "calibration", "held-out"):
        for shard in range(len(store.shards(split))):
            store.tokens(split, shard)
            for layer in store.manifest.layers:
                store.rows(split, shard, layer)
                store.energies(split, shard, layer)


def reseal(folder: Path, **changes: object) -> None:
    """Forge: the manifest agrees with the files again."""
    made = read_manifest(folder, checked=False)
    sums = {p.name: header_checksum(p) for p in folder.glob("*-*.safetensors")}
    write_manifest(folder, replace(made, **{"checksums": {**made.checksums, **sums}, **changes}))


def place_of(path: Path, name: str) -> slice:
    """The bytes of a tensor in its file."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    if name == "header":
        return slice(0, start)
    first, last = json.loads(raw[8:start])[name]["data_offsets"]
    return slice(start + first, start + last)


def flip(path: Path, at: int, bit: int = 0) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1 << bit
    path.write_bytes(raw)


NAMES = ["id", "position", *(f"layer.2.{n}" for n in ("active", "scale", "x", "mask", "energy"))]


@pytest.mark.parametrize("split", ["train", "calibration", "held-out"])
@pytest.mark.parametrize("name", NAMES)
def test_a_flipped_bit_is_found_by_whoever_reads_the_tensor(copied, name, split):
    path = copied / f"{split}-00000.safetensors"
    where = place_of(path, name)
    flip(path, where.start)
    with pytest.raises(InputError, match=rf"{split}-00000\.safetensors: damaged, {name} has the"):
        read_all(ActivationStore(copied))
    flip(path, where.start)
    read_all(ActivationStore(copied))
    flip(path, where.stop - 1, bit=7)
    with pytest.raises(InputError, match=rf"{split}-00000\.safetensors: damaged, {name} has the"):
        read_all(ActivationStore(copied))


def test_a_flipped_bit_in_a_header_is_found_by_whoever_opens_the_store(copied):
    for path in copied.glob("*-*.safetensors"):
        stop = place_of(path, "header").stop
        for at in range(0, stop, stop // 40):
            flip(path, at)
            with pytest.raises(InputError, match=rf"{path.name}: damaged"):
                ActivationStore(copied)
            flip(path, at)


def sealed_files(folder: Path) -> list[Path]:
    """All but run.json, which no checksum covers."""
    return sorted(path for path in folder.iterdir() if path.name != RUN)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(st.data())
def test_no_flipped_bit_anywhere_is_believed(full, tmp_path_factory, data):
    folder = Path(tmp_path_factory.getbasetemp() / "flipped")
    if not folder.exists():
        shutil.copytree(full.folder, folder)
    path = data.draw(st.sampled_from(sealed_files(folder)))
    at = data.draw(st.integers(0, path.stat().st_size - 1))
    bit = data.draw(st.integers(0, 7))
    flip(path, at, bit)
    try:
        found = [what for _, what in ActivationStore(folder).damages() if what]
    except InputError as error:
        found = [str(error)]
    flipped = path.read_bytes()
    flip(path, at, bit)
    if not found:  # in the manifest, a space for a newline
        assert path.name == MANIFEST
        assert json.loads(flipped) == json.loads(path.read_text())
    assert all(path.name in what and "\n" not in what for what in found)


def test_only_what_is_read_is_hashed_and_only_once(copied, monkeypatch):
    hashed = []

    def counting(parts):
        hashed.append(1)
        return checksum(parts)

    monkeypatch.setattr("sparsecast.collect.store.shard_reader.checksum", counting)
    store = ActivationStore(copied)
    assert not hashed
    for start in range(0, 320, 32):
        store.rows("train", 0, 1, start, start + 32)
    # x, scale and mask of one layer; the active counts of 3 layers say how many energies there are.
    assert len(hashed) == 3 + 3


@pytest.fixture
def pairs(tmp_path, write_store) -> ActivationStore:
    """Two shards a split, all alike in shape."""
    recorded = {
        split: [
            [(torch.randn(8, 16), torch.randn(8, 24).relu()) for _ in range(2)] for _ in range(2)
        ]
        for split in ("train", "calibration", "held-out")
    }
    return write_store(tmp_path / "acts", plain(), recorded)


def test_a_shard_knows_its_place(pairs):
    folder = pairs.folder
    for one, other in combinations(sorted(folder.glob("*-*.safetensors")), 2):
        kept = one.read_bytes()
        for forged in (False, True):
            shutil.copy(other, one)
            told = f"says that it is {other.name}" if forged else "damaged or of another store"
            if forged:
                sums = pairs.manifest.checksums
                sums = {**sums, one.name: sums[other.name]}
                write_manifest(folder, replace(pairs.manifest, checksums=sums))
            with pytest.raises(InputError, match=f"{one.name}: {told}"):
                ActivationStore(folder)
        one.write_bytes(kept)
        write_manifest(folder, pairs.manifest)
    ActivationStore(folder)


@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.99, 1.01])
def test_a_file_that_was_cut_short_or_added_to_is_found(copied, share):
    for path in sealed_files(copied):
        raw = path.read_bytes()
        length = max(0, len(raw) + 8) if share > 1 else int(len(raw) * share)
        path.write_bytes(raw[:length].ljust(length if share > 1 else 0, b"x"))
        with pytest.raises(InputError, match=path.name):
            ActivationStore(copied).stats()
        path.write_bytes(raw)


def other(value):
    """Another value of the same type that a manifest could have."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, list):
        return value[:-1]
    return {key: other(inner) for key, inner in value.items()} if value else "new"


EDITS = {field.name: (field.name, None) for field in fields(Manifest)} | {
    "matrices": ("ffn_matrices", 2),
    "convention": ("convention", "layer-input"),
    "threshold": ("activation_threshold", 0.0),
    "activation": ("activation", "relu"),
    "tokens moved": ("shard_tokens", {"train": [1], "calibration": [1], "held-out": [1]}),
}


@pytest.mark.parametrize("edit", EDITS)
def test_every_edited_field_of_a_manifest_is_found(copied, edit):
    name, value = EDITS[edit]
    path = copied / MANIFEST
    made = json.loads(path.read_text())
    was = made.get(name, getattr(read_manifest(copied), name))  # optional fields may be left out
    path.write_text(json.dumps(made | {name: other(was) if value is None else value}))
    with pytest.raises(InputError, match=r"manifest\.json: (damaged|format version)"):
        ActivationStore(copied)


@pytest.mark.parametrize("name", [MANIFEST, STATS, HELD, "counted-00000.safetensors"])
def test_a_checksum_that_was_taken_out_is_missed(copied, name):
    path = copied / MANIFEST
    made = json.loads(path.read_text())
    del made["checksums"][name]
    path.write_text(json.dumps(made))
    with pytest.raises(InputError, match="damaged or edited"):
        ActivationStore(copied)
    if name != MANIFEST:  # by somebody who knows how to hash
        write_manifest(copied, read_manifest(copied, checked=False))
        with pytest.raises(InputError, match=f"has no checksum of {name}"):
            ActivationStore(copied).stats()
    assert not inspect(InspectConfig(path=copied)).ok


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t["held-out.layer.1.fired"].sub_(10_000),
        lambda t: t["train.layer.0.active"][:2].add_(torch.tensor([1, -1])),
        lambda t: t["counted.layer.2.fired"][:2].add_(1),
        lambda t: t.pop("calibration.layer.0.active"),
        lambda t: t.update({"train.layer.1.fired": t["train.layer.1.fired"].float()}),
        lambda t: t.update({"train.layer.1.fired": t["train.layer.1.fired"][:-1].clone()}),
    ],
)
def test_statistics_that_cannot_be_counts_are_refused(copied, change):
    tables = load_file(copied / STATS)
    change(tables)
    (copied / STATS).write_bytes(save(tables))
    with pytest.raises(InputError, match=r"stats\.safetensors: damaged"):
        ActivationStore(copied).stats()
    made = read_manifest(copied)
    digest = checksum([torch.from_numpy(np.fromfile(copied / STATS, dtype=np.uint8))])
    reseal(copied, checksums={**made.checksums, STATS: digest})
    with pytest.raises(InputError, match=r"holds no counts of the [\d,]+ \S+ tokens in layer \d"):
        ActivationStore(copied).stats()


@pytest.mark.parametrize("x_dtype", ["float16", "bfloat16", "float32", "int8"])
@pytest.mark.parametrize(
    ("value", "kind"), [(float("nan"), "NaN"), (float("inf"), "inf"), (-float("inf"), "inf")]
)
def test_inputs_that_are_not_finite_are_named(tmp_path, write_store, x_dtype, value, kind):
    one = [[(torch.randn(8, 16), torch.randn(8, 24).relu()) for _ in range(2)]]
    recorded = {split: one for split in ("train", "calibration", "held-out")}
    store = write_store(tmp_path / "acts", plain(x_dtype=x_dtype), recorded)
    name = "layer.1.scale" if x_dtype == "int8" else "layer.1.x"
    for split in recorded:
        path = store.folder / f"{split}-00000.safetensors"
        kept = path.read_bytes()
        tensors = load_file(path)
        tensors[name][5] = value
        sums = {key: checksum([tensor]) for key, tensor in tensors.items()}
        save_file(tensors, path, {"split": split, "number": "0", **sums})
        reseal(store.folder)
        told = rf"{path.name}: {name}, predictor inputs of layer 1, holds {kind}\w* at token 5"
        with pytest.raises(InputError, match=told):
            read_all(ActivationStore(store.folder))
        path.write_bytes(kept)
        reseal(store.folder)
        read_all(ActivationStore(store.folder))


@pytest.mark.parametrize(
    ("version", "told"),
    [
        (4, "written by a newer one; upgrade sparsecast, or remove the folder and collect again"),
        (2, "format version 2 of an older sparsecast, expected 3; remove the folder and collect"),
        (None, "format_version is None, expected 3; it is damaged"),
        (True, "format_version is True, expected 3; it is damaged"),
        ("3", "format_version is '3', expected 3; it is damaged"),
    ],
)
def test_manifests_of_other_versions_say_so(copied, version, told):
    path = copied / MANIFEST
    made = json.loads(path.read_text()) | {"format_version": version, "more": 1}
    path.write_text(json.dumps(made))
    with pytest.raises(InputError, match=told):
        ActivationStore(copied)


@pytest.mark.parametrize("depth", [400, 900, 100_000])
def test_manifests_nested_deeply_are_refused(copied, depth):
    path = copied / MANIFEST
    made = json.loads(path.read_text())
    text = json.dumps(made | {"config": "HERE"})
    path.write_text(text.replace('"HERE"', '{"a":' * depth + "1" + "}" * depth))
    told = r"manifest\.json: .*(nested too deeply|its config makes no sense)"
    for read in (ActivationStore, lambda path: inspect(InspectConfig(path=path))):
        with pytest.raises(InputError, match=told):
            read(copied)


def test_odd_files_in_a_shards_place_are_named(copied):
    path = copied / HELD
    path.unlink()
    with pytest.raises(InputError, match=f"{HELD}: no such file.*copy the folder again"):
        ActivationStore(copied)
    os.mkfifo(path)
    with pytest.raises(InputError, match=f"{HELD}: is a FIFO, expected a shard"):
        ActivationStore(copied)
    path.unlink()
    path.mkdir()
    with pytest.raises(InputError, match=f"{HELD}: is a folder, expected a shard"):
        ActivationStore(copied)


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 100_000,
        b"[]",
        b'{"__metadata__": 1}',
        b'{"id": {}}',
        b"{}",
        b'{"__metadata__": {"split": "train", "number": "x"}}',
    ],
)
def test_headers_that_make_no_sense_are_refused(tmp_path, header):
    path = tmp_path / "train-00000.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(InputError, match="damaged header; copy the folder again"):
        ShardFile(path)


def test_a_manifest_written_anew_with_the_same_values_is_the_same(copied, full):
    path = copied / MANIFEST
    path.write_text(json.dumps(dict(reversed(json.loads(path.read_text()).items())), indent=7))
    assert asdict(ActivationStore(copied).manifest) == asdict(full.manifest)

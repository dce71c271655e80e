"""Every damage must make verify fail, and the failing line must name the tensor."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from sparsecast.collect.errors import InputError
from sparsecast.export.config import VerifyConfig
from sparsecast.export.reader import GGUFFile
from sparsecast.export.verify import VerifyResult, bundle_file, verify


@pytest.fixture
def check(bundle, model_folder, corpus):
    """Run verify on the (damaged) copy."""

    def run(**options: object) -> VerifyResult:
        defaults = {"model": str(model_folder), "corpus": str(corpus), "tokens": 512}
        return verify(VerifyConfig(bundle=bundle, **{**defaults, **options}))

    return run


def on_disk(bundle: Path, name: str, mode: str = "r+") -> np.memmap:
    """A tensor of the file as a writable array."""
    path = bundle_file(bundle)
    entry = GGUFFile(path).entries[name]
    dtype = {"f16": np.float16, "f32": np.float32}[entry.type.name]
    return np.memmap(path, dtype, mode, entry.start, entry.shape)


def failures(result: VerifyResult) -> dict[str, str]:
    assert not result.ok
    return {c.name: c.detail for c in result.checks if not c.ok}


def transposed(bundle: Path, name: str) -> None:
    array = on_disk(bundle, name)
    array[:] = array.T.copy().reshape(array.shape)


def permuted_back(bundle: Path, name: str, heads: int) -> None:
    """Rows as transformers has them."""
    array = on_disk(bundle, name)
    size = len(array) // heads
    order = [h * size + i for h in range(heads) for i in (*range(0, size, 2), *range(1, size, 2))]
    array[:] = array[order]


def permuted_as_if_heads(bundle: Path, name: str, heads: int, wrong: int) -> None:
    permuted_back(bundle, name, heads)
    array = on_disk(bundle, name)
    array[:] = array.reshape(wrong, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)


def swapped(bundle: Path, one: str, other: str) -> None:
    a, b = on_disk(bundle, one), on_disk(bundle, other)
    a[:], b[:] = b.copy(), a.copy()


def zeroed(bundle: Path, name: str, start: int) -> None:
    on_disk(bundle, name)[start:] = 0


def nudged(bundle: Path, name: str) -> None:
    array = on_disk(bundle, name)
    array[0, 0] = np.nextafter(array[0, 0], np.float16(9))


DAMAGES = [
    (transposed, ["blk.1.attn_output.weight"], "transposed"),
    (transposed, ["blk.2.ffn_down_t.weight"], "transposed"),
    (transposed, ["blk.0.ffn_gate.weight"], "transposed"),
    (permuted_back, ["blk.1.attn_q.weight", 4], "permuted wrongly: rows are in the model's order"),
    (permuted_back, ["blk.0.attn_k.weight", 2], "permuted wrongly: rows are in the model's order"),
    (permuted_as_if_heads, ["blk.2.attn_k.weight", 2, 4], "permuted wrongly: .* 4 heads"),
    (swapped, ["blk.0.ffn_up.weight", "blk.2.ffn_up.weight"], r"equals blk\.2\.ffn_up\.weight"),
    (swapped, ["blk.1.ffn_gate.weight", "blk.1.ffn_up.weight"], "equals blk.1.ffn_up"),
    (swapped, ["blk.0.attn_norm.weight", "blk.1.ffn_norm.weight"], "equals blk.1.ffn_norm"),
    (zeroed, ["blk.1.ffn_down_t.weight", 700], "truncated: only zeros from value 44800"),
    (nudged, ["output.weight"], "1 of 32768 values differ"),
    (nudged, ["blk.0.attn_v.weight"], "1 of 2048 values differ"),
]


@pytest.mark.parametrize(("damage", "args", "cause"), DAMAGES)
def test_a_damaged_tensor_is_named_with_the_cause(check, bundle, damage, args, cause):
    damage(bundle, *args)

    found = failures(check())

    kind = args[0].removesuffix(".weight").rpartition(".")[2]
    assert re.search(f"{re.escape(args[0])}: .*{cause}", found[f"values {kind}"])


def test_swapped_predictors_are_named(check, bundle):
    swapped(bundle, "blk.0.fc2.weight", "blk.1.fc2.weight")

    assert "blk.0.fc2.weight differs from model_0.pt" in failures(check())["predictor folder"]


@pytest.mark.parametrize("keep", [0.3, 0.7, 0.999])
def test_a_truncated_file_fails_and_names_a_tensor(check, bundle, keep):
    path = bundle_file(bundle)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])

    assert re.search(r"tensor \S+\.weight ends at byte .*truncated", failures(check())["container"])


def test_a_nan_is_named(check, bundle):
    on_disk(bundle, "blk.1.fc1.weight")[3, 3] = np.nan

    assert "blk.1.fc1.weight" in failures(check())["finite"]


@pytest.mark.parametrize(
    ("key", "old", "new", "name"),
    [
        (b"llama.rope.freq_base", np.float32(5e4), np.float32(1e4), "header"),
        (b"llama.attention.layer_norm_rms_epsilon", np.float32(1e-6), np.float32(1e-5), "header"),
        (b"powerinfer.sparse_threshold", np.float32(0), np.float32(0.1), "predictor folder"),
        (b"llama.attention.head_count_kv", np.uint32(2), np.uint32(4), "tensors"),
        (b"llama.block_count", np.uint32(3), np.uint32(2), "tensors"),
        (b"llama.block_count", np.uint32(3), np.uint32(4_000_000_000), "metadata"),
        (b"llama.feed_forward_length", np.uint32(1280), np.uint32(1000), "metadata"),
    ],
)
def test_a_changed_key_is_named(check, bundle, key, old, new, name):
    path = bundle_file(bundle)
    content = bytearray(path.read_bytes())
    at = content.index(key) + len(key) + 4
    assert content[at : at + 4] == old.tobytes()
    content[at : at + 4] = new.tobytes()
    path.write_bytes(content)

    found = failures(check())

    assert name in found
    assert key.decode() in found[name] or name in ("tensors", "predictor folder", "metadata")


def test_a_dense_magic_is_named(check, bundle):
    with bundle_file(bundle).open("r+b") as file:
        file.write(b"GGUF")

    assert "expected b'PWRI'" in failures(check())["metadata"]


def test_a_changed_token_is_named(check, bundle):
    path = bundle_file(bundle)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"<0x7F>", b"<0x7f>"))

    assert "<0x7F> is missing" in failures(check())["vocabulary"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (torch.ones(1280, dtype=torch.float16), "no float32"),
        (torch.ones(1279), "shape"),
        (-torch.ones(1280), "no counts"),
        (b"junk", "cannot be read"),
        (None, "missing"),
    ],
)
def test_a_bad_count_file_is_named(check, bundle, content, reason):
    path = bundle / "activation" / "activation_1.pt"
    if content is None:
        path.unlink()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)

    detail = failures(check())["hot and cold"]
    assert "activation_1.pt" in detail
    assert reason in detail


def test_a_sound_bundle_passes_and_writes_its_result(check, tmp_path):
    result = check(json=tmp_path / "verify.json")

    assert result.ok
    value = json.loads((tmp_path / "verify.json").read_text())
    assert value["ok"] is True
    assert value["engine"] is None
    assert {"logits", "perplexity", "values attn_q"} <= {c["name"] for c in value["checks"]}
    assert all(c.keys() == {"name", "ok", "detail"} for c in value["checks"])


def test_the_model_is_found_through_the_manifest(check):
    assert "values ffn_up" in {c.name for c in check(model=None).checks}


def test_values_stay_unchecked_without_the_model(check, bundle):
    path = bundle / "predictor" / "manifest.json"
    path.write_text(path.read_text().replace("/model", "/gone"))

    result = check(model=None)

    assert result.ok
    assert "not checked" in next(c.detail for c in result.checks if c.name == "values")


def test_another_model_fails(check, bundle, model_folder, tmp_path):
    other = Path(shutil.copytree(model_folder, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 1e6
    (other / "config.json").write_text(json.dumps(config))

    assert "llama.rope.freq_base" in failures(check(model=str(other)))["header"]


def test_a_folder_without_a_bundle_is_the_users_error(tmp_path):
    with pytest.raises(InputError, match="holds 0 files"):
        verify(VerifyConfig(bundle=tmp_path))


def test_a_missing_engine_is_the_users_error(bundle, tmp_path):
    with pytest.raises(InputError, match="no executable bin/perplexity"):
        verify(VerifyConfig(bundle=bundle, engine=tmp_path))

"""What export writes, and what it refuses."""

from __future__ import annotations

import json
import resource
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsecast.core.errors import InputError
from sparsecast.export.bundle import bundle_file, file_name
from sparsecast.export.config import ExportConfig
from sparsecast.export.read.reader import GGUFFile
from sparsecast.export.run import export
from sparsecast.predictors.checkpoint import load_predictors


@pytest.fixture
def model(model_folder, tmp_path) -> Path:
    """A copy of the model that a test may change."""
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


def change_config(model: Path, drop: tuple[str, ...] = (), **new: object) -> None:
    path = model / "config.json"
    config = {k: v for k, v in json.loads(path.read_text()).items() if k not in drop}
    path.write_text(json.dumps(config | new))


def change_weights(model: Path, change) -> None:
    weights = load_file(model / "model.safetensors")
    change(weights)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def run(model: Path, predictors: Path, **options: object) -> GGUFFile:
    out = model.parent / "bundle"
    return GGUFFile(
        export(ExportConfig(model=str(model), predictors=predictors, out=out, **options))
    )


def test_the_file_holds_what_powerinfer_wants(bundle_folder):
    file = GGUFFile(bundle_file(bundle_folder))

    assert file.magic == b"PWRI"
    assert file.alignment == 32
    assert file.keys["llama.rope.freq_base"] == 50_000.0
    assert file.keys["llama.attention.head_count_kv"] == 2
    assert file.keys["powerinfer.sparse_threshold"] == 0.0
    assert file.key_types["powerinfer.sparse_threshold"] == 6
    assert file.entries["blk.2.ffn_down_t.weight"].shape == (1280, 64)
    assert file.entries["blk.0.fc1.weight"].shape == (16, 64)
    assert {e.type.name for e in file.entries.values() if len(e.shape) == 1} == {"f32"}
    assert {e.type.name for e in file.entries.values() if len(e.shape) == 2} == {"f16"}


def test_rows_of_k_are_interleaved_head_by_head(bundle_folder, model_folder):
    source = load_file(model_folder / "model.safetensors")["model.layers.1.self_attn.k_proj.weight"]
    stored = GGUFFile(bundle_file(bundle_folder)).tensor("blk.1.attn_k.weight")

    # Two heads of 16: head 1 begins at row 16, its second half at row 24.
    for row, origin in ((0, 0), (1, 8), (2, 1), (15, 15), (16, 16), (17, 24), (18, 17)):
        assert torch.equal(stored[row], source[origin])


def test_f32_leaves_the_down_projection_in_f16(model, predictors):
    file = run(model, predictors, dtype="f32")

    types = {name: entry.type.name for name, entry in file.entries.items()}
    assert types["blk.0.ffn_down_t.weight"] == types["blk.0.fc2.weight"] == "f16"
    assert types["blk.0.ffn_gate.weight"] == types["token_embd.weight"] == "f32"


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 77_000.0},
        {"rope_parameters": {"rope_theta": 77_000.0, "rope_type": "default"}},
        {"rope_theta": 77_000.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_theta": 77_000.0, "rope_type": "linear", "factor": 2.0}},
    ],
)
def test_rope_is_read_in_every_spelling(model, anyones, spelling):
    change_config(model, ("rope_parameters", "rope_theta", "rope_scaling"), **spelling)

    keys = run(model, anyones).keys

    assert keys["llama.rope.freq_base"] == 77_000.0
    assert keys.get("llama.rope.scaling.factor", 1.0) == (2.0 if "factor" in str(spelling) else 1.0)


def test_tied_embeddings_are_written_twice(model, anyones):
    change_config(model, tie_word_embeddings=True)
    change_weights(model, lambda weights: weights.pop("lm_head.weight"))

    file = run(model, anyones)

    assert torch.equal(file.tensor("output.weight"), file.tensor("token_embd.weight"))


def test_rows_beyond_the_tokenizer_get_unique_padding_tokens(model, anyones):
    def grow(weights):
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            weights[name] = torch.cat([weights[name], weights[name][:3]])

    change_weights(model, grow)
    change_config(model, vocab_size=515)

    keys = run(model, anyones).keys

    assert len(set(keys["tokenizer.ggml.tokens"])) == 515
    assert keys["tokenizer.ggml.token_type"][512:] == [5, 5, 5]


def test_counts_and_predictors_stand_beside_the_file(bundle_folder, acts, predictors):
    stats = acts.stats()
    for i in acts.manifest.layers:
        fired = stats.fired(i, ["train", "calibration"])
        counts = torch.load(bundle_folder / "activation" / f"activation_{i}.pt", weights_only=True)
        assert counts.dtype == torch.float32
        assert torch.equal(counts.long(), fired)
    ours, theirs = load_predictors(bundle_folder / "predictor"), load_predictors(predictors)
    assert ours.manifest == theirs.manifest
    assert all(
        torch.equal(a.fc2_FR, b.fc2_FR) for a, b in zip(ours.layers, theirs.layers, strict=True)
    )


def test_the_card_runs_the_file_and_says_what_is_missing(model, predictors):
    file = run(model, predictors)

    card = (file.path.parent / "README.md").read_text()
    assert f'main -m {file.path.name} -t 1 -n 64 --temp 0 --repeat-penalty 1.0 -p " ..."' in card
    assert "No `activation/` folder" in card
    assert "fatrelu(0.2)" in card
    # 16 (64 + 1280) / (3 * 64 * 1280) + 1 - 0.5
    assert "| 0 | 16 | 0.5000 | 0.5000 | 0.5875 |" in card


def test_a_name_never_needs_quoting():
    assert file_name("org/\u6a21\u578b") == "model.powerinfer.gguf"
    assert file_name("org/Some Model $(x).v2") == "Some-Model-x-.v2.powerinfer.gguf"


@pytest.mark.parametrize("limit", [10_000, 300_000, 1_800_000])
def test_a_full_disk_leaves_nothing_behind(model, predictors, limit):
    """The limit stands for the disk's end: in the header, among the tensors, near the end."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OSError, match=r"model\.powerinfer\.gguf"):
            run(model, predictors)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert sorted(p.name for p in model.parent.iterdir()) == ["model"]


def test_a_disk_known_to_be_too_small_is_refused_first(model, predictors, monkeypatch):
    usage = shutil.disk_usage(model)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))

    with pytest.raises(InputError, match="needs 1.94 MB, but only 1 MB are free there"):
        run(model, predictors)


def test_other_files_are_never_replaced(model, predictors):
    run(model, predictors)

    out = model.parent / "bundle"
    shutil.rmtree(out)
    out.mkdir()
    (out / "thesis.tex").touch()
    with pytest.raises(InputError, match="holds other files"):
        run(model, predictors)

    (out / "thesis.tex").unlink()
    assert run(model, predictors).path.parent == out
    (out / "thesis.tex").touch()
    with pytest.raises(InputError, match="holds other files"):
        run(model, predictors)
    (out / "thesis.tex").rename(out / "other.powerinfer.gguf")
    with pytest.raises(InputError, match="holds other files"):
        run(model, predictors)
    assert (out / "other.powerinfer.gguf").exists()


def test_out_may_be_a_link_or_the_current_folder_and_not_the_root(
    model, predictors, tmp_path, monkeypatch
):
    (tmp_path / "there").mkdir()
    (tmp_path / "bundle").symlink_to(tmp_path / "there")
    run(model, predictors)
    assert (tmp_path / "bundle").is_symlink()
    assert bundle_file(tmp_path / "there")

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    cfg = ExportConfig(model=str(model), predictors=predictors, out=Path())
    export(cfg)
    assert bundle_file(tmp_path / "here")
    with pytest.raises(InputError, match="/: cannot be replaced as a whole"):
        export(replace(cfg, out=Path("/")))


def test_a_bundle_of_the_same_inputs_is_kept(model_folder, predictors, acts, tmp_path, capsys):
    cfg = ExportConfig(
        model=str(model_folder), predictors=predictors, out=tmp_path / "b", activations=acts.folder
    )
    path = export(cfg)
    before = path.stat().st_ino

    assert export(cfg) == path

    assert path.stat().st_ino == before
    assert "already exported" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"dtype": "f32"}, "dtype was 'f16', now 'f32'"),
        ({"activations": None}, "activations was "),
        ({"vram_budget": 1.0}, "vram_budget was None, now 1.0; vram_context was None, now 512"),
        ({"activation_threshold": 0.3, "activations": None}, "config was "),
        ({"predictors": "other"}, "predictors was "),
    ],
)
def test_a_bundle_made_otherwise_is_not_replaced(
    options, told, bundle_folder, model_folder, predictors, random_predictors, acts, tmp_path
):
    out = Path(shutil.copytree(bundle_folder, tmp_path / "b"))
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    if "predictors" in options:
        options = {"predictors": random_predictors(tmp_path / "p", str(model_folder), 0.25)}
    same = {
        "model": str(model_folder),
        "predictors": predictors,
        "out": out,
        "activations": acts.folder,
        "force": True,
    }

    with pytest.raises(InputError, match=f"made differently.*{told}.*remove the folder"):
        export(ExportConfig(**{**same, **options}))

    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("damage", ["file", "predictor"])
def test_a_damaged_bundle_is_not_called_exported(damage, bundle, model_folder, predictors, acts):
    path = next(bundle.glob("*.gguf")) if damage == "file" else bundle / "predictor" / "model_1.pt"
    path.write_bytes(path.read_bytes()[:-1000])
    cfg = ExportConfig(
        model=str(model_folder), predictors=predictors, out=bundle, activations=acts.folder
    )
    with pytest.raises(InputError, match="holds a damaged bundle .*; choose another --out or"):
        export(cfg)

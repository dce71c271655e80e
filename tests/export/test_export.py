"""What export writes, and what it refuses."""

from __future__ import annotations

import json
import resource
import shutil
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from sentencepiece import sentencepiece_model_pb2 as proto
from transformers import LlamaConfig, LlamaForCausalLM

from sparsecast.core.errors import InputError
from sparsecast.export.bundle import bundle_file, file_name
from sparsecast.export.config import ExportConfig
from sparsecast.export.read.reader import GGUFFile
from sparsecast.export.run import export
from sparsecast.predictors.checkpoint import PredictorSet, load_predictors


@pytest.fixture
def model(model_folder, tmp_path) -> Path:
    """A copy of the model that a test may change."""
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


@pytest.fixture
def anyones(predictors, tmp_path) -> Path:
    """The predictors as PowerInfer publishes them: without a manifest, so without a fingerprint."""
    folder = Path(shutil.copytree(predictors, tmp_path / "anyones"))
    (folder / "manifest.json").unlink()
    return folder


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


def test_the_file_holds_what_powerinfer_wants(made):
    file = GGUFFile(bundle_file(made))

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


def test_rows_of_k_are_interleaved_head_by_head(made, model_folder):
    source = load_file(model_folder / "model.safetensors")["model.layers.1.self_attn.k_proj.weight"]
    stored = GGUFFile(bundle_file(made)).tensor("blk.1.attn_k.weight")

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


def test_counts_and_predictors_stand_beside_the_file(made, acts, predictors):
    stats = acts.stats()
    for i in acts.manifest.layers:
        fired = stats.fired(i, ["train", "calibration"])
        counts = torch.load(made / "activation" / f"activation_{i}.pt", weights_only=True)
        assert counts.dtype == torch.float32
        assert torch.equal(counts.long(), fired)
    ours, theirs = load_predictors(made / "predictor"), load_predictors(predictors)
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


def bias(weights):
    weights["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64, dtype=torch.float16)


def q_norm(weights):
    weights["model.layers.0.self_attn.q_norm.weight"] = torch.ones(16, dtype=torch.float16)


def infinite(weights):
    weights["model.layers.1.mlp.up_proj.weight"] = torch.full((1280, 64), 7e4)


def lose(weights):
    del weights["model.layers.2.mlp.up_proj.weight"]


def wrong_shape(weights):
    weights["model.norm.weight"] = torch.ones(63, dtype=torch.float16)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (bias, "q_proj.bias, but the engine's llama has no bias there"),
        (q_norm, "q_norm.weight, but the engine's llama has no tensor of that name"),
        (infinite, r"blk\.1\.ffn_up\.weight: holds 70000"),
        (lose, r"layers\.2\.mlp\.up_proj\.weight is missing"),
        (wrong_shape, r"model\.norm\.weight is \[63\], but config.json describes \[64\]"),
    ],
)
def test_weights_the_engine_cannot_express_are_refused(model, anyones, change, reason):
    change_weights(model, change)

    with pytest.raises(InputError, match=reason):
        run(model, anyones)
    assert not (model.parent / "bundle").exists()


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"hidden_act": "silu"}, "no exact zeros"),
        ({"model_type": "qwen2"}, "model_type is 'qwen2': its attention has biases"),
        ({"model_type": "qwen3"}, "model_type is 'qwen3': it normalizes q and k"),
        ({"model_type": "granite"}, "'granite': it scales .* convert it to LLaMA format"),
        ({"attention_bias": True}, "attention_bias is true"),
        ({"mlp_bias": True}, "mlp_bias is true"),
        ({"head_dim": 32}, "head_dim is 32"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope type is 'dynamic'"),
        (
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 5e5,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                }
            },
            "rope type is 'llama3'",
        ),
        ({"vocab_size": 300}, "512 pieces, but the model's embedding has 300|is .512, 64"),
    ],
)
def test_configs_the_engine_cannot_express_are_refused(model, anyones, config, reason):
    drop = ("rope_parameters",) if "rope_scaling" in config else ()
    change_config(model, drop, **config)

    with pytest.raises(InputError, match=reason):
        run(model, anyones)


def test_a_narrow_ffn_is_refused(model, anyones):
    config = LlamaConfig.from_pretrained(model)
    config.intermediate_size = 1000
    config.hidden_act = "relu"
    LlamaForCausalLM(config).save_pretrained(model)

    with pytest.raises(InputError, match="1000 wide, expected more than 1000"):
        run(model, anyones)


def test_a_unigram_vocabulary_is_refused(model, anyones, corpus):
    lines = (line for path in corpus.iterdir() for line in path.read_text().splitlines())
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_prefix=str(model / "tokenizer"),
        vocab_size=512,
        model_type="unigram",
        byte_fallback=True,
        minloglevel=2,
    )

    with pytest.raises(InputError, match="unigram"):
        run(model, anyones)


def rules_of(name):
    """The compiled rules of one of sentencepiece's normalizations."""
    trained = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d e"] * 20),
        model_writer=trained,
        vocab_size=12,
        model_type="bpe",
        normalization_rule_name=name,
        minloglevel=2,
    )
    spec = proto.ModelProto()
    spec.ParseFromString(trained.getvalue())
    return spec.normalizer_spec.precompiled_charsmap


@pytest.mark.parametrize("change", [{"name": "nmt_nfkc"}, {"add_dummy_prefix": False}])
def test_a_vocabulary_that_prepares_text_otherwise_is_refused(model, anyones, change):
    path = model / "tokenizer.model"
    spec = proto.ModelProto()
    spec.ParseFromString(path.read_bytes())
    for name, value in change.items():
        setattr(spec.normalizer_spec, name, value)
    if "name" in change:
        spec.normalizer_spec.precompiled_charsmap = rules_of(change["name"])
    path.write_bytes(spec.SerializeToString())

    with pytest.raises(InputError, match=r"tokenizer\.model: prepares text by"):
        run(model, anyones)


def test_predictors_of_another_model_are_refused(model, predictors):
    change_weights(model, lambda weights: weights["model.norm.weight"].mul_(2))

    with pytest.raises(InputError, match="fingerprint"):
        run(model, predictors)


def test_predictors_of_another_shape_are_refused(model, anyones):
    layers = load_predictors(anyones).layers
    PredictorSet([replace(p, fc2_FR=p.fc2_FR[:1024]) for p in layers], 0.0, None).save(anyones)

    with pytest.raises(InputError, match=r"model_0\.pt has fc1 \(16, 64\) and fc2 \(1024, 16\)"):
        run(model, anyones)


def test_activations_of_another_model_are_refused(model, anyones, acts):
    change_weights(model, lambda weights: weights["model.norm.weight"].mul_(2))

    with pytest.raises(InputError, match="was recorded from"):
        run(model, anyones, activations=acts.folder)


def test_activations_in_which_nothing_fires_are_refused(model, predictors, acts, edit_store):
    def silence(tensors):
        for name in tensors:
            if name.endswith("mask"):
                tensors[name].zero_()

    silent = edit_store(acts, model.parent / "acts", silence)
    with pytest.raises(InputError, match="nothing fires in any layer on 6,000 tokens"):
        run(model, predictors, activations=silent.folder)
    assert sorted(p.name for p in model.parent.iterdir()) == ["acts", "model"]


def test_activations_at_another_threshold_are_refused(model, predictors, acts, edit_store):
    other = edit_store(acts, model.parent / "acts", lambda _: None, activation_threshold=0.3)
    with pytest.raises(
        InputError, match=r"with fatrelu\(0\.3\), but the export uses fatrelu\(0\.2\)"
    ):
        run(model, predictors, activations=other.folder)


def test_predictors_are_no_activations(model, predictors):
    with pytest.raises(InputError, match="holds predictors .*; expected activations"):
        run(model, predictors, activations=predictors)


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


def test_quantized_weights_and_an_index_that_lies_are_refused(model, anyones, tmp_path):
    """Without a look at the dtype int8 codes would be written as if they were weights."""
    whole = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    change_weights(model, lambda weights: weights.update({name: weights[name].to(torch.int8)}))
    with pytest.raises(InputError, match=f"{name} is int8, expected float32"):
        run(model, anyones)
    change_config(model, quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(InputError, match="quantized \\(bitsandbytes\\)"):
        run(model, anyones)

    change_config(model, drop=("quantization_config",))
    (model / "model.safetensors").rename(model / "a.safetensors")
    save_file({"spare.weight": whole["lm_head.weight"]}, model / "b.safetensors")
    places = {"weight_map": dict.fromkeys(whole, "a.safetensors") | {name: "b.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(places))
    with pytest.raises(InputError, match=f"b.safetensors: tensor {name} is not in it, but the ind"):
        run(model, anyones)


def test_an_output_matrix_of_its_own_under_a_config_that_ties_it_is_refused(model, anyones):
    """transformers computes with it; the embedding in its place would be another model."""
    change_config(model, tie_word_embeddings=True)
    with pytest.raises(InputError, match="lm_head.weight is not model.embed_tokens.weight, but"):
        run(model, anyones)

    def copy(weights):
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()

    change_weights(model, copy)
    file = run(model, anyones)
    assert torch.equal(file.tensor("output.weight"), file.tensor("token_embd.weight"))


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
    options, told, made, model_folder, predictors, random_predictors, acts, tmp_path
):
    out = Path(shutil.copytree(made, tmp_path / "b"))
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

"""Every architecture of PowerInfer's: exported, verified, and evaluated by the engine itself."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsecast.cli.bench.engine import BenchEngineConfig, bench_engine
from sparsecast.collect.config import CollectConfig
from sparsecast.collect.run import collect
from sparsecast.core.errors import InputError
from sparsecast.core.models.loading import load_model
from sparsecast.export.bundle import bundle_file
from sparsecast.export.checks.logits import model_logits, with_relu
from sparsecast.export.checks.metadata import check_metadata
from sparsecast.export.config import ExportConfig, VerifyConfig
from sparsecast.export.engine.emulator import Emulator
from sparsecast.export.engine.process import engine_perplexity
from sparsecast.export.engine.protocol import chunks_of, held_out_documents, joined, perplexity
from sparsecast.export.read.reader import GGUFFile
from sparsecast.export.read.vocab import tokenizer_of
from sparsecast.export.run import export
from sparsecast.export.verify import verify
from sparsecast.predictors.checkpoint import load_predictors
from sparsecast.predictors.config import TrainConfig
from sparsecast.predictors.model_in_loop import predictors_in_loop
from sparsecast.predictors.train import train

NAMES = (
    "llama",
    "llama-grouped",
    "llama-tied",
    "minicpm",
    "bamboo",
    "falcon-7b",
    "falcon-heads",
    "falcon-40b",
    "falcon-11b",
    "opt",
)
QUICK = ("llama-grouped", "bamboo", "falcon-7b", "opt")
SOME_SLOW = [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES
]


@pytest.fixture(scope="session")
def exported(once, zoo, random_predictors):
    """(architecture, dtype, predictors) to a bundle's folder; not to be written to."""

    def bundle(name: str, dtype: str, kind: str = "f16") -> Path:
        model = str(zoo(name))
        predictors = once(
            f"predictors-{name}-{kind}",
            lambda folder: random_predictors(folder, model, dtypes=(kind,) * 3),
        )

        def build(out: Path) -> None:
            export(ExportConfig(model=model, predictors=predictors, out=out, dtype=dtype))

        return once(f"{name}-{dtype}-{kind}", build)

    return bundle


@pytest.fixture(scope="module")
def ids_NS():
    return torch.randint(3, 512, (3, 100), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("name", SOME_SLOW)
@pytest.mark.parametrize("dtype", ["f16", "q4_0"])
def test_a_bundle_of_every_architecture_verifies(exported, corpus, name, dtype):
    result = verify(VerifyConfig(bundle=exported(name, dtype), corpus=str(corpus), tokens=512))

    assert result.ok, [check for check in result.checks if not check.ok]


@pytest.mark.parametrize("name", NAMES)
def test_our_evaluation_is_transformers_with_the_mask_put_in_by_hooks(exported, zoo, ids_NS, name):
    """In f32, where only decisions within rounding of the threshold differ, and x1 in f16."""
    bundle = exported(name, "f32")
    emulator = Emulator(GGUFFile(bundle_file(bundle)))
    model = with_relu(load_model(str(zoo(name)), device="cpu", dtype="float32")[0])
    dense_NSV = model_logits(model, ids_NS)
    with predictors_in_loop(model, load_predictors(bundle / "predictor")):
        masked_NSV = model_logits(model, ids_NS)
    spread = dense_NSV.std()

    dense_difference = (emulator.logits(ids_NS, all_active=True) - dense_NSV).abs()
    difference_NS = (emulator.logits(ids_NS) - masked_NSV).abs().amax(-1)

    assert dense_difference.max() < 1e-2 * spread
    assert dense_difference.mean() < 1e-3 * spread
    assert difference_NS.median() < 1e-2 * spread
    assert (masked_NSV - dense_NSV).abs().amax(-1).median() > 0.1 * spread


def test_an_opt_is_evaluated_without_its_norms_epsilon(exported, zoo):
    """As its engine does; on inputs so small that an epsilon would show."""
    emulator = Emulator(GGUFFile(bundle_file(exported("opt", "f16"))))
    model = load_model(str(zoo("opt")), device="cpu", dtype="float32")[0]
    twin = with_relu(model)
    x_TD = 1e-3 * torch.randn(5, 64)

    for i, layer in enumerate(twin.model.decoder.layers):
        own = model.model.decoder.layers[i].self_attn_layer_norm
        want = torch.nn.functional.layer_norm(x_TD, (64,), own.weight, own.bias, 0.0)
        for got in (layer.self_attn_layer_norm(x_TD), emulator._norm(x_TD, f"blk.{i}.attn_norm")):
            assert torch.allclose(got, want, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(own(x_TD), want, rtol=1e-2)


@pytest.mark.parametrize("name", NAMES)
def test_the_ffn_matters_in_these_models(exported, corpus, name):
    """Otherwise no test here would see a wrong mask."""
    file = GGUFFile(bundle_file(exported(name, "f16")))
    tokenizer = tokenizer_of(file)
    ids_NS = chunks_of(joined(held_out_documents(str(corpus), tokenizer, 512)), tokenizer, 512)
    emulator = Emulator(file)
    dense = perplexity(lambda ids: emulator.logits(ids, all_active=True), ids_NS)
    emulator.header = emulator.header._replace(threshold=1e30)
    masked = perplexity(emulator.logits, ids_NS)

    assert abs(masked / dense - 1) > 0.2


def damaged(bundle: Path, tmp_path: Path, change) -> Path:
    copy = Path(shutil.copytree(bundle, tmp_path / "damaged"))
    file = GGUFFile(bundle_file(copy))
    raw = bytearray(file.path.read_bytes())
    change(file, raw)
    file.path.write_bytes(raw)
    return copy


def put(raw: bytearray, file: GGUFFile, name: str, values: torch.Tensor) -> None:
    entry = file.entries[name]
    data = values.contiguous().numpy().tobytes()
    assert len(data) == entry.nbytes
    raw[entry.start : entry.start + entry.nbytes] = data


def groups_together(file, raw):
    """Rows as transformers has them: query, key and value of each group in turn."""
    weight = file.tensor("blk.1.attn_qkv.weight")
    q, k, v = weight.split([64, 32, 32])
    parts = [q.view(2, 2, 16, 64), k.view(2, 1, 16, 64), v.view(2, 1, 16, 64)]
    put(raw, file, "blk.1.attn_qkv.weight", torch.cat(parts, 1).reshape(weight.shape))


def norms_swapped(file, raw):
    first, second = (file.tensor(f"blk.0.{n}.weight").clone() for n in ("attn_norm", "attn_norm_2"))
    put(raw, file, "blk.0.attn_norm.weight", second)
    put(raw, file, "blk.0.attn_norm_2.weight", first)


def bias_lost(file, raw):
    put(raw, file, "blk.2.ffn_up.bias", torch.zeros(1280))


def positions_shifted(file, raw):
    rows = file.tensor("position_embd.weight")
    put(raw, file, "position_embd.weight", rows.roll(-2, 0))


@pytest.mark.parametrize(
    ("name", "change", "check", "detail"),
    [
        (
            "falcon-40b",
            groups_together,
            "values attn_qkv",
            "not all queries, then all keys, then all values",
        ),
        ("falcon-40b", norms_swapped, "values attn_norm", "equals blk.0.attn_norm_2.weight"),
        ("opt", bias_lost, "values ffn_up", "blk.2.ffn_up.bias: truncated: only zeros"),
        ("opt", positions_shifted, "values position_embd", "values differ"),
    ],
)
def test_what_verify_says_of_damage(exported, corpus, tmp_path, name, change, check, detail):
    bundle = damaged(exported(name, "f16"), tmp_path, change)

    result = verify(VerifyConfig(bundle=bundle, corpus=str(corpus), tokens=256))

    found = {c.name: c.detail for c in result.checks if not c.ok}
    assert detail in found[check]


def renamed(bundle: Path, tmp_path: Path, old: bytes, new: bytes) -> Path:
    """Keys and architecture under another name of the same length."""
    copy = Path(shutil.copytree(bundle, tmp_path / "renamed"))
    path = bundle_file(copy)
    raw = path.read_bytes()
    start = GGUFFile(path).data_start
    path.write_bytes(raw[:start].replace(old, new) + raw[start:])
    return copy


def test_a_file_of_another_architecture_is_seen(exported, corpus, tmp_path):
    bundle = renamed(exported("bamboo", "f16"), tmp_path, b"bamboo", b"baboon")

    result = verify(VerifyConfig(bundle=bundle, corpus=str(corpus), tokens=256))

    (failed,) = (c for c in result.checks if not c.ok)
    assert failed.name == "metadata"
    assert "general.architecture is 'baboon', expected one of llama, bamboo" in failed.detail


@pytest.mark.parametrize("name", ["rope.scaling.factor", "rope.scale_linear"])
def test_a_falcon_with_scaled_positions_is_seen(exported, name):
    file = GGUFFile(bundle_file(exported("falcon-7b", "f16")))
    assert check_metadata(file).ok
    file.keys[f"falcon.{name}"], file.key_types[f"falcon.{name}"] = 2.0, 6

    assert f"falcon.{name} is not 1" in check_metadata(file).detail


def changed_config(folder: Path, tmp_path: Path, **change: object) -> Path:
    copy = Path(shutil.copytree(folder, tmp_path / "model"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, **change}))
    return copy


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("falcon-7b", {"alibi": True}, "alibi is true, but the engine's falcon"),
        ("falcon-7b", {"bias": True}, "bias is true, but the engine's falcon"),
        (
            "falcon-7b",
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            "divides positions by the factor twice",
        ),
        ("falcon-7b", {"parallel_attn": False}, "parallel_attn is false"),
        ("falcon-7b", {"activation": "gelu"}, "'gelu', which leaves no exact zeros"),
        ("falcon-7b", {"ffn_hidden_size": 1000}, "the FFN is 1000 wide"),
        ("falcon-40b", {"num_ln_in_parallel_attn": 1}, "holds .*ln_attn.* has no"),
        ("opt", {"max_position_embeddings": 1024}, "max_position_embeddings is 1024.* only 2048"),
        ("opt", {"word_embed_proj_dim": 32}, "word_embed_proj_dim is 32"),
        ("opt", {"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ("opt", {"enable_bias": False}, "enable_bias is False"),
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before is false"),
        ("bamboo", {"hidden_act": "silu"}, "hidden_act is 'silu'"),
    ],
)
def test_what_the_engine_cannot_express_is_refused(zoo, predictors, tmp_path, name, change, reason):
    model = changed_config(zoo(name), tmp_path, **change)

    with pytest.raises(InputError, match=reason):
        export(ExportConfig(model=str(model), predictors=predictors, out=tmp_path / "b"))
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(("name", "prefix"), [("opt", "model."), ("falcon-40b", "transformer.")])
def test_names_of_a_model_saved_without_its_head_are_known(
    zoo, exported, tmp_path, random_predictors, name, prefix
):
    model = Path(shutil.copytree(zoo(name), tmp_path / "model"))
    weights = load_file(model / "model.safetensors")
    renamed = {key.removeprefix(prefix): weight for key, weight in weights.items()}
    save_file(renamed, model / "model.safetensors", {"format": "pt"})
    random_predictors(tmp_path / "p", str(model))

    bundle = export(ExportConfig(model=str(model), predictors=tmp_path / "p", out=tmp_path / "b"))

    want, got = GGUFFile(bundle_file(exported(name, "f16"))), GGUFFile(bundle)
    assert list(got.entries) == list(want.entries)
    for tensor in want.entries:
        assert torch.equal(got.tensor(tensor), want.tensor(tensor))


@pytest.mark.parametrize(
    ("name", "kind"),
    [("falcon-7b", "RefinedWebModel"), ("falcon-40b", "RefinedWeb"), ("falcon-40b", "falcon")],
)
def test_falcons_first_config_is_read(
    zoo, exported, tmp_path, random_predictors, corpus, name, kind
):
    new = json.loads((zoo(name) / "config.json").read_text())
    old = {"model_type": kind, "n_layer": new["num_hidden_layers"], "n_head": 4}
    same = ("hidden_size", "vocab_size", "activation", "multi_query", "parallel_attn", "bias")
    old |= {field: new[field] for field in (*same, "alibi", "ffn_hidden_size")}
    old |= {"n_head_kv": 2} if name == "falcon-40b" else {}
    old |= {"new_decoder_architecture": True} if kind == "falcon" else {}
    old["max_position_embeddings"] = new["max_position_embeddings"]
    model = Path(shutil.copytree(zoo(name), tmp_path / "model"))
    (model / "config.json").write_text(json.dumps(old))
    random_predictors(tmp_path / "p", str(model))

    bundle = export(ExportConfig(model=str(model), predictors=tmp_path / "p", out=tmp_path / "b"))

    want, got = GGUFFile(bundle_file(exported(name, "f16"))), GGUFFile(bundle)
    for tensor in want.entries:
        assert torch.equal(got.tensor(tensor), want.tensor(tensor))
    assert verify(VerifyConfig(bundle=tmp_path / "b", corpus=str(corpus), tokens=256)).ok


def test_the_window_of_a_bamboo_is_told(zoo, random_predictors, tmp_path):
    model = changed_config(zoo("bamboo"), tmp_path, sliding_window=128)
    random_predictors(tmp_path / "p", str(model))

    export(ExportConfig(model=str(model), predictors=tmp_path / "p", out=tmp_path / "b"))

    card = " ".join((tmp_path / "b" / "README.md").read_text().split())
    assert "attends to the last 128 tokens; PowerInfer attends to all" in card


def within(result, bound: float) -> None:
    """The engine's perplexity, and its probabilities within 1e-3 at 99 % of positions."""
    assert result.ok, [check for check in result.checks if not check.ok]
    assert result.engine.perplexity == pytest.approx(result.engine.reference, rel=bound)
    (detail,) = (check.detail for check in result.checks if check.name == "engine outliers")
    near, total = map(int, re.match(r"(\d+) of (\d+) positions", detail).groups())
    assert near >= 0.99 * total, detail


@pytest.mark.engine
@pytest.mark.parametrize(
    "name", [*NAMES, "granite", "bamboo-bytes", "falcon-7b-bytes", "opt-bytes"]
)
@pytest.mark.parametrize(("dtype", "kind", "bound"), [("f16", "f16", 2e-3), ("q4_0", "q4_0", 5e-3)])
def test_the_engine_computes_every_architecture_as_we_do(
    engine, exported, corpus, name, dtype, kind, bound
):
    bundle = exported(name, dtype, kind)

    within(verify(VerifyConfig(bundle=bundle, corpus=str(corpus), engine=engine)), bound)

    if name.endswith("-bytes"):  # the engine cuts text otherwise; by ids see test_engine_vocab.py
        return
    file = GGUFFile(bundle_file(bundle))
    tokenizer = tokenizer_of(file)
    text = joined(held_out_documents(str(corpus), tokenizer, 2048))
    ids_NS = chunks_of(text, tokenizer, 2048)
    emulator = Emulator(file)
    dense = perplexity(lambda ids: emulator.logits(ids, all_active=True), ids_NS)
    theirs = engine_perplexity(engine, file.path, text, len(ids_NS), all_active=True)
    assert theirs == pytest.approx(dense, rel=bound)


@pytest.mark.engine
@pytest.mark.parametrize(("name", "dense"), [("opt", True), ("bamboo", True), ("falcon-7b", False)])
def test_the_engine_is_timed_dense_where_it_can_run_dense(engine, exported, name, dense):
    cfg = BenchEngineConfig(bundle=exported(name, "f16"), engine=engine, tokens=8, rounds=1)

    rates = {row["kind"]: row["tokens_per_s"] for row in bench_engine(cfg)["rows"]}

    assert rates["predictors"] > 0
    assert ("dense" in rates) == dense


@pytest.mark.engine
@pytest.mark.parametrize("name", [*NAMES, "opt-bytes"])
@pytest.mark.parametrize(("dtype", "bound"), [("f16", 2e-3), ("q4_0", 5e-3)])
def test_the_engine_computes_trained_predictors_as_we_do(
    engine, zoo, corpus, tmp_path, name, dtype, bound
):
    model = str(zoo(name))
    collect(
        CollectConfig(
            model=model, corpus=str(corpus), out=tmp_path / "acts", tokens=6000, seq_len=128
        )
    )
    train(
        TrainConfig(
            activations=tmp_path / "acts",
            out=tmp_path / "pred",
            rank=32,
            epochs=2,
            batch_size=256,
            predictor_dtype="f16" if dtype == "f16" else "q4_0",
        )
    )
    cfg = ExportConfig(model=model, predictors=tmp_path / "pred", out=tmp_path / "b", dtype=dtype)
    export(cfg)

    within(verify(VerifyConfig(bundle=cfg.out, corpus=str(corpus), engine=engine)), bound)

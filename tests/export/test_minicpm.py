"""A MiniCPM's scales in its bundle: what verify sees, predictors, and the bundle in transformers.

`test_architectures.py` verifies bundles of a MiniCPM and a Granite and runs them in the engine.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from native_minicpm import SCALES, save_minicpm
from transformers import AutoTokenizer

from sparsecast.collect.config import CollectConfig
from sparsecast.collect.run import collect
from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.core.models.loading import load_model
from sparsecast.core.models.perplexity import perplexity as batch_perplexity
from sparsecast.core.text.tokens import TokenBatch
from sparsecast.export.bundle import bundle_file
from sparsecast.export.checks.logits import model_logits
from sparsecast.export.checks.sources import Source, factors, ties
from sparsecast.export.checks.values import check_values
from sparsecast.export.config import ExportConfig, VerifyConfig
from sparsecast.export.engine.emulator import Emulator
from sparsecast.export.engine.process import binary, run_to_end
from sparsecast.export.engine.protocol import perplexity
from sparsecast.export.finished import find_finished
from sparsecast.export.plan import plan_export
from sparsecast.export.read.reader import GGUFFile
from sparsecast.export.run import export
from sparsecast.export.to_llama.config import ConvertConfig
from sparsecast.export.to_llama.run import convert
from sparsecast.export.verify import verify
from sparsecast.export.write import tensor_plan
from sparsecast.kernels.in_models.sparsify import sparsify_model
from sparsecast.predictors.checkpoint import load_predictors
from sparsecast.predictors.evaluate import perplexities


@pytest.fixture(scope="module")
def native(once, model_folder) -> Path:
    return once("native-minicpm", lambda folder: save_minicpm(folder, model_folder))


@pytest.fixture(scope="module")
def llama(once, native) -> Path:
    return once(
        "minicpm-as-llama",
        lambda folder: convert(ConvertConfig(model=str(native), to="llama", out=folder)),
    )


@pytest.fixture
def bundle_of(random_predictors, tmp_path):
    def make(model: Path, dtype: str = "f16", name: str = "b") -> Path:
        predictors = random_predictors(tmp_path / f"p-{name}", str(model))
        cfg = ExportConfig(
            model=str(model), predictors=predictors, out=tmp_path / name, dtype=dtype
        )
        return export(cfg).parent

    return make


@pytest.mark.parametrize("dtype", ["f32", "q4_0"])
def test_both_forms_give_the_same_bundle(native, llama, bundle_of, dtype):
    """The MiniCPM itself, and the LLaMA that `convert` makes of it."""
    one, other = (
        GGUFFile(bundle_file(bundle_of(model, dtype, name)))
        for name, model in (("native", native), ("llama", llama))
    )

    assert one.entries.keys() == other.entries.keys()
    for name in one.entries:
        assert torch.equal(one.tensor(name), other.tensor(name)), name
    own = {"general.name", "sparsecast.recipe", "sparsecast.model_fingerprint"}
    assert {k: v for k, v in one.keys.items() if k not in own} == {
        k: v for k, v in other.keys.items() if k not in own
    }


def forgotten(scales):
    return None


def doubled(scales):
    return type(scales)(scales.embedding, 2 * scales.residual, scales.logits, scales.attention)


def head_multiplied(scales):
    return type(scales)(scales.embedding, scales.residual, 1 / scales.logits, scales.attention)


@pytest.mark.parametrize(
    ("fault", "kinds"),
    [
        (forgotten, {"token_embd", "output", "attn_output", "ffn_down_t"}),
        (doubled, {"attn_output", "ffn_down_t"}),
        (head_multiplied, {"output"}),
    ],
)
def test_verify_sees_a_wrong_fold(native, bundle_of, monkeypatch, fault, kinds):
    own = tensor_plan.factor_of
    monkeypatch.setattr(
        tensor_plan,
        "factor_of",
        lambda target, source, scales: own(target, source, fault(scales)),
    )
    file = GGUFFile(bundle_file(bundle_of(native)))

    checks = check_values(Source(Checkpoint(str(native)), file))

    wrong = {check.name.removeprefix("values ") for check in checks if not check.ok}
    assert wrong == kinds


def test_factors_by_the_formulas():
    minicpm = {"hidden_size": 1536, "num_hidden_layers": 52, "dim_model_base": 256}
    minicpm |= {"scale_emb": 12, "scale_depth": 1.4, "architectures": ["MiniCPMForCausalLM"]}
    for config in (minicpm, {**minicpm, "model_type": "minicpm"}):
        found = factors(config)
        assert found["token_embd"] == 12
        assert found["output"] == pytest.approx(1 / 6)
        assert found["attn_output"] == found["ffn_down_t"] == pytest.approx(0.194145, rel=1e-5)
        assert "attn_q" not in found
        assert ties(config, "llama")
    granite = {"model_type": "granite", "hidden_size": 64, "num_attention_heads": 4}
    assert factors(granite)["attn_q"] == 4  # attention_multiplier is 1 where it is not named
    assert factors({**granite, "attention_multiplier": 0.25})["attn_q"] == 1
    # MiniCPM-S in LLaMA format still lists the scales.
    assert factors({**minicpm, "model_type": "llama"}) == {}
    assert not ties({**minicpm, "model_type": "llama"}, "llama")


def test_predictors_carry_over(native, llama, corpus, tmp_path):
    """What predictors read and are trained for has the same values in both forms."""
    stores = [
        collect(
            CollectConfig(
                model=str(model),
                corpus=str(corpus),
                out=tmp_path / model.name,
                tokens=600,
                seq_len=64,
                input_dtype="float32",
                device="cpu",
            )
        )
        for model in (native, llama)
    ]
    for layer in range(3):
        mine, theirs = (store.rows("train", 0, layer) for store in stores)
        assert (mine.x_TD - theirs.x_TD).abs().max() < 1e-5 * mine.x_TD.abs().max()
        apart = (mine.mask_TP != theirs.mask_TP).float().mean()
        assert apart < 1e-4
    assert mine.x_TD.abs().max() > 1  # scaled embeddings are in it


def test_a_granites_bundle_verifies(zoo, bundle_of, corpus):
    """With another factor of the scores, which is in q, and an output matrix of its own."""
    bundle = bundle_of(zoo("granite"))

    result = verify(VerifyConfig(bundle=bundle, corpus=str(corpus), tokens=256))

    assert result.ok, [check for check in result.checks if not check.ok]
    assert "q by 1.6." in (bundle / "README.md").read_text()


def test_the_card_says_it(native, bundle_of):
    card = " ".join((bundle_of(native) / "README.md").read_text().split())

    assert "## Scales The model scales embeddings, residuals and logits" in card
    assert "embedding is multiplied by 12, the output matrix divided by 4" in card
    assert "the down projection multiplied by 0.80829." in card


def test_a_finished_bundle_of_other_scales_is_another(native, bundle_of, tmp_path):
    bundle = bundle_of(native)
    model = Path(shutil.copytree(native, tmp_path / "native-minicpm"))
    path = model / "config.json"

    def plan():
        return plan_export(ExportConfig(model=str(model), predictors=tmp_path / "p-b", out=bundle))

    assert find_finished(plan()) == bundle_file(bundle)
    path.write_text(json.dumps({**json.loads(path.read_text()), "scale_emb": 13}))
    with pytest.raises(ValueError, match="made differently .config was"):
        find_finished(plan())
    assert SCALES["scale_emb"] == 12


@pytest.fixture(scope="module")
def ids_NS():
    return torch.randint(3, 512, (4, 64), generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize(("name", "dtype"), [("minicpm", "q4_0"), ("granite", "f16")])
def test_in_transformers_the_bundle_has_no_scales_left(
    zoo, bundle_of, ids_NS, tmp_path, name, dtype
):
    """The weights are the file's, and the model runs, saves and loads as a llama would."""
    bundle = bundle_of(zoo(name), dtype)
    file = GGUFFile(bundle_file(bundle))
    model, tokenizer = load_model(str(zoo(name)), device="cpu", dtype="float32")

    sparsify_model(model, bundle, "exact")

    dense = perplexity(lambda ids: Emulator(file).logits(ids, all_active=True), ids_NS)
    assert perplexity(lambda ids: model_logits(model, ids), ids_NS) == pytest.approx(
        dense, rel=0.02
    )
    embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
    assert torch.equal(embedding, file.tensor("token_embd.weight").float())
    assert torch.equal(head, file.tensor("output.weight").float())
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    again, _ = load_model(str(tmp_path / "saved"), device="cpu", dtype="float32")
    assert torch.allclose(model_logits(again, ids_NS), model_logits(model, ids_NS), atol=1e-5)


@pytest.mark.parametrize("name", ["minicpm", "granite"])
def test_evaluates_bundle_is_the_file(zoo, bundle_of, ids_NS, name):
    """The weights that `bundle` of evaluate computes with are the file's, times the scales."""
    bundle = bundle_of(zoo(name))
    file = GGUFFile(bundle_file(bundle))
    model, _ = load_model(str(zoo(name)), device="cpu", dtype="float32")
    batch = TokenBatch("held-out", ids_NS, torch.ones_like(ids_NS, dtype=torch.bool))

    values = perplexities(model, load_predictors(bundle / "predictor"), [batch])

    other, _ = load_model(str(zoo(name)), device="cpu", dtype="float32")
    sparsify_model(other, bundle, "predicted")
    assert values["bundle"] == pytest.approx(batch_perplexity(other, [batch]), rel=1e-3)
    scales = {
        "token_embd.weight": (model.model.embed_tokens.weight, 3.0),
        "output.weight": (model.lm_head.weight, 24 / 64),
        "blk.1.ffn_down_t.weight": (model.model.layers[1].mlp.down_proj.weight.T, 1.4 / 3**0.5),
    }
    for key, (weight, factor) in scales.items():
        assert torch.allclose(weight * factor, file.tensor(key).float(), rtol=1e-6, atol=1e-9)


@pytest.mark.engine
def test_the_engine_answers_a_chat_behind_bos(engine, zoo, llama, bundle_of, tmp_path):
    """`main` puts BOS before the template's text, and continues as our evaluation does."""
    bundle = bundle_of(zoo("minicpm"))
    path = bundle_file(bundle)
    turns = [{"role": "user", "content": "def mean(values):"}]
    tokenizer = AutoTokenizer.from_pretrained(llama)
    chat = tokenizer.apply_chat_template(turns, tokenize=False)
    ids = tokenizer.apply_chat_template(turns)["input_ids"]
    emulator = Emulator(GGUFFile(path))

    def greedy(ids: list[int]) -> str:
        ids, start = list(ids), len(tokenizer.decode(ids))
        for _ in range(12):
            ids.append(int(emulator.logits(torch.tensor([ids]))[0, -1].argmax()))
        return tokenizer.decode(ids)[start:]

    prompt = " " + chat.removeprefix("<s>")
    command = [str(binary(engine, "main")), "-m", str(path), "-p", prompt, "-n", "12", "-t", "1"]
    command += ["--temp", "0", "--repeat-penalty", "1.0", "--memory-f32", "--verbose-prompt"]
    code, said, told = run_to_end(command, str(tmp_path))

    assert code == 0
    assert chat == "<s><用户>def mean(values):<AI>"
    assert ids[0] == tokenizer.bos_token_id == 1
    assert [int(number) for number in re.findall(r"^ *(\d+) -> '", told, re.MULTILINE)] == ids
    assert said.partition(prompt)[2].rstrip() == greedy(ids).rstrip()

"""PowerInfer's own binaries on vocabularies of either kind."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.core.tokenizers.loading import load_tokenizer
from sparsecast.export.bundle import bundle_file
from sparsecast.export.checks.engine import replies_to
from sparsecast.export.checks.engine_text import check_perplexity_by_ids, check_tokenization
from sparsecast.export.config import ExportConfig, VerifyConfig
from sparsecast.export.engine.emulator import Emulator
from sparsecast.export.engine.process import Launch
from sparsecast.export.engine.protocol import chunks_of, held_out_documents, joined
from sparsecast.export.engine.replies import Spelling
from sparsecast.export.read.reader import GGUFFile
from sparsecast.export.read.vocab import tokenizer_of
from sparsecast.export.run import export
from sparsecast.export.verify import verify

SHARED = Path(os.environ.get("SPARSECAST_SHARED", Path(__file__).parents[3] / "../shared"))
LLAMA2 = SHARED / "cases" / "data" / "llama2.tokenizer.model"


def details(result) -> dict[str, str]:
    return {c.name: c.detail for c in result.checks}


@pytest.mark.engine
@pytest.mark.parametrize(
    ("dtype", "threshold", "bound"),
    [("f16", 0.0, 2e-3), ("f16", -1e30, 2e-3), ("q4_0", 0.0, 5e-3), ("q4_0", -1e30, 5e-3)],
)
def test_the_engine_computes_a_byte_level_model_as_we_do(
    dtype, threshold, bound, engine, byte_bundle, corpus
):
    bundle = byte_bundle(dtype, threshold)

    result = verify(VerifyConfig(bundle=bundle, corpus=str(corpus), engine=engine))

    assert result.ok, details(result)
    assert result.engine.perplexity == pytest.approx(result.engine.reference, rel=bound)
    assert "by token ids" in details(result)["engine perplexity"]


@pytest.mark.engine
def test_a_token_beyond_the_most_probable_has_the_same_probability(engine, byte_bundle, corpus):
    """Asked for with its logit raised, as all of them are where a reply names two alone."""
    file = GGUFFile(bundle_file(byte_bundle()))
    tokenizer, emulator = tokenizer_of(file), Emulator(file)
    text = joined(held_out_documents(str(corpus), tokenizer, 512))
    prompts_PS = chunks_of(text, tokenizer, 512)[:2, :32]
    spelling = Spelling(tokenizer.texts, tokenizer.excluded)
    launch = Launch(engine, file.path)
    replies = replies_to(launch, spelling, prompts_PS)
    few = [[r._replace(slots=r.slots[:2], probs=r.probs[:2]) for r in row] for row in replies]

    (_, all_named), (check, named) = (
        check_perplexity_by_ids(launch, emulator, spelling, prompts_PS, rows)
        for rows in (replies, few)
    )

    assert check.ok
    assert named.perplexity == pytest.approx(all_named.perplexity, rel=1e-5)


@pytest.mark.engine
@pytest.mark.parametrize("bytewise", [True, False])
def test_the_engine_cuts_documents_as_the_files_tokenizer(
    bytewise, engine, byte_bundle, bundle_folder
):
    """Where it cuts otherwise than GPT-2 too."""
    file = GGUFFile(bundle_file(byte_bundle() if bytewise else bundle_folder))
    docs = [
        "def f(x):\n    return x",
        "It's 1234, \u4f60\u597d! \U0001f600",
        "x    (y)\n",
        "<s>!x!",
    ]

    check = check_tokenization(Launch(engine, file.path), tokenizer_of(file), docs)

    assert check.ok
    assert check.detail == "0 of 4 held-out documents differ"


@pytest.mark.engine
def test_a_tokenizer_that_the_engine_lacks_passes_with_consent(
    engine, byte_copy, random_predictors, corpus
):
    """Digits apart, as in SmolLM2: the engine gets the model's ids."""
    path = byte_copy / "tokenizer.json"
    spec = json.loads(path.read_text())
    digits = {"type": "Digits", "individual_digits": True}
    spec["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [digits, spec["pre_tokenizer"]],
    }
    path.write_text(json.dumps(spec))
    predictors = random_predictors(byte_copy.parent / "p", str(byte_copy))
    out = byte_copy.parent / "b"
    cfg = ExportConfig(
        model=str(byte_copy), predictors=predictors, out=out, allow_other_tokens=True
    )
    export(cfg)

    result = verify(VerifyConfig(bundle=out, corpus=str(corpus), engine=engine))

    assert result.ok, details(result)
    assert result.engine.perplexity == pytest.approx(result.engine.reference, rel=2e-3)
    assert "by token ids" in details(result)["engine perplexity"]
    assert details(result)["engine tokenization"].startswith("0 of ")
    assert "as when exported" in details(result)["other tokens"]


@pytest.mark.engine
def test_pieces_that_the_engine_cuts_otherwise_fail(engine, bundle_folder):
    file = GGUFFile(bundle_file(bundle_folder))
    file.keys["tokenizer.ggml.scores"].reverse()

    check = check_tokenization(
        Launch(engine, file.path), tokenizer_of(file), [Path(__file__).read_text(), "x"]
    )

    assert not check.ok
    assert "1 of 2 held-out documents differ" in check.detail


@pytest.mark.engine
@pytest.mark.parametrize("lost", ["tokenizer.model", "tokenizer.json"])
def test_the_engine_cuts_text_as_a_sentencepiece_model_in_either_file(
    lost, engine, model_folder, random_predictors, corpus, tmp_path
):
    """With tokenizer.json lost, transformers makes its own of tokenizer.model."""
    model = Path(shutil.copytree(model_folder, tmp_path / "model"))
    (model / lost).unlink()
    path = model / "tokenizer_config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "LlamaTokenizer"})
    )
    predictors = random_predictors(tmp_path / "p", str(model))
    export(ExportConfig(model=str(model), predictors=predictors, out=tmp_path / "b"))

    result = verify(VerifyConfig(bundle=tmp_path / "b", corpus=str(corpus), engine=engine))

    assert result.ok, details(result)
    assert details(result)["engine tokenization"].startswith("0 of ")


@pytest.mark.engine
@pytest.mark.skipif(not LLAMA2.is_file(), reason="Llama 2's tokenizer.model is not here")
@pytest.mark.parametrize("kept", ["tokenizer.model", "tokenizer.json", "tokenizer.*"])
def test_llama_2s_own_vocabulary_passes_from_either_file(
    kept, engine, random_predictors, corpus, tmp_path
):
    """Runs of spaces of one score, and tokens that Python takes for line ends."""
    model = tmp_path / "m"
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=1280,
        num_hidden_layers=3,
        num_attention_heads=4,
        vocab_size=32_000,
        max_position_embeddings=256,
        hidden_act="relu",
    )
    LlamaForCausalLM(config).half().save_pretrained(model)
    shutil.copy(LLAMA2, model / "tokenizer.model")
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(Checkpoint(str(model)))
    tokenizer.backend_tokenizer.save(str(model / "tokenizer.json"))
    for path in {*model.glob("tokenizer.*")} - {*model.glob(kept)}:
        path.unlink()
    predictors = random_predictors(tmp_path / "p", str(model))
    export(ExportConfig(model=str(model), predictors=predictors, out=tmp_path / "b"))

    result = verify(
        VerifyConfig(bundle=tmp_path / "b", corpus=str(corpus), engine=engine, tokens=256)
    )

    wrong = [check for check in result.checks if not check.ok]
    assert not wrong
    assert details(result)["engine tokenization"].startswith("0 of ")

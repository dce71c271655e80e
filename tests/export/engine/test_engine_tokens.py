"""The engine's tokens of any text are those of our imitation of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizer_folders import CONFIG, small
from transformers import LlamaConfig, LlamaForCausalLM

from sparsecast.export.bundle import bundle_file
from sparsecast.export.config import ExportConfig
from sparsecast.export.engine.process import serving
from sparsecast.export.read.reader import GGUFFile
from sparsecast.export.read.vocab import tokenizer_of
from sparsecast.export.run import export

CHARACTERS = [
    "0123456789",
    "\u0663\u00b2\u2463\u216b\u00bd\U0001d7d8\u4e00",
    "aestdrvlm\u00e9\u043a\u03b2\u02b0\u0301\u0870",
    "\u4f60\u597d\uff0c\u3042\u30ab\ud55c\U00020000",
    " ",
    " \n\r\t",
    "\u2028\u2029\x85\xa0\u3000\u1680\u200b\x0b\x0c\x1c\x1f",
    "\x00\x01\x08\x0e\x1b\x7f\x80\x9f\ufeff\uffff\U0010ffff",
    '!?.,;:()[]{}<>_-+*/\\"#@`|~$^',
]
WORDS = [
    *("'s", "'t", "'m", "'d", "'re", "'ve", "'ll", "'S", "'", "\u2019s", "''s", "'l"),
    *("\U0001f600", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f1e9\U0001f1ea"),
    *("<s>", "</s>", "<unk>", "<|endoftext|>", "<|a b|>", "<0x0A>", "<0x41>", "<|x|>", "\u2581"),
]
PARTS = [
    *(st.text(alphabet=some, min_size=1, max_size=9) for some in CHARACTERS),
    *(st.sampled_from(WORDS), st.characters(exclude_categories=["Cs"])),
]
TEXTS = st.lists(st.one_of(PARTS), max_size=12).map("".join)
MANY = settings(
    max_examples=600,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def spelling_bundle(tmp_path_factory, random_predictors) -> Path:
    """Its pieces make up a byte token, a control token and one that is user defined."""
    model = tmp_path_factory.mktemp("spelling") / "m"
    pieces = ["<0", "x4", "1>", "<0x4", "<s", "\u2581a", "<|", "|>", "x|>"]
    scores = {piece: -float(i) for i, piece in enumerate(pieces)}
    path = small(model.parent / "t", scores, user=("<|x|>",))
    model.mkdir()
    path.rename(model / "tokenizer.model")
    (model / "tokenizer_config.json").write_text(json.dumps(CONFIG))
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=1280,
        num_hidden_layers=3,
        num_attention_heads=4,
        vocab_size=320,
        hidden_act="relu",
    )
    LlamaForCausalLM(config).half().save_pretrained(model)
    predictors = random_predictors(model.parent / "p", str(model))
    cfg = ExportConfig(model=str(model), predictors=predictors, out=model.parent / "b")
    return export(cfg).parent


@pytest.fixture(scope="module", params=["gpt2", "llama", "spelling"])
def both(request, engine, byte_bundle, bundle_folder, spelling_bundle):
    """(the engine's server, our tokenizer) of one file."""
    bundles = {"gpt2": byte_bundle, "llama": lambda: bundle_folder}
    bundle = bundles.get(request.param, lambda: spelling_bundle)()
    file = GGUFFile(bundle_file(bundle))
    tokenizer = tokenizer_of(file)
    with serving(engine, file.path, len(tokenizer.texts)) as server:
        yield server, tokenizer


@pytest.mark.engine
@MANY
@given(text=TEXTS)
def test_any_text_becomes_the_engines_tokens(both, text):
    server, tokenizer = both

    assert tokenizer.encode(text) == server.tokens(text)


@pytest.mark.engine
def test_tokens_spelled_in_a_text_are_the_engines(engine, spelling_bundle):
    file = GGUFFile(bundle_file(spelling_bundle))
    tokenizer, tokens = tokenizer_of(file), file.keys["tokenizer.ggml.tokens"]
    texts = ["<0x41>", "a<0x41>\u4f60<0x41>", "<s>", "<|x|>", "<|x|><|x|>", "<0x4<0x41>1>"]

    with serving(engine, file.path, len(tokens)) as server:
        theirs = [server.tokens(text) for text in texts]

    assert [tokenizer.encode(text) for text in texts] == theirs
    assert tokens.index("<0x41>") in theirs[0]
    assert tokens.index("<s>") in theirs[2]

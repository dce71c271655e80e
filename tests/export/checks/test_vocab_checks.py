"""Damaged vocabularies must fail verify, and the line must say what is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer

from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.export.bundle import bundle_file
from sparsecast.export.checks.engine_text import check_perplexity_by_ids
from sparsecast.export.checks.sources import Source
from sparsecast.export.checks.tokens import check_tokens
from sparsecast.export.checks.vocab import check_vocabulary
from sparsecast.export.checks.vocab_source import check_pieces
from sparsecast.export.config import ExportConfig
from sparsecast.export.engine.process import Launch
from sparsecast.export.engine.protocol import CHUNK, chunks_of, held_out_documents, joined
from sparsecast.export.engine.replies import Reply, Spelling
from sparsecast.export.read.reader import GGUFFile
from sparsecast.export.read.vocab import tokenizer_of
from sparsecast.export.run import export


@pytest.fixture
def byte_file(byte_bundle) -> GGUFFile:
    """Its keys may be changed."""
    return GGUFFile(bundle_file(byte_bundle()))


@pytest.fixture
def json_source(model_folder, random_predictors, tmp_path) -> Source:
    """A bundle of a sentencepiece model that has a tokenizer.json alone; keys may be changed."""
    model = Path(shutil.copytree(model_folder, tmp_path / "model"))
    (model / "tokenizer.model").unlink()
    predictors = random_predictors(tmp_path / "p", str(model))
    path = export(ExportConfig(model=str(model), predictors=predictors, out=tmp_path / "b"))
    return Source(Checkpoint(str(model)), GGUFFile(path))


def drop_byte(keys):
    keys["tokenizer.ggml.tokens"][keys["tokenizer.ggml.tokens"].index("!")] = "??"


def twice(keys):
    keys["tokenizer.ggml.tokens"][601] = "<|endoftext|>"


def empty(keys):
    keys["tokenizer.ggml.tokens"][601] = ""


def normal_space(keys):
    keys["tokenizer.ggml.token_type"][601] = 1


def no_merge(keys):
    keys["tokenizer.ggml.merges"][7] = "xx"


def strange_merge(keys):
    keys["tokenizer.ggml.merges"][7] = "zq xj"


DAMAGES = [
    (drop_byte, "1 characters of the byte alphabet are not tokens, '!' first"),
    (twice, "a token is there twice"),
    (empty, "a token is empty"),
    (normal_space, r"token 601, '<|a b|>', holds a character that stands for no byte"),
    (no_merge, "merge 7 is 'xx'"),
    (strange_merge, "merge 7 is 'zq xj', expected two tokens that form a third"),
    (lambda keys: keys.pop("tokenizer.ggml.merges"), "merges is missing"),
    (lambda keys: keys.pop("tokenizer.ggml.eos_token_id"), "the engine would use token 11"),
    (lambda keys: keys.update({"tokenizer.ggml.bos_token_id": 605}), "bos_token_id is out of"),
    (lambda keys: keys["tokenizer.ggml.token_type"].pop(), "605 tokens, 604 types"),
    (lambda keys: keys["tokenizer.ggml.token_type"].__setitem__(3, 9), "type is not 1 to 6"),
]


@pytest.mark.parametrize(("damage", "reason"), DAMAGES)
def test_a_gpt2_vocabulary_that_the_engine_refuses_or_misreads_fails(byte_file, damage, reason):
    assert check_vocabulary(byte_file).ok
    damage(byte_file.keys)

    check = check_vocabulary(byte_file)

    assert not check.ok
    assert reason in check.detail


def swap_tokens(keys):
    tokens = keys["tokenizer.ggml.tokens"]
    tokens[300], tokens[301] = tokens[301], tokens[300]


def swap_merges(keys):
    merges = keys["tokenizer.ggml.merges"]
    merges[40], merges[41] = merges[41], merges[40]


@pytest.mark.parametrize("spelling", ["pairs", "strings", "files"])
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda keys: None, ""),
        (swap_tokens, "token 300 is"),
        (swap_merges, "merges differ from number 40 on (344 and 344)"),
        (lambda keys: keys["tokenizer.ggml.merges"].pop(), "from number 343 on (343 and 344)"),
        (lambda keys: keys["tokenizer.ggml.token_type"].__setitem__(5, 5), "of type 5"),
        (lambda keys: keys.update({"tokenizer.ggml.eos_token_id": 11}), "eos_token_id is 11"),
    ],
)
def test_a_gpt2_vocabulary_of_another_model_fails(
    byte_file, byte_model, damage, reason, spelling, tmp_path
):
    model = Path(shutil.copytree(byte_model, tmp_path / "model"))
    path = model / "tokenizer.json"
    spec = json.loads(path.read_text())
    merges = [" ".join(pair) for pair in spec["model"]["merges"]]
    if spelling == "strings":
        spec["model"]["merges"] = merges
        path.write_text(json.dumps(spec))
    if spelling == "files":
        path.unlink()
        (model / "vocab.json").write_text(json.dumps(spec["model"]["vocab"]))
        (model / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    damage(byte_file.keys)

    check = check_pieces(Source(Checkpoint(str(model)), byte_file))

    assert check.ok == (not reason), check.detail
    assert reason in check.detail


def test_a_type_that_tokenizer_json_does_not_give_is_named(byte_file, byte_model):
    byte_file.keys["tokenizer.ggml.token_type"][601] = 3

    check = check_pieces(Source(Checkpoint(str(byte_model)), byte_file))

    assert "token 601 is '<|a b|>' of type 3" in check.detail


def test_an_added_token_that_the_config_makes_the_end_is_special(
    byte_model, random_predictors, tmp_path
):
    model = Path(shutil.copytree(byte_model, tmp_path / "model"))
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": "<|a b|>"}))
    predictors = random_predictors(tmp_path / "p", str(model))
    file = export(ExportConfig(model=str(model), predictors=predictors, out=tmp_path / "b"))

    check = check_pieces(Source(Checkpoint(str(model)), GGUFFile(file)))
    assert check.detail == "as in tokenizer.json"


def test_scores_that_do_not_follow_the_merges_fail(json_source):
    assert check_pieces(json_source).ok
    scores = json_source.file.keys["tokenizer.ggml.scores"]
    scores[300], scores[310] = scores[310], scores[300]

    check = check_pieces(json_source)

    assert not check.ok
    assert "has no lower score than" in check.detail


def test_an_unreadable_tokenizer_of_the_model_fails(json_source):
    (json_source.checkpoint.folder / "tokenizer.json").write_text("[]")

    assert not check_pieces(json_source).ok


def test_tokens_of_another_tokenizer_fail(byte_file, byte_model, corpus):
    theirs, docs = AutoTokenizer.from_pretrained(byte_model), ["def f(x):\n    return x + 1\n"] * 9
    assert check_tokens(theirs, tokenizer_of(byte_file), docs).ok
    byte_file.keys["tokenizer.ggml.merges"].reverse()

    assert not check_tokens(theirs, tokenizer_of(byte_file), docs).ok


def test_chunks_of_a_gpt2_vocabulary_have_no_bos(byte_file, corpus):
    tokenizer = tokenizer_of(byte_file)
    text = joined(held_out_documents(str(corpus), tokenizer, 512))

    ids_NS = chunks_of(text, tokenizer, 512)

    assert ids_NS.flatten().tolist() == tokenizer.encode(text)[: 4 * CHUNK]


def test_texts_of_bytes_are_what_the_server_prints(byte_file):
    tokenizer, tokens = tokenizer_of(byte_file), byte_file.keys["tokenizer.ggml.tokens"]
    texts = tokenizer.texts

    assert texts[tokens.index("\u0120return")] == " return"
    assert texts[tokens.index("\u010a")] == "\n"
    assert texts[tokens.index("\u00e9")] == "byte: \\xe9"
    assert texts[600:] == [""] * 5
    half = [i for i, text in enumerate(texts) if "\ufffd" in text]
    assert half
    assert {600, 601, tokens.index("\u00e9"), *half} <= set(tokenizer.excluded)
    assert tokens.index("\u0120return") not in tokenizer.excluded


class Fixed:
    """Stands for our evaluation: the same logits everywhere."""

    def logits(self, ids_PS):
        return torch.tensor([1.0, 2.0, 0.5, 9.0]).expand(*ids_PS.shape, 4)


@pytest.mark.parametrize(("factor", "ok"), [(1.0, True), (1.004, True), (1.006, False)])
def test_perplexity_by_ids_leaves_out_what_cannot_be_said(factor, ok):
    spelling = Spelling(["a", "b", "c", ""], excluded=[3])
    probs = torch.tensor([1.0, 2.0, 0.5]).softmax(-1).double() / factor
    reply = Reply([1], torch.tensor([0, 1, 2]), probs, False, False)
    prompts_PS = torch.tensor([[0, 1, 3, 2], [1, 1, 0, 0]])

    launch = Launch(Path(), Path())
    check, numbers = check_perplexity_by_ids(
        launch, Fixed(), spelling, prompts_PS, [[reply] * 4] * 2
    )

    targets = torch.tensor([1, 2, 1, 0, 0])
    want = torch.tensor([1.0, 2.0, 0.5]).double().log_softmax(-1)[targets].mean().neg().exp()
    assert numbers.reference == pytest.approx(want.item())
    assert numbers.perplexity == pytest.approx(factor * want.item())
    assert "5 positions" in check.detail
    assert check.ok == ok


@pytest.mark.parametrize("place", ["tokenizer.json", "tokenizer_config.json"])
def test_tokens_added_to_tokenizer_model_are_compared_too(
    model_folder, random_predictors, tmp_path, place
):
    model = Path(shutil.copytree(model_folder, tmp_path / "model"))
    rows = json.loads((model / "config.json").read_text())["vocab_size"]
    weights = load_file(model / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = torch.cat([weights[name], weights[name][:2]])
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text()) | {"vocab_size": rows + 2}
    (model / "config.json").write_text(json.dumps(config))
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens([AddedToken("<|start|>", special=True), AddedToken("<|tool|>")])
    tokenizer.save_pretrained(tmp_path / "saved")
    shutil.copy(tmp_path / "saved" / "tokenizer.json", model)
    predictors = random_predictors(tmp_path / "p", str(model))
    path = export(ExportConfig(model=str(model), predictors=predictors, out=tmp_path / "b"))
    if place == "tokenizer_config.json":
        added = json.loads((model / "tokenizer.json").read_text())["added_tokens"]
        (model / "tokenizer.json").unlink()
        named = {"added_tokens_decoder": {token.pop("id"): token for token in added}}
        (model / place).write_text(json.dumps(named))
    file = GGUFFile(path)
    source = Source(Checkpoint(str(model)), file)
    assert check_pieces(source).detail == "as in tokenizer.model"

    for name, value in (("tokens", "<|staXt|>"), ("token_type", 4)):
        column = file.keys[f"tokenizer.ggml.{name}"]
        before, column[rows] = column[rows], value
        check = check_pieces(source)
        assert not check.ok
        assert f"token {rows} is" in check.detail
        column[rows] = before


def repeat_a_merge(folder: Path, number: int) -> tuple[int, list[list[str]]]:
    """Put a merge of tokenizer.json at its front too; its place from the end, and the merges."""
    path = folder / "tokenizer.json"
    spec = json.loads(path.read_text())
    merges = spec["model"]["merges"]
    merges.insert(0, merges[number])
    path.write_text(json.dumps(spec))
    return number - len(merges) + 1, merges


def test_a_repeated_merge_counts_where_it_stands_last(byte_copy, random_predictors, corpus):
    """As in the tokenizers library; the engine would take the first, so one alone is written."""
    before = tokenizer_of_folder(byte_copy)
    place, merges = repeat_a_merge(byte_copy, 200)
    predictors = random_predictors(byte_copy.parent / "p", str(byte_copy))
    out = byte_copy.parent / "b"
    file = GGUFFile(export(ExportConfig(model=str(byte_copy), predictors=predictors, out=out)))
    source = Source(Checkpoint(str(byte_copy)), file)
    text = " ".join(path.read_text() for path in sorted(corpus.iterdir())[:2])

    written = file.keys["tokenizer.ggml.merges"]
    assert written == [" ".join(pair) for pair in merges[1:]]
    assert check_pieces(source).ok, check_pieces(source).detail
    assert tokenizer_of_folder(byte_copy)(text) == before(text)

    written.insert(0, written.pop(place))
    assert "merges differ from number 0 on" in check_pieces(source).detail


def test_a_repeated_merge_of_pieces_is_no_alternation(json_copy, random_predictors):
    repeat_a_merge(json_copy, 100)
    predictors = random_predictors(json_copy.parent / "p", str(json_copy))
    out = json_copy.parent / "b"
    file = GGUFFile(export(ExportConfig(model=str(json_copy), predictors=predictors, out=out)))

    check = check_pieces(Source(Checkpoint(str(json_copy)), file))

    assert check.ok, check.detail


def tokenizer_of_folder(folder: Path):
    """The library's ids of a text."""
    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return lambda text: own.encode(text, add_special_tokens=False).ids

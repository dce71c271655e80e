"""The logit check must see what the value checks would also see, on its own."""

from __future__ import annotations

import pytest
import torch

from sparsecast.core.models.loading import load_model
from sparsecast.export.bundle import bundle_file
from sparsecast.export.checks.logits import check_logits, degenerate, with_relu
from sparsecast.export.engine.emulator import Emulator
from sparsecast.export.engine.protocol import chunks_of, held_out_documents, joined, perplexity
from sparsecast.export.read.reader import GGUFFile
from sparsecast.export.read.vocab import tokenizer_of


@pytest.fixture
def file(bundle_folder) -> GGUFFile:
    """A private mapping: changes to its tensors stay in memory."""
    return GGUFFile(bundle_file(bundle_folder))


@pytest.fixture(scope="module")
def relu_model(model_folder):
    return with_relu(load_model(str(model_folder), device="cpu", dtype="float32")[0])


@pytest.fixture
def ids_NS(file, corpus):
    tokenizer = tokenizer_of(file)
    return chunks_of(joined(held_out_documents(str(corpus), tokenizer, 512)), tokenizer, 512)


def test_a_right_file_is_within_the_bound(file, relu_model, ids_NS):
    assert check_logits(Emulator(file), relu_model, ids_NS).ok


@pytest.mark.parametrize(
    "name", ["blk.1.attn_q.weight", "blk.0.attn_k.weight", "blk.2.attn_v.weight"]
)
def test_two_swapped_rows_are_beyond_the_bound(file, relu_model, ids_NS, name):
    weight = file.tensor(name)
    weight[[3, 4]] = weight[[4, 3]]

    assert not check_logits(Emulator(file), relu_model, ids_NS).ok


def test_a_lost_rope_base_is_beyond_the_bound(file, relu_model, ids_NS):
    file.keys["llama.rope.freq_base"] = 10_000.0

    assert not check_logits(Emulator(file), relu_model, ids_NS).ok


def test_a_model_with_the_wrong_activation_is_beyond_the_bound(file, model_folder, ids_NS):
    fatrelu, _ = load_model(str(model_folder), device="cpu", dtype="float32")

    assert not check_logits(Emulator(file), fatrelu, ids_NS).ok


@pytest.mark.parametrize(
    ("logits", "reason"),
    [
        (torch.full((2, 3, 4), torch.nan), "NaN"),
        (torch.zeros(2, 3, 4), "all logits are 0"),
        (torch.full((2, 3, 4), 1.5), "all equal"),
        (torch.arange(4.0).expand(2, 3, 4), "same at every position"),
    ],
)
def test_logits_that_are_none_are_told(logits, reason):
    assert reason in degenerate(logits)


def test_perplexity_of_uniform_logits_is_the_vocabulary():
    ids_NS = torch.randint(0, 50, (3, 16))

    assert perplexity(lambda ids: torch.zeros(*ids.shape, 50), ids_NS) == pytest.approx(50)


def test_perplexity_scores_the_second_half_against_the_next_token():
    ids_NS = torch.randint(0, 50, (1, 16))
    certain = torch.full((1, 16, 50), -100.0)
    certain[0, torch.arange(8, 15), ids_NS[0, 9:]] = 100.0  # positions c/2 to c - 2

    assert perplexity(lambda ids: certain, ids_NS) == pytest.approx(1.0)


def test_the_files_vocabulary_tokenises_as_transformers_does(file, model_folder, corpus):
    _, theirs = load_model(str(model_folder), device="cpu", dtype="float32")
    text = (
        joined(held_out_documents(str(corpus), tokenizer_of(file), 2000))
        + " \u00e4\u4f60\U0001f600  \t\n<s>"
    )

    want = theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    assert tokenizer_of(file).encode(text) == want

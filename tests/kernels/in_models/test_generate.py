"""The model that ships with the package, decoding: the same tokens and the same perplexity."""

from __future__ import annotations

import pytest
import torch
from transformers import StaticCache

from sparsecast.core.models.loading import load_model
from sparsecast.core.models.location import TINY_PROSPARSE
from sparsecast.kernels.in_models.decode import with_cache
from sparsecast.kernels.in_models.sparse_ffn import SparseFFN
from sparsecast.kernels.in_models.sparsify import sparsify_model

TEXT = '''"""Read a file."""\n\nimport os\n\n\ndef read(path):\n    with open(path) as file:\n'''
NEW = 128


@pytest.fixture(scope="module")
def tiny():
    """Ids of a prompt; the model dense and exact, which share nothing."""
    dense, tokenizer = load_model(str(TINY_PROSPARSE), device="cpu", dtype="float32")
    exact, _ = load_model(str(TINY_PROSPARSE), device="cpu", dtype="float32")
    return tokenizer(TEXT, return_tensors="pt")["input_ids"], dense, exact


@pytest.fixture(scope="module")
def exact(tiny):
    return sparsify_model(tiny[2], None, "exact")


def generated(model, ids_1S, **options) -> torch.Tensor:
    return model.generate(ids_1S, max_new_tokens=NEW, do_sample=False, eos_token_id=None, **options)


@pytest.fixture(scope="module")
def dense_tokens(tiny):
    ids, dense, _ = tiny
    return generated(dense, ids)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_exact_generates_the_same_tokens(cache, tiny, exact, dense_tokens):
    got = generated(exact, tiny[0], cache_implementation=cache)
    assert got.shape[1] == tiny[0].shape[1] + NEW
    assert torch.equal(got, dense_tokens)


def test_beams_and_batches(tiny, exact):
    """Rows of different tokens in one step."""
    ids, dense, _ = tiny
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": 3, "eos_token_id": None}
    batch = ids.repeat(2, 1)
    batch[1, -4:] = batch[1, :4]
    assert torch.equal(exact.generate(batch, **options), dense.generate(batch, **options))


def test_exact_perplexity_is_dense(tiny, exact, dense_tokens):
    """Over rows, eight tokens a step."""
    _, dense, _ = tiny
    ids = dense_tokens[:, : dense_tokens.shape[1] // 8 * 8]
    with torch.no_grad():
        want = dense(ids).logits
        cache = StaticCache(config=exact.config, max_cache_len=ids.shape[1])
        parts = ids.split(8, dim=1)
        steps = [exact(part, **with_cache(exact, cache)).logits for part in parts]

    def perplexity(logits: torch.Tensor) -> float:
        return torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]).exp().item()

    assert perplexity(torch.cat(steps, 1)) == pytest.approx(perplexity(want), rel=5e-4)


def test_those_steps_read_few_rows(tiny, exact):
    """NaN in the rows of neurons that do not fire would show if they were read."""
    layer = next(module for module in exact.modules() if isinstance(module, SparseFFN))
    x = torch.randn(1, 1, layer.up_FD.shape[1])
    with torch.no_grad():
        want = layer(x)
        silent_F = torch.nn.functional.linear(x[0, 0], layer.gate_FD) < layer.threshold
        assert silent_F.float().mean() > 0.3
        kept = [weight.clone() for weight in (layer.up_FD, layer.down_FD)]
        layer.up_FD[silent_F] = layer.down_FD[silent_F] = torch.nan
        assert torch.equal(layer(x), want)
        for weight, values in zip((layer.up_FD, layer.down_FD), kept, strict=True):
            weight.copy_(values)

"""`sparsecast bench collect`: a random model spread over devices is the model that it says."""

from __future__ import annotations

import pytest
import torch

from sparsecast.cli.bench.collect import BenchCollectConfig, bench_collect
from sparsecast.cli.bench.collect_model import SHAPES, Size, random_model
from sparsecast.core.errors import InputError

TINY = Size(256, 512, 2, 1)


@pytest.mark.parametrize("device_map", ["auto", "sequential"])
def test_spread_model_computes_what_one_device_does(device_map):
    one, spread = (
        random_model(TINY, 64, torch.bfloat16, torch.device("cpu"), given)
        for given in (None, device_map)
    )
    for name, weight in spread.named_parameters():
        like = one.get_parameter(name)
        assert (weight.shape, weight.dtype) == (like.shape, like.dtype)
        torch.testing.assert_close(weight.float().std(), like.float().std(), rtol=0.02, atol=0)
    spread.load_state_dict(one.state_dict())  # buffers that are not saved stay its own
    ids = torch.arange(32).view(2, 16)
    with torch.inference_mode():
        assert torch.equal(one(ids).logits, spread(ids).logits)


def test_device_and_device_map_are_not_given_together():
    with pytest.raises(InputError, match="^--device-map auto: chooses the devices, so --device cu"):
        BenchCollectConfig(device="cuda", device_map="auto")


def test_numbers_of_a_spread_model(monkeypatch):
    monkeypatch.setitem(SHAPES, "60m", TINY)
    values = bench_collect(
        BenchCollectConfig(device_map="auto", tokens=600, seq_len=64, rounds=1, sink="memory")
    )
    weights = 2 * (2 * 256 * (256 + 128) + 3 * 256 * 512 + 2 * 256) + 256 + 32_000 * 256
    assert values["parameters"] == weights
    assert (values["device_map"], values["devices"]) == ("auto", 1)
    assert values["tokens"] == 600

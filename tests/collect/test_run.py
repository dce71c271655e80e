"""The whole stage, against an independent dense forward."""

from __future__ import annotations

import torch

from sparsecast.collect.bits import unpack


def test_store_counts_what_it_holds(acts):
    for layer in acts.manifest.layers:
        fired = torch.zeros(acts.manifest.ffn_width, dtype=torch.int64)
        for split in ("train", "calibration", "held-out"):
            for shard, tokens in enumerate(acts.shards(split)):
                rows = acts.rows(split, shard, layer)
                assert rows.x_TD.shape == (tokens, acts.manifest.hidden_size)
                fired += unpack(rows.mask_TP, acts.manifest.ffn_width).sum(0)
        assert torch.equal(fired, acts.fired()[layer])
    assert acts.manifest.tokens() == 6_000

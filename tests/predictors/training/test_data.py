"""What an epoch and a batch hold."""

from __future__ import annotations

import torch

from sparsecast.predictors.training.data import BLOCK, TokenBlocks


def test_an_epoch_holds_every_token_once_and_in_another_order(synthetic):
    blocks = TokenBlocks(synthetic, "train", 11 * BLOCK, seed=1)  # the last batch is one block
    epochs = []
    for epoch in range(2):
        blocks.epoch = epoch
        epochs.append(torch.cat([batch.x_LBD[1] for batch in blocks]))
    shards = range(len(synthetic.shards("train")))
    stored = torch.cat([synthetic.rows("train", shard, 1).x_TD for shard in shards])

    assert len(list(blocks)) == len(blocks)
    assert not torch.equal(epochs[0], epochs[1])
    for x in (*epochs, stored):
        assert x.shape == stored.shape
    *shuffled, whole = (sorted(row.numpy().tobytes() for row in x) for x in (*epochs, stored))
    assert shuffled == [whole, whole]


def test_a_batch_shows_all_layers_the_same_tokens(synthetic):
    batch = next(iter(TokenBlocks(synthetic, "calibration", 2 * BLOCK)))
    for layer in (0, 1):
        rows = synthetic.rows("calibration", 0, layer, 0, 2 * BLOCK)
        assert torch.equal(batch.x_LBD[layer], rows.x_TD)
        assert torch.equal(batch.mask_LBP[layer], rows.mask_TP)

"""What an epoch and a batch hold."""

from __future__ import annotations

import pytest
import torch

from sparsecast.collect.store.energy import amplitudes
from sparsecast.core.bitmask import unpack
from sparsecast.predictors.training.data import BLOCK, TokenBlocks
from sparsecast.predictors.training.resident import ResidentBlocks, fits_on


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


@pytest.mark.parametrize("seed", [None, 1])
@pytest.mark.parametrize("share", [(0, 1), (1, 3)])
def test_batches_of_a_resident_split_are_those_of_the_store(synthetic, seed, share):
    size, layers = 11 * BLOCK, [1, 0]
    read = TokenBlocks(synthetic, "train", size, seed, layers=layers, share=share)
    resident = ResidentBlocks(
        synthetic, "train", size, seed, layers=layers, share=share, device=torch.device("cpu")
    )
    for epoch in range(2):
        read.epoch = resident.epoch = epoch
        for one, two in zip(resident, read, strict=True):
            assert torch.equal(one.x_LBD, two.x_LBD)
            assert torch.equal(one.mask_LBP, two.mask_LBP)
        resident.close()


def test_what_stays_on_a_gpu_is_bounded(synthetic, monkeypatch):
    manifest = synthetic.manifest
    nbytes = 2 * manifest.tokens("train") * (2 * manifest.hidden_size + -(-manifest.ffn_width // 8))
    gpu, free = torch.device("cuda"), {"free": 8 * nbytes - 100, "cached": 100, "used": 0}
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (free["free"], 1 << 60))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda _: free["cached"])
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda _: free["used"])
    assert fits_on(gpu, synthetic, "train", 2, values=False)
    assert not fits_on(gpu, synthetic, "train", 3, values=False)
    assert not fits_on(gpu, synthetic, "train", 2, values=True)
    assert not fits_on(torch.device("cpu"), synthetic, "train", 2, values=False)
    free["used"] = 8  # an eighth of what is free is then a byte less
    assert not fits_on(gpu, synthetic, "train", 2, values=False)
    free["free"] = 1 << 60
    monkeypatch.setattr("sparsecast.predictors.training.resident.MOST_BYTES", nbytes - 1)
    assert not fits_on(gpu, synthetic, "train", 2, values=False)


@pytest.mark.parametrize("resident", [False, True])
def test_values_are_the_energies_of_the_same_entries(synthetic, edit_store, tmp_path, resident):
    """Of two shards, with another code for every token and neuron."""

    def with_codes(tensors: dict[str, torch.Tensor]) -> None:
        for layer in (0, 1):
            mask_TF = unpack(tensors[f"layer.{layer}.mask"], 200)
            code_TF = torch.randint(256, mask_TF.shape, dtype=torch.uint8)
            tensors[f"layer.{layer}.energy"] = code_TF[mask_TF]

    with_energies = edit_store(synthetic, tmp_path / "acts", with_codes, energy=True)
    assert len(with_energies.shards("calibration")) == 2
    size, layers = 5 * BLOCK, [1, 0]
    given = {"seed": 3, "layers": layers, "values": True}
    if resident:
        batches = ResidentBlocks(
            with_energies, "calibration", size, device=torch.device("cpu"), **given
        )
    else:
        batches = TokenBlocks(with_energies, "calibration", size, **given)
    known: list[dict[bytes, torch.Tensor]] = []
    for layer in layers:
        known.append({})
        for shard in range(len(with_energies.shards("calibration"))):
            x_TD = with_energies.rows("calibration", shard, layer).x_TD
            energy_TF = with_energies.energies("calibration", shard, layer)
            assert energy_TF is not None
            known[-1] |= {x.numpy().tobytes(): e for x, e in zip(x_TD, energy_TF, strict=True)}
    seen = 0
    for batch in batches:
        assert batch.value_LBF is not None
        for place, expected in enumerate(known):
            for x_D, code_F in zip(batch.x_LBD[place], batch.value_LBF[place], strict=True):
                energy_F = expected[x_D.numpy().tobytes()]
                found_F = torch.where(energy_F > 0, amplitudes(code_F).square(), 0)
                torch.testing.assert_close(found_F, energy_F)
                assert (code_F[energy_F == 0] == 0).all()
                seen += 1
    assert seen == 2 * with_energies.manifest.tokens("calibration")

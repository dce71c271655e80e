"""Clipped labels, compared with the activations."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from sparsecast.core.errors import InputError
from sparsecast.core.models.loading import load_model
from sparsecast.core.models.recorder import Recorder
from sparsecast.predictors.baselines.label_clipping import ClippedStore, clipped
from sparsecast.predictors.checkpoint import load_predictors
from sparsecast.predictors.config import TrainConfig
from sparsecast.predictors.train import train


@pytest.fixture
def store(with_energies):
    return with_energies


def test_the_largest_activations_are_kept(store, model_folder):
    """Recompute x1 of the recorded documents, one at a time."""
    model, _ = load_model(str(model_folder), device="cpu")
    share = 0.1
    clipping = ClippedStore(store, model, share)
    width = store.manifest.ffn_width
    ids, position = store.tokens("train", 0)
    starts = [*(position == 0).nonzero().flatten().tolist(), len(ids)]
    dropped = 0
    x1: dict[int, np.ndarray] = {}
    for start, stop in list(zip(starts, starts[1:], strict=False))[:4]:
        with torch.no_grad(), Recorder(model, lambda i, _, v: x1.update({i: v.abs().numpy()})):
            model.base_model(ids[None, start:stop].long())
        for layer, size in x1.items():
            whole = store.rows("train", 0, layer, start, stop)
            rows = clipping.rows("train", 0, layer, start, stop)
            assert torch.equal(rows.x_TD, whole.x_TD)
            fired, kept = (
                np.unpackbits(r.mask_TP.numpy(), axis=1, bitorder="little")[:, :width].astype(bool)
                for r in (whole, rows)
            )
            assert not (kept & ~fired).any()
            least = np.minimum(fired.sum(1), round(share * width))
            assert (kept.sum(1) >= least).all()
            # Energies are rounded to 1/8 of an octave, so some may tie.
            assert kept.sum(1).mean() < 1.2 * least.mean()
            for kept_F, fired_F, size_F in zip(kept, fired, size, strict=True):
                lost = size_F[fired_F & ~kept_F]
                dropped += len(lost)
                if len(lost):
                    assert lost.max() <= 1.1 * size_F[kept_F].min()
    assert dropped > 100


def test_clipping_by_hand():
    size = torch.tensor([[3.0, 1, 2, 0], [0, 0, 0, 5], [1, 1, 1, 0], [0, 0, 0, 0]])
    want = [[1, 0, 1, 0], [0, 0, 0, 1], [1, 1, 1, 0], [0, 0, 0, 0]]
    assert clipped(size, 2).int().tolist() == want
    assert torch.equal(clipped(size, 4), size > 0)


@pytest.mark.slow
def test_clipped_predictors_skip_more(store, model_folder, tmp_path):
    cfg = TrainConfig(
        activations=store.folder, out=tmp_path / "plain", recipe="reference", epochs=4, rank=32,
        batch_size=128, device="cpu",
    )  # fmt: skip
    plain = train(cfg)
    some = replace(cfg, out=tmp_path / "clipped", model=str(model_folder), clip_labels=0.05)
    skipped = [
        sum(layer["predicted_sparsity"] for layer in p.manifest.calibration)
        for p in (plain, train(some))
    ]
    assert skipped[1] > skipped[0]
    assert load_predictors(some.out).manifest.recipe["clip_labels"] == 0.05


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip_labels": 0.0}, r"--clip-labels: must be in \(0, 1\], got 0.0"),
        ({"recipe": "default"}, "--clip-labels: belongs to --recipe reference"),
        ({"model": None}, "--clip-labels: needs --activations"),
    ],
)
def test_misplaced_clipping_is_refused(store, model_folder, tmp_path, changes, message):
    cfg = TrainConfig(
        activations=store.folder, out=tmp_path / "p", recipe="reference", clip_labels=0.15,
        model=str(model_folder),
    )  # fmt: skip
    with pytest.raises(InputError, match=message):
        replace(cfg, **changes)


def test_a_store_without_energies_cannot_be_clipped(acts, model_folder, tmp_path):
    cfg = TrainConfig(
        activations=acts.folder, out=tmp_path / "p", recipe="reference", clip_labels=0.15,
        model=str(model_folder), device="cpu",
    )  # fmt: skip
    with pytest.raises(InputError, match="has no energies .* collect with --energy true"):
        train(cfg)
    assert list(tmp_path.iterdir()) == []

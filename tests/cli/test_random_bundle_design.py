"""The numbers behind random bundles, against scipy and against draws."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import multivariate_normal

from sparsecast.cli.bench.random_bundle.design import design_for, neurons
from sparsecast.cli.bench.random_bundle.normal import both_below
from sparsecast.cli.bench.random_bundle.points import (
    SHAPES,
    Point,
    check,
    our_point,
    public_point,
)
from sparsecast.core.errors import InputError
from sparsecast.core.models.shape import ModelShape
from sparsecast.predictors.formats import share_of_ffn

DRAWS = 1_000_000


@pytest.mark.parametrize("r", [0.0, 0.3, 0.9, 0.99])
@pytest.mark.parametrize(("h", "k"), [(0.0, 0.0), (-1.2, 0.4), (1.0, -2.5), (0.7, 0.7)])
def test_both_below_is_the_bivariate_normals(h, k, r):
    want = multivariate_normal.cdf([h, k], cov=[[1, r], [r, 1]])
    assert both_below(h, k, r) == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize(
    "point",
    [
        Point(96, "f16", 0.9346, 0.7524),
        Point(96, "q4_0", 0.95, 0.805),
        Point(96, "f16", 0.7, 0.88, true_sparsity=0.9, hot_neurons=0.4),
    ],
)
def test_draws_of_the_design_do_what_was_asked(point):
    d = design_for(point)
    n, a, b = torch.randn(3, DRAWS, dtype=torch.float64)
    fires = d.mean + d.spread * n + d.seen * a + d.unseen * b > 0
    predicted = d.start + d.spread * n + d.seen * a >= 0
    hottest = n > n.quantile(1 - point.hot_neurons)

    assert d.seen**2 + d.unseen**2 == pytest.approx(1)
    assert fires.double().mean() == pytest.approx(1 - point.true_sparsity, abs=2e-3)
    assert predicted.double().mean() == pytest.approx(1 - point.predicted_sparsity, abs=2e-3)
    assert predicted[fires].double().mean() == pytest.approx(point.recall, abs=3e-3)
    assert hottest[fires].double().mean() == pytest.approx(0.8, abs=5e-3)


def test_rates_are_how_often_a_neuron_fires():
    d = design_for(Point(96, "f16", 0.9346, 0.7524))
    n_F = torch.tensor([-2.0, 0.0, 1.5], dtype=torch.float64)
    ab_T = torch.randn(DRAWS, dtype=torch.float64)

    rate_F = d.rates(n_F)

    for n, rate in zip(n_F.tolist(), rate_F.tolist(), strict=True):
        want = (d.mean + d.spread * n + ab_T > 0).double().mean()
        assert rate == pytest.approx(want.item(), abs=2e-3)


def test_neurons_are_shuffled_normal_numbers():
    n_F = neurons(4096, torch.Generator().manual_seed(1))
    assert n_F.mean().abs() < 1e-9
    assert n_F.std() == pytest.approx(1, abs=2e-3)
    assert n_F[:2048].std() == pytest.approx(1, abs=0.1)
    assert not torch.equal(n_F, n_F.sort().values)


@pytest.mark.parametrize(
    ("recall", "predicted_sparsity"),
    [(0.95, 0.93), (0.5, 0.75)],
    ids=["better than perfect", "worse than the rates alone"],
)
def test_points_that_no_predictor_has_are_refused(recall, predicted_sparsity):
    with pytest.raises(InputError, match="which no predictor of gates"):
        design_for(Point(96, "f16", recall, predicted_sparsity))


@pytest.mark.parametrize("name", SHAPES)
def test_named_shapes_have_both_points_and_ours_has_fewer_bytes(name):
    shape = SHAPES[name]
    public, ours = public_point(shape), our_point(shape)
    sizes = ModelShape(
        layers=shape.layers, hidden_size=shape.hidden, ffn_width=shape.ffn, ffn_matrices=3
    )
    for dtype in ("f16", "q4_0"):
        for point in (public, ours):
            check(shape, dtype, point)
            assert math.isfinite(design_for(point).seen)
    assert share_of_ffn(ours.rank, ours.format, sizes) < share_of_ffn(public.rank, "f16", sizes)
    assert ours.recall > public.recall
    assert ours.predicted_sparsity > public.predicted_sparsity


def test_the_7b_points_are_those_of_the_documents():
    assert public_point(SHAPES["7b"])[:4] == (1024, "f16", 0.9346, 0.7524)
    assert our_point(SHAPES["7b"])[:4] == (2560, "q4_0", 0.950, 0.805)


@pytest.mark.parametrize(
    ("dtype", "change", "told"),
    [
        ("f32", {}, "dtype: got 'f32', expected f16 or q4_0"),
        ("f16", {"format": "q5_0"}, "format: got 'q5_0', expected f16, q8_0, q4_0"),
        ("f16", {"rank": 100}, "rank: got 100, expected a multiple of 32"),
        ("f16", {"rank": 64}, "rank: got 64, expected from 96 to 8096"),
        ("f16", {"rank": 8128}, "rank: got 8128, expected from 96 to 8096"),
        ("f16", {"hidden": 4000}, "hidden: got 4000, expected a multiple of 64"),
        ("f16", {"ffn": 992}, "ffn: got 992, expected more than 1000"),
        ("f16", {"vocab": 259}, "vocab: got 259, expected more than 259"),
    ],
)
def test_what_no_bundle_can_be_is_refused(dtype, change, told):
    shape = SHAPES["7b"]
    point = public_point(shape)
    for name, value in change.items():
        if name in shape._fields:
            shape = shape._replace(**{name: value})
        else:
            point = point._replace(**{name: value})
    with pytest.raises(InputError, match=told):
        check(shape, dtype, point)

"""Scores, compared with scikit-learn, and traffic, compared with published figures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import (
    average_precision_score,
    precision_score,
    recall_score,
    roc_auc_score,
)

from sparsecast.predictors.metrics import Counts, ScoreHistogram, TokenRecalls, count, traffic

sizes = st.tuples(st.integers(1, 9), st.integers(1, 40))
rates = st.sampled_from([0.0, 0.1, 0.5, 1.0])


@given(sizes, rates, rates, st.integers(0, 2**31))
def test_counts_agree_with_sklearn_on_random_and_degenerate_masks(size, fired, kept, seed):
    rng = np.random.default_rng(seed)
    active, predicted = rng.random(size) < fired, rng.random(size) < kept

    got = count(torch.from_numpy(predicted), torch.from_numpy(active))

    truth, guess = active.ravel(), predicted.ravel()
    assert got.recall == pytest.approx(recall_score(truth, guess, zero_division=1))
    assert got.precision == pytest.approx(precision_score(truth, guess, zero_division=1))
    assert got.predicted_sparsity == pytest.approx(1 - predicted.mean())
    assert got.true_sparsity == pytest.approx(1 - active.mean())


def test_counts_add_up_to_the_whole():
    predicted, active = torch.rand(6, 10) < 0.4, torch.rand(6, 10) < 0.3
    halves = count(predicted[:2], active[:2]).plus(count(predicted[2:], active[2:]))
    assert halves == count(predicted, active)


def test_recall_divides_sums_and_does_not_average_batches():
    whole = Counts(1, 1, 1, 10).plus(Counts(0, 9, 0, 10))
    assert whole.recall == 0.1


@given(st.integers(0, 2**31), st.floats(-4, 4), st.floats(-4, 4))
def test_a_lower_threshold_never_loses_recall(seed, a, b):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(7, 30, generator=generator)
    active = torch.rand(7, 30, generator=generator) < 0.2

    loose, strict = (count(logits >= threshold, active) for threshold in (min(a, b), max(a, b)))

    assert loose.recall >= strict.recall
    assert loose.predicted_sparsity <= strict.predicted_sparsity


def normal(rng, active):
    return rng.normal(size=active.shape) + 1.5 * active


def many_ties(rng, active):
    return (rng.integers(-2, 3, size=active.shape) + active).astype(float)


def mostly_zero(rng, active):
    """Zeros of either sign."""
    score = normal(rng, active) - 1
    return np.where(score > 0, score, rng.choice([0.0, -0.0], size=active.shape))


def twenty_octaves(rng, active):
    return np.sign(normal(rng, active)) * np.exp2(rng.uniform(-10, 10, size=active.shape))


@pytest.mark.parametrize("rate", [0.01, 0.15, 0.97])
@pytest.mark.parametrize("scale", [1e-6, 0.01, 1.0, 50.0, 1e6])
@pytest.mark.parametrize("scores", [normal, many_ties, mostly_zero, twenty_octaves])
def test_auc_and_average_precision_agree_with_sklearn_at_any_scale(scores, scale, rate):
    rng = np.random.default_rng(3)
    active = rng.random((40, 50)) < rate
    logits = (scale * scores(rng, active)).astype(np.float32)
    histogram = ScoreHistogram()

    for rows in (slice(0, 13), slice(13, 40)):
        histogram.add(torch.from_numpy(logits[rows]), torch.from_numpy(active[rows]))

    truth, raw = active.ravel(), logits.ravel()
    assert histogram.roc_auc() == pytest.approx(roc_auc_score(truth, raw), abs=1e-3)
    assert histogram.average_precision() == pytest.approx(
        average_precision_score(truth, raw), abs=1e-3
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("score", [0.0, -0.0, 1.0, -1.0, 1e-7, -6e4, float("inf"), -float("inf")])
def test_equal_scores_rank_at_random(score, dtype):
    histogram = ScoreHistogram()
    histogram.add(torch.full((2, 4), score, dtype=dtype), torch.arange(8).view(2, 4) < 2)
    assert histogram.roc_auc() == 0.5
    assert histogram.average_precision() == pytest.approx(0.25)


@pytest.mark.parametrize("active", [False, True])
def test_auc_and_average_precision_need_both_classes(active):
    histogram = ScoreHistogram()
    histogram.add(torch.randn(3, 4), torch.full((3, 4), active))
    assert histogram.roc_auc() is None
    assert histogram.average_precision() is None


@given(st.lists(st.floats(-4, 4, width=16), min_size=1, max_size=30), st.integers(0, 2**31))
def test_a_threshold_between_ties_decides_as_its_histogram_counted(scores, seed):
    """A threshold is the lowest score of its bin, so >= never splits a bin, on either side of 0."""
    score = torch.tensor([scores])
    active = torch.rand(score.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    histogram = ScoreHistogram()
    histogram.add(score, active)
    for threshold in (histogram.threshold_for_recall(0.7), histogram.threshold_for_sparsity(0.4)):
        got = count(score >= threshold, active)
        assert histogram.at(threshold) == pytest.approx((got.recall, got.predicted_sparsity))


def test_the_threshold_where_nothing_is_active_skips_everything():
    """Every recall is reached, so the largest threshold is above all scores."""
    score = torch.tensor([[-3.0, 2.0]])
    histogram = ScoreHistogram()
    histogram.add(score, torch.zeros(1, 2, dtype=torch.bool))
    threshold = histogram.threshold_for_recall(0.9)
    assert threshold == pytest.approx(2, abs=0.01)
    assert (score < threshold).all()
    assert histogram.at(threshold) == (1.0, 1.0)


@given(sizes, rates, rates, st.integers(0, 2**31))
def test_token_recalls_are_the_percentiles_of_single_tokens(size, fired, kept, seed):
    rng = np.random.default_rng(seed)
    active, predicted = rng.random(size) < fired, rng.random(size) < kept
    half = len(active) // 2
    tokens = TokenRecalls()

    for rows in (slice(0, half), slice(half, None)):
        tokens.add(torch.from_numpy(predicted[rows]), torch.from_numpy(active[rows]))

    single = [recall_score(a, p, zero_division=1) for a, p in zip(active, predicted, strict=True)]
    for percent in (5, 50, 100):
        want = np.percentile(single, percent, method="inverted_cdf")
        assert tokens.percentile(percent) == pytest.approx(want, abs=1e-4)


@pytest.mark.parametrize("recall", [0.5, 0.9, 0.95])
@pytest.mark.parametrize("center", [-6.0, 0.0, 6.0])
def test_the_threshold_for_a_recall_is_the_quantile(recall, center):
    score = torch.randn(200, 100) + center
    active = torch.rand(200, 100) < 0.2
    histogram = ScoreHistogram()
    histogram.add(score, active)

    got = count(score >= histogram.threshold_for_recall(recall), active).recall

    assert recall - 1e-6 <= got <= recall + 2e-3
    assert histogram.at(histogram.threshold_for_recall(recall))[0] == pytest.approx(got, abs=1e-4)


@pytest.mark.parametrize("sparsity", [0.3, 0.75, 0.9])
def test_the_threshold_for_a_sparsity_is_the_quantile(sparsity):
    score, active = torch.randn(200, 100), torch.rand(200, 100) < 0.2
    histogram = ScoreHistogram()
    histogram.add(score, active)

    got = count(score >= histogram.threshold_for_sparsity(sparsity), active).predicted_sparsity

    assert got == pytest.approx(sparsity, abs=2e-3)
    assert histogram.at(histogram.threshold_for_sparsity(sparsity))[1] == pytest.approx(
        got, abs=1e-4
    )


def test_the_curve_passes_through_every_threshold():
    score, active = torch.randn(100, 60), torch.rand(100, 60) < 0.2
    histogram = ScoreHistogram()
    histogram.add(score, active)
    curve = histogram.curve()

    assert [r for r, _ in curve] == sorted((r for r, _ in curve), reverse=True)
    assert [p for _, p in curve] == sorted(p for _, p in curve)
    at = count(score >= histogram.threshold_for_recall(0.9), active)
    assert np.interp(at.predicted_sparsity, [p for _, p in curve], [r for r, _ in curve]) == (
        pytest.approx(0.9, abs=0.01)
    )


def test_traffic_of_the_published_prosparse_7b():
    """arXiv 2402.13516, table 2: recall 93.46, predicted 75.24, true 88.11; rank 1024 in f16."""
    got = traffic(
        rank=1024,
        hidden_size=4096,
        ffn_width=11008,
        matrices=3,
        recall=0.9346,
        predicted_sparsity=0.7524,
        true_sparsity=0.8811,
    )
    predictor = 1024 * (4096 + 11008) / (3 * 4096 * 11008)
    assert predictor == pytest.approx(0.114, abs=5e-4)
    assert got.traffic == pytest.approx(0.362, abs=5e-4)
    assert got.exact == pytest.approx(0.413, abs=5e-4)
    assert got.oracle == pytest.approx(0.1189)
    assert got.cascade == pytest.approx(predictor + (0.2476 + 2 * 0.9346 * 0.1189) / 3)


def test_a_predictor_of_fewer_bits_costs_fewer_bytes():
    def cost(bits: float) -> float:
        return traffic(
            rank=32,
            hidden_size=64,
            ffn_width=96,
            matrices=2,
            recall=1.0,
            predicted_sparsity=1.0,
            true_sparsity=0.9,
            predictor_bits=bits,
        ).traffic

    assert cost(16) == pytest.approx(32 * 160 / (2 * 64 * 96))
    assert cost(8.5) / cost(16) == pytest.approx(8.5 / 16)

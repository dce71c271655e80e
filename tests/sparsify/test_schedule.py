"""The L1 term's weight at and between all boundaries of the published stages."""

from __future__ import annotations

from fractions import Fraction
from math import cos, pi

import pytest

from sparsecast.sparsify.phases import _phase
from sparsecast.sparsify.plan import make_plan
from sparsecast.sparsify.training.schedule import l1_share, l1_weight, lr_share
from sparsecast.sparsify.training.stages import TABLES

LAMBDAS = {
    "1b": (0, 1e-3, 5e-3, 5e-3, 5e-2),
    "7b": (0, 5e-3, 5e-2, 5e-2, 2e-1, 2e-1),
    "13b": (0, 5e-3, 1e-2, 1e-2, 2e-2, 2e-2),
}
ENDS = {
    "1b": (10_000, 15_000, 20_000, 25_000, 35_000),
    "7b": (5_000, 6_000, 10_000, 12_000, 16_000, 16_500),
    "13b": (5_500, 6_750, 10_750, 11_000, 15_000, 16_000),
}
STEP_TOKENS = {"1b": 4_915_200, "7b": 2_097_152, "13b": 8_388_608}


def paper(name: str, t: int) -> float:
    """Lambda of ProSparse's section 3.2, sin(x - pi/2) written as -cos x."""
    ends, lambdas = ENDS[name], LAMBDAS[name]
    if t <= ends[0]:
        return 0.0
    if t <= ends[1]:
        return lambdas[1]
    for i in range(2, len(ends)):
        if t <= ends[i]:
            eta = (1 - cos(pi * (t - ends[i - 1]) / (ends[i] - ends[i - 1]))) / 2
            return lambdas[i - 1] + eta * (lambdas[i] - lambdas[i - 1])
    return lambdas[-1] if t <= 95_000 else 1e-2


def steps_of(name: str) -> list[int]:
    """Every boundary with its neighbours, and places within every stage."""
    ends = (1, *ENDS[name], *((95_000, 101_000) if name == "1b" else ()))
    near = {t + d for t in ends for d in (-1, 0, 1)}
    between = {a + (b - a) * k // 8 for a, b in zip(ends, ends[1:], strict=False) for k in range(8)}
    return sorted(t for t in near | between if 1 <= t <= ends[-1])


@pytest.mark.parametrize("name", TABLES)
def test_lambda_is_the_papers_at_and_between_all_boundaries(name):
    for t in steps_of(name):
        assert l1_weight(t, TABLES[name]) == pytest.approx(paper(name, t), rel=1e-12, abs=0)


@pytest.mark.parametrize("name", TABLES)
def test_boundaries_belong_to_the_stage_before(name):
    table = TABLES[name]
    for stage, following in zip(table.regularized, table.regularized[1:], strict=False):
        assert l1_weight(stage.until, table) == stage.weight
        jump = l1_weight(stage.until + 1, table) - stage.weight
        rise = following.weight - stage.weight
        assert (jump == rise) if stage == table.regularized[0] else (0 <= jump <= 1e-4 * rise)


@pytest.mark.parametrize("name", TABLES)
def test_tokens_follow_from_the_steps(name):
    """To the two decimals that are published."""
    table = TABLES[name]
    stages = [*table.regularized, *([table.decay] if table.decay else [])]
    assert [stage.until for stage in table.regularized] == list(ENDS[name])
    for stage in stages:
        assert round(stage.until * STEP_TOKENS[name] / 1e9, 2) == pytest.approx(stage.tokens)


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("scale", [Fraction(1), Fraction(1, 250), Fraction(3)])
def test_a_run_of_another_length_has_the_same_lambdas(name, scale):
    table = TABLES[name]
    steps = table.steps * scale
    assert steps.denominator == 1
    for t in steps_of(name):
        if t <= table.steps and (t * scale).denominator == 1:
            share = l1_share(int(t * scale), int(steps), table)
            assert share * LAMBDAS[name][-1] == pytest.approx(paper(name, t), rel=1e-12, abs=0)
    assert l1_share(int(steps), int(steps), table) == 1


@pytest.mark.parametrize("pretrain", [0.0, 0.5])
@pytest.mark.parametrize(("stages", "falls"), [("1b", 35 / 95), ("7b", 0.5), ("13b", 0.5)])
def test_the_learning_rate_falls_in_the_decay_stage_of_1b(options, stages, falls, pretrain):
    changes = {"preset": "micro", "pretrain_share": pretrain, "tokens": 64 * 950}
    plan = make_plan(options(stages=stages, **changes))
    phase = _phase(plan, "p", plan.pretrain_steps, plan.steps, 0.5)

    first = next(
        step
        for step in range(phase.warmup, phase.stop)
        if lr_share(step, warmup=phase.warmup, decay_from=phase.decay_from, total=phase.stop) < 1
    )

    sparse = plan.steps - plan.pretrain_steps
    assert first - plan.pretrain_steps == pytest.approx(falls * sparse, abs=2)
    assert phase.l1_at(sparse - 1) == 0.5
    assert phase.l1_at(0) == 0
    at = round(sparse * ENDS[stages][1] / TABLES[stages].steps)
    assert phase.l1_at(at - 1) == pytest.approx(
        0.5 * LAMBDAS[stages][1] / LAMBDAS[stages][-1], rel=0.02
    )


@pytest.mark.parametrize(("stages", "lr"), [("1b", 3e-5), ("7b", 3e-5), ("13b", 5e-5)])
def test_the_default_learning_rate_is_the_tables(options, stages, lr):
    assert options(model="m", lr=None, stages=stages).peak_lr == lr
    assert options(preset="micro", lr=None, stages=stages).peak_lr == 5e-3

"""Which decision of a predictor comes nearest to the threshold."""

from __future__ import annotations

import pytest
import torch

from sparsecast.export.bundle import bundle_file
from sparsecast.export.checks.engine import PROMPT_LENGTH, Position, outlier_check
from sparsecast.export.engine.emulator import Emulator
from sparsecast.export.engine.perturbed import Decision, closest_decisions
from sparsecast.export.read.reader import GGUFFile


def test_a_position_has_the_nearest_of_its_own_and_of_those_before(bundle_folder):
    file = GGUFFile(bundle_file(bundle_folder))
    ids_NS = torch.randint(3, 512, (2, 20), generator=torch.Generator().manual_seed(0))
    distances = []

    class Recording(Emulator):
        def predictor_logits(self, x_TD, layer):
            logits_TF = super().predictor_logits(x_TD, layer)
            distances.append((logits_TF - self.header.threshold).abs())
            return logits_TF

    Recording(file).logits(ids_NS)
    least_TL = torch.stack([d_TF.amin(-1) for d_TF in distances], -1)

    found = closest_decisions(file, ids_NS)

    assert len(found) == 40
    for at, decision in enumerate(found):
        first = at // 20 * 20
        assert decision.distance == least_TL[first : at + 1].min().item()
        there_T = distances[decision.layer][first : at + 1, decision.neuron]
        assert decision.distance in there_T.tolist()


def test_positions_far_from_ours_are_listed_furthest_first():
    near, far = Position(0.0, 0.0, [2e-3, 5e-4], []), Position(0.0, 0.0, [5e-3, 4e-3], [])
    furthest = Position(0.0, 0.0, [6e-3], [])
    positions = [near] * PROMPT_LENGTH + [far, near, furthest, far, far]
    decisions = [Decision(i * 1e-6, 1, i) for i in range(len(positions))]

    check = outlier_check(positions, decisions)

    assert check.ok
    assert check.detail.startswith(f"{PROMPT_LENGTH + 1} of {PROMPT_LENGTH + 5} positions within")
    listed = check.detail.partition("up to there: ")[2].split("; ")
    assert (
        listed[0] == "prompt 1 position 2 by 6.0e-03, layer 1 neuron 66 6.6e-05 from the threshold"
    )
    assert len(listed) == 3
    assert all("by 4.0e-03" in line for line in listed[1:])


@pytest.mark.parametrize("count", [1, 512])
def test_nothing_is_listed_where_all_are_near(count):
    detail = outlier_check([Position(0.0, 0.0, [1e-3], [])] * count, []).detail

    assert detail == f"{count} of {count} positions within 0.001 of ours"

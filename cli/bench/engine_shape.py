"""`bench engine --shape`: bundles of random weights in place of a user's own.

One model of the shape twice, with predictors of the public recipe and with ours, made to hit the
recall and predicted sparsity that are known of each (cli/bench/random_bundle/points.py). What they
then do is measured from the files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from sparsecast.cli.bench.engine_machine import check_scratch
from sparsecast.cli.bench.engine_rows import Labelled
from sparsecast.cli.bench.export_model import ModelShape
from sparsecast.cli.bench.random_bundle.measure import measured_point
from sparsecast.cli.bench.random_bundle.points import SHAPES, Point, our_point, public_point
from sparsecast.cli.bench.random_bundle.write import bundle_bytes, write_random_bundle
from sparsecast.core.messages import log

SEED = 0


class RandomBundles(NamedTuple):
    """The bundles, and for the JSON what was asked of each and what it does."""

    bundles: list[Labelled]
    points: dict[str, dict[str, Any]]


def write_bundles(name: str, dtype: str, folder: Path) -> RandomBundles:
    """Write and measure the bundles of a shape.

    Disk: the model three times, since its dense form comes beside the two, and the predictors.

    Args:
        name: A key of `SHAPES`.
        dtype: f16 or q4_0.

    Raises:
        InputError: Too little space on the disk.
    """
    shape = SHAPES[name]
    points = {"public recipe": public_point(shape), "ours": our_point(shape)}
    # The dense form takes less than another bundle.
    need = sum(bundle_bytes(shape, dtype, point) for point in (*points.values(), our_point(shape)))
    check_scratch(folder, need, f"--shape {name}: in {dtype}")
    made = RandomBundles([], {})
    for label, point in points.items():
        _add(made, label, folder / label.replace(" ", "-"), shape, dtype, point)
    return made


def _add(
    made: RandomBundles, label: str, folder: Path, shape: ModelShape, dtype: str, point: Point
) -> None:
    found = measured_point(write_random_bundle(folder, shape, dtype, point, SEED))
    log.info(
        f"{label}: rank {point.rank} in {point.format}; recall {found.recall:.4f} (asked "
        f"{point.recall:.4f}), predicted sparsity {found.predicted_sparsity:.4f} "
        f"({point.predicted_sparsity:.4f}), true sparsity {found.true_sparsity:.4f} "
        f"({point.true_sparsity:.4f})"
    )
    made.bundles.append(Labelled(label, folder, found.predicted_sparsity))
    made.points[label] = {"asked": point._asdict(), "measured": found._asdict()}

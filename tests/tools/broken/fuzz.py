"""Fuzz one reader with hypothesis' own engine: `python fuzz.py READER SECONDS`.

hypothesis mutates a valid file, keeps what it learns in its database, and shrinks what fails. Every
round has another seed. A finding belongs into the reader's table of broken files.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from broken import gguf, gpuidx, pickles, work
from broken.runner import Reader, assert_message, refused
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from sparsecast.collect.store.shard import Shape, ShardBuffer
from sparsecast.collect.store.shard_reader import ShardFile
from sparsecast.core.models.weight_files import open_weights
from sparsecast.export.checks.gpu_split import check_gpu_split
from sparsecast.export.checks.run import FILE_CHECKS
from sparsecast.export.read.inspect_file import file_values, show_file
from sparsecast.export.read.reader import GGUFFile
from sparsecast.predictors.checkpoint import load_predictors
from sparsecast.sparsify.sequences import open_rows

ROUND = 2_000
"""Examples of a round."""
NUMBERS = (
    0,
    1,
    2,
    31,
    32,
    127,
    128,
    255,
    2**16,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
    2**63,
    2**64 - 1,
)


def _edits(size: int) -> st.SearchStrategy[tuple[str, int, bytes]]:
    """A change of a file of so many bytes: its kind, its place, and the bytes it brings."""
    places = st.integers(0, size)
    some = st.binary(max_size=16) | st.sampled_from(NUMBERS).flatmap(
        lambda n: st.sampled_from(
            [n.to_bytes(8, "little"), n.to_bytes(8, "big"), (n % 2**32).to_bytes(4, "little")]
        )
    )
    return st.tuples(st.sampled_from(["put", "insert", "drop", "cut"]), places, some)


def mutated(sound: bytes) -> st.SearchStrategy[bytes]:
    """A valid file after one to four changes; seldom bytes of no origin."""

    def apply(changes: list[tuple[str, int, bytes]]) -> bytes:
        raw = sound
        for kind, at, data in changes:
            if kind == "put":
                raw = raw[:at] + data + raw[at + len(data) :]
            elif kind == "insert":
                raw = raw[:at] + data + raw[at:]
            elif kind == "drop":
                raw = raw[:at] + raw[at + 1 + len(data) :]
            else:
                raw = raw[:at]
        return raw

    changes = st.lists(_edits(len(sound)), min_size=1, max_size=4)
    return changes.map(apply) | st.binary(max_size=200)


def _gguf(path: Path) -> None:
    show_file(file_values(path))
    file = GGUFFile(path)
    for check in FILE_CHECKS:
        if not check(file).ok:
            return


def _gpuidx(path: Path) -> None:
    model = path.with_name(gpuidx.MODEL)
    model.write_bytes(gpuidx.model())
    path.replace(path.with_name(gpuidx.SPLIT))
    check_gpu_split(GGUFFile(model), path.parent)
    file_values(path.with_name(gpuidx.SPLIT))


def _safetensors(path: Path) -> None:
    with open_weights(path) as file:
        for name in file.keys():  # noqa: SIM118
            file.get_tensor(name)
    ShardFile(path.rename(path.with_name("train-00000.safetensors"))).check()


def _predictors(path: Path) -> None:
    path.rename(path.with_name("model_0.pt"))
    load_predictors(path.parent)


def _tokens(path: Path) -> None:
    open_rows(path.rename(path.with_name(work.TOKENS)), work.SEQ_LEN).max()


def _shard() -> bytes:
    """A shard of an activation store, which is a safetensors file."""
    shape = Shape(layers=[0], hidden_size=4, ffn_width=9, x_dtype="float16")
    buffer = ShardBuffer(shape, shape.nbytes(3), pinned=False)
    buffer.begin(3, split="train", number=0)
    for view in buffer.views.values():
        view.copy_(torch.ones(()))
    return b"".join(bytes(block.cast("B")) for block in buffer.blocks())


def _weights() -> bytes:
    return pickles.saved({"fc1.weight": torch.ones(4, 4), "fc2.weight": torch.ones(4, 4)})


TARGETS: dict[str, tuple[Callable[[], bytes], Reader]] = {
    "gguf": (gguf.whole, _gguf),
    "gpuidx": (lambda: gguf.whole(gpuidx.header(), *gpuidx.lists()), _gpuidx),
    "safetensors": (_shard, _safetensors),
    "predictors": (_weights, _predictors),
    "tokens": (lambda: bytes(range(48)), _tokens),
}
"""By the reader's name: a valid file, and what reads a file of this kind at a path."""


@contextmanager
def folder() -> Iterator[Path]:
    with TemporaryDirectory(prefix="fuzz") as made:
        yield Path(made)


def check(read: Reader, data: bytes) -> None:
    """Read a file of these bytes: it is read, or refused in one line that names it."""
    with folder() as place:
        path = place / "x"
        path.write_bytes(data)
        if (told := refused(read, path)) is not None:
            assert_message(told, path, str(place))


def fuzz(name: str, seconds: float) -> int:
    """Fuzz a reader for so long; return the number of examples."""
    make, read = TARGETS[name]
    sound = make()
    check(read, sound)
    end, count, number = time.monotonic() + seconds, 0, 0
    while time.monotonic() < end:
        number += 1

        @seed(number)
        @settings(
            max_examples=ROUND,
            deadline=None,
            database=None,
            phases=(Phase.generate, Phase.target, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        )
        @given(mutated(sound))
        def one(data: bytes) -> None:
            nonlocal count
            if time.monotonic() < end:
                count += 1
                check(read, data)

        one()
    return count


if __name__ == "__main__":
    for reader in TARGETS if sys.argv[1] == "all" else sys.argv[1:2]:
        examples = fuzz(reader, float(sys.argv[2]))
        sys.stdout.write(f"{reader}: {examples:,} files in {sys.argv[2]} s, no fault\n")

"""Our reader against the gguf package's, and against files that lie."""

from __future__ import annotations

import os
import shutil
import struct
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsecast.core.errors import InputError
from sparsecast.export.bundle import bundle_file
from sparsecast.export.read.reader import TYPES, GGUFFile


@pytest.mark.parametrize("which", ["bundle_folder", "quantized"])
def test_reader_agrees_with_the_gguf_package(which, request, tmp_path):
    path = Path(shutil.copy(bundle_file(request.getfixturevalue(which)), tmp_path))
    ours = GGUFFile(path)
    with path.open("r+b") as file:
        file.write(b"GGUF")  # the package refuses PowerInfer's magic

    theirs = gguf.GGUFReader(path)

    assert ours.entries.keys() == {t.name for t in theirs.tensors}
    for tensor in theirs.tensors:
        mine = ours.tensor(tensor.name).numpy()
        values = tensor.data
        if values.dtype == np.uint8:
            values = dequantize(values, tensor.tensor_type)
        assert mine.dtype == values.dtype
        assert np.array_equal(mine, values)
    for name, value in ours.keys.items():
        assert theirs.fields[name].contents() == value


@pytest.fixture(scope="session")
def whole(bundle_folder) -> bytes:
    return bundle_file(bundle_folder).read_bytes()


@settings(max_examples=150, deadline=None)
@given(end=st.integers(0, 1_000) | st.integers(0, 30_000) | st.integers(0, 2**40))
def test_a_truncated_file_is_refused_wherever_it_ends(end, whole, tmp_path_factory):
    path = tmp_path_factory.mktemp("cut") / "cut.gguf"
    path.write_bytes(whole[: end % (len(whole) - 32)])

    with pytest.raises(InputError, match=r"cut\.gguf"):
        GGUFFile(path)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_damaged_header_never_raises_anything_else(data, whole, tmp_path_factory):
    """Any bytes anywhere in the header: read or refused, in one line, without a hang."""
    header = bytearray(whole[:20_000])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, 1199))
        header[at : at + 8] = data.draw(st.binary(min_size=8, max_size=8))
    path = tmp_path_factory.mktemp("bad") / "bad.gguf"
    path.write_bytes(header)

    entries, refused = {}, ""
    try:
        entries = GGUFFile(path).entries
    except InputError as error:
        refused = str(error)

    assert "\n" not in refused
    # A header that now claims fewer tensors, or none, may be whole.
    assert all(entry.start + entry.nbytes <= len(header) for entry in entries.values())


def header(*, tensors=0, keys=0, magic=b"PWRI", version=3, rest=b"") -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, keys) + rest


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def info(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
    return text(name) + dims + struct.pack("<IQ", kind, offset)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (header(magic=b"ggml"), "begins with b'ggml'"),
        (header(version=2), "version 2, expected 3"),
        (header(tensors=2**63), "more than it can hold"),
        (header(keys=2**62), "more than it can hold"),
        (header(keys=1, rest=struct.pack("<Q", 2**40) + bytes(99)), "characters"),
        (header(keys=1, rest=text("a") + struct.pack("<IIQ", 9, 5, 2**61) + bytes(9)), "values in"),
        (header(keys=1, rest=text("a") + struct.pack("<I", 77) + bytes(99)), "value type 77"),
        (header(keys=1, rest=struct.pack("<Q", 2) + b"\xff\xfe" + bytes(99)), "not UTF-8"),
        (
            header(keys=1, rest=text("general.alignment") + struct.pack("<II", 4, 0)),
            "general.alignment is 0",
        ),
        (header(tensors=1, rest=info("w", (4, 2**62), 0, 0) + bytes(64)), "tensor w ends"),
        (header(tensors=1, rest=info("w", (4,), 0, 2**50) + bytes(64)), "tensor w ends"),
        (header(tensors=1, rest=info("w", (4,), 0, 7) + bytes(64)), "begins at 7"),
        (header(tensors=1, rest=info("w", (4,), 30, 0) + bytes(64)), "type id 30"),
        (header(tensors=1, rest=info("w", (0,), 0, 0) + bytes(64)), "has the shape"),
        (header(tensors=1, rest=text("w") + struct.pack("<I", 9) + bytes(99)), "9 dimensions"),
        (
            header(tensors=2, rest=(info("w", (4,), 0, 0) + info("v", (4,), 0, 0)) + bytes(99)),
            "overlap",
        ),
        (header(tensors=1, rest=info("w", (3, 33), 8, 0) + bytes(199)), "has the shape"),
        (header(tensors=1, rest=info("w", (2, 2**58), 2, 0) + bytes(64)), "tensor w ends"),
        (header(tensors=1, rest=info("w", (4, 32), 8, 0) + bytes(135)), "tensor w ends"),
        (
            header(tensors=2, rest=info("w", (4, 32), 2, 0) + info("v", (4,), 0, 64) + bytes(199)),
            "overlap",
        ),
        (
            header(tensors=2, rest=(info("w", (4,), 0, 0) * 2) + bytes(99)),
            "the tensor w twice",
        ),
    ],
)
def test_a_hostile_file_is_refused_with_the_reason(content, reason, tmp_path):
    path = tmp_path / "hostile.gguf"
    path.write_bytes(content)

    with pytest.raises(InputError, match=reason) as caught:
        GGUFFile(path)
    assert "hostile.gguf" in str(caught.value)


@pytest.mark.parametrize(("kind", "size"), [(2, 18), (8, 34)])
def test_quantized_tensors_take_the_bytes_of_their_blocks(kind, size, tmp_path):
    """Two side by side, as near as the alignment lets them be; the rows of one share a block."""
    path = tmp_path / "blocks.gguf"
    second = -(-3 * size // 32) * 32
    head = header(tensors=2, rest=info("w", (3, 32), kind, 0) + info("v", (2, 16), kind, second))
    start = -(-len(head) // 32) * 32
    block = struct.pack("<e", 2.0) + b"\x11" * (size - 2)
    path.write_bytes(head.ljust(start + second, b"\0") + block)

    file = GGUFFile(path)

    assert [entry.nbytes for entry in file.entries.values()] == [3 * size, size]
    assert file.tensor("w").shape == (3, 32)
    assert file.tensor("v").shape == (2, 16)
    assert not file.tensor("w").any()
    assert (file.tensor("v") == {2: 2.0 * (1 - 8), 8: 2.0 * 0x11}[kind]).all()


def test_types_are_those_of_the_gguf_package():
    """Names and blocks of every id; from 16 on a PowerInfer file has integers of its own."""
    known = {int(kind): (kind.name.lower(), *size) for kind, size in gguf.GGML_QUANT_SIZES.items()}

    for ids in TYPES.values():
        ours = {i: (t.name.lower(), t.block, t.nbytes) for i, t in ids.items() if i < 16}
        assert ours == {i: known[i] for i in ours}
    assert all(
        (t.name, t.block, t.nbytes) == known[i] for i, t in TYPES[b"GGUF"].items() if i >= 16
    )
    integers = {i: (t.name, t.nbytes) for i, t in TYPES[b"PWRI"].items() if i >= 16}
    assert integers == {16: ("i8", 1), 17: ("i16", 2), 18: ("i32", 4)}


@pytest.mark.parametrize(("magic", "kind"), [(b"PWRI", 18), (b"GGUF", 26)])
def test_integers_and_empty_lists_are_read(magic, kind, tmp_path):
    path = tmp_path / "lists.gguf"
    infos = info("none", (0,), kind, 0) + info("two", (2,), kind, 0) + info("no", (0,), kind, 32)
    head = header(tensors=3, magic=magic, rest=infos)
    path.write_bytes(head.ljust(-(-len(head) // 32) * 32, b"\0") + struct.pack("<ii24x", 7, -1))

    file = GGUFFile(path)

    assert [file.tensor(name).tolist() for name in ("none", "two", "no")] == [[], [7, -1], []]
    assert file.tensor("none").dtype == torch.int32


def test_a_type_that_is_not_decoded_is_placed_but_not_read(tmp_path):
    path = tmp_path / "k.gguf"
    path.write_bytes(header(tensors=1, rest=info("w", (2, 256), 14, 0)).ljust(96 + 2 * 210, b"\0"))

    file = GGUFFile(path)

    assert file.entries["w"].nbytes == 420
    with pytest.raises(InputError, match="tensor w is q6_K, which is not supported"):
        file.tensor("w")


def test_a_long_array_stays_in_the_file(tmp_path):
    """No Python object for each of its 20 million numbers, which took 28 times the file."""
    n = 20_000_000
    path = tmp_path / "long.gguf"
    array = text("k") + struct.pack("<IIQ", 9, 0, n) + bytes(range(250)) * (n // 250)
    path.write_bytes(header(keys=1, rest=array) + bytes(32))

    tracemalloc.start()
    value = GGUFFile(path).keys["k"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak < 2**20
    assert len(value) == n
    assert [int(v) for v in (value[0], value[251], value[-1])] == [0, 1, 249]


@pytest.mark.parametrize("kind", range(13))
def test_arrays_of_every_kind_are_read(kind, tmp_path):
    values = {6: [0.5, -2.0], 7: [True, False], 8: ["a", ""], 12: [1e300, -0.0]}.get(kind, [1, 2])
    codes = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
    if kind == 8:
        packed = b"".join(map(text, values))
    elif kind != 9:
        packed = struct.pack(f"<2{codes.get(kind, 'd')}", *values)
    else:
        packed = bytes(64)
    path = tmp_path / "x.gguf"
    path.write_bytes(header(keys=1, rest=text("k") + struct.pack("<IIQ", 9, kind, 2) + packed))
    if kind == 9:  # an array of arrays
        with pytest.raises(InputError, match="unknown value type 9"):
            GGUFFile(path)
        return
    found = GGUFFile(path).keys["k"]
    assert found == values
    assert [type(v) for v in found] == [type(v) for v in values]


@pytest.mark.parametrize("what", ["tensors", "keys", "strings"])
def test_counts_that_no_model_has_are_refused_before_they_are_read(what, tmp_path):
    path = tmp_path / "many.gguf"
    rest = text("k") + struct.pack("<IIQ", 9, 8, 3_000_000)
    counts = {"tensors": {"tensors": 200_000}, "keys": {"keys": 200_000}}.get(what, {"keys": 1})
    with path.open("wb") as file:
        file.write(header(**counts, rest=rest))
        file.truncate(100_000_000)  # long enough for what it claims
    with pytest.raises(InputError, match=rf"claims [0-9,]+ {what}.*expected at most"):
        GGUFFile(path)


@pytest.mark.parametrize("kind", ["FIFO", "folder", "device", "loop", "gone"])
def test_what_is_no_file_is_refused_and_never_waited_for(kind, tmp_path):
    path = tmp_path / "x.gguf"
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind != "gone":
        path.symlink_to("/dev/zero" if kind == "device" else path)
    told = {"loop": "cannot be read", "gone": "no such file"}.get(kind, f"is a {kind}")
    with pytest.raises(InputError, match=rf"x.gguf: {told}"):
        GGUFFile(path)


def test_a_name_that_would_break_the_line_is_quoted_and_cut(tmp_path):
    path = tmp_path / "x.gguf"
    name = "w\n\x1b[2J" + "x" * 5000
    path.write_bytes(header(tensors=1, rest=info(name, (4,), 0, 2**50) + bytes(64)))
    with pytest.raises(InputError, match=r"tensor 'w\\n\\x1b") as error:
        GGUFFile(path)
    assert len(str(error.value)) < 400

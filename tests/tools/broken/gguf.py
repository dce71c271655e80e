"""Broken PWRI and GGUF files, made byte by byte."""

from __future__ import annotations

import struct
from pathlib import Path

from broken.bytes_faults import KINDS, appended, content, cut, flipped, linked, put, replaced
from broken.runner import CLAIM, Case, Damage

F32, STRING, ARRAY, U32, BOOL = 6, 8, 9, 4, 7
SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Value types and their bytes."""


def text(value: str | bytes, length: int | None = None) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def key(name: str | bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def array(kind: int, count: int, values: bytes) -> bytes:
    return struct.pack("<IQ", kind, count) + values


def tensor(name: str | bytes, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
    return text(name) + dims + struct.pack("<IQ", kind, offset)


ARCH = key("general.architecture", STRING, text("llama"))
KEYS = [
    ARCH,
    key("llama.rope.freq_base", F32, struct.pack("<f", 10_000.0)),
    key("llama.block_count", U32, struct.pack("<I", 1)),
    key("tokenizer.ggml.tokens", ARRAY, array(STRING, 2, text("<s>") + text("a"))),
    key("tokenizer.ggml.scores", ARRAY, array(F32, 2, struct.pack("<ff", 0, -1))),
]
TENSORS = [tensor("token_embd.weight", (2, 4), 0, 0), tensor("output.weight", (2, 4), 1, 32)]
DATA = struct.pack("<8f", *range(8)) + struct.pack("<8e", *range(8)) + bytes(16)


def whole(
    keys: list[bytes] = KEYS,
    tensors: list[bytes] = TENSORS,
    data: bytes = DATA,
    *,
    magic: bytes = b"PWRI",
    version: int = 3,
    counts: tuple[int | None, int | None] = (None, None),
    order: str = "<",
) -> bytes:
    """Assemble a file; `counts` of tensors and keys may lie."""
    n_tensors = len(tensors) if counts[0] is None else counts[0]
    n_keys = len(keys) if counts[1] is None else counts[1]
    head = magic + struct.pack(f"{order}IQQ", version, n_tensors, n_keys)
    head += b"".join(keys) + b"".join(tensors)
    return head.ljust(-(-len(head) // 32) * 32, b"\0") + data


def write(path: Path) -> Path:
    path.write_bytes(whole())
    return path


def file(*args: object, **kwargs: object) -> Damage:
    return content(whole(*args, **kwargs))


def more(*keys: bytes) -> Damage:
    return file([*KEYS, *keys])


def with_tensor(*tensors: bytes, data: bytes = DATA) -> Damage:
    return file(KEYS, list(tensors), data)


HUGE = {"2**31": 2**31, "2**32": 2**32, "2**40": 2**40, "2**63": 2**63, "-1": 2**64 - 1}
EVIL = {
    "a line end": "w\nx",
    "an escape": "w\x1b[2J\x1b]0;x\x07",
    "a NUL": "w\0x",
    "right to left": "w\u202ex",
    "a million letters": "w" * 1_000_000,
}
HEAD = len(whole()) - len(DATA)

CASES = [
    *(Case(kind, damage) for kind, damage in KINDS.items()),
    *(Case(f"cut at {n}", cut(n)) for n in (1, 3, 4, 7, 8, 15, 16, 23, 24, 31, 32, 60, 90, 150)),
    *(Case(f"cut at {share:.0%}", cut(share)) for share in (0.5, 0.6, 0.7, 0.8, 0.9)),
    Case("cut in the header's padding", cut(HEAD - 1)),
    Case("cut before the data", cut(HEAD)),
    Case("cut in the last tensor", cut(-20)),
    Case("cut behind the last tensor", cut(-16), "the rest is padding"),
    Case("bytes behind the end", appended(b"x" * 99), "no tensor lies there"),
    Case("zeros alone", content(bytes(4096))),
    Case("ones alone", content(b"\xff" * 4096)),
    Case("a PNG", content(b"\x89PNG\r\n\x1a\n" + bytes(99))),
    Case("a zip", content(b"PK\x03\x04" + bytes(99))),
    Case("an LFS pointer", content(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")),
    *(Case(f"magic {m!r}", put(0, m)) for m in (b"FUGG", b"IRWP", b"ggjt", b"gguf", b"\0\0\0\0")),
    Case("magic of a dense file", put(0, b"GGUF"), "the ids of these types mean the same in both"),
    *(Case(f"version {v}", file(version=v)) for v in (0, 1, 2, 4, 2**24 * 3, 2**32 - 1)),
    Case("big endian", file(order=">")),
    Case("big endian from the magic on", file(magic=b"FUGG", order=">")),
    *(Case(f"{name} tensors", file(counts=(n, None))) for name, n in HUGE.items()),
    *(Case(f"{name} keys", file(counts=(None, n))) for name, n in HUGE.items()),
    Case("a tensor more than there is", file(counts=(3, None))),
    Case("a key more than there is", file(counts=(None, 6))),
    Case("a key less than there is", file(counts=(None, 4))),
    *(Case(f"a key's name of {n} bytes", more(text("a", v))) for n, v in HUGE.items()),
    *(Case(f"a text of {n} bytes", more(key("a", STRING, text("a", v)))) for n, v in HUGE.items()),
    *(Case(f"a tensor's name of {n} bytes", file(KEYS, [text("a", v)])) for n, v in HUGE.items()),
    *(
        Case(
            f"an array of 2**61 values of type {kind}",
            more(key("a", ARRAY, array(kind, 2**61, b""))),
        )
        for kind in (*SCALARS, STRING)
    ),
    *(
        Case(
            f"an array of {CLAIM:,} bytes of type {kind}",
            more(key("a", ARRAY, array(kind, CLAIM // size, b""))),
        )
        for kind, size in SCALARS.items()
    ),
    *(
        Case(f"a value of type {kind}", more(key("a", kind, bytes(64))))
        for kind in (13, 14, 255, 2**31, 2**32 - 1)
    ),
    *(
        Case(f"an array of type {kind}", more(key("a", ARRAY, array(kind, 1, bytes(64)))))
        for kind in (ARRAY, 13, 255, 2**32 - 1)
    ),
    Case("arrays in arrays without end", more(key("a", ARRAY, array(ARRAY, 1, b"") * 99_999))),
    Case("a key twice", more(ARCH)),
    Case("a key without a name", more(key("", U32, bytes(4))), "a name like any other"),
    *(
        Case(f"a key's name with {what}", more(key(name, U32, bytes(4))), "shown escaped and cut")
        for what, name in EVIL.items()
    ),
    *(
        Case(f"twice a key's name with {what}", more(*[key(name, U32, bytes(4))] * 2))
        for what, name in EVIL.items()
    ),
    *(
        Case(f"a text with {what}", more(key("a", STRING, text(name))), "shown escaped and cut")
        for what, name in EVIL.items()
    ),
    Case(
        "an architecture with an escape",
        file([key("general.architecture", STRING, text("\x1b[2J\n")), *KEYS[1:]]),
        "shown escaped",
    ),
    Case(
        "an architecture that is a number",
        file([key("general.architecture", U32, bytes(4))]),
        "inspect shows it; verify refuses it",
    ),
    *(
        Case(f"a name in {what}", more(key(raw, U32, bytes(4))))
        for what, raw in {
            "Latin-1": b"caf\xe9",
            "a surrogate": b"\xed\xa0\x80",
            "an overlong slash": b"\xc0\xaf",
            "UTF-16": "ab".encode("utf-16"),
        }.items()
    ),
    Case("a text that is not UTF-8", more(key("a", STRING, text(b"\xff\xfe")))),
    Case(
        "a number that is NaN",
        more(key("a", F32, struct.pack("<f", float("nan")))),
        "null in the JSON",
    ),
    Case(
        "a number that is infinite",
        more(key("a", 12, struct.pack("<d", float("inf")))),
        "null in the JSON",
    ),
    Case(
        "an array with NaN",
        more(key("a", ARRAY, array(F32, 1, struct.pack("<f", float("nan"))))),
        "null in the JSON",
    ),
    Case("a truth value of 2", more(key("a", BOOL, b"\x02")), "true, as in C"),
    *(
        Case(f"alignment {value}", more(key("general.alignment", U32, struct.pack("<I", value))))
        for value in (0, 3, 33, 2**17, 2**32 - 1)
    ),
    Case("a negative alignment", more(key("general.alignment", 5, struct.pack("<i", -32)))),
    Case("an alignment that is NaN", more(key("general.alignment", F32, b"\0\0\xc0\x7f"))),
    Case(
        "an alignment that is a long text",
        more(key("general.alignment", STRING, text("3" * 100_000))),
    ),
    Case(
        "an alignment that is a long list",
        more(key("general.alignment", ARRAY, array(U32, 100_000, bytes(400_000)))),
    ),
    Case("no dimension", with_tensor(tensor("w", (), 0, 0))),
    *(
        Case(f"{n} dimensions", with_tensor(text("w") + struct.pack("<I", n) + bytes(999)))
        for n in (5, 255, 2**31, 2**32 - 1)
    ),
    *(
        Case(f"a tensor of {name} rows", with_tensor(tensor("w", (n, 4), 0, 0)))
        for name, n in {**HUGE, "no": 0}.items()
    ),
    Case("a shape whose product overflows", with_tensor(tensor("w", (2**32, 2**32), 0, 0))),
    Case("a shape whose product is 4 modulo 2**64", with_tensor(tensor("w", (2**62 + 1, 4), 0, 0))),
    *(
        Case(f"type {kind}", with_tensor(tensor("w", (2, 4), kind, 0)))
        for kind in (4, 5, 19, 31, 255, 2**31, 2**32 - 1)
    ),
    Case("type 31 in a GGUF", file(KEYS, [tensor("w", (4,), 31, 0)], magic=b"GGUF")),
    Case("half a block", with_tensor(tensor("w", (16,), 8, 0))),
    *(
        Case(f"a tensor at {name}", with_tensor(tensor("w", (2, 4), 0, n)))
        for name, n in {**HUGE, "7": 7, "16": 16, "the end": 64}.items()
    ),
    Case("tensors that overlap", with_tensor(TENSORS[0], tensor("v", (2, 4), 0, 0))),
    Case("a tensor twice", with_tensor(TENSORS[0], tensor("token_embd.weight", (2, 4), 1, 32))),
    *(
        Case(
            f"twice a tensor's name with {what}",
            with_tensor(tensor(name, (8,), 0, 0), tensor(name, (8,), 1, 32)),
        )
        for what, name in EVIL.items()
    ),
    Case(
        "a tensor's name that leaves the folder",
        replaced(b"output.weight", b"../../x.weigh"),
        "names are never paths",
    ),
    Case(
        "a weight that is NaN", put(HEAD, b"\0\0\xc0\x7f"), "inspect reads no weights; verify does"
    ),
    Case("a bit of a weight", flipped(HEAD + 5), "no checksum tells"),
    Case("a link to the file", linked(), "the file is whole"),
]

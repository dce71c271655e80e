"""Broken gpuidx files, beside a model of one layer with 512 neurons."""

from __future__ import annotations

import struct
from pathlib import Path

from broken.bytes_faults import KINDS, content, cut, flipped, put
from broken.gguf import ARRAY, HUGE, STRING, U32, array, key, tensor, text, whole
from broken.runner import Case, Damage

WIDTH, HIDDEN, HOT = 512, 32, 256
U64, F32, I32 = 10, 6, 18
SPLIT = "x.powerinfer.gguf.generated.gpuidx"
MODEL = "x.powerinfer.gguf"


def number(name: str, value: int) -> bytes:
    return key(f"llama.{name}", U32, struct.pack("<I", value))


def model(ffn: tuple[int, ...] = (WIDTH, HIDDEN), kind: int = 0) -> bytes:
    """A model file as far as the split needs it."""
    keys = [
        key("general.architecture", STRING, text("llama")),
        key("tokenizer.ggml.tokens", ARRAY, array(STRING, 1, text("a"))),
        key("llama.attention.layer_norm_rms_epsilon", F32, struct.pack("<f", 1e-5)),
        number("block_count", 1),
        number("embedding_length", HIDDEN),
        number("feed_forward_length", WIDTH),
        number("attention.head_count", 2),
        number("context_length", 64),
    ]
    nbytes = 4
    for size in ffn:
        nbytes *= size
    names = ("ffn_gate", "ffn_up", "ffn_down_t")
    tensors = [
        tensor(f"blk.0.{name}.weight", ffn, kind, i * nbytes) for i, name in enumerate(names)
    ]
    return whole(keys, tensors, bytes(3 * nbytes))


def header(layers: int = 1, capacity: int = 2**20) -> list[bytes]:
    return [
        key("general.architecture", STRING, text("generic.gpu_index")),
        key("generic.gpu_index.block_count", U32, struct.pack("<I", layers)),
        key("split.vram_capacity", U64, struct.pack("<Q", capacity)),
    ]


def lists(
    index: list[int] | None = None,
    bucket: list[int] | None = None,
    layer: str = "0",
    kind: int = I32,
) -> tuple[list[bytes], bytes]:
    index = [1] * HOT + [0] * (WIDTH - HOT) if index is None else index
    bucket = list(range(HOT)) if bucket is None else bucket
    data = struct.pack(f"<{len(index)}i", *index)
    start = -(-len(data) // 32) * 32
    data = data.ljust(start, b"\0") + struct.pack(f"<{len(bucket)}i", *bucket)
    tensors = [
        tensor(f"blk.{layer}.gpu_idx", (len(index),), kind, 0),
        tensor(f"blk.{layer}.gpu_bucket", (len(bucket),), kind, start),
    ]
    return tensors, data


def split(keys: list[bytes] | None = None, **of_lists: object) -> Damage:
    return content(whole(header() if keys is None else keys, *lists(**of_lists)), SPLIT)


def write(folder: Path) -> Path:
    folder.mkdir()
    (folder / MODEL).write_bytes(model())
    (folder / SPLIT).write_bytes(whole(header(), *lists()))
    return folder


def on_split(damage: Damage) -> Damage:
    return lambda folder: damage(folder / SPLIT)


def without(count: int) -> Damage:
    """The first `count` tensors alone."""
    tensors, data = lists()
    return content(whole(header(), tensors[:count], data), SPLIT)


ONES = [1] * HOT + [0] * (WIDTH - HOT)
UNSORTED = [*range(1, HOT), 0]
DIGITS = "9" * 5000

CASES = [
    *(Case(kind, on_split(damage)) for kind, damage in KINDS.items() if kind != "gone"),
    *(
        Case(f"cut at {share:.0%}", cut(share, SPLIT))
        for share in (0.01, 0.05, 0.3, 0.6, 0.9, 0.99)
    ),
    *(
        Case(f"{name} layers", split(header(layers=n)))
        for name, n in (("no", 0), ("2**32 - 1", 2**32 - 1))
    ),
    Case("no capacity", split(header(capacity=0))),
    Case("a capacity of -1", split(header(capacity=2**64 - 1)), "more room than is needed"),
    Case("no header", split([])),
    Case("a header less", split(header()[:2])),
    Case(
        "the capacity as a text",
        split([*header()[:2], key("split.vram_capacity", STRING, text("1"))]),
    ),
    Case(
        "another architecture",
        split([key("general.architecture", STRING, text("llama")), *header()[1:]]),
    ),
    Case("a dense file's magic", put(0, b"GGUF", SPLIT)),
    Case("big endian", put(4, struct.pack(">I", 3), SPLIT)),
    Case("a list less", without(1)),
    Case("no lists", without(0)),
    Case("another layer's lists", split(layer="1")),
    Case("a layer's number of 5,000 digits", split(layer=DIGITS)),
    Case("a negative layer", split(layer="-1")),
    Case("lists in f32", split(kind=0)),
    Case("lists in f16", split(kind=1)),
    Case("an index too short", split(index=ONES[:-1])),
    Case("an index too long", split(index=[*ONES, 0])),
    Case("an empty index", split(index=[])),
    Case("an empty bucket", split(bucket=[])),
    Case("an index of 2", split(index=[2, *ONES[1:]])),
    Case("an index of -1", split(index=[-1, *ONES[1:]])),
    Case("a bucket in another order", split(bucket=UNSORTED)),
    Case("a neuron twice", split(bucket=[0, *range(HOT - 1)])),
    Case("a negative neuron", split(bucket=[-1, *range(1, HOT)])),
    Case("a neuron beyond the layer", split(bucket=[*range(HOT - 1), 2**31 - 1])),
    Case("half a group of neurons", split(index=[1] * 100 + [0] * 412, bucket=list(range(100)))),
    *(
        Case(f"a bit of a list, {at} from the end", flipped(-at, name=SPLIT))
        for at in (1, 700, 1500)
    ),
    *(
        Case(f"an array of {name} bytes", split([*header(), key("a", ARRAY, array(0, n, b""))]))
        for name, n in HUGE.items()
    ),
]

BESIDE = {
    "rows of nothing": model((0,), I32),
    "a damaged model": model()[:100],
    "another file": b"x",
    "nothing": b"",
}
"""What may lie where the model is expected."""

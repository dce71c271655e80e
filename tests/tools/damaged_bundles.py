"""Bundles damaged on purpose: their files taken apart, changed, and put together again."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from sparsecast.export.config import VerifyConfig
from sparsecast.export.read.reader import GGUFFile
from sparsecast.export.verify import verify

U8, U32, I32, F32, BOOL, STRING, ARRAY, U64, F64 = 0, 4, 5, 6, 7, 8, 9, 10, 12
CODES = {U8: "B", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", F64: "d"}


TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 8, "i32": 18}


NUMBERS = {"f32": np.float32, "f16": np.float16, "i32": np.int32}


ELEMENTS = {"tokens": STRING, "scores": F32, "token_type": I32}


SPLIT = ".generated.gpuidx"


def key(name: str) -> str:
    """A key of the model's architecture."""
    return f"llama.{name}"


def vocabulary(name: str) -> str:
    return f"tokenizer.ggml.{name}"


class Value(NamedTuple):
    """A key's value type, and that of an array's elements, beside the value."""

    kind: int
    value: Any
    element: int = 0


class Tensor(NamedTuple):
    """Stored numbers, (rows, bytes) where they are quantized."""

    array: np.ndarray
    kind: int
    shape: tuple[int, ...]


class Edited:
    """A GGUF file taken apart; `save` puts it together as it then is, right or wrong."""

    def __init__(self, path: Path) -> None:
        file = GGUFFile(path)
        raw = path.read_bytes()
        self.path, self.magic, self.version, self.shift = path, file.magic, file.version, 0
        self.keys = {name: self._value(file, name) for name in file.keys}
        self.tensors = {}
        for name, entry in file.entries.items():
            kind = NUMBERS.get(entry.type.name, np.uint8)
            data = np.frombuffer(raw[entry.start : entry.start + entry.nbytes], kind).copy()
            rows = data.reshape(entry.shape if kind is not np.uint8 else (entry.shape[0], -1))
            self.tensors[name] = Tensor(rows, TYPES[entry.type.name], entry.shape)

    @staticmethod
    def _value(file: GGUFFile, name: str) -> Value:
        return Value(file.key_types[name], file.keys[name], ELEMENTS.get(name.split(".")[-1], 0))

    def put(self, name: str, array: np.ndarray, kind: int = TYPES["f16"]) -> None:
        self.tensors[name] = Tensor(array, kind, array.shape)

    def save(self) -> None:
        alignment = self.keys.get("general.alignment", Value(U32, 32)).value
        header = [self.magic, struct.pack("<IQQ", self.version, len(self.tensors), len(self.keys))]
        for name, value in self.keys.items():
            header += [_text(name), struct.pack("<I", value.kind), _packed(value)]
        data, place = [], 0
        for name, tensor in self.tensors.items():
            dims = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape[::-1])
            # Of all tensors but the first: it may be that they do not begin where they should.
            offset = place + (self.shift if place else 0)
            header += [_text(name), dims, struct.pack("<IQ", tensor.kind, offset)]
            data.append(_padded(np.ascontiguousarray(tensor.array).tobytes(), alignment))
            place += len(data[-1])
        self.path.write_bytes(_padded(b"".join(header), alignment) + b"".join(data))


def _text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def _packed(value: Value) -> bytes:
    if value.kind == STRING:
        return _text(value.value)
    if value.kind != ARRAY:
        return struct.pack("<" + CODES[value.kind], value.value)
    head = struct.pack("<IQ", value.element, len(value.value))
    if value.element == STRING:
        return head + b"".join(map(_text, value.value))
    return head + struct.pack(f"<{len(value.value)}{CODES[value.element]}", *value.value)


def _padded(content: bytes, alignment: int) -> bytes:
    return content + bytes(-len(content) % alignment)


class Bundle(NamedTuple):
    """What a damage works on."""

    folder: Path
    file: Edited
    split: Edited | None


Damage = Callable[[Bundle], Any]


def keys(**change: Value | None) -> Damage:
    """Keys of the architecture, with `__` for dots; None takes one out."""

    def damage(b: Bundle) -> None:
        set_keys(b.file, {key(n.replace("__", ".")): value for n, value in change.items()})

    return damage


def set_keys(file: Edited, change: dict[str, Value | None]) -> None:
    for name, value in change.items():
        assert file.keys.get(name) != value, f"{name} is so already"
        if value is None:
            del file.keys[name]
        else:
            file.keys[name] = value


def named(name: str, value: Value | None) -> Damage:
    return lambda b: set_keys(b.file, {name: value})


def column(name: str, change: Callable[[list[Any]], Any], element: int | None = None) -> Damage:
    """An array of the vocabulary, changed in place."""

    def damage(b: Bundle) -> None:
        full = vocabulary(name)
        value = b.file.keys[full]
        change(value.value)
        b.file.keys[full] = value._replace(element=value.element if element is None else element)

    return damage


def tensor(
    name: str, change: Callable[[np.ndarray], np.ndarray], kind: str | None = None
) -> Damage:
    """Other numbers, another shape or another type."""

    def damage(b: Bundle) -> None:
        old = b.file.tensors[name]
        new = change(old.array)
        number = old.kind if kind is None else TYPES[kind]
        assert (new.shape, number) != (old.array.shape, old.kind) or not np.array_equal(
            new, old.array, equal_nan=True
        )
        shape = old.shape if new.shape == old.array.shape else new.shape
        b.file.tensors[name] = Tensor(new, number, shape)

    return damage


def blocks(name: str, row: int, byte: int, change: int) -> Damage:
    """Bits of a quantized tensor."""

    def damage(b: Bundle) -> None:
        b.file.tensors[name].array[row, byte] ^= change

    return damage


def quantized(name: str, kind: str, shape: tuple[int, int]) -> Damage:
    """Random codes with a scale of 1 in rows that need not be whole blocks."""

    def damage(b: Bundle) -> None:
        size = {"q4_0": 18, "q8_0": 34}[kind]
        codes = np.random.default_rng(0).integers(0, 256, (shape[0] * shape[1] // 32, size))
        codes[:, :2] = 0, 0x3C
        b.file.tensors[name] = Tensor(codes.astype(np.uint8), TYPES[kind], shape)

    return damage


def extra(name: str, *shape: int) -> Damage:
    return lambda b: b.file.put(name, np.zeros(shape, np.float32), TYPES["f32"])


def without(*names: str) -> Damage:
    return lambda b: [b.file.tensors.pop(name) for name in names]


def exchanged(one: str, other: str) -> Damage:
    def damage(b: Bundle) -> None:
        tensors = b.file.tensors
        tensors[one], tensors[other] = tensors[other], tensors[one]

    return damage


def element(*place: int, value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        array[place] = value
        return array

    return change


def interleaved(heads: int) -> Callable[[np.ndarray], np.ndarray]:
    """Rows of transformers, halves of a head one after the other, as the engine wants them."""
    return lambda a: a.reshape(heads, 2, -1, a.shape[1]).swapaxes(1, 2).reshape(a.shape)


def halves(heads: int) -> Callable[[np.ndarray], np.ndarray]:
    """And back."""
    return lambda a: a.reshape(heads, -1, 2, a.shape[1]).swapaxes(1, 2).reshape(a.shape)


def flipped(array: np.ndarray) -> np.ndarray:
    """The bytes of the transpose under the old shape."""
    return array.T.reshape(array.shape)


def zeros_from(row: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda a: np.where(np.arange(len(a))[:, None] < row, a, np.zeros_like(a))


def beside(name: str, content: Any) -> Damage:
    """A file beside the model's: bytes, a tensor, or None for none."""

    def damage(b: Bundle) -> None:
        path = b.folder / name
        if content is None:
            path.unlink()
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)

    return damage


def files_exchanged(one: str, other: str) -> Damage:
    def damage(b: Bundle) -> None:
        first, second = b.folder / one, b.folder / other
        contents = first.read_bytes(), second.read_bytes()
        first.write_bytes(contents[1])
        second.write_bytes(contents[0])

    return damage


def weights(layer: int, change: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
    """A predictor's file, changed in place."""

    def damage(b: Bundle) -> None:
        path = b.folder / "predictor" / f"model_{layer}.pt"
        value = torch.load(path, weights_only=True)
        change(value)
        torch.save(value, path)

    return damage


def json_of(name: str, **change: Any) -> Damage:
    def damage(b: Bundle) -> None:
        path = b.folder / "predictor" / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))

    return damage


def in_split(change: Callable[[Edited], Any]) -> Damage:
    return lambda b: change(b.split)


def reordered(split: Edited) -> None:
    """Layer 2 before layer 1, as 10 stands before 2 where numbers are sorted as text."""
    names = sorted(split.tensors, key=lambda n: (["0", "2", "1"].index(n.split(".")[1]), "_b" in n))
    split.tensors = {name: split.tensors[name] for name in names}


def attribute(name: str, value: Any) -> Damage:
    return lambda b: setattr(b.file, name, value)


def cut(share: float) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def all_of(*damages: Damage) -> Damage:
    return lambda b: [damage(b) for damage in damages]


def renamed_keys(b: Bundle) -> None:
    """A llama under the name of the architecture that has ReLU on gate and up."""
    b.file.keys = {n.replace("llama.", "bamboo."): v for n, v in b.file.keys.items()}
    b.file.keys["general.architecture"] = Value(STRING, "bamboo")


class Corruption(NamedTuple):
    """A damage and the lines it must give: name of the check, pattern of its detail."""

    what: str
    damage: Damage
    lines: dict[str, str]
    bundle: str = "f16"
    after: Callable[[Path], Any] | None = None
    """Done to the model file once it is written."""


def one(what: str, damage: Damage, check: str, detail: str, bundle: str = "f16") -> Corruption:
    return Corruption(what, damage, {check: detail}, bundle)


NOTHING = all_of()


COUNT = torch.ones(1280)


def checked(bundle: Path, model: Path, corpus: Path) -> dict[str, str]:
    """The failed checks' details."""
    result = verify(VerifyConfig(bundle=bundle, model=str(model), corpus=str(corpus), tokens=256))
    assert result.checks
    return {c.name: c.detail for c in result.checks if not c.ok}

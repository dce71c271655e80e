"""Files of `torch.save` with what no tensor is: code, claims of memory, odd tensors."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import torch
from broken.runner import CLAIM

CANARY = "canary"
"""The file that a pickle's code makes in the working folder."""
CODE = f"open({CANARY!r}, 'w').close()"


def zipped(pickled: bytes, compression: int = zipfile.ZIP_STORED, **others: bytes) -> bytes:
    """torch's zip format around a pickle; `others` are further members."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", compression) as archive:
        archive.writestr("x/data.pkl", pickled)
        archive.writestr("x/version", b"3\n")
        archive.writestr("x/byteorder", b"little")
        for name, data in {"data/0": bytes(64), **others}.items():
            archive.writestr(f"x/{name}", data)
    return made.getvalue()


def saved(value: Any, *, legacy: bool = False) -> bytes:
    made = io.BytesIO()
    torch.save(value, made, _use_new_zipfile_serialization=not legacy)
    return made.getvalue()


def unicode(text: str) -> bytes:
    raw = text.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def whole_number(value: int) -> bytes:
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def call(module: str, name: str, *arguments: bytes) -> bytes:
    """A pickle of one call."""
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"(" + b"".join(arguments) + b"tR."


def _stack_global(module: str, name: str, argument: bytes) -> bytes:
    names = b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name))
    return b"\x80\x04" + names + b"\x93" + argument + b"\x85R."


class _Reduced:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return exec, (CODE,)


RUNS: dict[str, bytes] = {
    "exec": call("builtins", "exec", unicode(CODE)),
    "exec by its old name": call("__builtin__", "exec", unicode(CODE)),
    "eval": call("builtins", "eval", unicode(CODE)),
    "a shell": call("os", "system", unicode(f"touch {CANARY}")),
    "a shell of posix": call("posix", "system", unicode(f"touch {CANARY}")),
    "a process": call("subprocess", "getoutput", unicode(f"touch {CANARY}")),
    "an import": call("importlib", "import_module", unicode("this")),
    "a name of the stack": _stack_global("builtins", "exec", unicode(CODE)),
    "an instance": b"(" + unicode(CODE) + b"ibuiltins\nexec\n.",
    "an object of the stack": b"(cbuiltins\nexec\n" + unicode(CODE) + b"o.",
    "a class of Python": pickle.dumps(_Reduced(), protocol=4),
    "an attribute": call("operator", "attrgetter", unicode("system")),
    "torch's own evaluation": call("torch.utils.collect_env", "run", unicode(f"touch {CANARY}")),
    "torch's unsafe load": call("torch.serialization", "load", unicode("x.pt")),
    "an extension": b"\x80\x02\x82\x01.",
    "a file of numpy": call("numpy", "load", unicode("x.npy")),
}
"""Pickles that would run something."""

GIANT = whole_number(CLAIM)
CLAIMS: dict[str, bytes] = {
    "a bytearray": call("builtins", "bytearray", GIANT),
    "a tensor": call("torch", "Tensor", whole_number(CLAIM // 4)),
    "a tensor of bytes": call("torch", "ByteTensor", GIANT),
    "a storage": call("torch.storage", "UntypedStorage", GIANT),
    "a typed storage": call("torch.storage", "TypedStorage", GIANT),
}
"""Pickles that would allocate what they name."""

MALFORMED: dict[str, bytes] = {
    "no pickle": b"x" * 99,
    "an empty pickle": b"",
    "no end": b"\x80\x02}",
    "protocol 99": b"\x80\x63}.",
    "an empty stack": b"\x80\x02.",
    "a mark alone": b"\x80\x02(.",
    "a text of 4 GB": b"\x80\x02X\xff\xff\xff\xff.",
    "a text of 2**63 bytes": b"\x80\x04\x8d" + struct.pack("<Q", 2**63) + b".",
    "a long of 2 GB": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "an unknown place": b"\x80\x02h\x09.",
    "lists in lists": b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b".",
    "a list in itself": b"\x80\x02]q\x00h\x00a.",
    "a storage of no type": b"\x80\x02X\x01\x00\x00\x00aQ.",
    "an unknown operation": b"\x80\x02\xff.",
}


def storage(key: str, size: int) -> bytes:
    kind = b"ctorch\nFloatStorage\n"
    of = unicode("storage") + kind + unicode(key) + unicode("cpu") + whole_number(size)
    return b"(" + of + b"tQ"


def rebuilt(
    size: tuple[int, ...],
    stride: tuple[int, ...],
    offset: int = 0,
    *,
    key: str = "0",
    stored: int = 16,
) -> bytes:
    """A tensor of a storage, as torch pickles it."""
    shapes = (b"(" + b"".join(map(whole_number, t)) + b"t" for t in (size, stride))
    rest = b"\x89ccollections\nOrderedDict\n)R"
    call_ = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage(key, stored)
    return call_ + whole_number(offset) + b"".join(shapes) + rest + b"tR"


def weights(fc1: bytes, fc2: bytes | None = None) -> bytes:
    """A pickled dict of the two tensors of a predictor, of rank 4, hidden 4 and width 4."""
    fc2 = rebuilt((4, 4), (4, 1)) if fc2 is None else fc2
    entries = unicode("fc1.weight") + fc1 + unicode("fc2.weight") + fc2
    return b"\x80\x02}(" + entries + b"u."


def bomb() -> bytes:
    """A compressed member that is said to unpack to `CLAIM` bytes."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", bytes(2**20))
        archive.writestr("x/version", b"3\n")
        archive.filelist[0].file_size = CLAIM
    return made.getvalue()


def split_zip() -> bytes:
    """A zip that says that it is one of two files."""
    whole = zipped(weights(rebuilt((4, 4), (4, 1))))
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, 0, 2)
    return whole[:-22] + locator + whole[-22:]


def legacy_claim() -> bytes:
    """torch's format before 1.6 with a storage of `CLAIM` bytes that is not there."""
    floats = CLAIM // 4
    kind = b"ctorch\nFloatStorage\n"
    entry = (
        b"("
        + unicode("storage")
        + kind
        + unicode("0")
        + unicode("cpu")
        + whole_number(floats)
        + b"NtQ"
    )
    tensor = (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + entry
        + whole_number(0)
        + b"("
        + whole_number(floats // 4)
        + whole_number(4)
        + b"t("
        + whole_number(4)
        + whole_number(1)
        + b"t\x89ccollections\nOrderedDict\n)RtR"
    )
    facts = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    head = [0x1950A86A20F9469CFC6C, 1001, facts]
    parts = [pickle.dumps(part, protocol=2) for part in head]
    main = b"\x80\x02}(" + unicode("fc1.weight") + tensor + unicode("fc2.weight") + b"Nu."
    return b"".join([*parts, main, pickle.dumps(["0"], protocol=2), struct.pack("<q", floats)])


def odd_tensors() -> Mapping[str, Any]:
    """Tensors that torch saves and that are no matrix of floats."""
    return {
        "sparse": torch.eye(4).to_sparse(),
        "meta": torch.empty(4, 4, device="meta"),
        "whole numbers": torch.ones(4, 4, dtype=torch.int64),
        "truth values": torch.ones(4, 4, dtype=torch.bool),
        "complex": torch.ones(4, 4, dtype=torch.complex64),
        "a vector": torch.ones(4),
        "a number": torch.tensor(1.0),
        "no rows": torch.ones(0, 4),
        "no columns": torch.ones(4, 0),
        "NaN": torch.full((4, 4), float("nan")),
        "infinite": torch.full((4, 4), float("-inf")),
        "beyond f16": torch.full((4, 4), 1e5),
        "repeated": torch.ones(1, 1).expand(4, 4),
        "of four dimensions": torch.ones(4, 4, 1, 1),
    }

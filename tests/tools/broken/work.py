"""Broken work folders of interrupted runs: options, checkpoints, tokens, chats, curves."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import torch
from broken import pickles
from broken.bytes_faults import KINDS, appended, content, cut, flipped, in_folder
from broken.json_faults import DIGITS, HOSTILE, LONG, brief, fields, nested, no_object
from broken.runner import Case, Damage
from safetensors.torch import save_file

OPTIONS, STATE, CHATS, TOKENS = "options.json", "phase.ckpt", "chats.safetensors", "tokens.uint16"
CURVES = "phase.csv"
GIVEN = {"seed": 0, "model": "m"}
SEQ_LEN = 4
STATES = ("global_step", "state_dict", "optimizer_states")
COLUMNS = "step,tokens,loss,l1,lambda,lr,threshold,wanted,sparsity,sparsity_0,dead_0"
ROW = "1,8,2.5,0.1,0.0,0.001,0,0,0.5,0.5,3"


def write(folder: Path) -> Path:
    folder.mkdir()
    (folder / OPTIONS).write_text(json.dumps(GIVEN))
    state = {"global_step": 3, "state_dict": {"w": torch.ones(4, 4)}, "optimizer_states": []}
    torch.save(state, folder / STATE)
    chats = torch.zeros(3, 2, SEQ_LEN, dtype=torch.int32)
    save_file({"train_N2S": chats, "held_out_N2S": chats.clone()}, folder / CHATS)
    (folder / TOKENS).write_bytes(struct.pack("<12H", *range(12)))
    (folder / CURVES).write_text(f"{COLUMNS}\n{ROW}\n")
    return folder


def state(value: Any) -> Damage:
    return content(pickles.saved(value), STATE)


def chats(**tensors: torch.Tensor) -> Damage:
    return lambda folder: save_file(tensors, folder / CHATS)


def _int32(*size: int) -> torch.Tensor:
    return torch.zeros(*size, dtype=torch.int32)


WHOLE = {"global_step": 3, "state_dict": {}, "optimizer_states": []}
OF_OPTIONS = [
    *no_object(OPTIONS),
    *(
        Case(f"an option that was {brief(value)}", fields(OPTIONS, {"seed": value}))
        for value in (None, "0", 1, [], {}, DIGITS, LONG, HOSTILE, nested(90))
    ),
]
OF_STATES = [
    *(Case(f"{kind}", in_folder(damage, STATE), only=STATE) for kind, damage in KINDS.items()),
    *(
        Case(f"cut at {share:.0%}", cut(share, STATE), only=STATE)
        for share in (0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99)
    ),
    *(
        Case(f"a state that is {brief(value)}", state(value), only=STATE)
        for value in (None, 1, [], "x", {})
    ),
    *(
        Case(
            f"a state without {name}",
            state({k: v for k, v in WHOLE.items() if k != name}),
            only=STATE,
        )
        for name in STATES
    ),
    *(
        Case(f"a state that would run {what}", content(pickles.zipped(data), STATE), only=STATE)
        for what, data in pickles.RUNS.items()
    ),
    *(
        Case(f"a state with {what}", content(pickles.zipped(data), STATE), only=STATE)
        for what, data in pickles.MALFORMED.items()
    ),
]
OF_CHATS = [
    *(Case(f"{kind}", in_folder(damage, CHATS), only=CHATS) for kind, damage in KINDS.items()),
    *(
        Case(f"cut at {share:.0%}", cut(share, CHATS), only=CHATS)
        for share in (0.01, 0.2, 0.5, 0.9)
    ),
    *(
        Case(
            f"a header of {size:,} bytes",
            content(size.to_bytes(8, "little") + b"{}", CHATS),
            only=CHATS,
        )
        for size in (0, 1, 3, 10**8, 2**63)
    ),
    *(
        Case(what, chats(**tensors), only=CHATS)
        for what, tensors in {
            "chats of one split": {"train_N2S": _int32(3, 2, 4)},
            "chats of a third": {n: _int32(3, 2, 4) for n in ("train_N2S", "held_out_N2S", "x")},
            "chats of another length": {n: _int32(3, 2, 5) for n in ("train_N2S", "held_out_N2S")},
            "no chats": {n: _int32(0, 2, 4) for n in ("train_N2S", "held_out_N2S")},
            "chats in a row": {n: _int32(24) for n in ("train_N2S", "held_out_N2S")},
            "chats of floats": {n: torch.zeros(3, 2, 4) for n in ("train_N2S", "held_out_N2S")},
        }.items()
    ),
]
OF_TOKENS = [
    *(Case(f"{kind}", in_folder(damage, TOKENS), only=TOKENS) for kind, damage in KINDS.items()),
    *(Case(f"{n} bytes of 24", cut(n, TOKENS), only=TOKENS) for n in (1, 2, 7, 9, 15, 17, 23)),
    Case("a sequence less", cut(16, TOKENS), "whole sequences; no checksum tells"),
    Case("a bit", flipped(3, name=TOKENS), "no checksum tells"),
    Case("bytes behind the end", appended(b"x", TOKENS), only=TOKENS),
]
OF_CURVES = [
    *(
        Case(what, content(text, CURVES), "damaged rows are left out")
        for what, text in {
            "no columns": "",
            "no rows": f"{COLUMNS}\n",
            "half a row": f"{COLUMNS}\n{ROW[:9]}",
            "a short row": f"{COLUMNS}\n{ROW[:9]}\n",
            "a long row": f"{COLUMNS}\n{ROW},1\n",
            "a blank row": f"{COLUMNS}\n\n",
            "no number": f"{COLUMNS}\nx{ROW[1:]}\n",
            "5,000 digits": f"{COLUMNS}\n{'9' * 5000}{ROW[1:]}\n",
            "NUL bytes": bytes(99),
            "no UTF-8": COLUMNS.encode() + b"\n\xff\xfe\n",
        }.items()
    ),
]

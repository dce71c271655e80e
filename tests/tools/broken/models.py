"""Broken model folders: weights as safetensors, sharded and as pickles, config.json, the index."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from broken import pickles
from broken.bytes_faults import KINDS, content, cut, in_folder, linked, put
from broken.json_faults import (
    DIGITS,
    HOSTILE,
    LONG,
    brief,
    edited,
    fields,
    nested,
    no_object,
    twice,
    without,
)
from broken.runner import CLAIM, Case, Damage
from safetensors.torch import load_file, save_file

WEIGHTS, CONFIG = "model.safetensors", "config.json"
INDEX, BIN = "model.safetensors.index.json", "pytorch_model.bin"
EMBEDDING = "model.embed_tokens.weight"
UP = "model.layers.0.mlp.up_proj.weight"


def header(change: Callable[[dict[str, Any]], object]) -> Damage:
    """Damage that changes the weights' header in place."""

    def damage(folder: Path) -> None:
        raw = (folder / WEIGHTS).read_bytes()
        end = 8 + int.from_bytes(raw[:8], "little")
        value = json.loads(raw[8:end])
        change(value)
        text = json.dumps(value).encode()
        (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + raw[end:])

    return damage


def entry(**values: Any) -> Damage:
    return header(lambda table: table[UP].update(values))


def bare_header(text: bytes, length: int | None = None) -> Damage:
    size = len(text) if length is None else length
    return content(size.to_bytes(8, "little") + text, WEIGHTS)


def renamed(new: str) -> Damage:
    return header(lambda table: table.update({new: table.pop(UP)}))


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    """Damage that saves the weights again, changed."""

    def damage(folder: Path) -> None:
        weights = load_file(folder / WEIGHTS)
        change(weights)
        save_file(weights, folder / WEIGHTS, {"format": "pt"})

    return damage


def sharded(folder: Path) -> None:
    """The weights in two files and an index instead of one file."""
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(weights)
    where = {}
    for file, held in {"a.safetensors": names[::2], "b.safetensors": names[1::2]}.items():
        save_file({name: weights[name] for name in held}, folder / file, {"format": "pt"})
        where |= dict.fromkeys(held, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))


def of_shards(damage: Damage) -> Damage:
    def both(folder: Path) -> None:
        sharded(folder)
        damage(folder)

    return both


def placed(file: str) -> Damage:
    """An index that names a file for one of the tensors."""
    return of_shards(edited(INDEX, lambda value: value["weight_map"].update({UP: file})))


def pickled(data: bytes) -> Damage:
    """A pickle instead of the weights."""

    def damage(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        (folder / BIN).write_bytes(data)

    return damage


def as_bin(change: Callable[[dict[Any, Any]], object]) -> Damage:
    def damage(folder: Path) -> None:
        weights: dict[Any, Any] = dict(load_file(folder / WEIGHTS))
        change(weights)
        pickled(pickles.saved(weights))(folder)

    return damage


def _linked_out(folder: Path) -> None:
    sharded(folder)
    outside = folder.parent / "outside.safetensors"
    (folder / "b.safetensors").rename(outside)
    (folder / "b.safetensors").symlink_to(outside)


SIZES: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(
        ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size"),
        (0, -1, 1.5, True, "64", [64], 2**31, 2**63, DIGITS, 65),
    ),
    "num_hidden_layers": (0, -1, "1", 2, 10**9, DIGITS),
    "num_key_value_heads": (0, -2, 3, "x"),
    "max_position_embeddings": (0, -1, "x", DIGITS),
    "rms_norm_eps": (-1, 2, "x", DIGITS),
    "rope_parameters": (
        [],
        1,
        {"rope_theta": -1},
        {"rope_theta": "x"},
        {"rope_type": "x"},
        {"rope_type": "yarn", "factor": DIGITS},
    ),
    "head_dim": (0, -1, 3, 10**9),
    "hidden_act": (1, [], {}, "no such", LONG, HOSTILE),
    "architectures": ("x", [1], ["BertModel"], 5, [LONG], [HOSTILE]),
    "pad_token_id": (-(10**6), 10**6, "x", 1.5, DIGITS),
    "tie_word_embeddings": ("x",),
    "quantization_config": ({"quant_method": "x"}, {"quant_method": HOSTILE}, [1], 5, {}),
    "transformers_weights": ("../x", LONG),
    "per_layer_config": ({"0": {}},),
}
"""Values that no config of this model has, by field."""
CASES = [
    *no_object(CONFIG),
    *(Case(f"{WEIGHTS}: {kind}", in_folder(damage, WEIGHTS)) for kind, damage in KINDS.items()),
    *(
        Case(f"{WEIGHTS}: cut at {share:.1%}", cut(share, WEIGHTS), only=WEIGHTS)
        for share in (0.0001, 0.01, 0.1, 0.5, 0.9, 0.999)
    ),
    Case(f"{WEIGHTS}: a link to it", linked(WEIGHTS), "the file is whole"),
    Case(
        f"{WEIGHTS}: bytes behind the end",
        lambda folder: (folder / WEIGHTS).open("ab").write(b"x"),
        only=WEIGHTS,
    ),
    *(
        Case(
            f"a header of {size:,} bytes", put(0, size.to_bytes(8, "little"), WEIGHTS), only=WEIGHTS
        )
        for size in (0, 1, 2, 10**8, 10**8 + 1, 2**31, 2**63, 2**64 - 1)
    ),
    Case("a header in big endian", content((2).to_bytes(8, "big") + b"{}", WEIGHTS), only=WEIGHTS),
    *(
        Case(f"a header with {what}", bare_header(text))
        for what, text in {
            "nothing": b"",
            "an empty object": b"{}",
            "a list": b"[]",
            "no UTF-8": b'{"\xff": 1}',
            "lists in lists": b"[" * 10**5 + b"]" * 10**5,
            "objects in objects": b'{"a":' * 10**5,
            "5,000 digits": b'{"a": ' + b"9" * 5000 + b"}",
            "NaN": b'{"a": NaN}',
            "zeros": bytes(99),
        }.items()
    ),
    *(
        Case(f"{key} {brief(value)}", entry(**{key: value}), only=WEIGHTS)
        for key, value in (
            ("dtype", "F99"),
            ("dtype", None),
            ("dtype", "I64"),
            ("dtype", "F64"),
            ("dtype", "BOOL"),
            ("shape", [-1, 4]),
            ("shape", [2**63, 2]),
            ("shape", [2**32, 2**32]),
            ("shape", []),
            ("shape", None),
            ("shape", "x"),
            ("shape", [1.5]),
            ("shape", [0, 4]),
            ("data_offsets", [0, 2**63]),
            ("data_offsets", [-1, 1]),
            ("data_offsets", [5, 1]),
            ("data_offsets", [0, 1]),
            ("data_offsets", []),
            ("data_offsets", None),
            ("data_offsets", [0, CLAIM]),
        )
    ),
    *(
        Case(
            f"a tensor called {brief(name)}",
            renamed(name),
        )
        for name in (
            "",
            "x",
            "../../x",
            LONG,
            "\x1b[2J\n",
            "model.layers.-1.mlp.up_proj.weight",
            "model.layers." + "9" * 5000 + ".mlp.up_proj.weight",
        )
    ),
    Case("a tensor less", tensors(lambda w: w.pop(UP))),
    Case("a layer's norm less", tensors(lambda w: w.pop("model.layers.0.input_layernorm.weight"))),
    Case("a matrix transposed", tensors(lambda w: w.update({UP: w[UP].T.contiguous()}))),
    Case("a matrix of whole numbers", tensors(lambda w: w.update({UP: w[UP].int()}))),
    Case("a matrix of bytes", tensors(lambda w: w.update({UP: w[UP].to(torch.uint8)}))),
    Case("a matrix without rows", tensors(lambda w: w.update({UP: w[UP][:0]}))),
    Case(
        "a weight that is NaN",
        tensors(lambda w: w[UP].view(-1)[:1].fill_(float("nan"))),
        "a model may hold it; collect refuses the inputs that it makes",
    ),
    Case("a changed weight", tensors(lambda w: w[UP].view(-1)[:1].add_(1)), "no checksum tells"),
    Case("shards", sharded, "a sharded model is a model"),
    *(
        Case(f"shards: {case.name}", of_shards(case.damage), case.harmless, case.only)
        for case in no_object(INDEX, without=("gone", "a link to nothing", "a link to itself"))
    ),
    *(
        Case(f"an index that names {brief(file)}", placed(file))
        for file in (
            "../x.safetensors",
            "/etc/passwd",
            "/etc/x.safetensors",
            "a/b.safetensors",
            "..\\x.safetensors",
            "x\0.safetensors",
            "none.safetensors",
            "",
            ".",
            "..",
            "config.json",
            LONG,
            LONG + ".safetensors",
            HOSTILE,
            HOSTILE + ".safetensors",
            "a.safetensors" * 2,
        )
    ),
    *(
        Case(
            f"an index whose map is {brief(value)}",
            of_shards(fields(INDEX, {"weight_map": value})),
            only=INDEX,
        )
        for value in (None, [], {}, 1, "x", {UP: 1}, {UP: None}, {UP: ["a.safetensors"]})
    ),
    Case("an index without a map", of_shards(without(INDEX, "weight_map")), only=INDEX),
    Case("an index of a tensor that is nowhere", placed("a.safetensors")),
    Case(
        "an index with a long name",
        of_shards(edited(INDEX, lambda v: v["weight_map"].update({LONG: "a.safetensors"}))),
    ),
    Case(
        "an index with an escape",
        of_shards(edited(INDEX, lambda v: v["weight_map"].update({HOSTILE: "a.safetensors"}))),
    ),
    Case(
        "a shard that is gone",
        of_shards(lambda folder: (folder / "b.safetensors").unlink()),
        only="b.safetensors",
    ),
    Case("a shard cut short", of_shards(cut(0.5, "b.safetensors")), only="b.safetensors"),
    Case(
        "a shard that is a folder",
        of_shards(in_folder(KINDS["a folder"], "b.safetensors")),
        only="b.safetensors",
    ),
    Case(
        "a shard that is a device",
        of_shards(in_folder(KINDS["a link to a device"], "b.safetensors")),
        only="b.safetensors",
    ),
    Case(
        "a tensor in two shards",
        of_shards(
            lambda folder: save_file(
                load_file(folder / "a.safetensors") | load_file(folder / "b.safetensors"),
                folder / "b.safetensors",
            )
        ),
    ),
    Case("a shard that is a link to elsewhere", _linked_out, "as the Hub's cache has it"),
    *(
        Case(f"a pickle that would run {what}", pickled(pickles.zipped(data)), only=BIN)
        for what, data in pickles.RUNS.items()
    ),
    *(
        Case(f"a pickle that claims {what}", pickled(pickles.zipped(data)), only=BIN)
        for what, data in pickles.CLAIMS.items()
    ),
    *(
        Case(f"a pickle with {what}", pickled(pickles.zipped(data)))
        for what, data in pickles.MALFORMED.items()
    ),
    Case("a pickle that is empty", pickled(b""), only=BIN),
    Case("a pickle in an old format that claims much", pickled(pickles.legacy_claim()), only=BIN),
    Case("a pickle", as_bin(lambda w: None), "older models are pickles of tensors"),
    *(
        Case(f"a pickle with {what}", as_bin(change))
        for what, change in {
            "a list for a matrix": lambda w: w.update({UP: [1]}),
            "a number for a name": lambda w: w.update({1: torch.ones(1)}),
            "a name with a surrogate": lambda w: w.update({"\ud800\n": torch.ones(1)}) or w.pop(UP),
            "a sparse matrix": lambda w: w.update({UP: w[UP].float().to_sparse()}),
            "a matrix on no device": lambda w: w.update({UP: w[UP].to("meta")}),
            "a matrix less": lambda w: w.pop(UP),
        }.items()
    ),
    *(
        Case(f"{name} {brief(value)}", fields(CONFIG, {name: value}))
        for name, several in SIZES.items()
        for value in several
    ),
    *(
        Case(
            f"fatrelu at {brief(value)}",
            fields(CONFIG, {"hidden_act": "fatrelu", "hidden_act_param": value}),
        )
        for value in ("x", [], {}, -1, True, DIGITS)
    ),
    *(
        Case(f"model_type {brief(value)}", fields(CONFIG, {"model_type": value}), longest=520)
        for value in (1, [], "", "no such", LONG, HOSTILE, "../llama")
    ),
    Case("a field twice", twice(CONFIG, "hidden_size", 65)),
    Case("a field twice, alike", twice(CONFIG, "model_type", "llama"), "the last one counts"),
    Case("a field of 900 levels", fields(CONFIG, {"x": nested(900)})),
    Case("no model_type", without(CONFIG, "model_type"), "a llama's fields say what it is"),
    Case(
        "code of its own",
        fields(CONFIG, {"auto_map": {"AutoModelForCausalLM": "canary.X"}}),
        "it is never run",
    ),
]

"""The command line of one stage, from the dataclass of its options: a field is an option, and the
text under it is its help."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

from docstring_parser import parse_from_object

from sparsecast.cli.close import did_you_mean
from sparsecast.cli.config_file import read_config
from sparsecast.cli.terminal import say
from sparsecast.cli.values import is_list, read, read_list, written
from sparsecast.collect.errors import InputError
from sparsecast.collect.options import option_of, shown, without_none

GROUPS = {
    "input": "model preset corpus activations predictors bundle path against evaluation engine "
    "prompt convert converter_python activation_threshold",
    "output": "out json folder force",
    "text": "tokens count_tokens eval_tokens seq_len batch_size batch_tokens",
    "what is recorded": "layers input_dtype energy",
    "predictors": "rank predictor_dtype predictor_budget target_recall target_sparsity "
    "target_perplexity traffic_budget",
    "training": "recipe epochs lr l1 clip_labels pretrain_share shift_tolerance baselines seed "
    "data_parallel",
    "GPU memory": "vram_budget vram_context",
    "what is measured": "shape shapes sparsities batches policies rounds steps sink perplexity "
    "reference_epochs check",
    "machine": "device device_map dtype compile threads",
}
"""Options by what they are about; the others come last."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message.removeprefix("argument "))

    def print_help(self, file: object = None) -> None:
        say(self.format_help())


def parse(
    name: str, config_type: type[Any], positional: str | None, args: Sequence[str]
) -> dict[str, Any]:
    """The fields that are given, on the command line or in the file of --config, which yields.

    Raises:
        InputError: An option that is none, a value of another type, or a required one missing.
        SystemExit: After --help.
    """
    hints = get_type_hints(config_type)
    kinds = {f.name: without_none(hints[f.name]) for f in dataclasses.fields(config_type)}
    required = [f.name for f in dataclasses.fields(config_type) if _default(f) is _REQUIRED]
    parser = _parser(name, config_type, kinds, positional)
    try:
        found, unknown = parser.parse_known_args(args)
        given = vars(found)
        if unknown:
            options = [option_of(kind) for kind in (*kinds, "config")]
            stray = next((word for word in unknown if word.startswith("-")), unknown[0])
            if not stray.startswith("-"):
                raise InputError(f"{shown(stray)} belongs to no option")
            stray = stray.partition("=")[0]
            raise InputError(f"no option is called {stray}{did_you_mean(stray, options)}")
        for key in kinds.keys() & given.keys():
            if is_list(kinds[key]):
                given[key] = list(chain.from_iterable(given[key]))
        if (path := given.pop("config", None)) is not None:
            given = read_config(path, kinds) | given
        if missing := [key for key in required if key not in given]:
            raise InputError("needs " + ", ".join(_typed(key, positional) for key in missing))
    except InputError as error:
        raise InputError(f"{name}: {error}; `sparsecast {name} --help` lists the options") from None
    return given


_REQUIRED = object()


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return _REQUIRED if field.default is dataclasses.MISSING else field.default


def _typed(name: str, positional: str | None) -> str:
    return name.upper() if name == positional else option_of(name)


def _parser(
    name: str, config_type: type[Any], kinds: Mapping[str, Any], positional: str | None
) -> _Parser:
    """Help lists required options first, then the others in their groups."""
    text = parse_from_object(config_type)
    helps = {param.arg_name: " ".join((param.description or "").split()) for param in text.params}
    defaults = {field.name: _default(field) for field in dataclasses.fields(config_type)}
    required = [key for key in kinds if defaults[key] is _REQUIRED]
    usage = [f"sparsecast {name}"]
    for key in required:
        usage.append(
            key.upper() if key == positional else f"{option_of(key)} {written(kinds[key])}"
        )
    parser = _Parser(
        prog=f"sparsecast {name}",
        usage=" ".join([*usage, "[options]"]),
        description=text.description,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        metavar="FILE.yaml",
        type=Path,
        help="take options from this file too, one a line as `tokens: 1000`; those given here win",
    )
    left = dict.fromkeys(kinds)
    for title, names in (("required", required), *_groups(), ("more", list(kinds))):
        keys = [key for key in names if key in left]
        group = parser.add_argument_group(title) if keys else parser
        for key in keys:
            del left[key]
            _add(group, key, kinds[key], helps.get(key, ""), defaults[key], key == positional)
    return parser


def _groups() -> list[tuple[str, list[str]]]:
    return [(title, keys.split()) for title, keys in GROUPS.items()]


def _add(group: Any, key: str, kind: Any, text: str, default: object, positional: bool) -> None:
    """One option; argparse takes `%` in its help for a format."""
    if default is not None and default is not _REQUIRED:
        text += f" (default: {_shown(default)})"
    text = text.replace("%", "%%")
    if positional:
        group.add_argument(key, nargs="?", metavar=key.upper(), type=_typed_read(kind), help=text)
        return
    how: dict[str, Any] = {"metavar": written(kind), "help": text, "type": _typed_read(kind)}
    if is_list(kind):
        item = written(get_args(kind)[0])
        how |= {"nargs": "+", "metavar": (f"{item},...", item)}
    elif kind is bool:
        how |= {"nargs": "?", "const": True}
    group.add_argument(option_of(key), dest=key, **how)


def _typed_read(kind: Any) -> Any:
    """`read`, with its messages kept by argparse, which keeps those of one error alone."""

    def reader(text: str) -> Any:
        try:
            return read_list(kind)(text) if is_list(kind) else read(kind, text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return reader


def _shown(default: object) -> str:
    if isinstance(default, bool):
        return "true" if default else "false"
    if isinstance(default, list):
        return ",".join(map(str, default))
    return repr(default) if default == "" or str(default) != str(default).strip() else str(default)

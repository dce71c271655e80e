"""The command line of one stage, from the dataclass of its options: a field is an option, and the
text under it is its help."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

from sparsecast.cli.suggestions import did_you_mean
from sparsecast.cli.terminal import print_output
from sparsecast.cli.values import format_type, is_list, parse_value
from sparsecast.core.errors import InputError
from sparsecast.core.options import convert_value, option_of, short_repr, without_none

GROUPS = {
    "input": "model preset corpus sft_corpus activations other_activations predictors bundle path "
    "against evaluation engine llama_bench prompt convert converter_python activation_threshold",
    "tasks": "tasks include_path num_fewshot limit chat_template",
    "output": "out format json folder force allow_other_tokens",
    "text": "tokens sft_tokens count_tokens eval_tokens seq_len batch_size batch_tokens",
    "what is recorded": "layers input_dtype energy",
    "predictors": "rank predictor_dtype predictor_budget",
    "target": "target_recall target_sparsity max_perplexity_increase target_perplexity "
    "traffic_budget",
    "training": "recipe epochs lr sft_lr stages l1 clip_labels pretrain_share shift_tolerance "
    "baselines seed data_parallel",
    "GPU memory": "vram_budget vram_context",
    "what is measured": "shape shapes act x1_norm sparsities batches policies prompts rounds steps "
    "sink processes perplexity reference_epochs seeds check",
    "machine": "device device_map dtype compile threads",
}
"""Options by what they are about; the others come last."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message.removeprefix("argument "))

    def print_help(self, file: object = None) -> None:
        print_output(self.format_help())


def parse(
    name: str, config_type: type[Any], positional: str | None, args: Sequence[str]
) -> dict[str, Any]:
    """Return the fields given on the command line, or in the file of --config, which yields.

    Raises:
        InputError: An option that is none, or a required one missing.
        SystemExit: After --help.
    """
    needed = {
        f.name: f.name.upper() if f.name == positional else option_of(f.name)
        for f in dataclasses.fields(config_type)
        if f.default is f.default_factory is dataclasses.MISSING
    }
    kinds = {key: without_none(hint) for key, hint in get_type_hints(config_type).items()}
    try:
        parser = _parser(name, config_type, kinds, needed)
        found, unknown = parser.parse_known_args(args)
        if unknown:
            stray = next((word for word in unknown if word.startswith("-")), unknown[0])
            if not stray.startswith("-"):
                raise InputError(f"{short_repr(stray)} belongs to no option")
            stray = stray.partition("=")[0]
            if positional is not None and stray == option_of(positional):
                raise InputError(f"{stray} is no option: give {needed[positional]} without it")
            near = did_you_mean(stray, map(option_of, [*kinds, "config"]))
            raise InputError(f"no option is called {stray}{near}")
        given = {key: value for key, value in vars(found).items() if value is not None}
        if path := given.pop("config", None):
            from sparsecast.cli.config_file import read_options

            given = read_options(path, kinds) | given
        if missing := [needed[key] for key in needed if key not in given]:
            raise InputError("needs " + ", ".join(missing))
    except InputError as error:
        raise InputError(f"{name}: {error}; `sparsecast {name} --help` lists the options") from None
    return given


def _parser(
    name: str, config_type: type[Any], kinds: dict[str, Any], needed: dict[str, str]
) -> _Parser:
    """Build the parser; help lists required options first, then the others in groups."""
    description, helps = _texts(config_type)
    typed = [
        option if option.isupper() else f"{option} {format_type(kinds[key])}"
        for key, option in needed.items()
    ]
    parser = _Parser(
        prog=f"sparsecast {name}",
        usage=" ".join(["sparsecast", name, *typed, "[options]"]),
        description=description,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        metavar="FILE.yaml",
        type=Path,
        help="take options from this file too, one a line as `tokens: 1000`; those given here win",
    )
    fields = {field.name: field for field in dataclasses.fields(config_type)}
    for title, names in {"required": " ".join(needed), **GROUPS, "more": " ".join(kinds)}.items():
        keys = [key for key in names.split() if key in fields]
        group = parser.add_argument_group(title) if keys else parser
        for key in keys:
            told = (helps.get(key, "") + _default(fields.pop(key))).replace("%", "%%")
            how = _kind(kinds[key])
            if needed.get(key) == key.upper():
                how |= {"nargs": "?", "default": None, "metavar": key.upper()}
                group.add_argument(key, help=told, **how)
            else:
                group.add_argument(option_of(key), help=told, **how)
    return parser


def _texts(config_type: type[Any]) -> tuple[str | None, dict[str, str]]:
    """Return what a dataclass and its fields are for, or nothing without docstring-parser, whose
    absence doctor reports."""
    try:
        from docstring_parser import parse_from_object
    except ImportError:
        return None, {}
    text = parse_from_object(config_type)
    helps = {param.arg_name: " ".join((param.description or "").split()) for param in text.params}
    return text.description, helps


def _default(field: dataclasses.Field[Any]) -> str:
    """Return a default as help shows it."""
    value = field.default
    if field.default_factory is not dataclasses.MISSING:
        value = ",".join(map(str, field.default_factory()))
    if value is None or value is dataclasses.MISSING:
        return ""
    return f" (default: {str(value).lower() if isinstance(value, bool) else value})"


class _Several(argparse.Action):
    """Join the lists of one option: `a,b c` is one list of three."""

    def __call__(self, parser: Any, given: Any, lists: Any, option: str | None = None) -> None:
        setattr(given, self.dest, list(chain.from_iterable(lists)))


def _kind(kind: Any) -> dict[str, Any]:
    """Return argparse's arguments for a type."""

    def reader(text: str) -> Any:
        try:
            return convert_value(kind, parse_value(kind, text))
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error  # argparse keeps its text

    if is_list(kind):
        item = format_type(get_args(kind)[0])
        metavar = (f"{item},...", item)
        return {"type": reader, "action": _Several, "nargs": "+", "metavar": metavar}
    flag = {"nargs": "?", "const": True} if kind is bool else {}
    return {"type": reader, "metavar": format_type(kind), **flag}

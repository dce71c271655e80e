"""`sparsecast <stage> [options]`: one config dataclass and one function per stage.

Stages are named by import path and loaded on demand, so `sparsecast --help` imports no torch.
Exit codes: 0 done, 1 failed, 2 the user must change something.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

QUIET = {
    "TOKENIZERS_PARALLELISM": "false",
    "DATASETS_VERBOSITY": "critical",
    "HF_HUB_VERBOSITY": "error",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}
"""What other libraries read when they are imported; the user's own settings win."""


KINDS = {
    "int": "a whole number",
    "float": "a number",
    "list[int]": "numbers such as 0,2,5",
    "list[float]": "numbers such as 0.5,0.9",
    "list[str]": "words such as exact,auto",
    "list[Literal['sign'] | Path]": "paths such as a,b",
}
"""Types of options in words."""


@dataclass(frozen=True)
class Stage:
    help: str
    config: str
    run: str
    positional: str | None = None


STAGES = {
    "demo": Stage(
        "everything below on the model shipped with the package",
        "sparsecast.cli.demo:DemoConfig",
        "sparsecast.cli.demo:demo",
    ),
    "collect": Stage(
        "record what fires in a ReLU-sparse model over a corpus",
        "sparsecast.collect.config:CollectConfig",
        "sparsecast.collect.run:collect",
    ),
    "train": Stage(
        "train one predictor per layer from what was recorded",
        "sparsecast.predictors.config:TrainConfig",
        "sparsecast.predictors.train:train",
    ),
    "report": Stage(
        "score predictors on held-out tokens, as JSON, Markdown and HTML",
        "sparsecast.predictors.config:ReportConfig",
        "sparsecast.predictors.report:report",
    ),
    "evaluate": Stage(
        "perplexity dense, exact, and with predictors in the loop",
        "sparsecast.predictors.config:EvaluateConfig",
        "sparsecast.predictors.evaluate:evaluate",
    ),
    "export": Stage(
        "write the bundle that PowerInfer loads",
        "sparsecast.export.config:ExportConfig",
        "sparsecast.export.run:export",
    ),
    "verify": Stage(
        "prove a bundle against its model, and against the engine itself",
        "sparsecast.export.config:VerifyConfig",
        "sparsecast.export.verify:verify",
        positional="bundle",
    ),
    "inspect": Stage(
        "what a folder or file of any stage holds, and whether activations are intact",
        "sparsecast.collect.inspect:InspectConfig",
        "sparsecast.export.inspect:inspect",
        positional="path",
    ),
    "bench collect": Stage(
        "tokens/s with and without recording, on the same batches",
        "sparsecast.collect.bench:BenchConfig",
        "sparsecast.collect.bench:bench",
    ),
    "bench train": Stage(
        "token-layers/s of training, ours and the public recipe's",
        "sparsecast.predictors.bench:BenchTrainConfig",
        "sparsecast.predictors.bench:bench",
    ),
    "bench predictors": Stage(
        "our predictors against the public recipe's: misses, bytes, traffic at a perplexity",
        "sparsecast.predictors.compare:CompareConfig",
        "sparsecast.predictors.compare:compare",
    ),
    "bench export": Stage(
        "MB/s and memory of export beside cp and PowerInfer's converter",
        "sparsecast.export.bench_export:BenchExportConfig",
        "sparsecast.export.bench_export:bench",
    ),
    "bench engine": Stage(
        "tokens/s of PowerInfer's engine with predictors, with everything active, and dense",
        "sparsecast.export.bench:BenchEngineConfig",
        "sparsecast.export.bench:bench",
    ),
    "bench kernels": Stage(
        "our GPU kernels and the whole sparse FFN against dense torch",
        "sparsecast.cli.bench_kernels:BenchKernelsConfig",
        "sparsecast.cli.bench_kernels:bench",
    ),
    "bench generate": Stage(
        "tokens/s of a model with its FFNs dense, exact, predicted, and as auto chooses",
        "sparsecast.cli.bench_generate:BenchGenerateConfig",
        "sparsecast.cli.bench_generate:bench",
    ),
    "sparsify": Stage(
        "ProSparse training: make a SiLU model sparse, or train one from a preset",
        "sparsecast.sparsify.config:SparsifyConfig",
        "sparsecast.sparsify.run:sparsify",
    ),
}


def usage() -> str:
    width = max(map(len, STAGES))
    lines = [f"  {name:<{width}}  {stage.help}" for name, stage in STAGES.items()]
    return "\n".join(
        [
            "usage: sparsecast STAGE [options]",
            "",
            *lines,
            "",
            "sparsecast STAGE --help lists options",
        ]
    )


def main(argv: list[str] | None = None) -> None:
    """Run one stage and exit with its code."""
    args = sys.argv[1:] if argv is None else argv
    if args[:1] in (["-h"], ["--help"]) or args[:2] in (["bench", "-h"], ["bench", "--help"]):
        sys.stdout.write(usage() + "\n")
        return
    if args[:1] == ["--version"]:
        from importlib.metadata import version

        sys.stdout.write(version("sparsecast") + "\n")
        return
    words = 2 if args[:1] == ["bench"] else 1
    name, rest = " ".join(args[:words]), args[words:]
    if name not in STAGES:
        found = f"no stage is called {name!r}" if args else "no stage given"
        sys.exit(_complain(f"{found}; expected one of {', '.join(STAGES)}", 2))
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _as_ctrl_c)
    sys.exit(_run(name, STAGES[name], rest))


def _as_ctrl_c(number: int, frame: object) -> NoReturn:
    """SIGTERM leaves nothing half-written either; another one does not disturb the clearing."""
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def _run(name: str, stage: Stage, args: list[str]) -> int:
    for variable, value in QUIET.items():
        os.environ.setdefault(variable, value)
    from sparsecast.collect.errors import InputError

    try:
        config_type = _load(stage.config)
        config = config_type(**_parse(name, config_type, stage.positional, args))
        run = _load(stage.run)
        _quiet()
        result = run(config)
    except InputError as error:
        return _complain(str(error), 2)
    except KeyboardInterrupt as stopped:
        told = str(stopped) or "interrupted; nothing half-written is left behind, run it again"
        return 1 if _rank() else _complain(told, 1)
    except Exception as error:
        if os.environ.get("SPARSECAST_TRACEBACK"):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        hint = "" if isinstance(error, OSError) else "; set SPARSECAST_TRACEBACK=1 to see where"
        return _complain(f"{name} failed: {reason}{hint}", 1)
    return 0 if getattr(result, "ok", True) else 1


def _parse(name: str, config_type: Any, positional: str | None, args: list[str]) -> dict[str, Any]:
    from jsonargparse import ArgumentParser, set_parsing_settings

    from sparsecast.collect.errors import InputError

    class Parser(ArgumentParser):
        def format_help(self, *args: Any, **kwargs: Any) -> str:
            text = re.sub(
                r"--\w+", lambda m: m[0].replace("_", "-"), super().format_help(*args, **kwargs)
            )
            return text.replace(f"--{positional} ", "") if positional else text

        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            told = re.sub(r'Parser key "(\w+)"', r"--\1", " ".join(message.split()))
            told = re.sub(r"a <class '(\w+)'>", r"\1", told)
            told = re.sub(r"--\w+", lambda m: m[0].replace("_", "-"), told)
            if found := re.search(r"(--[\w-]+): Does not validate.*Given value: (.*)", told):
                kind = kinds[_underscored(found[1])].removesuffix(" | None")
                told = f"{found[1]}: got {found[2]}, expected {KINDS.get(kind, kind)}"
            raise InputError(f"{name}: {told}; `sparsecast {name} --help` lists the options")

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    kinds = {f"--{field.name}": str(field.type) for field in fields(config_type)}
    parser = Parser(prog=f"sparsecast {name}", description=config_type.__doc__)
    parser.add_class_arguments(config_type, as_group=False)
    dashed = [_underscored(arg) for arg in args]
    for place, arg in enumerate(dashed):
        option, equals, given = arg.partition("=")
        kind, following = kinds.get(option, ""), (dashed[place + 1 :] or ["--"])[0]
        if kind == "bool" and not equals and following.startswith("--"):
            dashed[place] = f"{arg}=true"
        if "list[" in kind and "Path" in kind:
            dashed[place:] = _paths_joined(dashed[place:])
        elif "list[" in kind and re.fullmatch(r"[\w.,+-]+", given if equals else following):
            dashed[place + (not equals)] = f"{option}=[{given}]" if equals else f"[{following}]"
    if positional and dashed and not dashed[0].startswith("-"):
        dashed = [f"--{positional}", *dashed]
    values: dict[str, Any] = parser.parse_args(dashed).as_dict()
    return {key: _expanded(value) for key, value in values.items()}


def _paths_joined(args: list[str]) -> list[str]:
    """`--option a b`, `--option a,b` or `--option=a,b` in front of others, as one JSON list."""
    option, equals, given = args[0].partition("=")
    after = (i for i, arg in enumerate(args) if i and (equals or arg.startswith("-")))
    end = next(after, len(args))
    words = [given] if equals else args[1:end]
    if not words or words[0].startswith("["):
        return args
    paths = [path for word in words for path in word.split(",") if path]
    return [f"{option}={json.dumps(paths)}", *args[end:]]


def _expanded(value: Any) -> Any:
    if isinstance(value, list):
        return [_expanded(item) for item in value]
    return value.expanduser() if isinstance(value, Path) else value


def _underscored(arg: str) -> str:
    if not arg.startswith("--"):
        return arg
    option, equals, value = arg.partition("=")
    return "--" + option[2:].replace("-", "_") + equals + value


def _quiet() -> None:
    """Keep other libraries' chatter off the screen; errors still come through."""
    import logging
    import warnings

    from transformers.utils import logging as hf_logging

    hf_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    hf_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")


def _complain(message: str, code: int) -> int:
    place = f" rank {_rank()}" if _rank() else ""
    sys.stderr.write(f"sparsecast{place}: {message}\n")
    return code


def _rank() -> int:
    """This process among those of torchrun."""
    return int(os.environ.get("RANK", "0"))


def _load(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


if __name__ == "__main__":
    main()

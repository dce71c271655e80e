"""The process in which doctor imports packages, so that one that ends Python ends no report.

`python -P -m sparsecast.cli.doctor.try_imports NAME ...` imports modules in turn and writes a line
of JSON before and after each: {"name": ..., "done": false}, then {"name": ..., "done": true,
"error": null or a line}. `--torch` writes {"torch": ...} as well: what torch and Triton can do.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import warnings
from typing import TextIO

from sparsecast.cli.doctor.finding import one_line


def try_import(name: str) -> str | None:
    """Import a module; return why it could not be, in one line."""
    try:
        importlib.import_module(name)
    except BaseException as error:  # some modules call sys.exit
        return f"{type(error).__name__}: {one_line(error)}"
    return None


def _own_output() -> TextIO:
    """Keep standard output for the lines of this module; what packages print goes to stderr."""
    own = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return own


def main(names: list[str]) -> None:
    """Import the modules that `names` names."""
    warnings.simplefilter("ignore")
    out = _own_output()

    def write(line: dict[str, object]) -> None:
        out.write(json.dumps(line) + "\n")
        out.flush()

    for name in names:
        if name == "--torch":
            from sparsecast.cli.doctor.torch_facts import torch_facts

            write({"torch": torch_facts()})
            continue
        write({"name": name, "done": False})
        write({"name": name, "done": True, "error": try_import(name)})


if __name__ == "__main__":
    main(sys.argv[1:])

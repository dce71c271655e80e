"""The README says what is there: its commands parse, its file tree is the tree."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from sparsecast.cli.parser import parse
from sparsecast.cli.stages import STAGES, load

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```\w*\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
COMMANDS = [
    line for block in BLOCKS for line in block.splitlines() if line.startswith("sparsecast ")
]
COMMANDS += re.findall(
    r"`(sparsecast (?:sparsify|bench \w+) --[^`]*)`",
    README.replace("\n", " "),
)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_accepted(command):
    name, args = _split(command)
    stage = STAGES[name]
    config = load(stage.config)

    config(**parse(name, config, stage.positional, args))


def test_commands_were_found():
    assert len(COMMANDS) >= 8
    assert {_split(command)[0] for command in COMMANDS} >= set(STAGES) - {"demo"}


def _split(command: str) -> tuple[str, list[str]]:
    """The stage's name, of one word or two, and its options."""
    words = shlex.split(command)[1:]
    count = 2 if words[0] == "bench" else 1
    return " ".join(words[:count]), words[count:]


def test_the_file_tree_is_the_tree():
    (tree,) = (block for block in BLOCKS if block.startswith("collect/"))
    listed, folder = set(), ""
    for line in tree.splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = name
        elif name.endswith(".py"):
            listed.add(folder + name)
    folders = ("collect", "predictors", "export", "kernels", "sparsify", "cli")
    there = {f"{folder}/{path.name}" for folder in folders for path in (ROOT / folder).glob("*.py")}
    assert listed == there

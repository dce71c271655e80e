"""README and docs say what is there: commands parse and run, links lead somewhere."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from sparsecast.cli.main import main
from sparsecast.cli.parser import parse
from sparsecast.cli.stages import STAGES, load
from sparsecast.core.models.location import TINY_PROSPARSE
from sparsecast.core.options import option_of

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`(sparsecast [^`]*)`")
LAUNCHER = re.compile(
    r"(?:\$ )?(?:\w+=\S+ )*(?:torchrun .*?-m |python -m |\S*/)?sparsecast (?P<rest>.*)"
)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    language: str
    text: str


@dataclass(frozen=True)
class Command:
    """A `sparsecast ...` of a page."""

    page: Path
    text: str
    """As the page has it, on one line."""
    rest: str
    """What follows `sparsecast`."""
    fenced: bool

    @property
    def name(self) -> str:
        """The stage's name, of one word or two."""
        words = shlex.split(self.rest, comments=True)
        return " ".join(words[: 2 if words[0] == "bench" else 1])

    @property
    def words(self) -> list[str]:
        """The options."""
        return shlex.split(self.rest, comments=True)[len(self.name.split()) :]

    def __str__(self) -> str:
        return f"{self.page.stem}: {self.text}"


def blocks_of(page: Path) -> list[Block]:
    return [Block(page, found[2], found[3]) for found in FENCE.finditer(page.read_text())]


def commands_in(block: Block) -> list[Command]:
    """Those of a block that is no output; a backslash at a line's end continues it."""
    if block.language not in ("", "bash", "sh", "console"):
        return []
    lines = re.sub(r"\\\n\s*", "", block.text).splitlines()
    found = [(line, LAUNCHER.fullmatch(line.strip())) for line in lines]
    return [Command(block.page, line.strip(), m["rest"], True) for line, m in found if m]


def inline_commands(page: Path) -> list[Command]:
    text = " ".join(FENCE.sub("", page.read_text()).split())
    found = (m[1] for m in INLINE.finditer(text))
    return [Command(page, command, command.partition(" ")[2], False) for command in found]


COMMANDS = [
    command
    for page in PAGES
    for command in (
        *(command for block in blocks_of(page) for command in commands_in(block)),
        *inline_commands(page),
    )
]


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    assert lines[2] == (
        "Train, evaluate and export PowerInfer activation predictors for any ReLU-sparse LLM."
    )


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_every_command_is_accepted(command: Command):
    if not command.fenced and command.name in ("--help", "--version", "COMMAND", "bench"):
        return
    stage = STAGES[command.name]
    config = load(stage.config)
    needed = {
        field.name
        for field in dataclasses.fields(config)
        if field.default is field.default_factory is dataclasses.MISSING
    }
    known = {option_of(field.name) for field in dataclasses.fields(config)}
    given = {word.partition("=")[0] for word in command.words if word.startswith("--")}
    assert given <= known | {"--config", "--help"}
    whole = {option_of(name) for name in needed - {stage.positional}} <= given
    if stage.positional is not None:
        whole = bool(command.words) and not command.words[0].startswith("--")
    if "--help" not in given and (command.fenced or (whole and given)):
        fields = parse(command.name, config, stage.positional, command.words)
        config(**fields)


def test_commands_of_every_stage_were_found():
    fenced = [command for command in COMMANDS if command.fenced]
    assert {command.name for command in fenced} >= set(STAGES)
    assert {command.page.name for command in fenced} > {"README.md", "collect.md", "bench.md"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" not in target and not target.startswith("#"):
            assert (page.parent / target.partition("#")[0]).exists(), target


GUIDES = ("collect", "train", "report-and-evaluate", "export", "verify-and-inspect", "sparsify")
GUIDES += ("bench",)
RUN = ["README.md", "docs/getting-started.md", *(f"docs/guides/{name}.md" for name in GUIDES)]
RUN += ["docs/kernels.md", "docs/api/index.md"]
"""The pages whose commands and Python are run, one after the other in one folder."""
NOT_RUN = {
    "--engine": "a build of PowerInfer",
    "--convert": "PowerInfer's converter and a Python of its own",
    "--device cuda": "a GPU",
    "bench kernels": "a GPU",
    "bench vllm": "vLLM",
    "--shape 7b": "a large machine",
    "torchrun": "several processes",
}
"""What commands need that are only parsed."""
SLOW = ("sparsecast demo", "sparsify --preset", "sparsecast bench")
SMALL = {
    "DemoConfig": {"tokens": 2000},
    "CollectConfig": {"tokens": 2000, "seq_len": 64},
    "TrainConfig": {"epochs": 1, "rank": 32},
    "InspectConfig": {"tokens": 300, "corpus": "CORPUS"},
    "EvaluateConfig": {"tokens": 200, "seq_len": 64, "corpus": "CORPUS"},
    "VerifyConfig": {"tokens": 256, "corpus": "CORPUS"},
    "SparsifyConfig": {
        "tokens": 2048,
        "batch_tokens": 512,
        "seq_len": 64,
        "eval_tokens": 200,
        "corpus": "CORPUS",
    },
    "BenchCollectConfig": {"tokens": 1000, "rounds": 1},
    "BenchTrainConfig": {"steps": 1, "rounds": 1},
    "BenchSparsifyConfig": {"batch_size": 2, "seq_len": 16, "steps": 1, "rounds": 1},
    "BenchScalingConfig": {"steps": 1, "rounds": 1},
    "BenchPredictorsConfig": {"epochs": 1, "reference_epochs": 1, "perplexity": 0.5},
    "BenchExportConfig": {"rounds": 1},
    "BenchGenerateConfig": {"tokens": 4, "rounds": 1},
}
"""Options of a run that only shows that the command works, by the name of their dataclass."""
EASY = {"target_perplexity": 0.9, "traffic_budget": 0.9, "tokens": 1024}
"""And these in place of others that are given to `train`."""


TEMPLATE = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"


def stand_ins(corpus: Path) -> dict[str, str]:
    """What the words of the pages stand for in a run; writes models and chats for them."""
    model = str(TINY_PROSPARSE)
    shutil.copytree(model, "dense-model", dirs_exist_ok=True)
    config = json.loads((TINY_PROSPARSE / "config.json").read_text())
    Path("dense-model/config.json").write_text(json.dumps(config | {"hidden_act": "silu"}))
    shutil.copytree(model, "chat-model", dirs_exist_ok=True)
    Path("chat-model/chat_template.jinja").write_text(TEMPLATE)
    with open("CHATS.jsonl", "w") as file:
        for i in range(60):
            turns = [("user", f"x = {i}"), ("assistant", "y")]
            said = [{"role": role, "content": content} for role, content in turns]
            file.write(json.dumps({"messages": said}) + "\n")
    return {
        "CHAT_MODEL": "chat-model",
        "CHATS": "CHATS.jsonl",
        "DENSE_MODEL": "dense-model",
        "MODEL": model,
        "SILU_MODEL": model,
        "tiny-prosparse": model,
        "CORPUS": str(corpus),
        "builtin": str(corpus),
        "cuda": "cpu",
        "bfloat16": "float32",
    }


def smaller(config: str, given: set[str]) -> dict[str, object]:
    easy = EASY if config == "TrainConfig" else {}
    return SMALL.get(config, {}) | {name: easy[name] for name in easy.keys() & given}


def run_command(command: Command, words: dict[str, str]) -> None:
    """As the console script would, with less of everything."""
    stage = STAGES[command.name]
    config = load(stage.config)
    given = set(parse(command.name, config, stage.positional, command.words))
    args = [*command.name.split(), *command.words]
    for name, value in smaller(config.__name__, given).items():
        args += [option_of(name), str(value)]
    with pytest.raises(SystemExit) as done:
        main([words.get(arg, arg) for arg in args])
    assert done.value.code in (0, None), f"{command}: exit code {done.value.code}"


class _Smaller(ast.NodeTransformer):
    """The same for Python: constants stand for others, and configs get smaller options."""

    def __init__(self, words: dict[str, str]) -> None:
        self.words = words

    def visit_Constant(self, node: ast.Constant) -> ast.Constant:
        value = self.words.get(node.value) if isinstance(node.value, str) else None
        return node if value is None else ast.Constant(value)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if isinstance(node.func, ast.Name):
            options = smaller(node.func.id, {str(keyword.arg) for keyword in node.keywords})
            node.keywords = [keyword for keyword in node.keywords if keyword.arg not in options]
            node.keywords += [ast.keyword(name, ast.Constant(v)) for name, v in options.items()]
        return self.generic_visit(node)


def run_python(block: Block, words: dict[str, str]) -> None:
    tree = ast.fix_missing_locations(_Smaller(words).visit(ast.parse(block.text)))
    exec(compile(tree, f"{block.page.name}, Python", "exec"), {})


def is_slow(text: str) -> bool:
    return any(part in text for part in SLOW) or "cli.bench" in text


def run_pages(corpus: Path, pages: list[str], slow: bool) -> None:
    words = stand_ins(corpus)
    for page in pages:
        for block in blocks_of(ROOT / page):
            for command in commands_in(block):
                if is_slow(command.text) == slow and not needs(command):
                    run_command(command, words)
            if block.language == "python" and is_slow(block.text) == slow:
                run_python(block, words)


def needs(command: Command) -> str | None:
    return next((what for part, what in NOT_RUN.items() if part in command.text), None)


@pytest.mark.slow
def test_documented_commands_and_python_run(tmp_path, monkeypatch, corpus):
    monkeypatch.chdir(tmp_path)
    run_pages(corpus, RUN, slow=False)
    assert {path.name for path in tmp_path.iterdir()} >= {"acts", "predictors", "report", "bundle"}


@pytest.mark.slow
def test_documented_commands_that_take_long_run(tmp_path, monkeypatch, corpus):
    monkeypatch.chdir(tmp_path)
    run_pages(corpus, ["docs/guides/collect.md", "docs/guides/train.md"], slow=False)
    run_pages(corpus, RUN, slow=True)


def test_what_is_not_run_is_there():
    shown = [
        command
        for page in RUN
        for block in blocks_of(ROOT / page)
        for command in commands_in(block)
    ]
    for part in (*NOT_RUN, *SLOW):
        assert any(part in command.text for command in shown), part

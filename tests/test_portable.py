"""Nothing that Linux alone has is taken for granted, and nobody else's package is shadowed."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from sparsecast.core.files import check_writable_folder, write_text
from sparsecast.core.lock import lock_folder
from sparsecast.core.text.corpus_files import local_files

ROOT = Path(__file__).parents[1]
FOLDERS = ("core", "collect", "predictors", "export", "kernels", "sparsify", "integrations", "cli")
UNIX_MODULES = {"fcntl", "grp", "posix", "pty", "pwd", "readline", "resource", "syslog", "termios"}
IN_WINDOWS = {
    "environ", "path", "PathLike", "fspath", "fsencode", "fsdecode", "replace", "kill", "getpid",
    "getcwd", "cpu_count", "devnull", "dup", "dup2", "open", "fdopen", "close", "access", "fsync",
    "strerror", "scandir", "listdir", "sep", "walk", "link", "symlink", "stat", "urandom",
    "_exit", "O_WRONLY", "X_OK", "W_OK", "DirEntry",
}  # fmt: skip
"""Names of `os` that Python's documentation gives for Unix and Windows alike."""
SIGNALS_IN_WINDOWS = {
    "signal", "getsignal", "default_int_handler", "SIGINT", "SIGTERM", "SIG_DFL", "SIG_IGN",
}  # fmt: skip
GUARDED = {
    ("cli/bench/export_runs.py", "os.sync"),
    ("cli/bench/vllm_runs.py", "os.killpg"),
    ("cli/bench/vllm_runs.py", "signal.SIGKILL"),
    ("core/machine.py", "os.sched_getaffinity"),
    ("core/machine.py", "os.sysconf"),
}
"""Used where they exist."""


@pytest.fixture(scope="module")
def trees() -> dict[str, ast.Module]:
    """The package's files, parsed."""
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    return {p.relative_to(ROOT).as_posix(): ast.parse(p.read_text("utf-8")) for p in paths}


def test_modules_and_functions_of_unix_alone_are_guarded(trees):
    found = set()
    for name, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                tops = {alias.name.partition(".")[0] for alias in node.names}
                found |= {(name, module) for module in tops & UNIX_MODULES}
            elif isinstance(node, ast.ImportFrom):
                found |= {(name, m) for m in UNIX_MODULES if m == (node.module or "").split(".")[0]}
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                owner, known = node.value.id, {"os": IN_WINDOWS, "signal": SIGNALS_IN_WINDOWS}
                if owner in known and node.attr not in known[owner]:
                    found.add((name, f"{owner}.{node.attr}"))
    assert found == GUARDED


def test_text_files_name_their_encoding(trees):
    """Windows' own would be another."""
    for name, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                named = node.args or [k for k in node.keywords if k.arg == "encoding"]
                assert node.func.attr != "read_text" or named, f"{name}:{node.lineno}"


def test_folders_are_checked_where_paths_cannot_tell_mounts(tmp_path, monkeypatch):
    """Python 3.11's on Windows cannot."""

    def is_mount(_: Path) -> bool:
        raise NotImplementedError

    monkeypatch.setattr(Path, "is_mount", is_mount)
    check_writable_folder(tmp_path / "out")


def test_a_lock_whose_file_cannot_be_removed_is_released(tmp_path, monkeypatch):
    """Windows removes no file that is open."""

    def unlink(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "in use", str(path))

    monkeypatch.setattr(Path, "unlink", unlink)
    for _ in range(2):
        with lock_folder(tmp_path / "out", "run"):
            pass


def test_files_have_the_same_bytes_on_every_system(tmp_path, monkeypatch, trees):
    monkeypatch.setattr(os, "linesep", "\r\n")
    write_text(tmp_path / "a.md", "one\ntwo\n")
    assert (tmp_path / "a.md").read_bytes() == b"one\ntwo\n"
    writes = [
        ast.unparse(node) for node in ast.walk(trees["core/files.py"]) if isinstance(node, ast.Call)
    ]
    for call in (call for call in writes if "write_text(text" in call or "open(opened" in call):
        assert "newline='\\n'" in call


@pytest.mark.parametrize("name", ["SIGKILL", "SIGHUP", "SIGUSR1", "SIGPIPE", "SIGALRM"])
def test_signals_that_windows_lacks_are_not_asked_for(name, monkeypatch, tmp_path):
    monkeypatch.delattr(signal, name)
    from sparsecast.core.interrupts import stop_on_signal

    with stop_on_signal() as stop:
        stop.check()


FAKE = """
import sys
import kernels, transformers
from transformers.utils import is_kernels_available
import sparsecast.kernels.ops.launch
import transformers.integrations.hub_kernels
from transformers import LlamaConfig, LlamaForCausalLM
LlamaForCausalLM(LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, vocab_size=8,
                             num_attention_heads=2))
assert kernels.WHOSE == "Hugging Face's"
assert is_kernels_available(), "the stand-in is none"
assert sys.modules["kernels"] is kernels
print("fine")
"""


def test_the_folders_are_no_packages_of_their_own(tmp_path):
    """Each is importable below sparsecast alone, and leaves its short name to others."""
    code = "import sys; from importlib.util import find_spec; "
    code += "print([name for name in sys.argv[1:] if find_spec(name)]); "
    code += "print([name for name in sys.argv[1:] if not find_spec(f'sparsecast.{name}')])"
    command = [sys.executable, "-c", code, *FOLDERS]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n[]\n"


@pytest.mark.slow
def test_sparsecast_stands_beside_the_package_kernels(tmp_path):
    """Hugging Face's, which transformers imports where it is installed: here a stand-in of it."""
    from transformers.utils.import_utils import KERNELS_MIN_VERSION

    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    package, info = site / "kernels", site / f"kernels-{KERNELS_MIN_VERSION}.dist-info"
    for folder in (package, info):
        folder.mkdir(parents=True)
    (package / "__init__.py").write_text(
        'WHOSE = "Hugging Face\'s"\n'
        f"__version__ = {KERNELS_MIN_VERSION!r}\n"
        "class Any:\n"
        "    def __init__(self, *args, **options): pass\n"
        "    def __call__(self, *args, **options): return args[0] if args else self\n"
        "def __getattr__(name):\n"
        "    if name.startswith('__'): raise AttributeError(name)\n"
        "    return Any\n"
    )
    metadata = f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n"
    (info / "METADATA").write_text(metadata)
    (info / "RECORD").write_text("kernels/__init__.py,,\n")
    done = subprocess.run(
        [sys.executable, "-c", FAKE],
        cwd=elsewhere,
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "fine\n", done.stderr
    assert version("sparsecast")


def test_a_path_with_a_drive_is_no_dataset(monkeypatch):
    from sparsecast.core.errors import InputError

    monkeypatch.setattr(Path, "drive", "C:", raising=False)
    with pytest.raises(InputError, match="no such file or folder"):
        local_files("C:corpus")

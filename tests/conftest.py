"""A small FATReLU llama with random weights, a corpus of real files, and what was recorded."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import socket
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing import forkserver
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
import xxhash
from filelock import FileLock

# Before anything imports Triton: without a GPU its kernels run in the interpreter.
os.environ.setdefault("TRITON_INTERPRET", str(int(not torch.cuda.is_available())))

from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from sparsecast.cli.main import QUIET
from sparsecast.cli.screen import print_messages
from sparsecast.collect.config import CollectConfig
from sparsecast.collect.run import collect
from sparsecast.collect.store.filler import Filler
from sparsecast.collect.store.shard import checksum
from sparsecast.collect.store.store import ActivationStore, Manifest, seal
from sparsecast.collect.store.units import ShardInfo, Unit, shard_name
from sparsecast.collect.store.writer import Writer, record_unit, to_folder
from sparsecast.core.bitmask import unpack
from sparsecast.core.text.tokens import TokenBatch
from sparsecast.predictors.manifest import PredictorManifest
from sparsecast.predictors.predictor import Predictor
from sparsecast.sparsify.train_tokenizer import train_tokenizer

STDLIB = Path(sysconfig.get_paths()["stdlib"])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _messages():
    """On stderr, as the command line prints them."""
    print_messages()


class Nobody:
    """`with as_nobody():` runs as a user who may not read what others have closed, root or not."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        """Open to everybody."""

    @contextmanager
    def __call__(self) -> Iterator[None]:
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        try:
            yield
        finally:
            os.seteuid(user)


@pytest.fixture
def as_nobody() -> Iterator[Nobody]:
    with TemporaryDirectory() as folder:  # pytest's own folders are closed to others
        Path(folder).chmod(0o777)
        yield Nobody(Path(folder))


IMPORTED = ["sparsecast.collect.run", "sparsecast.predictors.train", "sparsecast.export.run"]
RUN = """
import os, signal, sys
import torch
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores it
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
os.dup2(os.open(error, os.O_WRONLY | os.O_CREAT), 2)
os.environ.update(environment)
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
exec(code)
from sparsecast.cli.main import main
main(args)
"""


class Forked:
    """A `sparsecast` in a process of its own, with the methods of `subprocess.Popen`."""

    def __init__(self, process: multiprocessing.Process, error: Path) -> None:
        self.process = process
        self.error = error

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    poll = returncode.fget

    def send_signal(self, number: int) -> None:
        with suppress(ProcessLookupError):  # it has ended
            os.kill(self.process.pid, number)

    def communicate(self, timeout: float = 300) -> tuple[None, str]:
        """(nothing, what it wrote to standard error) once it has ended."""
        self.process.join(timeout)
        if self.poll() is None:
            self.process.kill()
            raise TimeoutError(f"still running after {timeout} s: {self.error.read_text()}")
        return None, self.error.read_text()


@pytest.fixture(scope="session")
def sparsecast_forked(tmp_path_factory):
    """Start `sparsecast`: (arguments, code to run before, threads, environment) to a `Forked`.

    The process is forked from one that has imported torch and the stages, which costs a fresh
    interpreter five seconds of CPU.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    folder = tmp_path_factory.mktemp("forked")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in QUIET.items():
            patch.setenv(name, value)
        forkserver.ensure_running()

    def start(args: list[str], code: str = "", threads: int = 1, **environment: str) -> Forked:
        error = folder / str(len(list(folder.iterdir())))
        error.touch()
        environment["OMP_NUM_THREADS"] = str(threads)
        values = {"args": args, "code": code, "error": str(error), "environment": environment}
        process = context.Process(target=exec, args=(RUN, values))
        process.start()
        return Forked(process, error)

    return start


@pytest.fixture(scope="session")
def ranks_forked(sparsecast_forked):
    """Start ranks with the environment that torchrun gives them: (count, arguments, code)."""

    def start(count: int, args: list[str], code: str = "") -> list[Forked]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        common = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "GROUP_RANK": 0}
        common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "none"}
        return [
            sparsecast_forked(
                args,
                code,
                **{name: str(value) for name, value in common.items()},
                RANK=str(rank),
                LOCAL_RANK=str(rank),
            )
            for rank in range(count)
        ]

    return start


@pytest.fixture(scope="session")
def sealed():
    """Give the files of a predictor folder, and fields of its manifest, checksums that fit: what
    nobody but somebody hostile would do."""

    def seal(folder: Path, **fields: object) -> Path:
        path = folder / "manifest.json"
        value = {**json.loads(path.read_text()), **fields}
        names = set(value["checksums"]) - {path.name}
        value["checksums"] = {
            name: xxhash.xxh3_128_hexdigest((folder / name).read_bytes())
            for name in names
            if (folder / name).exists()
        }
        own = xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True).encode())
        value["checksums"][path.name] = own
        path.write_text(json.dumps(value))
        return folder

    return seal


@pytest.fixture
def manifest_of():
    """Build a manifest of predictors, by default for a model with FATReLU at 0.2."""

    def make(layers: list[Predictor], **fields: object) -> PredictorManifest:
        scores = {"recall": 0.9, "predicted_sparsity": 0.5}
        manifest = PredictorManifest(
            model="m",
            fingerprint="0" * 16,
            convention="residual-before-ffn-norm",
            activation="fatrelu",
            activation_threshold=0.2,
            hidden_size=layers[0].fc1_RD.shape[1],
            ffn_width=layers[0].fc2_FR.shape[0],
            ffn_matrices=3,
            dtypes=[layer.dtype for layer in layers],
            ranks=[layer.rank for layer in layers],
            calibration=[scores] * len(layers),
            recipe={},
        )
        return replace(manifest, **fields)

    return make


@pytest.fixture(scope="session")
def once(tmp_path_factory, worker_id):
    """Build a folder once for all processes of pytest-xdist: (name, build(folder)) to the folder,
    which is not to be written to."""
    root = tmp_path_factory.getbasetemp()
    root = root if worker_id == "master" else root.parent

    def folder(name: str, build: Callable[[Path], object]) -> Path:
        path, done = root / "once" / name, root / "once" / f"{name}.done"
        path.parent.mkdir(exist_ok=True)
        with FileLock(path.with_name(f"{name}.lock")):
            if not done.exists():
                shutil.rmtree(path, ignore_errors=True)
                build(path)
                done.touch()
        return path

    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A folder of 60 standard library sources as .txt files."""
    folder = tmp_path_factory.mktemp("corpus")
    for path in sorted(STDLIB.glob("*.py"))[10:70]:
        (folder / f"{path.stem}.txt").write_text(path.read_text(errors="replace")[:20_000])
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, corpus) -> Path:
    """A saved model: 3 layers, hidden 64, FFN 1280, 4 query and 2 KV heads, 512 pieces."""
    folder = tmp_path_factory.mktemp("model")
    texts = [path.read_text() for path in sorted(corpus.iterdir())]
    tokenizer = train_tokenizer(texts, 512, folder)
    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=1280,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=256,
        rope_theta=50_000.0,
        initializer_range=0.1,
        hidden_act="fatrelu",
        hidden_act_param=0.2,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    for name, weight in model.named_parameters():
        if "norm" in name:  # a norm of ones would hide a missing one
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    model.half().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def forward_of():
    """Make a forward pass whose layers give the (predictor inputs (T, D), x1 (T, F)) of a list."""

    def make(filler: Filler, shard: list[tuple[torch.Tensor, torch.Tensor]]):
        def forward(_: TokenBatch) -> None:
            for layer, (x_TD, x1_TF) in zip(filler.layers, shard, strict=True):
                filler(layer, x_TD, x1_TF)

        return forward

    return make


@pytest.fixture(scope="session")
def write_store(forward_of):
    """Write a store from given tensors: (folder, manifest, {split: [shard]}), a shard being a list
    of (predictor inputs (T, D), x1 (T, F)), one per layer."""

    def write(folder: Path, manifest: Manifest, recorded) -> ActivationStore:
        folder.mkdir(parents=True)
        largest = max(len(shard[0][0]) for shards in recorded.values() for shard in shards)
        filler = Filler(manifest.shape)
        written = []
        with Writer(manifest.shape, manifest.shape.nbytes(largest), to_folder(folder)) as writer:
            for split, shards in recorded.items():
                for number, shard in enumerate(shards):
                    n_tokens = len(shard[0][0])
                    ids = torch.arange(n_tokens)[None]
                    batch = TokenBatch(split, ids, torch.ones_like(ids, dtype=torch.bool))
                    unit = Unit(split, number, [batch])
                    record_unit(filler, writer, unit, forward_of(filler, shard))
                    written.append(unit.info)
        seal(folder, manifest, written)
        return ActivationStore(folder)

    return write


@pytest.fixture(scope="session")
def edit_store():
    """Copy a store, each shard's tensors passed through a function: (store, folder, change).
    Counts follow the masks, and checksums everything, as if it had been recorded so."""

    def edit(store: ActivationStore, folder: Path, change, **fields: object) -> ActivationStore:
        made, shards = replace(store.manifest, **fields), []
        folder.mkdir()
        for split, tokens in made.shard_tokens.items():
            for number, count in enumerate(tokens):
                name = shard_name(split, number)
                tensors = load_file(store.folder / name)
                change(tensors)
                for layer in made.layers:
                    mask_TF = unpack(tensors[f"layer.{layer}.mask"], made.ffn_width)
                    tensors[f"layer.{layer}.fired"] = mask_TF.sum(0).int()
                    tensors[f"layer.{layer}.active"] = mask_TF.sum(1).int()
                sums = {key: checksum([tensor]) for key, tensor in tensors.items()}
                save_file(tensors, folder / name, {"split": split, "number": str(number), **sums})
                shards.append(ShardInfo(split, count, name))
        seal(folder, made, shards)
        return ActivationStore(folder)

    return edit


@pytest.fixture(scope="session")
def acts(tmp_path_factory, model_folder, corpus):
    """6,000 tokens recorded from `model_folder` over `corpus`."""
    out = tmp_path_factory.mktemp("acts") / "acts"
    cfg = CollectConfig(
        model=str(model_folder),
        corpus=str(corpus),
        out=out,
        tokens=6_000,
        seq_len=256,
        long_documents="cut",
    )
    return collect(cfg)

"""Collections that are killed, interrupted, changed, shared out, and run twice at once."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from filelock import FileLock

from sparsecast.collect.config import CollectConfig
from sparsecast.collect.run import collect
from sparsecast.collect.store.store import ActivationStore, read_manifest
from sparsecast.collect.store.writer import Writer
from sparsecast.core.errors import InputError
from sparsecast.core.manifests import write_manifest
from sparsecast.core.run_record import RUN
from sparsecast.core.text.splits import SPLITS

SMALL_SHARDS = """
from sparsecast.collect.store import shard
shard.SHARD_BYTES = 400_000
"""
"""So small that there are about forty."""

SCRIPT = f"""
import sys
from sparsecast.cli.main import main
{SMALL_SHARDS}
main(sys.argv[1:])
"""


OPTIONS = {"tokens": 20_000, "seq_len": 128, "batch_size": 2, "energy": True, "device": "cpu"}


@pytest.fixture
def cfg(model_folder, corpus, tmp_path) -> CollectConfig:
    return CollectConfig(
        model=str(model_folder),
        corpus=str(corpus),
        out=tmp_path / "acts",
        **OPTIONS,
    )


def arguments(cfg: CollectConfig) -> list[str]:
    options = ["collect"]
    for name, value in asdict(cfg).items():
        if value is not None:
            options += [f"--{name.replace('_', '-')}", str(value)]
    return options


@pytest.fixture(scope="session")
def start(sparsecast_forked):
    """Start a collection into small shards in a process of its own."""

    def run(cfg: CollectConfig, threads: int = 1):
        return sparsecast_forked(arguments(cfg), SMALL_SHARDS, threads)

    return run


def torchrun(cfg: CollectConfig, tmp_path: Path, ranks: int) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.run(
        [sys.executable, *launcher, str(script), *arguments(cfg)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )


def content(folder: Path) -> dict[str, bytes]:
    """What two stores have in common: all but when and where they were made."""
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name != RUN}


def wait_for(path: Path, process) -> None:
    deadline = time.monotonic() + 120
    while not path.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)


def kill_until_done(cfg: CollectConfig, start, kills: int, seed: int) -> int:
    """Kill at random moments after the work has begun, then let it end; the kills that hit."""
    draw = random.Random(seed)
    part = cfg.out.with_name(".acts.part")
    hits = 0
    for number in range(kills):
        process = start(cfg)
        wait_for(part / "manifest.json", process)
        if number == 0:
            wait_for(part / "train-00000.safetensors", process)
        time.sleep(draw.uniform(0, 1.2))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        hits += process.returncode == -signal.SIGKILL
        if cfg.out.exists():
            break
    # Sums depend on the number of threads, so a resumed run takes that of the first.
    process = start(cfg, threads=2)
    _, error = process.communicate()
    assert process.returncode == 0, error
    return hits


@pytest.fixture(scope="session")
def uninterrupted(model_folder, corpus, tmp_path_factory, start):
    """The bytes of a run that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole") / "acts"
    process = start(CollectConfig(model=str(model_folder), corpus=str(corpus), out=out, **OPTIONS))
    _, error = process.communicate()
    assert process.returncode == 0, error
    files = content(out)
    assert len(files) > 30
    return files


def test_a_killed_run_ends_with_the_bytes_of_an_uninterrupted_one(cfg, start, uninterrupted):
    assert kill_until_done(cfg, start, kills=3, seed=os.getpid()) >= 1
    assert content(cfg.out) == uninterrupted
    assert [path.name for path in cfg.out.parent.iterdir()] == ["acts"]


@pytest.mark.slow
def test_twenty_kills(cfg, start, tmp_path, uninterrupted):
    hits = 0
    for seed in range(10):
        cfg = replace(cfg, out=tmp_path / str(seed) / "acts")
        hits += kill_until_done(cfg, start, kills=3, seed=seed)
        assert content(cfg.out) == uninterrupted
        if hits >= 20:
            break
    assert hits >= 20


def test_three_ranks_share_the_work_into_the_store_of_one(cfg, ranks_forked, uninterrupted):
    processes = ranks_forked(3, arguments(cfg), SMALL_SHARDS)
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], errors
    assert content(cfg.out) == uninterrupted


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [(1, 3), (3, 1)])
def test_a_killed_run_goes_on_with_another_number_of_ranks(
    first, then, cfg, start, ranks_forked, uninterrupted
):
    def begin(ranks: int) -> list:
        return [start(cfg)] if ranks == 1 else ranks_forked(ranks, arguments(cfg), SMALL_SHARDS)

    processes = begin(first)
    wait_for(cfg.out.with_name(".acts.part") / "train-00001.safetensors", processes[0])
    for process in processes:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert not cfg.out.exists()
    processes = begin(then)
    errors = [process.communicate()[1] for process in processes]
    assert "finished shards are kept" in errors[0]
    assert [process.returncode for process in processes] == [0] * then, errors
    assert content(cfg.out) == uninterrupted


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_torchrun_shares_the_work_into_the_store_of_one(cfg, tmp_path, uninterrupted, ranks):
    done = torchrun(cfg, tmp_path, ranks)
    assert done.returncode == 0, done.stderr
    assert content(cfg.out) == uninterrupted


@pytest.mark.slow
def test_ranks_tell_a_mistake_once(cfg, tmp_path):
    done = torchrun(replace(cfg, layers=[7]), tmp_path, 2)
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if line.startswith("sparsecast")]
    assert len(told) == 1
    assert "--layers: the model has layers 0 to 2" in told[0]
    assert "gloo" not in done.stderr.lower()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["script.py"]


def test_ctrl_c_ends_after_the_batch_and_keeps_what_is_finished(cfg, start, uninterrupted):
    process = start(cfg)
    part = cfg.out.with_name(".acts.part")
    wait_for(part / "train-00001.safetensors", process)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "Traceback" not in error
    (told,) = (line for line in error.splitlines() if line.startswith("sparsecast"))
    assert "finished shards are kept, the same command goes on from there" in told
    kept = {p.name: p.stat().st_mtime_ns for p in part.glob("train-*")}
    assert kept

    process = start(cfg)
    _, error = process.communicate()
    assert process.returncode == 0, error
    assert {name: (cfg.out / name).stat().st_mtime_ns for name in kept} == kept
    assert content(cfg.out) == uninterrupted


@pytest.fixture
def unfinished(cfg, monkeypatch) -> CollectConfig:
    """A collection that died after ten of about 17 shards, in this process."""
    cfg = replace(cfg, tokens=8_000)
    monkeypatch.setattr("sparsecast.collect.store.shard.SHARD_BYTES", 400_000)
    submit, seen = Writer.submit, []

    def die_at_ten(self, shard):
        seen.append(shard)
        if len(seen) > 10:
            raise OSError(28, "No space left on device")
        submit(self, shard)

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "submit", die_at_ten)
        with pytest.raises(OSError, match="No space left"):
            collect(cfg)
    assert not cfg.out.exists()
    return cfg


def test_a_changed_option_is_refused_with_its_name(unfinished, tmp_path, capfd):
    cfg = unfinished
    model = tmp_path / "model"
    shutil.copytree(cfg.model, model)
    text = (model / "config.json").read_text()
    (model / "config.json").write_text(text.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 0.1'))
    for change, match in (
        ({"model": str(model)}, "the model's rms_norm_eps was 1e-06, now 0.1"),
        ({"seq_len": 64}, "seq_len was 128, now 64"),
        ({"energy": False}, "energy was True, now False"),
        ({"corpus": "builtin"}, "corpus was .*, now 'builtin'"),
        ({"activation_threshold": 0.5}, "activation threshold was 0.2, now 0.5"),
        ({"layers": [1]}, r"layers was None, now \[1\]"),
    ):
        with pytest.raises(InputError, match=match):
            collect(replace(cfg, **change))
    part = cfg.out.with_name(".acts.part")
    before = {p.name: p.stat().st_mtime_ns for p in part.glob("*-*.safetensors")}
    store = collect(cfg)
    assert "10 finished shards are kept" in capfd.readouterr().err
    assert {name: (cfg.out / name).stat().st_mtime_ns for name in before} == before
    ids = [store.tokens(split, i)[0] for split in SPLITS for i in range(len(store.shards(split)))]
    assert sum(map(len, ids)) == store.manifest.tokens() > 6_000


def test_a_damaged_shard_is_recorded_again(unfinished, tmp_path, capfd):
    part = unfinished.out.with_name(".acts.part")
    first, second, third = sorted(part.glob("train-*"))[:3]
    raw = bytearray(first.read_bytes())
    raw[-7] ^= 1
    first.write_bytes(raw)
    second.write_bytes(second.read_bytes()[:5000])
    raw = third.read_bytes()
    third.write_bytes(raw.replace(b'"layer.1.x":{"dtype":"F16"', b'"layer.1.x":{"dtype":"I16"'))
    (part / "train-99999.safetensors").write_bytes(second.read_bytes())
    store = collect(unfinished)
    told = " ".join(capfd.readouterr().err.split())
    assert told.count("recorded again") == 3
    assert "damaged header" in told
    assert all(what is None for _, what in store.damages())
    assert content(store.folder) == content(collect(replace(unfinished, out=tmp_path / "b")).folder)


def test_other_weights_or_another_text_are_noticed(unfinished, corpus, tmp_path):
    changed = tmp_path / "corpus"
    changed.mkdir()
    for path in corpus.iterdir():
        (changed / path.name).write_text("x = 1\n" + path.read_text())
    part = unfinished.out.with_name(".acts.part")
    manifest = read_manifest(part)
    write_manifest(part, replace(manifest, corpus=str(changed)))
    with pytest.raises(InputError, match="the corpus has changed since the collection began"):
        collect(replace(unfinished, corpus=str(changed)))
    write_manifest(part, replace(manifest, fingerprint="0" * 16))
    with pytest.raises(InputError, match=f"the model's weights was '{'0' * 16}', now '"):
        collect(unfinished)


def test_a_second_run_into_the_same_folder_is_refused(cfg, tmp_path):
    with (
        FileLock(tmp_path / ".acts.lock"),
        pytest.raises(InputError, match="another collection is writing"),
    ):
        collect(cfg)
    assert not cfg.out.exists()


def test_a_finished_store_that_only_lacks_its_name_is_completed(cfg, tmp_path, monkeypatch):
    """Killed between the complete manifest and the renaming of the folder."""
    cfg = replace(cfg, tokens=1_000)
    replace_file = os.replace

    def die(source: Path, to: Path) -> None:
        if to == cfg.out:
            raise OSError("killed")
        replace_file(source, to)

    with monkeypatch.context() as patch:
        patch.setattr("sparsecast.collect.recording.os.replace", die)
        with pytest.raises(OSError, match="killed"):
            collect(cfg)
    other = collect(replace(cfg, out=tmp_path / "other"))
    assert content(collect(cfg).folder) == content(other.folder)


def test_documents_keep_their_split_in_every_store_that_holds_them(cfg, tmp_path):
    few = collect(replace(cfg, tokens=2_000))
    many = collect(replace(cfg, out=tmp_path / "many", tokens=8_000))

    def opening_tokens(store: ActivationStore, split: str) -> set:
        found = set()
        for shard in range(len(store.shards(split))):
            ids, position = store.tokens(split, shard)
            for place in (position == 0).nonzero().flatten().tolist():
                found.add(tuple(ids[place : place + 60].tolist()))
        return found

    for one in SPLITS:
        for other in SPLITS:
            if one != other:
                shared = opening_tokens(few, one) & opening_tokens(many, other)
                assert not shared
    assert opening_tokens(few, "train") & opening_tokens(many, "train")


def test_a_full_disk_is_named_with_what_is_kept(cfg, monkeypatch):
    monkeypatch.setattr("sparsecast.collect.store.shard.SHARD_BYTES", 400_000)
    written = []

    def full(number: int) -> None:
        written.append(number)
        if len(written) > 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("sparsecast.collect.store.writer.os.fsync", full)
    with pytest.raises(OSError, match=r"train-.*safetensors: No space left.*; 3 finished shards"):
        collect(cfg)


@pytest.mark.slow
def test_ctrl_c_ends_a_run_whose_pipe_nobody_fills(model_folder, tmp_path):
    command = [sys.executable, "-m", "sparsecast.cli.main", "collect", "--model", str(model_folder)]
    process = subprocess.Popen(
        [*command, "--corpus", "-", "--out", str(tmp_path / "acts"), "--seq-len", "128"],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / ".acts.part").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 130
    error = process.stderr.read()
    assert "acts: interrupted; no shard was finished yet" in error
    assert "Fatal" not in error
    assert list(tmp_path.iterdir()) == []


def test_requests_that_mean_the_same_are_the_same(cfg):
    other = replace(cfg, model=Path(cfg.model), corpus=Path(cfg.corpus), out=str(cfg.out))
    assert other == cfg
    assert replace(cfg, layers=(2, 0, 2)) == replace(cfg, layers=[0, 2])


def test_a_model_spread_over_devices_records_the_same(cfg, tmp_path):
    """On this machine `device_map` finds the CPU alone."""
    spread = collect(replace(cfg, device="auto", device_map="auto", tokens=1_000))
    plain = collect(replace(cfg, out=tmp_path / "plain", tokens=1_000))
    for name, raw in content(spread.folder).items():
        if name != "manifest.json":
            assert raw == content(plain.folder)[name], name
    with pytest.raises(InputError, match="--device-map auto: chooses the devices"):
        replace(cfg, device_map="auto")

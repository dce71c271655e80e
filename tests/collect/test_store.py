"""Shards, statistics and energies against the library that defines the format, and formulas."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from sparsecast.collect.config import CollectConfig
from sparsecast.collect.inspect import InspectConfig, inspect
from sparsecast.collect.run import collect
from sparsecast.collect.store.energy import Gains, decode, encode
from sparsecast.collect.store.filler import Filler
from sparsecast.collect.store.shard import SHARD_BYTES, Shape, ShardBuffer
from sparsecast.collect.store.shard_reader import ShardFile
from sparsecast.collect.store.stats import Stats
from sparsecast.collect.store.store import ActivationStore, Manifest, seal
from sparsecast.collect.store.units import Unit
from sparsecast.collect.store.writer import Writer, record_unit, to_folder, to_memory
from sparsecast.core.bitmask import count_per_neuron, count_per_token, pack, unpack
from sparsecast.core.errors import InputError
from sparsecast.core.text.splits import SPLITS
from sparsecast.core.text.tokens import TokenBatch

MANIFEST = Manifest(
    model="synthetic",
    fingerprint="0" * 16,
    model_type="llama",
    dtype="float32",
    tokenizer="none",
    convention="residual-before-ffn-norm",
    activation="relu",
    activation_threshold=0.0,
    corpus="none",
    options={},
    config={},
    threads=1,
    layers=[0, 3],
    hidden_size=24,
    ffn_width=37,
    ffn_matrices=3,
    x_dtype="float16",
    energy=False,
)


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.view(torch.uint8).numpy().tobytes()


def random_shards(n_tokens: int) -> list:
    return [
        (torch.randn(n_tokens, 24) * 3, torch.randn(n_tokens, 37).relu()) for _ in MANIFEST.layers
    ]


@given(st.integers(0, 600), st.integers(1, 40), st.integers(0, 2**31))
def test_bits_and_counts_are_numpys(n_tokens, width, seed):
    mask = np.random.default_rng(seed).random((n_tokens, width)) < 0.3
    mask_TF = torch.from_numpy(mask)
    packed = pack(mask_TF)
    assert np.array_equal(packed.numpy(), np.packbits(mask, axis=1, bitorder="little"))
    assert np.array_equal(unpack(packed, width).numpy(), mask)
    assert np.array_equal(count_per_token(mask_TF).numpy(), mask.sum(1))
    assert np.array_equal(count_per_neuron(mask_TF).numpy(), mask.sum(0))


def test_counts_do_not_overflow_where_everything_fires():
    mask_TF = torch.ones(1021, 2056, dtype=torch.bool)
    assert torch.equal(count_per_neuron(mask_TF), torch.full((2056,), 1021, dtype=torch.int32))
    assert torch.equal(count_per_token(mask_TF), torch.full((1021,), 2056, dtype=torch.int32))


@given(st.floats(2**-18, 2**13.8), st.floats(0.1, 4))
def test_an_energy_is_kept_within_nine_percent(amplitude, norm):
    x1 = torch.tensor([[amplitude / norm, 0.0]])
    code = encode(x1, Gains(torch.tensor([norm, 1.0])), x1 != 0)
    assert code.shape == (1,)
    assert decode(code).item() == pytest.approx(amplitude**2, rel=2 ** (1 / 8) - 1 + 1e-3)


def test_energies_behind_a_norm_do_not_grow_with_x1():
    """BitNet's x1 is a product of gates squared: far beyond what one byte holds."""
    x1_TF = torch.tensor([[3.0, 0.0, -4.0]]) * torch.tensor([[1e-6], [1.0], [1e9]])
    code_N = encode(x1_TF, Gains(torch.tensor([1.0, 1.0, 0.5]), eps=1e-5), x1_TF != 0)
    got_T2 = decode(code_N).double().view(3, 2)
    rms = (25 / 3) ** 0.5
    want_2 = torch.tensor([3 / rms, 2 / rms], dtype=torch.float64).square()
    torch.testing.assert_close(got_T2[1:], want_2.expand(2, 2), rtol=0.091, atol=0)
    weak = (25e-12 / 3 + 1e-5) ** 0.5  # the epsilon decides
    want = torch.tensor([3e-6 / weak, 2e-6 / weak], dtype=torch.float64).square()
    torch.testing.assert_close(got_T2[0], want, rtol=0.091, atol=0)


def test_energies_come_back_where_the_neurons_fired(tmp_path, forward_of):
    shards = random_shards(50)
    manifest = replace(MANIFEST, energy=True)
    shape = manifest.shape
    norms = {layer: torch.rand(37) + 0.5 for layer in shape.layers}
    filler = Filler(shape, {layer: Gains(norm_F) for layer, norm_F in norms.items()})
    keep = torch.ones(1, 50, dtype=torch.bool)
    keep[0, 7] = False
    units = [Unit(split, 0, [TokenBatch(split, torch.arange(50)[None], keep)]) for split in SPLITS]
    with Writer(shape, shape.nbytes(50), to_folder(tmp_path)) as writer:
        for unit in units:
            record_unit(filler, writer, unit, forward_of(filler, shards))
    seal(tmp_path, manifest, [unit.info for unit in units])
    store = ActivationStore(tmp_path)
    unit = units[0]
    for layer, (_, x1) in zip(shape.layers, shards, strict=True):
        want = (x1[keep[0]] * norms[layer]) ** 2
        got = torch.cat([store.energies("train", 0, layer, a, a + 10) for a in range(0, 49, 10)])
        assert torch.equal(got != 0, want != 0)
        torch.testing.assert_close(got, want, rtol=0.092, atol=0)
        codes = load_file(tmp_path / unit.info.name)[f"layer.{layer}.energy"]
        assert codes.numel() == (want != 0).sum()


def test_a_shard_is_a_safetensors_file_with_its_checksum(tmp_path, write_store):
    others = {"calibration": [random_shards(2)], "held-out": [random_shards(1)]}
    recorded = {"train": [random_shards(5), random_shards(3)], **others}
    store = write_store(tmp_path / "s", MANIFEST, recorded)
    for number, shards in enumerate(recorded["train"]):
        name = f"train-{number:05d}.safetensors"
        tensors = load_file(tmp_path / "s" / name)
        for layer, (x, x1) in zip(MANIFEST.layers, shards, strict=True):
            assert torch.equal(tensors[f"layer.{layer}.x"], x.half())
            assert torch.equal(unpack(tensors[f"layer.{layer}.mask"], 37), x1 != 0)
            assert torch.equal(tensors[f"layer.{layer}.fired"].long(), (x1 != 0).sum(0))
            assert torch.equal(tensors[f"layer.{layer}.active"].long(), (x1 != 0).sum(1))
        raw = (tmp_path / "s" / name).read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        assert start % 8 == 0
        assert store.manifest.checksums[name] == xxhash.xxh3_128_hexdigest(raw[:start])
        with safe_open(tmp_path / "s" / name, framework="pt") as file:
            assert file.metadata() == {
                "split": "train",
                "number": str(number),
                **{key: xxhash.xxh3_128_hexdigest(bytes_of(t)) for key, t in tensors.items()},
            }
        ShardFile(tmp_path / "s" / name, store.manifest.checksums[name]).check()


@given(st.lists(st.integers(0, 20), min_size=1, max_size=60))
def test_the_spread_is_that_of_single_tokens(active):
    counts = torch.bincount(torch.tensor(active), minlength=21)
    measured = Stats({"train.layer.0.active": counts}).token_sparsity(0)
    sparsity = 1 - np.array(active) / 20
    assert measured.tokens == len(active)
    assert measured.mean == pytest.approx(sparsity.mean())
    assert measured.std == pytest.approx(sparsity.std(), abs=1e-9)
    for q, value in ((0.05, measured.p5), (0.5, measured.p50), (0.95, measured.p95)):
        assert value == pytest.approx(np.quantile(sparsity, q, method="inverted_cdf"))


def test_an_input_that_does_not_fit_is_refused(tmp_path, write_store):
    others = {"calibration": [random_shards(1)], "held-out": [random_shards(1)]}
    big = random_shards(4)
    big[1][0][2, 3] = 70_000.0
    with pytest.raises(InputError, match=r"layer 3: .* 7e\+04 does not fit float16.*bfloat16"):
        write_store(tmp_path / "a", MANIFEST, {"train": [big]})
    write_store(tmp_path / "b", replace(MANIFEST, x_dtype="bfloat16"), {"train": [big], **others})
    big[1][0][2, 3] = float("nan")
    for name, split in (("c", "train"), ("d", "counted")):
        with pytest.raises(InputError, match="layer 3: a predictor input is nan, so the model"):
            write_store(tmp_path / name, replace(MANIFEST, x_dtype="bfloat16"), {split: [big]})
    last = random_shards(4)
    last[1][1][3, 2] = float("inf")
    with pytest.raises(InputError, match="layer 3: an entry of x1 is inf, so the model itself"):
        write_store(tmp_path / "e", MANIFEST, {"train": [last]})


def test_a_failing_disk_is_reported_once_and_names_no_shard(tmp_path, forward_of):
    def full(name: str, buffer: ShardBuffer) -> None:
        raise OSError(28, "No space left on device")

    shape = MANIFEST.shape
    filler = Filler(shape)
    batch = TokenBatch("train", torch.arange(4)[None], torch.ones(1, 4, dtype=torch.bool))

    def shards() -> None:
        with Writer(shape, shape.nbytes(4), full) as writer:
            for number in range(20):
                unit = Unit("train", number, [batch])
                record_unit(filler, writer, unit, forward_of(filler, random_shards(4)))

    with pytest.raises(OSError, match="No space left"):
        shards()


@pytest.mark.parametrize(("d", "f"), [(4096, 11008), (1536, 3840), (8192, 28672)])
@pytest.mark.parametrize("x_dtype", ["bfloat16", "int8"])
def test_real_shapes_stay_within_two_percent(d, f, x_dtype):
    """One sequence of 512 tokens is the smallest shard that the default options make."""
    shape = Shape(layers=range(32), hidden_size=d, ffn_width=f, x_dtype=x_dtype)
    tokens = max(512, SHARD_BYTES // shape.token_bytes)
    plain = (2 * d if x_dtype == "bfloat16" else d + 4) + f / 8
    assert shape.bound == pytest.approx(1.02 * plain)
    assert shape.nbytes(tokens) / tokens / 32 <= shape.bound
    if (d, x_dtype) == (4096, "bfloat16"):
        assert plain == 9_568


def test_counted_tokens_are_in_the_statistics_and_nowhere_else(model_folder, corpus, tmp_path):
    cfg = CollectConfig(
        model=str(model_folder),
        corpus=str(corpus),
        out=tmp_path / "a",
        tokens=1_000,
        count_tokens=2_000,
        seq_len=64,
        long_documents="cut",  # so that a sequence is a document
        energy=True,
    )
    store = collect(cfg)
    plain = collect(replace(cfg, out=tmp_path / "b", count_tokens=0))
    more = collect(replace(cfg, out=tmp_path / "c", count_tokens=0, tokens=3_300))
    made = store.manifest
    assert made.tokens() == 1_000
    assert made.shard_tokens["counted"] == [2_000]
    for split in ("train", "calibration", "held-out"):
        name = f"{split}-00000.safetensors"
        assert (store.folder / name).read_bytes() == (plain.folder / name).read_bytes()
    counted = load_file(store.folder / "counted-00000.safetensors")
    assert {name.rpartition(".")[2] for name in counted} == {"id", "position", "fired", "active"}
    assert store.stats().token_sparsity(1).tokens == 3_000
    assert store.stats().splits() == ["calibration", "counted", "held-out", "train"]
    # The counted documents are the next ones of the training split.
    starts = (more.tokens("train", 0)[1] == 0).sum()
    assert made.documents["train"] + made.documents["counted"] == pytest.approx(starts, abs=2)
    assert inspect(InspectConfig(path=store.folder)).ok


def anonymous_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))


@pytest.mark.slow
def test_a_store_of_7b_shape_is_written_and_read_in_bounded_memory(tmp_path, forward_of):
    """50,000 tokens, 15.3 GB: three images of one batch's size on the way in, one run on the way
    out. Page cache is the system's, so anonymous memory is what counts."""
    shape = Shape(layers=range(32), hidden_size=4096, ffn_width=11008, x_dtype="bfloat16")
    batch_tokens, total = 500, 50_000
    x = torch.randn(batch_tokens, 4096).bfloat16()
    x1 = torch.randn(batch_tokens, 11008).bfloat16().relu()
    ids = torch.zeros(1, batch_tokens, dtype=torch.int64)
    filler = Filler(shape)
    forward = forward_of(filler, [(x, x1)] * 32)
    before, peak = anonymous_mib(), 0.0
    shards = total // batch_tokens - 2
    places = [*(("train", number) for number in range(shards)), ("calibration", 0), ("held-out", 0)]
    units = [Unit(*at, [TokenBatch(at[0], ids, torch.ones_like(ids).bool())]) for at in places]
    with Writer(shape, shape.nbytes(batch_tokens), to_folder(tmp_path)) as writer:
        for unit in units:
            record_unit(filler, writer, unit, forward)
            peak = max(peak, anonymous_mib() - before)
    one_layer = 5 * batch_tokens * 11008 * 2 / 2**20
    assert peak < 3 * shape.nbytes(batch_tokens) / 2**20 + one_layer
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert size / total / 32 <= shape.bound

    made = replace(
        MANIFEST,
        layers=list(shape.layers),
        hidden_size=4096,
        ffn_width=11008,
        x_dtype="bfloat16",
    )
    seal(tmp_path, made, [unit.info for unit in units])
    store = ActivationStore(tmp_path)
    before, peak, seen = anonymous_mib(), 0.0, 0
    want = pack(x1 != 0)
    for layer in (0, 31):
        for shard in range(shards):
            rows = store.rows("train", shard, layer)
            assert torch.equal(rows.x_TD, x)
            assert torch.equal(rows.mask_TP, want)
            seen += len(rows.x_TD)
            peak = max(peak, anonymous_mib() - before)
    assert seen == 2 * shards * batch_tokens
    assert peak < 64


def test_the_memory_sink_finishes_shards(tmp_path):
    shape = MANIFEST.shape
    buffer = ShardBuffer(shape, shape.nbytes(4), pinned=False)
    buffer.begin(4, split="train", number=0)
    to_folder(tmp_path)("x", buffer)
    assert b"".join(buffer.blocks()) == (tmp_path / "x").read_bytes()
    assert to_memory("x", buffer) == buffer.nbytes == (tmp_path / "x").stat().st_size

"""verify sees a split that the engine would misread, that does not fit, or that is not the best."""

from __future__ import annotations

import re
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsecast.export.bundle import GPUIDX_SUFFIX, bundle_file
from sparsecast.export.checks.gpu_split import check_gpu_split
from sparsecast.export.config import ExportConfig, VerifyConfig
from sparsecast.export.read.reader import GGUFFile
from sparsecast.export.run import export
from sparsecast.export.verify import verify
from sparsecast.export.write.gpuidx import write_gpuidx
from sparsecast.export.write.hot_cold import BLOCK, Split, hottest
from sparsecast.export.write.vram import Budget

NEURON = 3 * 64 * 2 + 4


@pytest.fixture
def counts(bundle):
    """Counts of layers that differ, in place of the bundle's own."""
    generator = torch.Generator().manual_seed(0)
    counts = [torch.randperm(1280, generator=generator) * factor for factor in (1.0, 9.0, 2.0)]
    for i, count_F in enumerate(counts):
        torch.save(count_F, bundle / "activation" / f"activation_{i}.pt")
    return counts


@pytest.fixture
def hot(counts):
    """The best split of 6 blocks."""
    return [hottest(count_F, k * BLOCK) for count_F, k in zip(counts, (0, 4, 2), strict=True)]


@pytest.fixture
def checked(bundle):
    """Write a split beside the bundle, damage it, and check it."""

    def run(hot, damage=lambda content: content, *, neuron=NEURON, width=1280) -> SimpleNamespace:
        file = GGUFFile(bundle_file(bundle))
        path = file.path.with_name(file.path.name + GPUIDX_SUFFIX)
        write_gpuidx(path, Split(hot, width, 1.0, Budget(0, 0, 0, neuron)))
        path.write_bytes(damage(path.read_bytes()))
        (check,) = check_gpu_split(file, bundle)
        return check

    return run


def test_a_sound_split_passes_verify(model_folder, predictors, acts, corpus, tmp_path):
    cfg = ExportConfig(
        model=str(model_folder),
        predictors=predictors,
        out=tmp_path / "b",
        activations=acts.folder,
        vram_budget=0.00073,
    )
    export(cfg)

    result = verify(VerifyConfig(bundle=cfg.out, corpus=str(corpus), tokens=512))

    assert result.ok
    (detail,) = (check.detail for check in result.checks if check.name == "gpu split")
    assert detail == "768 neurons, the hottest of 3 layers"


def test_a_bundle_without_a_split_has_no_such_check(bundle_folder):
    assert check_gpu_split(GGUFFile(bundle_file(bundle_folder)), bundle_folder) == []


def test_a_sound_split_is_sound(checked, hot):
    assert checked(hot).ok


def test_an_empty_split_and_a_whole_one_are_sound(checked):
    none = torch.tensor([], dtype=torch.int64)
    assert checked([none] * 3, neuron=0).ok
    assert checked([torch.arange(1280)] * 3, neuron=NEURON - 4).ok


def renamed(one: bytes, other: bytes):
    def damage(content: bytes) -> bytes:
        assert content.count(one) == 1
        return content.replace(one, other)

    return damage


def exchanged(one: bytes, other: bytes):
    def damage(content: bytes) -> bytes:
        mark = b"?" * len(one)
        return content.replace(one, mark).replace(other, one).replace(mark, other)

    return damage


def at(key: bytes, skip: int, new: bytes):
    """Other bytes some way behind a name."""

    def damage(content: bytes) -> bytes:
        place = content.index(key) + len(key) + skip
        assert content[place : place + len(new)] != new
        return content[:place] + new + content[place + len(new) :]

    return damage


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda content: content[:-64], "truncated"),
        (lambda content: content[:150], "ends at byte 150|more than it can hold"),
        (renamed(b"generic.gpu_index\x1d", b"generic.gpu_indez\x1d"), "general.architecture is"),
        (renamed(b"split.vram_capacity", b"split.vram_kapacity"), "vram_capacity is missing"),
        (exchanged(b"blk.0.gpu_idx", b"blk.2.gpu_idx"), "blk.2.gpu_idx is at the place of blk.0"),
        (at(b"blk.1.gpu_idx", 12, b"\x00"), "blk.1.gpu_idx is f32, expected i32"),
    ],
)
def test_what_the_engine_would_misread_is_named(checked, hot, damage, reason):
    check = checked(hot, damage)

    assert not check.ok
    assert re.search(reason, check.detail), check.detail


def test_a_split_of_another_width_is_named(checked, hot):
    assert "blk.0.gpu_idx is (1536,), expected (1280,)" in checked(hot, width=1536).detail


def test_fewer_layers_are_named(checked, hot):
    damage = at(b"index.block_count", 4, b"\x03")
    assert "holds 4 tensors, expected 6" in checked(hot[:2], damage).detail


def test_an_index_that_is_not_the_list_is_named(checked, hot):
    layer = next(i for i, hot_K in enumerate(hot) if len(hot_K))
    hot[layer] = hot[layer].flip(0)

    assert f"blk.{layer}.gpu_bucket is not where" in checked(hot).detail


def test_half_a_block_is_named(checked, hot):
    layer = next(i for i, hot_K in enumerate(hot) if len(hot_K))
    hot[layer] = hot[layer][:-1]

    assert f"layer {layer} has" in checked(hot).detail


def test_a_cold_neuron_among_the_hot_is_named(checked, hot, counts):
    layer = next(i for i, hot_K in enumerate(hot) if 0 < len(hot_K) < 1280)
    chosen = set(hot[layer].tolist())
    coldest_in = min(chosen, key=lambda j: counts[layer][j])
    hottest_out = max(set(range(1280)) - chosen, key=lambda j: counts[layer][j])
    hot[layer] = torch.tensor(sorted(chosen - {coldest_in} | {hottest_out}))

    assert f"layer {layer}: not its {len(hot[layer]):,} hottest" in checked(hot).detail


def test_a_split_that_another_beats_is_named(checked, hot, counts):
    blocks = [len(hot_K) // BLOCK for hot_K in hot]
    gives = max(range(3), key=lambda i: blocks[i])
    takes = min(range(3), key=lambda i: blocks[i])
    blocks[gives], blocks[takes] = blocks[gives] - 1, blocks[takes] + 1
    other = [hottest(count_F, k * BLOCK) for count_F, k in zip(counts, blocks, strict=True)]

    assert "another split of this size has a greater total" in checked(other).detail


@settings(max_examples=60, deadline=None)
@given(
    blocks=st.lists(st.integers(0, 3), min_size=1, max_size=4),
    largest=st.sampled_from([1, 5, 1000]),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_split_passes_if_and_only_if_no_other_beats_it(blocks, largest, seed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("b")
    generator = torch.Generator().manual_seed(seed)
    size = (len(blocks), 3 * BLOCK)
    counts_LF = torch.randint(0, largest + 1, size, generator=generator).float()
    counts_LF *= torch.randint(1, 3, (len(blocks), 1), generator=generator)
    (folder / "activation").mkdir()
    for i, count_F in enumerate(counts_LF):
        torch.save(count_F.clone(), folder / "activation" / f"activation_{i}.pt")
    hot = [hottest(count_F, k * BLOCK) for count_F, k in zip(counts_LF, blocks, strict=True)]
    write_gpuidx(folder / f"m{GPUIDX_SUFFIX}", Split(hot, 3 * BLOCK, 1.0, Budget(0, 0, 0, 4)))
    sizes = {"block_count": len(blocks), "feed_forward_length": 3 * BLOCK, "embedding_length": 1}
    others = {"attention.head_count": 1, "context_length": 1, "attention.layer_norm_rms_epsilon": 1}
    keys = {f"llama.{name}": value for name, value in {**sizes, **others}.items()}
    keys |= {"general.architecture": "llama", "tokenizer.ggml.tokens": ["a"]}
    matrix = SimpleNamespace(nbytes=0, shape=(3 * BLOCK, 1))
    names = [f"blk.{i}.ffn_{n}.weight" for i in range(4) for n in ("gate", "up", "down_t")]
    file = SimpleNamespace(path=folder / "m", keys=keys, entries=dict.fromkeys(names, matrix))

    (check,) = check_gpu_split(file, folder)

    def total(chosen):
        ordered_LF = counts_LF.sort(dim=1, descending=True).values
        return sum(o[: k * BLOCK].sum().item() for o, k in zip(ordered_LF, chosen, strict=True))

    others = product(*[range(4)] * len(blocks))
    best = max(total(chosen) for chosen in others if sum(chosen) == sum(blocks))
    assert check.ok == (total(blocks) == best), check.detail

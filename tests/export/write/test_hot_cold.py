"""The choice of hot neurons against brute force, its bytes, and the file they are written to."""

from __future__ import annotations

import re
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsecast.core.errors import InputError
from sparsecast.export.bundle import GPUIDX_SUFFIX, bundle_file
from sparsecast.export.config import ExportConfig
from sparsecast.export.read.reader import GGUFFile
from sparsecast.export.run import FLOAT32_EXACT, export, write_counts
from sparsecast.export.write.gpuidx import write_gpuidx
from sparsecast.export.write.hot_cold import BLOCK, Split, blocks_per_layer, hottest, split_for
from sparsecast.export.write.vram import Budget

GIB = 2**30
NEURON = 3 * 64 * 2 + 4
"""Bytes of a neuron of the small model in f16: rows of gate, up and down_t, and a list entry."""
BEFORE = (
    3 * (64 * 4 + (64 + 32 + 32 + 64) * 64 * 2 + (16 * 64 + 1280 * 16) * 2 + 64 * 4)
    + 64 * 4
    + 512 * 64 * 2
)
"""Bytes of the small model: attention with its norm, predictors, FFN norms; output norm, output."""
HALF_CACHE = 3 * 512 * 32 * 2
"""512 tokens of keys: 3 layers, 2 heads of 16, f16."""

problems = st.tuples(
    st.integers(1, 4),  # layers
    st.integers(1, 4),  # blocks of a layer
    st.sampled_from([1, 3, 100, 2**40]),  # the largest count; small ones make ties
    st.integers(0, 2**32 - 1),
)


def counts_of(layers: int, blocks: int, largest: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    size = (layers, blocks * BLOCK)
    counts_LF = torch.randint(0, largest + 1, size, generator=generator)
    # Some neurons are much hotter than others, and some layers.
    counts_LF *= torch.randint(0, 3, size, generator=generator)
    return list(counts_LF * torch.randint(0, 3, (layers, 1), generator=generator))


def best_total(counts: list[Tensor], n: int) -> int:
    """Over every number of blocks per layer that fits."""
    ordered = [count_F.sort(descending=True).values for count_F in counts]
    sizes = [range(len(count_F) // BLOCK + 1) for count_F in counts]
    return max(
        sum(int(hot_F[: k * BLOCK].sum()) for hot_F, k in zip(ordered, chosen, strict=True))
        for chosen in product(*sizes)
        if sum(chosen) <= n
    )


@settings(max_examples=150, deadline=None)
@given(problem=problems, n=st.integers(0, 18))
def test_no_choice_of_blocks_has_a_greater_total(problem, n):
    counts = counts_of(*problem)

    blocks = blocks_per_layer(counts, n)

    assert sum(blocks) == min(n, problem[0] * problem[1])
    hot = [hottest(count_F, k * BLOCK) for count_F, k in zip(counts, blocks, strict=True)]
    total = sum(int(count_F[hot_K].sum()) for count_F, hot_K in zip(counts, hot, strict=True))
    assert total == best_total(counts, n)


def test_counts_beyond_the_exact_range_of_float32_keep_their_order(tmp_path):
    """Neighbors above 2^24 are one float32; the hotter must still be chosen."""
    count_F = torch.full((2 * BLOCK,), FLOAT32_EXACT)
    count_F[1::2] += 1

    (hot_K,) = split_for(Budget(BLOCK * 10, 0, GIB, 10), [count_F]).hot
    write_counts(tmp_path / "a", [count_F, count_F.clamp(max=FLOAT32_EXACT)])

    assert torch.equal(hot_K, torch.arange(1, 2 * BLOCK, 2))
    stored = [torch.load(tmp_path / "a" / f"activation_{i}.pt", weights_only=True) for i in (0, 1)]
    assert [t.dtype for t in stored] == [torch.float64, torch.float32]
    assert torch.equal(stored[0].long(), count_F)


@pytest.mark.parametrize(
    ("given", "room"),
    [
        (99, -1),
        (100, 0),
        (139, 39),  # neither half of the cache fits
        (140, 0),
        (179, 39),  # the keys do, the values do not
        (180, 0),
        (1000, 820),
    ],
)
def test_the_cache_comes_before_neurons_half_by_half(given, room):
    assert Budget(given=given, before=100, half_cache=40, neuron=1).room == room


GOLDEN = bytes.fromhex(
    "50575249 03000000 0400000000000000 0300000000000000"
    "1400000000000000 67656e6572616c2e617263686974656374757265 08000000"
    "1100000000000000 67656e657269632e6770755f696e646578"
    "1d00000000000000 67656e657269632e6770755f696e6465782e626c6f636b5f636f756e74 04000000 02000000"
    "1300000000000000 73706c69742e7672616d5f6361706163697479 0a000000 1400000000000000"
    "0d00000000000000 626c6b2e302e6770755f696478 01000000 0300000000000000 12000000"
    "0000000000000000"
    "1000000000000000 626c6b2e302e6770755f6275636b6574 01000000 0000000000000000 12000000"
    "2000000000000000"
    "0d00000000000000 626c6b2e312e6770755f696478 01000000 0300000000000000 12000000"
    "2000000000000000"
    "1000000000000000 626c6b2e312e6770755f6275636b6574 01000000 0200000000000000 12000000"
    "4000000000000000"
    "00"
    "000000000000000000000000 0000000000000000000000000000000000000000"
    "010000000000000001000000 0000000000000000000000000000000000000000"
    "0000000002000000 000000000000000000000000000000000000000000000000"
)
"""Two layers of three neurons, none and then 0 and 2 on the GPU, 10 bytes each."""


def test_the_file_is_laid_out_as_powerinfer_does(tmp_path):
    hot = [torch.tensor([], dtype=torch.int64), torch.tensor([0, 2])]
    write_gpuidx(tmp_path / "x.gpuidx", Split(hot, 3, 1.0, Budget(GIB, 0, 0, 10)))

    assert (tmp_path / "x.gpuidx").read_bytes() == GOLDEN
    file = GGUFFile(tmp_path / "x.gpuidx")
    assert file.tensor("blk.0.gpu_bucket").tolist() == []
    assert file.tensor("blk.1.gpu_bucket").tolist() == [0, 2]
    assert file.tensor("blk.1.gpu_idx").dtype == torch.int32


@pytest.fixture
def exported(model_folder, predictors, acts, tmp_path):
    """Export with options; the split's file, the counts, and what stands in the card."""

    def run(**options: object) -> SimpleNamespace:
        defaults = {
            "model": str(model_folder),
            "predictors": predictors,
            "activations": acts.folder,
        }
        out = tmp_path / f"b{len(list(tmp_path.iterdir()))}"
        path = export(ExportConfig(**{**defaults, "out": out, **options}))
        split = GGUFFile(path.with_name(path.name + GPUIDX_SUFFIX))
        hot = [split.tensor(f"blk.{i}.gpu_bucket").tolist() for i in range(3)]
        card = (path.parent / "README.md").read_text()
        return SimpleNamespace(hot=hot, keys=split.keys, card=card, file=GGUFFile(path))

    return run


def test_the_hottest_neurons_fill_the_budget_to_the_byte(exported, acts):
    static = BEFORE + 2 * HALF_CACHE
    for blocks, spare in ((7, 0), (6, BLOCK * NEURON - 1)):
        made = exported(vram_budget=(static + blocks * BLOCK * NEURON + spare) / GIB)

        assert sum(map(len, made.hot)) == blocks * BLOCK
        assert made.keys["split.vram_capacity"] == blocks * BLOCK * NEURON
        counts = [acts.stats().fired(i, ["train", "calibration"]) for i in range(3)]
        total = sum(int(c[hot].sum()) for c, hot in zip(counts, made.hot, strict=True))
        assert total == best_total(counts, blocks)
        assert f"{blocks * BLOCK:,} of 3,840 neurons" in made.card


def test_a_wider_type_and_a_longer_context_leave_fewer_neurons(exported):
    budget = (BEFORE + 2 * HALF_CACHE + 7 * BLOCK * NEURON) / GIB
    wide = 3 * (64 + 32 + 32 + 64) * 64 * 2 + 512 * 64 * 2  # what f32 adds before the neurons
    gated = 2 * 64 * 4 + 64 * 2 + 4

    f32 = exported(vram_budget=budget + (wide + 7 * BLOCK * (gated - NEURON)) / GIB, dtype="f32")
    longer = exported(vram_budget=budget, vram_context=1024)

    assert f32.keys["split.vram_capacity"] == 7 * BLOCK * gated
    left = 7 * BLOCK * NEURON - 2 * HALF_CACHE
    assert sum(map(len, longer.hot)) == left // (BLOCK * NEURON) * BLOCK


def test_everything_fits_into_a_large_budget(exported):
    made = exported(vram_budget=8.0)

    assert made.hot == [list(range(1280))] * 3
    assert "`--vram-budget 8 -c 512`" in made.card
    assert made.keys["split.vram_capacity"] == 3 * 1280 * NEURON
    assert "3,840 of 3,840 neurons" in made.card
    assert "with 100.0% of the recorded activations" in made.card


@pytest.mark.parametrize("given", [BEFORE - 1, BEFORE + BLOCK * NEURON - 1])
def test_a_budget_for_no_block_says_what_it_takes(exported, given, capsys):
    made = exported(vram_budget=given / GIB, vram_context=4096)

    assert made.hot == [[], [], []]
    assert made.keys["split.vram_capacity"] == 0
    told = " ".join(capsys.readouterr().err.split())
    need = (BEFORE + 16 * HALF_CACHE + BLOCK * NEURON) / GIB
    assert f"it takes a --vram-budget of {need:.3g}, {given / GIB:.3g} were given" in told
    assert "On the GPU: no neuron; the FFN stays on the CPU" in told
    assert "no neuron" in made.card


def test_the_card_gives_the_command_for_a_gpu(exported):
    budget = (BEFORE + 2 * HALF_CACHE + 3 * BLOCK * NEURON) / GIB

    made = exported(vram_budget=budget)

    line = f"-t 2 -tb 2 --vram-budget {budget:.9g} -c 512 -n 64 --temp 0 --repeat-penalty 1.0 -p"
    assert f".powerinfer.gguf {line}" in made.card
    assert "With one thread it aborts" in made.card
    least = float(re.search(r"take at least `--vram-budget ([\d.e-]+)`", made.card)[1])
    assert 0 <= least / budget - 1 < 1e-3


def test_a_budget_with_room_to_spare_names_the_least_that_does(exported):
    made = exported(vram_budget=8.0)

    least = float(re.search(r"take at least `--vram-budget ([\d.e-]+)`", made.card)[1])
    need = (BEFORE + 2 * HALF_CACHE + 3 * 1280 * NEURON) / GIB
    assert 0 <= least / need - 1 < 1e-3
    assert "one thread is enough" in made.card


def test_the_card_warns_of_a_split_layer_in_q4_0(exported):
    warning = "where a layer is split between GPU and CPU"
    split = (BEFORE + 2 * HALF_CACHE + 3 * BLOCK * NEURON) / GIB

    assert warning not in exported(vram_budget=split).card
    assert warning not in exported(vram_budget=8.0, dtype="q4_0").card
    assert warning in exported(vram_budget=split, dtype="q4_0").card


def test_the_card_names_the_batches_that_abort(exported):
    """The small model's heads have 16 channels, fewer than the cells that the engine looks at."""
    assert "With `-b` of 32 or less and `-c` of more than 32" in exported(vram_budget=8.0).card


def test_no_split_is_written_unasked(bundle_folder):
    assert list(bundle_folder.glob("*.gpuidx")) == []
    assert bundle_file(bundle_folder).is_file()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"vram_budget": 8.0}, "give --activations too"),
        ({"vram_budget": 0.0, "activations": "a"}, "got 0, expected GiB"),
        ({"vram_budget": float("nan"), "activations": "a"}, "got nan, expected a number"),
        ({"vram_budget": float("inf"), "activations": "a"}, "got inf, expected a number"),
        ({"vram_context": 0}, "--vram-context: must be at least 1"),
    ],
)
def test_budgets_that_make_no_sense_are_refused(options, reason, tmp_path):
    with pytest.raises(InputError, match=reason):
        ExportConfig(model="m", predictors=tmp_path, out=tmp_path, **options)


def test_an_ffn_that_does_not_divide_is_refused(exported, monkeypatch, tmp_path):
    monkeypatch.setattr("sparsecast.export.write.hot_cold.BLOCK", 512)

    with pytest.raises(InputError, match="blocks of 512, but the FFN is 1280 wide"):
        exported(vram_budget=8.0)
    assert not (tmp_path / "b").exists()

"""Predictors in q8_0 and q4_0: bytes, values, decisions, and damage that verify sees."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from sparsecast.core.errors import InputError
from sparsecast.export.bundle import bundle_file
from sparsecast.export.checks.tensors import check_tensors
from sparsecast.export.config import ExportConfig, VerifyConfig
from sparsecast.export.engine import emulator
from sparsecast.export.engine.emulator import Emulator
from sparsecast.export.engine.perturbed import Perturbed
from sparsecast.export.engine.process import serving
from sparsecast.export.engine.protocol import chunks_of, held_out_documents, joined
from sparsecast.export.engine.replies import Spelling
from sparsecast.export.read.reader import GGUFFile, _blocks
from sparsecast.export.read.vocab import tokenizer_of
from sparsecast.export.run import export
from sparsecast.export.verify import verify
from sparsecast.export.write.convert import slabs
from sparsecast.export.write.tensor_plan import predictor_tensors
from sparsecast.predictors.checkpoint import PredictorSet, load_predictors
from sparsecast.predictors.predictor import Predictor

DTYPES = ("f16", "q8_0", "q4_0")
NAMES = [f"blk.{i}.{short}.weight" for i in range(3) for short in ("fc1", "fc2")]

HALF = b"\x00\x38"  # 0.5 in f16
Q8_CODES = [127, -127, *range(-14, 16)]
Q8_BYTES = HALF + np.int8(Q8_CODES).tobytes()
Q4_CODES = [*range(-8, 8), *range(7, -9, -1)]
Q4_BYTES = HALF + bytes.fromhex("f0e1d2c3b4a5968778695a4b3c2d1e0f")
GOLDEN = {
    "q8_0": (Q8_CODES, Q8_BYTES, bytes(34)),
    "q4_0": (Q4_CODES, Q4_BYTES, b"\x00\x80" + b"\x88" * 16),  # 0 / -8 is -0
}
"""Codes of one block, its bytes, and the bytes of a block of zeros."""


def raw(file: GGUFFile, name: str) -> np.ndarray:
    """(rows, bytes of a row), read without our reader's tensors."""
    entry = file.entries[name]
    data = np.fromfile(file.path, np.uint8, entry.nbytes, offset=entry.start)
    return data.reshape(entry.shape[0], -1)


def plan(*layers: Predictor):
    return list(predictor_tensors(PredictorSet(list(layers), 0.0, None)))


@pytest.mark.parametrize("dtype", ["q8_0", "q4_0"])
def test_a_block_is_laid_out_as_ggml_does(dtype):
    """Literal bytes: written, and read back."""
    codes, golden, zeros = GOLDEN[dtype]
    weight = 0.5 * torch.tensor([codes, [0] * 32], dtype=torch.float32)

    (written,) = slabs(plan(Predictor(weight, torch.zeros(32, 32), dtype))[0])

    assert written.tobytes() == golden + zeros
    blocks = torch.frombuffer(bytearray(golden), dtype=torch.uint8)[None]
    assert torch.equal(valued(blocks), weight[:1])


def valued(blocks: torch.Tensor) -> torch.Tensor:
    scale_N, code_NK = _blocks(blocks)
    return scale_N[:, None] * code_NK.float()


@pytest.mark.parametrize("dtype", ["q8_0", "q4_0"])
def test_any_block_is_read_as_the_gguf_package_does(dtype):
    generator = np.random.default_rng(0)
    blocks = generator.integers(0, 256, (500, 34 if dtype == "q8_0" else 18), np.uint8)
    blocks[:, 1] &= 0x3B  # no scale that is NaN or infinite

    want = dequantize(blocks, GGMLQuantizationType[dtype.upper()])

    assert np.array_equal(valued(torch.from_numpy(blocks)).numpy(), want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e-9, 1e-6, 1e-3, 1.0, 1e3])
def test_what_a_predictor_holds_is_written_without_another_loss(dtype, size):
    """Equal values; only the sign of a zero may differ. Scales of all sizes, down to those that
    f16 keeps with few bits or not at all."""
    kept = Predictor(size * torch.randn(96, 64), size * torch.randn(200, 96), dtype).stored()
    kept.fc1_RD[3] = 0

    for planned, want in zip(plan(kept), kept.weights, strict=True):
        got = dequantize(np.concatenate(list(slabs(planned))).view(np.uint8), planned.type)
        assert np.array_equal(got.reshape(want.shape), want.float().numpy())


def test_the_file_holds_the_predictors_own_values(quantized):
    file = GGUFFile(bundle_file(quantized))
    predictors = load_predictors(quantized / "predictor")
    weights = [weight for predictor in predictors.layers for weight in predictor.weights]

    types = [file.entries[name].type.name for name in NAMES]
    assert types == [dtype for dtype in DTYPES for _ in range(2)]
    assert [predictor.dtype for predictor in predictors.layers] == list(DTYPES)
    for name, weight, kind in zip(NAMES, weights, types, strict=True):
        packages = dequantize(raw(file, name), GGMLQuantizationType[kind.upper()])
        assert np.array_equal(packages, weight.float().numpy())
        assert torch.equal(file.tensor(name).float(), weight.float())
    for i, predictor in enumerate(predictors.layers):
        assert sum(file.entries[name].nbytes for name in NAMES[2 * i :][:2]) == predictor.nbytes


def product(file: GGUFFile, name: str, x_TD: np.ndarray) -> np.ndarray:
    """As ggml's vec_dot does: codes multiplied as integers block by block, times both scales."""
    kind = GGMLQuantizationType[file.entries[name].type.name.upper()]
    if kind is GGMLQuantizationType.F16:
        weight = raw(file, name).view(np.float16)
        return x_TD.astype(np.float16).astype(np.float64) @ weight.astype(np.float64).T
    scale_NB, code_NBC = parts(raw(file, name), 18 if kind is GGMLQuantizationType.Q4_0 else 34)
    x_TBC = x_TD.reshape(len(x_TD), -1, 32)
    scale_TB = abs(x_TBC).max(-1) / np.float32(127)
    # Halves to even, as the engine's vector code: the gguf package rounds them away from 0.
    code_TBC = np.rint(x_TBC * (1 / scale_TB.clip(1e-30))[..., None]).astype(np.int64)
    sums_TNB = np.einsum("tbc,nbc->tnb", code_TBC, code_NBC)
    return (sums_TNB * scale_TB.astype(np.float16).astype(np.float64)[:, None] * scale_NB).sum(-1)


def parts(rows: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Scales (rows, blocks) and integer codes (rows, blocks, 32) of blocks of `size` bytes."""
    blocks = rows.reshape(len(rows), -1, size)
    scale = blocks[..., :2].copy().view(np.float16)[..., 0].astype(np.float64)
    codes = blocks[..., 2:]
    if size == 34:
        return scale, codes.copy().view(np.int8).astype(np.int64)
    return scale, np.concatenate([codes % 16, codes // 16], -1).astype(np.int64) - 8


def by_hand(file: GGUFFile, layer: int, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(T, F) logits, and how far one step of each rounded hidden unit together moves them."""
    hidden_TR = product(file, NAMES[2 * layer], x_TD.numpy()).clip(0).astype(np.float32)
    logits_TF = torch.from_numpy(product(file, NAMES[2 * layer + 1], hidden_TR))
    step_T1 = torch.from_numpy(hidden_TR).amax(1, keepdim=True) / 127
    return logits_TF, step_T1 * file.tensor(NAMES[2 * layer + 1]).float().abs().sum(1)


@pytest.fixture(scope="module")
def dense(quantized, model_folder, tmp_path_factory) -> Path:
    """The bundle with predictors of three blocks a row, all of whose weights are random."""
    folder = tmp_path_factory.mktemp("dense")
    torch.manual_seed(0)
    layers = [Predictor(torch.randn(96, 64), torch.randn(1280, 96), dtype) for dtype in DTYPES]
    made = load_predictors(quantized / "predictor").manifest
    PredictorSet(layers, 0.0, replace(made, ranks=[96] * 3)).save(folder / "p")
    cfg = ExportConfig(model=str(model_folder), predictors=folder / "p", out=folder / "b")
    return export(cfg).parent


@pytest.mark.parametrize("layer", range(3), ids=DTYPES)
def test_decisions_of_the_file_are_the_predictors_own(layer, dense, acts):
    """On recorded inputs, against integer arithmetic on the file's bytes."""
    file = GGUFFile(bundle_file(dense))
    predictor = load_predictors(dense / "predictor").layers[layer]
    x_TD = acts.rows("held-out", 0, layer).x_TD.float()
    want_TF, step_TF = by_hand(file, layer, x_TD)

    for got_TF in (predictor.logits(x_TD), Emulator(file).predictor_logits(x_TD, layer)):
        different_TF = (got_TF >= 0) != (want_TF >= 0)
        assert different_TF.float().mean() <= 1e-4
        assert bool((got_TF.abs() <= step_TF)[different_TF].all())
        assert 0.05 < (got_TF >= 0).float().mean() < 0.95
        near_TF = (got_TF - want_TF).abs() <= 1e-5 * want_TF.abs().max()
        assert near_TF.float().mean() >= 0.98  # elsewhere a code turned over


@pytest.mark.parametrize("layer", range(3), ids=DTYPES)
def test_terms_that_cancel_leave_an_active_neuron(layer, quantized, acts):
    """A quarter of these logits is exactly 0, some of them as a difference of equal products."""
    file = GGUFFile(bundle_file(quantized))
    x_TD = acts.rows("held-out", 0, layer).x_TD.float()
    want_TF, _ = by_hand(file, layer, x_TD)

    got_TF = Emulator(file).predictor_logits(x_TD, layer)

    assert (want_TF == 0).float().mean() > 0.2
    assert torch.equal(got_TF >= 0, want_TF >= 0)


@pytest.fixture
def damaged(quantized, tmp_path) -> Path:
    return Path(shutil.copytree(quantized, tmp_path / "bundle"))


def failures(bundle: Path, corpus: Path) -> dict[str, str]:
    result = verify(VerifyConfig(bundle=bundle, corpus=str(corpus), tokens=256))
    return {c.name: c.detail for c in result.checks if not c.ok}


def test_a_bundle_of_three_formats_verifies(quantized, corpus):
    assert failures(quantized, corpus) == {}


@pytest.mark.parametrize(
    ("name", "at", "change", "failed"),
    [
        ("blk.2.fc2.weight", 18 * 100 + 5, 0x10, "predictor folder"),  # one code of q4_0
        ("blk.2.fc1.weight", 18 * 31, 0x01, "predictor folder"),  # the last bit of a scale
        ("blk.1.fc1.weight", 34 * 31 + 33, 0x01, "predictor folder"),  # the last code of q8_0
        ("blk.1.fc2.weight", 34 * 7 + 1, 0x80, "predictor folder"),  # the sign of a scale
        ("blk.1.fc2.weight", 34 * 7 + 1, None, "finite"),  # a scale that is NaN
    ],
)
def test_a_damaged_block_is_named(damaged, corpus, name, at, change, failed):
    path = bundle_file(damaged)
    content = bytearray(path.read_bytes())
    at += GGUFFile(path).entries[name].start
    content[at] = 0x7F if change is None else content[at] ^ change
    path.write_bytes(content)

    assert name in failures(damaged, corpus)[failed]


def test_a_folder_that_names_another_format_is_named(damaged, corpus, sealed):
    sealed(damaged / "predictor", dtypes=["f16", "f16", "q4_0"])

    detail = failures(damaged, corpus)["predictor folder"]
    assert "blk.1.fc1.weight is q8_0, manifest.json has f16" in detail


def test_a_missing_manifest_is_not_quoted(damaged, corpus):
    (damaged / "predictor" / "manifest.json").unlink()

    detail = failures(damaged, corpus)["predictor folder"]
    assert "blk.1.fc1.weight is q8_0, without a manifest.json it counts as f16" in detail


def test_a_quantized_matrix_of_the_model_is_named(quantized):
    file = GGUFFile(bundle_file(quantized))
    file.entries["blk.0.ffn_down_t.weight"] = file.entries["blk.0.ffn_down_t.weight"]._replace(
        type=file.entries["blk.1.fc1.weight"].type
    )

    assert "blk.0.ffn_down_t.weight is q8_0, expected f16" in check_tensors(file).detail


def test_rows_that_share_a_block_are_named(quantized):
    """PowerInfer's `quantize` writes such files, and its engine computes wrong masks from them."""
    file = GGUFFile(bundle_file(quantized))
    for name, shape in (("blk.2.fc1.weight", (48, 64)), ("blk.2.fc2.weight", (1280, 48))):
        file.entries[name] = file.entries[name]._replace(shape=shape)

    check = check_tensors(file)

    assert not check.ok
    assert check.detail.startswith("blk.2.fc2.weight is q4_0 in rows of 48, expected a multiple")


@pytest.mark.parametrize(
    ("rank", "hidden", "name", "width"),
    [(48, 64, "blk.1.fc2.weight", 48), (32, 80, "blk.1.fc1.weight", 80)],
)
def test_rows_that_are_no_whole_blocks_are_refused(rank, hidden, name, width):
    fc1_RD, fc2_FR = torch.zeros(rank, hidden), torch.zeros(1280, rank)
    plan(Predictor(fc1_RD, fc2_FR, "f16"))

    with pytest.raises(InputError, match=f"{name}: is q4_0, .* its rows hold {width} weights"):
        plan(Predictor(fc1_RD, fc2_FR, "f16"), Predictor(fc1_RD, fc2_FR, "q4_0"))


def test_the_card_names_the_formats(quantized, model_folder, tmp_path):
    card = (quantized / "README.md").read_text()
    assert "with FFN weights in f16 and predictors in f16/q4_0/q8_0" in card
    # rank (64 + 1280) bits / (3 * 64 * 1280 * 16) + 1 - 0.5
    assert "| 0 | 16 | 0.5000 | 0.5000 | 0.5875 |" in card
    assert "| 1 | 32 | 0.5000 | 0.5000 | 0.5930 |" in card
    assert "| 2 | 32 | 0.5000 | 0.5000 | 0.5492 |" in card
    cfg = ExportConfig(
        model=str(model_folder),
        predictors=quantized / "predictor",
        out=tmp_path / "b",
        dtype="f32",
    )
    export(cfg)
    # (0.0875 + 0.0930 + 0.0492) / 3 * 0.6 + 1 - 0.5
    text = "(gate and up f32, down f16, predictors f16/q4_0/q8_0) the mean traffic is 0.5459."
    assert text in (cfg.out / "README.md").read_text()


@pytest.mark.engine
@pytest.mark.parametrize("dtype", ["q8_0", "q4_0"])
def test_the_engine_computes_a_format_as_we_do(dtype, engine, bundle_in, corpus, monkeypatch):
    """At every position the engine's distribution is that of one of 16 perturbed evaluations, to
    1e-4; with inputs rounded to f16, as for f16 weights, at little more than half of them."""
    file = GGUFFile(bundle_file(bundle_in(dtype, dtype, dtype)))
    tokenizer = tokenizer_of(file)
    spelling = Spelling(tokenizer.texts, tokenizer.excluded)
    text = joined(held_out_documents(str(corpus), tokenizer, 512))
    ids_NS = chunks_of(text, tokenizer, 512)[:, :48]
    places = [(n, s) for n in range(len(ids_NS)) for s in range(ids_NS.shape[1])]
    with serving(
        engine, file.path, len(spelling.texts), spelling.excluded, spelling.unsayable
    ) as server:
        replies = [spelling.translate(server.next(ids_NS[n, : s + 1].tolist())) for n, s in places]

    def share_near() -> float:
        nearest = [1.0] * len(places)
        for seed in range(16):
            logits_NSV = Perturbed(file, seed).logits(ids_NS)
            for k, (n, s) in enumerate(places):
                _, largest = spelling.compare(replies[k], logits_NSV[n, s])
                nearest[k] = min(nearest[k], largest)
        return sum(distance <= 1e-4 for distance in nearest) / len(nearest)

    assert share_near() == 1.0
    monkeypatch.setattr(emulator, "rounded_input", lambda x_TD, dtype: x_TD.half().float())
    assert share_near() < 0.8

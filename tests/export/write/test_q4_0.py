"""Models in q4_0: bytes, values, arithmetic and refusals."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import quantize
from safetensors.torch import load_file, save_file

from sparsecast.core.errors import InputError
from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.export.bundle import bundle_file
from sparsecast.export.config import ExportConfig, VerifyConfig
from sparsecast.export.engine.emulator import Emulator
from sparsecast.export.engine.process import binary, engine_perplexity
from sparsecast.export.engine.protocol import chunks_of, held_out_documents, joined, perplexity
from sparsecast.export.read.reader import GGUFFile
from sparsecast.export.read.vocab import tokenizer_of
from sparsecast.export.run import export
from sparsecast.export.verify import verify
from sparsecast.export.write import convert as stored_module
from sparsecast.export.write.convert import one_thread, slabs
from sparsecast.export.write.hparams import read_hparams
from sparsecast.export.write.tensor_plan import PlannedTensor, plan_tensors
from sparsecast.predictors import formats
from sparsecast.predictors.checkpoint import load_predictors

QUANTIZED = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down_t")


@pytest.fixture(scope="module")
def q4_0(bundle_in) -> Path:
    """Model in q4_0, predictors in f16, q8_0 and q4_0; not to be written to."""
    return Path(bundle_in("f16", "q8_0", "q4_0", dtype="q4_0"))


def raw(file: GGUFFile, name: str) -> np.ndarray:
    """(rows, bytes of a row), read without our reader's tensors."""
    entry = file.entries[name]
    data = np.fromfile(file.path, np.uint8, entry.nbytes, offset=entry.start)
    return data.reshape(entry.shape[0], -1)


def values(file: GGUFFile, name: str) -> np.ndarray:
    """Float64 values of a q4_0 or q8_0 tensor, from its bytes by ggml's definition."""
    rows = raw(file, name)
    size = {"q4_0": 18, "q8_0": 34}[file.entries[name].type.name]
    blocks = rows.reshape(len(rows), -1, size)
    scale = blocks[..., :2].copy().view(np.float16).astype(np.float64)
    codes = blocks[..., 2:]
    if size == 18:
        codes = np.concatenate([codes % 16, codes // 16], -1).astype(np.int64) - 8
    else:
        codes = codes.copy().view(np.int8).astype(np.int64)
    return (scale * codes).reshape(len(rows), -1)


def test_types_and_labels_are_those_of_a_q4_0_file(q4_0):
    file = GGUFFile(bundle_file(q4_0))

    types = {name: entry.type.name for name, entry in file.entries.items()}
    assert {types[f"blk.{i}.{name}.weight"] for i in range(3) for name in QUANTIZED} == {"q4_0"}
    assert types["token_embd.weight"] == "q4_0"
    assert types["output.weight"] == "q8_0"
    assert {types[f"blk.{i}.fc1.weight"] for i in range(3)} == {"f16", "q8_0", "q4_0"}
    assert {types[name] for name, e in file.entries.items() if len(e.shape) == 1} == {"f32"}
    assert file.keys["general.file_type"] == 2
    assert file.keys["general.quantization_version"] == 2


@pytest.mark.parametrize(
    ("name", "source", "kind"),
    [
        ("blk.1.ffn_up.weight", "model.layers.1.mlp.up_proj.weight", "Q4_0"),
        ("blk.2.ffn_down_t.weight", "model.layers.2.mlp.down_proj.weight", "Q4_0"),
        ("token_embd.weight", "model.embed_tokens.weight", "Q4_0"),
        ("output.weight", "lm_head.weight", "Q8_0"),
    ],
)
def test_bytes_are_those_of_the_gguf_package(q4_0, model_folder, name, source, kind):
    weight = load_file(model_folder / "model.safetensors")[source].float()
    weight = weight.T.contiguous() if "down" in source else weight
    file = GGUFFile(bundle_file(q4_0))

    want = quantize(weight.numpy(), GGMLQuantizationType[kind])

    assert np.array_equal(raw(file, name), want)
    assert np.array_equal(file.tensor(name).numpy(), values(file, name).astype(np.float32))
    assert torch.equal(file.rows(name, 5, 3), file.tensor(name)[5:8])


@pytest.mark.parametrize("kind", ["F16", "F32", "Q4_0", "Q8_0"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_slabs_leave_no_seam(monkeypatch, kind, dtype):
    """The rows are columns of the source, like those of ffn_down_t."""
    weight = torch.randn(64, 100).to(dtype).T
    planned = PlannedTensor("w", (100, 64), GGMLQuantizationType[kind], lambda: weight)
    monkeypatch.setattr(stored_module, "SLAB", 7 * 64)

    written = list(slabs(planned))

    assert [len(rows) for rows in written] == [7] * 14 + [2]
    want = quantize(weight.float().contiguous().numpy(), planned.type)
    assert b"".join(rows.data for rows in written) == want.tobytes()

    blocks = planned._replace(load=lambda: iter(weight.split(30)))
    assert b"".join(rows.data for rows in slabs(blocks)) == want.tobytes()


def test_threads_are_given_back():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("kind", "largest"), [("Q4_0", 8 * 65504), ("Q8_0", 127 * 65504)], ids=["q4_0", "q8_0"]
)
def test_a_scale_beyond_f16_is_refused(kind, largest):
    weight = torch.zeros(2, 32)
    planned = PlannedTensor("w", (2, 32), GGMLQuantizationType[kind], lambda: weight)
    weight[1, 3] = -largest
    list(slabs(planned))

    weight[1, 3] = 1.01 * largest
    with pytest.raises(InputError, match=f"w: holds .*, which {kind.lower()} cannot store"):
        list(slabs(planned))
    weight[1, 3] = torch.nan
    with pytest.raises(InputError, match="w: holds nan"):
        list(slabs(planned))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"hidden": 80, "heads": 4}, "hidden size is 80"),
        ({"ffn": 1040}, "FFN width is 1040"),
    ],
)
def test_sizes_that_are_no_whole_blocks_are_refused(model_folder, predictors, change, reason):
    checkpoint = Checkpoint(str(model_folder))
    hparams = replace(read_hparams(checkpoint), **change)
    made = load_predictors(predictors)
    plan_tensors(checkpoint, hparams, made, "f16")

    with pytest.raises(InputError, match=f"--dtype q4_0: .*{reason}, .*; export in f16"):
        plan_tensors(checkpoint, hparams, made, "q4_0")


def test_another_dtype_is_refused():
    with pytest.raises(InputError, match="--dtype: got 'q5_0', expected f16, f32, q4_0"):
        ExportConfig(model="m", predictors=Path("p"), out=Path("o"), dtype="q5_0")


def rounded_input(x: np.ndarray) -> np.ndarray:
    """q8_0 of float32 rows, in float64: integer codes times a scale in f16."""
    blocks = x.astype(np.float32).reshape(len(x), -1, 32)
    largest = abs(blocks).max(-1, keepdims=True)
    codes = np.rint(blocks * (np.float32(127) / largest.clip(1e-30)))
    scale = (largest / np.float32(127)).astype(np.float16)
    return (codes * scale.astype(np.float64)).reshape(x.shape)


def test_inputs_are_rounded_to_the_last_bit():
    """Every formula but the engine's differs at some of these."""
    x_TD = torch.randn(40_000, 128)
    x_TD[0, :32] = 0

    assert np.array_equal(formats.rounded_input(x_TD, "q4_0").numpy(), rounded_input(x_TD.numpy()))


def test_the_ffn_is_the_formula_in_float64(q4_0):
    """With every neuron active and with a mask that is all predictors' own."""
    file = GGUFFile(bundle_file(q4_0))
    emulator = Emulator(file)
    x_TD = torch.randn(20, 64)
    norm_D = file.tensor("blk.2.ffn_norm.weight").double().numpy()
    z_TD = x_TD.double().numpy()
    normed_TD = z_TD / np.sqrt((z_TD**2).mean(-1, keepdims=True) + emulator.header.eps) * norm_D
    mask_TF = (emulator.predictor_logits(x_TD, 2) >= 0).numpy()

    for mask, all_active in ((1.0, True), (mask_TF, False)):
        gate_TF = rounded_input(normed_TD) @ values(file, "blk.2.ffn_gate.weight").T
        up_TF = rounded_input(normed_TD) @ values(file, "blk.2.ffn_up.weight").T
        x1_TF = gate_TF.clip(0) * up_TF * mask
        want_TD = rounded_input(x1_TF) @ values(file, "blk.2.ffn_down_t.weight")

        skip_TF = None if all_active else torch.from_numpy(~mask_TF)
        own_TD = emulator._norm(x_TD, "blk.2.ffn_norm")
        got_TD = emulator._ffn(own_TD, "blk.2", skip_TF).double().numpy()

        # A code that float32 turned over moves a row by a step; most rows have none.
        close_T = abs(got_TD - want_TD).max(-1) <= 1e-5 * abs(want_TD).max()
        assert close_T.mean() >= 0.7
        assert abs(got_TD - want_TD).max() <= 0.01 * abs(want_TD).max()
    assert 0.1 < mask_TF.mean() < 0.9


def test_a_sound_bundle_verifies_and_says_its_traffic(q4_0, corpus, tmp_path):
    result = verify(VerifyConfig(bundle=q4_0, corpus=str(corpus), tokens=256))

    assert result.ok, [c for c in result.checks if not c.ok]
    # predictor shares 0.0875, 0.0930, 0.0492 of an FFN in f16, 16 / 4.5 times that of one in q4_0
    details = {c.name: c.detail for c in result.checks}
    text = (
        "mean 0.5766 with the FFN counted in f16, as in every report; 0.7722 with the types of "
        "this file (FFN q4_0, predictors f16/q4_0/q8_0)"
    )
    assert details["traffic"] == text
    card = (q4_0 / "README.md").read_text()
    assert "in q4_0 (the output matrix in q8_0)" in card
    assert "| 1 | 32 | 0.5000 | 0.5000 | 0.5930 |" in card
    assert "(FFN q4_0, predictors f16/q4_0/q8_0) the mean traffic is 0.7722" in card


def test_weights_beyond_the_scale_leave_no_bundle(model_folder, predictors, tmp_path):
    model = Path(shutil.copytree(model_folder, tmp_path / "model"))
    weights = {k: v.float() for k, v in load_file(model / "model.safetensors").items()}
    weights["model.layers.1.mlp.up_proj.weight"][7, 7] = 6e5
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    anyones = Path(shutil.copytree(predictors, tmp_path / "p"))
    (anyones / "manifest.json").unlink()

    with pytest.raises(
        InputError, match=r"blk\.1\.ffn_up\.weight: holds 600000, which q4_0 cannot"
    ):
        export(ExportConfig(model=str(model), predictors=anyones, out=tmp_path / "b", dtype="q4_0"))
    assert not (tmp_path / "b").exists()


@pytest.mark.engine
def test_quantize_writes_the_same_file(engine, bundle_folder, model_folder, predictors, tmp_path):
    """PowerInfer's own tool, from our f16 bundle; it has q8_0 for output.weight where rows are no
    multiples of 256."""
    theirs = tmp_path / "theirs.gguf"
    command = [binary(engine, "quantize"), bundle_file(bundle_folder), theirs, "Q4_0", "1"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    cfg = ExportConfig(
        model=str(model_folder), predictors=predictors, out=tmp_path / "b", dtype="q4_0"
    )
    ours, other = GGUFFile(export(cfg)), GGUFFile(theirs)

    for key in ("general.file_type", "general.quantization_version"):
        assert ours.keys[key] == other.keys[key]
    for name in ours.entries.keys() - {f"blk.{i}.fc{k}.weight" for i in range(3) for k in (1, 2)}:
        assert ours.entries[name].type == other.entries[name].type, name
        # Its compiler may fuse the product and the sum of x / d + 8.5, another code at a tie.
        assert (raw(ours, name) != raw(other, name)).mean() < 1e-4, name


@pytest.mark.engine
@pytest.mark.parametrize("predictor", ["f16", "q8_0", "q4_0"])
def test_the_engine_computes_what_we_do(predictor, engine, bundle_in, corpus):
    bundle = bundle_in(predictor, predictor, predictor, dtype="q4_0")
    file = GGUFFile(bundle_file(bundle))
    tokenizer = tokenizer_of(file)
    text = joined(held_out_documents(str(corpus), tokenizer, 1024))
    ids_NS = chunks_of(text, tokenizer, 1024)
    emulator = Emulator(file)

    ours = perplexity(lambda ids: emulator.logits(ids, all_active=True), ids_NS)
    theirs = engine_perplexity(engine, file.path, text, len(ids_NS), all_active=True)
    result = verify(VerifyConfig(bundle=bundle, corpus=str(corpus), engine=engine))

    assert theirs == pytest.approx(ours, rel=5e-3)
    assert result.ok, [c for c in result.checks if not c.ok]
    assert result.engine.perplexity == pytest.approx(result.engine.reference, rel=5e-3)
    assert abs(result.engine.perplexity / theirs - 1) > 0.01  # the predictors matter

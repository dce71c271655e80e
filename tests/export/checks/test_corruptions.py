"""Every trap of PowerInfer's format, made on purpose in a good bundle: verify fails with its line.

Nothing but the checks named may fail, and the undamaged bundles pass. Left out: what nothing in a
bundle shows (counts of two layers exchanged where no split was made of them), and traps of running
the engine (threads, batches, environment, repeat penalty).
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from damaged_bundles import (
    ARRAY,
    COUNT,
    ELEMENTS,
    F32,
    F64,
    I32,
    NOTHING,
    SPLIT,
    STRING,
    U8,
    U32,
    U64,
    Bundle,
    Corruption,
    Edited,
    Value,
    all_of,
    attribute,
    beside,
    blocks,
    checked,
    column,
    cut,
    element,
    exchanged,
    extra,
    files_exchanged,
    flipped,
    halves,
    in_split,
    interleaved,
    json_of,
    keys,
    named,
    one,
    quantized,
    renamed_keys,
    reordered,
    set_keys,
    tensor,
    vocabulary,
    weights,
    without,
    zeros_from,
)

from sparsecast.export.bundle import bundle_file
from sparsecast.export.config import ExportConfig
from sparsecast.export.run import export

# A row takes one to three lines here, and five to ten as formatted.
# fmt: off
CORRUPTIONS = [
    # The container: wrong alignment, a converter that failed but returned 0.
    one("magic of a dense file", attribute("magic", b"GGUF"), "metadata", "expected b'PWRI'"),
    one("magic of nothing", attribute("magic", b"ggml"), "container", "begins with b'ggml'"),
    one("version 2", attribute("version", 2), "container", "version 2, expected 3"),
    one("alignment 64", named("general.alignment", Value(U32, 64)), "metadata",
        "alignment is 64, expected 32"),
    one("tensors overlap", attribute("shift", -64), "container", r"token_embd.* overlap"),
    one("unaligned tensors", attribute("shift", 16), "container", "not at a multiple of 32"),
    *(Corruption(f"cut at {share:.1%}", NOTHING, {"container": r"tensor \S+ ends at .*truncated"},
                 after=cut(share)) for share in (0.3, 0.7, 0.999)),
    Corruption("cut in the header", NOTHING, {"container": "ends at byte|more than it can hold"},
        after=cut(0.002)),
    # Which tensors there are, their shapes and types: the engine checks few of them.
    one("a bias", extra("blk.0.attn_q.bias", 64), "tensors", "attn_q.bias is not a tensor of"),
    one("a predictor's bias", extra("blk.1.fc1.bias", 16), "tensors", "fc1.bias is not a tensor"),
    one("rope_freqs", extra("rope_freqs.weight", 8), "tensors", "rope_freqs.weight is not a"),
    one("ffn_down too", extra("blk.2.ffn_down.weight", 64, 1280), "tensors",
        "ffn_down.weight is not"),
    one("no output matrix", without("output.weight"), "tensors", "output.weight is missing"),
    one("no predictor of the last layer", without("blk.2.fc1.weight", "blk.2.fc2.weight"),
        "tensors", r"blk\.2\.fc1\.weight is missing; blk\.2\.fc2\.weight is missing"),
    one("fc2 of fewer neurons", tensor("blk.1.fc2.weight", lambda a: a[:1024]), "tensors",
        r"blk\.1\.fc2\.weight is \(1024, 16\), expected \(1280, 16\)"),
    one("fc2 transposed", tensor("blk.1.fc2.weight", lambda a: a.T), "tensors",
        r"blk\.1\.fc2\.weight is \(16, 1280\), expected .*\(transposed\)"),
    one("fc1 of another width", tensor("blk.0.fc1.weight", lambda a: a[:, :32]), "tensors",
        r"blk\.0\.fc1\.weight is \(16, 32\)"),
    one("ffn_down_t as the model has it", tensor("blk.0.ffn_down_t.weight", lambda a: a.T),
        "tensors", r"ffn_down_t\.weight is \(64, 1280\), expected \(1280, 64\) \(transposed\)"),
    one("ffn_down_t in f32", tensor("blk.0.ffn_down_t.weight", lambda a: a.astype(np.float32),
        "f32"), "tensors", "ffn_down_t.weight is f32, expected f16 or q4_0"),
    one("ffn_down_t in q8_0", quantized("blk.0.ffn_down_t.weight", "q8_0", (1280, 64)), "tensors",
        "ffn_down_t.weight is q8_0, expected f16 or q4_0"),
    one("a gate in q8_0", quantized("blk.0.ffn_gate.weight", "q8_0", (1280, 64)), "tensors",
        "ffn_gate.weight is q8_0, expected f16 or f32 or q4_0"),
    one("a norm in f16", tensor("blk.2.ffn_norm.weight", lambda a: a.astype(np.float16), "f16"),
        "tensors", "ffn_norm.weight is f16, expected f32"),
    one("a quantized predictor whose rank is no whole block",
        all_of(quantized("blk.1.fc1.weight", "q8_0", (48, 64)),
               quantized("blk.1.fc2.weight", "q8_0", (1280, 48))),
        "tensors", "fc2.weight is q8_0 in rows of 48, expected a multiple of 32"),
    one("a wrong label of the types", named("general.file_type", Value(U32, 2)), "tensors",
        "general.file_type is 2, expected 1 for matrices in f16"),
    one("a wrong label of a q4_0 file", named("general.file_type", Value(U32, 1)), "tensors",
        "general.file_type is 1, expected 2 for matrices in q4_0", "q4_0"),
    one("fewer tokens than rows", all_of(*(column(name, lambda values: values.pop()) for name in
        ELEMENTS)), "tensors", r"token_embd\.weight is \(512, 64\), expected \(511, 64\)"),
    one("an FFN of q4_0 that is no whole block",
        all_of(keys(feed_forward_length=Value(U32, 1270)),
               *(quantized(f"blk.{i}.{name}.weight", "q4_0", (1270, 64))
                 for i in range(3) for name in ("ffn_gate", "ffn_up", "ffn_down_t")),
               tensor("blk.0.fc2.weight", lambda a: a[:1270]),
               quantized("blk.1.fc2.weight", "q8_0", (1270, 32)),
               quantized("blk.2.fc2.weight", "q4_0", (1270, 32))),
        "tensors", "ffn_down_t.weight is q4_0, whose input the engine rounds in blocks of 32, but "
        "the FFN has 1270 neurons", "q4_0"),
    # Values: the engine loads rows in a wrong order without an error.
    one("q not permuted", tensor("blk.1.attn_q.weight", halves(4)), "values attn_q",
        r"blk\.1\.attn_q\.weight: permuted wrongly: rows are in the model's order"),
    one("k not permuted", tensor("blk.0.attn_k.weight", halves(2)), "values attn_k",
        r"blk\.0\.attn_k\.weight: permuted wrongly: rows are in the model's order"),
    one("k permuted as if it had the heads of q", tensor("blk.2.attn_k.weight", lambda a:
        interleaved(4)(halves(2)(a))), "values attn_k",
        r"blk\.2\.attn_k\.weight: permuted wrongly: interleaved as if it had 4 heads"),
    one("k not permuted in q4_0", tensor("blk.0.attn_k.weight", halves(2)), "values attn_k",
        r"blk\.0\.attn_k\.weight: permuted wrongly: rows are in the model's order", "q4_0"),
    one("a matrix transposed", tensor("blk.1.attn_output.weight", lambda a: a.T),
        "values attn_output", r"blk\.1\.attn_output\.weight: transposed"),
    one("ffn_down_t not transposed under the right shape", tensor("blk.2.ffn_down_t.weight",
        flipped), "values ffn_down_t", r"blk\.2\.ffn_down_t\.weight: transposed"),
    one("a gate transposed under the right shape", tensor("blk.0.ffn_gate.weight", flipped),
        "values ffn_gate", r"blk\.0\.ffn_gate\.weight: transposed"),
    one("layers exchanged", exchanged("blk.0.ffn_up.weight", "blk.2.ffn_up.weight"),
        "values ffn_up",
        r"blk\.0\.ffn_up\.weight: equals blk\.2\.ffn_up\.weight.*blk\.2\.ffn_up\.weight: equals"),
    Corruption("gate and up exchanged", exchanged("blk.1.ffn_gate.weight", "blk.1.ffn_up.weight"),
               {"values ffn_gate": r"blk\.1\.ffn_gate\.weight: equals blk\.1\.ffn_up",
                "values ffn_up": r"blk\.1\.ffn_up\.weight: equals blk\.1\.ffn_gate"}),
    Corruption("norms exchanged", exchanged("blk.0.attn_norm.weight", "blk.1.ffn_norm.weight"),
               {"values attn_norm": r"blk\.0\.attn_norm\.weight: equals blk\.1\.ffn_norm",
                "values ffn_norm": r"blk\.1\.ffn_norm\.weight: equals blk\.0\.attn_norm"}),
    one("the embedding as output matrix", lambda b: b.file.put("output.weight",
        b.file.tensors["token_embd.weight"].array), "values output",
        "output.weight: equals token_embd.weight"),
    one("rows that were never written", tensor("blk.1.ffn_down_t.weight", zeros_from(700)),
        "values ffn_down_t", r"blk\.1\.ffn_down_t\.weight: truncated: only zeros from value 44800"),
    one("one value a bit off", tensor("output.weight", lambda a: element(0, 0,
        value=np.nextafter(a[0, 0], a.dtype.type(9)))(a)), "values output",
        r"output\.weight: 1 of 32768 values differ"),
    one("one code of q4_0", blocks("blk.1.attn_q.weight", 50, 5, 0x10), "values attn_q",
        r"blk\.1\.attn_q\.weight: 1 of 4096 values differ", "q4_0"),
    one("the last bit of a scale of q4_0", blocks("blk.2.ffn_down_t.weight", 15, 18, 0x01),
        "values ffn_down_t", r"blk\.2\.ffn_down_t\.weight: \d+ of", "q4_0"),
    one("the sign of a scale of q4_0", blocks("token_embd.weight", 3, 19, 0x80),
        "values token_embd", r"token_embd\.weight: \d+ of", "q4_0"),
    one("the last code of a row of q8_0", blocks("output.weight", 15, 67, 0x01), "values output",
        r"output\.weight: 1 of 32768 values differ", "q4_0"),
    one("NaN in a predictor", tensor("blk.1.fc1.weight", element(3, 3, value=np.nan)), "finite",
        r"NaN or infinity in blk\.1\.fc1\.weight"),
    one("infinity in a norm", tensor("output_norm.weight", element(5, value=np.inf)), "finite",
        r"NaN or infinity in output_norm\.weight"),
    one("a scale that is infinite", lambda b: b.file.tensors["blk.0.ffn_up.weight"].array[9,
        :2].put([0, 1], [0, 0x7C]), "finite", r"NaN or infinity in blk\.0\.ffn_up\.weight", "q4_0"),
    # The header: a narrow FFN, rope theta lost, another activation, the threshold's type.
    one("rope theta lost", keys(rope__freq_base=None), "header",
        "freq_base is 10000, .* has 50000"),
    one("rope theta as f64", keys(rope__freq_base=Value(F64, 5e4)), "metadata",
        "freq_base has value type 12, expected 6"),
    one("another rope theta", keys(rope__freq_base=Value(F32, 1e6)), "header",
        r"freq_base is 1e\+06, config.json has 50000"),
    one("rope scaling lost", keys(rope__scaling__type=None, rope__scaling__factor=None), "header",
        "rope.scaling.factor is 1, config.json has 2", "linear"),
    one("rope scaling said to be none", keys(rope__scaling__type=Value(STRING, "none")), "header",
        "rope.scaling.factor is 1, config.json has 2", "linear"),
    one("rope scaling by the key's old name", keys(rope__scale_linear=Value(F32, 2.0)), "header",
        "rope.scaling.factor is 2, config.json has 1"),
    one("rope scaling that the engine aborts on", keys(rope__scaling__type=Value(STRING, "llama3")),
        "metadata", "rope.scaling.type is 'llama3', expected none or linear"),
    one("half a head rotated", keys(rope__dimension_count=Value(U32, 8)), "metadata",
        "rope.dimension_count is not the head size"),
    one("another epsilon", keys(attention__layer_norm_rms_epsilon=Value(F32, 1e-5)), "header",
        "layer_norm_rms_epsilon is 1e-05, config.json has 1e-06"),
    one("no epsilon", keys(attention__layer_norm_rms_epsilon=None), "metadata",
        "layer_norm_rms_epsilon is missing"),
    one("another context", keys(context_length=Value(U32, 4096)), "header",
        "context_length is 4096, config.json has 256"),
    one("as many key heads as query heads", keys(attention__head_count_kv=Value(U32, 4)), "tensors",
        r"attn_k\.weight is \(32, 64\), expected \(64, 64\)"),
    one("key heads lost", keys(attention__head_count_kv=None), "tensors",
        r"attn_k\.weight is \(32"),
    one("key heads per layer", keys(attention__head_count_kv=Value(ARRAY, [2, 2, 2], U32)),
        "metadata", "head_count_kv has value type 9, expected 4"),
    one("heads that do not divide", keys(attention__head_count=Value(U32, 5)), "metadata",
        "5 heads and 2 key/value heads do not fit hidden size 64"),
    Corruption("heads of half the size",
               keys(attention__head_count=Value(U32, 8), attention__head_count_kv=Value(U32, 4),
                    rope__dimension_count=Value(U32, 8)),
               {"header": "head_count is 8, config.json has 4",
                "values attn_q": r"blk\.0\.attn_q\.weight: permuted wrongly",
                "values attn_k": r"blk\.0\.attn_k\.weight: permuted wrongly"}),
    one("a layer less", keys(block_count=Value(U32, 2)), "tensors",
        r"blk\.2\.\S+ is not a tensor of"),
    one("no layers", keys(block_count=Value(U32, 0)), "metadata", "block_count is 0"),
    one("layers without end", keys(block_count=Value(U32, 4_000_000_000)), "metadata",
        "more than there are tensors"),
    one("an FFN below 1001", keys(feed_forward_length=Value(U32, 1000)), "metadata",
        "not wider than 1000: the engine ignores the threshold"),
    one("no hidden size", keys(embedding_length=None), "metadata", "embedding_length is missing"),
    one("an architecture that is a list", named("general.architecture", Value(ARRAY, [1], U32)),
        "metadata", r"general.architecture is \[1\]"),
    one("an unknown architecture", named("general.architecture", Value(STRING, "gemma")),
        "metadata", "general.architecture is 'gemma'"),
    one("the architecture with ReLU on up too", renamed_keys, "header",
        "holds a bamboo, config.json describes a llama"),
    one("the threshold as f64", named("powerinfer.sparse_threshold", Value(F64, 0.0)), "metadata",
        "sparse_threshold has value type 12, expected 6"),
    one("the threshold as a whole number", named("powerinfer.sparse_threshold", Value(I32, 0)),
        "metadata", "sparse_threshold has value type 5, expected 6"),
    one("no threshold", named("powerinfer.sparse_threshold", None), "metadata",
        "sparse_threshold is missing"),
    one("another threshold", named("powerinfer.sparse_threshold", Value(F32, 0.1)),
        "predictor folder", "threshold is 0.1, config.json has 0"),
    # The vocabulary: wrong tokens look like a wrong model.
    one("a token twice", column("tokens", lambda tokens: tokens.__setitem__(300, tokens[301])),
        "vocabulary", "a token is there twice"),
    one("an empty token", column("tokens", lambda tokens: tokens.__setitem__(300, "")),
        "vocabulary", "a token is empty"),
    one("a byte token lost", column("tokens", lambda tokens:
        tokens.__setitem__(tokens.index("<0x7F>"), "<0x7f>")), "vocabulary", "<0x7F> is missing"),
    one("a token that is no text", column("tokens", lambda tokens: tokens.__setitem__(300,
        b"\xff\xfe")), "container", "not UTF-8"),
    one("no types", named(vocabulary("token_type"), None), "vocabulary",
        "token_type or scores is missing or no array"),
    one("a score less", column("scores", lambda scores: scores.pop()), "vocabulary",
        "512 tokens, 511 scores"),
    one("scores as f64", column("scores", len, F64), "metadata",
        "scores holds elements of type 12"),
    one("types as u8", column("token_type", len, U8), "metadata", "token_type holds .* of type 0"),
    one("another type", column("token_type", lambda types: types.__setitem__(400, 7)), "vocabulary",
        "a token type is not 1 to 6"),
    one("scores of another vocabulary", column("scores", lambda scores: scores.reverse()), "pieces",
        "token 0 is .*, tokenizer.model has"),
    one("two tokens exchanged", column("tokens", lambda t: t.__setitem__(slice(300, 302), [t[301],
        t[300]])), "pieces", r"token 300 is .*; token 301 is"),
    one("BOS out of range", named(vocabulary("bos_token_id"), Value(U32, 512)), "vocabulary",
        "bos_token_id is out of range"),
    one("BOS as a signed number", named(vocabulary("bos_token_id"), Value(I32, 1)), "metadata",
        "bos_token_id has value type 5, expected 4"),
    one("another EOS", named(vocabulary("eos_token_id"), Value(U32, 7)), "pieces",
        "eos_token_id is 7, the model has"),
    one("an unknown tokenizer", named(vocabulary("model"), Value(STRING, "bert")), "metadata",
        "tokenizer.ggml.model is 'bert'"),
    # The predictors' folder: a missing file or a bias is not told by the engine's converter.
    one("predictors of two layers exchanged in the file", all_of(exchanged("blk.0.fc1.weight",
        "blk.1.fc1.weight"), exchanged("blk.0.fc2.weight", "blk.1.fc2.weight")), "predictor folder",
        r"blk\.0\.fc2\.weight differs from model_0\.pt.*blk\.1\.fc1\.weight differs"),
    one("predictors of two layers exchanged in the folder", files_exchanged("predictor/model_1.pt",
        "predictor/model_2.pt"), "predictor folder",
        r"blk\.1\.fc1\.weight differs from model_1\.pt"),
    one("one weight of a predictor", weights(2, lambda value: value["fc2.weight"][5].add_(0.5)),
        "predictor folder", r"blk\.2\.fc2\.weight differs from model_2\.pt"),
    one("a predictor's file lost", beside("predictor/model_1.pt", None), "predictor folder",
        "model_1.pt is missing"),
    one("the last predictor's file lost", beside("predictor/model_2.pt", None), "predictor folder",
        "holds predictors for 2 layers, but manifest.json is of 3"),
    one("the last predictor's file lost, without a manifest",
        all_of(beside("predictor/model_2.pt", None), beside("predictor/manifest.json", None)),
        "predictor folder", "2 predictors for 3 layers"),
    one("a bias in a predictor's file", weights(0, lambda value: value.update({"fc1.bias":
        torch.zeros(16)})), "predictor folder", "model_0.pt: holds .*fc1.bias.*no biases"),
    one("NaN in a predictor's file", weights(0, lambda value:
        value["fc1.weight"][0].fill_(torch.nan)), "predictor folder", "model_0.pt: holds NaN"),
    one("another threshold in the folder", json_of("config.json", sparse_threshold=0.5),
        "predictor folder", "threshold is 0, config.json has 0.5"),
    one("no scores in the manifest", json_of("manifest.json", calibration=[None] * 3),
        "predictor folder", "manifest.json: damaged, its calibration makes no sense"),
    one("another format in the manifest", json_of("manifest.json", dtypes=["f16", "f16", "q4_0"]),
        "predictor folder", r"blk\.1\.fc1\.weight is q8_0, manifest\.json has f16", "q4_0"),
    # Counts and the split of a GPU build: f16 overflows, files sort as text, old type ids.
    *(one(f"counts: {what}", beside("activation/activation_1.pt", content), "hot and cold", detail)
      for what, content, detail in (
          ("f16", COUNT.half(), "activation_1.pt: is not a float32 or float64 tensor"),
          ("i64", COUNT.long(), "activation_1.pt: is not a float32 or float64 tensor"),
          ("overflow", torch.inf * COUNT, "activation_1.pt: holds values that are not counts"),
          ("negative", -COUNT, "activation_1.pt: holds values that are not counts"),
          ("of another width", COUNT[:-1], r"activation_1.pt: has shape \(1279,\)"),
          ("junk", b"junk", "activation_1.pt: (not a readable|holds more)"),
          ("missing", None, "activation_1.pt missing or not expected"))),
    one("counts of a layer that is not there", beside("activation/activation_3.pt", COUNT),
        "hot and cold", "activation_3.pt missing or not expected"),
    one("counts of two layers exchanged", files_exchanged("activation/activation_0.pt",
        "activation/activation_2.pt"), "gpu split", "layer 0: not its [0-9,]+ hottest neurons",
        "split"),
    one("a split's i32 by its new number", in_split(lambda s: [s.put(n, t.array, 26) for n, t in
        s.tensors.items()]), "gpu split",
        r"tensor blk\.0\.gpu_idx has type id 26, expected .*18 \(i32\)", "split"),
    one("a split's layers in the order of text", in_split(reordered), "gpu split",
        r"blk\.2\.gpu_idx is at the place of blk\.1\.gpu_idx", "split"),
    one("a split's index of other numbers",
        in_split(lambda s: [t.array.__imul__(2) for n, t in s.tensors.items() if "_idx" in n]),
        "gpu split", r"blk\.0\.gpu_idx holds values that are not 0 or 1", "split"),
    Corruption("junk for the counts of a split", beside("activation/activation_1.pt", b"junk"),
               {"hot and cold": "activation_1.pt: (not a readable|holds more)",
                "gpu split": "activation_1.pt: (not a readable|holds more)"}, "split"),
    one("a split over its budget", in_split(lambda s: set_keys(s, {"split.vram_capacity": Value(U64,
        1000)})), "gpu split", "its neurons take [0-9,]+ bytes, but split.vram_capacity is 1,000",
        "split"),
    one("a split's budget as u32", in_split(lambda s: set_keys(s, {"split.vram_capacity": Value(U32,
        2**31)})), "gpu split", "split.vram_capacity has value type 4", "split"),
    one("a split of dense magic", in_split(lambda s: setattr(s, "magic", b"GGUF")), "gpu split",
        "magic is b'GGUF'", "split"),
    one("a split of another model's layers", in_split(lambda s: set_keys(s,
        {"generic.gpu_index.block_count": Value(U32, 2)})), "gpu split",
        "block_count is 2, expected 3", "split"),
    one("a split under another name", lambda b: shutil.copy(b.split.path, b.folder / f"old{SPLIT}"),
        "gpu split", f"old{SPLIT}: PowerInfer reads", "split"),
]
# fmt: on


@pytest.fixture(scope="module")
def sound(
    bundle_folder, bundle_in, model_folder, predictors, acts, tmp_path_factory
) -> dict[str, Path]:
    """Bundles by name; not to be written to."""
    root = tmp_path_factory.mktemp("sound")
    linear = Path(shutil.copytree(model_folder, root / "linear"))
    config = json.loads((linear / "config.json").read_text())
    config["rope_parameters"] |= {"rope_type": "linear", "factor": 2.0}
    (linear / "config.json").write_text(json.dumps(config))
    common: dict[str, Any] = {"predictors": predictors, "activations": acts.folder}
    whole = str(model_folder)
    export(ExportConfig(model=whole, out=root / "split", vram_budget=0.00073, **common))
    export(ExportConfig(model=str(linear), out=root / "scaled", **common))
    return {
        "f16": bundle_folder,
        "q4_0": bundle_in("f16", "q8_0", "q4_0", dtype="q4_0"),
        "split": root / "split",
        "linear": root / "scaled",
    }


@pytest.fixture
def model_of(sound, model_folder):
    return lambda name: sound["linear"].parent / "linear" if name == "linear" else model_folder


@pytest.mark.parametrize("name", ["f16", "q4_0", "split", "linear"])
def test_the_bundles_are_sound_before_and_after_being_taken_apart(
    name, sound, model_of, corpus, tmp_path
):
    assert checked(sound[name], model_of(name), corpus) == {}

    bundle = Path(shutil.copytree(sound[name], tmp_path / "b"))
    for path in (bundle_file(bundle), *bundle.glob(f"*{SPLIT}")):
        before = path.read_bytes()
        Edited(path).save()
        assert path.read_bytes() == before


def test_every_corruption_has_a_name_of_its_own():
    names = [corruption.what for corruption in CORRUPTIONS]
    assert len(set(names)) == len(names) >= 25


@pytest.mark.parametrize("corruption", CORRUPTIONS, ids=lambda c: c.what)
def test_verify_fails_with_the_right_line(corruption, sound, model_of, corpus, tmp_path, sealed):
    bundle = Path(shutil.copytree(sound[corruption.bundle], tmp_path / "b"))
    path = bundle_file(bundle)
    split_path = path.with_name(path.name + SPLIT)
    split = Edited(split_path) if split_path.exists() else None
    damaged = Bundle(bundle, Edited(path), split)

    corruption.damage(damaged)
    if (bundle / "predictor" / "manifest.json").exists():
        sealed(bundle / "predictor")  # test_checkpoint.py has what checksums tell
    damaged.file.save()
    if split is not None:
        split.save()
    if corruption.after is not None:
        corruption.after(path)

    failed = checked(bundle, model_of(corruption.bundle), corpus)
    assert failed.keys() == corruption.lines.keys(), failed
    for check, detail in corruption.lines.items():
        assert re.search(detail, failed[check]), failed[check]

"""PowerInfer's own binaries on our bundles; and how their failures are told."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sparsecast.export.config import ExportConfig, VerifyConfig
from sparsecast.export.emulate import Emulator
from sparsecast.export.engine import EngineError, Next, engine_perplexity, serving
from sparsecast.export.engine_checks import (
    _tokens_check,
    check_engine_perplexity,
    compare,
    texts_of,
)
from sparsecast.export.protocol import chunks_of, held_out_text, tokenizer_of
from sparsecast.export.reader import GGUFFile
from sparsecast.export.run import export
from sparsecast.export.verify import bundle_file, verify


def details(result) -> dict[str, str]:
    return {c.name: c.detail for c in result.checks}


@pytest.mark.engine
@pytest.mark.parametrize("dtype", ["f16", "f32"])
def test_the_engine_computes_what_we_do(dtype, engine, model_folder, predictors, corpus, tmp_path):
    cfg = ExportConfig(
        model=str(model_folder), predictors=predictors, out=tmp_path / "b", dtype=dtype
    )
    export(cfg)

    result = verify(VerifyConfig(bundle=cfg.out, corpus=str(corpus), engine=engine))

    assert result.ok, details(result)
    assert result.engine.perplexity == pytest.approx(result.engine.reference, rel=5e-3)


@pytest.mark.engine
def test_the_engine_computes_quantised_predictors_as_we_do(engine, quantised, corpus):
    result = verify(VerifyConfig(bundle=quantised, corpus=str(corpus), engine=engine))

    assert result.ok, details(result)
    assert result.engine.perplexity == pytest.approx(result.engine.reference, rel=2e-3)


@pytest.mark.engine
def test_a_wrong_rope_base_in_our_evaluation_is_seen(engine, made, corpus):
    file = GGUFFile(bundle_file(made))
    tokenizer = tokenizer_of(file)
    text = held_out_text(str(corpus), tokenizer, 1024)
    ids_NS = chunks_of(text, tokenizer, 1, 1024)
    file.keys["llama.rope.freq_base"] = 10_000.0

    check, _ = check_engine_perplexity(engine, file, Emulator(file), text, ids_NS)

    assert not check.ok


@pytest.mark.engine
def test_a_stray_threshold_in_the_environment_changes_nothing(engine, made, monkeypatch):
    path, text = bundle_file(made), "def f(x):\n    return x\n" * 200
    plain = engine_perplexity(engine, path, text, 2)

    monkeypatch.setenv("LLAMA_SPARSE_PRED_THRESHOLD", "1e30")

    assert engine_perplexity(engine, path, text, 2) == plain


@pytest.mark.engine
def test_a_file_the_engine_cannot_load_is_told_in_one_line(engine, made, tmp_path):
    path = tmp_path / "broken.gguf"
    path.write_bytes(bundle_file(made).read_bytes()[:5000])

    with pytest.raises(EngineError, match="perplexity gave no estimate"):
        engine_perplexity(engine, path, "x", 2)
    with pytest.raises(EngineError, match="server did not start"), serving(engine, path, 512, []):
        pass


@pytest.mark.engine
def test_too_little_text_is_no_success(engine, made):
    """The binary prints a message and exits with 0."""
    with pytest.raises(EngineError, match="gave no estimate"):
        engine_perplexity(engine, bundle_file(made), "short", 2)


@pytest.mark.engine
def test_nan_from_the_engine_fails(engine, bundle, corpus):
    path = bundle_file(bundle)
    entry = GGUFFile(path).entries["output.weight"]
    np.memmap(path, np.float16, "r+", entry.start, entry.shape)[7] = np.nan
    file = GGUFFile(path)
    tokenizer = tokenizer_of(file)
    text = held_out_text(str(corpus), tokenizer, 512)

    check, numbers = check_engine_perplexity(
        engine, file, Emulator(file), text, chunks_of(text, tokenizer, 1, 512)
    )

    assert not check.ok
    assert numbers.perplexity is None


TEXTS = ["<unk>", "", "a", "b", "a", "byte: \\x80"]


def reply(logits_V: torch.Tensor, token: str) -> Next:
    probs_V = logits_V.double().softmax(-1)
    order = probs_V.argsort(descending=True).tolist()
    return Next(token, [(TEXTS[i], probs_V[i].item()) for i in order], False)


def test_equal_distributions_differ_by_nothing():
    logits_V = torch.tensor([-5.0, -4.0, 1.0, 2.0, 0.5, -1.0])

    assert compare(reply(logits_V, "b"), logits_V, TEXTS, [5]) == (0.0, 0.0)


def test_another_distribution_is_seen_even_with_the_same_sorted_values():
    logits_V = torch.tensor([-5.0, -4.0, 1.0, 2.0, 0.5, -1.0])
    other_V = logits_V[[0, 1, 3, 2, 4, 5]]

    gap, largest = compare(reply(other_V, "a"), logits_V, TEXTS, [5])

    assert gap == pytest.approx(1.0)
    assert largest > 0.3


def test_a_token_we_do_not_know_is_infinitely_far():
    logits_V = torch.zeros(6)

    assert compare(Next("zebra", [("zebra", 0.5)], False), logits_V, TEXTS, []) == (
        float("inf"),
        1.0,
    )


def test_texts_are_what_the_server_prints(made):
    file = GGUFFile(bundle_file(made))
    texts = texts_of(file)
    tokens = file.keys["tokenizer.ggml.tokens"]

    assert texts[:3] == ["\u2585", "", ""]
    assert texts[tokens.index("<0x0A>")] == "\n"
    assert texts[tokens.index("<0xE9>")] == "byte: \\xe9"
    assert texts[tokens.index("\u2581the")] == " the"


@pytest.mark.parametrize(
    ("gaps", "ok"),
    [
        ([(0.0, 0.5)] * 200, True),
        ([(0.0, 0.5)] * 199 + [(0.009, 0.0)], True),
        ([(0.0, 0.5)] * 199 + [(0.02, 0.5)], True),  # a tie that sums decide for us too
        ([(0.0, 0.5)] * 199 + [(0.02, 0.01)], False),
        ([(0.0, 0.5)] * 197 + [(0.02, 0.5)] * 3, False),  # too many of them
    ],
)
def test_tokens_may_differ_where_our_own_sums_decide_and_seldom(gaps, ok):
    assert _tokens_check(gaps).ok == ok

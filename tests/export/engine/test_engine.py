"""PowerInfer's own binaries on our bundles; and how their failures are told."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from sparsecast.export.bundle import bundle_file
from sparsecast.export.checks.engine import (
    Position,
    position,
    probability_check,
    tokens_check,
)
from sparsecast.export.checks.engine_gpu import GPU_MOVED_SHARE
from sparsecast.export.checks.engine_text import check_engine_perplexity
from sparsecast.export.config import ExportConfig, VerifyConfig
from sparsecast.export.engine.emulator import Emulator
from sparsecast.export.engine.process import EngineError, Next, Server, engine_perplexity, serving
from sparsecast.export.engine.protocol import chunks_of, held_out_documents, joined
from sparsecast.export.engine.replies import Spelling
from sparsecast.export.read.reader import GGUFFile
from sparsecast.export.read.vocab import tokenizer_of
from sparsecast.export.run import export
from sparsecast.export.verify import verify


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
def test_the_engine_computes_quantized_predictors_as_we_do(engine, quantized, corpus):
    result = verify(VerifyConfig(bundle=quantized, corpus=str(corpus), engine=engine))

    assert result.ok, details(result)
    assert result.engine.perplexity == pytest.approx(result.engine.reference, rel=2e-3)


@pytest.mark.engine
def test_a_wrong_rope_base_in_our_evaluation_is_seen(engine, bundle_folder, corpus):
    file = GGUFFile(bundle_file(bundle_folder))
    tokenizer = tokenizer_of(file)
    text = joined(held_out_documents(str(corpus), tokenizer, 1024))
    ids_NS = chunks_of(text, tokenizer, 1024)
    file.keys["llama.rope.freq_base"] = 10_000.0

    check, _ = check_engine_perplexity(engine, file, Emulator(file), text, ids_NS)

    assert not check.ok


@pytest.mark.engine
def test_a_stray_threshold_in_the_environment_changes_nothing(engine, bundle_folder, monkeypatch):
    path, text = bundle_file(bundle_folder), "def f(x):\n    return x\n" * 200
    plain = engine_perplexity(engine, path, text, 2)

    monkeypatch.setenv("LLAMA_SPARSE_PRED_THRESHOLD", "1e30")

    assert engine_perplexity(engine, path, text, 2) == plain


@pytest.mark.engine
def test_a_file_the_engine_cannot_load_is_told_in_one_line(engine, bundle_folder, tmp_path):
    path = tmp_path / "broken.gguf"
    path.write_bytes(bundle_file(bundle_folder).read_bytes()[:5000])

    with pytest.raises(EngineError, match="perplexity gave no estimate"):
        engine_perplexity(engine, path, "x", 2)
    with (
        pytest.raises(EngineError, match="server did not start"),
        serving(engine, path, 512),
    ):
        pass


@pytest.mark.engine
def test_too_little_text_is_no_success(engine, bundle_folder):
    """The binary prints a message and exits with 0."""
    with pytest.raises(EngineError, match="gave no estimate"):
        engine_perplexity(engine, bundle_file(bundle_folder), "short", 2)


@pytest.mark.engine
def test_nan_from_the_engine_fails(engine, bundle, corpus):
    path = bundle_file(bundle)
    entry = GGUFFile(path).entries["output.weight"]
    np.memmap(path, np.float16, "r+", entry.start, entry.shape)[7] = np.nan
    file = GGUFFile(path)
    tokenizer = tokenizer_of(file)
    text = joined(held_out_documents(str(corpus), tokenizer, 512))

    check, numbers = check_engine_perplexity(
        engine, file, Emulator(file), text, chunks_of(text, tokenizer, 512)
    )

    assert not check.ok
    assert numbers.perplexity is None


SPELLING = Spelling(["<unk>", "", "a", "b", "a", "byte: \\x80"], excluded=[1])
LOGITS_V = torch.tensor([-5.0, 9.0, 1.0, 2.0, 0.5, -1.0])


def reply(logits_V: torch.Tensor, token: str) -> Next:
    probs_V = logits_V.double().index_fill(0, torch.tensor(1), float("-inf")).softmax(-1)
    order = probs_V.argsort(descending=True).tolist()
    return Next(token, [(SPELLING.texts[i], probs_V[i].item()) for i in order], False)


def test_equal_distributions_differ_by_nothing():
    gap, largest = SPELLING.compare(SPELLING.translate(reply(LOGITS_V, "b")), LOGITS_V)

    assert gap == 0
    assert largest < 1e-7


def test_tokens_of_one_text_are_told_apart_by_their_order():
    swapped_V = LOGITS_V[[0, 1, 4, 3, 2, 5]]  # the two that read "a"

    for theirs_V, ours_V in ((swapped_V, LOGITS_V), (LOGITS_V, swapped_V)):
        assert SPELLING.compare(SPELLING.translate(reply(theirs_V, "b")), ours_V)[1] < 1e-7


def test_another_distribution_is_seen_even_with_the_same_sorted_values():
    other_V = LOGITS_V[[0, 1, 3, 2, 4, 5]]

    gap, largest = SPELLING.compare(SPELLING.translate(reply(other_V, "a")), LOGITS_V)

    assert gap == pytest.approx(1.0)
    assert largest > 0.3


def test_a_token_we_do_not_know_is_infinitely_far():
    strange = SPELLING.translate(Next("zebra", [("zebra", 0.5)], False))

    assert SPELLING.compare(strange, torch.zeros(6)) == (float("inf"), 1.0)


def test_texts_are_what_the_server_prints(bundle_folder):
    file = GGUFFile(bundle_file(bundle_folder))
    texts = tokenizer_of(file).texts
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
    assert tokens_check([Position(gap, moved, [0.0], [0.0]) for gap, moved in gaps]).ok == ok


@pytest.mark.parametrize(("far", "ok"), [(10, True), (11, False)])
def test_a_gpu_may_differ_in_more_tokens_that_our_own_sums_decide(far, ok):
    positions = [Position(0.02, 0.5, [0.0], [0.0])] * far
    positions += [Position(0.0, 0.5, [0.0], [0.0])] * (200 - far)

    assert tokens_check(positions, GPU_MOVED_SHARE).ok == ok
    assert not tokens_check([*positions[1:], Position(0.6, 0.5, [0.0], [0.0])], 1.0).ok


@pytest.mark.parametrize(
    ("share", "times", "ok"),
    [
        (1.0, 1.0, True),
        (1.0, 4.0, False),  # systematically further: the median sees it
        (0.3, 8.0, False),  # at some positions: the nearest of ours does
        (0.05, 50.0, True),  # the engine alone took a turn late in a prompt
    ],
)
def test_the_engine_is_one_more_of_our_evaluations(share, times, ok):
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(400, 5, generator=generator) * 1e-2
    positions = []
    for k, (engine, *ours) in enumerate(points.tolist()):
        factor = times if k < share * len(points) else 1.0
        theirs = [factor * abs(engine - a) + (factor - 1) * 2e-3 for a in ours]
        apart = [abs(a - b) for i, a in enumerate(ours) for j, b in enumerate(ours) if i != j]
        positions.append(Position(0.0, 0.0, theirs, apart))

    assert probability_check(positions).ok == ok


@pytest.mark.parametrize(("distance", "ok"), [(5e-5, True), (5e-4, False)])
def test_where_ours_hardly_differ_the_engine_may_hardly_differ(distance, ok):
    positions = [Position(0.0, 0.0, [distance] * 3, [1e-6] * 6)] * 10

    assert probability_check(positions).ok == ok


def test_a_position_takes_the_evaluation_nearest_to_the_engine():
    other_V = LOGITS_V[[0, 1, 3, 2, 4, 5]]

    found = position(
        SPELLING, [SPELLING.translate(reply(other_V, "a"))], torch.stack([LOGITS_V, other_V])
    )

    assert found.gap == 0
    assert found.moved == pytest.approx(1.0)
    assert found.theirs[0] == pytest.approx(found.ours[0])
    assert found.theirs[1] < 1e-7


BREAKS = "\x0b\x0c\r\x1c\x1d\x1e\x85\u2028\u2029"
"""What Python takes for line ends; the server escapes those below 32 and no others."""


@pytest.mark.parametrize("text", [*BREAKS, f"a{BREAKS}b"])
def test_a_reply_ends_at_a_line_feed_alone(text, monkeypatch):
    probs = [{"tok_str": text, "prob": 0.5}, {"tok_str": "b", "prob": 0.25}]
    event = {"content": text, "completion_probabilities": [{"content": text, "probs": probs}]}
    raw = f'data: {json.dumps(event, ensure_ascii=False)}\n\ndata: {{"stop": true}}\n\n'
    server = Server(0, 10, [], [])
    monkeypatch.setattr(server, "_post", lambda path, body: raw)

    assert server.next([1]) == Next(text, [(text, 0.5), ("b", 0.25)], False)

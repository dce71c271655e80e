"""A tokenizer.json whose merges take turns: equal scores express it, or it is refused."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2 as proto
from tokenizers import Tokenizer
from transformers import LlamaConfig

from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.export.write.vocab import Vocabulary
from sparsecast.export.write.vocab_reader import read_vocabulary

ROOT = Path(__file__).parents[3]
SHARED = Path(os.environ.get("SPARSECAST_SHARED", ROOT / "../shared"))
LLAMA2 = SHARED / "cases" / "data" / "llama2.tokenizer.model"
SPACE = "\u2581"
PREPENDED = [
    {"type": "Prepend", "prepend": SPACE},
    {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
]
METASPACE = {
    "type": "Metaspace",
    "replacement": SPACE,
    "prepend_scheme": "first",
    "split": False,
}
CONFIG = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def converted(model, order) -> dict:
    """The tokenizer.json of a sentencepiece model, its merges sorted by score and `order`."""
    ids = {piece.piece: i for i, piece in enumerate(model.pieces)}
    score = {piece.piece: piece.score for piece in model.pieces}
    merges = [
        (text[:at], text[at:])
        for text in ids
        for at in range(1, len(text))
        if text[:at] in ids and text[at:] in ids
    ]
    merges.sort(key=lambda pair: (score["".join(pair)], *order(*pair)), reverse=True)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    special = [{"id": ids[text], "content": text, "special": True} for text in CONFIG.values()]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": sorted((flags | token for token in special), key=lambda t: t["id"]),
        "normalizer": {"type": "Sequence", "normalizers": PREPENDED},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": ids,
            "merges": merges,
        },
    }


ORDERS = {
    "longest left": lambda left, right: (len(left), len(right)),
    "as they stand": lambda left, right: (),
}


def folder_with(folder: Path, spec: dict) -> Path:
    folder.mkdir(exist_ok=True)
    LlamaConfig(vocab_size=len(spec["model"]["vocab"])).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    (folder / "tokenizer_config.json").write_text(json.dumps(CONFIG))
    return folder


def read(folder: Path) -> Vocabulary:
    checkpoint = Checkpoint(str(folder))
    return read_vocabulary(checkpoint, checkpoint.config.vocab_size)


def by_scores(vocabulary: Vocabulary) -> sentencepiece.SentencePieceProcessor:
    """Sentencepiece on what the engine gets."""
    model = proto.ModelProto()
    for text, score, kind in zip(
        vocabulary.tokens, vocabulary.scores, vocabulary.types, strict=True
    ):
        model.pieces.add(piece=text, score=score, type=kind)
    model.trainer_spec.model_type, model.trainer_spec.byte_fallback = 2, True
    model.normalizer_spec.remove_extra_whitespaces = False
    return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())


@pytest.fixture(scope="module")
def tied(model_folder):
    """A sentencepiece model whose runs of spaces share the worst score, as Llama 2's."""
    model = proto.ModelProto.FromString((model_folder / "tokenizer.model").read_bytes())
    for piece in model.pieces:
        if set(piece.piece) == {SPACE}:
            piece.score = -1e9
    return model


@pytest.fixture(scope="module", params=[*ORDERS, "llama2"])
def read_one(request, tied, tmp_path_factory):
    """(tokenizer.json's own tokenizer, sentencepiece with the scores read from it, and with those
    that it was made of where its order is sentencepiece's)."""
    if (real := request.param == "llama2") and not LLAMA2.is_file():
        pytest.skip("Llama 2's tokenizer.model is not here")
    model = proto.ModelProto.FromString(LLAMA2.read_bytes()) if real else tied
    order = ORDERS["longest left" if real else request.param]
    folder = folder_with(tmp_path_factory.mktemp("m"), converted(model, order))
    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    own.encode_special_tokens = True
    ours = by_scores(read(folder))
    if request.param == "as they stand":
        return own, ours, ours
    first = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
    return own, ours, first


def test_scores_give_the_tokens_of_the_merges(read_one, corpus):
    own, ours, first = read_one
    texts = ["x" + " " * n + "return" + "\n" * n for n in range(70)]
    texts += [path.read_text() for path in sorted(corpus.iterdir())[:10]]

    for text in texts:
        want = own.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == want == first.encode(text)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text() | st.text(alphabet=f" {SPACE}retun\n"))
def test_scores_give_the_tokens_of_any_text(read_one, text):
    own, ours, first = read_one

    want = own.encode(text, add_special_tokens=False).ids
    assert ours.encode(text) == want == first.encode(text)


def test_pieces_that_take_turns_share_a_score_and_no_others_do(tied, tmp_path):
    vocabulary = read(folder_with(tmp_path / "m", converted(tied, ORDERS["longest left"])))

    normal = [
        (token, score)
        for token, score, kind in zip(
            vocabulary.tokens, vocabulary.scores, vocabulary.types, strict=True
        )
        if kind == 1
    ]
    runs = [score for token, score in normal if set(token) == {SPACE}]
    others = [score for token, score in normal if set(token) != {SPACE}]
    assert len({*runs}) < len(runs)
    assert len({*others}) == len(others)
    assert not {*runs} & {*others}


def test_an_order_that_no_scores_give_is_told_with_a_text(tied, tmp_path):
    """Runs merge the shortest left part first, so the right end grows."""

    def shortest(left, right):
        return -len(left), -len(right)

    (told,) = read(folder_with(tmp_path / "m", converted(tied, shortest))).differences

    assert re.search(f"has merges that split '{SPACE}+' as no scores can", told)


@pytest.mark.parametrize("nested", [[], [{"type": "Sequence", "normalizers": []}]])
@pytest.mark.parametrize("form", ["prepended", "metaspace"])
def test_a_sequence_of_none_is_none(nested, form, tied, tmp_path):
    spec = converted(tied, ORDERS["longest left"])
    want = read(folder_with(tmp_path / "want", spec))
    empty = {"type": "Sequence", "normalizers": nested}
    if form == "prepended":
        spec["normalizer"]["normalizers"] = [*nested, *PREPENDED]
        spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": []}
    else:
        spec["normalizer"] = empty
        spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [METASPACE]}

    ours = read(folder_with(tmp_path / "m", spec))

    assert ours._replace(notes=[]) == want
    assert bool(ours.notes) == (form == "metaspace")

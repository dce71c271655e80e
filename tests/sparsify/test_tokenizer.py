"""Nothing of the machine that trained a tokenizer is in it."""

from __future__ import annotations

from sentencepiece import SentencePieceProcessor
from sentencepiece import sentencepiece_model_pb2 as proto
from transformers import AutoTokenizer

from sparsecast.core.models.location import TINY_PROSPARSE
from sparsecast.sparsify.train_tokenizer import train_tokenizer


def _spec(folder):
    model = proto.ModelProto()
    model.ParseFromString((folder / "tokenizer.model").read_bytes())
    return model.trainer_spec


def test_a_trained_tokenizer_names_no_path(tmp_path, corpus):
    texts = [path.read_text()[:5_000] for path in sorted(corpus.iterdir())[:8]]

    tokenizer = train_tokenizer(texts, 400, tmp_path)

    assert _spec(tmp_path).model_prefix == ""
    for path in tmp_path.iterdir():
        assert str(tmp_path).encode() not in path.read_bytes()
    pieces = SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    text = "def f(x):\n\treturn  x"
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == pieces.encode(text)
    plain = AutoTokenizer.from_pretrained(tmp_path)
    assert plain(text)["input_ids"] == [pieces.bos_id(), *pieces.encode(text)]
    assert plain("a", "b")["input_ids"].count(pieces.bos_id()) == 2


def test_the_shipped_one_names_none_either():
    spec = _spec(TINY_PROSPARSE)
    assert (spec.model_prefix, list(spec.input)) == ("", [])
    for path in TINY_PROSPARSE.iterdir():
        if path.suffix != ".safetensors":
            assert b"/tmp/" not in path.read_bytes(), path

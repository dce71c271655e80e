"""Tokens are those that the model was trained on: sentencepiece's own, or tokenizer.json's."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2 as proto
from tokenizer_folders import CONFIG, by_digits, folder_of, loaded, small
from tokenizers import normalizers
from transformers import LlamaTokenizer

from sparsecast.core.text.tokens import encode

ROOT = Path(__file__).parents[3]


SHARED = Path(os.environ.get("SPARSECAST_SHARED", ROOT / "../shared"))


LLAMA2 = SHARED / "cases" / "data" / "llama2.tokenizer.model"


TEXTS = [
    "def f(x):\n    return x\n",
    *("x" + " " * n + "y" for n in range(40)),
    *("\n" + " " * n for n in range(40)),
    "\t\tif a  ==  b:\r\n\t\t\t  pass",
    "caf\u00e9 na\u00efve \u4f60\u597d\uff0c\u4e16\u754c \u0645\u0631\u062d\u0628\u0627",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \ue000\uffff\x00\x7f\u2028\u2029\x85",
    " leading, trailing ",
    "    four in front",
    "<s> </s> <unk> <0x0A> \u2581 \u2581\u2581",
    "1234567890 3.14159 1e-5",
    "",
]


AT_ONCE = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


STRANGE = st.text() | st.text(alphabet=" \u2581\n\taeinrt<0x>") | st.text(alphabet=" re")


def tied(source: Path, path: Path) -> Path:
    """Runs of spaces get one score, the worst, as Llama 2 has it."""
    model = proto.ModelProto.FromString(source.read_bytes())
    runs = [piece for piece in model.pieces if set(piece.piece) == {"\u2581"}]
    assert len(runs) > 3
    for piece in runs:
        piece.score = -1e9
    path.write_bytes(model.SerializeToString())
    return path


def ids(tokenizer, text: str) -> list[int]:
    return encode(tokenizer, text, 10**9)[1:]


@pytest.fixture(scope="module", params=["tied", "llama2"])
def scored(request, tmp_path_factory, model_folder):
    """(folder with tokenizer.model alone, its tokenizer, sentencepiece's)."""
    place = tmp_path_factory.mktemp("scored")
    if request.param == "llama2" and not LLAMA2.is_file():
        pytest.skip("Llama 2's tokenizer.model is not here")
    source = LLAMA2
    if request.param == "tied":
        source = tied(model_folder / "tokenizer.model", place / "tied.model")
    folder = folder_of(place / "m", model_folder, source)
    own = sentencepiece.SentencePieceProcessor(model_file=str(source))
    return folder, loaded(folder), own


def test_transformers_alone_cuts_equal_scores_otherwise(scored):
    """Or nothing here would be tested."""
    folder, _, own = scored
    theirs = LlamaTokenizer.from_pretrained(folder)
    texts = ["x\n" + " " * n + "return" for n in range(9)]

    assert [ids(theirs, text) for text in texts] != [own.encode(text) for text in texts]


def test_tokenizer_model_alone_gives_sentencepieces_tokens(scored, corpus):
    _, tokenizer, own = scored

    for text in [*TEXTS, *(path.read_text() for path in sorted(corpus.iterdir())[:20])]:
        assert ids(tokenizer, text) == own.encode(text), text[:80]


@AT_ONCE
@given(text=STRANGE)
def test_any_text_becomes_sentencepieces_tokens(scored, text):
    _, tokenizer, own = scored

    assert ids(tokenizer, text) == own.encode(text)


@pytest.fixture(scope="module")
def small_scored(tmp_path_factory, model_folder):
    """As `scored`, of the small one alone."""
    place = tmp_path_factory.mktemp("small")
    source = tied(model_folder / "tokenizer.model", place / "tied.model")
    folder = folder_of(place / "m", model_folder, source)
    own = sentencepiece.SentencePieceProcessor(model_file=str(source))
    return folder, loaded(folder), own


@pytest.mark.parametrize("config", [None, {}, {"tokenizer_class": "LlamaTokenizerFast"}])
def test_no_class_need_be_named(small_scored, model_folder, tmp_path, config):
    source, _, own = small_scored
    folder = folder_of(tmp_path / "m", model_folder, source / "tokenizer.model", config)

    tokenizer = loaded(folder)

    assert tokenizer.bos_token_id == 1
    assert [ids(tokenizer, text) for text in TEXTS] == [own.encode(text) for text in TEXTS]


def test_what_transformers_saved_beside_it_gets_its_scores(small_scored, model_folder, tmp_path):
    """The tokenizer.json that transformers 5 makes has merges in the order of ids."""
    source, _, own = small_scored
    folder = folder_of(tmp_path / "m", model_folder, source / "tokenizer.model")
    LlamaTokenizer.from_pretrained(source).save_pretrained(folder)
    assert (folder / "tokenizer.json").is_file()

    tokenizer = loaded(folder)

    for text in (text for text in TEXTS if not text.startswith(" ")):
        assert ids(tokenizer, text) == own.encode(text), text


def test_merges_that_agree_with_the_scores_stay(small_scored, model_folder, tmp_path):
    source, tokenizer, _ = small_scored
    folder = folder_of(tmp_path / "m", model_folder, source / "tokenizer.model")
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["model"]["merges"].sort(key=lambda pair: set("".join(pair)) == {"\u2581"})
    (folder / "tokenizer.json").write_text(json.dumps(spec))

    kept = json.loads(loaded(folder).backend_tokenizer.to_str())

    assert kept["model"]["merges"] == spec["model"]["merges"]


def test_added_tokens_stay_where_they_are(small_scored, model_folder, tmp_path):
    source, _, own = small_scored
    more = {"content": "<|im_start|>", "special": True}
    flags = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    last = len(own)
    config = CONFIG | {"added_tokens_decoder": {str(last): more | flags}}
    folder = folder_of(tmp_path / "m", model_folder, source / "tokenizer.model", config)

    tokenizer = loaded(folder)

    said = tokenizer("<|im_start|>a  b", add_special_tokens=False)["input_ids"]
    assert said[0] == last
    assert tokenizer.decode(said[1:]).strip() == "a  b"
    assert ids(tokenizer, "a  b <|im_start|>") == own.encode("a  b <|im_start|>")


@pytest.mark.parametrize(
    ("scores", "told"),
    [
        ({"ab": 0.0, "bc": 0.0, "ca": 0.0}, True),  # whichever goes first is wrong somewhere
        ({"ab": 0.0, "bc": -1.0, "ca": -2.0}, False),
        ({"ab": 0.0, "cd": 0.0, "ef": 0.0}, False),
        ({"aa": 0.0, "aaa": 0.0, "aaaa": 0.0}, False),
        ({"\u2581\u2581": 0.0, "\u2581a": 0.0}, False),
    ],
)
def test_equal_scores_that_no_order_expresses_are_told(
    scores, told, model_folder, tmp_path, capsys
):
    model = small(tmp_path / "t", scores)
    tokenizer = loaded(folder_of(tmp_path / "m", model_folder, model))
    own = sentencepiece.SentencePieceProcessor(model_file=str(model))
    texts = ["abca", "bcab", "cabc", "abcabcabc", "aaaaaaaaa", "abcdef  aaa"]

    assert ("becomes other tokens than sentencepiece" in capsys.readouterr().err) == told
    assert ([ids(tokenizer, t) for t in texts] != [own.encode(t) for t in texts]) == told


def test_user_defined_pieces_are_found_whole_and_get_no_space(model_folder, tmp_path):
    model = small(tmp_path / "t", {"ab": 0.0, "\u2581a": -1.0, "bb": -2.0}, user=("<|x|>",))
    tokenizer = loaded(folder_of(tmp_path / "m", model_folder, model))
    own = sentencepiece.SentencePieceProcessor(model_file=str(model))

    for text in ("ab<|x|>ab", "a <|x|> bb", "bb<|x|><|x|>bb a"):
        assert ids(tokenizer, text) == own.encode(text), text


def test_a_space_that_the_config_turns_off_stays_off(model_folder, tmp_path):
    model = model_folder / "tokenizer.model"

    off = folder_of(tmp_path / "m", model_folder, model, CONFIG | {"add_prefix_space": False})

    assert loaded(off).tokenize("x") == ["x"]


@pytest.mark.parametrize(("legacy", "behind"), [(False, ["x"]), (True, ["\u2581x"])])
def test_the_space_behind_a_special_token_is_the_configs(legacy, behind, model_folder, tmp_path):
    model = small(tmp_path / "t", {"\u2581x": 0.0})

    tokenizer = loaded(folder_of(tmp_path / "m", model_folder, model, CONFIG | {"legacy": legacy}))

    assert tokenizer.tokenize("x</s>x") == ["\u2581x", "</s>", *behind]


@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "PreTrainedTokenizerFast", "LlamaTokenizer"])
@pytest.mark.parametrize(
    "parts",
    [{}, {"normalizer": normalizers.NFC()}, {"normalizer": normalizers.Sequence([])}],
    ids=["digits", "nfc", "empty"],
)
def test_tokenizer_json_counts_whatever_class_is_named(kind, parts, model_folder, tmp_path):
    """transformers 5 puts a class's own rules in the place of these."""
    config = {"tokenizer_class": kind, "eos_token": "<|endoftext|>"}
    folder = folder_of(tmp_path / "m", model_folder, None, config)
    own = by_digits(folder, **parts)

    tokenizer = loaded(folder)

    for text in ("ab 12 e\u0301", "It's 1234", "x<|endoftext|>y"):
        own.encode_special_tokens = True
        plain = tokenizer(text, add_special_tokens=False, split_special_tokens=True)
        assert plain["input_ids"] == own.encode(text, add_special_tokens=False).ids
    assert tokenizer.convert_tokens_to_ids("<|endoftext|>") == 258


@pytest.mark.parametrize("names", [["x.Y", None], {"AutoTokenizer": ["x.Y", None]}, ["x.Y"]])
@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "OwnTokenizer"])
def test_code_that_a_tokenizer_names_is_not_run(kind, names, model_folder, tmp_path):
    config = {"tokenizer_class": kind, "auto_map": names}
    folder = folder_of(tmp_path / "m", model_folder, None, config)
    own = by_digits(folder)
    mark = tmp_path / "ran"
    (folder / "x.py").write_text(f"open({str(mark)!r}, 'w')\nclass Y:\n    pass\n")

    assert loaded(folder).tokenize("ab 12") == own.encode("ab 12").tokens
    assert not mark.exists()


def test_tiktokens_file_of_that_name_is_left_alone(model_folder, tmp_path):
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    folder = folder_of(tmp_path / "m", model_folder, None, config)
    own = by_digits(folder)
    (folder / "tokenizer.model").write_text("".join(f"{'IQ=='} {i}\n" for i in range(9)))

    assert loaded(folder).tokenize("ab 12") == own.encode("ab 12").tokens

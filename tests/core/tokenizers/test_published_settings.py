"""Text becomes what tokenizer.json says, for the settings of today's models, whatever class the
config names: transformers has rules of its own for some of these classes."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizer_folders import folder_of, loaded
from tokenizers import Regex, Tokenizer, models, normalizers, trainers
from tokenizers.pre_tokenizers import ByteLevel, Digits, Punctuation, Sequence, Split

from sparsecast.core.text.tokens import encode

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
AT_ONCE = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
STRANGE = st.text() | st.text(alphabet=" \n\r'sdrl1239\u4f60e\u0301!(hH")
RAW = ByteLevel(add_prefix_space=False, use_regex=False)
PLAIN = ByteLevel(add_prefix_space=False)


def split(pattern: str) -> Split:
    return Split(Regex(pattern), "isolated")


SETTINGS = {
    "llama3": (None, [split(LLAMA3), RAW], True, "PreTrainedTokenizerFast"),
    "llama3-backend": (None, [split(LLAMA3), RAW], True, "TokenizersBackend"),
    "llama3-llama": (None, [split(LLAMA3), RAW], True, "LlamaTokenizerFast"),
    "qwen2": (normalizers.NFC(), [split(QWEN2), RAW], False, "Qwen2Tokenizer"),
    "qwen2-fast": (normalizers.NFC(), [split(QWEN2), RAW], False, "Qwen2TokenizerFast"),
    "deepseek": (
        normalizers.Sequence([]),
        [split(r"\p{N}{1,3}"), split(r"[\u4e00-\u9fa5]+"), split(QWEN2), RAW],
        False,
        "LlamaTokenizerFast",
    ),
    "smollm2": (None, [Digits(individual_digits=True), PLAIN], False, "GPT2Tokenizer"),
    "falcon": (
        None,
        [Punctuation("contiguous"), PLAIN, Digits(), split("[0-9][0-9][0-9]")],
        False,
        "PreTrainedTokenizerFast",
    ),
    "neox": (normalizers.NFC(), [PLAIN], False, "GPTNeoXTokenizer"),
}
TEXTS = [
    "def f(x):\n    return x[1234567] + 89\r\n\r\n",
    "It's HE'LL we've  isn't \u2019s 'x",
    "cafe\u0301 caf\u00e9 \u212b \ufb01",
    "1 12 123 1234 12345 \u0661\u0662\u0663\u0664 \u00bd\u216b",
    "\u4f60\u597d\uff0c123\u4e16\u754c \U0001f468\u200d\U0001f469 \u2028x\x00\x1f",
    "    (y)   z\n\n\n   !!??\n",
    "(hello) hello Hello<|end|>hello",
    "",
]


@pytest.fixture(scope="module", params=SETTINGS)
def pair(request, tmp_path_factory, model_folder):
    """(the tokenizer that collect uses, tokenizer.json as it stands in the library)."""
    normalizer, steps, whole, kind = SETTINGS[request.param]
    own = Tokenizer(models.BPE())
    own.pre_tokenizer = PLAIN  # with merges of digits
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    own.train_from_iterator(TEXTS * 20, trainer)
    spec = json.loads(own.to_str())["model"]
    vocab = spec["vocab"] | {"\u0120zebra": len(spec["vocab"])}  # no merge forms it
    merges = [(left, right) for left, right in spec["merges"]]
    own.model = models.BPE(vocab, merges, ignore_merges=whole)
    own.pre_tokenizer = Sequence(steps)
    if normalizer is not None:
        own.normalizer = normalizer
    own.add_special_tokens(["<|begin|>", "<|end|>"])
    config = {"tokenizer_class": kind, "bos_token": "<|begin|>", "eos_token": "<|end|>"}
    folder = folder_of(tmp_path_factory.mktemp("settings") / "m", model_folder, None, config)
    own.save(str(folder / "tokenizer.json"))
    plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
    plain.encode_special_tokens = True
    return loaded(folder), plain


def plain_ids(plain: Tokenizer, text: str) -> list[int]:
    """BOS and the ids of the library."""
    return [plain.token_to_id("<|begin|>"), *plain.encode(text, add_special_tokens=False).ids]


def test_ids_are_those_of_tokenizer_json(pair):
    tokenizer, plain = pair

    for text in TEXTS:
        assert encode(tokenizer, text, 10**9) == plain_ids(plain, text), text


@AT_ONCE
@given(
    text=st.text() | st.text(alphabet=" \n\r'sdrl1239\u4f60e\u0301!(hH") | st.sampled_from(TEXTS)
)
def test_any_text_becomes_the_ids_of_tokenizer_json(pair, text):
    tokenizer, plain = pair

    assert encode(tokenizer, text, 10**9) == plain_ids(plain, text)


def test_settings_change_the_ids(pair):
    """Or nothing here would be tested."""
    _, plain = pair
    bare = Tokenizer.from_str(plain.to_str())
    bare.pre_tokenizer, bare.encode_special_tokens = PLAIN, True
    bare.normalizer = normalizers.Sequence([])

    assert [plain_ids(bare, text) for text in TEXTS] != [plain_ids(plain, text) for text in TEXTS]


def test_a_word_that_no_merge_forms_is_one_token_where_merges_are_ignored(pair, request):
    tokenizer, _ = pair
    whole = SETTINGS[request.node.callspec.params["pair"]][2]

    got = tokenizer.convert_ids_to_tokens(encode(tokenizer, "a zebra", 10**9))

    assert ("\u0120zebra" in got) == whole

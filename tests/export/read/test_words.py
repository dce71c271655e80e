"""The engine's words, by hand from its source, and where they are GPT-2's."""

from __future__ import annotations

import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st

from sparsecast.export.read.words import words

GPT2 = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("", []),
        ("x", ["x"]),
        (" ", [" "]),
        ("Hello  world 12.", ["Hello", " ", " world", " 12."]),  # the last character
        (
            "don't we'll I'd've 'Sx y",
            ["don", "'t", " we", "'ll", " I", "'d", "'ve", " '", "Sx", " y"],
        ),
        ("a's", ["a", "'s"]),
        ("it's2x y", ["it", "'s", "2x", " y"]),  # a run of letters outlives the contraction
        ("!x!", ["!", "x!"]),
        ("!xy! z", ["!", "xy", "!", " z"]),
        ("    (y z", ["    ", "(y", " z"]),
        ("a   1 b", ["a", "  ", " 1", " b"]),
        ("a\n\n  b c", ["a", "\n\n ", " b", " c"]),
        ("a\nb c", ["a", "\nb", " c"]),
        ("1\u00b2\u0663\u2463 x.", ["1\u00b2\u0663\u2463", " x."]),
        ("\u216b\u00bd x.", ["\u216b\u00bd", " x."]),
        ("a\u216b x.", ["a", "\u216b", " x."]),  # a Roman numeral is no digit
        ("a\u0301b c.", ["a", "\u0301b", " c."]),
        ("ab\u0870cd e.", ["ab", "\u0870cd", " e."]),  # a letter of Unicode 14
        ("\u4f60\u597d\uff0c\u3042 b", ["\u4f60\u597d", "\uff0c\u3042", " b"]),
        ("\U0001f468\u200d\U0001f469x y", ["\U0001f468\u200d\U0001f469", "x", " y"]),
        ("a\u2028b c", ["a", "\u2028b", " c"]),
        ("a\x00\x1cb c", ["a", "\x00", "\x1cb", " c"]),
    ],
)
def test_words_are_the_engines(text, cut):
    assert words(text) == cut


@given(st.text() | st.text(alphabet=" \n'stdrevlm1a!("))
def test_no_character_is_lost(text):
    assert "".join(words(text)) == text


@given(st.lists(st.from_regex(r"[a-z]{2,5}|[0-9]{2,5}|[!?.,;:]{2,5}", fullmatch=True)))
def test_words_with_one_space_between_are_gpt2s(parts):
    """Longer than one character, and with something behind the last."""
    text = " ".join([*parts, "end", "ab"])

    assert words(text) == GPT2.findall(text)

"""The words into which the engine cuts a text before byte-level BPE.

A state machine that imitates GPT-2's regular expression: 's 't 'm 'd 're 've 'll, runs of letters,
of digits and of other characters, each with one space in front, and white space. Four habits of
it are kept here, because the tokens depend on them:

- the last character of a text belongs to the word before it, whatever it is;
- a character that ends a run begins a word, and the one after it decides of what kind: `!x!`
  becomes `!` and `x!`;
- a run of white space ends one character before a letter or digit, and nowhere else: `    (y`
  becomes four spaces, and `(y`;
- digits are characters that are a digit alone or in a circle, not all numbers, and the characters
  of Unicode 13.

(PowerInfer's llama.cpp at d3ebd7c, bpe_gpt2_preprocess, with the tables of its unicode.h.)
"""

from __future__ import annotations

import unicodedata
from functools import cache

LETTER, DIGIT, SPACE, OTHER = "letter", "digit", "space", "other"
SHORT, LONG = ("'s", "'t", "'m", "'d"), ("'re", "'ve", "'ll")
_LATER = (
    (0x558, 0x558), (0x58B, 0x58C), (0x870, 0x88F), (0x8B5, 0x8B5), (0x8C8, 0x8C9),
    (0xC5C, 0xC5D), (0xCDC, 0xCDD), (0x170D, 0x170D), (0x171F, 0x171F), (0x1B4C, 0x1B4C),
    (0x1C89, 0x1C8A), (0x208F, 0x208F), (0x209D, 0x209F), (0x2C2F, 0x2C2F), (0x2C5F, 0x2C5F),
    (0x9FFD, 0x9FFF), (0xA7C0, 0xA7C1), (0xA7CB, 0xA7F4), (0xAB6C, 0xAB6D), (0x10570, 0x105F3),
    (0x10780, 0x107BF), (0x10940, 0x10959), (0x10D40, 0x10D85), (0x10EC2, 0x10EEE),
    (0x10F70, 0x10F81), (0x11071, 0x11075), (0x1123F, 0x11240), (0x11380, 0x113D3),
    (0x116D0, 0x116E3), (0x11740, 0x11746), (0x11AB0, 0x11ABF), (0x11B0A, 0x11BF9),
    (0x11DB0, 0x11DF1), (0x11F02, 0x11F59), (0x12F90, 0x12FF0), (0x1342F, 0x143FA),
    (0x16100, 0x16139), (0x16A70, 0x16AC9), (0x16D40, 0x16D79), (0x16EA0, 0x16ED3),
    (0x16FF2, 0x16FF3), (0x187F8, 0x187FF), (0x18CD6, 0x18CFF), (0x18D09, 0x1AFFE),
    (0x1B11F, 0x1B132), (0x1B155, 0x1B155), (0x1B168, 0x1B168), (0x1CCF0, 0x1CCF9),
    (0x1D6A6, 0x1D6A6), (0x1DF00, 0x1E06D), (0x1E290, 0x1E2AD), (0x1E4D0, 0x1E7FE),
    (0x2A6DE, 0x2A6DF), (0x2B735, 0x2B73F), (0x2B81E, 0x2B81E), (0x2CEA2, 0x2CEAD),
    (0x2EBF0, 0x2EE5D), (0x31350, 0x3FC3F),
)  # fmt: skip
"""Ranges whose letters and digits came with Unicode 14 to 17."""


def words(text: str) -> list[str]:
    """Cut a text into the engine's words; joined they are the text."""
    kinds = [*map(_kind, text), ""]
    found: list[str] = []
    start, i, state = 0, 0, ""
    while i < len(text):
        if text[i] == "'" and (length := _contraction(text, i)):
            found += [text[start:i], text[i : i + length]]  # `state` outlives it
            start = i = i + length
            continue
        after = kinds[i + 1]
        if state:
            ends = _ends(state, kinds[i], after)
        else:
            state = _begun(kinds[i], after, lone_space=start == i and text[i] == " ")
            ends = not state
        if i + 1 == len(text):
            found.append(text[start:])
        elif ends:
            found.append(text[start:i])
            start, state = i, ""
        i += 1
    return [word for word in found if word]


def _contraction(text: str, i: int) -> int:
    """Return the length of the contraction at `i`; 0 if there is none."""
    return 2 if text[i : i + 2] in SHORT else 3 if text[i : i + 3] in LONG else 0


def _begun(kind: str, after: str, *, lone_space: bool) -> str:
    """Return the kind of run that a character begins; "" for white space alone.

    Args:
        lone_space: The character is a space and nothing of a word is before it.
    """
    if lone_space and after != SPACE:
        return after or OTHER
    return "" if kind == SPACE and after != SPACE else kind


def _ends(state: str, kind: str, after: str) -> bool:
    """Return whether a run of kind `state` ends before a character of `kind`."""
    if state == SPACE:
        return after in (LETTER, DIGIT)
    return kind != state


@cache
def _kind(character: str) -> str:
    if character.isspace():
        return SPACE
    code = ord(character)
    if any(first <= code <= last for first, last in _LATER):
        return OTHER
    if character.isdigit():
        return DIGIT
    return LETTER if unicodedata.category(character)[0] == "L" else OTHER

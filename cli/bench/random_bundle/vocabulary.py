"""The vocabulary of a random bundle: bytes and made-up words."""

from __future__ import annotations

from sparsecast.cli.bench.export_model import word
from sparsecast.export.write.vocab import BYTE, CONTROL, NORMAL, UNKNOWN, Vocabulary

SPECIAL = {"<unk>": UNKNOWN, "<s>": CONTROL, "</s>": CONTROL}
FIRST_WORD = len(SPECIAL) + 256
"""Id of the first token that is neither special nor a byte."""


def random_vocabulary(size: int) -> Vocabulary:
    """Return a sentencepiece vocabulary that the engine loads.

    Args:
        size: More than `FIRST_WORD`.
    """
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    words = [word(number) for number in range(size - FIRST_WORD)]
    return Vocabulary(
        "llama",
        [*SPECIAL, *bytes_, *words],
        [0.0] * FIRST_WORD + [-float(number) for number in range(len(words))],
        [*SPECIAL.values(), *[BYTE] * len(bytes_), *[NORMAL] * len(words)],
        [],
        {"unk": 0, "bos": 1, "eos": 2},
        [],
    )

"""Count the documents of which the engine's tokenizer makes other tokens than the model's.

The engine has two tokenizers of its own, and a file gives them tokens, scores and merges, but no
rule by which text is split. With other rules the engine is right for token ids alone. How much text
they concern is counted on a sample of the builtin corpus: by export for the user to decide, and by
verify again.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cache
from itertools import islice
from typing import Any

import xxhash

from sparsecast.core.text.corpus import read_documents

SAMPLE = 50
"""Documents of the builtin corpus, some 200,000 characters."""
Encode = Callable[[str], list[int]]


@dataclass(frozen=True, kw_only=True)
class OtherTokens:
    """What the engine's tokenizer does to the sample."""

    documents: int
    """Documents with other tokens."""
    of_documents: int
    tokens: int
    """The model's tokens that the engine lacks, document by document, in any order."""
    of_tokens: int
    sample: str
    """Hash of the sample; another installation's builtin corpus may differ."""

    def __str__(self) -> str:
        return (
            f"{self.documents} of {self.of_documents} documents of the builtin corpus (at least "
            f"{self.tokens:,} of {self.of_tokens:,} tokens)"
        )

    @property
    def as_json(self) -> str:
        return json.dumps(asdict(self))


def sample_documents() -> list[str]:
    """Read the sample."""
    return _sample(SAMPLE)


@cache
def _sample(count: int) -> list[str]:
    return [doc.text for doc in islice(read_documents("builtin"), count)]


def model_ids(tokenizer: Any) -> Encode:
    """Return the model's ids of a text, without BOS; a special token spelled in it is text."""

    def encode(text: str) -> list[int]:
        plain = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
        ids: list[int] = plain["input_ids"]
        return ids

    return encode


def count_other_tokens(model: Encode, engine: Encode, docs: Iterable[str]) -> OtherTokens:
    """Compare the two tokenizers document by document."""
    documents = of_documents = tokens = of_tokens = 0
    digest = xxhash.xxh3_64()
    for doc in docs:
        want, got = model(doc), engine(doc)
        of_documents += 1
        of_tokens += len(want)
        documents += want != got
        tokens += (Counter(want) - Counter(got)).total()
        digest.update(doc.encode())
    return OtherTokens(
        documents=documents,
        of_documents=of_documents,
        tokens=tokens,
        of_tokens=of_tokens,
        sample=digest.hexdigest(),
    )

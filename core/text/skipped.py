"""The rows of a corpus that cannot be used: counted, and the first of them named.

One row without text, or with an image, does not end a run. A corpus in which no row can be used
does, after `GIVE_UP` rows or at its end.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from sparsecast.core.errors import InputError
from sparsecast.core.messages import log

GIVE_UP = 10_000
"""Rows without a usable one among them after which a corpus is refused."""
NAMED = 3
LONGEST = 200
"""Characters of a reason."""


@dataclass
class SkippedRows:
    """The rows that one pass over a corpus has left out."""

    corpus: str
    read: int = 0
    """Rows so far; text files have none."""
    count: int = 0
    """Those that were left out."""
    first: list[str] = field(default_factory=list)
    """Where the first ones are, and why they were left out."""
    usable: bool = False
    """Whether anything could be used."""

    def add(self, where: str, why: object) -> None:
        """Count a row.

        Raises:
            InputError: It is one of `GIVE_UP`, and nothing could be used.
        """
        self.count += 1
        if len(self.first) < NAMED:
            reason = str(why)
            cut = f"{reason[:LONGEST]}..." if len(reason) > LONGEST else reason
            self.first.append(f"{where}: {cut}")
        if not self.usable and self.count >= GIVE_UP:
            raise self.error()

    def error(self) -> InputError:
        """Return the error for a corpus in which no row can be used."""
        which = "its only row" if self.read == 1 else f"any of its first {self.read:,} rows"
        return InputError(f"{self.corpus}: cannot use {which}: {self._named()}")

    def tell(self) -> None:
        """Log how many rows were left out, and where the first ones are."""
        if self.count:
            log.warning(
                f"{self.corpus}: {self.count:,} of {self.read:,} rows cannot be used and were left "
                f"out: {self._named()}"
            )

    def _named(self) -> str:
        more = self.count - len(self.first)
        return "; ".join(self.first) + (f"; and {more:,} more" if more else "")

"""One thing that doctor looked at."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

State = Literal["ok", "note", "fix"]


@dataclass(frozen=True)
class Finding:
    """One row of what doctor prints."""

    part: str
    """What the row is about: python, packages, gpu, kernels, compiler, cpu, memory, disk, engines
    or extras."""
    name: str
    state: State
    """ok: works; note: absent or limited, and no stage needs it on this machine; fix: a stage needs
    it, or the user named it, and it does not work."""
    found: str
    """In one line."""
    to_do: str | None = None
    """What to do about it, where something helps."""
    values: dict[str, Any] = field(default_factory=dict)
    """Its numbers, for JSON: bytes and counts."""


def one_line(error: BaseException | str, most: int = 200) -> str:
    """Return an error as one line of at most `most` characters; its type if it has no text."""
    nothing = "no message" if isinstance(error, str) else type(error).__name__
    text = " ".join(str(error).split()) or nothing
    return text if len(text) <= most else text[: most - 3] + "..."

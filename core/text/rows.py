"""What a row of JSON lines, of parquet or of a dataset holds: a text or a chat.

    text                                   a string
    messages, conversations                a list of turns, or a record of lists
    role or from                           whose turn it is, a string
    content or value                       what is said: a string, null, or a list of parts

Null is an empty turn, such as a tool call; what the call holds is not read. Parts of text are
joined by line ends, as vLLM does for templates that take strings. A row with any other part, such
as an image, cannot be used: without it the rest is not what the model would see.
"""

from __future__ import annotations

from itertools import islice
from typing import Any

from sparsecast.core.errors import InputError

ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(
        ("assistant", "gpt", "chatgpt", "bing", "bard", "bot", "ai", "model", "function_call"),
        "assistant",
    ),
    **dict.fromkeys(("tool", "function", "observation", "function_response"), "tool"),
    "system": "system",
}
"""The names of roles in public corpora, in lower case, to those that templates know."""
TEXT_PARTS = ("text", "input_text", "output_text")
"""Types of parts that are text, in the chat completions' and the responses' API."""
CALLS = ("tool_calls", "function_call")
"""A turn with one of these may have no content."""

Chat = tuple[tuple[str, str], ...]
"""(role, content) pairs."""


class UnusableRowError(InputError):
    """One row cannot be used; the rest of the corpus may be."""


def parse_row(row: dict[str, Any]) -> str | Chat:
    """Return the text of a row, or else the chat in it; neither is blank.

    Raises:
        UnusableRowError: It holds neither. The message does not say where the row is.
    """
    text = row.get("text")
    if isinstance(text, str) and text.strip():
        return text
    why: UnusableRowError | None = None
    for column in ("messages", "conversations"):
        if (turns := row.get(column)) is None:
            continue
        try:
            return _chat(turns, column)
        except UnusableRowError as error:
            why = why or error
    if why is not None:
        raise why
    if isinstance(text, str):
        raise UnusableRowError("nothing but white space under 'text'")
    found = ", ".join(
        f"{printable(name)} ({type(value).__name__})" for name, value in islice(row.items(), 8)
    )
    raise UnusableRowError(
        "expected a string under 'text', or a chat under 'messages' or 'conversations'; found "
        f"{found or 'nothing'}{', ...' if len(row) > 8 else ''}"
    )


def _chat(value: Any, column: str) -> Chat:
    turns = _records(value)
    if not isinstance(turns, list):
        raise UnusableRowError(
            f"expected a list of turns under '{column}', found {type(value).__name__}"
        )
    chat = []
    for number, turn in enumerate(turns, 1):
        where = f"turn {number} under '{column}'"
        if not isinstance(turn, dict):
            raise UnusableRowError(f"{where} is no object but {type(turn).__name__}")
        role = turn.get("role") if turn.get("role") is not None else turn.get("from")
        if not isinstance(role, str):
            raise UnusableRowError(f"{where} has no string under 'role' or 'from'")
        chat.append((ROLES.get(role.strip().lower(), role), _said(turn, where)))
    if not any(said.strip() for _, said in chat):
        raise UnusableRowError(f"nothing is said under '{column}'")
    return tuple(chat)


def _said(turn: dict[str, Any], where: str) -> str:
    content = turn.get("content") if turn.get("content") is not None else turn.get("value")
    if content is None:
        if not any(name in turn for name in ("content", "value", *CALLS)):
            raise UnusableRowError(f"{where} has no 'content' or 'value'")
        return ""
    if isinstance(content, str):
        return content
    if isinstance(parts := _records(content), list):
        return "\n".join(_text_of(part, where) for part in parts)
    raise UnusableRowError(f"{where} holds neither text nor parts but {type(content).__name__}")


def _text_of(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind in TEXT_PARTS:
        text = part.get("text")
        if text is None or isinstance(text, str):
            return text or ""
        kind = f"text ({type(text).__name__})"
    raise UnusableRowError(
        f"{where} holds a part of type {printable(str(kind))}, expected text alone"
    )


def _records(value: Any) -> Any:
    """Return a list of records where `value` is a record of lists, as datasets makes of one."""
    if not isinstance(value, dict) or not all(isinstance(v, list) for v in value.values()):
        return value
    if len({len(column) for column in value.values()}) > 1:
        return value
    return [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]


def printable(text: str) -> str:
    """Return at most 40 characters of `text` that a terminal shows as they are."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text[:40])

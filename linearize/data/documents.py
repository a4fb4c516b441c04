"""Rows -> documents: which columns hold the text, and in which format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from linearize.data.readers import Row
from linearize.errors import LinearizeError

Format = Literal["text", "chat", "alpaca"]

TEXT_COLUMNS = ("text", "content", "document")
CHAT_COLUMNS = ("messages", "conversations", "conversation")
INSTRUCTION_COLUMNS = ("instruction", "prompt", "question")
INPUT_COLUMNS = ("input", "context")
OUTPUT_COLUMNS = ("output", "response", "completion", "answer")
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True)
class Document:
    """One document, before tokenization.

    Args:
        format: how it becomes tokens.
        turns: (role, text) pairs. Plain text is one turn of role "text"; an Alpaca row is "instruction", "input" (where
            it has one) and "output"; a conversation is "system", "user" and "assistant" in its own order.
    """

    format: Format
    turns: tuple[tuple[str, str], ...]


def first_column(row: Row, names: tuple[str, ...]) -> str | None:
    """Return the first of `names` that the row has, or None."""
    return next((name for name in names if name in row), None)


def choose_format(row: Row, wanted: str, source: str) -> Format:
    """Return the format of a source from its first row.

    Args:
        row: the first row.
        wanted: `data.format`; `auto` takes messages as chat, instruction and output as Alpaca, else text.
        source: named in the error.

    Raises:
        LinearizeError: no column fits the format.
    """
    instruction = first_column(row, INSTRUCTION_COLUMNS) and first_column(row, OUTPUT_COLUMNS)
    has: dict[str, bool] = {
        "chat": bool(first_column(row, CHAT_COLUMNS) or instruction),
        "alpaca": bool(instruction),
        "text": bool(first_column(row, TEXT_COLUMNS)),
    }
    if wanted == "auto":
        if first_column(row, CHAT_COLUMNS):
            return "chat"
        wanted = "alpaca" if has["alpaca"] else "text"
    if wanted == "chat" and has["chat"]:
        return "chat"
    if wanted == "alpaca" and has["alpaca"]:
        return "alpaca"
    if wanted == "text" and has["text"]:
        return "text"
    raise LinearizeError(
        f"No usable column in {source!r} for `data.format: {wanted}`. It has {', '.join(map(str, row)) or 'none'}. "
        f"Expected text: one of {', '.join(TEXT_COLUMNS)}; chat: one of {', '.join(CHAT_COLUMNS)}, or an instruction; "
        f"alpaca: one of {', '.join(INSTRUCTION_COLUMNS)} with one of {', '.join(OUTPUT_COLUMNS)}. Rename a column or "
        "change `data.format`."
    )


def message_turn(message: Any, source: str) -> tuple[str, str]:
    """Return (role, text) of a message: `{role, content}`, or ShareGPT's `{from, value}`."""
    if isinstance(message, dict):
        role = ROLES.get(str(message.get("role", message.get("from"))))
        text = message.get("content", message.get("value"))
        if role and isinstance(text, str):
            return role, text
    raise LinearizeError(
        f"A message in {source!r} is {str(message)[:80]!r}; expected an object with `role` ({', '.join(ROLES)}) and a "
        "string `content`. Repair that row, or convert the file to this form."
    )


def to_document(row: Row, form: Format, source: str) -> Document | None:
    """Return the row as a document, or None where it is empty.

    Raises:
        LinearizeError: the row lacks the columns of its source's first row, or they hold no strings.
    """
    if form == "chat" and (column := first_column(row, CHAT_COLUMNS)):
        turns = tuple(message_turn(message, source) for message in row[column] or [])
        return Document("chat", turns) if any(text.strip() for _, text in turns) else None
    choose_format(row, form, source)
    if form == "text":
        text = string(row, TEXT_COLUMNS, source)
        return Document("text", (("text", text),)) if text.strip() else None
    instruction, output = string(row, INSTRUCTION_COLUMNS, source), string(row, OUTPUT_COLUMNS, source)
    extra = string(row, INPUT_COLUMNS, source)
    if not output.strip():
        return None
    if form == "chat":
        asked = f"{instruction}\n\n{extra}" if extra.strip() else instruction
        return Document("chat", (("user", asked), ("assistant", output)))
    given = (("input", extra),) if extra.strip() else ()
    return Document("alpaca", (("instruction", instruction), *given, ("output", output)))


def string(row: Row, names: tuple[str, ...], source: str) -> str:
    """Return the row's text in the first of these columns; empty where it has none of them or null."""
    column = first_column(row, names)
    value = None if column is None else row[column]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise LinearizeError(
            f"The column {column!r} of {source!r} holds a {type(value).__name__} ({str(value)[:60]!r}); expected a "
            "string. Repair that row or rename the column."
        )
    return value

"""Rows -> documents -> tokens: plain text, conversations through the teacher's chat template, Alpaca instructions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from linearize.data.readers import Row
from linearize.errors import LinearizeError

Format = Literal["text", "chat", "alpaca"]

IGNORE = -100
TEXT_COLUMNS = ("text", "content", "document")
CHAT_COLUMNS = ("messages", "conversations", "conversation")
INSTRUCTION_COLUMNS = ("instruction", "prompt", "question")
INPUT_COLUMNS = ("input", "context")
OUTPUT_COLUMNS = ("output", "response", "completion", "answer")
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


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


@dataclass(frozen=True)
class Encoded:
    """One document as tokens: `ids`, and `labels` of the same length (the id, or -100 where no loss is taken)."""

    ids: list[int]
    labels: list[int]


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


def chat_segments(document: Document, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """Return the conversation as the teacher's chat template writes it, cut into (text, is_response) pieces.

    Raises:
        LinearizeError: the tokenizer has no chat template, or the template rejects or rewrites the conversation.
    """
    if not tokenizer.chat_template:
        raise LinearizeError(
            "`data.format: chat` needs a chat template, and the teacher's tokenizer has none (a base model?). Set "
            "`data.format: alpaca` or `text`, or take the instruct version of the model."
        )
    messages = [{"role": role, "content": text} for role, text in document.turns]

    def render(count: int, ask: bool = False) -> str:
        rendered = tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=ask)
        assert isinstance(rendered, str)
        return rendered

    try:
        whole = render(len(messages))
        pieces: list[tuple[str, bool]] = []
        done = 0
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = render(index, ask=True)
            response = whole if index == len(messages) - 1 else render(index + 1)
            if not (whole.startswith(response) and response.startswith(prompt)):
                raise ValueError("it rewrites a turn once more turns follow, so responses cannot be told apart")
            pieces += [(whole[done : len(prompt)], False), (whole[len(prompt) : len(response)], True)]
            done = len(response)
    except Exception as error:  # templates are programs that come with the model: they raise what they like
        raise LinearizeError(
            f"The teacher's chat template cannot write the conversation that starts {document.turns[0][1][:60]!r}: "
            f"{error}. Repair that row (most templates want user and assistant in turn), or set `data.format: alpaca` "
            "or `text`."
        ) from error
    return [piece for piece in [*pieces, (whole[done:], False)] if piece[0]]


def alpaca_segments(document: Document, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """Return prompt and response of an Alpaca row; the response ends with the tokenizer's end-of-sequence token."""
    turns = dict(document.turns)
    prompt = (ALPACA_INPUT if "input" in turns else ALPACA).format(**turns)
    return [(prompt, False), (turns["output"] + str(tokenizer.eos_token or ""), True)]


def encode(document: Document, tokenizer: PreTrainedTokenizerBase, loss: Literal["all", "response"]) -> Encoded:
    """Tokenize a document.

    Prompt and response are tokenized apart, as they are when a model answers. The tokenizer's own special tokens (a
    beginning-of-sequence token, where it adds one) precede text and Alpaca rows; chat templates bring theirs.

    Args:
        document: what to tokenize.
        tokenizer: the teacher's.
        loss: `all`, or `response` for labels on responses alone; plain text has none, so it is an error there.

    Raises:
        LinearizeError: `loss: response` with plain text, or what `chat_segments` raises.
    """
    if document.format == "text":
        if loss == "response":
            raise LinearizeError(
                "`data.loss: response` needs prompts and responses, and the data is plain text. Set `data.loss: all`, "
                "or give chat or Alpaca rows."
            )
        segments = [(document.turns[0][1], False)]
    elif document.format == "chat":
        segments = chat_segments(document, tokenizer)
    else:
        segments = alpaca_segments(document, tokenizer)
    ids: list[int] = []
    labels: list[int] = []
    for index, (text, response) in enumerate(segments):
        special = index == 0 and document.format != "chat"
        piece = begin(tokenizer, text) if special else tokenizer.encode(text, add_special_tokens=False, verbose=False)
        ids += piece
        labels += piece if response or loss == "all" else [IGNORE] * len(piece)
    return Encoded(ids, labels)


def begin(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokenize the start of a document, less an end-of-sequence token that the tokenizer puts behind its text."""
    ids = list(tokenizer.encode(text, verbose=False))
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids

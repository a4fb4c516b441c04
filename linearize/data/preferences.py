"""Preference pairs -> rows: a prompt with a chosen and a rejected answer, side by side as documents of one row.

Shapes: N pairs, T tokens a row. Chosen and rejected have half a row each; padding is a document without labels.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from linearize.data.corpus import Corpus, fingerprint
from linearize.data.documents import Document, message_turn
from linearize.data.formatting import IGNORE, Encoded, begin, chat_segments
from linearize.data.packing import PackedRows, pack
from linearize.data.readers import Row
from linearize.data.sources import builtin_rows, is_local, source_rows
from linearize.errors import LinearizeError
from linearize.recipe_stages import Preference

COLUMNS = ("prompt", "chosen", "rejected")
BUILTIN_CHARACTERS = 400
MOST_HELD_OUT = 32
Turns = tuple[tuple[str, str], ...]


def builtin_pairs() -> Iterator[Row]:
    """Yield pairs made from what ships with Python: a text's true continuation, and its words in random order.

    They teach nothing about preferences; they let the stage run where there are no data.
    """
    for row in builtin_rows():
        text = row["text"]
        for start in range(0, len(text) - BUILTIN_CHARACTERS, 4 * BUILTIN_CHARACTERS):
            prompt = text[start : start + BUILTIN_CHARACTERS // 2]
            chosen = text[start + BUILTIN_CHARACTERS // 2 : start + BUILTIN_CHARACTERS]
            words = re.split(r"(\s+)", chosen)
            random.Random(start).shuffle(words)
            yield {"prompt": prompt, "chosen": chosen, "rejected": "".join(words)}


def turns_of(row: Row, answer: str, chat: bool, source: str) -> Turns:
    """Return a pair's prompt with one of its answers as turns.

    Args:
        row: with `prompt`, `chosen` and `rejected`, or messages of the whole conversation in `chosen` and `rejected`.
        answer: which of the two.
        chat: strings are a user's message and the assistant's.
        source: named in the error.

    Raises:
        LinearizeError: a column is missing or holds something else.
    """
    prompt, given = row.get("prompt"), row.get(answer)
    if isinstance(given, list):
        turns = [message_turn(message, source) for message in given]
        before = [("user", prompt)] if isinstance(prompt, str) and len(turns) == 1 else []
        if isinstance(prompt, list):
            before = [message_turn(message, source) for message in prompt]
        # Many data sets repeat the prompt in front of each answer.
        turns = turns if turns[: len(before)] == before else before + turns
        if len(turns) > 1 and turns[-1][0] == "assistant":
            return tuple(turns)
    elif isinstance(prompt, str) and isinstance(given, str):
        return (("user", prompt), ("assistant", given)) if chat else (("text", prompt), ("text", given))
    raise LinearizeError(
        f"A row of {source!r} has {', '.join(row) or 'no column'}; a preference needs {', '.join(COLUMNS)}: strings, "
        f"or lists of messages that end with the assistant's. Its `{answer}` is {str(given)[:60]!r}. Repair or rename "
        "the columns."
    )


def encode_answer(turns: Turns, tokenizer: PreTrainedTokenizerBase, room: int) -> Encoded:
    """Return prompt and answer as tokens, with labels on the answer alone.

    Where they are more than `room`, the front of the prompt goes, then the end of the answer.
    """
    if turns[0][0] == "text":
        prompt = begin(tokenizer, turns[0][1])
        ending = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        response = [*tokenizer.encode(turns[1][1], add_special_tokens=False, verbose=False), *ending]
    else:
        segments = chat_segments(Document("chat", turns), tokenizer)
        last = max(index for index, (_, is_response) in enumerate(segments) if is_response)
        prompt, response = (
            [id for text, _ in part for id in tokenizer.encode(text, add_special_tokens=False, verbose=False)]
            for part in (segments[:last], segments[last : last + 1])
        )
    response = response[: room - 1]
    prompt = prompt[max(0, len(prompt) + len(response) - room) :]
    return Encoded(prompt + response, [IGNORE] * len(prompt) + response)


def pair_documents(row: Row, settings: Preference, tokenizer: PreTrainedTokenizerBase, length: int) -> list[Encoded]:
    """Return a pair as the documents of one row: chosen, padding, rejected, padding; none where they are the same."""
    chat = settings.format == "chat"
    halves = length // 2, length - length // 2
    answers = [
        encode_answer(turns_of(row, answer, chat, settings.source), tokenizer, room)
        for answer, room in zip(COLUMNS[1:], halves, strict=True)
    ]
    if answers[0].ids == answers[1].ids or not all(answer.ids for answer in answers):
        return []
    filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    documents = []
    for answer, room in zip(answers, halves, strict=True):
        left = room - len(answer.ids)
        documents += [answer, Encoded([filler] * left, [IGNORE] * left)]
    return documents


def check_format(row: Row, settings: Preference) -> None:
    """Raise where `format` does not fit a source's first row."""
    messages = isinstance(row.get("chosen"), list)
    if settings.format == "text" and messages:
        raise LinearizeError(
            f"{settings.source!r} holds messages, and the preference stage has `format: text`. Set `format: chat`."
        )


def build_preferences(
    settings: Preference, tokenizer: PreTrainedTokenizerBase, *, length: int, pairs: int, seed: int
) -> Corpus:
    """Read, split and tokenize the pairs of a preference stage.

    Args:
        settings: of the stage.
        tokenizer: the teacher's.
        length: tokens a row, T.
        pairs: how many the stage's budget needs; fewer repeat.
        seed: order of the pairs of local sources.

    Returns:
        Rows of one pair each; one of ten, 32 at most, is held out.

    Raises:
        LinearizeError: what `source_rows` raises, a row is no pair, or there are fewer than two pairs.
    """
    source = settings.source
    found: Any = builtin_pairs() if source == "builtin" else source_rows(source, settings.split, not is_local(source))
    if is_local(source):
        known = list(found)
        order = torch.randperm(len(known), generator=torch.Generator().manual_seed(seed)).tolist()
        found = (known[index] for index in order)
    documents: list[list[Encoded]] = []
    wanted = pairs + MOST_HELD_OUT
    for number, row in enumerate(found):
        if number == 0:
            check_format(row, settings)
        documents += [pair] if (pair := pair_documents(row, settings, tokenizer, length)) else []
        if len(documents) == wanted:
            break
    if len(documents) < 2:
        raise LinearizeError(
            f"The preference stage's `source` {source!r} gives {len(documents)} pairs whose answers differ within half "
            f"a row ({length // 2} tokens); it needs at least 2. Give more pairs, or raise `data.length`."
        )
    held = min(MOST_HELD_OUT, max(1, len(documents) // 10))
    held_out, train = (join(part, length) for part in (documents[:held], documents[held : held + pairs]))
    about = {**settings.model_dump(include={"source", "split", "format"}), "length": length, "seed": seed}
    description = f"{source}: {len(train)} training pairs in rows of {length} tokens; {len(held_out)} held out"
    return Corpus(train, held_out, fingerprint(train, held_out, about), description, about)


def join(pairs: list[list[Encoded]], length: int) -> PackedRows:
    """Pack pairs, each into a row of its own."""
    return pack([document for pair in pairs for document in pair], length)

"""Documents -> tokens: plain text, conversations through the teacher's chat template, Alpaca instructions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from linearize.data.documents import Document
from linearize.errors import LinearizeError

IGNORE = -100
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
class Encoded:
    """One document as tokens.

    Args:
        ids: of its tokens.
        labels: as many: the id, or -100 where no loss is taken.
        bos: what a row begins with where the document goes on in it; None where the tokenizer puts nothing first.
    """

    ids: list[int]
    labels: list[int]
    bos: int | None = None


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
    first = begin(tokenizer, "")
    return Encoded(ids, labels, first[0] if first and first[0] == tokenizer.bos_token_id else None)


def begin(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokenize the start of a document, less an end-of-sequence token that the tokenizer puts behind its text."""
    ids = list(tokenizer.encode(text, verbose=False))
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids

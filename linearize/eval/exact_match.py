"""Exact match of what a model writes: copying, reversal, picking from a list, sums in words.

Log-likelihoods rank given answers and hide a model that cannot write one. Each prompt shows solved examples first, so
that base models serve as well.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteriaList

from linearize.data.readers import read_file
from linearize.errors import LinearizeError
from linearize.eval.generation import GREEDY
from linearize.eval.logits import evaluation_mode
from linearize.eval.recall import wilson
from linearize.eval.task_data import find_file

WORDS = (
    "apple river stone cloud table green seven music paper light house bread tiger plane chair ocean candle forest "
    "window garden silver market bridge doctor yellow pencil rabbit winter hammer island"
).split()
GSM8K_FILES = ("gsm8k_test", "gsm8k")
GSM8K_SHOTS = 5


@dataclass(frozen=True)
class Prompt:
    """A prompt and the answer that has to follow it."""

    text: str
    answer: str


@dataclass(frozen=True)
class Generated:
    """A generation task.

    Args:
        name: of the task.
        prompts: what the model continues.
        extract: what a continuation answers.
        new_tokens: how many it may write.
        stop: text that ends an answer.
    """

    name: str
    prompts: tuple[Prompt, ...]
    extract: Callable[[str], str]
    new_tokens: int
    stop: str


@dataclass(frozen=True)
class MatchScore:
    """Share of exact matches with its 95 % Wilson interval, and the first continuation as it was written."""

    task: str
    accuracy: float
    low: float
    high: float
    samples: int
    example: str

    def row(self) -> dict[str, Any]:
        """Return the score as plain values."""
        return asdict(self)


def _copy(rng: random.Random) -> tuple[str, str]:
    words = " ".join(rng.sample(WORDS, 6))
    return f"Words: {words}\nThe same words again:", words


def _reversal(rng: random.Random) -> tuple[str, str]:
    words = rng.sample(WORDS, 4)
    return f"Words: {' '.join(words)}\nIn reverse order:", " ".join(reversed(words))


def _pick(rng: random.Random) -> tuple[str, str]:
    words = rng.sample(WORDS, 8)
    place = rng.randrange(8)
    listed = "\n".join(f"{index}. {word}" for index, word in enumerate(words, start=1))
    return f"{listed}\nItem number {place + 1} is:", words[place]


MADE: dict[str, Callable[[random.Random], tuple[str, str]]] = {"copy": _copy, "reversal": _reversal, "list": _pick}


def first_line(text: str) -> str:
    """Return the first line of a continuation, without white space and a full stop around it."""
    return text.strip().partition("\n")[0].strip().rstrip(".").strip()


def last_number(text: str) -> str:
    """Return the number that ends a worked answer: after `####`, else the last one before the next question."""
    own = text.partition("Question:")[0]
    marked = re.search(r"####\s*(-?[\d,]*\.?\d+)", own)
    found = [marked[1]] if marked else re.findall(r"-?\d[\d,]*(?:\.\d+)?", own)
    return plain_number(found[-1]) if found else ""


def plain_number(text: str) -> str:
    """Return a number without thousands separators and trailing zeros ("1,250.00" -> "1250")."""
    number = text.replace(",", "")
    return number.rstrip("0").rstrip(".") if "." in number else number


def made_tasks(samples: int, seed: int, shots: int = 2) -> list[Generated]:
    """Return the tasks that are made here, from a seed.

    Args:
        samples: prompts a task.
        seed: of the words.
        shots: solved examples in each prompt.
    """
    tasks = []
    for name, make in MADE.items():
        rng = random.Random(f"{name} {seed}")
        prompts = []
        for _ in range(samples):
            solved = ["{} {}\n\n".format(*make(rng)) for _ in range(shots)]
            question, answer = make(rng)
            prompts.append(Prompt("".join(solved) + question, answer))
        tasks.append(Generated(name, tuple(prompts), first_line, new_tokens=48, stop="\n"))
    return tasks


def gsm8k_task(folder: Path, samples: int) -> Generated:
    """Return GSM8K's questions of a local file with 5 solved examples, which are its first rows, before each.

    Args:
        folder: holds gsm8k_test.jsonl or gsm8k.jsonl (or .xz, .gz) with `question` and `answer` ("... #### 42").
        samples: at most so many questions.

    Raises:
        LinearizeError: the file is missing, too short, or lacks a column.
    """
    path = find_file(folder, GSM8K_FILES, "GSM8K")
    rows = [row for _, row in zip(range(GSM8K_SHOTS + samples), read_file(path), strict=False)]
    if len(rows) <= GSM8K_SHOTS or not all({"question", "answer"} <= row.keys() for row in rows):
        raise LinearizeError(
            f"{path} is no GSM8K: expected more than {GSM8K_SHOTS} rows with `question` and `answer` (which ends in "
            "`#### number`)."
        )
    solved = "".join(f"Question: {row['question']}\nAnswer: {row['answer']}\n\n" for row in rows[:GSM8K_SHOTS])
    prompts = tuple(
        Prompt(f"{solved}Question: {row['question']}\nAnswer:", last_number(row["answer"]))
        for row in rows[GSM8K_SHOTS:]
    )
    return Generated("gsm8k", prompts, last_number, new_tokens=256, stop="Question:")


def match(model: Any, tokenizer: PreTrainedTokenizerBase, task: Generated, batch: int = 8) -> MatchScore:
    """Let a model answer a task's prompts, greedily and a batch at a time, and count exact matches.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        task: the prompts.
        batch: prompts at once, padded on the left.
    """
    written: list[str] = []
    for first in range(0, len(task.prompts), batch):
        texts = [prompt.text for prompt in task.prompts[first : first + batch]]
        written += continuations(model, tokenizer, texts, task.new_tokens, task.stop)
    hits = sum(task.extract(text) == prompt.answer for text, prompt in zip(written, task.prompts, strict=True))
    low, high = wilson(hits, len(written))
    return MatchScore(task.name, hits / len(written), low, high, len(written), written[0])


def continuations(
    model: Any, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_new_tokens: int, stop: str
) -> list[str]:
    """Return the greedy continuations of several prompts, written together, each up to `stop` or a little beyond."""
    device = next(model.parameters()).device
    ids = [tokenizer.encode(text, verbose=False) for text in texts]
    ids = [row[:-1] if row[-1] == tokenizer.eos_token_id else row for row in ids]
    pad = next((n for n in (tokenizer.pad_token_id, tokenizer.eos_token_id) if n is not None), 0)
    longest = max(map(len, ids))
    tokens = torch.tensor([[pad] * (longest - len(row)) + row for row in ids], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids], device=device)

    def ended(tokens: Tensor, scores: Any, **_: Any) -> Tensor:
        written = [str(tokenizer.decode(row, skip_special_tokens=True)) for row in tokens[:, longest:]]
        return torch.tensor([stop in text.lstrip() for text in written], device=tokens.device)

    with evaluation_mode(model):
        out = model.generate(
            input_ids=tokens,
            attention_mask=mask,
            **GREEDY,
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
            stopping_criteria=StoppingCriteriaList([ended]),
        )
    return [str(tokenizer.decode(row, skip_special_tokens=True)) for row in out[:, longest:]]

"""Recall of facts hidden in a long text, which multiple-choice tasks hide: generated with a seed, scored in batches.

The tasks are the passkey of Mohtashami and Jaggi (arXiv:2305.16300), single- and multi-key needles as RULER has them
(arXiv:2404.06654: S-NIAH-1 a repeated noise text and a number, S-NIAH-2 prose and a number, S-NIAH-3 prose and a UUID),
and multi-query associative recall (arXiv:2312.04927) in prose.

There are two families of samples: `probe` chooses heads and layers, `eval` judges a model. They have no sentence of
their templates, no filler text, no key and no stream of random numbers in common (`recall_templates.py`).

Legend: B rows, T tokens a row, A scored answer tokens of a batch, V vocabulary.
"""

from __future__ import annotations

import itertools
import math
import random
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from linearize.errors import LinearizeError, UnknownNameError
from linearize.eval.logits import evaluation_mode, logits_reader
from linearize.eval.recall_templates import KEYS, SPLITS, Wording, haystack

Z95 = 1.959964  # two-sided 95 % quantile of the normal distribution


@dataclass(frozen=True)
class Kind:
    """What is hidden, where, and what is asked.

    Attributes:
        wording: which template.
        noise: a few sentences over and over, instead of prose.
        value: `number` of `digits`, or `uuid`.
        digits: of a number.
        needles: facts in the text.
        queries: how many of them are asked for.
    """

    wording: str = "needle"
    noise: bool = False
    value: str = "number"
    digits: int = 7
    needles: int = 1
    queries: int = 1


TASKS: dict[str, Kind] = {
    "passkey": Kind("passkey", noise=True, digits=5),
    "s_niah_1": Kind(noise=True),
    "s_niah_2": Kind(),
    "s_niah_3": Kind(value="uuid"),
    "multikey_niah": Kind(needles=4),
    "mqar": Kind("pairs", digits=4, needles=16, queries=4),
}


@dataclass(frozen=True)
class RecallTask:
    """Samples to be made.

    Args:
        name: one of `TASKS`.
        length: tokens of a sample, question and answer included.
        count: how many samples.
        seed: of everything random.
        split: `eval` or `probe`.
        depths: the facts that are asked for stand between these shares of the text, spread evenly over the samples.
    """

    name: str
    length: int
    count: int
    seed: int = 0
    split: str = "eval"
    depths: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if self.name not in TASKS:
            raise UnknownNameError("recall task", self.name, TASKS)
        if self.split not in SPLITS:
            raise UnknownNameError("split of the recall tasks", self.split, SPLITS)
        if self.count < 1:
            raise LinearizeError(f"The recall task {self.name} asks for {self.count} samples; ask for 1 or more.")


@dataclass(frozen=True)
class Sample:
    """One text with a question.

    Attributes:
        prompt_ids: everything before the answer.
        answer_ids: what a model should go on with.
        depth: where the fact stands, as a share of the text before the question (of several, the first).
        scored: which of `answer_ids` count; between several answers stand the next questions, which do not.
    """

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    depth: float
    scored: tuple[bool, ...]


@dataclass(frozen=True)
class SampleScore:
    """One sample: whether every scored token was the model's first choice, the share of them that was, their summed
    log-probability in nats, and the sample's depth.
    """

    exact: bool
    token_accuracy: float
    log_prob: float
    depth: float


@dataclass(frozen=True)
class RecallScore:
    """Means over samples.

    Attributes:
        accuracy: share of samples answered exactly.
        low: lower end of its 95 % Wilson interval.
        high: upper end.
        log_prob: mean over samples of the answer's log-probability in nats.
        token_accuracy: mean over samples of the share of answer tokens that are right.
        per_sample: in the samples' order.
    """

    accuracy: float
    low: float
    high: float
    log_prob: float
    token_accuracy: float
    per_sample: tuple[SampleScore, ...]


def make_samples(task: RecallTask, tokenizer: Any) -> list[Sample]:
    """Return a task's samples, each of exactly `task.length` tokens; the same arguments make the same samples.

    Facts stand at the end of the sentence nearest before their depth.

    Args:
        task: what to make.
        tokenizer: of transformers; special tokens that it puts in front of a text are kept.

    Raises:
        LinearizeError: the length has no room for the question, the facts and the answer.
    """
    kind = TASKS[task.name]
    rng = random.Random(f"{task.split} {task.name} {task.length} {task.seed}")
    sentences = [_encode(tokenizer, f" {text}") for text in haystack(task.split, kind.noise)]
    start, end = task.depths
    steps = [0.5] if task.count == 1 else [index / (task.count - 1) for index in range(task.count)]
    return [_sample(task, kind, tokenizer, rng, sentences, start + (end - start) * step) for step in steps]


def score(model: nn.Module, samples: Sequence[Sample], batch: int = 8) -> RecallScore:
    """Score a model on samples, teacher-forced.

    A sample counts as exact where every answer token is the argmax behind the right answer so far. That is the same as
    a greedy continuation that equals the answer: both part at the first token that is not the argmax, or at none.

    Args:
        model: a causal language model of transformers, also inside a peft wrapper.
        samples: of any lengths; those of one length are batched.
        batch: rows of a batch.

    Raises:
        LinearizeError: there are no samples.
    """
    if not samples:
        raise LinearizeError("There are no recall samples to score; make some with make_samples().")
    found: dict[int, SampleScore] = {}
    with evaluation_mode(model):
        device = next(model.parameters()).device
        for indices in batches(samples, batch):
            chosen = [samples[index] for index in indices]
            ids, mask = tensors(chosen)
            read = logits_reader(model, {"input_ids": ids.to(device)}, mask.to(device))
            targets = ids[mask.roll(1, 1)].to(device)
            found.update(zip(indices, sample_scores(chosen, read(slice(None)), targets), strict=True))
    return summary([found[index] for index in range(len(samples))])


def batches(samples: Sequence[Sample], size: int) -> Iterator[list[int]]:
    """Yield indices of up to `size` samples of one length."""

    def length(index: int) -> int:
        return len(samples[index].prompt_ids) + len(samples[index].answer_ids)

    for _, group in itertools.groupby(sorted(range(len(samples)), key=length), key=length):
        same = list(group)
        yield from (same[start : start + size] for start in range(0, len(same), size))


def tensors(samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """Return samples of one length as token ids [B, T] and the mask [B, T] of tokens that predict a scored one."""
    ids = torch.tensor([sample.prompt_ids + sample.answer_ids for sample in samples])
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for row, sample in enumerate(samples):
        mask[row, len(sample.prompt_ids) - 1 : -1] = torch.tensor(sample.scored)
    return ids, mask


def sample_scores(samples: Sequence[Sample], logits: Tensor, targets: Tensor) -> list[SampleScore]:
    """Return each sample's score from the logits [A, V] that predict its scored tokens, `targets` [A], in order."""
    log_probs = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0].double().cpu()
    right = (logits.argmax(-1) == targets).double().cpu()
    counts = [sum(sample.scored) for sample in samples]
    return [
        SampleScore(bool(hits.all()), float(hits.mean()), float(chance.sum()), sample.depth)
        for sample, hits, chance in zip(samples, right.split(counts), log_probs.split(counts), strict=True)
    ]


def summary(scores: Sequence[SampleScore]) -> RecallScore:
    """Return the means over samples."""
    count, exact = len(scores), sum(one.exact for one in scores)
    low, high = wilson(exact, count)
    log_prob, right = (
        sum(values) / count for values in zip(*((one.log_prob, one.token_accuracy) for one in scores), strict=True)
    )
    return RecallScore(exact / count, low, high, log_prob, right, tuple(scores))


def wilson(hits: int, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a share (Wilson, 1927), which stays inside [0, 1] and is no point at 0 or 1."""
    share, square = hits / count, Z95**2 / count
    centre = share + square / 2
    reach = Z95 * math.sqrt(share * (1 - share) / count + square / (4 * count))
    return max(0.0, (centre - reach) / (1 + square)), min(1.0, (centre + reach) / (1 + square))


def _sample(
    task: RecallTask, kind: Kind, tokenizer: Any, rng: random.Random, sentences: list[list[int]], depth: float
) -> Sample:
    wording: Wording = SPLITS[task.split][kind.wording]
    adjectives, nouns = KEYS[task.split]
    keys = rng.sample([f"{adjective}-{noun}" for adjective in adjectives for noun in nouns], kind.needles)
    words = {"kind": kind.value}
    values = [_value(kind, rng) for _ in keys]
    depths = [depth] if kind.needles == 1 else [rng.random() for _ in keys]
    asked = sorted(rng.sample(range(kind.needles), kind.queries))
    start, end = task.depths
    for index in asked:
        depths[index] = start + (end - start) * depths[index]
    depths[asked[0]] = depth
    facts = [wording.fact.format(key=key, value=value, **words) for key, value in zip(keys, values, strict=True)]
    needles = [(at, _encode(tokenizer, f" {fact}")) for at, fact in zip(depths, facts, strict=True)]
    head = [*_special(tokenizer), *_encode(tokenizer, wording.intro.format(**words))]
    tail: list[int] = []
    answer: list[int] = []
    scored: list[bool] = []
    for place, index in enumerate(asked):
        question = (wording.question if place == 0 else wording.again).format(key=keys[index], **words)
        asking, answering = _continuation(tokenizer, question, f" {values[index]}")
        if place:
            answer, scored = [*answer, *asking], [*scored, *[False] * len(asking)]
        else:
            tail = asking
        answer, scored = [*answer, *answering], [*scored, *[True] * len(answering)]
    fixed = len(head) + sum(len(ids) for _, ids in needles) + len(tail) + len(answer)
    if fixed > task.length:
        raise LinearizeError(
            f"A sample of the recall task {task.name} has {fixed} tokens besides its filler, and {task.length} were "
            f"asked for; take a length of {fixed} or more."
        )
    text = _filled(rng, sentences, needles, task.length - fixed)
    return Sample((*head, *text, *tail), tuple(answer), depth, tuple(scored))


def _filled(
    rng: random.Random, sentences: list[list[int]], needles: list[tuple[float, list[int]]], budget: int
) -> list[int]:
    """Return `budget` tokens of filler, from a random sentence on, with the needles between its sentences."""
    first = rng.randrange(len(sentences))
    filler: list[int] = []
    borders = [0]
    for step in itertools.count():
        if len(filler) >= budget:
            break
        filler += sentences[(first + step) % len(sentences)]
        borders.append(min(len(filler), budget))
    filler = filler[:budget]
    text: list[int] = []
    done = 0
    for depth, needle in sorted(needles, key=lambda pair: pair[0]):
        border = max(place for place in borders if place <= depth * budget)
        text += [*filler[done:border], *needle]
        done = border
    return text + filler[done:]


def _value(kind: Kind, rng: random.Random) -> str:
    if kind.value == "uuid":
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    return str(rng.randrange(10 ** (kind.digits - 1), 10**kind.digits))


def _encode(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids


def _special(tokenizer: Any) -> list[int]:
    """The special tokens that the tokenizer puts in front of a text (its begin-of-text token, or none)."""
    plain, full = _encode(tokenizer, "a"), tokenizer("a").input_ids
    return list(full[: full.index(plain[0])])


def _continuation(tokenizer: Any, question: str, answer: str) -> tuple[list[int], list[int]]:
    """Return the tokens of question + answer, cut where the answer's begin.

    A blank that is a token of its own belongs to the question: whether a model would write it says nothing of recall.
    """
    alone, both = _encode(tokenizer, question), _encode(tokenizer, question + answer)
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(alone, both, strict=False)))
    same += sum(1 for _ in itertools.takewhile(lambda token: not tokenizer.decode([token]).strip(), both[same:]))
    return both[:same], both[same:]

"""Suites: what an evaluation measures, and how much of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from linearize.errors import LinearizeError, UnknownNameError
from linearize.eval.recall import TASKS as RECALL
from linearize.eval.task_data import TASKS as ZERO_SHOT

NONE = "none"


@dataclass(frozen=True)
class Suite:
    """Sizes of an evaluation; 0 or an empty tuple leaves a part out.

    Attributes:
        name: of the suite.
        rows: rows of each text, at most; the run's own held-out rows are no more than they were.
        length: tokens of such a row, at most.
        recall: tasks of `linearize.eval.recall`.
        recall_lengths: tokens of a sample.
        samples: of each recall task and length, and of each generation task.
        generation: whether the model also writes: copy, reversal, list, and GSM8K where there is a local file.
        tasks: of lm-evaluation-harness.
        limit: questions of each of these tasks; None for all.
        contexts: at which speed and memory are measured.
        speed_batches: rows at once there.
    """

    name: str
    rows: int
    length: int
    recall: tuple[str, ...] = ()
    recall_lengths: tuple[int, ...] = ()
    samples: int = 0
    generation: bool = True
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    contexts: tuple[int, ...] = ()
    speed_batches: tuple[int, ...] = ()

    def settings(self) -> dict[str, Any]:
        """Return the sizes as plain values."""
        return asdict(self)


SUITES = {
    suite.name: suite
    for suite in (
        Suite("quick", rows=6, length=512, recall=("passkey",), recall_lengths=(256, 512), samples=6),
        Suite(
            "paper",
            rows=128,
            length=2048,
            recall=tuple(RECALL),
            recall_lengths=(512, 1024, 2048, 4096),
            samples=500,
            tasks=tuple(ZERO_SHOT),
        ),
        Suite(
            "full",
            rows=64,
            length=8192,
            recall=tuple(RECALL),
            recall_lengths=(256, 512, 1024, 2048, 4096, 8192, 16384, 32768),
            samples=500,
            tasks=tuple(ZERO_SHOT),
            contexts=(1024, 4096, 16384, 65536),
            speed_batches=(1, 16),
        ),
    )
}


def choose_suite(
    name: str,
    *,
    recall: str | None = None,
    lengths: str | None = None,
    tasks: str | None = None,
    contexts: str | None = None,
    batches: str | None = None,
    **sizes: int | None,
) -> Suite:
    """Return a suite with what a user changed.

    Args:
        name: a key of `SUITES`.
        recall: recall tasks, separated by commas, or `none`.
        lengths: tokens of a recall sample, separated by commas.
        tasks: tasks of lm-evaluation-harness, separated by commas, or `none`.
        contexts: at which speed is measured, separated by commas, or `none`.
        batches: rows at once there, separated by commas.
        **sizes: rows, length, samples, limit, and whether there is generation; None keeps the suite's.

    Raises:
        LinearizeError: a name that does not exist, no number where one is needed, or a setting that would do nothing.
    """
    if name not in SUITES:
        raise UnknownNameError("suite", name, SUITES, "--suite")
    changes: dict[str, Any] = {key: value for key, value in sizes.items() if value is not None}
    if recall is not None:
        changes["recall"] = _names(recall, RECALL, "recall task", "--recall")
    if tasks is not None:
        changes["tasks"] = _names(tasks, ZERO_SHOT, "task", "--tasks")
    for key, given, flag in (
        ("recall_lengths", lengths, "--lengths"),
        ("contexts", contexts, "--contexts"),
        ("speed_batches", batches, "--batches"),
    ):
        if given is not None:
            changes[key] = _numbers(given, flag)
    suite = replace(SUITES[name], **changes)
    if suite.contexts and not suite.speed_batches:
        suite = replace(suite, speed_batches=(1,))
    idle = {
        "--limit": suite.limit is not None and not suite.tasks,
        "--lengths": lengths is not None and not suite.recall,
        "--batches": batches is not None and not suite.contexts,
        "--samples": sizes.get("samples") is not None and not suite.recall and not suite.generation,
    }
    for flag, useless in idle.items():
        if useless:
            raise LinearizeError(
                f"{flag} changes nothing in the suite {name!r} as it is chosen: nothing that it limits is measured. "
                "Leave it out, or add --tasks, --recall or --contexts."
            )
    return suite


def text_alone(suite: Suite, **asked: Any) -> Suite:
    """Return what of a suite an encoder can be measured on: texts, whose masked tokens it predicts.

    Args:
        suite: chosen for decoders.
        **asked: what a user gave to `choose_suite`.

    Raises:
        LinearizeError: the user asked for a part that needs a decoder.
    """
    for name in ("recall", "lengths", "samples", "tasks", "limit", "contexts", "batches"):
        if asked.get(name) not in (None, NONE):
            raise LinearizeError(
                f"--{name} {asked[name]} is for models that go on from a prompt, and this one is an encoder: only its "
                "masked tokens are measured. Leave it out."
            )
    return replace(
        suite, recall=(), recall_lengths=(), samples=0, generation=False, tasks=(), contexts=(), speed_batches=()
    )


def _names(text: str, known: Iterable[str], kind: str, flag: str) -> tuple[str, ...]:
    if text == NONE:
        return ()
    chosen = tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    if NONE in chosen or not chosen:
        raise LinearizeError(f"{flag} is {text!r}; give {kind}s, separated by commas, or `none` alone.")
    for word in chosen:
        if word not in known:
            raise UnknownNameError(kind, word, [*known, NONE], flag)
    return chosen


def _numbers(text: str, flag: str) -> tuple[int, ...]:
    words = [] if text == NONE else [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise LinearizeError(f"{flag} is {text!r}; expected whole numbers such as 512,1024, or `none`.")
    return tuple(sorted({int(word) for word in words}))

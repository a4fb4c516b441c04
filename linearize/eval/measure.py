"""Everything that a suite measures on one model, as plain values; what is measured is kept until all is."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from linearize.checkpoint import replace_text
from linearize.errors import LinearizeError
from linearize.eval.exact_match import Generated, gsm8k_task, made_tasks, match
from linearize.eval.quality import Quality, TeacherReference, evaluate
from linearize.eval.recall import RecallScore, RecallTask, Sample, make_samples, score, wilson
from linearize.eval.speed import measure_speed
from linearize.eval.suite import Suite
from linearize.eval.text import EvaluationText
from linearize.eval.zero_shot import zero_shot

DEPTHS = 5
GENERATION_TOKENS = 512
HARNESS_TOKENS = 2048
SPEED_TOKENS = 32

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Measured:
    """What was found on one model.

    Attributes:
        name: as tables show it.
        role: `teacher`, `student` or `control`.
        about: where the model is from, how it was changed.
        quality: on each text, by the text's name.
        recall: rows of task, length, accuracy with its interval, log-probability, and accuracy by depth.
        generation: rows of `MatchScore`.
        zero_shot: rows of `TaskScore`.
        speed: rows of `SpeedRow`.
        seconds: wall time.
    """

    name: str
    role: str
    about: dict[str, Any]
    quality: dict[str, Quality] = field(default_factory=dict)
    recall: list[dict[str, Any]] = field(default_factory=list)
    generation: list[dict[str, Any]] = field(default_factory=list)
    zero_shot: list[dict[str, Any]] = field(default_factory=list)
    speed: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0

    def row(self) -> dict[str, Any]:
        """Return it as plain values for JSON."""
        parts = {key: getattr(self, key) for key in ("recall", "generation", "zero_shot", "speed")}
        text = {
            name: {**quality.row(name), "loss": quality.loss, "row_losses": quality.row_losses}
            for name, quality in self.quality.items()
        }
        found = {key: rows for key, rows in parts.items() if rows}
        return {"name": self.name, "role": self.role, **self.about, "text": text, **found, "seconds": self.seconds}


class Kept:
    """The answers of an evaluation under way, in a file, so that one that was stopped goes on behind them.

    Args:
        path: of the file; it and its folder are made with the first answers.
        about: what the answers depend on, as plain values; answers to something else are not used.
    """

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path, self.about = path, json.loads(json.dumps(about))
        self.rows: dict[str, tuple[Any, float]] = {}
        self.spared = 0.0  # seconds of earlier processes whose answers were used
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["about"] == self.about:
                self.rows = dict(found["rows"])
        except (OSError, ValueError, TypeError, KeyError):  # none, or half of one
            pass

    def once(self, part: str, tell: Tell, measure: Callable[[], Any]) -> Any:
        """Return what a part was measured to be, now or before it was stopped.

        Raises:
            LinearizeError: the file cannot be written.
        """
        if part in self.rows:
            self.spared += self.rows[part][1]
        else:
            tell(part)
            began = time.perf_counter()
            found = measure()
            self.rows[part] = found, time.perf_counter() - began
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                replace_text(self.path, json.dumps({"about": self.about, "rows": self.rows}))
            except OSError as error:
                raise LinearizeError(
                    f"{self.path} cannot be written: {error.strerror}. Give another folder with --output."
                ) from error
        return self.rows[part][0]


class Bench:
    """A suite made ready: its texts, samples and prompts, the same for every model.

    Args:
        suite: sizes.
        texts: to measure perplexity on.
        tokenizer: the teacher's, which is the student's too.
        seed: of samples and prompts.
        task_data: folder with local task files, or None.
        tokens: of a forward pass, which sets how many rows run at once.
        kept: where answers are kept as they come.
    """

    def __init__(
        self,
        suite: Suite,
        texts: Sequence[EvaluationText],
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
        task_data: Path | None,
        tokens: int,
        kept: Kept,
    ) -> None:
        self.kept = kept
        self.suite = suite
        self.texts = texts
        self.tokenizer = tokenizer
        self.task_data = task_data
        self.tokens = tokens
        self.references: dict[str, TeacherReference] = {}
        self.samples: dict[tuple[str, int], list[Sample]] = {
            (task, length): make_samples(RecallTask(task, length, suite.samples, seed), tokenizer)
            for task in suite.recall
            for length in suite.recall_lengths
        }
        self.prompts: list[Generated] = made_tasks(suite.samples, seed) if suite.generation else []
        if suite.generation and task_data is not None and has_gsm8k(task_data):
            self.prompts.append(gsm8k_task(task_data, suite.samples))

    def check_context(self, context: int) -> None:
        """Raise unless everything fits models that have a learned position for so many tokens and no more.

        Raises:
            LinearizeError: something is longer; the message names each option and the longest that fits.
        """
        suite, over = self.suite, []
        for text in self.texts:
            if (longest := int(text.rows.position_ids.max()) + 1) > context:
                over.append(f"{text.name!r} has documents of {longest} tokens a row (--length {context} or less)")
        if suite.recall and (longest := max(suite.recall_lengths)) > context:
            over.append(f"a recall sample has {longest} tokens with its answer (--lengths {context} or less)")
        for task in self.prompts:
            read = max(len(self.tokenizer.encode(prompt.text, verbose=False)) for prompt in task.prompts)
            if read + task.new_tokens - 1 > context:  # the last token that is written is not read again
                way = "a --task-data without gsm8k.jsonl" if task.name == "gsm8k" else "--no-generation"
                over.append(f"{task.name} reads {read} tokens and writes {task.new_tokens} ({way})")
        room = SPEED_TOKENS + 1  # one more warms up
        if suite.contexts and (longest := max(suite.contexts)) + room > context:
            over.append(f"speed is measured {room} tokens beyond {longest} (--contexts {context - room} or less)")
        if over:
            raise LinearizeError(
                f"The model has learned positions, {context} of them (max_position_embeddings), and cannot read what "
                f"lies behind: {'; '.join(over)}. Change what the brackets name."
            )

    def rows_at_once(self, length: int) -> int:
        """Return how many rows of a length run at once."""
        return max(1, self.tokens // length)

    def teacher(self, model: Any, name: str, about: dict[str, Any], tell: Tell) -> Measured:
        """Measure the teacher, and keep what the others are compared with."""
        for text in self.texts:
            self.references[text.name] = TeacherReference(model, text.rows, self.rows_at_once(text.rows.length))
        quality = {name: reference.quality for name, reference in self.references.items()}
        return self.model(model, name, "teacher", about, tell, quality=quality)

    def model(
        self,
        model: Any,
        name: str,
        role: str,
        about: dict[str, Any],
        tell: Tell,
        *,
        quality: dict[str, Quality] | None = None,
        text_only: bool = False,
        speed: bool = True,
    ) -> Measured:
        """Measure one model.

        Args:
            model: on its device.
            name: of the row.
            role: `teacher`, `student` or `control`.
            about: what else the row says.
            tell: told of every part before it starts.
            quality: where perplexities are known already.
            text_only: measure perplexity and divergence alone.
            speed: whether speed is measured too.
        """
        began, spared = time.perf_counter(), self.kept.spared
        found = Measured(name, role, about, quality or {})
        for text in [] if quality else self.texts:
            tell(f"{name}: {text.name}")
            reference = self.references.get(text.name)
            found.quality[text.name] = evaluate(model, text.rows, reference, self.rows_at_once(text.rows.length))
        if not text_only:
            self._answers(model, name, found, tell)
            if speed:
                self._speed(model, name, found, tell)
        seconds = time.perf_counter() - began + self.kept.spared - spared
        return Measured(**{**vars(found), "seconds": round(seconds, 1)})

    def _answers(self, model: Any, name: str, found: Measured, tell: Tell) -> None:
        def recall(task: str, length: int) -> dict[str, Any]:
            samples = self.samples[task, length]
            return recall_row(task, length, score(model, samples, self.rows_at_once(length)))

        def written(prompts: Generated) -> dict[str, Any]:
            return match(model, self.tokenizer, prompts, self.rows_at_once(GENERATION_TOKENS)).row()

        def tasks() -> list[dict[str, Any]]:
            suite, batch = self.suite, self.rows_at_once(HARNESS_TOKENS)
            scores = zero_shot(model, self.tokenizer, suite.tasks, data=self.task_data, limit=suite.limit, batch=batch)
            return [task.row() for task in scores]

        for task, length in self.samples:
            part = f"{name}: {task} at {length:,} tokens"
            found.recall.append(self.kept.once(part, tell, partial(recall, task, length)))
        for prompts in self.prompts:
            found.generation.append(self.kept.once(f"{name}: {prompts.name}", tell, partial(written, prompts)))
        if self.suite.tasks:
            found.zero_shot.extend(self.kept.once(f"{name}: {', '.join(self.suite.tasks)}", tell, tasks))

    def _speed(self, model: Any, name: str, found: Measured, tell: Tell) -> None:
        """Measure all of a model's speeds, kept from no earlier process: they stand beside one another."""
        for batch in self.suite.speed_batches if self.suite.contexts else ():
            for context in self.suite.contexts:
                tell(f"{name}: speed at {context:,} tokens, batch {batch}")
                found.speed.append(measure_speed(model, context, batch, new_tokens=SPEED_TOKENS).row())


def has_gsm8k(folder: Path) -> bool:
    """Tell whether a folder of task data has GSM8K."""
    return any(folder.glob("gsm8k*.jsonl*"))


def recall_row(task: str, length: int, found: RecallScore) -> dict[str, Any]:
    """Return a recall score as plain values, with the accuracy by depth in fifths of the text."""
    fifths: list[list[bool]] = [[] for _ in range(DEPTHS)]
    for sample in found.per_sample:
        fifths[min(int(sample.depth * DEPTHS), DEPTHS - 1)].append(sample.exact)
    by_depth = []
    for index, hits in enumerate(fifths):
        if hits:
            low, high = wilson(sum(hits), len(hits))
            span = {"start": index / DEPTHS, "stop": (index + 1) / DEPTHS, "samples": len(hits)}
            by_depth.append({**span, "accuracy": sum(hits) / len(hits), "low": low, "high": high})
    values = {key: getattr(found, key) for key in ("accuracy", "low", "high", "log_prob", "token_accuracy")}
    return {"task": task, "length": length, "samples": len(found.per_sample), **values, "by_depth": by_depth}

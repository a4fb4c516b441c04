"""Zero-shot and few-shot tasks through lm-evaluation-harness, on a model object; its own tasks, prompts and scores.

The harness is an extra: `pip install 'linearize[lm_eval]'`.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from linearize.errors import LinearizeError, UnknownNameError
from linearize.eval.logits import evaluation_mode
from linearize.eval.task_data import TASKS, write_dataset

SHOTS = {"mmlu": 5}
GROUP = "linearize"
MMLU_PARTS = ("stem", "other", "social_sciences", "humanities")
BOOTSTRAP = 100  # of LAMBADA's perplexity, which is not reported; accuracies have their standard error in closed form
METRICS = {"arc_challenge": "acc_norm", "hellaswag": "acc_norm"}


@dataclass(frozen=True)
class TaskScore:
    """A task's score as the field reports it.

    Attributes:
        task: the harness's name.
        metric: `acc`, or `acc_norm` (ARC-Challenge, HellaSwag).
        score: between 0 and 1.
        stderr: of the score, as the harness computes it.
        shots: examples before each question.
        samples: questions.
    """

    task: str
    metric: str
    score: float
    stderr: float
    shots: int
    samples: int

    def row(self) -> dict[str, Any]:
        """Return the score as plain values."""
        return asdict(self)


def check_tasks(tasks: Sequence[str]) -> None:
    """Raise unless the harness is installed and knows the tasks.

    Raises:
        LinearizeError: a task has another name, or lm-evaluation-harness is missing.
    """
    for task in tasks:
        if task not in TASKS:
            raise UnknownNameError("task", task, TASKS, "--tasks")
    if tasks and importlib.util.find_spec("lm_eval") is None:
        raise LinearizeError(
            f"The tasks {', '.join(tasks)} need lm-evaluation-harness, which is not installed. Type "
            "`pip install 'lm_eval>=0.4.13'`, or leave them out with --tasks none."
        )


def zero_shot(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    data: Path | None = None,
    limit: int | None = None,
    batch: int = 8,
    max_length: int | None = None,
    subjects: Sequence[str] | None = None,
) -> list[TaskScore]:
    """Score a model on tasks of lm-evaluation-harness.

    Args:
        model: a causal language model of transformers, on its device.
        tokenizer: its tokenizer.
        tasks: keys of `TASKS`; MMLU with 5 examples, the others with none.
        data: folder with local rows; the tasks' data sets on the Hugging Face Hub by default.
        limit: questions per task (per subject of MMLU); all by default.
        batch: rows at once.
        max_length: tokens of a prompt; the model's own context by default.
        subjects: the harness's names of the parts of MMLU; all 57 by default.

    Returns:
        One score per task, in the order given.

    Raises:
        LinearizeError: what `check_tasks` raises, or the data cannot be had.
    """
    check_tasks(tasks)
    import datasets
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(model))
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="linearize-tasks-")))
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch, max_length=max_length)
        manager = TaskManager()
        if subjects is None:
            subjects = [name for part in MMLU_PARTS for name in sorted(manager.task_index[f"mmlu_{part}_tasks"].tags)]
        try:
            found = simple_evaluate(
                wrapped,
                tasks=[task_group(tasks, subjects, data, place)],
                task_manager=manager,
                limit=limit,
                log_samples=False,
                bootstrap_iters=BOOTSTRAP,
            )
        except (datasets.exceptions.DatasetsError, OSError) as error:
            raise LinearizeError(
                f"The data of the tasks {', '.join(tasks)} cannot be had: {' '.join(str(error).split())[:300]}. Check "
                "the connection, or give local files with --task-data."
            ) from error
    return [task_score(task, found) for task in tasks]


def task_group(tasks: Sequence[str], subjects: Sequence[str], data: Path | None, place: Path) -> dict[str, Any]:
    """Return the harness's own tasks as one group, with local data in the place of the Hub's where there is a folder.

    Args:
        tasks: keys of `TASKS`.
        subjects: the harness's names of the parts of MMLU.
        data: folder with local rows, or None.
        place: an empty folder for the data sets that are made of them.
    """
    members: list[dict[str, Any]] = []
    for task in tasks:
        changes: dict[str, Any] = {"num_fewshot": SHOTS[task]} if task in SHOTS else {}
        if data is not None:
            changes["dataset_path"] = str(write_dataset(task, data, place / task))
            changes["dataset_kwargs"] = {"cache_dir": str(place / "cache")}
            changes |= {f"{split}_split": None for split in absent_splits(task)}
        if TASKS[task].per_subject:
            parts = [{"task": name, **changes} for name in subjects]
            mean = [{"metric": "acc", "weight_by_size": True}]
            members.append({"group": f"all_{task}", "task": parts, "aggregate_metric_list": mean})
        else:
            members.append({"task": task, **changes})
    return {"group": GROUP, "task": members}


def absent_splits(task: str) -> list[str]:
    """Return the splits that the harness may look for and local data does not have."""
    held = {"training": "train", "validation": "validation", "test": "test"}
    return [name for name, split in held.items() if split not in TASKS[task].splits]


def task_score(task: str, found: Any) -> TaskScore:
    """Return a task's score out of the harness's results."""
    metric = METRICS.get(task, "acc")
    values = found["results"][f"{GROUP}::all_{task}" if TASKS[task].per_subject else task]
    names = [name for name in found["n-samples"] if name == task or name.startswith(f"{task}_")]
    error = values[f"{metric}_stderr,none"]
    return TaskScore(
        task,
        metric,
        score=float(values[f"{metric},none"]),
        stderr=float(error) if isinstance(error, int | float) else math.nan,  # a single question has none
        shots=SHOTS.get(task, 0),
        samples=sum(found["n-samples"][name]["effective"] for name in names),
    )

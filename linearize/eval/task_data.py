"""Local benchmark files -> data sets in the columns that lm-evaluation-harness reads, so that its own prompts serve.

A folder (`--task-data`) holds JSON lines, as they are or packed with xz or gzip, one file per task and split. Rows may
already have the columns of the benchmark's data set on the Hub; ARC, PIQA, WinoGrande and LAMBADA may also come as
query, choices and answer.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from linearize.data.readers import COMPRESSIONS, Row, file_type, read_file
from linearize.errors import LinearizeError

LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True)
class TaskFiles:
    """Where a task's rows come from and how they become its columns.

    Args:
        splits: of the harness's data set, by name: the stems of local files that may hold it.
        convert: a local row -> the columns that the harness's prompt reads.
        config: the configuration's name in the harness, or None; `per_subject` takes it from each row.
    """

    splits: dict[str, tuple[str, ...]]
    convert: Callable[[Row], Row]
    config: str | None = None
    per_subject: bool = False


def _piqa(row: Row) -> Row:
    if "goal" in row:
        return {key: row[key] for key in ("goal", "sol1", "sol2", "label")}
    first, second = row["choices"]
    return {"goal": _question(row["query"]), "sol1": first, "sol2": second, "label": int(row["gold"])}


def _arc(row: Row) -> Row:
    if "question" in row:
        return {key: row[key] for key in ("question", "choices", "answerKey")}
    labels = list(LETTERS[: len(row["choices"])])
    return {
        "question": _question(row["query"]),
        "choices": {"text": list(row["choices"]), "label": labels},
        "answerKey": labels[int(row["gold"])],
    }


def _hellaswag(row: Row) -> Row:
    columns = ("activity_label", "ctx_a", "ctx_b", "endings", "label")
    return {key: str(row[key]) if key == "label" else row[key] for key in columns}


def _winogrande(row: Row) -> Row:
    if "sentence" in row:
        return {key: row[key] for key in ("sentence", "option1", "option2", "answer")}
    first, second = row["context_options"]
    shared = next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b),
        min(map(len, row["context_options"])),
    )
    return {
        "sentence": f"{first[:shared]}_ {row['continuation']}",
        "option1": first[shared:],
        "option2": second[shared:],
        "answer": str(int(row["gold"]) + 1),
    }


def _lambada(row: Row) -> Row:
    return {"text": row["text"] if "text" in row else f"{row['context']} {row['continuation']}"}


def _mmlu(row: Row) -> Row:
    return {key: row[key] for key in ("question", "subject", "choices", "answer")}


def _question(query: str) -> str:
    """The bare question: the harness writes "Question: ...\\nAnswer:" around it."""
    return query.removeprefix("Question: ").removesuffix("\n")


TASKS: dict[str, TaskFiles] = {
    "piqa": TaskFiles({"validation": ("piqa", "piqa_val", "piqa_validation")}, _piqa),
    "arc_easy": TaskFiles({"test": ("arc_easy", "arc_easy_test")}, _arc, "ARC-Easy"),
    "arc_challenge": TaskFiles({"test": ("arc_challenge", "arc_challenge_test")}, _arc, "ARC-Challenge"),
    "hellaswag": TaskFiles({"validation": ("hellaswag_val", "hellaswag_validation", "hellaswag")}, _hellaswag),
    "winogrande": TaskFiles(
        {"validation": ("winogrande", "winogrande_val", "winogrande_validation")}, _winogrande, "winogrande_xl"
    ),
    "lambada_openai": TaskFiles({"test": ("lambada_openai", "lambada_openai_test")}, _lambada, "default"),
    "mmlu": TaskFiles({"test": ("mmlu_test",), "dev": ("mmlu_dev",)}, _mmlu, per_subject=True),
}


def find_file(folder: Path, stems: tuple[str, ...], what: str) -> Path:
    """Return the file of a folder that has one of these stems, such as `piqa.jsonl.xz`.

    Raises:
        LinearizeError: the folder has none.
    """
    packed = ["", *COMPRESSIONS]
    for stem in stems:
        for end in packed:
            path = folder / f"{stem}.jsonl{end}"
            if path.is_file():
                return path
    held = ", ".join(sorted(path.name for path in folder.iterdir() if file_type(path))[:20]) or "no data file"
    raise LinearizeError(
        f"No file for {what} in {folder} (--task-data): it holds {held}. Expected {stems[0]}.jsonl (or .jsonl.xz, "
        ".jsonl.gz); add it, or choose other tasks with --tasks."
    )


def task_rows(task: str, split: str, folder: Path) -> Iterator[Row]:
    """Yield the rows of a task's split in the harness's columns.

    Raises:
        LinearizeError: the file is missing, or a row lacks a column.
    """
    files = TASKS[task]
    path = find_file(folder, files.splits[split], f"the task {task!r} ({split})")
    for number, row in enumerate(read_file(path), start=1):
        try:
            yield files.convert(row)
        except (KeyError, ValueError, IndexError, TypeError, AttributeError) as error:
            raise LinearizeError(
                f"Row {number} of {path} cannot be read for the task {task!r} ({type(error).__name__}: {error}). It "
                f"has the columns {', '.join(row)}; give the benchmark's own, or query, choices and gold."
            ) from error


def write_dataset(task: str, folder: Path, place: Path) -> Path:
    """Write a task's local rows as a data set that `datasets.load_dataset(place, config)` reads.

    Args:
        task: a key of `TASKS`.
        folder: with the local files.
        place: a new folder.

    Returns:
        `place`.
    """
    files = TASKS[task]
    configs: dict[str, dict[str, str]] = defaultdict(dict)
    place.mkdir(parents=True)
    for split in files.splits:
        parts: dict[str, list[Row]] = defaultdict(list)
        for row in task_rows(task, split, folder):
            parts[row["subject"] if files.per_subject else files.config or "default"].append(row)
        for config, rows in parts.items():
            name = f"{config}-{split}.jsonl"
            (place / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            configs[config][split] = name
    header = {"configs": [_config(name, parts) for name, parts in configs.items()]}
    (place / "README.md").write_text(f"---\n{json.dumps(header)}\n---\n", encoding="utf-8")
    return place


def _config(name: str, splits: dict[str, str]) -> dict[str, Any]:
    return {"config_name": name, "data_files": [{"split": split, "path": path} for split, path in splits.items()]}

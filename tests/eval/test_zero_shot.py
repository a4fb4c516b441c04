import importlib.util
import json
import lzma
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from linearize.errors import LinearizeError, UnknownNameError
from linearize.eval.task_data import TASKS, task_rows, write_dataset
from linearize.eval.zero_shot import SHOTS, check_tasks, task_group, zero_shot

HARNESS = importlib.util.find_spec("lm_eval") is not None
needs_harness = pytest.mark.skipif(not HARNESS, reason="lm-evaluation-harness (the extra lm_eval) is not installed")
SUBJECTS = ("abstract_algebra", "virology")

LOCAL = {
    "piqa": {"query": "Question: How do I dry socks?\n", "choices": ["In the sun.", "In the sea."], "gold": 0},
    "arc_easy": {"query": "Question: What is warm?", "choices": ["ice", "fire", "snow"], "gold": 1},
    "arc_challenge": {"query": "Question: What is cold?", "choices": ["ice", "fire", "the sun", "tea"], "gold": 0},
    "hellaswag": {
        "activity_label": "Cooking",
        "ctx_a": "A man cuts bread.",
        "ctx_b": "he",
        "endings": ["eats it.", "flies away.", "[title] sings.", "is bread."],
        "label": "0",
    },
    "winogrande": {
        "context_options": ["Mark met Mary because Mark", "Mark met Mary because Mary"],
        "continuation": "was late.",
        "gold": 1,
    },
    "lambada_openai": {"context": "He went home. At home he", "continuation": "slept"},
}
OFFICIAL = {
    "piqa": {"goal": "How do I dry socks?", "sol1": "In the sun.", "sol2": "In the sea.", "label": 0},
    "arc_easy": {
        "question": "What is warm?",
        "choices": {"text": ["ice", "fire", "snow"], "label": ["A", "B", "C"]},
        "answerKey": "B",
    },
    "winogrande": {
        "sentence": "Mark met Mary because _ was late.",
        "option1": "Mark",
        "option2": "Mary",
        "answer": "2",
    },
    "lambada_openai": {"text": "He went home. At home he slept"},
}


@pytest.fixture
def local(tmp_path: Path) -> Path:
    """A folder with a few rows of every task, some of them packed."""
    folder = tmp_path / "tasks"
    folder.mkdir()

    def write(name: str, rows: list[dict]) -> None:
        with lzma.open(folder / f"{name}.jsonl.xz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)

    for task, row in LOCAL.items():
        name = "hellaswag_val" if task == "hellaswag" else task
        write(name, [varied(row, index) for index in range(6)])
    questions = [
        {"question": f"{n} plus 1 in {subject}?", "subject": subject, "choices": ["1", "2", "3", "4"], "answer": n % 4}
        for subject in SUBJECTS
        for n in range(5)
    ]
    write("mmlu_dev", questions)
    write("mmlu_test", [{**row, "question": "Tell me: " + row["question"]} for row in questions[:-2]])
    return folder


def varied(row: dict, index: int) -> dict:
    """The row with other words in every question, so that no two are alike."""
    words = ("query", "context", "ctx_a")
    changed = {
        key: value.replace("?", f" {index}?").replace("He", f"Uncle {index}")
        for key, value in row.items()
        if key in words
    }
    if "context_options" in row:
        changed["context_options"] = [f"In {index} days {text}" for text in row["context_options"]]
    return {**row, **changed}


@pytest.mark.parametrize("task", OFFICIAL)
def test_local_rows_become_the_columns_of_the_hub(task: str) -> None:
    convert = TASKS[task].convert
    official = convert(OFFICIAL[task])
    made = convert(LOCAL[task])
    if task == "winogrande":  # the harness joins both: text before the blank, option, text behind it

        def joined(row):
            before, after = row["sentence"].split("_")
            return [before + row["option1"], before + row["option2"]], after.strip(), row["answer"]

        assert joined(made) == joined(official)
    else:
        assert made == official == OFFICIAL[task]


@pytest.mark.parametrize("options", [("Ann", "Anne"), ("Kay", "Kate"), ("it", "they")])
def test_any_two_options_come_back_whole(options) -> None:
    row = {"context_options": [f"So {name}" for name in options], "continuation": "won.", "gold": 0}
    made = TASKS["winogrande"].convert(row)
    before, _, after = made["sentence"].partition("_")
    assert [before + made["option1"], before + made["option2"]] == row["context_options"]
    assert after == " won."


def test_a_data_set_is_read_by_split_and_subject(local: Path, tmp_path: Path) -> None:
    import datasets

    place = write_dataset("mmlu", local, tmp_path / "mmlu")
    virology = datasets.load_dataset(str(place), "virology", cache_dir=str(tmp_path / "cache"))
    assert {name: len(part) for name, part in virology.items()} == {"test": 3, "dev": 5}
    assert set(virology["dev"]["subject"]) == {"virology"}
    piqa = datasets.load_dataset(
        str(write_dataset("piqa", local, tmp_path / "piqa")), cache_dir=str(tmp_path / "cache")
    )
    assert piqa["validation"][3]["goal"] == "How do I dry socks 3?"


def test_bad_task_data_is_named(local: Path, tmp_path: Path) -> None:
    (local / "piqa.jsonl").write_text('{"words": "no"}\n')
    with pytest.raises(LinearizeError, match=r"Row 1 of .*piqa.jsonl.* has the columns words"):
        list(task_rows("piqa", "validation", local))
    (tmp_path / "empty").mkdir()
    with pytest.raises(LinearizeError, match=r"No file for the task 'mmlu' \(dev\).*mmlu_dev.jsonl"):
        list(task_rows("mmlu", "dev", tmp_path / "empty"))


def test_an_unknown_task_or_a_missing_harness_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'piqa'"):
        check_tasks(["piqua"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LinearizeError, match="pip install"):
        check_tasks(["piqa"])
    check_tasks([])


@needs_harness
def test_scores_are_those_of_the_harness_own_model_on_the_folder(local: Path, make_teacher, tmp_path: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    from linearize.api import linearize, load

    overrides = ["data.length=64", "data.held_out=2", "mixer.window.size=16"]
    teacher = make_teacher(max_position_embeddings=512)
    folder = linearize(teacher, "liger", tmp_path / "out", quick=True, tokens=512, overrides=overrides).output
    tokenizer = AutoTokenizer.from_pretrained(folder)
    subjects = [f"mmlu_{name}" for name in SUBJECTS]
    tasks = list(TASKS)
    own = zero_shot(load(folder, dtype=torch.float32), tokenizer, tasks, data=local, batch=3, subjects=subjects)
    theirs = simple_evaluate(
        HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=1),
        tasks=[task_group(tasks, subjects, local, tmp_path / "again")],
        bootstrap_iters=10,
        log_samples=False,
    )
    for score in own:
        name = "linearize::all_mmlu" if score.task == "mmlu" else score.task
        assert score.score == theirs["results"][name][f"{score.metric},none"], score.task
        assert score.stderr == theirs["results"][name][f"{score.metric}_stderr,none"], score.task
    assert {score.task: score.samples for score in own} == {**dict.fromkeys(LOCAL, 6), "mmlu": 8}
    assert {score.task: score.metric for score in own if score.metric == "acc_norm"}.keys() == {
        "arc_challenge",
        "hellaswag",
    }
    assert {score.task: score.shots for score in own if score.shots} == SHOTS


@needs_harness
def test_the_right_answers_score_one_and_a_limit_limits(local: Path, make_teacher, monkeypatch) -> None:
    from lm_eval.models.huggingface import HFLM

    folder = make_teacher()

    def likes_fire(self, requests, **kwargs):
        return [(0.0 if request.args[1].strip() == "fire" else -9.0, False) for request in requests]

    monkeypatch.setattr(HFLM, "loglikelihood", likes_fire)
    from transformers import AutoModelForCausalLM

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    (score,) = zero_shot(model, tokenizer, ["arc_easy"], data=local, limit=4)
    assert (score.score, score.samples) == (1.0, 4)
    (single,) = zero_shot(model, tokenizer, ["arc_challenge"], data=local, limit=1)
    assert single.score == 0.0
    assert math.isnan(single.stderr)

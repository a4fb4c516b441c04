"""The table of an evaluation, measures down and models across, its page, and several evaluations side by side.

All take what `eval.json` holds: `models`, each with `name`, `role`, `text`, `recall`, `generation`, `zero_shot` and
`speed`; `differences`; `texts`; `provenance`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from linearize.eval.memory import format_bytes
from linearize.eval.tally import weighted_difference
from linearize.report.table import ABSENT, Cells, Results, duration, markdown_table, number, small

TRAINED_CACHE = 8192
CLEAR = 2.0  # standard errors from which on a difference is one; of few rows, Student's two-sided 95 % quantiles
FEW_ROWS = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}
SLIGHT = 0.001

QUALITY = ("perplexity", "× teacher", "KL to teacher", "same top token")
BEHIND = "loss behind student (nats)"

Models = Sequence[Results]


def evaluation_cells(results: Results) -> Cells:
    """Return the table of an evaluation: every measure a row, every model a column."""
    return model_cells(results["models"], differences=results.get("differences", ()))


def compare_cells(evaluations: Sequence[Results]) -> Cells:
    """Return several evaluations side by side: the first one's teacher, then every student.

    What zeroing the memory costs, the differences from the first student on the same rows, and the share of the
    teacher's cache follow below the measures.
    """
    students = [_student(results) for results in evaluations]
    names = [results["name"] for results in evaluations]
    if len(set(names)) < len(names):
        names = [student.get("folder", name) for student, name in zip(students, names, strict=True)]
    teacher = [model for model in evaluations[0]["models"] if model["role"] == "teacher"]
    columns = [*teacher, *({**student, "name": name} for student, name in zip(students, names, strict=True))]
    cells = model_cells(columns)
    blank = [ABSENT] * len(teacher)
    for text in dict.fromkeys(name for student in students for name in student["text"]):
        behind = [_behind(student, students[0], text) for student in students]
        cells.rows.append([f"{text}: loss behind {names[0]} (nats)", *blank, *behind])
        zeroed = [_zeroed(results, text) for results in evaluations]
        if any(value != ABSENT for value in zeroed):
            cells.rows.append([f"{text}: what zeroing the memory costs (nats)", *blank, *zeroed])
    shares = [_cache_share(results) for results in evaluations]
    if any(share != ABSENT for share in shares):
        own = ["100.0 %"] if teacher else []
        cells.rows.append([f"cache at {TRAINED_CACHE:,} tokens, share of the teacher's", *own, *shares])
    return cells


def text_cells(results: Results) -> Cells:
    """Return perplexity and divergence alone, one line per model and text."""
    lost = {entry["name"]: entry["text"] for entry in results["differences"]}
    teacher = _teacher_text(results["models"])
    rows = [
        [model["name"], text, *_quality(model, text, teacher), gap(lost.get(model["name"], {}).get(text))]
        for text in _keys(results["models"], "text")
        for model in results["models"]
    ]
    return Cells(["", "text", *QUALITY, BEHIND], rows)


def answer_cells(results: Results) -> Cells:
    """Return recall, generation and tasks alone, one column per model that answered."""
    answered = [
        {**model, "text": {}} for model in results["models"] if model.keys() & {"recall", "generation", "zero_shot"}
    ]
    return model_cells(answered)


def model_cells(models: Models, differences: Sequence[Results] = ()) -> Cells:
    """Return a table with one column per model; a row only if some model has its number.

    Args:
        models: entries of `models`.
        differences: entries of `differences`, for the rows of what controls lose.
    """
    rows: list[list[str]] = []
    teacher = _teacher_text(models)
    for text in _keys(models, "text"):
        measured = [_quality(model, text, teacher) for model in models]
        rows += [
            [f"{text}: {title}", *cells] for title, cells in zip(QUALITY, zip(*measured, strict=True), strict=True)
        ]
        lost = {entry["name"]: entry["text"].get(text) for entry in differences}
        rows.append([f"{text}: {BEHIND}", *(gap(lost.get(model["name"])) for model in models)])
    for part in ("recall", "generation", "zero_shot"):
        for name, title in _measures(models, part).items():
            rows.append([title, *(_score(model.get(part, ()), name) for model in models)])
    return Cells(["", *(model["name"] for model in models)], [row for row in rows if set(row[1:]) != {ABSENT}])


def speed_cells(results: Results) -> Cells:
    """Return speed and memory by context and batch, one line per model and point."""
    rows = [
        [
            f"{row['context']:,} × {row['batch']}",
            model["name"],
            *(
                [row["note"] or ABSENT] + [ABSENT] * 4
                if row["first_token"] is None
                else [
                    f"{1000 * row['first_token']:,.1f} ms",
                    number(row["prefill"]),
                    number(row["decode"]),
                    format_bytes(row["cache_bytes"]),
                    ABSENT if row["peak_bytes"] is None else format_bytes(row["peak_bytes"]),
                ]
            ),
        ]
        for model in results["models"]
        for row in model.get("speed", ())
    ]
    header = ["context × batch", "model", "first token", "prefill tokens/s", "decode tokens/s", "cache", "peak memory"]
    return Cells(header, sorted(rows, key=lambda row: _order(row[0])))


def position_cells(results: Results, text: str) -> Cells:
    """Return perplexity by position in the document, one column per model."""
    models = [model for model in results["models"] if text in model["text"]]
    spans = models[0]["text"][text]["by_position"] if models else []
    rows = []
    for index, span in enumerate(spans):
        values = [number(_exp(model["text"][text]["by_position"][index]["loss"])) for model in models]
        rows.append([f"{span['start']:,}–{span['stop'] - 1:,}", *values])
    return Cells(["tokens before", *(model["name"] for model in models)], rows)


def verdicts(results: Results) -> list[str]:
    """Return in words what the memory and the training behind each control are worth, one sentence each."""
    found: list[str] = []
    entries = results.get("differences", [])
    if not any(entry["name"] == "memory zeroed" for entry in entries):
        found.append("The model has no memory: nothing is kept beyond its windows and exact heads.")
    for entry in entries:
        if entry["name"] == "memory zeroed":
            found += [f"Memory: {_sentence(text, value)}" for text, value in entry["text"].items()]
            found += _moved(entry["answers"])
    for entry in entries:
        model: Results = next((one for one in results["models"] if one["name"] == entry["name"]), {})
        if model.get("trained"):
            for text, value in entry["text"].items():
                word = "ahead of" if value["nats"] is not None and value["nats"] > 0 else "behind"
                trained = f"{entry['name']} (recipe {model['recipe']})"
                found.append(f"The student is {word} {trained} on {text} by {gap(value).lstrip('+-')} nats a token.")
    return found


def evaluation_page(results: Results, figures: Sequence[str] = ()) -> str:
    """Return an evaluation as Markdown.

    Args:
        results: what `eval.json` holds.
        figures: file names of pictures beside the page.
    """
    provenance = results["provenance"]
    parts = [
        f"# {results['name']}: {results['model']}, recipe {results['recipe']}",
        " ".join(verdicts(results)),
        markdown_table(evaluation_cells(results)),
        "Recall and generation: accuracy with its 95 % interval. Tasks of lm-evaluation-harness: score ± standard "
        "error. Controls change the finished student, but for those that name a recipe, which were trained.",
    ]
    for text in results["texts"]:
        cells = position_cells(results, text["name"])
        if len(cells.rows) > 1:
            title = f"## Perplexity by position: {text['name']}\n\n{text['rows']} rows of {text['length']:,} tokens, "
            parts.append(f"{title}`{text['source']}`.\n\n{markdown_table(cells)}")
    speed = speed_cells(results)
    if speed.rows:
        parts.append(f"## Speed and memory\n\nEager mode, the same loop for all.\n\n{markdown_table(speed)}")
    parts += [f"![{name}]({name})" for name in figures]
    parts.append(
        f"Suite `{results['suite']['name']}`, {provenance['dtype']} on {provenance['device']}, "
        f"{provenance['batch_tokens']:,} tokens a forward pass, seed {provenance['seed']}, commit "
        f"{provenance['commit']}, {duration(provenance['seconds'])}; the rest is in `eval.json`."
    )
    return "\n\n".join(part for part in parts if part) + "\n"


def gap(value: Results | None) -> str:
    """Return a difference in nats with its standard error ("+0.0189 ± 0.0030")."""
    if value is None or value.get("nats") is None:
        return ABSENT
    error = "" if value.get("stderr") is None else f" ± {value['stderr']:.4f}"
    return f"{value['nats']:+.4f}{error}"


def recall_name(row: Results) -> str:
    """Return the name of a recall row, such as "passkey 512"."""
    return f"{row['task']} {row['length']}"


def _sentence(text: str, value: Results) -> str:
    nats, error = value["nats"], value["stderr"]
    if nats is None:
        return f"zeroed, the model's loss on {text} is not finite."
    known = error is not None
    if abs(nats) < SLIGHT or (known and abs(nats) < FEW_ROWS.get(value.get("rows", 0), CLEAR) * error):
        judgement = "IT DOES NOTHING MEASURABLE"
    else:
        judgement = "it helps" if nats > 0 else "IT HURTS"
    doubt = "" if known else " (one row: no standard error)"
    return f"zeroing it changes the loss on {text} by {gap(value)} nats a token: {judgement}{doubt}."


def _moved(answers: dict[str, float]) -> list[str]:
    moved = [f"{name} {-100 * value:+.1f}" for name, value in answers.items() if abs(value) >= 0.005]
    same = len(answers) - len(moved)
    if not answers:
        return []
    rest = f", and leaves {same} of {len(answers)} tasks as they were" if same else ""
    return [f"Zeroing it moves accuracies by (points): {', '.join(moved) or 'none'}{rest}."]


def _student(results: Results) -> Results:
    student: Results = next(model for model in results["models"] if model["role"] == "student")
    return student


def _behind(student: Results, first: Results, text: str) -> str:
    if student is first:
        return "0"
    if text not in student["text"] or text not in first["text"]:
        return ABSENT
    own, base = (one["text"][text]["row_losses"] for one in (student, first))
    nats, error = weighted_difference(own, base)
    return gap({"nats": nats, "stderr": None if math.isnan(error) else error})


def _zeroed(results: Results, text: str) -> str:
    entry = next((one for one in results["differences"] if one["name"] == "memory zeroed"), None)
    return ABSENT if entry is None else gap(entry["text"].get(text))


def _cache_share(results: Results) -> str:
    row = next((row for row in results.get("cache", ()) if row["context"] == TRAINED_CACHE), None)
    return ABSENT if row is None else _percent(row["student_bytes"] / row["teacher_bytes"])


def _keys(models: Models, part: str) -> list[str]:
    return list(dict.fromkeys(key for model in models for key in model.get(part, {})))


def _teacher_text(models: Models) -> Results:
    found: Results = next((model["text"] for model in models if model["role"] == "teacher"), {})
    return found


def _quality(model: Results, text: str, teacher: Results) -> list[str]:
    """A model's cells under `QUALITY`."""
    own = model["text"].get(text)
    if own is None:
        return [ABSENT] * len(QUALITY)
    loss, base = own["loss"], teacher.get(text, {}).get("loss")
    return [
        ABSENT if loss is None else number(_exp(loss)),
        ABSENT if loss is None or base is None else number(_exp(loss - base)),
        ABSENT if own.get("kl") is None else small(own["kl"]),
        ABSENT if own.get("top1") is None else _percent(own["top1"]),
    ]


def _measures(models: Models, part: str) -> dict[str, str]:
    """What some model has in a part, by name, and how tables name it."""
    rows = [row for model in models for row in model.get(part, ())]
    return {_name(row): _name(row) + (" (acc norm)" if row.get("metric") == "acc_norm" else "") for row in rows}


def _name(row: Results) -> str:
    return recall_name(row) if "length" in row else str(row["task"])


def _score(rows: Sequence[Results], name: str) -> str:
    row = next((row for row in rows if _name(row) == name), None)
    if row is None:
        return ABSENT
    if "score" in row:
        error = "" if row["stderr"] is None else f" ± {100 * row['stderr']:.1f}"
        return f"{100 * row['score']:.1f}{error}"
    return f"{100 * row['accuracy']:.1f} ({100 * row['low']:.0f}–{100 * row['high']:.0f})"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _order(point: str) -> tuple[int, int]:
    context, _, batch = point.replace(",", "").partition(" × ")
    return int(batch), int(context)

"""`linearize eval`: a finished folder beside its teacher and its controls, on one suite, into one report."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from linearize import workspace, yaml_io
from linearize.api import check_device, check_dtype, check_seed, load
from linearize.checkpoint import write_text
from linearize.data.masking import HELD_OUT_SEED, Masking, mask_rows
from linearize.environment import check_writable
from linearize.errors import LinearizeError
from linearize.eval.controls import CONTROLS, applicable
from linearize.eval.measure import Bench, Kept, Measured, has_gsm8k
from linearize.eval.suite import NONE, Suite, choose_suite, text_alone
from linearize.eval.tally import paired_difference
from linearize.eval.text import EvaluationText, evaluation_text, held_out_text
from linearize.eval.zero_shot import check_tasks
from linearize.modeling import auto_class
from linearize.modeling.classes import family_of
from linearize.recipe import Data, Recipe
from linearize.report import card_is_ours, draw_png, evaluation_page, refresh_pages
from linearize.report.table import Cells
from linearize.teacher import load_teacher, resolve

FOLDER, RESULTS, PAGE = "eval", "eval.json", "eval.md"
UNFINISHED = "unfinished.json"
ELSEWHERE = "Give another with --output."
FIGURES = ("perplexity", "recall", "cost")
ANSWERED = ("memory zeroed",)
CPU_TOKENS, GPU_TOKENS = 4096, 32768
HOLDS_OUT = ("source", "split", "format", "length", "held_out", "streaming")
"""What of a recipe's `data` decides which documents are held out."""

Watch = Callable[[str], None]


def evaluate_folder(
    folder: str | Path,
    *,
    suite: str = "quick",
    against: str | None = None,
    controls: Sequence[str | Path] = (),
    data: str | Sequence[str] | None = None,
    task_data: str | Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
    batch_tokens: int | None = None,
    seed: int = 0,
    output: str | Path | None = None,
    watch: Watch | None = None,
    **sizes: Any,
) -> dict[str, Any]:
    """Measure a finished folder, its teacher and its controls, and write `eval.json`, `eval.md` and figures.

    Where they go into the folder itself, its model card and `report.html` are written anew with them. Answers are kept
    as they come, in `unfinished.json`, and one that was stopped goes on behind them when it is called again alike.

    Args:
        folder: what `linearize` wrote.
        suite: `quick`, `paper` or `full`.
        against: the teacher, as for `--model`; the run's own by default, `none` leaves it out.
        controls: folders of other runs to stand beside it, such as the softmax control's: of the same teacher and,
            unless `data` is given, with the same documents held out.
        data: texts to measure on: `wikitext2`, files, folders or hub ids; the run's own held-out documents by default.
        task_data: folder with local files of the tasks; the Hub by default.
        device: where to run; the first GPU by default, else the CPU.
        dtype: of the weights; float32 on a CPU, bfloat16 on a GPU by default.
        batch_tokens: tokens of a forward pass; 4,096 on a CPU, 32,768 on a GPU by default.
        seed: of recall samples and prompts.
        output: where the report goes; `<folder>/eval` by default.
        watch: told of every part before it starts.
        **sizes: what `choose_suite` takes.

    Returns:
        What `eval.json` holds.

    Raises:
        LinearizeError: something given does not work; the message says what to change.
    """
    from transformers import AutoConfig, AutoTokenizer

    began, tell = time.time(), watch or (lambda words: None)
    check_seed(seed)
    path = Path(folder)
    if not ((path / "config.json").is_file() and (path / workspace.LOCK).is_file()):  # a control's model is a plain one
        path = workspace.checkpoint_folder(folder)
    settings = workspace.locked_settings(path)
    recipe = Recipe.parse(settings["recipe"], str(path / workspace.LOCK))
    chosen = choose_suite(suite, **sizes)
    if not recipe.causal:
        chosen = text_alone(chosen, **sizes)
    where = check_device(device)
    kind = check_dtype(dtype or ("float32" if where.type == "cpu" else "bfloat16"))
    tokens = batch_tokens or (CPU_TOKENS if where.type == "cpu" else GPU_TOKENS)
    answers = _task_folder(task_data, chosen)
    check_tasks(chosen.tasks)
    kept = [_control(Path(control)) for control in controls]
    for control, _ in kept:
        _same_teacher(path, control)
        if not data:
            _same_held_out(path, control)
    report = Path(output) if output else path / FOLDER
    check_writable(report, ELSEWHERE)
    names = _row_names([path, *(control for control, _ in kept)])
    tokenizer = AutoTokenizer.from_pretrained(path)
    texts = _texts(recipe, tokenizer, settings["seed"], chosen, [data] if isinstance(data, str) else data, sizes)
    depends = {
        "suite": chosen.settings(),
        "texts": [text.row() for text in texts],
        "task_data": _fingerprints(answers),
        "numbers": [str(kind), tokens, seed],
        "machine": workspace.machine(where.type, ("lm_eval",)),
        "models": [_identity(place) for place in (against or settings["model"], path, *(folder for folder, _ in kept))],
    }
    bench = Bench(chosen, texts, tokenizer, seed, answers, tokens, Kept(report / UNFINISHED, depends))
    context = _learned_positions(AutoConfig.from_pretrained(path))
    if context is not None:
        bench.check_context(context)
    if bench.kept.rows:
        tell(f"going on: {len(bench.kept.rows)} parts are in {bench.kept.path}")
    found: list[Measured] = []
    if against != NONE:
        found.append(_teacher(bench, against or settings["model"], settings, kind, where, tell))
    with _model(path, kind, where) as model:
        found += _student(bench, model, names[path], {"folder": str(path), "recipe": recipe.name}, tell)
    for control, name in kept:
        with _model(control, kind, where) as model:
            about = {"folder": str(control), "recipe": name, "trained": True}
            found.append(bench.model(model, names[control], "control", about, tell, speed=False))
    results: dict[str, Any] = plain(
        {
            "model": settings["model"],
            "recipe": recipe.name,
            "name": names[path],
            "suite": chosen.settings(),
            "texts": [text.row() for text in texts],
            "window": recipe.mixer.window.sizes[-1] if recipe.mixer and recipe.mixer.window else None,
            "trained_length": recipe.data.length,
            "cache": _cache(path),
            "models": [one.row() for one in found],
            "differences": differences(found),
            "provenance": {
                **workspace.machine(where.type, ("lm_eval",)),
                "dtype": str(kind).removeprefix("torch."),
                "batch_tokens": tokens,
                "seed": seed,
                "run": {"seed": settings["seed"], "revision": settings.get("revision")},
                "task_data": _fingerprints(answers),
                "seconds": round(time.time() - began + bench.kept.spared, 1),
            },
        }
    )
    ours = output is None and card_is_ours(path)
    write_report(results, report)
    bench.kept.path.unlink(missing_ok=True)
    if ours:
        refresh_pages(path)
    elif output is None:
        tell(f"{path / 'README.md'} was edited, or is of another version of linearize: it is left as it is")
    return results


def _student(bench: Bench, model: Any, name: str, about: dict[str, Any], tell: Watch) -> list[Measured]:
    """The student, and the controls that are made from it: answers only where they say what the memory is worth."""
    found = [bench.model(model, name, "student", about, tell)]
    for control in applicable(model):
        with CONTROLS[control](model):
            text_only = control not in ANSWERED
            found.append(bench.model(model, control, "control", {"of": name}, tell, text_only=text_only, speed=False))
    return found


def _identity(place: str | Path) -> list[Any]:
    """Return what tells a model from another at the same place: name, size and time of each of its files, if any."""
    path = Path(place)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path] if path.is_file() else []
    return [str(place), *([file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files)]


def _fingerprints(folder: Path | None) -> dict[str, str]:
    """The sha256 (hex) of the task files that a folder holds."""
    if folder is None:
        return {}
    files = sorted(path for path in folder.iterdir() if path.is_file() and ".jsonl" in path.suffixes)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _cache(path: Path) -> list[dict[str, Any]]:
    """Cache bytes of teacher and student by context, as the run worked them out."""
    file = path / workspace.RESULTS
    found: list[dict[str, Any]] = (
        json.loads(file.read_text(encoding="utf-8")).get("cache", []) if file.is_file() else []
    )
    return found


def _task_folder(folder: str | Path | None, suite: Suite) -> Path | None:
    if folder is None:
        return None
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise LinearizeError(f"--task-data: there is no folder {path}. Give one with files such as piqa.jsonl.xz.")
    if not suite.tasks and not (suite.generation and has_gsm8k(path)):
        raise LinearizeError(
            f"--task-data {path} would not be read: the suite {suite.name!r} as it is chosen has no tasks, and the "
            "folder no gsm8k.jsonl. Add --tasks, such as --tasks piqa,arc_easy, or leave it out."
        )
    return path


def _control(path: Path) -> tuple[Path, str]:
    """A control's folder and the recipe that made it."""
    if not (path / "config.json").is_file():
        raise LinearizeError(f"--control: there is no model in {path} (no config.json). Give the folder of a run.")
    return path, str(workspace.locked_settings(path)["recipe"].get("name", "unnamed"))


def _same_teacher(path: Path, control: Path) -> None:
    """Raise unless a control was made from the student's teacher, told by its weights' sha256 where both runs noted it.

    Raises:
        LinearizeError: it was made from another.
    """
    own, other = (_locked_teacher(folder) for folder in (path, control))
    by = ("sha256",) if own["sha256"] and other["sha256"] else ("model", "revision")
    if any(own[key] != other[key] for key in by):
        both = (", ".join(f"{key} {one[key]}" for key in dict.fromkeys(("model", *by))) for one in (own, other))
        words = " and ".join(f"{folder} ({of})" for folder, of in zip((path, control), both, strict=True))
        raise LinearizeError(
            f"--control {control}: its teacher is another than the student's: {words}. Give a control that was made "
            "from the student's teacher."
        )


def _locked_teacher(folder: Path) -> dict[str, Any]:
    """What a run's lock file says of its teacher: model, revision, and sha256 by file, empty where it is not known."""
    settings = workspace.locked_settings(folder)
    noted = (yaml_io.read(folder / workspace.LOCK).get("provenance") or {}).get("teacher") or {}
    revision = noted.get("revision") or settings.get("revision")
    return {"model": _absolute(settings["model"]), "revision": revision, "sha256": noted.get("sha256") or {}}


def _absolute(source: Any) -> Any:
    """A source, or a list of them, with local paths spelt alike."""
    if isinstance(source, list):
        return [_absolute(one) for one in source]
    path = Path(source).expanduser()
    return str(path.resolve()) if path.exists() else source


def _same_held_out(path: Path, control: Path) -> None:
    """Raise where a control may have been trained on documents that the student held out.

    Raises:
        LinearizeError: their recipes' data differ in what decides which documents these are.
    """
    recipes = [workspace.locked_settings(folder)["recipe"] for folder in (path, control)]
    if not recipes[1].get("stages"):  # it was not trained at all
        return
    own, other = ({**Data().model_dump(), **recipe.get("data", {})} for recipe in recipes)
    for one in (own, other):
        one["source"] = _absolute(one["source"])
    changed = [f"data.{key} is {own[key]} and {other[key]}" for key in HOLDS_OUT if own[key] != other[key]]
    if changed:
        raise LinearizeError(
            f"--control {control} may have been trained on documents that {path} held out: {'; '.join(changed)}. Give "
            "text that neither was trained on with --data, or a control that was made with the same data."
        )


def _learned_positions(config: Any) -> int | None:
    """How many tokens a model has learned positions for; None where it has no such end."""
    family = family_of(config)
    if family.rotates(nn.Module()):
        return None
    return int(config.max_position_embeddings) - int(family.first_position(config))


def _row_names(folders: Sequence[Path]) -> dict[Path, str]:
    """Folders by the names of their rows: the last part of the path, the whole of it where two are alike.

    Raises:
        LinearizeError: a folder is named twice.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise LinearizeError(f"--control names a folder twice, or DIR itself: {', '.join(map(str, folders))}.")
    last = [folder.resolve().name for folder in folders]
    taken = {"teacher", *CONTROLS}
    alike = len(set(last)) < len(last) or taken & set(last)
    return {folder: str(folder) if alike else name for folder, name in zip(folders, last, strict=True)}


def _texts(
    recipe: Recipe, tokenizer: Any, seed: int, suite: Suite, sources: Sequence[str] | None, asked: dict[str, Any]
) -> list[EvaluationText]:
    if sources:
        texts = [evaluation_text(source, tokenizer, suite.rows, suite.length) for source in sources]
        if not recipe.causal:
            masking = Masking.of(tokenizer)
            texts = [replace(text, rows=mask_rows(text.rows, masking, HELD_OUT_SEED)) for text in texts]
    else:
        texts = [_cut(held_out_text(recipe.data, tokenizer, seed, masked=not recipe.causal), suite, asked)]
    names = [text.name for text in texts]
    if len(set(names)) < len(names):
        raise LinearizeError(f"--data names texts alike ({', '.join(names)}); give each once, or rename a file.")
    return texts


def _cut(own: EvaluationText, suite: Suite, asked: dict[str, Any]) -> EvaluationText:
    """The run's own held-out rows, fewer and shorter if so asked; more of them would take text that was trained on."""
    for key, most in (("rows", len(own.rows)), ("length", own.rows.length)):
        if (asked.get(key) or 0) > most:
            raise LinearizeError(
                f"--{key} {asked[key]} is more than the run held out ({len(own.rows)} rows of {own.rows.length} "
                "tokens), and the rest was trained on. Lower it, or give other text with --data."
            )
    ids, places, labels = (tensor[: suite.rows, : suite.length] for tensor in own.rows.tensors().values())
    rows = replace(own.rows, input_ids=ids, position_ids=places, labels=labels)
    return replace(own, rows=rows[rows.predicted().any(1).nonzero()[:, 0]])


def _teacher(
    bench: Bench, name: str, settings: dict[str, Any], dtype: torch.dtype, device: torch.device, tell: Watch
) -> Measured:
    revision = settings.get("revision")
    own = name == settings["model"] and revision is not None and "@" not in name
    try:
        tell(f"loading {name}")
        model, tokenizer, info = load_teacher(resolve(f"{name}@{revision}" if own else name), dtype, device)
    except LinearizeError as error:
        if name != settings["model"]:
            raise
        raise LinearizeError(
            f"The run's own teacher cannot be loaded: {error} Name it with --against, or leave it out with "
            "--against none."
        ) from error
    if tokenizer.get_vocab() != bench.tokenizer.get_vocab():
        raise LinearizeError(
            f"--against {name}: its tokenizer is another than the student's, so their losses cannot be compared. Give "
            "the teacher that the run was made from."
        )
    tell("teacher: texts")
    return bench.teacher(model, "teacher", {"model": name, "source": info.source, "revision": info.revision}, tell)


@contextlib.contextmanager
def _model(path: Path, dtype: torch.dtype, device: torch.device) -> Iterator[Any]:
    """A folder's model, linearized or plain, and its memory back afterwards."""
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    model: Any = load(path, dtype=dtype) if config.get("linearize") else None
    if model is None:
        model = auto_class(config["model_type"]).from_pretrained(path, dtype=dtype, attn_implementation="sdpa")
    try:
        yield model.to(device).eval()
    finally:
        del model
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def differences(found: Sequence[Measured]) -> list[dict[str, Any]]:
    """Return what the student is ahead of each control by, on each text and each task.

    Args:
        found: all models, the student among them.

    Returns:
        One object per control: `name`, and in `text` by text the control's mean loss less the student's in nats with
        its standard error over so many rows, in `answers` the student's accuracy less the control's.
    """
    student = next(one for one in found if one.role == "student")
    rows = []
    for control in found:
        if control.role != "control":
            continue
        text = {}
        for name, quality in control.quality.items():
            nats, error = paired_difference(quality, student.quality[name])
            text[name] = {"nats": nats, "stderr": error, "rows": len(quality.row_losses)}
        own, other = accuracies(student), accuracies(control)
        answers = {name: own[name] - other[name] for name in own if name in other}
        rows.append({"name": control.name, "text": text, "answers": answers})
    return rows


def accuracies(model: Measured) -> dict[str, float]:
    """Return every accuracy of a model by the name that tables give it."""
    recall = {f"{row['task']} {row['length']}": row["accuracy"] for row in model.recall}
    written = {row["task"]: row["accuracy"] for row in model.generation}
    return {**recall, **written, **{row["task"]: row["score"] for row in model.zero_shot}}


def plain(value: Any) -> Any:
    """Return nested values as strict JSON has them: numbers that are not finite become None."""
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_report(results: dict[str, Any], folder: Path) -> None:
    """Write JSON, page and figures.

    Raises:
        LinearizeError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        drawn = []
        for kind in FIGURES:
            picture, path = draw_png(kind, results), folder / f"{kind}.png"
            path.unlink(missing_ok=True)
            if picture is not None:
                path.write_bytes(picture)
                drawn.append(path.name)
        write_text(folder / RESULTS, json.dumps(results, indent=2))
        write_text(folder / PAGE, evaluation_page(results, drawn))
    except OSError as error:
        raise LinearizeError(f"{folder} cannot be written: {error.strerror}. {ELSEWHERE}") from error


def compare(folders: Sequence[str | Path]) -> list[dict[str, Any]]:
    """Return the evaluations of several runs.

    Args:
        folders: finished runs that were evaluated, folders of `--output`, or `eval.json` files.

    Raises:
        LinearizeError: one holds no evaluation, or they were not measured on the same text.
    """
    found = [read_evaluation(Path(folder)) for folder in folders]
    first = found[0]
    for folder, other in zip(folders, found, strict=True):
        for text in other["texts"]:
            same = next((one for one in first["texts"] if one["name"] == text["name"]), None)
            if same is not None and same["sha256"] != text["sha256"]:
                raise LinearizeError(
                    f"{folders[0]} and {folder} were measured on different rows of {text['name']!r} "
                    f"({same['rows']} of {same['length']} tokens, {text['rows']} of {text['length']}), so their "
                    "numbers cannot stand side by side. Evaluate both with the same --data, --rows and --length."
                )
    return found


def write_comparison(cells: Cells, folders: Sequence[str | Path], file: Path) -> None:
    """Write a comparison as JSON: the folders, and every row of the table by its columns.

    Raises:
        LinearizeError: the file is one of those that were compared, no JSON by its name, or cannot be written.
    """
    if file.suffix != ".json" or file.resolve() in [_evaluation_file(Path(folder)).resolve() for folder in folders]:
        reason = "is one of the evaluations" if file.suffix == ".json" else "does not end in .json"
        raise LinearizeError(f"--output {file} {reason}. Give another .json file for the table.")
    rows = [{"measure": row[0], **dict(zip(cells.header[1:], row[1:], strict=True))} for row in cells.rows]
    try:
        write_text(file, json.dumps({"folders": [str(folder) for folder in folders], "rows": rows}, indent=2))
    except OSError as error:
        raise LinearizeError(f"{file} cannot be written: {error.strerror}. {ELSEWHERE}") from error


def read_evaluation(path: Path) -> dict[str, Any]:
    """Return what an evaluation left.

    Raises:
        LinearizeError: there is none, or it is damaged.
    """
    file = _evaluation_file(path)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LinearizeError(f"{file} is not JSON: {error}. Evaluate the run again.") from error
    if not isinstance(found, dict) or not {"models", "texts", "suite"} <= found.keys():
        raise LinearizeError(f"{file} is no evaluation: it lacks `models`, `texts` or `suite`. Evaluate the run again.")
    return found


def _evaluation_file(path: Path) -> Path:
    """Return the file of an evaluation that is given as such, or as a folder."""
    places = [path] if path.is_file() else [path / FOLDER / RESULTS, path / RESULTS]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise LinearizeError(f"{path} was not evaluated yet. Type `linearize eval {path}` first.")
    return file

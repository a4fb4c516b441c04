"""A run whose teacher is never in memory as a whole, the parts of one by layers, and what joins the parts."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from linearize import checkpoint, workspace, yaml_io
from linearize.api import (
    Job,
    Result,
    Rows,
    Watch,
    describe,
    keep_corpus,
    plan_probed,
    prepare_job,
    run_provenance,
    run_results,
    stage_run,
)
from linearize.assemble import assemble
from linearize.checkpoint import replace_text, write_text
from linearize.data import Corpus
from linearize.errors import LinearizeError
from linearize.eval.memory import format_bytes
from linearize.interrupt import Signals
from linearize.layered import LayeredTeacher
from linearize.planning import check_disk, converted_layers
from linearize.recipe import Recipe
from linearize.recipe_stages import Transfer
from linearize.report.metrics import Record, read_metrics
from linearize.stages.streamed import NAME, STUDENTS, Stream, convert_layers
from linearize.stream_plan import transfer_alone
from linearize.surgery import Surgery
from linearize.teacher import fetch, load_tokenizer, local_config

STATES, START = "states", "start"
PART = "part"


def run_streamed(job: Job, work: Path, watch: Watch, signals: Signals) -> dict[str, Any] | None:
    """Carry out the transfer of a job layer by layer, and where no stage follows leave the rest in `work/final` too.

    Args:
        job: with `stream_layers`.
        work: the run's folder.
        watch: told of every event.
        signals: of the run.

    Returns:
        What `results.json` holds; None where stages follow, which find what this one ended with.
    """
    began = time.time()
    alone = len(job.recipe.stages) == 1
    if not alone and checkpoint.state_of(work / workspace.STAGES / f"{NAME}-ended") is not None:
        return None
    if not alone:
        _check_later(job)
    watch({"event": "load", "model": f"{job.source.name}, layer by layer"})
    files = fetch(job.source)
    tokenizer, info = load_tokenizer(job.source, files)
    workspace.same_teacher(work, info)
    teacher = LayeredTeacher(files.folder, local_config(files, job.trust_remote_code), job.dtype, job.device)
    job, scores = plan_probed(job, teacher.model, tokenizer, work, watch)
    corpus = keep_corpus(job, tokenizer, work)
    watch({"event": "data", "description": corpus.description})
    rows = Rows(work / "rows.json", watch)
    measured = alone and job.layers is None
    stream = _stream(job, teacher, corpus, work, watch, signals, measure=measured and not rows.complete(job))
    steps = stream.settings.steps(job.recipe.data.length) * len(stream.rounds())
    watch({"event": "stage", "stage": NAME, "steps": steps, "ended": False})
    spent = stream.train()
    _write_metrics(stream.metrics(), work / "metrics.jsonl")
    if not alone:
        _end_stage(stream, work / workspace.STAGES / f"{NAME}-ended", spent)
        return None
    if stream.held:
        watch({"event": "evaluate", "name": f"teacher, {', '.join(STUDENTS)}"})
        for name, quality in stream.qualities():
            costs = {"tokens": int(spent["tokens"]), "seconds": spent["seconds"]}
            rows.add({**quality.row(name), **(costs if name == STUDENTS[1] else {"tokens": 0, "seconds": 0.0})})
    provenance = run_provenance(job, info, corpus, time.time() - began) | {"teacher_bytes_at_once": teacher.peak}
    results = run_results(job, rows.rows, provenance)
    watch({"event": "save"})
    final = work / workspace.FINAL
    shutil.rmtree(final, ignore_errors=True)
    if job.layers is not None:
        results[PART] = {"layers": list(job.layers), "spent": spent}
        _write_part(stream, final, results, job, work)
        return results
    shutil.rmtree(work / STATES, ignore_errors=True)  # room for the checkpoint
    tensors = [file for block in stream.turns() for file in checkpoint.tensor_files(stream.ended(block))]
    assemble(teacher, tensors, final, tokenizer)
    describe(job, results, work, scores)
    return results


def _check_later(job: Job) -> None:
    """Raise before the transfer where a stage behind it, which loads the whole model, will not fit.

    Raises:
        LinearizeError: by the plan's estimate, it needs more than the GPU has.
    """
    if job.device.type != "cuda":
        return
    has = torch.cuda.get_device_properties(job.device).total_memory
    stage = max(job.plan.stages[1:], key=lambda stage: stage.memory)
    if stage.memory > has:
        raise LinearizeError(
            f"Stage {stage.name!r} behind the streamed transfer loads the whole model and needs about "
            f"{format_bytes(stage.memory)}; the GPU has {format_bytes(has)}. Leave the later stages out with "
            f"'{transfer_alone(job.recipe)}'."
        )


def _stream(
    job: Job, teacher: LayeredTeacher, corpus: Corpus, work: Path, watch: Watch, signals: Signals, *, measure: bool
) -> Stream:
    """The transfer stage of a job, ready to train."""
    plan = job.plan.stream
    assert plan is not None
    chosen = job.layers or range(teacher.model.config.num_hidden_layers)
    surgery = _convert(job, teacher, work / START, chosen)
    settings = job.recipe.stages[0]
    assert isinstance(settings, Transfer)
    given = corpus.with_length(settings.row_length(job.recipe.data.length))
    run = stage_run(job, teacher.model, surgery, given, work, watch, signals)
    states = work / STATES if plan.on_disk or (work / STATES).exists() else None
    return Stream(teacher, surgery, settings, run, work / START, chosen, states, measure)


def _convert(job: Job, teacher: LayeredTeacher, start: Path, chosen: range) -> Surgery:
    recipe = job.plan.recipe
    assert recipe.mixer is not None and isinstance(recipe.exact_heads, list)
    torch.manual_seed(job.seed)
    layers = converted_layers(recipe, teacher.model.config)
    return convert_layers(teacher, recipe.mixer.model_dump(), layers, recipe.exact_heads, start, chosen)


def _write_metrics(records: list[Record], path: Path) -> None:
    replace_text(path, "".join(json.dumps(record) + "\n" for record in records))


def _end_stage(stream: Stream, folder: Path, spent: dict[str, float]) -> None:
    """Write what the stage ended with as the resident form would have."""
    tensors: dict[str, Any] = {}
    for block in stream.turns():
        found = checkpoint.load(stream.ended(block))
        assert found is not None
        tensors |= found[0]
    checkpoint.save(folder, tensors.items(), spent)
    shutil.rmtree(stream.folder(range(1)).parent)


def _write_part(stream: Stream, final: Path, results: dict[str, Any], job: Job, work: Path) -> None:
    """Leave the tensors of the chosen layers and what tells them apart from other parts."""
    final.mkdir()
    for block in stream.turns():
        for number, file in enumerate(checkpoint.tensor_files(stream.ended(block))):
            shutil.copyfile(file, final / part_file(block.start, number))
    shutil.copyfile(work / "metrics.jsonl", final / "metrics.jsonl")
    lock = {"settings": json.loads(json.dumps(job.settings())), "provenance": results["provenance"]}
    write_text(final / workspace.LOCK, yaml_io.dump(lock))
    write_text(final / workspace.RESULTS, json.dumps(results, indent=2))


def part_file(layer: int, number: int) -> str:
    """Return the name, in a part's folder, of a file with tensors of the block that begins with a layer."""
    return f"layers-{layer:04d}-{number}.safetensors"


def merge(
    parts: Sequence[str | Path], output: str | Path, *, fresh: bool = False, watch: Watch | None = None
) -> Result:
    """Join parts that were made with `layers` into the finished folder that one run would have made.

    Args:
        parts: their folders, in any order.
        output: the finished folder.
        fresh: replace what lies there, if it is linearize's.
        watch: called with every event.

    Returns:
        The folder and its results; no quality was measured.

    Raises:
        LinearizeError: a folder is no part, the parts do not belong together, or layers are missing or there twice.
    """
    found = [Part(Path(folder)) for folder in parts]
    job, settings = _joined_job(found)
    folder = Path(output)
    finished = workspace.finished_results(folder, settings, fresh)
    if finished is not None:
        return Result(folder, finished, finished_before=True)
    tell, began = watch or (lambda event: None), time.time()
    with workspace.hold(folder, settings, fresh, lambda: check_disk(folder.parent, job.plan.disk)) as work:
        tell({"event": "load", "model": f"the files of {job.source.name}"})
        files = fetch(job.source)
        tokenizer, info = load_tokenizer(job.source, files)
        config = local_config(files, job.trust_remote_code)
        teacher = LayeredTeacher(files.folder, config, job.dtype, torch.device("cpu"))
        for part in found:
            part.check_teacher(info.revision, info.sha256)
        job, scores = plan_probed(job, teacher.model, tokenizer, work, tell)
        shutil.rmtree(work / START, ignore_errors=True)
        _convert(job, teacher, work / START, range(0))
        tell({"event": "save"})
        shutil.rmtree(work / workspace.FINAL, ignore_errors=True)
        assemble(teacher, [file for part in found for file in part.files], work / workspace.FINAL, tokenizer)
        _write_metrics(_joined_metrics(found), work / "metrics.jsonl")
        provenance = {
            **workspace.machine("cpu"),
            "dtype": settings["dtype"],
            "seed": job.seed,
            "teacher": found[0].results["provenance"]["teacher"],
            "data": found[0].results["provenance"]["data"],
            "seconds": round(time.time() - began, 1),
            "parts": [
                {"layers": part.settings["layers"], **part.about("device", "seconds", "linearize", "commit")}
                for part in found
            ],
        }
        results = run_results(job, [], provenance)
        describe(job, results, work, scores)
        workspace.publish(work, folder)
    return Result(folder, results)


class Part:
    """A finished part: some layers of a transfer.

    Args:
        folder: where it lies.

    Raises:
        LinearizeError: it is no part.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.settings = workspace.locked_settings(folder)
            self.results = json.loads((folder / workspace.RESULTS).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise LinearizeError(
                f"{folder} is no part of a run ({str(error).rstrip('.')}). Give folders made with --layers."
            ) from None
        if PART not in self.results or "layers" not in self.settings:
            raise LinearizeError(f"{folder} is a whole run, not a part of one. Give folders made with --layers.")
        self.layers: list[int] = self.results[PART]["layers"]
        self.files = sorted(folder.glob("layers-*.safetensors"))

    def about(self, *keys: str) -> dict[str, Any]:
        """Return some of what the part says of its making."""
        return {key: self.results["provenance"].get(key) for key in keys}

    def check_teacher(self, revision: str | None, sha256: dict[str, str]) -> None:
        """Raise unless the part was made from this teacher.

        Raises:
            LinearizeError: it was made from other weights.
        """
        own = self.results["provenance"]["teacher"]
        if (own["revision"], own["sha256"]) != (revision, sha256):
            raise LinearizeError(
                f"{self.folder} was made from other weights of {own['source']} than those at hand: revision "
                f"{own['revision']} with {own['sha256']}, here {revision} with {sha256}. Make the part again."
            )


def _joined_job(parts: list[Part]) -> tuple[Job, dict[str, Any]]:
    """The job that the parts make together, and its settings."""
    first = parts[0]
    kept = ("layers", "device")
    same = {key: value for key, value in first.settings.items() if key not in kept}
    for part in parts[1:]:
        workspace.same_settings(
            {key: value for key, value in part.settings.items() if key not in kept}, same, part.folder, "was made"
        )
        if part.results["provenance"]["data"] != first.results["provenance"]["data"]:
            raise LinearizeError(
                f"{part.folder} and {first.folder} were trained on other rows. Make one of them again."
            )
    revision = f"@{same['revision']}" if same.get("revision") else ""
    recipe = Recipe.parse(same["recipe"], str(first.folder / workspace.LOCK))
    job = prepare_job(
        f"{same['model']}{revision}", recipe, seed=same["seed"], device="cpu", dtype=same["dtype"], stream_layers=True
    )
    layers = sorted(layer for part in parts for layer in part.layers)
    wanted = list(range(len(job.plan.layers)))
    missing, twice = sorted(set(wanted) - set(layers)), sorted({i for i in layers if layers.count(i) > 1})
    if missing or twice:
        raise LinearizeError(
            f"The parts do not make the {len(wanted)} layers: {_words(missing)} missing, {_words(twice)} there twice. "
            "Give one part for each range, such as --layers 0:10 and --layers 10:20."
        )
    job = replace(job, device=torch.device(first.settings["device"]))
    return job, job.settings()


def _words(layers: list[int]) -> str:
    return ", ".join(map(str, layers)) or "none"


def _joined_metrics(parts: list[Part]) -> list[Record]:
    """The records of all parts, layer after layer, as one run would have numbered them."""
    joined: list[Record] = []
    for part in sorted(parts, key=lambda part: part.layers[0]):
        joined += _numbered(read_metrics(part.folder / "metrics.jsonl"), len(joined))
    total = len(joined)
    last = max((record["tokens"] for record in joined), default=0)
    return [{**record, "tokens": last * (number + 1) // total} for number, record in enumerate(joined)]


def _numbered(records: list[Record], before: int) -> Iterator[Record]:
    for record in records:
        yield {**record, "step": record["step"] + before}

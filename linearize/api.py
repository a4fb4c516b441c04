"""The whole path behind one call: recipe and teacher in, a linearized checkpoint out."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig

from linearize import workspace, yaml_io
from linearize.adapter import is_adapter, joined
from linearize.checkpoint import replace_text, sync, sync_all, write_text
from linearize.data import Corpus, build_corpus, build_preferences
from linearize.data.sources import check_source, is_lazy, is_local, source_names
from linearize.environment import check_writable
from linearize.errors import LinearizeError, UnknownNameError
from linearize.eval import TeacherReference, evaluate, sample
from linearize.head_scores import FILE, ProbeScores
from linearize.hub import Pushed, check_repository, push, written_files
from linearize.interrupt import Signals
from linearize.kernels.backend import explain
from linearize.modeling import auto_class, classes_for
from linearize.modeling.export import save_checkpoint
from linearize.planning import (
    Plan,
    check_disk,
    converted_layers,
    leaves_a_choice,
    make_plan,
    needs_teacher_copy,
    place_heads,
    resolve_heads,
)
from linearize.probe import run_probe, sample_settings
from linearize.processes import ALONE, Processes
from linearize.recipe import Recipe
from linearize.recipe_stages import Distill, Preference, Transfer
from linearize.report import draw_png, read_metrics, write_pages
from linearize.report.track import check_tracker, tracker
from linearize.sharding import evaluating, shard
from linearize.stages import Run, run_stage
from linearize.stream_plan import parse_layers
from linearize.surgery import Surgery, convert
from linearize.teacher import (
    TeacherInfo,
    TeacherSource,
    base_model,
    fetch,
    load_config,
    load_teacher,
    local_folder,
    resolve,
)

SEEDS = 2**32
PROMPT = "A Python function is defined with the keyword"
Watch = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Result:
    """What a run leaves.

    Attributes:
        output: the finished checkpoint's folder.
        results: rows of quality, sample continuations, cache bytes and provenance, as in `results.json`.
        finished_before: the folder was there already, and nothing was run.
        pushed: what a push left on the Hub; None without one.
    """

    output: Path
    results: dict[str, Any]
    finished_before: bool = False
    pushed: Pushed | None = None


@dataclass(frozen=True)
class Job:
    """A run before it starts: everything that its outcome depends on.

    `recipe` is what was asked for; `plan.recipe` has the layers and heads too that a probe chose, once it did.
    """

    recipe: Recipe
    source: TeacherSource
    plan: Plan
    seed: int
    device: torch.device
    dtype: torch.dtype
    trust_remote_code: bool = False
    stream_layers: bool = False
    layers: range | None = None

    def settings(self) -> dict[str, Any]:
        """Return what must be the same for a run to go on."""
        streamed = {"stream_layers": True} if self.stream_layers else {}
        part = {"layers": f"{self.layers.start}:{self.layers.stop}"} if self.layers is not None else {}
        return {
            **streamed,
            **part,
            "model": self.source.location,
            "revision": self.source.revision,
            "seed": self.seed,
            "device": self.device.type,
            "dtype": str(self.dtype).removeprefix("torch."),
            "recipe": self.recipe.model_dump(mode="json"),
        }


def prepare_job(
    model: str | Path,
    recipe: Recipe | str | Path,
    *,
    data: str | None = None,
    tokens: int | None = None,
    quick: bool = False,
    seed: int = 0,
    device: str | None = None,
    dtype: str | None = None,
    overrides: Iterable[str] = (),
    trust_remote_code: bool = False,
    stream_layers: bool = False,
    layers: str | None = None,
) -> Job:
    """Resolve and check everything that can be checked without loading weights; see `linearize` for the arguments."""
    check_seed(seed)
    chosen = Recipe.resolve(recipe).prepare(data=data, tokens=tokens, quick=quick, overrides=overrides)
    where = check_device(device)
    for stage in chosen.stages:
        if isinstance(stage, Distill) and stage.teacher_device is not None:
            check_device(stage.teacher_device, "`teacher_device`")
    kind = check_dtype(dtype or ("float32" if where.type == "cpu" else "bfloat16"))
    source = resolve(str(model))
    config = load_config(source, trust_remote_code)
    stream = stream_layers or layers is not None
    part = None if layers is None else parse_layers(layers, config.num_hidden_layers)
    planned = partial(make_plan, config=config, model=source.name, dtype=kind, stream=stream, part=part)
    plan = planned(chosen)
    if chosen.probed and chosen.probe.file is not None:
        plan = planned(resolve_heads(chosen, ProbeScores.read(Path(chosen.probe.file)), config, kind))
    return Job(chosen, source, plan, seed, where, kind, trust_remote_code, stream, part)


def plan(
    model: str | Path,
    recipe: Recipe | str | Path,
    output: str | Path | None = None,
    *,
    fresh: bool = False,
    push_to_hub: str | None = None,
    track: str | None = None,
    **settings: Any,
) -> Plan:
    """Return what `linearize` would do with these arguments; no weights are loaded, and nothing is written.

    Raises:
        LinearizeError: the run would be refused at its start; of its folder that is known where `output` is given.
    """
    _check_beside(push_to_hub, track, settings)
    job = _prepare_run(model, recipe, settings)
    folder = _folder(job, output)
    work = workspace.work_folder(folder)
    if output is not None:
        if workspace.finished_results(folder, job.settings(), fresh) is not None:
            return job.plan
        if workspace.begun(work) and not fresh:
            workspace.same_begun(work, job.settings())
    check_sources(job.recipe, None if fresh else work)
    return job.plan


def _prepare_run(model: str | Path, recipe: Recipe | str | Path, settings: dict[str, Any]) -> Job:
    """Return the job of a run, which makes no probe that nothing asks for."""
    asked = Recipe.resolve(recipe)
    job = prepare_job(model, asked, **settings)
    if asked is not recipe:  # an object may have had overrides, which take away what a probe would choose
        job.recipe.check_probe(asked)
    return job


def _check_beside(push_to_hub: str | None, track: str | None, settings: dict[str, Any]) -> None:
    """Raise where what a run is to do besides cannot be done."""
    if push_to_hub is not None:
        check_repository(push_to_hub)
        if settings.get("layers") is not None:
            raise LinearizeError("--push-to-hub has nothing to push with --layers, which makes a part; push the merge.")
    if track is not None:
        check_tracker(track)


def _folder(job: Job, output: str | Path | None) -> Path:
    """Return a run's output folder."""
    return Path(f"{job.source.name}-{job.recipe.name.replace('/', '-')}" if output is None else output)


def linearize(
    model: str | Path,
    recipe: Recipe | str | Path,
    output: str | Path | None = None,
    *,
    fresh: bool = False,
    push_to_hub: str | None = None,
    track: str | None = None,
    watch: Watch | None = None,
    **settings: Any,
) -> Result:
    """Convert a pretrained Transformer by a recipe and write a checkpoint that loads anywhere.

    A run that was interrupted goes on where it stopped when it is called again with the same settings. SIGTERM and
    Ctrl-C save it and raise `Stopped`, a KeyboardInterrupt, where the program has no handlers of its own.

    Args:
        model: alias, local folder, hub id or .gguf file.
        recipe: a `Recipe`, a packaged name or a YAML file.
        output: the finished folder; `./<model>-<recipe>` by default.
        fresh: start anew, whatever lies in `output`, if it is linearize's.
        push_to_hub: repository that gets the finished folder.
        track: `tensorboard` or `wandb`, besides metrics.jsonl.
        watch: called with every event of the run: `{"event": ..., ...}`.
        **settings: data, tokens, quick, seed, device, dtype, overrides, trust_remote_code, stream_layers, layers:
            `data` replaces the recipe's source; `tokens` is the total over stages, split in the recipe's ratio; `quick`
            means builtin data and the recipe's `quick` sizes; `overrides` are `key.path=value`; `stream_layers` reads
            the teacher layer by layer for transfer; `layers`, such as `0:10`, makes a part for `merge` of these.

    Returns:
        The folder and what was measured.

    Raises:
        LinearizeError: something given does not work; the message says what to change.
    """
    _check_beside(push_to_hub, track, settings)
    try:
        job = _prepare_run(model, recipe, settings)
        processes = Processes.start(job.device)
        check_shared(job.recipe, processes.count, job.stream_layers)
    except LinearizeError as error:
        raise workspace.waiting(error, model, output) from error
    folder = _folder(job, output)
    finished = processes.once(lambda: workspace.finished_results(folder, job.settings(), fresh))
    if finished is not None:
        processes.once(lambda: workspace.clear(folder))
        return Result(folder, finished, True, _pushed(folder, push_to_hub, processes))
    held = workspace.hold(folder, job.settings(), fresh, lambda: check_disk(folder.parent, job.plan.disk))
    with Signals() as signals, contextlib.ExitStack() as stack:
        work = processes.once(lambda: stack.enter_context(held))
        results = _run(job, work, processes, _watcher(watch, track, work) if processes.main else _silent, signals)
        processes.once(lambda: workspace.publish(work, folder))
    return Result(folder, results, False, _pushed(folder, push_to_hub, processes))


def _pushed(folder: Path, repository: str | None, processes: Processes) -> Pushed | None:
    """Upload the finished folder, where that was asked for, and return where it lies."""
    return None if repository is None else processes.once(lambda: push(folder, repository))


def check_shared(recipe: Recipe, count: int, stream_layers: bool = False) -> None:
    """Raise unless `count` processes can share every batch of a recipe evenly.

    Raises:
        LinearizeError: they cannot, layers are streamed, or a stage puts its teacher on another process's GPU.
    """
    if count > 1 and stream_layers:
        raise LinearizeError(
            f"--stream-layers works in one process, and {count} were started. Start one for each range of layers, with "
            "--layers, and join the parts with `linearize merge`."
        )
    for index, stage in enumerate(recipe.stages):
        if stage.batch % count:
            raise LinearizeError(
                f"`stages.{index}.batch` is {stage.batch} rows, which {count} processes cannot share evenly. Set "
                f"stages.{index}.batch={-(-stage.batch // count) * count}, or start a number of processes that "
                f"divides {stage.batch}."
            )
        if count > 1 and isinstance(stage, Distill) and stage.teacher_device is not None:
            raise LinearizeError(
                f"`stages.{index}.teacher_device` is {stage.teacher_device}, and each of {count} processes has one "
                "device. Drop it."
            )


def load(folder: str | Path, *, teacher: str | None = None, **options: Any) -> Any:
    """Return a linearized model; none of the checkpoint's own code runs.

    Args:
        folder: a finished folder, or a repository of the Hub, `owner/name` or `owner/name@revision`.
        teacher: of an adapter (`push --adapter-only`), as for `--model`; the one it was made from by default.
        **options: for `from_pretrained`, such as `dtype`.

    Raises:
        LinearizeError: there is no linearized model, not all of its tensors, or an adapter's teacher is another one.
    """
    path = workspace.checkpoint_folder(local_folder(folder))
    settings = json.loads((path / "config.json").read_text(encoding="utf-8"))
    model_type = settings["linearize"]["model_type"]
    if is_adapter(path):
        config, tensors = AutoConfig.from_pretrained(path), joined(path, teacher)
        parts = {"config": config, "state_dict": tensors, "output_loading_info": True}
        model, report = classes_for(model_type).lm.from_pretrained(None, **parts, **options)  # type: ignore[attr-defined]
        if (path / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(path)
    elif teacher is not None:
        raise LinearizeError(f"{path} has all of its weights, so that it needs no teacher; leave `teacher` out.")
    else:
        model, report = auto_class(model_type).from_pretrained(path, output_loading_info=True, **options)
    if report["missing_keys"]:
        raise LinearizeError(
            f"The weights in {path} lack {len(report['missing_keys'])} of the model's tensors, "
            f"{min(report['missing_keys'])} among them. Copy the whole folder of the run again."
        )
    return model


def _run(job: Job, work: Path, processes: Processes, watch: Watch, signals: Signals) -> dict[str, Any]:
    """Carry a job out in its work folder and leave the finished checkpoint in `work/final`."""
    began = time.time()
    processes.once(lambda: check_sources(job.recipe, work))
    if job.stream_layers:
        from linearize.streaming import run_streamed

        results = run_streamed(job, work, watch, signals)
        if results is not None:
            return results
    watch({"event": "load", "model": job.source.name})
    processes.once(lambda: fetch(job.source) is None)
    model, tokenizer, info = load_teacher(job.source, job.dtype, processes.host, job.trust_remote_code)
    processes.once(lambda: workspace.same_teacher(work, info))
    job, scores = plan_probed(job, model, tokenizer, work, watch, processes)
    corpus = keep_corpus(job, tokenizer, work, processes)
    pairs = _pairs(job, tokenizer, work, processes)
    for part in (corpus, *pairs.values()):
        watch({"event": "data", "description": part.description})
    rows = Rows(work / "rows.json", watch, processes)
    samples: dict[str, str] = {"prompt": PROMPT}
    reference = None
    with evaluating(model, processes) as teacher:
        if not rows.complete(job):
            watch({"event": "evaluate", "name": "teacher"})
            reference = TeacherReference(teacher, corpus.held_out)
            rows.add({**reference.quality.row("teacher"), "tokens": 0, "seconds": 0.0})
        samples["teacher"] = sample(teacher, tokenizer, PROMPT)
    del teacher
    surgery = _convert(job, model)
    if surgery is not None and not rows.has("after surgery"):
        watch({"event": "evaluate", "name": "after surgery"})
        with evaluating(model, processes) as student:
            quality = evaluate(student, corpus.held_out, reference)
        rows.add({**quality.row("after surgery"), "tokens": 0, "seconds": 0.0})
        del student
    _stages(job, model, surgery, corpus, pairs, reference, work, processes, rows, watch, signals)
    with evaluating(model, processes) as student:
        samples["student"] = sample(student, tokenizer, PROMPT)
    del student
    provenance = run_provenance(job, info, corpus, time.time() - began)
    results = {**run_results(job, rows.rows, provenance), "samples": samples}
    watch({"event": "save"})
    processes.once(lambda: _save(job, model, tokenizer, results, work, scores))
    return results


def run_results(job: Job, rows: list[dict[str, Any]], provenance: dict[str, Any]) -> dict[str, Any]:
    """Return what `results.json` holds of every run.

    Args:
        job: with what a probe chose.
        rows: all that was measured.
        provenance: what a reader needs to judge or repeat it.
    """
    return {
        "model": job.source.name,
        "recipe": job.recipe.name,
        "rows": rows,
        "cache": [
            {"context": context, "teacher_bytes": teacher, "student_bytes": student}
            for context, (teacher, student) in job.plan.cache.items()
        ],
        "provenance": provenance,
        "recipe_yaml": job.plan.recipe.to_yaml(),
        "converted": job.recipe.mixer is not None,
        "causal": job.recipe.causal,
    }


def stage_run(
    job: Job,
    model: Any,
    surgery: Surgery | None,
    corpus: Corpus,
    work: Path,
    watch: Watch,
    signals: Signals,
    processes: Processes | None = None,
    load_teacher: Callable[[torch.device], Any] | None = None,
) -> Run:
    """Return what the stages of a job share; one process on the job's device by default."""
    processes = processes or Processes(device=job.device)
    return Run(
        model=model,
        surgery=surgery,
        corpus=corpus,
        folder=work / workspace.STAGES,
        seed=job.seed,
        device=processes.host,
        autocast=None if job.dtype == torch.float32 else job.dtype,
        metrics=work / "metrics.jsonl",
        progress=lambda record: watch({"event": "step", **record}),
        tell=watch,
        signals=signals,
        load_teacher=load_teacher,
        processes=processes,
    )


def run_provenance(job: Job, info: TeacherInfo, corpus: Corpus, seconds: float) -> dict[str, Any]:
    """Return what a reader needs to judge or repeat a run, and what the card's metadata say of teacher and data."""
    known = workspace.provenance(job.settings(), info, corpus, seconds)
    pairs = [stage.source for _, stage in job.recipe.schedule() if isinstance(stage, Preference)]
    sources = [*source_names(job.recipe.data), *pairs]
    named = [name.partition(":")[0] for name in dict.fromkeys(sources) if not is_local(name)]
    known["teacher"] |= {"base_model": base_model(job.source), "license": info.license}
    known["data"]["datasets"] = named
    return known


def _stages(
    job: Job,
    model: Any,
    surgery: Surgery | None,
    corpus: Corpus,
    pairs: dict[str, Corpus],
    reference: TeacherReference | None,
    work: Path,
    processes: Processes,
    rows: Rows,
    watch: Watch,
    signals: Signals,
) -> None:
    def teacher_on(device: torch.device) -> Any:
        where = processes.host if processes.sharded else device
        teacher = load_teacher(job.source, job.dtype, where, job.trust_remote_code)[0]
        if processes.sharded:
            shard(teacher, processes)
        return teacher

    run = stage_run(job, model, surgery, corpus, work, watch, signals, processes, teacher_on)
    tokens = seconds = 0.0
    recipe = job.recipe
    converted = [] if surgery is None else sorted(surgery.teachers)
    for index, (name, settings, turn) in enumerate(stage_names(recipe)):
        if surgery is not None and recipe.progressive > 1:
            surgery.activate(layer for earlier in range(turn + 1) for layer in recipe.joining(converted, earlier))
        given = pairs.get(name) or corpus.with_length(settings.row_length(recipe.data.length))
        own = replace(run, corpus=given, teacher_copy=needs_teacher_copy(recipe, model.config, index))
        if surgery is not None and isinstance(settings, Transfer):
            own.surgery = surgery.only(recipe.joining(converted, turn))
        spent = run_stage(settings, own, name)
        tokens, seconds = tokens + spent["tokens"], seconds + spent["seconds"]
        if not rows.has(f"after {name}"):
            watch({"event": "evaluate", "name": f"after {name}"})
            with evaluating(model, processes) as student:
                quality = evaluate(student, corpus.held_out, reference)
            del student
            rows.add({**quality.row(f"after {name}"), "tokens": int(tokens), "seconds": seconds})


def stage_names(recipe: Recipe) -> Iterator[tuple[str, Any, int]]:
    """Yield each stage that runs under a name of its own (`transfer`, `finetune`, `finetune-2`), and its round."""
    seen: dict[str, int] = {}
    for turn, settings in recipe.schedule():
        count = seen[settings.stage] = seen.get(settings.stage, 0) + 1
        yield settings.stage if count == 1 else f"{settings.stage}-{count}", settings, turn


class Rows:
    """The table of a run, kept on disk as it grows.

    Args:
        path: where.
        watch: told of every new row.
        processes: of which the first one's rows count.
    """

    def __init__(self, path: Path, watch: Watch, processes: Processes = ALONE) -> None:
        self.path = path
        self.watch = watch
        self.processes = processes
        self.rows: list[dict[str, Any]] = processes.once(
            lambda: json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        )

    def has(self, name: str) -> bool:
        """Return whether this row was measured."""
        return any(row["name"] == name for row in self.rows)

    def complete(self, job: Job) -> bool:
        """Return whether every row of the job was measured."""
        surgery = ["after surgery"] if job.recipe.mixer is not None else []
        names = ["teacher", *surgery, *(f"after {name}" for name, _, _ in stage_names(job.recipe))]
        return all(map(self.has, names))

    def add(self, row: dict[str, Any]) -> None:
        """Enter a row, unless it was measured before an interruption."""
        if not self.has(row["name"]):
            self.rows.append(self.processes.agreed(row))
            self.processes.once(self._write)
        self.watch({"event": "row", "row": row})

    def _write(self) -> None:
        replace_text(self.path, json.dumps(self.rows))


def keep_corpus(job: Job, tokenizer: Any, work: Path, processes: Processes = ALONE) -> Corpus:
    """The run's rows: those of an interrupted run, or new ones."""
    stages = [stage for _, stage in job.recipe.schedule() if not isinstance(stage, Preference)]
    longest = job.recipe.data.length
    tokens = max(longest, sum(stage.trained_tokens(longest) for stage in stages))
    masked = not job.recipe.causal
    build = partial(build_corpus, job.recipe.data, tokenizer, train_tokens=tokens, seed=job.seed, masked=masked)
    if is_lazy(job.recipe.data):
        return _kept(work / "data", partial(build, processes=processes), processes, together=True)
    return _kept(work / "data", build, processes)


def check_sources(recipe: Recipe, work: Path | None = None) -> None:
    """Raise where a file is missing that rows are still to be read from.

    Args:
        recipe: as it will run.
        work: the run's folder, which may hold rows already.

    Raises:
        LinearizeError: it is.
    """
    wanted = [("data", source, "`data.source`") for source in source_names(recipe.data)]
    for name, stage, _ in stage_names(recipe):
        if isinstance(stage, Preference):
            wanted.append((f"data-{name}", stage.source, f"`source` of the stage {name!r}"))
    for folder, source, setting in wanted:
        if work is None or not (work / folder).exists():
            check_source(source, setting)


def _pairs(job: Job, tokenizer: Any, work: Path, processes: Processes) -> dict[str, Corpus]:
    """The pairs of each preference stage, by its name."""
    found: dict[str, Corpus] = {}
    for name, stage, _ in stage_names(job.recipe):
        if isinstance(stage, Preference):
            length = stage.row_length(job.recipe.data.length)
            count = stage.steps(length) * stage.batch
            build = partial(build_preferences, stage, tokenizer, length=length, pairs=count, seed=job.seed)
            found[name] = _kept(work / f"data-{name}", build, processes)
    return found


def _kept(folder: Path, build: Callable[[], Corpus], processes: Processes, together: bool = False) -> Corpus:
    """The corpus in a folder, built and saved there first where it is not: by process 0, or by all together."""

    def save(corpus: Corpus) -> None:
        beside = folder.with_name(f"{folder.name}.new")
        shutil.rmtree(beside, ignore_errors=True)
        corpus.save(beside)
        sync_all(beside)
        beside.rename(folder)
        sync(folder.parent)

    if not processes.agreed(folder.exists()):
        made = build() if together else None
        processes.once(lambda: save(made or build()))
    return Corpus.load(folder)


def _convert(job: Job, model: Any) -> Surgery | None:
    recipe = job.plan.recipe
    if recipe.mixer is None:
        return None
    assert isinstance(recipe.exact_heads, list) and not recipe.probed  # the probe has chosen by now
    torch.manual_seed(job.seed)
    layers = converted_layers(recipe, model.config)
    return convert(model, recipe.mixer.model_dump(), layers, recipe.exact_heads)


def plan_probed(
    job: Job, model: Any, tokenizer: Any, work: Path, watch: Watch, processes: Processes = ALONE
) -> tuple[Job, ProbeScores | None]:
    """Return the job with layers and heads chosen by the probe, where its recipe leaves them to it, and the scores.

    The scores stay in the work folder: a run that goes on chooses what it chose before.
    """
    recipe, path, scores = job.recipe, work / FILE, None
    if not recipe.probed:
        return job, None
    if leaves_a_choice(recipe, model.config, job.dtype):
        if processes.agreed(path.exists()):
            scores = ProbeScores.read(path)
        elif recipe.probe.file is not None:
            scores = ProbeScores.read(Path(recipe.probe.file))
        else:
            with evaluating(model, processes) as teacher:
                scores = _score(teacher, tokenizer, recipe, job.source.name, job.seed, watch)
            del teacher
        scores = processes.agreed(scores)
        processes.once(partial(scores.write, path))
        chosen = resolve_heads(recipe, scores, model.config, job.dtype)
    else:  # the cache budget buys no head, or every head
        chosen = place_heads(recipe, model.config, job.dtype)
    plan = make_plan(
        chosen, model.config, model=job.source.name, dtype=job.dtype, stream=job.stream_layers, part=job.layers
    )
    windows = chosen.mixer.window.size if recipe.window_budget and chosen.mixer and chosen.mixer.window else None
    memories = chosen.mixer.memory_layers if recipe.memory_choice and chosen.mixer else None  # a list, or "all"
    told = {"heads": chosen.exact_heads, "layers": chosen.layers, "windows": windows, "memories": memories}
    watch({"event": "probed", **told})
    return replace(job, plan=plan), scores


def _score(model: Any, tokenizer: Any, recipe: Recipe, name: str, seed: int, watch: Watch) -> ProbeScores:
    watch({"event": "probe", "name": name})

    def tell(done: int, total: int) -> None:
        watch({"event": "probe step", "done": done, "total": total})

    return run_probe(model, tokenizer, recipe, name=name, seed=seed, progress=tell)


def _save(
    job: Job,
    model: Any,
    tokenizer: Any,
    results: dict[str, Any],
    work: Path,
    scores: ProbeScores | None,
) -> None:
    """Write the whole finished folder into the work folder."""
    final = work / workspace.FINAL
    shutil.rmtree(final, ignore_errors=True)
    if job.recipe.mixer is None:
        model.save_pretrained(final)
        tokenizer.save_pretrained(final)
    else:
        save_checkpoint(model, tokenizer, final)
    describe(job, results, work, scores)


def describe(job: Job, results: dict[str, Any], work: Path, scores: ProbeScores | None) -> None:
    """Write what stands beside the weights in a finished folder: metrics, lock file, results, report and card."""
    final = work / workspace.FINAL
    records = read_metrics(work / "metrics.jsonl")
    if records:
        shutil.copy(work / "metrics.jsonl", final / "metrics.jsonl")
    lock: dict[str, Any] = {"settings": json.loads(json.dumps(job.settings())), "provenance": results["provenance"]}
    if scores is not None:
        chosen = job.plan.recipe.model_dump(mode="json")
        lock["chosen"] = {"layers": chosen["layers"], "exact_heads": chosen["exact_heads"]}
        if job.recipe.window_budget is not None:
            lock["chosen"]["windows"] = chosen["mixer"]["window"]["size"]
        if job.recipe.memory_choice is not None:
            lock["chosen"]["memory_layers"] = chosen["mixer"]["memory_layers"]
        scores.write(final / FILE)
        _draw_probe(scores, final, chosen["exact_heads"])
    write_text(final / workspace.RESULTS, json.dumps(results, indent=2))
    write_pages(final, results, records)
    lock["files"] = sorted([*written_files(final), workspace.LOCK])
    write_text(final / workspace.LOCK, yaml_io.dump(lock))


def _draw_probe(scores: ProbeScores, folder: Path, chosen: list[list[int]]) -> None:
    """Write the heat map of the scores."""
    picture = draw_png("probe", {"scores": scores, "chosen": chosen})
    assert picture is not None
    (folder / "probe.png").write_bytes(picture)


def probe(
    model: str | Path,
    recipe: Recipe | str | Path = "untrained",
    output: str | Path | None = None,
    *,
    fresh: bool = False,
    watch: Watch | None = None,
    **settings: Any,
) -> tuple[ProbeScores, Path]:
    """Score what each KV head and each layer of a teacher is worth as exact softmax, under a recipe's window.

    Args:
        model: alias, local folder, hub id or .gguf file.
        recipe: gives the window, the `probe` section and what it would choose.
        output: folder for probe.json and probe.png; `./<model>-probe` by default. Scores that lie there are returned.
        fresh: score anew and replace them.
        watch: called with every event.
        **settings: quick, seed, device, dtype, overrides, trust_remote_code, as in `linearize`.

    Returns:
        The scores and the folder.

    Raises:
        LinearizeError: something given does not work, or other scores lie in the folder.
    """
    job = prepare_job(model, recipe, **settings)
    if job.recipe.probe.file is not None:
        raise LinearizeError("`probe.file` holds the scores of an earlier probe, and this one makes its own; drop it.")
    folder = Path(output) if output is not None else Path(f"{job.source.name}-probe")
    config = load_config(job.source, job.trust_remote_code)
    wanted = {"samples": sample_settings(job.recipe, job.seed), "model": job.source.name}
    if (folder / FILE).exists() and not fresh:
        scores = ProbeScores.read(folder / FILE)
        scores.check(config, job.recipe, str(folder / FILE))
        found = {"samples": scores.samples, "model": scores.model}
        if found != wanted:
            raise LinearizeError(
                f"{folder / FILE} was made from {found}, and {wanted} is asked for. Give another folder with --output, "
                "or replace it with --fresh."
            )
        return scores, folder
    check_writable(folder, "Give another folder with --output.")
    loaded, tokenizer, _ = load_teacher(job.source, job.dtype, job.device, job.trust_remote_code)
    scores = _score(loaded, tokenizer, job.recipe, job.source.name, job.seed, watch or (lambda event: None))
    folder.mkdir(parents=True, exist_ok=True)
    scores.write(folder / FILE)
    chosen = resolve_heads(job.recipe, scores, config, job.dtype).model_dump(mode="json")["exact_heads"]
    _draw_probe(scores, folder, chosen)
    return scores, folder


def _silent(event: dict[str, Any]) -> None:
    """What the other processes tell of a run."""


def _watcher(watch: Watch | None, track: str | None, work: Path) -> Watch:
    log = None if track is None else tracker(track, work)

    def tell(event: dict[str, Any]) -> None:
        if log is not None and event["event"] == "step":
            log(event["stage"], event["step"], {k: v for k, v in event.items() if isinstance(v, float)})
        if watch is not None:
            watch(event)

    return tell


def check_device(name: str | None, setting: str = "--device") -> torch.device:
    """Return the device that a setting names; the first GPU by default, else the CPU.

    Raises:
        LinearizeError: there is no such device, or `LINEARIZE_BACKEND` names nothing that runs on it.
    """
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name is None else name)
    except RuntimeError as error:
        raise LinearizeError(f"{setting} {name} is no device; use cpu, cuda or cuda:1.") from error
    if device.type not in ("cpu", "cuda"):
        raise LinearizeError(f"{setting} {name} is not served; use cpu or cuda.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise LinearizeError(f"{setting} {name}: PyTorch sees {torch.cuda.device_count()} CUDA devices here.")
    try:
        explain("gated_linear", device, torch.float32)
    except ValueError as error:
        raise LinearizeError(str(error)) from None
    return device


def check_seed(seed: int) -> None:
    """Raise unless a number can be the seed of everything random.

    Raises:
        LinearizeError: it cannot.
    """
    if not isinstance(seed, int) or not 0 <= seed < SEEDS:
        raise LinearizeError(f"--seed is {seed!r}; expected a whole number from 0 to {SEEDS - 1}.")


def check_dtype(name: str) -> torch.dtype:
    """Return the dtype that `--dtype` names.

    Raises:
        LinearizeError: it is none of the three.
    """
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise UnknownNameError("dtype", name, known, "--dtype")
    return known[name]

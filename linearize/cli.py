"""The `linearize` command. Bare flags mean `run`; nothing heavy is imported before the arguments are parsed."""

from __future__ import annotations

import math
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from linearize.environment import launched
from linearize.errors import LinearizeError, UnknownNameError, memory_full

app = typer.Typer(
    name="linearize",
    help="Convert pretrained Transformers into gated-linear and hybrid models. Bare flags mean `run`.",
    epilog="Start with `linearize --model smollm2-135m --recipe liger --quick`. "
    "Add --debug to any command to see the traceback behind an error.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[str, typer.Option("--model", help="Folder, hub id, .gguf file or alias (`linearize ls models`).")]
RecipeName = Annotated[str, typer.Option("--recipe", help="Name or YAML file (`linearize ls recipes`).")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY.PATH=VALUE", help="Settings that replace the recipe's.")
]
DataSource = Annotated[str | None, typer.Option("--data", help="builtin, a file, a folder or a hub id.")]
Tokens = Annotated[str | None, typer.Option("--tokens", help="Total over all stages: 40000, 40K, 2M, 1.5B.")]
Quick = Annotated[bool, typer.Option("--quick", help="Builtin data and a token budget fit for a CPU.")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1; the first GPU by default.")]
Dtype = Annotated[
    str | None, typer.Option("--dtype", help="float32, bfloat16 or float16; chosen by the device if not.")
]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run the Python files of the teacher's checkpoint.")]
Streamed = Annotated[
    bool, typer.Option("--stream-layers", help="Transfer one layer at a time, read from the teacher's files.")
]
Layers = Annotated[
    str | None,
    typer.Option(metavar="FIRST:END", help="Stream these layers alone, as a part for `linearize merge`."),
]
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A finished output folder.")]


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0, 2 for a user's mistake, 130 for Ctrl-C and 143 for SIGTERM.

    Args:
        arguments: what follows the program's name; those of this process by default.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    try:
        words = _check_words(_with_command([word for word in given if word != "--debug"]))
        app(args=words, prog_name="linearize", obj=_again(given))
    except (LinearizeError, OSError, RuntimeError) as error:
        said = _mistake(error)
        if debug or said is None:
            raise
        typer.echo(f"error: {said}", err=True)
        sys.exit(2)
    except SystemExit as stopped:
        if isinstance(stopped.__context__, typer.Abort):
            sys.exit(128 + signal.SIGINT)
        raise
    sys.exit(0)


def _mistake(error: Exception) -> str | None:
    """Return what to say of an error that a user or the machine made; None for one of the program's own."""
    if isinstance(error, LinearizeError):
        return str(error)
    if isinstance(error, OSError):
        named = error.filename is not None and error.strerror is not None
        return str(LinearizeError(f"{error.filename}: {error.strerror}." if named else str(error))) or None
    said = memory_full(error) if isinstance(error, RuntimeError) else None
    return said and f"Memory is full ({said}). End what else runs on this device, or name another."


def _first_process() -> bool:
    """Return whether this is the process that speaks, of those that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


def _again(given: list[str]) -> str:
    """Return the command that goes on with a run that was begun with these words."""
    program = Path(sys.argv[0])
    if program.name == "__main__.py":
        found = shutil.which("python")
        same = found is not None and Path(found).resolve() == Path(sys.executable).resolve()
        start = ["python" if same else sys.executable, "-m", "linearize"]
    else:
        found = shutil.which("linearize")
        start = [str(program) if found is None or Path(found) != program.absolute() else "linearize"]
    return shlex.join([*start, *(word for word in given if word != "--fresh")])


def _stopped(stop: KeyboardInterrupt, words: str) -> typer.Exit:
    """Say once what a signal leaves behind, and return how the command ends."""
    number = getattr(stop, "number", signal.SIGINT)
    if _first_process():
        typer.echo(f"Stopped by {signal.Signals(number).name}. {words}", err=True)
    return typer.Exit(128 + number)


def _with_command(given: list[str]) -> list[str]:
    """Put `run` before bare flags or overrides, and refuse an unknown command by name."""
    if not given:
        return ["--help"]
    first = given[0]
    if first in ("-h", "--help", "--version"):
        return given
    if first.startswith("-") or "=" in first:
        return ["run", *given]
    commands = [command.name or str(getattr(command.callback, "__name__", "")) for command in app.registered_commands]
    if first not in commands:
        raise UnknownNameError("command", first, commands)
    if first != "run" and launched() > 1:
        raise LinearizeError(
            f"`{first}` works in one process, and the launcher started {launched()}. Call `linearize {first}` "
            "without it; runs alone take several."
        )
    return given


def _check_words(words: list[str]) -> list[str]:
    """Return the words of a command, all of them text, and none empty but a prompt: that is the working folder."""
    for word in words:
        if not word.isascii() and word != word.encode(errors="replace").decode():
            raise LinearizeError(
                f"{word!r} is not UTF-8 text, as all that reports and settings name must be. Rename it."
            )
    named = words[: words.index("--")] if "--" in words else words
    for before, word in pairwise(named):
        option, equals, value = word.partition("=")
        if equals and not value and option.startswith("--"):
            raise LinearizeError(f"{option} is empty. Give it a value, or leave it out.")
        if not word and before.startswith("--"):
            raise LinearizeError(f"{before} is empty. Give it a value, or leave it out.")
        if not word and (words[0] != "generate" or before == words[0]):
            raise LinearizeError(f"An argument of `{words[0]}` is empty. Give it a value, or leave it out.")
    return words


def _print_version(asked: bool) -> None:
    if asked:
        from linearize import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Options before any command."""


@app.command()
def run(
    context: typer.Context,
    model: Model,
    recipe: RecipeName,
    overrides: Overrides = None,
    output: Annotated[Path | None, typer.Option(help="Folder; ./<model>-<recipe> by default.")] = None,
    data: DataSource = None,
    tokens: Tokens = None,
    quick: Quick = False,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    device: Device = None,
    dtype: Dtype = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check all of it, print the plan and stop.")] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start over in the output folder instead of going on.")
    ] = False,
    track: Annotated[str | None, typer.Option(help="tensorboard or wandb, beside metrics.jsonl.")] = None,
    push_to_hub: Annotated[str | None, typer.Option(metavar="ORG/NAME", help="Upload the finished folder.")] = None,
    stream_layers: Streamed = False,
    layers: Layers = None,
    trust_remote_code: Trust = False,
) -> None:
    """Convert a model, recover its quality, evaluate and save it."""
    from linearize import api

    settings: dict[str, Any] = {
        "output": output,
        "fresh": fresh,
        "push_to_hub": push_to_hub,
        "track": track,
        "data": data,
        "tokens": _tokens(tokens),
        "quick": quick,
        "seed": seed,
        "device": device,
        "dtype": dtype,
        "overrides": overrides or [],
        "stream_layers": stream_layers,
        "layers": layers,
        "trust_remote_code": trust_remote_code,
    }
    if dry_run:
        _print(api.plan(model, recipe, **settings).render())
        return
    from linearize.display import RunDisplay, quiet_libraries, show_pushed, show_results
    from linearize.processes import leave

    quiet_libraries()
    display = RunDisplay()
    try:
        result = api.linearize(model, recipe, watch=display, **settings)
    except KeyboardInterrupt as stop:
        display.close()
        kept = f"{found}. " if (found := getattr(stop, "kept", "")) else ""
        again = f"Go on with:\n{context.obj}" if launched() == 1 else "The same launch goes on."
        raise _stopped(stop, kept + again) from None
    finally:
        display.close()
    leave()
    if not _first_process():
        return
    if result.finished_before:
        typer.echo(f"{result.output} is finished already; --fresh makes it anew.")
    if layers is not None:
        typer.echo(f"Layers {layers}: {result.output}. Join the parts with: linearize merge PART... --output DIR")
        return
    show_results(result.results, result.output)
    if result.pushed is not None:
        show_pushed(result.pushed)


@app.command()
def plan(
    model: Model,
    recipe: RecipeName,
    overrides: Overrides = None,
    data: DataSource = None,
    tokens: Tokens = None,
    quick: Quick = False,
    device: Device = None,
    dtype: Dtype = None,
    stream_layers: Streamed = False,
    layers: Layers = None,
    trust_remote_code: Trust = False,
    speed: Annotated[
        str | None,
        typer.Option(metavar="STAGE=N,...|DIR", help="Measured tokens a second, or a finished run; for the time."),
    ] = None,
) -> None:
    """Print what a run would do: layers, stages, tokens, memory, disk. Loads no weights."""
    from linearize import api
    from linearize.speeds import read_speeds

    chosen = api.plan(
        model,
        recipe,
        data=data,
        tokens=_tokens(tokens),
        quick=quick,
        device=device,
        dtype=dtype,
        overrides=overrides or [],
        stream_layers=stream_layers,
        layers=layers,
        trust_remote_code=trust_remote_code,
    )
    _print(chosen.render(None if speed is None else read_speeds(speed, [stage.name for stage in chosen.stages])))


@app.command()
def merge(
    parts: Annotated[list[Path], typer.Argument(metavar="PART...", help="Folders that --layers made, in any order.")],
    output: Annotated[Path, typer.Option(help="The finished folder.")],
    fresh: Annotated[bool, typer.Option("--fresh", help="Replace the folder of an earlier merge.")] = False,
) -> None:
    """Join parts of a transfer that were made by layers into one finished folder."""
    from linearize.display import RunDisplay, quiet_libraries
    from linearize.streaming import merge as join

    quiet_libraries()
    result = join(parts, output, fresh=fresh, watch=RunDisplay())
    if result.finished_before:
        typer.echo(f"{result.output} is finished already; --fresh makes it anew.")
    typer.echo(f"Checkpoint: {result.output}. Nothing was measured; `linearize eval {result.output}` does that.")


@app.command()
def probe(
    model: Model,
    recipe: RecipeName = "untrained",
    overrides: Overrides = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for probe.json and probe.png; ./<model>-probe by default.")
    ] = None,
    quick: Quick = False,
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 0,
    device: Device = None,
    dtype: Dtype = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Score anew where scores lie in the folder.")] = False,
    trust_remote_code: Trust = False,
) -> None:
    """Score what each KV head and each layer is worth as exact softmax: recall, divergence, HALO."""
    from linearize import api
    from linearize.display import RunDisplay, probe_table, quiet_libraries
    from linearize.interrupt import Signals

    quiet_libraries()
    display = RunDisplay()
    try:
        with Signals():
            scores, folder = api.probe(
                model,
                recipe,
                output,
                quick=quick,
                seed=seed,
                device=device,
                dtype=dtype,
                overrides=overrides or [],
                fresh=fresh,
                trust_remote_code=trust_remote_code,
                watch=display,
            )
    except KeyboardInterrupt as stop:
        display.close()
        raise _stopped(stop, "A probe keeps nothing before its end.") from None
    finally:
        display.close()
    _print(probe_table(scores))
    typer.echo(f"Scores: {folder / 'probe.json'}   heat map: {folder / 'probe.png'}")
    typer.echo(f"A run or plan takes them with: probe.file={folder / 'probe.json'}")


@app.command()
def ls(
    what: Annotated[str | None, typer.Argument(help="recipes, models, parts or families; all by default.")] = None,
) -> None:
    """List recipes, models, mixer parts and model families."""
    from linearize import listing

    for table in listing.tables(what):
        _print(table)


@app.command()
def show(
    recipe: Annotated[str, typer.Argument(help="Name or YAML file.")],
    overrides: Overrides = None,
    full: Annotated[bool, typer.Option("--full", help="With every default written out.")] = False,
) -> None:
    """Print a recipe; with --full or overrides, every key of it."""
    from linearize.recipe import Recipe, recipe_path

    loaded = Recipe.from_yaml(recipe, overrides or [])
    text = loaded.to_yaml() if full or overrides else recipe_path(recipe).read_text(encoding="utf-8")
    typer.echo(text, nl=False)


@app.command()
def cp(
    recipe: Annotated[str, typer.Argument(help="Name or YAML file.")],
    file: Annotated[Path, typer.Argument(help="A new .yaml file, to be edited.")],
) -> None:
    """Copy a recipe to a file of your own."""
    from linearize.listing import copy_recipe

    copy_recipe(recipe, file)
    typer.echo(f"Wrote {file}. Run it with: linearize --model MODEL --recipe {file}")


@app.command()
def validate(
    file: Annotated[str, typer.Argument(help="Name or YAML file of a recipe.")],
    overrides: Overrides = None,
    model: Annotated[
        str | None, typer.Option(help="Also check layers, heads and LoRA targets against a model.")
    ] = None,
) -> None:
    """Check a recipe's keys, types and mixer parts."""
    from linearize import api
    from linearize.mixers import check_mixer
    from linearize.recipe import Recipe

    asked = Recipe.from_yaml(file)
    recipe = asked.with_overrides(overrides or [])
    if recipe.mixer is not None:
        check_mixer(recipe.mixer.model_dump(), causal=recipe.causal)
    recipe.check_probe(asked)
    api.check_sources(recipe)
    if model is not None:
        api.plan(model, recipe)
    typer.echo(f"{file} is a valid recipe{f' for {model}' if model else ''}.")


@app.command("eval")
def evaluate(
    context: typer.Context,
    folder: Folder,
    suite: Annotated[str, typer.Option(help="quick, paper or full.")] = "quick",
    against: Annotated[
        str | None, typer.Option(help="The teacher, as for --model, or none; the run's own by default.")
    ] = None,
    control: Annotated[
        list[str] | None, typer.Option(help="Another run's folder to stand beside it; repeatable.")
    ] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="Text: wikitext2, a file, a folder or a hub id; repeatable.")
    ] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Rows of each text.")] = None,
    length: Annotated[int | None, typer.Option(min=8, help="Tokens a row.")] = None,
    recall: Annotated[str | None, typer.Option(help="Recall tasks, separated by commas, or none.")] = None,
    lengths: Annotated[str | None, typer.Option(help="Tokens of a recall sample: 512,1024.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Of each recall and generation task.")] = None,
    no_generation: Annotated[bool, typer.Option("--no-generation", help="Let no model write.")] = False,
    tasks: Annotated[str | None, typer.Option(help="Of lm-evaluation-harness, separated by commas, or none.")] = None,
    task_data: Annotated[Path | None, typer.Option(help="Folder with local files of the tasks.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions of each such task.")] = None,
    contexts: Annotated[str | None, typer.Option(help="At which speed is measured: 1024,8192, or none.")] = None,
    batches: Annotated[str | None, typer.Option(help="Rows at once there: 1,16.")] = None,
    batch_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of a forward pass.")] = None,
    seed: Annotated[int, typer.Option(help="Of recall samples and prompts.")] = 0,
    output: Annotated[Path | None, typer.Option(help="Folder of the report; DIR/eval by default.")] = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Evaluate a finished folder beside its teacher and its controls."""
    from linearize.display import quiet_libraries, show_evaluation
    from linearize.evaluation import FOLDER, evaluate_folder
    from linearize.interrupt import Signals

    quiet_libraries()
    try:
        with Signals():
            results = evaluate_folder(
                folder,
                suite=suite,
                against=against,
                controls=control or (),
                data=data,
                task_data=task_data,
                device=device,
                dtype=dtype,
                batch_tokens=batch_tokens,
                seed=seed,
                output=output,
                watch=lambda words: typer.echo(words, err=True),
                rows=rows,
                length=length,
                recall=recall,
                lengths=lengths,
                samples=samples,
                generation=False if no_generation else None,
                tasks=tasks,
                limit=limit,
                contexts=contexts,
                batches=batches,
            )
    except KeyboardInterrupt as stop:
        raise _stopped(stop, f"Answers to tasks are kept as they came. Go on with:\n{context.obj}") from None
    show_evaluation(results, output or folder / FOLDER)


@app.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Evaluated runs, or eval.json files.")],
    output: Annotated[Path | None, typer.Option(help="A .json file for the table.")] = None,
) -> None:
    """Put evaluations side by side."""
    from linearize.evaluation import compare as read_all
    from linearize.evaluation import write_comparison
    from linearize.report import compare_cells, rich_table

    cells = compare_cells(read_all(folders))
    if output is not None:
        write_comparison(cells, folders, output)
    _print(rich_table(cells, "Evaluations side by side"))


@app.command()
def generate(
    folder: Folder,
    prompt: Annotated[str | None, typer.Argument(help="Text to continue, or the first message.")] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Keep a conversation: a line of standard input is a message.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the text or of an answer.")] = 128,
    device: Device = None,
) -> None:
    """Continue a prompt with a finished model, word by word; speed and bytes of its state go to standard error."""
    if prompt is None and not chat:
        raise LinearizeError("There is nothing to continue. Give a prompt behind the folder, or --chat to talk.")
    from linearize.display import quiet_libraries
    from linearize.generation import Writer

    quiet_libraries()
    writer = Writer(folder, max_new_tokens=max_new_tokens, device=device)
    write = writer.answer if chat else writer.text
    try:
        for message in _messages(prompt, chat):
            for piece in write(message):
                typer.echo(piece, nl=False)
                sys.stdout.flush()
            typer.echo()
            typer.echo(writer.report(), err=True)
    except KeyboardInterrupt:
        typer.echo()
        raise typer.Exit(130) from None


def _messages(first: str | None, more: bool) -> Iterator[str]:
    """Yield the first message, then lines of standard input until it ends."""
    if first is not None:
        yield first
    while more:
        if sys.stdin.isatty():
            typer.echo("> ", nl=False, err=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


@app.command()
def push(
    folder: Folder,
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Of the Hub; made where there is none.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="A branch; main by default.")] = None,
    pr: Annotated[bool, typer.Option("--pr", help="Open a pull request in a repository that exists.")] = False,
    adapter_only: Annotated[
        bool,
        typer.Option("--adapter-only", help="Leave out the teacher's own tensors; linearize.load joins them again."),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would go up, and send nothing.")] = False,
) -> None:
    """Upload a finished folder to the Hugging Face Hub: one commit, with a tag."""
    from linearize import hub
    from linearize.display import show_pushed, show_upload

    if dry_run:
        hub.check_target(repository, revision, pr)
        with hub.chosen_folder(folder, adapter_only) as chosen:
            show_upload(hub.choose_files(chosen), repository)
        return
    pushed = hub.push(folder, repository, private=private, revision=revision, pr=pr, adapter_only=adapter_only)
    show_pushed(pushed)


@app.command()
def doctor() -> None:
    """Print versions, devices, each op's backend and why, and check each op against its fp64 reference."""
    import torch

    from linearize import doctor as checks

    for name, version in checks.versions().items():
        typer.echo(f"{name:<14}{version}")
    for device in checks.devices():
        typer.echo(f"{'device':<14}{device}")
    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    reports = [checks.check_op(op, device, dtype) for op in checks.OPS]
    for report in reports:
        verdict = "ok" if report.passed else "WRONG"
        typer.echo(f"{report.op:<14}{report.backend} ({report.why}); parity {report.error:.1e} {verdict}")
    if not all(report.passed for report in reports):
        raise typer.Exit(1)


def _tokens(text: str | None) -> int | None:
    """Return a token count such as 40000, 40_000, 40K, 2M or 1.5B."""
    if text is None:
        return None
    unit = {"K": 10**3, "M": 10**6, "B": 10**9}.get(text[-1:].upper(), 1)
    number = text[:-1] if unit > 1 else text
    try:
        count = float(number) * unit
    except ValueError:
        count = 0.0
    if not math.isfinite(count) or count < 1 or count != int(count):
        raise LinearizeError(f"--tokens is {text!r}; expected a positive whole number such as 40000, 40K, 2M or 1.5B.")
    return int(count)


def _print(renderable: Any) -> None:
    from linearize.display import terminal

    terminal().print(renderable)


if __name__ == "__main__":
    main()

"""What the terminal shows of a run: progress bars with tokens/s, loss and time left, then its tables."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from linearize.eval.memory import format_bytes
from linearize.head_scores import ProbeScores
from linearize.hub import Pushed, Upload
from linearize.recipe_mixer import Measure
from linearize.report import (
    answer_cells,
    cache_cells,
    quality_cells,
    rich_table,
    speed_cells,
    text_cells,
    verdicts,
)
from linearize.report.table import number, small


def terminal() -> Console:
    """Return the console of standard output; a file or a pipe gets lines of 120 columns."""
    return Console(width=None if sys.stdout.isatty() else 120)


def quiet_libraries() -> None:
    """Turn off the progress bars of transformers, which would run into ours, and let warnings be one line."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"


MEASURES: tuple[Measure, ...] = get_args(Measure)


class RunDisplay:
    """Shows a run's events as they come; pass it to `linearize.linearize` as `watch`.

    Args:
        console: where to; the terminal by default.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or terminal()
        self._progress: Progress | None = None
        self._task = TaskID(0)

    def __call__(self, event: dict[str, Any]) -> None:
        """Show one event."""
        kind = event["event"]
        if kind == "step":
            self._step(event)
            return
        if kind == "probe step" and self._progress is not None:
            self._progress.update(self._task, completed=event["done"], total=event["total"])
            return
        if kind in ("resume", "damaged"):  # above the bar of the stage that it is about
            self.console.print(escape(_checkpoint_words(event)))
            return
        if kind == "memory":
            self.console.print(f"Memory is full: {event['rows']} rows at a time from now on")
            return
        self.close()
        if kind == "load":
            self.console.print(f"Loading {escape(event['model'])}")
        elif kind == "data":
            self.console.print(f"Data: {escape(event['description'])}")
        elif kind == "evaluate":
            self.console.print(f"Evaluating: {escape(event['name'])}")
        elif kind == "row":
            self.console.print(f"  {escape(_row_words(event['row']))}")
        elif kind == "stage":
            if event["ended"]:
                self.console.print(f"{escape(event['stage'])}: all {event['steps']} steps were done before")
            else:
                self._start(event["stage"], event["steps"])
        elif kind == "probe":
            self.console.print(f"Probing what each KV head of {escape(event['name'])} is worth")
            self._start("layers", None)
        elif kind == "probed":
            heads = " ".join(f"({layer},{head})" for layer, head in event["heads"])
            self.console.print(f"Exact KV heads (layer, head): {heads or 'none'}")
            if event["windows"] is not None:
                self.console.print(f"Windows, by layer: {' '.join(map(str, event['windows']))}")
            if event["memories"] is not None:
                layers = event["memories"] if event["memories"] != "all" else ["none"]  # where all heads are exact
                self.console.print(f"Layers with a memory: {' '.join(map(str, layers))}")
        elif kind == "save":
            self.console.print("Writing the checkpoint and the report")

    def close(self) -> None:
        """Take down the progress bar, if one is up."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _start(self, stage: str, steps: int | None) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[speed]} tokens/s"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=self.console,
        )
        self._task = self._progress.add_task(stage, total=steps, loss="-", speed="-")
        self._progress.start()

    def _step(self, event: dict[str, Any]) -> None:
        if self._progress is not None:
            loss, speed = small(event["loss"]), number(event["tokens_per_second"])
            self._progress.update(self._task, completed=event["step"], total=event["steps"], loss=loss, speed=speed)


def probe_table(scores: ProbeScores, count: int = 10) -> Table:
    """Return the heads that are worst to lose, by each measure of the probe."""
    together = " ".join(f"({layer},{head})" for layer, head in scores.joint[:count])
    caption = f"together: {together}" if together else None
    table = Table("", *MEASURES, title=f"{escape(scores.model)}: (layer, KV head) worst to lose first", caption=caption)
    ranked = {by: scores.rank_heads(by)[:count] for by in MEASURES}
    values = {(unit.layer, unit.head): unit for unit in scores.heads()}
    for place in range(min(count, len(values))):
        cells = [(ranked[by][place], by) for by in MEASURES]
        table.add_row(
            str(place + 1),
            *(f"({pair[0]},{pair[1]})  {small(getattr(values[pair], by))}" for pair, by in cells),
        )
    return table


def show_results(results: dict[str, Any], output: Path, console: Console | None = None) -> None:
    """Print a finished run: quality, cache, sample continuations and where it lies.

    Args:
        results: as in `results.json`.
        output: the finished folder.
        console: where to; the terminal by default.
    """
    console = console or terminal()
    console.print(rich_table(quality_cells(results), f"{escape(results['model'])}, recipe {escape(results['recipe'])}"))
    if results.get("cache"):
        console.print(rich_table(cache_cells(results), "Bytes of cache, one row"))
    samples = results.get("samples", {})
    for who in ("teacher", "student"):
        if who in samples:
            console.print(f"[bold]{who}[/bold]: {escape(samples.get('prompt', ''))}[dim]{escape(samples[who])}[/dim]")
    console.print(f"Checkpoint: {escape(str(output))}   report: {escape(str(output / 'report.html'))}")


def show_upload(upload: Upload, repository: str, console: Console | None = None) -> None:
    """Print what of a folder would go up.

    Args:
        upload: what `choose_files` returns.
        repository: where to.
        console: where to print; the terminal by default.
    """
    console = console or terminal()
    table = Table("file", title=f"Would go to {escape(repository)} in one commit, tag v{upload.version}")
    table.add_column("bytes", justify="right")
    for name, size in upload.files.items():
        table.add_row(escape(name), f"{size:,}")
    console.print(table)
    console.print(f"{len(upload.files)} files, {format_bytes(sum(upload.files.values()))}; nothing was sent.")
    _show_left_out(upload, console)


def show_pushed(pushed: Pushed, console: Console | None = None) -> None:
    """Print what a push left on the Hub.

    Args:
        pushed: what `push` returns.
        console: where to print; the terminal by default.
    """
    console = console or terminal()
    size = format_bytes(sum(pushed.upload.files.values()))
    console.print(f"Pushed {len(pushed.upload.files)} files, {size}: {escape(pushed.url)}", soft_wrap=True)
    if pushed.tag is not None:
        console.print(f"Tag {escape(pushed.tag)} on commit {pushed.commit[:7]}")
    if pushed.note:
        console.print(escape(pushed.note))
    _show_left_out(pushed.upload, console)


def _show_left_out(upload: Upload, console: Console) -> None:
    if upload.left_out:
        names = ", ".join(upload.left_out)
        console.print(f"Left out, since the run did not write it: {escape(names)}", soft_wrap=True)


def show_evaluation(results: dict[str, Any], output: Path, console: Console | None = None) -> None:
    """Print an evaluation: its table, speed where it was measured, and what the memory is worth.

    Args:
        results: as in `eval.json`.
        output: where it lies.
        console: where to; the terminal by default.
    """
    console = console or terminal()
    title = f"{results['name']}: {results['model']}, recipe {results['recipe']}, suite {results['suite']['name']}"
    console.print(rich_table(text_cells(results), escape(title)))
    parts = {
        "Per cent right: recall and generation with 95 % intervals, tasks with standard errors": answer_cells(results),
        "Speed and memory": speed_cells(results),
    }
    for name, cells in parts.items():
        if cells.rows:
            console.print(rich_table(cells, name))
    for sentence in verdicts(results):
        console.print(escape(sentence))
    console.print(f"Report: {escape(str(output / 'eval.md'))}")


def _checkpoint_words(event: dict[str, Any]) -> str:
    if event["event"] == "damaged":
        return f"{event['checkpoint']} is damaged and is not used: {event['stage']} and what follows are trained again"
    left = f" ({', '.join(event['damaged'])}: not whole, not used)" if event["damaged"] else ""
    return f"Going on from step {event['step']} with {event['checkpoint']}{left}"


def _row_words(row: dict[str, Any]) -> str:
    words = [f"{row['name']}: perplexity {number(row['perplexity'])}"] if "perplexity" in row else [row["name"]]
    if row.get("kl") is not None:
        words.append(f"KL to teacher {small(row['kl'])}")
    return ", ".join(words)

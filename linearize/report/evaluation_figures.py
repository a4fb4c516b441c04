"""Figures of an evaluation: perplexity by position, a heat map of recall, cost against context."""

from __future__ import annotations

import math
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from linearize.eval.memory import format_bytes
from linearize.report.figures import FIGURES, STUDENT, TEACHER, log_axis, panels
from linearize.report.table import Results

OFF_SCALE = 4.0
CONTROL_COLOURS = ("#d1495b", "#edae49", "#66a182", "#8d6a9f", "#3b3b3b", "#b86f52")


def tints(models: list[Results]) -> dict[str, Any]:
    """Return each model's colour: teacher grey, student blue, controls their own."""
    own = iter(CONTROL_COLOURS * (1 + len(models) // len(CONTROL_COLOURS)))
    fixed = {"teacher": TEACHER, "student": STUDENT}
    return {model["name"]: fixed.get(model["role"]) or next(own) for model in models}


def perplexity_figure(results: Results) -> Figure | None:
    """Draw perplexity by position in the document, a panel per text, with the window and the trained length marked."""
    models, colours = results["models"], tints(results["models"])
    texts = [
        text["name"]
        for text in results["texts"]
        if any(len(model["text"].get(text["name"], {}).get("by_position", ())) > 1 for model in models)
    ]
    if not texts:
        return None
    figure, panel = panels(len(texts), 4.0)
    for text, axes in zip(texts, panel, strict=True):
        values: list[float] = []
        main_values = [v for model in models if model["role"] != "control" for v in curve_of(model, text)]
        ceiling = OFF_SCALE * max(main_values, default=math.inf)
        for model in models:
            spans, curve = model["text"].get(text, {}).get("by_position", ()), curve_of(model, text)
            if curve and min(curve) > ceiling:  # a ruined control would flatten what is to be compared
                axes.plot(
                    [], [], color=colours[model["name"]], linestyle="--", label=f"{model['name']} (off the scale)"
                )
                continue
            values += curve
            main = model["role"] != "control"
            axes.plot(
                [math.sqrt(span["start"] * span["stop"]) for span in spans],
                curve,
                color=colours[model["name"]],
                marker="o",
                markersize=4,
                linestyle="-" if main or model.get("trained") else "--",
                label=model["name"],
                zorder=3 if main else 2,
            )
        log_axis(axes, values, factor=6)
        ends = [span["stop"] for model in models for span in model["text"].get(text, {}).get("by_position", ())]
        context_axis(axes, [64 << step for step in range(max(ends).bit_length()) if 64 << step <= max(ends)])
        for key, word in (("window", "window"), ("trained_length", "trained length")):
            if results.get(key) and 16 < results[key] <= max(ends):
                axes.axvline(results[key], color=TEACHER, linewidth=0.8, linestyle=":")
                axes.annotate(word, (results[key], 0.99), (3, 0), ("data", "axes fraction"), "offset points", va="top",
                              rotation=90, fontsize=8, color=TEACHER)  # fmt: skip
        axes.set_xlabel("tokens of the document before it")
        axes.set_title(f"Perplexity by position: {text}")
    figure.legend(*panel[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def curve_of(model: Results, text: str) -> list[float]:
    """Return a model's perplexities by position."""
    return [math.exp(min(span["loss"], 100)) for span in model["text"].get(text, {}).get("by_position", ())]


def recall_figure(results: Results) -> Figure | None:
    """Draw recall by length and depth: a row of panels per model, a column per task."""
    models = [model for model in results["models"] if model.get("recall")]
    if not models:
        return None
    tasks = list(dict.fromkeys(row["task"] for model in models for row in model["recall"]))
    lengths = sorted({row["length"] for model in models for row in model["recall"]})
    parts = [part for model in models for row in model["recall"] for part in row["by_depth"]]
    spans = sorted({(part["start"], part["stop"]) for part in parts})
    starts = [start for start, _ in spans]
    width = 1.6 + len(tasks) * max(1.5, 0.55 * len(lengths))
    figure = Figure(figsize=(max(6.4, width), 0.9 + 1.7 * len(models)), layout="constrained", facecolor="none")
    grid = figure.subplots(len(models), len(tasks), squeeze=False, sharex=True, sharey=True)
    image: Any = None
    for row, model in enumerate(models):
        for column, task in enumerate(tasks):
            axes: Axes = grid[row][column]
            found = recall_grid(model, task, lengths, starts)
            image = axes.imshow(found, cmap="viridis", vmin=0, vmax=1, aspect="auto")
            mark(axes, found)
            axes.grid(visible=False)
            axes.set_xticks(range(len(lengths)), [short(length) for length in lengths])
            axes.set_yticks(range(len(starts)), [f"{100 * start:.0f}–{100 * stop:.0f} %" for start, stop in spans])
            if row == 0:
                axes.set_title(task)
            if column == 0:
                axes.set_ylabel(f"{model['name'][:18]}\ndepth", fontsize=8)
            if row == len(models) - 1:
                axes.set_xlabel("tokens")
    figure.colorbar(
        image, ax=grid.ravel().tolist(), label="answered exactly", pad=0.01, aspect=30, format=lambda v, _: f"{v:.0%}"
    )
    return figure


def recall_grid(model: Results, task: str, lengths: list[int], starts: list[float]) -> np.ndarray[Any, Any]:
    """Return accuracies [depths, lengths], nan where nothing was measured."""
    grid = np.full((len(starts), len(lengths)), np.nan)
    for row in model["recall"]:
        if row["task"] == task:
            for part in row["by_depth"]:
                grid[starts.index(part["start"]), lengths.index(row["length"])] = part["accuracy"]
    return grid


def mark(axes: Axes, grid: np.ndarray[Any, Any]) -> None:
    """Write the percentage into each cell."""
    for (row, column), value in np.ndenumerate(grid):
        if not math.isnan(value):
            ink = "black" if value > 0.6 else "white"
            axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", color=ink, fontsize=7)


def cost_figure(results: Results) -> Figure | None:
    """Draw time to first token, decode speed and cache bytes against context, one line per model and batch."""
    models = [model for model in results["models"] if any(row["decode"] for row in model.get("speed", ()))]
    if not models:
        return None
    measures = [
        ("first_token", "Time to first token (s)", lambda value, _: f"{value:.3g}"),
        ("decode", "Decode (tokens/s, all rows)", lambda value, _: f"{value:,.0f}"),
        ("cache_bytes", "Cache", lambda value, _: format_bytes(value)),
    ]
    if any(row["peak_bytes"] for model in models for row in model["speed"]):
        measures.append(("peak_bytes", "Peak memory", lambda value, _: format_bytes(value)))
    colours = tints(results["models"])
    figure, panel = panels(len(measures), 3.6)
    styles = ["-", "--", ":", "-."]
    batches = sorted({row["batch"] for model in models for row in model["speed"]})
    contexts = sorted({row["context"] for model in models for row in model["speed"]})
    for (key, title, show), axes in zip(measures, panel, strict=True):
        for model in models:
            for batch in batches:
                rows = [row for row in model["speed"] if row["batch"] == batch and row[key]]
                if rows:
                    axes.plot(
                        [row["context"] for row in rows],
                        [row[key] for row in rows],
                        color=colours[model["name"]],
                        linestyle=styles[batches.index(batch) % len(styles)],
                        marker="o",
                        markersize=4,
                        label=f"{model['name']}, batch {batch}",
                    )
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(FuncFormatter(show))
        context_axis(axes, contexts)
        axes.set_xlabel("context (tokens)")
        axes.set_title(title)
    figure.legend(*panel[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def context_axis(axes: Axes, ticks: list[int]) -> None:
    """Make the x axis logarithmic, with these ticks in short numbers."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axes.set_xticks(ticks, [short(tick) for tick in ticks])


def short(count: int) -> str:
    """Return a count of tokens as axes show it ("512", "8K")."""
    return f"{count // 1024}K" if count % 1024 == 0 else str(count)


FIGURES.update(perplexity=perplexity_figure, recall=recall_figure, cost=cost_figure)

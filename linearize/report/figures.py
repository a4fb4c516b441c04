"""Figures of a run, drawn with matplotlib's Agg and SVG back ends, as SVG or PNG.

Text and axes of an SVG take the colour of the text around it (`currentColor`), so it reads on light and dark pages.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib import cm, colors
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from linearize.eval.memory import format_bytes
from linearize.report.metrics import Record
from linearize.report.table import Results, final_row, is_side, number, small

TEACHER, STUDENT, OTHER = "#8a8f98", "#2f7ed8", "#9cc3ef"
INK = "#010203"
STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": TEACHER,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}


def panels(count: int, height: float = 3.0) -> tuple[Figure, list[Axes]]:
    """Return a transparent figure with `count` panels side by side."""
    figure = Figure(figsize=(9.6, height), layout="constrained", facecolor="none")
    axes = [figure.add_subplot(1, count, index + 1, facecolor="none") for index in range(count)]
    return figure, axes


def draw_svg(kind: str, content: Any) -> str | None:
    """Return a figure as an SVG that stands inside HTML, or None where there is nothing to draw.

    Args:
        kind: `transfer`, `loss`, `quality`, `positions`, `cache` or `probe`.
        content: metrics records for the first two, scores for `probe`, `results` for the others.
    """
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": kind}):
        figure = FIGURES[kind](content)
        if figure is None:
            return None
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return inline(text.getvalue())


def draw_png(kind: str, content: Any) -> bytes | None:
    """Return a figure as a PNG on white, or None where there is nothing to draw; arguments as in `draw_svg`."""
    with matplotlib.rc_context(STYLE):
        figure = FIGURES[kind](content)
        if figure is None:
            return None
        raw = io.BytesIO()
        figure.savefig(raw, format="png", dpi=144, facecolor="white")
    return raw.getvalue()


def inline(svg: str) -> str:
    """Return an SVG for use inside HTML: no prologue, no addresses, the page's font and colour, its size at most."""
    body = svg[svg.index("<svg") :]
    width = 4 / 3 * float(re.search(r' width="([\d.]+)pt"', body)[1])  # type: ignore[index]
    body = re.sub(r' xmlns(:\w+)?="[^"]*"', "", body)
    body = re.sub(r' (width|height)="[\d.]+pt"', "", body, count=2)
    body = re.sub(r"font: ([\w ]*?)([\d.]+px) [^;\"]*", r"font: \1\2 inherit; font-family: inherit", body)
    return body.replace("<svg", f'<svg style="max-width: {width:.0f}px"', 1).replace(INK, "currentColor").strip()


def tokens_axis(axes: Axes) -> None:
    """Label the x axis as trained tokens, in thousands or millions."""
    axes.set_xlabel("trained tokens")
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value / 1e6:g}M" if value >= 1e6 else f"{value / 1e3:g}K" if value else "0")
    )


def log_axis(axes: Axes, values: Sequence[float], which: str = "y", factor: float = 8) -> None:
    """Make an axis logarithmic, with plain numbers, where its positive values span more than `factor`."""
    positive = [value for value in values if value > 0]
    if positive and max(positive) > factor * min(positive):
        axis = axes.yaxis if which == "y" else axes.xaxis
        (axes.set_yscale if which == "y" else axes.set_xscale)("log")
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(FuncFormatter(lambda value, _: ""))


def smoothed(values: Sequence[float]) -> np.ndarray[Any, Any]:
    """Return the centred running mean over a twentieth of the curve, five values at least, fewer at its ends."""
    half = max(2, len(values) // 40)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    reach = np.minimum(half, np.minimum(places, len(values) - 1 - places))
    return np.asarray((sums[places + reach + 1] - sums[places - reach]) / (2 * reach + 1))


def transfer_figure(records: list[Record]) -> Figure | None:
    """Draw each layer's transfer loss over tokens, and each layer's start and end."""
    logged = [record for record in records if record.get("layers")]
    if not logged:
        return None
    layers = sorted({int(layer) for record in logged for layer in record["layers"]})
    figure, (curves, ends) = panels(2, 3.6)
    palette, scale = matplotlib.colormaps["viridis"], colors.Normalize(min(layers), max(max(layers), 1))
    everything: list[float] = []
    for layer in layers:
        points = [(record["tokens"], record["layers"].get(str(layer))) for record in logged]
        kept = [(tokens, loss) for tokens, loss in points if loss is not None]
        if not kept:
            continue
        losses = [loss for _, loss in kept]
        tail = max(1, len(losses) // 10)
        everything += losses
        curves.plot([tokens for tokens, _ in kept], smoothed(losses), color=palette(scale(layer)), linewidth=1.1)
        first, last = float(np.mean(losses[:tail])), float(np.mean(losses[-tail:]))
        ends.plot([layer, layer], [first, last], color=TEACHER, linewidth=1, zorder=1)
        ends.scatter([layer], [first], color=TEACHER, s=14, label="first tenth" if layer == layers[0] else None)
        ends.scatter([layer], [last], color=STUDENT, s=22, label="last tenth" if layer == layers[0] else None)
    curves.set_title("Transfer loss, one line per layer")
    tokens_axis(curves)
    whole = MaxNLocator(integer=True)
    figure.colorbar(cm.ScalarMappable(scale, palette), ax=curves, label="layer", pad=0.01, ticks=whole)
    ends.set_title("Transfer loss by layer")
    ends.set_xlabel("layer")
    ends.xaxis.set_major_locator(MaxNLocator(integer=True))
    ends.legend(loc="best")
    for axes in (curves, ends):
        log_axis(axes, everything)
    return figure


def loss_figure(records: list[Record]) -> Figure | None:
    """Draw the loss of each stage over its tokens."""
    stages = list(dict.fromkeys(record["stage"] for record in records if record.get("loss") is not None))
    if not stages:
        return None
    figure, panel = panels(len(stages), 3.0)
    for stage, axes in zip(stages, panel, strict=True):
        own = [record for record in records if record["stage"] == stage and record.get("loss") is not None]
        tokens, losses = [record["tokens"] for record in own], [record["loss"] for record in own]
        axes.plot(tokens, losses, color=OTHER, linewidth=0.9, label="step")
        axes.plot(tokens, smoothed(losses), color=STUDENT, label="running mean")
        axes.set_title(f"Loss: {stage}")
        tokens_axis(axes)
        log_axis(axes, losses)
        axes.legend(loc="upper right")
    return figure


def quality_figure(results: Results) -> Figure | None:
    """Draw perplexity and divergence, one bar per row of the table."""
    rows = results.get("rows", [])
    measures = [("perplexity", "Held-out perplexity", number), ("kl", "KL to the teacher (nats a token)", small)]
    shown = [measure for measure in measures if any(row.get(measure[0]) is not None for row in rows)]
    if not shown:
        return None
    final = final_row(results)
    figure, panel = panels(len(shown), 0.9 + 0.42 * len(rows))
    for (key, title, show), axes in zip(shown, panel, strict=True):
        given = [row.get(key) for row in rows]
        values = [value if value is not None and np.isfinite(value) else float("nan") for value in given]
        tints = [STUDENT if row is final else TEACHER if is_side(row) else OTHER for row in rows]
        places = range(len(rows))
        axes.barh(places, values, color=tints, height=0.62)
        log_axis(axes, values, "x", factor=20)
        for place, value in enumerate(given):
            if value is not None:
                fits = np.isfinite(value) and (value > 0 or axes.get_xscale() == "linear")
                x, across = (value, "data") if fits else (0, "axes fraction")
                axes.annotate(show(value), (x, place), (4, 0), (across, "data"), "offset points", va="center")
        axes.set_yticks(places, [row["name"] for row in rows])
        axes.invert_yaxis()
        axes.margins(x=0.18)
        axes.grid(axis="y", visible=False)
        axes.set_title(title)
    return figure


def positions_figure(results: Results) -> Figure | None:
    """Draw each row's perplexity, and its divergence from the teacher, by the token's position in its document."""
    rows = [row for row in results.get("rows", []) if not row.get("control") and row.get("by_position")]
    if not rows or max(len(row["by_position"]) for row in rows) < 2:
        return None
    final = final_row(results)
    own = [row for row in rows if not is_side(row) and row is not final]
    blues = matplotlib.colormaps["Blues"](np.linspace(0.35, 0.6, len(own)))
    shades = {row["name"]: blue for row, blue in zip(own, blues, strict=True)}
    measures = [("loss", "Perplexity by position"), ("kl", "KL to the teacher by position (nats a token)")]
    shown = [(key, title) for key, title in measures if any(known(row, key) for row in rows if not is_side(row))]
    if not shown:
        return None
    figure, panel = panels(len(shown), 3.4)
    for (key, title), axes in zip(shown, panel, strict=True):
        values: list[float] = []
        for row in rows:
            if not known(row, key) or (key == "kl" and is_side(row)):
                continue
            found = [part[key] for part in row["by_position"]]
            curve = [math.exp(min(value, 100)) for value in found] if key == "loss" else found
            tint = TEACHER if is_side(row) else STUDENT if row is final else shades[row["name"]]
            axes.plot(curve, marker="o", markersize=4, color=tint, label=row["name"])
            values += curve
        spans = max((row["by_position"] for row in rows), key=len)
        names = [f"{part['start']}–{part['stop'] - 1}" for part in spans]
        axes.set_xticks(range(len(names)), names)
        axes.set_xlabel("tokens of the document before it")
        axes.set_title(title)
        if key == "loss":
            log_axis(axes, values)
        else:
            axes.set_ylim(bottom=0)
    figure.legend(*panel[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


def known(row: Results, key: str) -> bool:
    """Tell whether a row has a number at every position."""
    return bool(row.get("by_position")) and all(part.get(key) is not None for part in row["by_position"])


def cache_figure(results: Results) -> Figure | None:
    """Draw cache bytes against context, teacher and student, both axes logarithmic."""
    rows = sorted(results.get("cache", []), key=lambda row: int(row["context"]))
    if not rows:
        return None
    figure, (axes,) = panels(1)
    contexts = [row["context"] for row in rows]
    for key, name, tint in (("teacher_bytes", "teacher", TEACHER), ("student_bytes", "student", STUDENT)):
        values = [row[key] for row in rows]
        axes.plot(contexts, values, marker="o", color=tint)
        label = f"{name}: {format_bytes(values[-1])}"
        axes.annotate(label, (contexts[-1], values[-1]), (8, 0), textcoords="offset points", va="center", color=tint)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(contexts, [f"{value // 1024}K" if value % 1024 == 0 else str(value) for value in contexts])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_bytes(value)))
    axes.minorticks_off()
    axes.set_xlim(right=contexts[-1] * 4)
    axes.set_xlabel("context (tokens)")
    axes.set_title("Cache bytes of one sequence")
    return figure


def probe_figure(content: Any) -> Figure | None:
    """Draw what each KV head is worth as exact softmax, by recall and by divergence; chosen heads are framed.

    Args:
        content: `scores`, a `ProbeScores`, and `chosen`, (layer, KV head) pairs.
    """
    scores, chosen = content["scores"], content["chosen"]
    figure = Figure(figsize=(9.6, 2 * (1.3 + 0.22 * scores.kv_heads)), layout="constrained", facecolor="none")
    measures = [("recall", "Drop of the answer's log-probability (nats)"), ("kl", "KL to the teacher (nats a token)")]
    for place, (key, title) in enumerate(measures):
        axes = figure.add_subplot(2, 1, place + 1, facecolor="none")
        grid = np.zeros((scores.kv_heads, scores.layers))
        for unit in scores.heads():
            grid[unit.head, unit.layer] = max(0.0, getattr(unit, key))
        image = axes.imshow(grid, aspect="auto", cmap="viridis")
        for layer, head in chosen:
            axes.add_patch(Rectangle((layer - 0.5, head - 0.5), 1, 1, fill=False, edgecolor="#ff7a1a", linewidth=2))
        axes.set_title(f"{title} without the KV head")
        axes.set_xlabel("layer")
        axes.set_ylabel("KV head")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(visible=False)
        figure.colorbar(image, ax=axes, pad=0.01)
    return figure


FIGURES: dict[str, Callable[[Any], Figure | None]] = {
    "quality": quality_figure,
    "positions": positions_figure,
    "transfer": transfer_figure,
    "loss": loss_figure,
    "cache": cache_figure,
    "probe": probe_figure,
}

"""Quality and recall against cache bytes: the evaluations of several runs as one CSV and one figure.

    python scripts/plot_experiments.py --evaluations out/a/eval --control softmax-5e-4 --csv docs/experiments.csv
    python scripts/plot_experiments.py --control softmax-5e-4 --csv docs/experiments.csv --output docs/experiments.png

With `--evaluations` (folders of `linearize eval`) the CSV is written: a row for every model that is a run of its
own, with its cache at 8,192 tokens over the teacher's. The figure is drawn from the CSV: perplexity as a multiple of
the softmax control's, recall and LAMBADA; a star is a recipe of ours, a circle a published one, a square has the whole
cache. Seeds (`best@1`) share a colour.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from pathlib import Path
from typing import Any

from linearize.evaluation import read_evaluation

CONTEXT = 8192


def cache_share(folder: Path) -> float:
    """Return a run's cache at 8,192 tokens over its teacher's."""
    cache = json.loads((folder / "results.json").read_text(encoding="utf-8"))["cache"]
    row = next(row for row in cache if row["context"] == CONTEXT)
    return float(row["student_bytes"] / row["teacher_bytes"])


def collect(folders: list[Path]) -> list[dict[str, Any]]:
    """Return a row per teacher and run; a model that several evaluations hold joins its measures in one row."""
    rows: dict[str, dict[str, Any]] = {}
    for folder in folders:
        for model in read_evaluation(folder)["models"]:
            if model["role"] != "teacher" and "folder" not in model:
                continue  # a control made from the student
            teacher = model["role"] == "teacher"
            row = rows.setdefault(model["name"], {"run": model["name"], "recipe": model.get("recipe", "")})
            row["cache"] = 1.0 if teacher else round(cache_share(Path(model["folder"])), 4)
            for name, text in model["text"].items():
                row[f"{name} perplexity"] = round(text["perplexity"], 3)
                if "kl" in text:
                    row[f"{name} kl"] = round(text["kl"], 4)
            for found in model.get("recall", []):
                row[f"{found['task']} {found['length']}"] = round(100 * found["accuracy"], 1)
            for found in model.get("generation", []):
                row[found["task"]] = round(100 * found["accuracy"], 1)
            for found in model.get("zero_shot", []):
                row[found["task"]] = round(100 * found["score"], 1)
    return list(rows.values())


def draw(rows: list[dict[str, str]], control: str, output: Path) -> None:
    """Draw perplexity over the control's and recall against the cache's share."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter

    kinds = list(dict.fromkeys(row["run"].partition("@")[0] for row in rows))  # seeds of a run look alike
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    base = next(row for row in rows if row["run"] == control)
    perplexities = [name for name in base if name.endswith(" perplexity")]
    others = "passkey 1024", "s_niah_2 1024", "s_niah_3 1024", "lambada_openai"
    panels = [*perplexities, *(name for name in others if base.get(name))]
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    size = 4.2 * columns, 3.6 * lines
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, name in zip(axes.flat, panels, strict=False):
        ratio = name in perplexities
        for row in rows:
            if not row.get(name):
                continue
            kind = row["run"].partition("@")[0]
            value = float(row[name]) / (float(base[name]) if ratio else 1)
            marker = "s" if float(row["cache"]) == 1 else "o" if row["recipe"].startswith("paper/") else "*"
            x = 100 * float(row["cache"])
            number = kinds.index(kind)
            color = plt.get_cmap("tab20" if number < 20 else "tab20b")(number % 20)
            axis.plot(x, value, marker, ms=11 if marker == "*" else 7, color=color, label=kind, clip_on=False)
        axis.set_xscale("log")
        axis.set_xlabel("cache at 8,192 tokens, % of the teacher's")
        axis.set_title(f"{name}, x {control}" if ratio else f"{name}, % right", fontsize=9)
        if ratio:
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter(plain)
            axis.yaxis.set_minor_formatter(plain)
        else:
            axis.set_ylim(0, 105 if name != "lambada_openai" else None)
        axis.xaxis.set_major_formatter(plain)
        axis.grid(alpha=0.3, which="both")
    handles, labels = axes[0][0].get_legend_handles_labels()
    known = dict(zip(labels, handles, strict=True))
    figure.legend(known.values(), known.keys(), loc="outside lower center", ncols=6, frameon=False)
    figure.savefig(output, dpi=110)


def main() -> None:
    """Collect, draw, or both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluations", type=Path, nargs="+", help="folders of `linearize eval`")
    parser.add_argument("--control", required=True, help="the run that perplexities are divided by")
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--output", type=Path, help="the figure")
    given = parser.parse_args()
    if given.evaluations:
        rows = collect(given.evaluations)
        names = list(dict.fromkeys(name for row in rows for name in row))
        with given.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(rows)
    if given.output:
        with given.csv.open(newline="", encoding="utf-8") as file:
            draw(list(csv.DictReader(file)), given.control, given.output)


if __name__ == "__main__":
    main()

"""Recipes beside their controls: what a result owes to the window, to LoRA and data, and to the memory.

Run by `make controls`. Every run goes on where it stopped, and a finished one is read, not repeated.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from linearize import api
from linearize.data import Corpus, build_corpus
from linearize.display import RunDisplay, quiet_libraries
from linearize.eval import TeacherReference, evaluate
from linearize.eval.controls import memory_silenced
from linearize.recipe import Recipe
from linearize.report import quality_cells, rich_table
from linearize.report.table import markdown_table
from linearize.teacher import load_teacher, resolve

RECIPES = ("liger", "lolcats", "supra", "mamba", "gdn")
CONTROLS = ("control/softmax-lora", "control/window-only")


def main() -> None:
    """Run recipes and controls on the same data and tokens, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--output", type=Path, default=Path("out"))
    parser.add_argument("overrides", nargs="*", default=[])
    given = parser.parse_args()
    quiet_libraries()
    teacher, tokenizer, _ = load_teacher(resolve(given.model), torch.float32, "cpu")
    rows: list[dict[str, Any]] = []
    for recipe in given.recipes:
        results = run(given.model, recipe, given.output, given.overrides)
        rows += named_rows(results, recipe, with_teacher=not rows)
        prepared = Recipe.resolve(recipe).prepare(quick=True, overrides=given.overrides)
        reference = TeacherReference(teacher, same_corpus(prepared, tokenizer, results).held_out)
        rows.append(silenced_row(folder_of(recipe, given.output), reference, f"{recipe} with its memory zeroed"))
    for control in CONTROLS:
        result = run(given.model, control, given.output, given.overrides)
        rows.append({**result["rows"][-1], "name": control, "control": True})
    results = {"model": given.model, "recipe": ", ".join(given.recipes), "rows": rows}
    Console(width=120).print(rich_table(quality_cells(results), f"{given.model}: recipes and controls"))
    (given.output / "controls.json").write_text(json.dumps(results, indent=2))
    (given.output / "controls.md").write_text(markdown_table(quality_cells(results)) + "\n")


def run(model: str, recipe: str, output: Path, overrides: list[str]) -> dict[str, Any]:
    """Return the results of a quick run, made now or before."""
    return api.linearize(
        model, recipe, folder_of(recipe, output), quick=True, overrides=overrides, watch=RunDisplay()
    ).results


def folder_of(recipe: str, output: Path) -> Path:
    """Return where a recipe's run lies; `make demo` has made that of liger."""
    return output / ("demo" if recipe == "liger" else recipe.replace("/", "-"))


def named_rows(results: dict[str, Any], recipe: str, with_teacher: bool) -> list[dict[str, Any]]:
    """Return the rows of a run, each under its recipe's name, with the teacher's in front or without it."""
    rows = [row for row in results["rows"] if row["name"] != "teacher" or with_teacher]
    return [row if row["name"] == "teacher" else {**row, "name": f"{recipe} {row['name']}"} for row in rows]


def silenced_row(folder: Path, reference: TeacherReference, name: str) -> dict[str, Any]:
    """Return the row of a finished student whose memory is silenced."""
    student = api.load(folder, dtype=torch.float32).eval()
    with memory_silenced(student):
        return {**evaluate(student, reference.rows, reference).row(name), "control": True}


def same_corpus(recipe: Recipe, tokenizer: Any, results: dict[str, Any]) -> Corpus:
    """Return the run's own corpus, made again."""
    length = recipe.data.length
    tokens = sum(stage.steps(length) * stage.batch for stage in recipe.stages) * length
    corpus = build_corpus(recipe.data, tokenizer, train_tokens=tokens, seed=results["provenance"]["seed"])
    assert corpus.fingerprint == results["provenance"]["data"]["fingerprint"], "the run was made from other data"
    return corpus


if __name__ == "__main__":
    main()

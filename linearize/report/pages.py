"""What a finished folder has to read: `README.md`, `report.html` and `figures/`, from its JSON files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import linearize.report.evaluation_figures  # noqa: F401  (enters its figures beside those of a run)
from linearize.checkpoint import write_text
from linearize.report.card import FIGURES, model_card
from linearize.report.figures import draw_png
from linearize.report.html import render_html
from linearize.report.metrics import Record, read_metrics
from linearize.report.table import Results

CARD, PAGE = "README.md", "report.html"
RESULTS, METRICS, EVALUATION = "results.json", "metrics.jsonl", "eval/eval.json"


def write_pages(folder: Path, results: Results, records: list[Record], evaluation: Results | None = None) -> None:
    """Write report, figures and model card.

    Args:
        folder: the finished folder; pictures of an evaluation lie in its `eval`.
        results: what `results.json` holds.
        records: of `metrics.jsonl`.
        evaluation: what `eval.json` holds, or None.
    """
    write_text(folder / PAGE, render_html(results, records, evaluation))
    stage = "transfer" if any(record.get("layers") for record in records) else "loss"
    for kind, content in (("quality", results), (stage, records)):
        picture = draw_png(kind, content)
        if picture is not None:
            (folder / "figures").mkdir(exist_ok=True)
            (folder / "figures" / f"{kind}.png").write_bytes(picture)
    write_text(folder / CARD, model_card(results, evaluation, pictures(folder)))


def pictures(folder: Path) -> list[str]:
    """Return which pictures of a card lie in a folder."""
    return [name for name in FIGURES if (folder / name).is_file()]


def card_is_ours(folder: Path) -> bool:
    """Tell whether a folder's card is as it was written, and not edited since; an absent one counts as ours."""
    results, evaluation = read_json(folder / RESULTS), read_json(folder / EVALUATION)
    card = folder / CARD
    if results is None:
        return False
    return not card.is_file() or card.read_text(encoding="utf-8") == model_card(results, evaluation, pictures(folder))


def refresh_pages(folder: Path) -> None:
    """Write report and card anew, with the evaluation that now lies in the folder."""
    results = read_json(folder / RESULTS)
    assert results is not None
    write_pages(folder, results, read_metrics(folder / METRICS), read_json(folder / EVALUATION))


def read_json(path: Path) -> dict[str, Any] | None:
    """Return what a file holds; None where there is none, or it is damaged."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found

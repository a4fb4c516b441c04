"""The table of a run: the same cells for the terminal, the HTML report and the model card."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from linearize.eval.memory import format_bytes

Results = dict[str, Any]
ABSENT = "–"


@dataclass(frozen=True)
class Cells:
    """A table as text: `header` and `rows` of equally many cells; the first column is text, the others are numbers."""

    header: list[str]
    rows: list[list[str]]


def number(value: float) -> str:
    """Return a number with three or four significant digits, without exponents up to a million."""
    if value != value or abs(value) == float("inf"):
        return "not finite"
    if abs(value) >= 1e6:
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 100 else f"{value:.2f}"


def small(value: float) -> str:
    """Return a small number, such as a divergence, with four decimals."""
    return number(value) if abs(value) >= 100 or value != value else f"{value:.4f}" if value else "0"


def times(ratio: float) -> str:
    """Return a ratio as people read it ("5.0×", "320×")."""
    return f"{ratio:,.0f}×" if ratio >= 100 else f"{ratio:.1f}×"


def duration(seconds: float) -> str:
    """Return seconds as people read them ("41 s", "7 min 12 s", "3 h 05 min")."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.0f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def teacher_row(results: Results) -> Results | None:
    """Return the teacher's row, if it was evaluated."""
    return next((row for row in results.get("rows", []) if row["name"] == "teacher"), None)


def is_side(row: Results) -> bool:
    """Tell whether a row is the teacher's or a control's, not a step of the run."""
    return row["name"] == "teacher" or bool(row.get("control"))


def final_row(results: Results) -> Results | None:
    """Return the row of the finished model: the last that is neither the teacher's nor a control's."""
    return next((row for row in reversed(results.get("rows", [])) if not is_side(row)), None)


def quality_cells(results: Results) -> Cells:
    """Return the main table: one line per evaluated model, a column only if some row has its number."""
    rows: list[Results] = results.get("rows", [])
    teacher = teacher_row(results)
    base = teacher.get("perplexity") if teacher else None
    columns: list[tuple[str, str, Callable[[Any], str]]] = [
        ("perplexity", "perplexity", number),
        ("× teacher", "ratio", number),
        ("KL to teacher", "kl", small),
        ("same top token", "top1", lambda value: f"{100 * value:.1f} %"),
        ("tokens seen", "tokens", lambda value: f"{value:,}"),
        ("time", "seconds", duration),
        ("note", "note", str),
    ]
    if base:
        rows = [row | {"ratio": row["perplexity"] / base} if "perplexity" in row else row for row in rows]
    present = [column for column in columns if any(row.get(column[1]) is not None for row in rows)]
    return Cells(
        header=["", *(title for title, _, _ in present)],
        rows=[
            [row["name"], *(ABSENT if row.get(key) is None else show(row[key]) for _, key, show in present)]
            for row in rows
        ],
    )


def cache_cells(results: Results) -> Cells:
    """Return the cache table: bytes by context, teacher and student, and how many times smaller."""
    return Cells(
        header=["context", "teacher's KV cache", "student's cache", "smaller by"],
        rows=[
            [
                f"{row['context']:,}",
                format_bytes(row["teacher_bytes"]),
                format_bytes(row["student_bytes"]),
                times(row["teacher_bytes"] / row["student_bytes"]),
            ]
            for row in results.get("cache", [])
        ],
    )


def rich_table(cells: Cells, title: str | None = None) -> Table:
    """Return the table for the terminal."""
    table = Table(title=title, title_justify="left", header_style="bold")
    for index, name in enumerate(cells.header):
        table.add_column(name, justify="right" if index else "left", no_wrap=index == 0)
    for row in cells.rows:
        table.add_row(*row)
    return table


def markdown_table(cells: Cells) -> str:
    """Return the table as Markdown."""
    rule = ["---", *["---:"] * (len(cells.header) - 1)]
    lines = [cells.header, rule, *cells.rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)

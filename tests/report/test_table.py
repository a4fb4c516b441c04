import io

import pytest
from rich.console import Console

from linearize.report import cache_cells, quality_cells, rich_table
from linearize.report.table import duration, final_row, markdown_table, number, small


def column(cells, title):
    index = cells.header.index(title)
    return [row[index] for row in cells.rows]


def test_the_quality_table_has_every_measured_number(results):
    cells = quality_cells(results)
    assert [row[0] for row in cells.rows] == ["teacher", "after surgery", "after <finetune>", "memory zeroed"]
    assert column(cells, "perplexity") == ["12.35", "1.80e+07", "14.81", "20.50"]
    assert column(cells, "× teacher") == ["1.00", "1.46e+06", "1.20", "1.66"]
    assert column(cells, "KL to teacher") == ["0", "0.9100", "0.1235", "0.3000"]
    assert column(cells, "tokens seen") == ["0", "–", "40,960", "–"]
    assert column(cells, "time") == ["0 s", "–", "7 min 12 s", "–"]


def test_columns_without_a_number_are_left_out():
    assert quality_cells({"rows": [{"name": "student", "perplexity": 3.0}]}).header == ["", "perplexity"]
    assert quality_cells({}).rows == []


def test_the_cache_table_compares_bytes(results):
    assert cache_cells(results).rows == [
        ["1,024", "45.0 MiB", "9.00 MiB", "5.0×"],
        ["65,536", "2.81 GiB", "9.00 MiB", "320×"],
    ]


def test_a_control_is_never_the_final_row(results):
    assert final_row(results)["name"] == "after <finetune>"
    assert final_row({"rows": results["rows"][:1]}) is None


def test_terminal_and_markdown_show_the_same_cells(results):
    cells = quality_cells(results)
    terminal = io.StringIO()
    Console(file=terminal, width=200).print(rich_table(cells))
    for row in cells.rows:
        for cell in row:
            assert cell in terminal.getvalue()
            assert cell in markdown_table(cells)


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.234, "1.23"), (123.45, "123.5"), (12345.6, "12,346"), (2.5e6, "2.50e+06"), (float("inf"), "not finite")],
)
def test_numbers_read_well(value, text):
    assert number(value) == text


@pytest.mark.parametrize(("value", "text"), [(0.0, "0"), (0.12345, "0.1235"), (float("nan"), "not finite")])
def test_divergences_read_well(value, text):
    assert small(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(3.6, "4 s"), (59.7, "1 min 00 s"), (3599.6, "1 h 00 min"), (7500, "2 h 05 min")]
)
def test_durations_read_well(seconds, text):
    assert duration(seconds) == text

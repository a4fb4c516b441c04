import copy

import pytest

from linearize.report import compare_cells, draw_png, draw_svg, evaluation_cells, speed_cells, verdicts
from linearize.report.evaluation_figures import recall_grid


def rows(cells):
    return {row[0]: row[1:] for row in cells.rows}


def test_every_measure_is_a_row_and_every_model_a_column(evaluation) -> None:
    cells = evaluation_cells(evaluation)
    assert cells.header == ["", "teacher", "mine", "memory zeroed", "softmax"]
    found = rows(cells)
    assert found["book: perplexity"] == ["7.39", "12.18", "13.46", "9.03"]
    assert found["book: × teacher"] == ["1.00", "1.65", "1.82", "1.22"]
    assert found["book: loss behind student (nats)"] == ["–", "–", "+0.1000 ± 0.0100", "-0.3000 ± 0.0200"]
    assert found["passkey 1024"] == ["100.0 (20–90)", "60.0 (20–90)", "10.0 (20–90)", "–"]
    assert found["hellaswag (acc norm)"] == ["–", "41.2 ± 0.5", "–", "–"]


@pytest.mark.parametrize(
    ("nats", "stderr", "rows", "word"),
    [
        (0.1, 0.01, 40, "it helps"),
        (-0.1, 0.01, 40, "IT HURTS"),
        (-0.1, 0.01, 2, "IT DOES NOTHING MEASURABLE"),
        (-0.1, 0.01, 3, "IT HURTS"),
        (0.01, 0.02, 40, "IT DOES NOTHING MEASURABLE"),
        (0.0005, 0.0001, 40, "IT DOES NOTHING MEASURABLE"),
        (0.1, None, 1, "it helps (one row: no standard error)"),
        (None, None, 40, "not finite"),
    ],
)
def test_what_the_memory_does_is_said(evaluation, nats, stderr, rows, word) -> None:
    evaluation["differences"][0]["text"]["book"] = {"nats": nats, "stderr": stderr, "rows": rows}
    said = verdicts(evaluation)
    assert word in said[0]
    assert "passkey 512 -50.0" in said[1]
    assert "behind softmax (recipe c/s) on book by 0.3000 ± 0.0200" in said[2]
    evaluation["differences"].pop(0)
    assert "has no memory" in verdicts(evaluation)[0]


def test_a_length_that_does_not_fit_is_shown_as_such(evaluation) -> None:
    found = [row[:3] for row in speed_cells(evaluation).rows]
    assert ["1,024 × 1", "mine", "200.0 ms"] in found
    assert ["65,536 × 1", "teacher", "out of memory"] in found


def test_runs_of_one_name_are_told_apart_by_their_folders(evaluation) -> None:
    other = copy.deepcopy(evaluation)
    for index, results in enumerate((evaluation, other)):
        results["models"][1]["folder"] = f"runs/{index}/mine"
    other["models"][1]["text"]["book"]["row_losses"] = [[10, 2.0], [30, 3.0]]
    cells = compare_cells([evaluation, other])
    assert cells.header == ["", "teacher", "runs/0/mine", "runs/1/mine"]
    found = rows(cells)
    assert found["book: loss behind runs/0/mine (nats)"][:2] == ["–", "0"]
    assert found["book: loss behind runs/0/mine (nats)"][2].startswith("+0.2500 ± ")
    assert found["book: what zeroing the memory costs (nats)"] == ["–", "+0.1000 ± 0.0100", "+0.1000 ± 0.0100"]
    assert found["cache at 8,192 tokens, share of the teacher's"] == ["100.0 %", "5.5 %", "5.5 %"]


@pytest.mark.parametrize("kind", ["perplexity", "recall", "cost"])
def test_figures_show_every_model_that_has_something_to_show(evaluation, kind) -> None:
    svg = draw_svg(kind, evaluation)
    assert svg is not None
    names = {"perplexity": ["teacher", "mine", "memory zeroed", "softmax", "trained length"]}
    names |= {"recall": ["teacher", "mine", "memory zeroed", "passkey"], "cost": ["teacher, batch 1", "mine, batch 1"]}
    assert all(name in svg for name in names[kind])
    for model in evaluation["models"]:
        for part in ("recall", "speed"):
            model.pop(part, None)
        for text in model["text"].values():
            text["by_position"] = []
    assert draw_png(kind, evaluation) is None


def test_a_ruined_control_does_not_flatten_the_others(evaluation) -> None:
    for part in evaluation["models"][2]["text"]["book"]["by_position"]:
        part["loss"] = 10.0
    svg = draw_svg("perplexity", evaluation)
    assert "memory zeroed (off the scale)" in svg
    assert "mine (off the scale)" not in svg
    assert ">10000<" not in svg


def test_the_heat_map_has_a_hole_where_nothing_was_measured(evaluation) -> None:
    student = evaluation["models"][1]
    student["recall"][1]["by_depth"].pop(2)
    grid = recall_grid(student, "passkey", [512, 1024], [i / 5 for i in range(5)])
    assert grid.shape == (5, 2)
    assert (grid[:, 0] == 0.6).all()
    assert str(grid[2, 1]) == "nan"

"""What a run leaves to read: metrics, tables, figures, the HTML report and the model card.

All but the metrics take one plain dict, `results` (saved as `results.json`); keys that are absent leave out their part:

* `model`, `recipe`: names.
* `rows`: one object per evaluation, in order: `name` ("teacher", "after surgery", "after transfer", ...), `perplexity`,
  `kl`, `top1`, `tokens` (trained so far), `seconds` (so far), `by_position`, `note`, `control` (true: a row beside the
  run, never its headline).
* `samples`: `prompt`, `teacher`, `student`.
* `cache`: `context`, `teacher_bytes`, `student_bytes`, one object per context.
* `provenance`: nested plain values; `recipe_yaml`: a string.
* `converted`: false where attention was left as it was; `causal`: false for encoders.

An evaluation (`eval.json`) is another dict: see `evaluation.py`.
"""

from linearize.report.card import model_card
from linearize.report.evaluation import (
    answer_cells,
    compare_cells,
    evaluation_cells,
    evaluation_page,
    speed_cells,
    text_cells,
    verdicts,
)
from linearize.report.figures import draw_png, draw_svg
from linearize.report.html import render_html
from linearize.report.metrics import MetricsWriter, read_metrics, rewind
from linearize.report.pages import card_is_ours, refresh_pages, write_pages
from linearize.report.table import cache_cells, quality_cells, rich_table

__all__ = [
    "MetricsWriter",
    "answer_cells",
    "cache_cells",
    "card_is_ours",
    "compare_cells",
    "draw_png",
    "draw_svg",
    "evaluation_cells",
    "evaluation_page",
    "model_card",
    "quality_cells",
    "read_metrics",
    "refresh_pages",
    "render_html",
    "rewind",
    "rich_table",
    "speed_cells",
    "text_cells",
    "verdicts",
    "write_pages",
]

"""Time that a plan's stages take, from speeds that were measured: given in words, or those of a finished run."""

from __future__ import annotations

import json
from pathlib import Path

from linearize.errors import LinearizeError, UnknownNameError
from linearize.workspace import RESULTS


def read_speeds(text: str, stages: list[str]) -> dict[str, float]:
    """Return tokens a second by stage.

    Args:
        text: `transfer=52600,finetune=33800`, or the folder of a finished run.
        stages: kinds of stage that the plan has.

    Raises:
        LinearizeError: it is neither, or the run did not measure any of these stages.
        UnknownNameError: it names a stage that the plan has not.
    """
    if "=" not in text:
        return _of_run(Path(text), stages)
    speeds: dict[str, float] = {}
    for entry in text.split(","):
        name, _, number = entry.partition("=")
        if name.strip() not in stages:
            raise UnknownNameError("stage", name.strip(), stages, "--speed")
        try:
            speeds[name.strip()] = float(number.replace("_", ""))
        except ValueError:
            speeds[name.strip()] = 0.0
        if not 0 < speeds[name.strip()] < float("inf"):
            raise LinearizeError(
                f"--speed {entry!r}: expected tokens a second, such as {name.strip()}=52600, got {number!r}."
            )
    return speeds


def _of_run(folder: Path, stages: list[str]) -> dict[str, float]:
    path = folder / RESULTS
    if not path.is_file():
        raise LinearizeError(
            f"--speed {folder}: there is no {RESULTS} of a finished run. Give its folder, or tokens a second for each "
            f"stage, such as {stages[0] if stages else 'transfer'}=52600."
        )
    rows = json.loads(path.read_text(encoding="utf-8")).get("rows", [])
    speeds: dict[str, float] = {}
    tokens, seconds = 0, 0.0
    for row in rows:
        name = str(row["name"]).removeprefix("after ").partition("-")[0]
        spent = row.get("seconds", 0.0) - seconds
        if name in stages and spent > 0 and name not in speeds:
            speeds[name] = (row["tokens"] - tokens) / spent
        tokens, seconds = max(tokens, row.get("tokens", 0)), max(seconds, row.get("seconds", 0.0))
    if not speeds:
        raise LinearizeError(
            f"--speed {folder}: that run trained no stage of this plan ({', '.join(stages) or 'none'})."
        )
    return speeds

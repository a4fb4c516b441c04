"""What a streamed transfer asks of a recipe, and what it takes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from linearize.errors import LinearizeError
from linearize.recipe import Recipe
from linearize.recipe_stages import Transfer


def parse_layers(text: str, count: int) -> range:
    """Return the layers that `--layers` names: `0:10` is the first ten, `10:` all from the eleventh on.

    Args:
        text: `FIRST:END`, either of which may be left out.
        count: layers of the model.

    Raises:
        LinearizeError: it is no range of the model's layers.
    """
    first, colon, end = text.partition(":")
    given = (first or "0", end or str(count))
    begin, stop = (int(number) if number.isdecimal() else -1 for number in given)
    if not colon or not 0 <= begin < stop <= count:
        raise LinearizeError(
            f"--layers {text!r} is no range of the model's {count} layers; expected FIRST:END, END behind the last, "
            f"such as 0:{max(1, count // 2)} and {max(1, count // 2)}:{count}."
        )
    return range(begin, stop)


def transfer_alone(recipe: Recipe) -> str:
    """Return the override that leaves a recipe its transfer stage."""
    stage = recipe.stages[0].model_dump(mode="json", exclude_defaults=True)
    return "stages=" + json.dumps([{"stage": "transfer", **stage}])


def check_streamed(recipe: Recipe, part: range | None, count: int) -> Transfer:
    """Return the transfer stage of a recipe that can be streamed.

    Args:
        recipe: as it was asked for.
        part: the layers of a part.
        count: layers of the model.

    Raises:
        LinearizeError: it cannot be, and what to change.
    """
    kinds = [stage.stage for stage in recipe.stages]
    if recipe.mixer is None or kinds[:1] != ["transfer"] or kinds.count("transfer") > 1 or recipe.progressive > 1:
        raise LinearizeError(
            f"--stream-layers streams a first and only transfer stage, and recipe {recipe.name!r} has "
            f"{', '.join(kinds) or 'no stage'}{' in rounds (`progressive`)' if recipe.progressive > 1 else ''}. Take "
            "another recipe, such as liger, or run it without --stream-layers."
        )
    stage = recipe.stages[0]
    assert isinstance(stage, Transfer)
    if stage.patience is not None or stage.optimizer.schedule == "plateau":
        raise LinearizeError(
            "--stream-layers trains one layer after the other and has no held-out loss of all, which `patience` and "
            "`schedule: plateau` read; set stages.0.patience=null and stages.0.optimizer.schedule=cosine."
        )
    if recipe.probed and recipe.probe.file is None:
        raise LinearizeError(
            f"Recipe {recipe.name!r} lets a probe choose, and a probe needs the whole teacher. Run `linearize probe` "
            "where it fits and give probe.file=.../probe.json, or name exact heads and layers."
        )
    if part is not None and len(kinds) > 1:
        raise LinearizeError(
            f"--layers makes a part of a transfer, and the stages behind it ({', '.join(kinds[1:])}) need the whole "
            f"model. Leave them out with '{transfer_alone(recipe)}'."
        )
    if part is not None and (part.start % stage.block or (part.stop % stage.block and part.stop < count)):
        raise LinearizeError(
            f"--layers {part.start}:{part.stop} cuts a block of {stage.block} layers (`stages.0.block`); begin and end "
            f"at multiples of {stage.block}."
        )
    return stage


def available_memory() -> int:
    """Return bytes of memory that this process may still take: the machine's, or less where a control group says so."""
    found = [os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            found = [int(line.split()[1]) * 1024]
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        numbers: list[Any] = [line for name in (limit, used) for line in _lines(Path(name))]
        if len(numbers) == 2 and all(number.isdecimal() for number in numbers):
            found.append(int(numbers[0]) - int(numbers[1]))
    return max(0, min(found))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []

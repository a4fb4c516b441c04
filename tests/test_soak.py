"""Long checks: `make soak`."""

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from linearize import checkpoint
from linearize.api import linearize
from linearize.stages import base

pytestmark = pytest.mark.soak

KILLS = 50
RECIPE = """
name: small
mixer:
  feature_map: softmax
  gate: key
  window: {size: 8}
stages:
- {stage: transfer, tokens: 1280, batch: 2, micro_batch: 1}
- {stage: distill, tokens: 1280, batch: 2, micro_batch: 1, train_mixer: true, cache: true, top_k: 8}
- {stage: finetune, tokens: 1280, batch: 2, micro_batch: 1, train_mixer: true}
data: {source: builtin, length: 64, held_out: 2}
"""


class Child:
    """A run in a fork of this process, which has imported everything: it saves at every step, and tells what it does.

    Args:
        folder: of teacher and recipe.
        output: name of the finished folder in it.
    """

    def __init__(self, folder: Path, output: str) -> None:
        reader, writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.close(reader)
                work(folder, output, lambda words: os.write(writer, f"{words}\n".encode()))
                os._exit(0)
            finally:
                os._exit(1)
        os.close(writer)
        self.words = os.fdopen(reader, encoding="utf-8")

    def end(self) -> int:
        """Wait for the run's end and return its exit code, or minus the signal that killed it."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def work(folder: Path, output: str, tell: Callable[[str], Any]) -> None:
    save = checkpoint.save

    def told(where: Path, *given: Any) -> None:
        tell(f"saving {where.name}")
        save(where, *given)
        tell(f"saved {where.name}")

    def watch(event: dict[str, Any]) -> None:
        if event["event"] == "resume":
            left = ", ".join(event["damaged"]) or "none"
            tell(f"went on from step {event['step']} of {Path(event['checkpoint']).name}; not whole: {left}")
        elif event["event"] in ("load", "evaluate", "stage", "step", "save", "damaged"):
            tell(f"{event['event']} {event.get('stage', event.get('name', ''))} {event.get('step', '')}".strip())

    checkpoint.save = told
    base.SAVE_SECONDS = 0.0
    linearize(folder / "teacher", folder / "small.yaml", folder / output, watch=watch)


def kill(child: Child, dice: random.Random) -> tuple[bool, str, str]:
    """Kill at a random moment: three times of four a little behind the beginning of some saving.

    Returns:
        Whether the run was still at work, what it said last, and where it had gone on from.
    """
    saving = dice.random() < 0.75
    left, delay = dice.randint(1, 12 if saving else 25), dice.expovariate(1 / 0.004)
    said: list[str] = []
    for line in child.words:
        said.append(line.strip())
        left -= said[-1].startswith("saving") or not saving
        if left <= 0:
            time.sleep(delay)
            break
    os.kill(child.pid, signal.SIGKILL)
    died = child.end() == -signal.SIGKILL
    said += child.words.read().split("\n")
    went_on = next((words for words in said if words.startswith("went on")), "")
    return died, next(words for words in reversed(said) if words), went_on


def test_fifty_kills_lose_nothing(make_teacher: Any, tmp_path: Path) -> None:
    """SIGKILL again and again; every run that comes to its end has the weights of one that was left alone.

    What happened is written to $LINEARIZE_KILLS, where that is set (docs/kills.txt is made so).
    """
    make_teacher()
    (tmp_path / "small.yaml").write_text(RECIPE)
    assert Child(tmp_path, "whole").end() == 0
    expected = {name: (tmp_path / "whole" / name).read_bytes() for name in ("model.safetensors", "config.json")}
    steps = [(r["stage"], r["step"]) for r in map(json.loads, (tmp_path / "whole/metrics.jsonl").open())]
    dice, lines, kills, whole, in_saving = random.Random(0), [], 0, 0, 0

    def compare(output: str) -> None:
        for name, content in expected.items():
            assert (tmp_path / output / name).read_bytes() == content, f"{output}/{name}"
        assert [(r["stage"], r["step"]) for r in map(json.loads, (tmp_path / output / "metrics.jsonl").open())] == steps
        lines.append(f"      run {output[3:]} came to its end: weights equal to the bit, every step logged once")

    while kills < KILLS:
        output = f"run{whole + 1}"
        died, last, went_on = kill(Child(tmp_path, output), dice)
        kills += died
        in_saving += died and last.startswith("saving")
        if went_on:
            lines.append(f"      {went_on}")
        if died:
            lines.append(f"{kills:4}  killed behind: {last}")
        if (tmp_path / output).exists():
            assert Child(tmp_path, output).end() == 0  # reads what is finished, and clears what was left
            compare(output)
            whole += 1
    output = f"run{whole + 1}"
    assert Child(tmp_path, output).end() == 0
    compare(output)
    lines.append(
        f"{kills} kills, {in_saving} of them while saving; {whole + 1} runs came to their end, all equal to the bit"
    )
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.endswith((".partial", ".new", ".old"))) == []
    print("\n".join(lines))
    if os.environ.get("LINEARIZE_KILLS"):
        Path(os.environ["LINEARIZE_KILLS"]).write_text("\n".join(lines) + "\n")

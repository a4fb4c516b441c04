"""Long checks: `make soak`."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.soak

ROOT = Path(__file__).parent.parent
KILLS = 50
RECIPE = """
name: small
mixer:
  feature_map: hedgehog
  gate: key
  window: {size: 8}
stages:
- {stage: transfer, tokens: 1280, batch: 2, micro_batch: 1}
- {stage: distill, tokens: 1280, batch: 2, micro_batch: 1, train_mixer: true, cache: true, top_k: 8}
- {stage: finetune, tokens: 1280, batch: 2, micro_batch: 1, train_mixer: true}
data: {source: builtin, length: 64, held_out: 2}
"""
# Saves at every step, says when it begins and ends to save, and where it goes on from.
PROGRAM = """
import sys
from linearize import checkpoint
from linearize.api import linearize
from linearize.stages import base

base.SAVE_SECONDS = 0.0
save = checkpoint.save

def told(folder, *given):
    print("saving", folder.name, flush=True)
    save(folder, *given)
    print("saved", folder.name, flush=True)

checkpoint.save = told

def watch(event):
    if event["event"] == "resume":
        print(f"went on from step {event['step']} of {event['checkpoint'].rpartition('/')[2]}, "
              f"not whole: {', '.join(event['damaged']) or 'none'}", flush=True)
    elif event["event"] in ("load", "evaluate", "stage", "step", "save", "damaged"):
        print(event["event"], event.get("stage", event.get("name", "")), event.get("step", ""), flush=True)

linearize(sys.argv[1], sys.argv[2], sys.argv[3], watch=watch)
"""


def start(folder: Path, output: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, str(folder / "teacher"), str(folder / "small.yaml"), str(folder / output)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)


def kill(process: subprocess.Popen[str], dice: random.Random) -> tuple[bool, str, str]:
    """Kill at a random moment: three times of four a little behind the beginning of some saving.

    Returns:
        Whether the process was still at work, what it said last, and where it had gone on from.
    """
    saving = dice.random() < 0.75
    left = dice.randint(1, 12 if saving else 25)
    delay = dice.expovariate(1 / 0.004)
    last = went_on = ""
    assert process.stdout is not None
    for line in process.stdout:
        last = line.strip()
        if last.startswith("went on"):
            went_on = last
        left -= last.startswith("saving") or not saving
        if left <= 0:
            time.sleep(delay)
            break
    process.send_signal(signal.SIGKILL)
    rest = process.communicate()[0].split("\n")
    last = next((words for words in reversed(rest) if words), last)
    return process.returncode == -signal.SIGKILL, last, went_on


def test_fifty_kills_lose_nothing(make_teacher: Any, tmp_path: Path) -> None:
    """SIGKILL again and again; every run that comes to its end has the weights of one that was left alone.

    What happened is written to $LINEARIZE_KILLS, where that is set (docs/kills.txt is made so).
    """
    make_teacher()
    (tmp_path / "small.yaml").write_text(RECIPE)
    assert start(tmp_path, "whole").wait() == 0
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
        died, last, went_on = kill(start(tmp_path, output), dice)
        kills += died
        in_saving += died and last.startswith("saving")
        if went_on:
            lines.append(f"      {went_on}")
        if died:
            lines.append(f"{kills:4}  killed behind: {last}")
        if (tmp_path / output).exists():
            assert start(tmp_path, output).wait() == 0  # reads what is finished, and clears what was left
            compare(output)
            whole += 1
    output = f"run{whole + 1}"
    assert start(tmp_path, output).wait() == 0
    compare(output)
    lines.append(
        f"{kills} kills, {in_saving} of them while saving; {whole + 1} runs came to their end, all equal to the bit"
    )
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.endswith((".partial", ".new", ".old"))) == []
    print("\n".join(lines))
    if os.environ.get("LINEARIZE_KILLS"):
        Path(os.environ["LINEARIZE_KILLS"]).write_text("\n".join(lines) + "\n")

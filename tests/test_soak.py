"""Long checks: `make soak`."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.soak


def command(output: Path, teacher: Path) -> list[str]:
    words = ["--model", str(teacher), "--recipe", "lolcats", "--quick", "--output", str(output), "data.length=64"]
    return [sys.executable, "-m", "linearize", *words]


@pytest.mark.parametrize("trial", range(4))
def test_a_run_killed_again_and_again_ends_with_the_same_weights(make_teacher, tmp_path: Path, trial: int) -> None:
    teacher, dice = make_teacher(), random.Random(trial)
    began = time.monotonic()
    subprocess.run(command(tmp_path / "whole", teacher), check=True, capture_output=True)
    duration = time.monotonic() - began
    kills = 0
    for _ in range(8):
        process = subprocess.Popen(command(tmp_path / "killed", teacher), stdout=subprocess.DEVNULL)
        try:
            process.wait(timeout=dice.uniform(0.2, 0.7) * duration)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
        else:
            assert process.returncode == 0
            break
    subprocess.run(command(tmp_path / "killed", teacher), check=True, capture_output=True)
    assert kills
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "teacher", "whole"]

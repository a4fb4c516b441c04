"""Run `interpreted_cases.py` in Triton's interpreter: it must be switched on before Triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_triton_kernels_in_the_interpreter() -> None:
    cases = Path(__file__).with_name("interpreted_cases.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib", str(cases)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "LINEARIZE_BACKEND": "triton"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cases.parents[2])
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]

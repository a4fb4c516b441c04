"""Write the table of faults in docs/reliability.md from the results of tests/test_faults.py.

python scripts/fault_table.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- written by scripts/fault_table.py -->", "<!-- end -->"
HEAD = ["| fault | exit code | what the command says | what is left on the disk |", "|---|---|---|---|"]


def main() -> None:
    """Run the tests, collect their rows and put them between the marks."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "faults.jsonl"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_faults.py"]
        subprocess.run(command, cwd=ROOT, env={**os.environ, "LINEARIZE_FAULTS": str(results)}, check=True)
        rows = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    PAGE.write_text("\n".join([before + BEGIN, *HEAD, *rows, END]) + after, encoding="utf-8")


if __name__ == "__main__":
    main()

"""Convert one model by several recipes on the same data and tokens, evaluate each alike, and print one table.

    python scripts/run_experiments.py --model smollm2-135m --data books.jsonl.xz alpaca.jsonl.xz \
        --texts valid.jsonl.xz wikitext2 --tokens 20M --output out/20m softmax paper-liger gdn

Names are those of scripts/experiments.yaml, with a seed, as in gdn@1, where it is not that of `--seed`. Runs go on side
by side (`--jobs`), each in its own folder with its output in `NAME.log`; what is stopped, by a signal or by
`--seconds`, goes on when the command is given again. The table is `linearize compare` of what is finished, and is
written to `table.json` and `runs.csv` (seconds and tokens a second).
"""

from __future__ import annotations

import argparse
import csv
import difflib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

LINEARIZE = [sys.executable, "-m", "linearize"]
running: list[subprocess.Popen[bytes]] = []
stopped = threading.Event()


def call(words: list[str], log: Path) -> int:
    """Run a command into a log; a signal to this process stops it too."""
    if stopped.is_set():
        return -1
    with log.open("ab") as file:
        file.write(f"$ {' '.join(words)}\n".encode())
        file.flush()
        process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT)
        running.append(process)
        return process.wait()


def convert(name: str, known: dict[str, Any], given: argparse.Namespace) -> tuple[bool, str]:
    """Convert and evaluate; return whether all went well, and what is to be said of it."""
    folder, log = given.output / name, given.output / f"{name}.log"
    kind, _, seed = name.partition("@")
    run = known[kind]
    changes = [f"data.source=[{', '.join(given.data)}]", "data.format=auto", "data.held_out=32"]
    changes += [*run.get("set", []), *given.set]
    words = [
        "--model",
        given.model,
        "--recipe",
        run["recipe"],
        "--tokens",
        given.tokens,
        "--seed",
        seed or str(given.seed),
    ]
    words += ["--output", str(folder), *changes]
    if call([*LINEARIZE, *words], log):
        return False, f"{name}: not finished; see {log}"
    if not given.texts:
        return True, f"{name}: converted"
    texts = [word for text in given.texts for word in ("--data", text)]
    sizes = ["--rows", str(given.rows), "--length", "1024", "--tasks", "none", "--contexts", "none"]
    recall = ["--recall", given.recall, "--lengths", given.lengths, "--samples", str(given.samples)]
    if not (folder / "eval" / "eval.json").exists() and call(
        [*LINEARIZE, "eval", str(folder), *texts, *sizes, *recall], log
    ):
        return False, f"{name}: not evaluated; see {log}"
    return True, f"{name}: done"


def stop(*_: object) -> None:
    """Ask every run to save what it has and to end."""
    stopped.set()
    for process in running:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)


def summary(names: list[str], output: Path) -> None:
    """Write seconds and tokens of each stage, and put the evaluations side by side."""
    rows = []
    for name in names:
        results = output / name / "results.json"
        if not results.exists():
            continue
        for row in json.loads(results.read_text(encoding="utf-8"))["rows"]:
            rows.append({"run": name, **row})
    if rows:
        with (output / "runs.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
            writer.writeheader()
            writer.writerows(rows)
    evaluated = [str(output / name) for name in names if (output / name / "eval" / "eval.json").exists()]
    if evaluated:
        subprocess.run([*LINEARIZE, "compare", *evaluated, "--output", str(output / "table.json")], check=True)


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = yaml.safe_load((Path(__file__).parent / "experiments.yaml").read_text(encoding="utf-8"))
    parser.add_argument("names", nargs="+", metavar="NAME[@SEED]")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--texts", nargs="+", default=[], help="to evaluate on; without, runs are converted alone")
    parser.add_argument("--tokens", default="20M")
    parser.add_argument("--rows", type=int, default=256, help="of each text")
    parser.add_argument("--recall", default="passkey")
    parser.add_argument("--lengths", default="512,1024")
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--set", action="append", default=[], metavar="KEY.PATH=VALUE", help="for all runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--seconds", type=float, help="stop, saved, after this long")
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    for name in given.names:
        kind, at, seed = name.partition("@")
        if kind not in known:
            close = difflib.get_close_matches(kind, known, 3) or known
            parser.error(f"no run {kind!r} in scripts/experiments.yaml; did you mean {', '.join(close)}?")
        if at and not seed.isdecimal():
            parser.error(f"the seed of {name!r} is no number")
    given.output.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    signal.signal(signal.SIGTERM, stop)
    if given.seconds:
        timer = threading.Timer(given.seconds, stop)
        timer.daemon = True
        timer.start()
    began = time.monotonic()
    with ThreadPoolExecutor(given.jobs) as pool:
        well = True
        for fine, words in pool.map(lambda name: convert(name, known, given), given.names):
            print(f"{time.monotonic() - began:6.0f} s  {words}", flush=True)
            well = well and fine
    summary(given.names, given.output)
    sys.exit(0 if well else 1)


if __name__ == "__main__":
    main()

"""Convert one model by several recipes on the same data and tokens, evaluate each alike, and print their tables.

    python scripts/run_experiments.py --model smollm2-135m --data books.jsonl.xz alpaca.jsonl.xz --tokens 20M \
        --evaluate dev books_dev.jsonl.xz wiki_dev.txt --evaluate test books_valid.jsonl.xz wiki_test.txt tasks/ \
        --jobs 3 --output out/20m softmax-best best@0 best@1:test

Runs are those of scripts/experiments.yaml, with a seed where it is not 0; evaluations are those of
scripts/evaluations.yaml on these texts, with a folder of task data among them; a run is put through all of them or
through those behind its colon. Runs go on side by side, `--jobs` on each of `--gpus`, each in its own folder with its
output in `NAME.log`; what is stopped, by Ctrl-C or by `--seconds`, goes on when the command is given again. The
tables are `linearize compare` of what is finished; `runs.csv` has seconds and tokens a second.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any

import yaml

from linearize.errors import UnknownNameError

HERE = Path(__file__).parent
LINEARIZE = [sys.executable, "-m", "linearize"]
running: list[subprocess.Popen[bytes]] = []
stopped = threading.Event()


@dataclass(frozen=True)
class Job:
    """A run and what it is put through."""

    name: str
    run: dict[str, Any]
    seed: str
    evaluations: tuple[str, ...]


def call(words: list[str], log: Path, gpu: str | None) -> int:
    """Run a command into a log; a signal to this process stops it too."""
    if stopped.is_set():
        return -1
    environment = os.environ if gpu is None else {**os.environ, "CUDA_VISIBLE_DEVICES": gpu}
    with log.open("ab") as file:
        file.write(f"$ {' '.join(words)}\n".encode())
        file.flush()
        # A session of its own: Ctrl-C reaches this process alone, which asks once.
        process = subprocess.Popen(
            words, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        running.append(process)
        return process.wait()


def convert(job: Job, evaluations: dict[str, list[str]], given: argparse.Namespace, gpu: str | None) -> str:
    """Convert and evaluate; return what went wrong."""
    folder, log = given.output / job.name, given.output / f"{job.name}.log"
    changes = [f"data.source=[{', '.join(given.data)}]", "data.format=auto", "data.held_out=32"]
    words = ["--model", given.model, "--recipe", job.run["recipe"], "--tokens", given.tokens, "--seed", job.seed]
    words += ["--output", str(folder), *changes, *job.run.get("set", []), *given.set]
    if call([*LINEARIZE, *words], log, gpu):
        return f"not finished; see {log}"
    for name in job.evaluations:
        report = folder / f"eval-{name}"
        words = ["eval", str(folder), "--against", "none", "--length", "1024", "--contexts", "none"]
        words += [*evaluations[name], "--output", str(report)]
        if not (report / "eval.json").exists() and call([*LINEARIZE, *words], log, gpu):
            return f"not evaluated on {name}; see {log}"
    return ""


def stop(*_: object) -> None:
    """Ask every run to save what it has and to end."""
    stopped.set()
    for process in running:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)


def summary(jobs: list[Job], output: Path) -> None:
    """Write seconds and tokens of each stage, and put each evaluation of the runs side by side."""
    rows = []
    for job in jobs:
        results = output / job.name / "results.json"
        if results.exists():
            rows += [{"run": job.name, **row} for row in json.loads(results.read_text(encoding="utf-8"))["rows"]]
    if rows:
        with (output / "runs.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
            writer.writeheader()
            writer.writerows(rows)
    for name in dict.fromkeys(name for job in jobs for name in job.evaluations):
        reports = [output / job.name / f"eval-{name}" / "eval.json" for job in jobs if name in job.evaluations]
        if found := [str(path) for path in reports if path.exists()]:
            subprocess.run([*LINEARIZE, "compare", *found, "--output", str(output / f"{name}.json")], check=True)


def choose(name: str, known: Any, what: str) -> str:
    """Return a name that is known.

    Raises:
        UnknownNameError: it is not.
    """
    if name not in known:
        raise UnknownNameError(what, name, known)
    return name


def read_job(word: str, known: dict[str, Any], evaluations: dict[str, list[str]]) -> Job:
    """Return the job that NAME@SEED:EVALUATION,EVALUATION stands for.

    Raises:
        ValueError: a part is unknown.
    """
    name, _, wanted = word.partition(":")
    kind, _, seed = name.partition("@")
    if seed and not seed.isdecimal():
        raise ValueError(f"the seed of {name!r} is no number")
    chosen = [choose(one, evaluations, "--evaluate") for one in wanted.split(",")] if wanted else evaluations
    return Job(name, known[choose(kind, known, "run")], seed or "0", tuple(chosen))


def read_evaluations(given: list[list[str]]) -> dict[str, list[str]]:
    """Return the words of each evaluation, its texts among them.

    Raises:
        ValueError: an evaluation is unknown or has no text.
    """
    known, found = yaml.safe_load((HERE / "evaluations.yaml").read_text(encoding="utf-8")), {}
    for name, *places in given:
        folders = [place for place in places if Path(place).is_dir()]
        texts = [word for place in places if place not in folders for word in ("--data", place)]
        if not texts or len(folders) > 1:
            raise ValueError(f"--evaluate {name} takes texts and at most one folder of task data")
        words = known[choose(name, known, "evaluation")].split()
        found[name] = [*words, *texts, *(word for folder in folders for word in ("--task-data", folder))]
    return found


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="NAME[@SEED][:EVALUATION,...]")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--tokens", default="20M")
    parser.add_argument("--evaluate", nargs="+", action="append", default=[], metavar=("NAME", "TEXT"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY.PATH=VALUE", help="for all runs")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, on each GPU")
    parser.add_argument("--gpus", nargs="+", help="as CUDA_VISIBLE_DEVICES names them; the first by default")
    parser.add_argument("--seconds", type=float, help="stop, saved, after this long")
    parser.add_argument("--experiments", type=Path, default=HERE / "experiments.yaml", help="file of runs")
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    try:
        evaluations = read_evaluations(given.evaluate)
        known = yaml.safe_load(given.experiments.read_text(encoding="utf-8"))
        jobs = [read_job(word, known, evaluations) for word in given.runs]
    except (ValueError, OSError) as error:
        parser.error(str(error))
    given.output.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    gpus = given.gpus or [None]
    share = (os.cpu_count() or 1) // (given.jobs * len(gpus))  # else every run takes all cores
    for name in "OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS":
        os.environ.setdefault(name, str(max(1, share)))
    for number in signal.SIGTERM, signal.SIGINT:
        signal.signal(number, stop)
    if given.seconds:
        timer = threading.Timer(given.seconds, stop)
        timer.daemon = True
        timer.start()
    free: Queue[str | None] = Queue()
    for _ in range(given.jobs):
        for gpu in gpus:
            free.put(gpu)
    began = time.monotonic()

    def run(job: Job) -> str:
        gpu = free.get()
        try:
            wrong = convert(job, evaluations, given, gpu)
        finally:
            free.put(gpu)
        print(f"{time.monotonic() - began:6.0f} s  {job.name}: {wrong or 'done'}", flush=True)
        return wrong

    with ThreadPoolExecutor(free.qsize()) as pool:
        wrong = [words for words in pool.map(run, jobs) if words]
    summary(jobs, given.output)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()

"""What a cache budget buys without training: windows and exact KV heads against each other, on one model.

    python scripts/search_cache.py --model smollm2-135m --texts dev.jsonl wikitext2 --pairs 64:0 128:7 --output g.csv
    python scripts/search_cache.py ... --by joint --pairs 10%:4 10%:7 --output g.csv

Each pair is WINDOW:HEADS, the heads those that the probe of that window ranks first. A window of 10% stands for
windows by layer, as large as a tenth of the teacher's cache allows behind the heads. A row says the cache's share at
8,192 tokens in the run's dtype, perplexity of each text, divergence from the teacher and recall; the first row is the
teacher. Scores are kept in `probe-WINDOW.json` beside the output, that of windows by layer in `probe-by-layer.json`,
and serve a later search on the same samples.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

import torch

from linearize.api import check_device
from linearize.eval.quality import TeacherReference, evaluate
from linearize.eval.recall import RecallTask, make_samples, score
from linearize.eval.text import evaluation_text
from linearize.head_scores import ProbeScores
from linearize.planning import leaves_a_choice, make_plan, resolve_heads
from linearize.probe import run_probe, sample_settings
from linearize.recipe import Recipe
from linearize.surgery import convert
from linearize.teacher import load_teacher, resolve

AMONG = [64, 128, 256, 512]


def untrained(window: str, heads: int, by: str, probe: dict[str, Any]) -> Recipe:
    """Return a recipe of a window, or of windows by layer within a share of the cache, and so many exact heads."""
    size = {"cache": window, "among": AMONG} if window.endswith("%") else int(window)
    content = {
        "name": "search",
        "mixer": {"window": {"size": size, "sinks": 4}, "combine": "window_only"},
        "exact_heads": {"keep": heads, "by": by} if heads else [],
        "probe": probe,
        "data": {"length": 1024},
    }
    return Recipe.parse(content, "search")


def main() -> None:
    """Measure the pairs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--texts", nargs="+", required=True)
    parser.add_argument("--pairs", nargs="+", required=True, metavar="WINDOW:HEADS")
    parser.add_argument("--rows", type=int, default=64, help="of each text, of 1,024 tokens")
    parser.add_argument("--recall", nargs="+", default=["passkey", "s_niah_2", "mqar"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[512, 1024])
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--by", choices=["recall", "joint"], default="recall", help="how the probe ranks heads")
    parser.add_argument("--probe", nargs="+", default=["passkey", "multikey_niah"], help="tasks of the probe")
    parser.add_argument("--probe-samples", type=int, default=16)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    device = check_device(None)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    model, tokenizer, _ = load_teacher(resolve(given.model), dtype, device)
    texts = [evaluation_text(source, tokenizer, given.rows, 1024) for source in given.texts]
    references = [TeacherReference(model, text.rows, 16) for text in texts]
    tasks = {
        f"{name} {length}": make_samples(RecallTask(name, length, given.samples, split="probe", seed=1), tokenizer)
        for name in given.recall
        for length in given.lengths
    }
    rows: list[dict[str, Any]] = []

    def measure(window: str, heads: int, share: float) -> None:
        row: dict[str, Any] = {"by": given.by, "window": window, "heads": heads, "cache": round(share, 4)}
        for text, reference in zip(texts, references, strict=True):
            quality = evaluate(model, text.rows, reference, 16)
            row |= {text.name: round(quality.perplexity, 2), f"{text.name} kl": round(quality.kl or 0.0, 4)}
        row |= {name: round(score(model, samples, 16).accuracy, 3) for name, samples in tasks.items()}
        rows.append(row)
        print(" | ".join(f"{key} {value}" for key, value in row.items()), flush=True)

    measure("all", 0, 1.0)
    probe = {"tasks": given.probe, "samples": given.probe_samples}
    for pair in given.pairs:
        window, heads = pair.split(":")
        recipe = untrained(window, int(heads), given.by, probe)
        if leaves_a_choice(recipe, model.config, dtype):
            name = "by-layer" if window.endswith("%") else window
            path = given.output.parent / f"probe-{name}.json"
            scores = ProbeScores.read(path) if path.exists() else None
            together = given.by == "joint" and int(heads) > 0
            wanted = given.model, sample_settings(recipe, seed=0)
            if scores is None or (scores.model, scores.samples) != wanted or (together and not scores.joint):
                scores = run_probe(model, tokenizer, recipe, name=given.model)
                scores.write(path)
            recipe = resolve_heads(recipe, scores, model.config, dtype)
            print(f"{pair}: {recipe.exact_heads}, {recipe.mixer and recipe.mixer.window}", flush=True)
        share = make_plan(recipe, model.config, model=given.model, dtype=dtype).cache_share
        assert recipe.mixer is not None and isinstance(recipe.exact_heads, list)
        surgery = convert(model, recipe.mixer.model_dump(), None, recipe.exact_heads)
        measure(window, int(heads), share)
        surgery.undo()
    with given.output.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()

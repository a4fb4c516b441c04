"""What a cache budget buys without training: windows and exact KV heads against each other, on one model.

    python scripts/search_cache.py --model smollm2-135m --texts dev.jsonl wikitext2 --pairs 64:0 128:7 --output g.csv

Each pair is WINDOW:HEADS, the heads those that the probe of that window ranks first. A row says the cache's share at
8,192 tokens (bf16, no memory), perplexity of each text, divergence from the teacher and recall; the first row is the
teacher. Heads are kept in `probe-WINDOW.json` beside the output.
"""

from __future__ import annotations

import argparse
import csv
import time
from pathlib import Path
from typing import Any

import torch

from linearize.api import check_device
from linearize.eval.quality import TeacherReference, evaluate
from linearize.eval.recall import RecallTask, make_samples, score
from linearize.eval.text import evaluation_text
from linearize.head_scores import ProbeScores
from linearize.probe import run_probe
from linearize.recipe import Recipe
from linearize.surgery import convert
from linearize.teacher import load_teacher, resolve

CONTEXT = 8192


def untrained(window: int, probe: dict[str, Any]) -> Recipe:
    """Return a recipe of a window alone."""
    mixer = {"window": {"size": window, "sinks": 4}, "combine": "window_only"}
    return Recipe(name="search", mixer=mixer, exact_heads={"keep": 1}, probe=probe, data={"length": 2048})  # type: ignore[arg-type]


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
    layers, groups = model.config.num_hidden_layers, model.config.num_key_value_heads
    rows: list[dict[str, Any]] = []

    def measure(window: int, heads: int, share: float) -> None:
        row: dict[str, Any] = {"window": window, "heads": heads, "cache": round(share, 4)}
        for text, reference in zip(texts, references, strict=True):
            quality = evaluate(model, text.rows, reference, 16)
            row |= {text.name: round(quality.perplexity, 2), f"{text.name} kl": round(quality.kl or 0.0, 4)}
        row |= {name: round(score(model, samples, 16).accuracy, 3) for name, samples in tasks.items()}
        rows.append(row)
        print(" | ".join(f"{key} {value}" for key, value in row.items()), flush=True)

    measure(0, layers * groups, 1.0)
    probes: dict[int, ProbeScores] = {}
    for pair in given.pairs:
        window, heads = (int(word) for word in pair.split(":"))
        if heads and window not in probes:
            began = time.monotonic()
            recipe = untrained(window, {"tasks": given.probe, "samples": given.probe_samples})
            probes[window] = run_probe(model, tokenizer, recipe, name=given.model)
            probes[window].write(given.output.parent / f"probe-{window}.json")
            first = probes[window].rank_heads("recall")[:12]
            print(f"probe at window {window}: {time.monotonic() - began:.0f} s, {first}", flush=True)
        recipe = untrained(window, {})
        assert recipe.mixer is not None
        chosen = probes[window].rank_heads("recall")[:heads] if heads else []
        surgery = convert(model, recipe.mixer.model_dump(), None, chosen)
        kept = heads / (layers * groups)
        measure(window, heads, kept + (1 - kept) * (window + 4) / CONTEXT)
        surgery.undo()
    with given.output.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()

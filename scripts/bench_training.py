"""Tokens a second, peak memory and model-flops utilisation of the training stages, on random weights of a real shape.

    python scripts/bench_training.py --model smollm2-135m --recipe liger --rows 8 --length 1024
    python scripts/bench_training.py --model llama-3-8b --recipe liger --rows 1 --length 8192 --stages finetune
    python scripts/bench_training.py --model smollm2-135m --profile      # where a step's time goes

Rows are packed documents of random tokens. A model flop is one of the student's forward or backward matrix products
(2 a weight and token forward, as much for the gradient of the input; weights that do not train have no more), the
teacher's forward in transfer included; attention itself is left out. Exact heads and windows that a probe would choose
stand anywhere. `--stages finetune` of a recipe that distils is its stage on text alone. Prints one table.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from linearize.aliases import read_alias
from linearize.data import Corpus, PackedRows
from linearize.planning import place_heads
from linearize.recipe import ExactHeads, Recipe
from linearize.recipe_stages import EndToEnd, Finetune
from linearize.stages import Run, speed
from linearize.stages.base import Progress, _accumulate
from linearize.stages.distill import DistillRunner
from linearize.stages.finetune import FinetuneRunner
from linearize.stages.gradients import clip
from linearize.stages.transfer import TransferRunner
from linearize.surgery import convert

RUNNERS = {"transfer": TransferRunner, "finetune": FinetuneRunner, "distill": DistillRunner}
# Forward and backward through frozen weights, a transfer's forward, and the teacher's forward in distillation.
FLOPS_PER_WEIGHT = {"transfer": 2, "finetune": 4, "distill": 6}
PEAK = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12}  # dense bf16, by the vendor's datasheet


def random_model(alias: str, device: torch.device, dtype: torch.dtype, layers: int | None = None) -> Any:
    """Return a model of an alias's shape with random weights; `layers` keeps the first few."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = dict(read_alias(alias).config)
    if layers is not None:
        config["num_hidden_layers"] = layers
    config = AutoConfig.for_model(config.pop("model_type"), **config)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.eval()


def packed_rows(rows: int, length: int, vocabulary: int) -> PackedRows:
    """Return rows of two documents each."""
    ids = torch.randint(0, vocabulary, (rows, length), dtype=torch.int32)
    return PackedRows(ids, speed.two_documents(ids), ids)


def stages_of(recipe: Recipe, wanted: Collection[str]) -> Iterator[Any]:
    """Yield the stages of a recipe that are wanted; as `finetune`, also what distils, on text alone."""
    for stage in recipe.stages:
        if stage.stage in wanted:
            yield stage
        if stage.stage == "distill" and "finetune" in wanted:
            yield Finetune(**stage.model_dump(include=set(EndToEnd.model_fields) - {"stage"}))


def measure(stage: Any, model: Any, recipe: Recipe, given: argparse.Namespace) -> dict[str, Any]:
    """Run a stage's steps and return what they cost."""
    device = next(model.parameters()).device
    rows = packed_rows(given.rows, given.length, model.config.vocab_size)
    assert recipe.mixer is not None and not isinstance(recipe.exact_heads, ExactHeads)
    surgery = convert(model, recipe.mixer.model_dump(), exact_heads=recipe.exact_heads)
    run = Run(model, surgery, Corpus(rows, rows, "", "", {}), Path("unused"), 0, device, torch.bfloat16)
    runner = RUNNERS[stage.stage](stage, run)
    trained = runner.prepare()
    runner.ready()
    for parameter in trained.values():
        parameter.data = parameter.data.float()
    progress = Progress(trained, stage)
    groups = runner.clip_groups(trained)
    micro = given.micro_batch or given.rows

    losses = []

    def step() -> None:
        losses.append(_accumulate(runner, rows, micro)["loss"])
        clip(groups, stage.optimizer.clip)
        progress.advance(lambda: 0.0)

    began = time.perf_counter()
    step()
    torch.cuda.synchronize()
    first = time.perf_counter() - began
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(given.steps):
        began = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    seconds = sorted(times)[len(times) // 2]
    if given.profile:
        _profile(step)
    runner.finish()
    surgery.undo()
    tokens = given.rows * given.length
    weights = sum(p.numel() for n, p in model.named_parameters() if "embed" not in n)
    weights += model.config.vocab_size * model.config.hidden_size if stage.stage != "transfer" else 0
    flops = tokens * weights * FLOPS_PER_WEIGHT[stage.stage]
    peak = PEAK.get(torch.cuda.get_device_name())
    return {
        "model": given.model,
        "recipe": recipe.name,
        "stage": stage.stage,
        "rows": given.rows,
        "length": given.length,
        "micro_batch": micro,
        "tokens_per_second": round(tokens / seconds),
        "step_ms": round(seconds * 1e3, 1),
        "slowest_ms": round(max(times) * 1e3, 1),
        "first_s": round(first, 1),
        "loss": round(losses[given.steps], 4),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "mfu": round(flops / seconds / peak, 3) if peak else None,
    }


def _profile(step: Any) -> None:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        step()
        torch.cuda.synchronize()
    averages = trace.key_averages()
    launches = sum(e.count for e in averages if e.key in ("cudaLaunchKernel", "cuLaunchKernel", "cuLaunchKernelEx"))
    on_gpu = [e for e in averages if e.device_type == torch.autograd.DeviceType.CUDA]
    busy = sum(e.self_device_time_total for e in on_gpu) / 1e3
    print(f"{launches} launches, GPU busy {busy:.1f} ms")
    print(averages.table(sort_by="self_cuda_time_total", row_limit=25, max_name_column_width=60))
    print(averages.table(sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=60))


def report(rows: list[dict[str, Any]], title: str, path: str | None, absent: str = "None") -> None:
    """Print rows as a table, and write them as CSV where a path is given; `absent` stands for None in the table."""
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*(absent if value is None else str(value) for value in row.values()))
    Console(width=180).print(table)
    if path:
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def main() -> None:
    """Measure the stages asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="alias")
    parser.add_argument("--recipe", default="liger")
    parser.add_argument("--stages", nargs="+", default=list(RUNNERS), choices=RUNNERS)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--micro-batch", type=int, help="rows at a time in a step; all by default")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the frozen weights")
    parser.add_argument("--eager", action="store_true", help="as in a short stage: nothing compiled, no CUDA graph")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing in finetune")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--csv")
    given = parser.parse_args()
    overrides = []
    for index, stage in enumerate(Recipe.from_yaml(given.recipe).stages):
        overrides += [
            f"stages.{index}.batch={given.rows}",
            f"stages.{index}.micro_batch={given.micro_batch or given.rows}",
        ]
        if given.checkpointing and stage.stage != "transfer":
            overrides.append(f"stages.{index}.gradient_checkpointing=true")
    recipe = Recipe.from_yaml(given.recipe, overrides)
    if given.eager:
        speed.PASSES, speed.WORK = 10**9, math.inf
    model = random_model(given.model, torch.device("cuda"), getattr(torch, given.dtype))
    recipe = place_heads(recipe, model.config, torch.bfloat16)
    results = [measure(stage, model, recipe, given) for stage in stages_of(recipe, given.stages)]
    report(results, f"{torch.cuda.get_device_name()}, torch {torch.__version__}", given.csv)


if __name__ == "__main__":
    main()

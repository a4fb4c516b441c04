"""Peak memory of attention transfer, by number of layers and by length: it is one layer's, and linear in T.

    python scripts/transfer_memory.py

Every case runs in its own process on the CPU: a random Llama of the width of SmolLM2-135M, a step to warm up,
then the high-water mark of a second step above what weights, gradients and optimizer state hold. Prints a table.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table


def peak(layers: int, length: int, recipe: str) -> int:
    """Return bytes of the second step's peak above what stays allocated (weights, gradients, optimizer state, data)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from linearize.data import Corpus, PackedRows
    from linearize.recipe import Recipe
    from linearize.recipe_stages import Transfer
    from linearize.stages import Run
    from linearize.stages.base import Progress
    from linearize.stages.transfer import TransferRunner
    from linearize.surgery import convert

    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=1000,
        max_position_embeddings=16384,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    mixer = Recipe.from_yaml(recipe).mixer
    assert mixer is not None
    surgery = convert(model, mixer.model_dump())
    ids = torch.randint(0, 1000, (1, length), dtype=torch.int32)
    rows = PackedRows(ids, torch.arange(length, dtype=torch.int32)[None], ids)
    run = Run(model, surgery, Corpus(rows, rows, "", "", {}), Path("unused"), 0, torch.device("cpu"))
    runner = TransferRunner(Transfer(), run)
    progress = Progress(runner.prepare(), runner.settings)
    for parameter in progress.trained.values():
        parameter.grad = torch.zeros_like(parameter)
    progress.advance(lambda: 0.0)
    for parameter in progress.trained.values():
        parameter.grad = torch.zeros_like(parameter)
    runner.backward(PackedRows(*(tensor[:, :64] for tensor in (ids, rows.position_ids, ids))), 1.0)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    runner.backward(rows, 1.0)
    return _status("VmHWM") - before


def _status(key: str) -> int:
    """Return bytes from the kernel's account of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def measure(layers: int, length: int, recipe: str) -> float:
    """Run one case in a new process and return MiB."""
    command = [sys.executable, __file__, "--recipe", recipe, "--case", str(layers), str(length)]
    # Large blocks go back to the system when they are freed, so that the mark means memory in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return float(done.stdout.split()[-1]) / 2**20


def main() -> None:
    """Measure all cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="liger")
    parser.add_argument("--case", type=int, nargs=2, metavar=("LAYERS", "TOKENS"), help="measure one case and stop")
    given = parser.parse_args()
    if given.case:
        print(peak(*given.case, given.recipe))
        return
    table = Table("layers", "tokens", "peak MiB", "ratio", title=f"attention transfer, recipe {given.recipe}")
    few = None
    for layers in (6, 30):
        used = measure(layers, 1024, given.recipe)
        few = few or used
        table.add_row(str(layers), "1024", f"{used:.0f}", f"{used / few:.2f} x that of 6 layers")
    before = None
    for length in (1024, 2048, 4096, 8192):
        used = measure(6, length, given.recipe)
        table.add_row("6", str(length), f"{used:.0f}", f"{used / before:.2f} x that of half" if before else "")
        before = used
    Console().print(table)


if __name__ == "__main__":
    main()

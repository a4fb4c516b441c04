"""What `linearize plan` says of peak GPU memory, beside what a GPU measures: one resident transfer, one streamed.

    python scripts/check_plan_memory.py                              # the shape of llama-3.2-1b, recipe liger
    python scripts/check_plan_memory.py --model qwen2.5-1.5b --recipe lolcats --rows 4

Random weights of an alias's shape are written as safetensors, with a tokenizer of bytes, to a folder that is removed
again. Both runs train a few steps on builtin text through the same call as `linearize` on the command line, in bf16.
Prints estimate, `torch.cuda.max_memory_allocated` and their ratio, and fails where one is off by more than 15 %.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from linearize.api import linearize, plan
from linearize.modeling import auto_class
from linearize.recipe import Recipe
from linearize.stream_plan import transfer_alone

LIMIT = 0.15


def byte_tokenizer() -> Any:
    """Return a tokenizer with one token a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = ["<pad>", "<s>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(symbols)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def write_teacher(alias: str, layers: int | None, folder: Path) -> None:
    """Write a random model of an alias's shape, made on the GPU, in bf16."""
    from transformers import AutoConfig

    from linearize.aliases import read_alias

    settings = dict(read_alias(alias).config)
    settings |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if layers is not None:
        settings["num_hidden_layers"] = layers
    config = AutoConfig.for_model(**settings)
    with torch.device("cuda"):
        model = auto_class(config.model_type).from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def measure(teacher: Path, recipe: str, overrides: list[str], stream: bool, output: Path) -> tuple[int, int, float]:
    """Run a transfer and return estimated bytes, measured bytes and seconds."""
    tokens = {"data": "builtin", "dtype": "bfloat16", "device": "cuda", "overrides": overrides, "stream_layers": stream}
    estimate = plan(str(teacher), recipe, **tokens).memory
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    linearize(str(teacher), recipe, output, **tokens)
    return estimate, torch.cuda.max_memory_allocated(), time.perf_counter() - began


def main() -> None:
    """Measure both and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3.2-1b", help="alias")
    parser.add_argument("--layers", type=int, help="of the model; the alias's own by default")
    parser.add_argument("--recipe", default="liger")
    parser.add_argument("--rows", type=int, default=8, help="of a micro-batch, which is the batch")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=3)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("This needs a CUDA device: it compares an estimate with what one measures.")
    overrides = [
        transfer_alone(Recipe.from_yaml(given.recipe)),
        f"data.length={given.length}",
        "data.held_out=4",
        "data.loss=all",
        f"stages.0.batch={given.rows}",
        f"stages.0.micro_batch={given.rows}",
        f"stages.0.tokens={given.rows * given.length * given.steps}",
    ]
    title = f"{given.model}, {given.recipe}, {torch.cuda.get_device_name()}, torch {torch.__version__}"
    table = Table("run", "estimate", "measured peak", "estimate / measured", "seconds", title=title)
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        teacher = Path(folder) / "teacher"
        write_teacher(given.model, given.layers, teacher)
        for name in ("resident", "streamed"):
            estimate, peak, seconds = measure(teacher, given.recipe, overrides, name == "streamed", Path(folder) / name)
            sizes = [f"{size / 2**20:,.0f} MiB" for size in (estimate, peak)]
            table.add_row(name, *sizes, f"{estimate / peak:.3f}", f"{seconds:.0f}")
            if abs(estimate / peak - 1) > LIMIT:
                wrong.append(name)
    Console(width=120).print(table)
    if wrong:
        sys.exit(f"More than {LIMIT:.0%} off: {', '.join(wrong)}.")


if __name__ == "__main__":
    main()

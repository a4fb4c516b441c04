"""Check on two GPUs that every stage trains as in one process: whole models (DDP) and FSDP2, by the command line.

    python scripts/check_two_gpus.py

Makes a small random teacher, runs the same recipe in one process, in two, and in two under `configs/launch/fsdp2.yaml`,
loads each result in this one process, and prints a table. Exits with 1 where losses, logits or a load are off.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
RECIPE = """
name: two-gpus
description: Every stage, for scripts/check_two_gpus.py.
mixer:
  feature_map: softmax
  gate: {name: key, bias: 2.0}
  window: {size: 32, sinks: 2}
  combine: learned
stages:
- {stage: transfer, tokens: 10240, batch: 4, micro_batch: 1, train: qk, optimizer: {lr: 1e-3}}
- {stage: finetune, tokens: 10240, batch: 4, micro_batch: 1, train_mixer: true, optimizer: {lr: 1e-4}}
- {stage: distill, tokens: 10240, batch: 4, micro_batch: 1, top_k: 16, optimizer: {lr: 1e-4}}
- {stage: finetune, tokens: 10240, batch: 4, micro_batch: 1, train: full, optimizer: {lr: 1e-5}}
- {stage: preference, tokens: 10240, batch: 4, micro_batch: 1, optimizer: {lr: 1e-5}}
data: {source: builtin, length: 128, held_out: 4}
"""


def make_teacher(folder: Path) -> None:
    """Write a random Llama of 4 layers with a byte-level tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "vocab_size": 272}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.1)).save_pretrained(folder)
    symbols = ["<pad>", "<s>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(symbols)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("out/two-gpus"), help="a folder; what lies there goes")
    parser.add_argument("--dtype", default="float32", help="bfloat16 is compared more loosely")
    parser.add_argument("--only", nargs="+", help="starts to try besides one process, such as FSDP2")
    parser.add_argument(
        "--seconds", type=int, default=300, help="after which a start counts as hung: where it hangs is shown"
    )
    parser.add_argument("--cpu", action="store_true", help="two gloo processes, to try the script itself")
    given = parser.parse_args()
    if not given.cpu and torch.cuda.device_count() < 2:
        print(f"This needs two GPUs; PyTorch sees {torch.cuda.device_count()}. --cpu tries it without.")
        return 2
    shutil.rmtree(given.output, ignore_errors=True)
    given.output.mkdir(parents=True)
    make_teacher(given.output / "teacher")
    (given.output / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    (given.output / "sitecustomize.py").write_text(
        f"import faulthandler\nfaulthandler.dump_traceback_later({given.seconds}, exit=True)\n", encoding="utf-8"
    )
    paths = [str(given.output.absolute()), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    sharded = ["env", "ACCELERATE_USE_FSDP=true", "FSDP_VERSION=2", *launcher]
    starts = {
        "one process": [sys.executable],
        "two, torchrun": launcher,
        "two, FSDP2": sharded if given.cpu else [*accelerate, str(ROOT / "configs" / "launch" / "fsdp2.yaml")],
    }
    if not given.cpu:
        starts["two, DDP"] = [*accelerate, str(ROOT / "configs" / "launch" / "ddp.yaml")]
    tolerance = 1e-3 if given.dtype == "float32" else 5e-2
    ids = torch.arange(4, 260)[None]
    wanted: tuple[list[dict], torch.Tensor] | None = None
    failed = False
    print(f"torch {torch.__version__}, {'CPU' if given.cpu else torch.cuda.get_device_name()}, {given.dtype}")
    print(f"{'start':<16}{'seconds':>9}{'steps':>7}{'largest difference of a loss':>30}{'of a logit':>12}   verdict")
    for name, start in starts.items():
        if given.only and name != "one process" and not any(word in name for word in given.only):
            continue
        folder = given.output / name.replace(", ", "-").replace(" ", "-")
        command = [*start, "-m", "linearize", "--model", str(given.output / "teacher"), "--output", str(folder)]
        command += ["--recipe", str(given.output / "recipe.yaml"), "--dtype", given.dtype]
        command += ["--device", "cpu" if given.cpu else "cuda"]
        began = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, env=environment)
        seconds = time.perf_counter() - began
        if done.returncode:
            print(f"{name:<16}{seconds:>9.1f}   FAILED, exit {done.returncode}:\n{done.stderr[-12000:]}", flush=True)
            failed = True
            continue
        import linearize

        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        model = linearize.load(folder, dtype=torch.float32)
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits
        wanted = wanted or (records, logits)
        pairs = zip(records, wanted[0], strict=True)
        loss = max(abs(mine["loss"] - theirs["loss"]) / max(1.0, abs(theirs["loss"])) for mine, theirs in pairs)
        logit = float((logits - wanted[1]).abs().max() / wanted[1].abs().max())
        fine = loss <= tolerance and logit <= 10 * tolerance
        failed |= not fine
        print(
            f"{name:<16}{seconds:>9.1f}{len(records):>7}{loss:>30.1e}{logit:>12.1e}   {'ok' if fine else 'OFF'}",
            flush=True,
        )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

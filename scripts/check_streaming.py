"""Transfer of a real model, resident and streamed layer by layer: do the mixers agree, and how much was held at once?

    python scripts/check_streaming.py --model smollm2-135m --recipe liger --limit 130

Prints one line, and fails where the mixers differ by more than 1e-5 or more than `--limit` MB (10^6 bytes) of the
teacher's tensors were held at once, by the stream's own account: what has its weights at a time, whatever its dtype.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from safetensors import safe_open

from linearize.api import linearize
from linearize.recipe import Recipe
from linearize.stream_plan import transfer_alone


def tensors(folder: Path) -> dict[str, tuple[Path, str]]:
    """Return where each tensor of a checkpoint lies."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found.update({name: (path, name) for name in file.keys()})  # noqa: SIM118
    return found


def difference(first: Path, second: Path) -> tuple[int, float, float]:
    """Return how many mixer tensors there are, and the largest differences among these and among all others."""
    ours, theirs = tensors(first), tensors(second)
    if ours.keys() != theirs.keys():
        raise SystemExit(f"The checkpoints hold other tensors: {sorted(ours.keys() ^ theirs.keys())[:5]}")
    largest, mixers = {True: 0.0, False: 0.0}, 0
    for name in ours:
        pair = []
        for path, key in (ours[name], theirs[name]):
            with safe_open(path, "pt") as file:
                pair.append(file.get_tensor(key).float())
        inside = ".mixer." in name
        mixers += inside
        largest[inside] = max(largest[inside], float((pair[0] - pair[1]).abs().max()))
    return mixers, largest[True], largest[False]


def main() -> None:
    """Run both forms, compare, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--recipe", default="liger")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--limit", type=float, default=130, help="MB of the teacher's tensors at once")
    given = parser.parse_args()
    sizes = [f"data.length={given.length}", "data.held_out=2", "stages.0.batch=4", "stages.0.micro_batch=2"]
    sizes.append(f"stages.0.tokens={given.tokens}")
    options = {
        "data": "builtin",
        "dtype": given.dtype,
        "device": given.device,
        "overrides": [transfer_alone(Recipe.from_yaml(given.recipe)), *sizes],
    }
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / name for name in ("resident", "streamed")]
        for output in outputs:
            linearize(given.model, given.recipe, output, stream_layers=output.name == "streamed", **options)
        mixers, largest, others = difference(*outputs)
        results = json.loads((outputs[1] / "results.json").read_text(encoding="utf-8"))
    held = results["provenance"]["teacher_bytes_at_once"] / 1e6
    perplexities = ", ".join(f"{row['name']} {row['perplexity']:.4f}" for row in results["rows"])
    print(
        f"{given.model}, {given.recipe}, {given.dtype}: {mixers} mixer tensors, largest difference {largest:.1e} "
        f"(others {others:.1e}); at most {held:.1f} MB of the teacher at once; perplexity {perplexities}"
    )
    if largest > 1e-5 or others > 1e-5 or held > given.limit:
        sys.exit(1)


if __name__ == "__main__":
    main()

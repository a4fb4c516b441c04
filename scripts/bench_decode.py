"""Decode speed of a converted model beside its teacher, one CUDA graph a token for both, by batch and context.

    python scripts/bench_decode.py --model llama-3-8b --recipe liger --batches 1 16 --contexts 1024 8192 16384 32768

Random weights of a real shape. The teacher reads a full cache of keys and values per KV head; the query heads of a
group are rows of one product, so nothing is repeated. The student's cache depends on the context only where it has
exact heads; where a probe would choose them or the windows, as many are taken anywhere. The roofline is the ratio of
bytes: weights and KV over weights and state (read, and written but for exact heads). With `--compile`, `--join` and
`--inductor` what is compiled, and how, is the same for both. Prints one table; what does not fit is said.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
import torch._inductor
import torch.nn.functional as F
import yaml
from bench_training import random_model, report
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from linearize.cache import LinearizedCache
from linearize.eval.memory import tensor_bytes
from linearize.modeling.classes import layers_of
from linearize.planning import place_heads
from linearize.recipe import ExactHeads, Recipe
from linearize.surgery import convert

PROMPT = 160  # tokens at most that go through the student before its cache takes them for more
PROJECTIONS = ("q_proj", "k_proj", "v_proj")
SPARE = 16  # tokens of warming up, capture and profile


def grouped_attention(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float | None = None, **_: Any
) -> tuple[Tensor, None]:
    """Attention of one query a head, [B, H, 1, D], on all keys [B, G, L, D]."""
    batch, heads, _, dim = q.shape
    rows = q.reshape(batch, k.shape[1], heads // k.shape[1], dim)
    out = F.scaled_dot_product_attention(rows, k, v, scale=scaling)
    return out.reshape(batch, heads, 1, dim).transpose(1, 2), None


class FullLayer(CacheLayerMixin):
    """Keys and values of `length` tokens; each new token takes the last place, so that the context stays as it is."""

    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True

    def update(self, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write the token and return everything."""
        self.keys[:, :, -1:], self.values[:, :, -1:] = k, v
        return self.keys, self.values

    def lazy_initialization(self, *_: Any) -> None:
        """Nothing to do."""

    def get_seq_length(self) -> int:
        """Tokens before the new one."""
        return self.keys.shape[2] - 1

    def get_max_cache_shape(self) -> int:
        """All places."""
        return self.keys.shape[2]

    get_max_length = get_max_cache_shape

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys and their offset."""
        return self.keys.shape[2], 0


def full_cache(config: Any, batch: int, context: int, like: Tensor) -> Cache:
    """A teacher's cache of random keys and values."""
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = (batch, config.num_key_value_heads, context, dim)
    layers = [
        FullLayer(like.new_empty(shape).normal_(), like.new_empty(shape).normal_())
        for _ in range(config.num_hidden_layers)
    ]
    return Cache(layers=layers)


@torch.no_grad()
def one_token(model: Any, cache: Any, batch: int, position: int) -> Callable[[], None]:
    """One greedy token, ready to be replayed from a CUDA graph on a GPU."""
    device = next(model.parameters()).device
    token = torch.zeros(batch, 1, dtype=torch.long, device=device)
    places = torch.full((batch, 1), position, device=device)

    def step() -> None:
        out = model(input_ids=token, position_ids=places, past_key_values=cache, use_cache=True)
        token.copy_(out.logits[:, -1:].argmax(-1))

    if device.type != "cuda":
        return torch.no_grad()(step)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def seconds_of(run: Callable[[], None], repeats: int) -> float:
    """Median time of one token."""
    times = []
    for _ in range(repeats + 3):
        synchronize()
        began = time.perf_counter()
        run()
        synchronize()
        times.append(time.perf_counter() - began)
    return median(times[3:])


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def print_kernels(title: str, run: Callable[[], None]) -> None:
    """Print what one token's kernels take by name, and the time in which none ran before them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        synchronize()
    spans = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    kernels: dict[str, list[float]] = {}
    end = None
    for span in sorted(spans, key=lambda e: e.time_range.start):
        begins, ends = span.time_range.start, span.time_range.end
        entry = kernels.setdefault(span.name, [0, 0.0, 0.0])
        entry[0] += 1
        entry[1] += ends - begins
        entry[2] += 0.0 if end is None else begins - end
        end = ends if end is None else max(end, ends)
    rows = sorted(kernels.items(), key=lambda kernel: -kernel[1][1] - kernel[1][2])
    busy, idle = (sum(entry[i] for entry in kernels.values()) / 1e3 for i in (1, 2))
    print(f"{title}: {busy:.3f} ms in {len(spans)} kernels, {idle:.3f} ms between them")
    for name, (count, microseconds, before) in rows[:20]:
        print(f"{microseconds / 1e3:8.3f} ms, {before / 1e3:.3f} before them, {count:4.0f} x {name[:100]}")


class Joined(nn.Module):
    """Several projections of one input as one product: the first asked for makes it, the others take their part."""

    def __init__(self, parts: list[nn.Linear]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.cat([part.weight.data for part in parts]), requires_grad=False)
        self.out: Tensor | None = None

    def forward(self, x: Tensor | None) -> Tensor:
        """Project x [..., in] to all channels, or return what was made last."""
        if x is not None:
            self.out = F.linear(x, self.weight)
        assert self.out is not None
        return self.out


class Part(nn.Module):
    """Some channels of a joined projection."""

    def __init__(self, joined: Joined, first: int, size: int) -> None:
        super().__init__()
        self.joined, self.first, self.size = joined, first, size

    def forward(self, x: Tensor) -> Tensor:
        """Project x [..., in] to [..., size]."""
        return self.joined(None if self.first else x)[..., self.first : self.first + self.size]


def join_projections(model: Any) -> None:
    """Make q, k and v of every layer, which are asked for in this order, one product."""
    for layer in layers_of(model):
        parts = [getattr(layer.self_attn, name) for name in PROJECTIONS]
        if any(part.bias is not None for part in parts):
            raise SystemExit("--join knows no biases")
        joined, first = Joined(parts), 0
        for name, part in zip(PROJECTIONS, parts, strict=True):
            setattr(layer.self_attn, name, Part(joined, first, len(part.weight)))
            first += len(part.weight)


class Alone(nn.Module):
    """A decoder layer, compiled, that sees its own part of the cache alone, as the first of one.

    A layer finds its cache by its index, which makes every layer's graph another one; so all share one.
    """

    def __init__(self, layer: nn.Module, index: int, options: dict[str, Any]) -> None:
        super().__init__()
        self.layer, self.index = layer, index
        self.run = torch.compile(layer, options=options)

    def forward(self, *args: Any, past_key_values: Cache, **kwargs: Any) -> Any:
        """Run the layer on what it has cached."""
        return self.run(*args, past_key_values=Cache(layers=[past_key_values.layers[self.index]]), **kwargs)


@contextlib.contextmanager
def compiled_layers(model: Any, wanted: bool, options: dict[str, Any]) -> Iterator[None]:
    """Let the decoder's layers be compiled ones that share their graphs, for a while."""
    if not wanted:
        yield
        return
    layers = layers_of(model)
    attention = [module for layer in layers for module in layer.modules() if hasattr(module, "layer_idx")]
    indices = [module.layer_idx for module in attention]
    for index, layer in enumerate(list(layers)):
        layers[index] = Alone(layer, index, options)
    for module in attention:
        module.layer_idx = 0
    try:
        yield
    finally:
        for index, wrapper in enumerate(list(layers)):
            layers[index] = wrapper.layer
        for module, index in zip(attention, indices, strict=True):
            module.layer_idx = index


@torch.no_grad()
def student_cache(model: Any, batch: int, context: int, tokens: int) -> LinearizedCache:
    """A cache that has seen a prompt and takes it for the context but for a token; `tokens` more have place."""
    device = next(model.parameters()).device
    cache = LinearizedCache(model.config, max_length=context + tokens)
    ids = torch.randint(model.config.vocab_size, (batch, min(PROMPT, context - 1)), device=device)
    model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    for layer in cache.layers:
        for name in {"length", "exact_length"} & layer.tensors.keys():
            layer.tensors[name].fill_(context - 1)
    return cache


def written_bytes(cache: LinearizedCache) -> int:
    """Bytes that a token writes: the states, and the rings as if whole."""
    return tensor_bytes([t for layer in cache.layers for n, t in layer.tensors.items() if not n.startswith("exact")])


def weight_bytes(model: Any) -> int:
    """Bytes of the weights that a token reads: all but the input embedding's table, if it is not the head too."""
    table = model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight is table
    return sum(p.numel() * p.element_size() for p in model.parameters() if tied or p is not table)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second of a large copy, read and written."""
    if device.type != "cuda":
        return float("nan")
    source = torch.randn(2**28, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(20):
        torch.cuda.synchronize()
        began = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return 2 * source.numel() * 4 / median(times)


def measure(model: Any, recipe: Recipe, given: argparse.Namespace) -> list[dict[str, Any]]:
    """Time the teacher at every context, then the student, at every batch."""
    device = next(model.parameters()).device
    bandwidth = copy_bandwidth(device)
    weights, like = weight_bytes(model), model.get_input_embeddings().weight
    ALL_ATTENTION_FUNCTIONS.register("grouped_decode", grouped_attention)
    model.set_attn_implementation("grouped_decode")
    teacher: dict[tuple[int, int], tuple[float | None, int]] = {}
    with compiled_layers(model, given.compile, given.options):
        for batch, context in itertools.product(given.batches, given.contexts):
            cache = None
            try:
                cache = full_cache(model.config, batch, context, like)
                run = one_token(model, cache, batch, context - 1)
                teacher[batch, context] = seconds_of(run, given.repeats), tensor_bytes(cache)
                if given.profile:
                    print_kernels(f"teacher, batch {batch}, context {context:,}", run)
                del run
            except torch.OutOfMemoryError:
                teacher[batch, context] = None, 0
            del cache
            if device.type == "cuda":
                torch.cuda.empty_cache()
    recipe = place_heads(recipe, model.config, like.dtype)
    assert recipe.mixer is not None and not isinstance(recipe.exact_heads, ExactHeads)
    convert(model, recipe.mixer.model_dump(), exact_heads=recipe.exact_heads)
    rows = []
    for batch, context in itertools.product(given.batches, given.contexts):
        if recipe.exact_heads or context == given.contexts[0]:
            cache = student_cache(model, batch, context, given.repeats + SPARE)
            with compiled_layers(model, given.compile, given.options):
                run = one_token(model, cache, batch, context - 1)
                mine = seconds_of(run, given.repeats)
                if given.profile:
                    print_kernels(f"student, batch {batch}, context {context:,}", run)
            state, moved = tensor_bytes(cache), tensor_bytes(cache) + written_bytes(cache)
            del run, cache
        theirs, kv = teacher[batch, context]
        roofline = (weights + kv) / (weights + moved)
        rows.append(
            {
                "batch": batch,
                "context": context,
                "teacher_ms": None if theirs is None else round(theirs * 1e3, 3),
                "teacher_of_copy": None if theirs is None else round((weights + kv) / theirs / bandwidth, 2),
                "student_ms": round(mine * 1e3, 3),
                "student_of_copy": round((weights + moved) / mine / bandwidth, 2),
                "ratio": None if theirs is None else round(theirs / mine, 2),
                "roofline": None if theirs is None else round(roofline, 2),
                "of_roofline": None if theirs is None else round(theirs / mine / roofline, 2),
                "kv_mib": None if theirs is None else round(kv / 2**20),
                "state_mib": round(state / 2**20, 1),
            }
        )
    return rows


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3-8b", help="alias")
    parser.add_argument("--recipe", default="liger", help="name or YAML file")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 8192, 16384, 32768, 65536])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--compile", action="store_true", help="compile the decoder's layers of both")
    parser.add_argument("--join", action="store_true", help="q, k and v as one product")
    parser.add_argument(
        "--inductor",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="settings of the compiler, as in max_autotune_gemm=true",
    )
    parser.add_argument("--profile", action="store_true", help="print the kernels of a token")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=int, help="keep so many layers, to try the script")
    parser.add_argument("--csv")
    given = parser.parse_args()
    device = torch.device(given.device)
    if given.profile and device.type != "cuda":
        parser.error("--profile needs a GPU")
    if given.inductor and not given.compile:
        parser.error("--inductor needs --compile")
    given.options = {key: yaml.safe_load(value) for key, _, value in (word.partition("=") for word in given.inductor)}
    if unknown := given.options.keys() - torch._inductor.list_options():
        parser.error(f"--inductor knows no {', '.join(sorted(unknown))}")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = random_model(given.model, device, dtype, given.layers)
    if given.join:
        join_projections(model)
    torch._dynamo.config.recompile_limit = 64  # batches, contexts, and a first token that is not yet in the cache
    rows = measure(model, Recipe.from_yaml(given.recipe), given)
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    report(rows, f"{given.model}, {given.recipe}; {where}, torch {torch.__version__}", given.csv, "does not fit")


if __name__ == "__main__":
    main()

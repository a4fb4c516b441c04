"""Check every kernel against its fp64 reference on the GPU at hand, then time it beside its peers.

Legend: B batch, T tokens, H query heads, G KV heads, R = H // G, K key dim, V value dim, W window.
    python scripts/bench_kernels.py --check                  # every shipped configuration, no timing
    python scripts/bench_kernels.py --csv kernels.csv        # a short check, then the table
    python scripts/bench_kernels.py --peers sdpa flex gla    # with fla (0.6.0, --no-deps) where it is installed
Times are medians of `triton.testing.do_bench`; memory is the peak above the inputs and the output's gradient. Nothing
is timed unless the check passed.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import multiprocessing
import os
import random
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from linearize.kernels import reference
from linearize.kernels.delta import L2_EPS, gated_delta_rule, gated_delta_step
from linearize.kernels.gated_linear import gated_linear_attention
from linearize.kernels.hybrid import hybrid_attention, hybrid_step
from linearize.kernels.window import window_attention

BOUNDS = {torch.bfloat16: 5e-3, torch.float16: 1e-3, torch.float32: 2e-5}
SHAPES = {
    "B4 T2048 H32 G8 D128": (4, 2048, 32, 8, 128),
    "B1 T8192 H32 G8 D128": (1, 8192, 32, 8, 128),
    "B1 T32768 H32 G8 D128": (1, 32768, 32, 8, 128),
    "B8 T2048 H9 G3 D64": (8, 2048, 9, 3, 64),
}
GATES = ("none", "fixed", "scalar", "vector")
OPS = ("linear", "window", "hybrid", "delta")
HARSH = (0.0, -1e-6, -1.0, -20.0, -1e30)


def relative(x: Tensor, y: Tensor) -> float:
    """Root mean square of x - y over that of y; NaN counts as infinite."""
    error = ((x.double() - y).norm() / y.norm().clamp(min=1e-20)).item()
    return error if error == error else float("inf")


def gates(kind: str, shape: tuple[int, int, int, int], device: str, harsh: bool = False) -> Tensor | None:
    """Log-decays: usual ones, or drawn from `HARSH`."""
    batch, length, groups, dim = shape
    sizes = {"none": None, "fixed": (groups,), "scalar": (batch, length, groups), "vector": shape}[kind]
    if sizes is None:
        return None
    if harsh:
        return torch.tensor(HARSH, device=device)[torch.randint(len(HARSH), sizes, device=device)]
    return F.logsigmoid(torch.randn(sizes, device=device)) / 16


def documents(batch: int, length: int, device: str) -> Tensor:
    """`starts` with a continued document, a start past the token, and a restart inside a chunk."""
    starts = torch.full((batch, length), -1, device=device)
    starts[:, length // 3 :] = length // 3
    starts[1:, length // 2 :] = length // 2 + 3
    return starts


def compare(
    names: list[str], run: Callable[..., Any], truth: Callable[..., Any], tensors: list[Tensor | None]
) -> dict[str, float]:
    """Relative errors of outputs and of every gradient."""
    low = [None if x is None else x.detach().requires_grad_() for x in tensors]
    high = [None if x is None else x.detach().double().requires_grad_() for x in tensors]
    outs, refs = run(*low), truth(*high)
    finite = [torch.isfinite(y) for y in refs]
    errors = {f"out{i}": relative(x[m], y[m]) for i, (x, y, m) in enumerate(zip(outs, refs, finite, strict=True))}
    weights = [torch.randn_like(y) for y in refs]
    loss = sum((x.double() * w)[m].sum() for x, w, m in zip(outs, weights, finite, strict=True))
    goal = sum((y * w)[m].sum() for y, w, m in zip(refs, weights, finite, strict=True))
    given = [i for i, x in enumerate(tensors) if x is not None]
    grads = torch.autograd.grad(loss, [low[i] for i in given])
    wanted = torch.autograd.grad(goal, [high[i] for i in given])
    return errors | {f"d{names[i]}": relative(a, b) for i, a, b in zip(given, grads, wanted, strict=True)}


def linear_errors(
    gate: str, dtype: torch.dtype, B: int, T: int, H: int, G: int, K: int, V: int, *, harsh: bool = False,
    packed: bool = False, normalizer: bool = False, exact_gates: bool = False, device: str = "cuda",
) -> dict[str, float]:  # fmt: skip
    """Errors of gated linear attention, with an initial state; `exact_gates` leaves gates in fp32, as mixers do."""

    def new(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    g = gates(gate, (B, T, G, K), device, harsh)
    state = torch.randn(B, G, K, V, device=device)
    norm = torch.randn(B, G, K, device=device) if normalizer else None
    if (
        g is not None and gate != "fixed" and not exact_gates
    ):  # decay parameters stay fp32, projected decays have the inputs' dtype
        g = g.to(dtype)
    tensors = [new(B, T, H, K), new(B, T, G, K), new(B, T, G, V), g, state, norm]
    starts = documents(B, T, device) if packed else None

    def run(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, s: Tensor, z: Tensor | None) -> list[Tensor]:
        out = gated_linear_attention(
            q, k, v, g, scale=0.5, with_normalizer=normalizer, starts=starts, initial_state=s, initial_norm=z
        )
        return [x for x in (out.o, out.normalizer, out.state, out.state_norm) if x is not None]

    def truth(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, s: Tensor, z: Tensor | None) -> list[Tensor]:
        out = reference.gated_linear_reference(q, k, v, g, scale=0.5, starts=starts, initial_state=s, initial_norm=z)
        return list(out) if normalizer else [out[0], out[2]]

    return compare(["q", "k", "v", "g", "state", "norm"], run, truth, tensors)


def window_errors(dtype: torch.dtype, B: int, T: int, H: int, G: int, K: int, V: int, window: int, sinks: int, *,
                  packed: bool = False, device: str = "cuda") -> dict[str, float]:  # fmt: skip
    """Errors of window attention."""
    tensors: list[Tensor | None] = [
        torch.randn(B, T, h, d, device=device).to(dtype) for h, d in ((H, K), (G, K), (G, V))
    ]
    starts = documents(B, T, device) if packed else None

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return tuple(window_attention(q, k, v, window=window, sinks=sinks, starts=starts))

    def truth(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return reference.window_reference(q, k, v, window=window, sinks=sinks, starts=starts)

    return compare(["q", "k", "v"], run, truth, tensors)


def hybrid_errors(gate: str, dtype: torch.dtype, B: int, T: int, H: int, G: int, K: int, V: int, *, apart: bool = False,
                  packed: bool = False, device: str = "cuda") -> dict[str, float]:  # fmt: skip
    """Errors of window and memory in one op; `apart` gives the memory tensors and starts of its own."""

    def new(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    g = gates(gate, (B, T, G, K), device)
    g = g if g is None or gate == "fixed" else g.to(dtype)
    own = [new(B, T, H, K), new(B, T, G, K), new(B, T, G, V)] if apart else [None] * 3
    tensors = [new(B, T, H, K), new(B, T, G, K), new(B, T, G, V), *own, g, torch.randn(B, G, K, V, device=device)]
    starts = documents(B, T, device) if packed else None
    late = None if starts is None or not apart else torch.where(starts < 0, starts, starts + 20)

    def run(q: Tensor, k: Tensor, v: Tensor, mq: Tensor | None, mk: Tensor | None, mv: Tensor | None,
            g: Tensor | None, s: Tensor) -> list[Tensor]:  # fmt: skip
        out = hybrid_attention(
            q, k, v, g, window=20, sinks=3, memory_q=mq, memory_k=mk, memory_v=mv, memory_scale=0.5, starts=starts,
            memory_starts=late, initial_state=s, with_normalizer=True,
        )  # fmt: skip
        assert out.normalizer is not None
        return [out.window, out.lse, out.memory, out.normalizer, out.state]

    def truth(q: Tensor, k: Tensor, v: Tensor, mq: Tensor | None, mk: Tensor | None, mv: Tensor | None,
              g: Tensor | None, s: Tensor) -> list[Tensor]:  # fmt: skip
        near, lse, _ = reference.window_reference(q, k, v, window=20, sinks=3, starts=starts)
        mq, mk, mv = (x if y is None else y for x, y in ((q, mq), (k, mk), (v, mv)))
        far = reference.gated_linear_reference(
            mq, mk, mv, g, scale=0.5, starts=starts if late is None else late, initial_state=s
        )
        return [near, lse, *far[:3]]

    names = ["q", "k", "v", "memory_q", "memory_k", "memory_v", "g", "state"]
    return compare(names, run, truth, tensors)


def delta_errors(gate: str, dtype: torch.dtype, B: int, T: int, H: int, G: int, K: int, V: int, *, harsh: bool = False,
                 packed: bool = False, top: float = 1.0, unit: bool = False, share: int = 1,
                 device: str = "cuda") -> dict[str, float]:  # fmt: skip
    """Errors of the gated delta rule, beta in [0, top], `share` value heads a key head.

    `unit` leaves it to the op to scale q and k to unit length.
    """
    J = G * share
    g = gates(gate, (B, T, J, K), device, harsh)
    k, q = torch.randn(B, T, G, K, device=device), torch.randn(B, T, H, K, device=device)
    if not unit:
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    v, beta = torch.randn(B, T, J, V, device=device), torch.rand(B, T, J, device=device) * top
    beta[:, :1] = 0.0
    if g is not None and gate != "fixed":
        g = g.to(dtype)
    tensors = [x.to(dtype) for x in (q, k, v, beta)] + [g, torch.randn(B, J, K, V, device=device)]
    starts = documents(B, T, device) if packed else None

    def run(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, s: Tensor) -> list[Tensor]:
        out = gated_delta_rule(q, k, v, beta, g, scale=0.5, starts=starts, initial_state=s, l2norm=unit)
        return [out.o, out.state]

    def truth(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, s: Tensor) -> list[Tensor]:
        if unit:
            q, k = (x * (x.square().sum(-1, keepdim=True) + L2_EPS).rsqrt() for x in (q, k))
        return list(reference.gated_delta_reference(q, k, v, beta, g, scale=0.5, starts=starts, initial_state=s))

    return compare(["q", "k", "v", "beta", "g", "state"], run, truth, tensors)


def delta_checks(dtype: torch.dtype, dims: tuple[int, ...]) -> Iterator[tuple[str, Callable[[], dict[str, float]]]]:
    """Named checks of the gated delta rule."""
    for dim, gate in itertools.product(dims, GATES):
        run = partial(delta_errors, gate, dtype)
        yield f"delta {gate} {dim}", partial(run, 2, 150, 6, 2, dim, dim, unit=dim == 64)
        yield f"delta {gate} packed {dim}", partial(run, 2, 150, 8, 2, dim, dim, packed=True)
        if gate in ("scalar", "vector"):
            yield f"delta {gate} harsh {dim}", partial(run, 2, 150, 8, 2, dim, dim, harsh=True)
    for dim, gate, unit in itertools.product([d for d in dims if d in (64, 128)], GATES, (False, True)):
        run = partial(delta_errors, gate, dtype, 2, 150, 2, 2, dim, dim, packed=unit, unit=unit, share=3 - unit)
        yield f"delta {gate} grouped values {dim}{' packed' if unit else ''}", run
    for gate in ("none", "scalar"):
        word = "undamped" if gate == "none" else "reflections"
        yield f"delta {gate} {word}", partial(delta_errors, gate, dtype, 2, 300, 8, 2, 64, 64, top=2.0)
    yield "delta scalar many states", partial(delta_errors, "scalar", dtype, 16, 100, 16, 8, 128, 128)
    yield "delta scalar 64 x 128", partial(delta_errors, "scalar", dtype, 2, 150, 4, 2, 64, 128)


def agreement_errors(op: str) -> dict[str, float]:
    """Two runs, and `torch.compile(fullgraph=True)`, against the first run: errors must be 0."""
    (q, k, v), g = inputs_for((2, 300, 8, 2, 64), "vector")
    given = [q, k, v] if op == "window" else [q, k, v, g]
    beta = torch.rand(2, 300, 2, device="cuda").requires_grad_()
    if op == "delta":
        given.append(beta)

    def run() -> Tensor:
        if op == "window":
            return window_attention(q, k, v, window=64, sinks=4).o
        if op == "hybrid":
            out = hybrid_attention(q, k, v, g, window=64, sinks=4)
            return torch.cat([out.window, out.memory], -1)
        if op == "delta":
            return gated_delta_rule(q, k, v, beta, g, l2norm=True).o
        return gated_linear_attention(q, k, v, g).o

    do = torch.randn_like(run())

    def results(call: Callable[[], Tensor]) -> list[Tensor]:
        out = call()
        return [out.detach(), *torch.autograd.grad(out, given, do)]

    first, again = results(run), results(run)
    graph = results(torch.compile(run, fullgraph=True, backend="aot_eager"))
    return {
        "again": max(relative(x, y.double()) for x, y in zip(again, first, strict=True)),
        "graph": max(relative(x, y.double()) for x, y in zip(graph, first, strict=True)),
    }


def checks(full: bool) -> Iterator[tuple[str, torch.dtype, Callable[[], dict[str, float]]]]:
    """Named checks; `full` covers every row of the table of configurations."""
    wide = (32, 64, 80, 96, 128, 256)
    table = {torch.bfloat16: wide, torch.float16: (64, 128), torch.float32: (64, 128)}
    for dtype, dims in table.items() if full else {torch.bfloat16: (128,)}.items():
        for dim, gate in itertools.product(dims, GATES):
            for shape in ((2, 150, 6, 2, dim, dim), (4, 100, 4, 4, dim, dim)) if full else ((2, 150, 6, 2, dim, dim),):
                yield f"linear {gate} {shape}", dtype, partial(linear_errors, gate, dtype, *shape)
            shape = (2, 150, 8, 2, dim, dim)
            run = partial(linear_errors, gate, dtype, *shape, packed=True, normalizer=True)
            yield f"linear {gate} packed {shape}", dtype, run
            shape = (2, 90, 8, 2, min(2 * dim, 256), dim)  # one document a row, features twice as wide as values
            run = partial(linear_errors, gate, dtype, *shape, normalizer=True)
            yield f"linear {gate} normalizer {shape}", dtype, run
            shape = (2, 150, 8, 2, dim, dim)
            if gate in ("scalar", "vector"):
                run = partial(linear_errors, gate, dtype, *shape, exact_gates=True)
                yield f"linear {gate} fp32 gates {shape}", dtype, run
                run = partial(linear_errors, gate, dtype, *shape, exact_gates=True, harsh=True)
                yield f"linear {gate} fp32 gates, harsh {shape}", dtype, run
                yield f"linear {gate} harsh {shape}", dtype, partial(linear_errors, gate, dtype, *shape, harsh=True)
        for dim, (window, sinks, packed) in itertools.product(dims, ((64, 0, False), (100, 4, True), (16, 3, True))):
            shape = (2, 300, 8, 2, dim, dim)
            run = partial(window_errors, dtype, *shape, window, sinks, packed=packed)
            yield f"window {window}+{sinks} {shape}", dtype, run
        for gate, dim in itertools.product(GATES, (64, 128)):
            shape = (1, 2100, 4, 1, dim, dim)  # a walk cut into segments
            run = partial(linear_errors, gate, dtype, *shape, packed=dim == 64, normalizer=dim == 64)
            yield f"linear {gate} long {shape}", dtype, run
        for dim, (apart, packed) in itertools.product(dims, itertools.product((False, True), repeat=2)):
            shape = (2, 150, 8, 2, dim, dim)
            run = partial(hybrid_errors, "vector", dtype, *shape, apart=apart, packed=packed)
            yield f"hybrid apart={apart} packed={packed} {shape}", dtype, run
        for name, run in delta_checks(dtype, dims):
            yield name, dtype, run
    for op in ("linear", "window", "hybrid", "delta"):
        yield f"{op} agreement", torch.bfloat16, partial(agreement_errors, op)


def _poison() -> None:
    """Let every fresh tensor hold NaN until it is written."""
    torch.cuda.set_device(os.getpid() % torch.cuda.device_count())
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    warnings.simplefilter("ignore")


def _check_one(job: tuple[bool, int]) -> tuple[str, torch.dtype, dict[str, float] | str]:
    full, index = job
    name, dtype, run = next(itertools.islice(checks(full), index, None))
    torch.manual_seed(index)
    torch.cuda.empty_cache()  # the processes share one GPU
    try:
        return name, dtype, run()
    except Exception as error:
        return name, dtype, f"{type(error).__name__} {str(error)[:160]}"


def bound(name: str, dtype: torch.dtype, tensor: str) -> float:
    """What is allowed of the relative error of `tensor` in the check `name`."""
    # A fixed gate's gradient is one number a head, a sum over all tokens that can come out near 0.
    slack = 10.0 if "fixed" in name and tensor == "dg" else 1.0
    # Without decay no rounding of a state ever fades, nor where reflections have eigenvalues of -1.
    if dtype == torch.bfloat16 and ("undamped" in name or name.startswith("delta none")):
        slack = 2.0
    return BOUNDS[dtype] * slack


def check(full: bool, jobs: int, ops: list[str], match: str) -> bool:
    """Run the checks in `jobs` processes (they mostly compile), print what failed and the worst error of each kind."""
    named = enumerate(checks(full))
    work = [(full, index) for index, (name, _, _) in named if name.split()[0] in ops and match in name]
    random.Random(0).shuffle(work)
    failed, worst = 0, {}
    with multiprocessing.get_context("spawn").Pool(jobs, initializer=_poison) as pool:
        for name, dtype, errors in pool.imap_unordered(_check_one, work):
            if isinstance(errors, str):
                failed += 1
                print(f"FAIL {name} {dtype}: {errors}", flush=True)
                continue
            bad = {n: f"{e:.1e}" for n, e in errors.items() if e > bound(name, dtype, n)}
            if bad:
                failed += 1
                print(f"FAIL {name} {dtype}: {bad}", flush=True)
            for n, e in errors.items():
                key = (name.split()[0], str(dtype)[6:], n)
                worst[key] = max(worst.get(key, 0.0), e)
        pool.close()
        pool.join()
    for op, dtype in sorted({key[:2] for key in worst}):
        print(op, dtype, {n: f"{e:.1e}" for (o, d, n), e in worst.items() if (o, d) == (op, dtype)})
    print(f"check: {failed} of {len(work)} failed", flush=True)
    return failed == 0


@dataclass
class Row:
    """One line of the table; times in ms (`graph`: forward and backward under a CUDA graph), memory in MiB.

    `peak` is above inputs and output gradient, `kept` what is alive between forward and backward, outputs included;
    `first` is the first call in seconds, compilation included.
    """

    name: str
    shape: str
    forward: float
    both: float
    low: float
    high: float
    graph: float
    peak: float
    kept: float
    first: float


def measure(name: str, shape: str, run: Callable[[], Tensor | tuple[Tensor, ...]], inputs: list[Tensor]) -> Row:
    """Time forward, and forward with backward, and take the peak of memory."""
    start = time.time()
    outputs = run()
    grads = [torch.randn_like(x) for x in ([outputs] if isinstance(outputs, Tensor) else outputs)]
    del outputs

    def both() -> None:
        torch.autograd.grad(run(), inputs, grads)

    both()
    torch.cuda.synchronize()
    first = time.time() - start
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outputs = run()
    kept = (torch.cuda.memory_allocated() - before) / 2**20
    del outputs
    both()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    forward = triton.testing.do_bench(run, warmup=10, rep=60, return_mode="median")
    mid, low, high = triton.testing.do_bench(both, warmup=10, rep=100, quantiles=[0.5, 0.1, 0.9])
    graph = triton.testing.do_bench_cudagraph(both, rep=40, return_mode="median")
    row = Row(name, shape, forward, mid, low, high, graph, peak, kept, first)
    print(
        f"{name:26} {shape:22} {forward:7.3f} {mid:7.3f} [{low:.3f}, {high:.3f}] graph {graph:7.3f} ms "
        f"{peak:5.0f} MiB, {kept:4.0f} kept, first {first:.1f} s",
        flush=True,
    )
    return row


def inputs_for(shape: tuple[int, ...], gate: str) -> tuple[list[Tensor], Tensor | None]:
    """q, k, v and gates in bf16 that ask for gradients."""
    B, T, H, G, D = shape
    qkv = [torch.randn(B, T, h, D, device="cuda", dtype=torch.bfloat16).requires_grad_() for h in (H, G, G)]
    g = gates(gate, (B, T, G, D), "cuda")
    return qkv, None if g is None else g.bfloat16().requires_grad_()


def our_rows(ops: list[str], name: str, shape: tuple[int, ...]) -> Iterator[Row]:
    """Our ops at one shape."""
    if "linear" in ops:
        for gate in ("vector", "scalar", "none"):
            yield linear_row(gate, name, shape)
    if "delta" in ops:
        for gate, unit in (("vector", True), ("scalar", True), ("none", True), ("scalar", False)):
            yield delta_row(gate, unit, name, shape)
    (q, k, v), g = inputs_for(shape, "vector")
    if "window" in ops:
        yield measure("window 64", name, lambda: window_attention(q, k, v, window=64).o, [q, k, v])

    if "hybrid" not in ops:
        return

    def hybrid() -> tuple[Tensor, ...]:
        out = hybrid_attention(q, k, v, g, window=64)
        return out.window, out.memory

    yield measure("hybrid 64 + vector", name, hybrid, [q, k, v, g])


def linear_row(gate: str, name: str, shape: tuple[int, ...]) -> Row:
    """Gated linear attention with one kind of gate at one shape."""
    (q, k, v), g = inputs_for(shape, gate)
    given = [q, k, v] if g is None else [q, k, v, g]
    return measure(f"linear {gate}", name, lambda: gated_linear_attention(q, k, v, g).o, given)


def delta_row(gate: str, unit: bool, name: str, shape: tuple[int, ...]) -> Row:
    """The gated delta rule with one kind of gate at one shape; `unit` has it scale q and k to unit length."""
    (q, k, v), g = inputs_for(shape, gate)
    if not unit:
        q, k = (F.normalize(x.detach(), dim=-1).requires_grad_() for x in (q, k))
    beta = torch.rand(k.shape[:3], device="cuda", dtype=torch.bfloat16).requires_grad_()
    given = [q, k, v, beta] if g is None else [q, k, v, beta, g]
    title = f"delta {gate}" if unit else f"delta {gate}, no l2norm"
    return measure(title, name, lambda: gated_delta_rule(q, k, v, beta, g, l2norm=unit).o, given)


def fla_delta_rows(name: str, shape: tuple[int, ...]) -> Iterator[Row]:
    """fla's delta rules on K, V, beta and gates that were repeated to all heads beforehand; a refusal is printed."""
    from fla.ops.delta_rule import chunk_delta_rule
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    from fla.ops.kda import chunk_kda

    B, T, H, _, D = shape
    (q, k, v), g = inputs_for((B, T, H, H, D), "vector")
    assert g is not None
    g_head = gates("scalar", (B, T, H, D), "cuda").requires_grad_()
    beta = torch.rand(B, T, H, device="cuda", dtype=torch.bfloat16).requires_grad_()
    more = {"scale": 1.0, "use_qk_l2norm_in_kernel": True}
    for title, given, run in (
        ("fla chunk_delta_rule", [q, k, v, beta], lambda: chunk_delta_rule(q, k, v, beta, **more)[0]),
        ("fla chunk_kda", [q, k, v, g, beta], lambda: chunk_kda(q, k, v, g, beta, **more)[0]),
        (
            "fla chunk_gated_delta_rule", [q, k, v, g_head, beta],
            lambda: chunk_gated_delta_rule(q, k, v, g_head, beta, **more)[0],
        ),
    ):  # fmt: skip
        try:
            yield measure(title, name, run, given)
        except Exception as refusal:
            print(f"{title} at {name}: {type(refusal).__name__}: {str(refusal)[:200]}", flush=True)


def peer_rows(peers: list[str], name: str, shape: tuple[int, ...]) -> Iterator[Row]:
    """SDPA, compiled flex attention and fla at one shape."""
    B, T, H, G, D = shape
    (q, k, v), _ = inputs_for(shape, "none")
    if "sdpa" in peers:

        def sdpa() -> Tensor:
            return F.scaled_dot_product_attention(
                *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True
            )

        yield measure("SDPA causal", name, sdpa, [q, k, v])
    if "flex" in peers:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        mask = create_block_mask(lambda b, h, i, j: (i >= j) & (i - j < 64), None, None, T, T)
        flex = torch.compile(flex_attention)
        yield measure(
            "flex window 64", name,
            lambda: flex(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=mask, enable_gqa=True), [q, k, v],
        )  # fmt: skip
    if "gla" in peers:
        from fla.ops.gla import chunk_gla

        g = gates("vector", (B, T, G, D), "cuda").bfloat16().requires_grad_()
        yield measure(
            "fla chunk_gla, repeated", name,
            lambda: chunk_gla(q, *(x.repeat_interleave(H // G, 2) for x in (k, v, g)), scale=1.0)[0], [q, k, v, g],
        )  # fmt: skip
    if "delta" in peers:
        yield from fla_delta_rows(name, shape)


def write_rows(rows: list[Row], path: str) -> None:
    """Write the table as CSV."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(vars(rows[0])))
        writer.writeheader()
        writer.writerows(vars(row) for row in rows)


def plot(table: str, target: str) -> None:
    """Draw forward and backward over T, from a table that `--csv` wrote, for the shapes with 32 query heads."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with open(table, newline="") as file:
        rows = [row for row in csv.DictReader(file) if " H32 " in row["shape"]]
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for name in dict.fromkeys(row["name"] for row in rows):
        mine = [row for row in rows if row["name"] == name]
        length = [SHAPES[row["shape"]][1] for row in mine]
        # A fixed number of tokens, so that an op which is linear in T is a level line.
        each = [float(row["graph"]) * 8192 / SHAPES[row["shape"]][0] / t for row, t in zip(mine, length, strict=True)]
        ours = not name.startswith(("SDPA", "flex", "fla"))
        axes.plot(length, each, "-o" if ours else "--s", label=name, alpha=1.0 if ours else 0.7)
    axes.set(xscale="log", yscale="log", xlabel="T, tokens a row", ylabel="ms for 8,192 tokens, forward + backward")
    axes.set_xticks([2048, 8192, 32768], ["2,048", "8,192", "32,768"])
    axes.minorticks_off()
    axes.set_title("H=32, G=8, K=V=128, bf16, one H100 (B=4 at 2,048; else B=1)", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, bbox_to_anchor=(1.01, 1), loc="upper left")
    figure.savefig(target, dpi=150, bbox_inches="tight")


def decode(ops: list[str]) -> None:
    """One decode step at the Llama-3-8B shape under a CUDA graph, beside copy bandwidth."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    ms = triton.testing.do_bench(lambda: target.copy_(source), return_mode="median")
    copy = 2 * source.numel() * 4 / ms / 1e6
    print(f"copy {copy:.0f} GB/s")
    for op, (batch, layers) in itertools.product(("hybrid", "delta"), ((1, 32), (64, 32), (256, 8))):
        if op in ops:
            decode_row(op, batch, layers, copy)


def decode_row(op: str, B: int, layers: int, copy: float) -> None:
    """One token through `layers` mixers: window and gated memory, or the delta rule."""
    H, G, D, W = 32, 8, 128, 64
    q, k, v = (torch.randn(B, h, D, device="cuda", dtype=torch.bfloat16) for h in (H, G, G))
    g = gates("vector", (B, 1, G, D), "cuda")[:, 0].bfloat16()
    states = [torch.randn(B, G, D, D, device="cuda") for _ in range(layers)]
    rings = [torch.randn(2, B, W, G, D, device="cuda", dtype=torch.bfloat16) for _ in range(layers)]
    length = torch.full((B,), 1000, device="cuda")
    beta = torch.rand(B, G, device="cuda")

    def token() -> None:
        for state, ring in zip(states, rings, strict=True):
            if op == "delta":
                gated_delta_step(q, k, v, beta, g, state, l2norm=True)
                continue
            hybrid_step(q, k, v, g, state, ring[0], ring[1], length)

    token()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        token()
    ms = triton.testing.do_bench(graph.replay, return_mode="median")
    window = rings[0].numel() * 2 + q.numel() * 2 * 2 if op == "hybrid" else 0
    moved = layers * (2 * states[0].numel() * 4 + window + q.numel() * 2 * 2)
    eager = triton.testing.do_bench(token, return_mode="median")
    print(
        f"decode {op} B={B}: {ms / layers * 1e3:.1f} us a layer in a graph ({eager / layers * 1e3:.1f} eager), "
        f"{moved / ms / 1e6:.0f} GB/s, {moved / ms / 1e6 / copy:.0%} of copy",
        flush=True,
    )


def table(rows: list[Row]) -> None:
    """Forward and backward in ms by op and shape, eager / CUDA graph; for the delta rule, fla's fastest over it."""
    print(f"\n{'op':28}" + "".join(f"{shape:>24}" for shape in dict.fromkeys(row.shape for row in rows)))
    peers: dict[str, float] = {}
    for row in rows:
        if row.name in ("fla chunk_delta_rule", "fla chunk_kda"):
            peers[row.shape] = min(row.both, peers.get(row.shape, float("inf")))
    for name in dict.fromkeys(row.name for row in rows):
        cells = []
        for shape in dict.fromkeys(row.shape for row in rows):
            row = next((r for r in rows if (r.name, r.shape) == (name, shape)), None)
            cell = "" if row is None else f"{row.both:.3f} / {row.graph:.3f}"
            if row is not None and name.startswith("delta") and shape in peers:
                cell += f" x{peers[shape] / row.both:.1f}"
            cells.append(f"{cell:>24}")
        print(f"{name:28}" + "".join(cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="check every shipped configuration and stop")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--peers", nargs="*", default=["sdpa", "flex"], choices=["sdpa", "flex", "gla", "delta"])
    parser.add_argument("--ops", nargs="+", default=list(OPS), choices=OPS, help="ops to check and to time")
    parser.add_argument("--match", default="", help="check only what has this in its name")
    parser.add_argument("--unchecked", action="store_true", help="time without the check, after a run of --check")
    parser.add_argument("--jobs", type=int, default=12, help="processes that check")
    parser.add_argument("--csv", help="write the table here")
    parser.add_argument("--plot", nargs=2, metavar=("CSV", "PNG"), help="draw a table that --csv wrote, and stop")
    options = parser.parse_args()
    if options.plot:
        plot(*options.plot)
        return
    if options.unchecked:
        print("UNCHECKED: run --check at the same commit")
    elif not check(options.check, options.jobs, options.ops, options.match):
        sys.exit("The check failed: nothing is timed.")
    if options.check:
        return
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    print(
        torch.cuda.get_device_name(),
        "torch",
        torch.__version__,
        "triton",
        triton.__version__,
        "commit",
        commit or "unknown",
    )
    rows: list[Row] = []
    for name in options.shapes:
        for source in (partial(our_rows, options.ops), partial(peer_rows, options.peers)):
            for row in source(name, SHAPES[name]):
                rows.append(row)
                if options.csv:  # anew with each row, so that a run that is cut off leaves what it measured
                    write_rows(rows, options.csv)
    decode(options.ops)
    table(rows)


if __name__ == "__main__":
    main()

"""Gated linear attention on grouped KV heads in Triton: the launches of a call, forward and backward, and the op.

Legend: B batch, T tokens, H query heads, G KV heads, R = H // G query heads of a KV head, K key dim, V value dim,
C chunk, N chunks. The kernels are in `gated_linear_forward_triton` and `gated_linear_backward_triton`; the delta rule
and the hybrid share `Call`.
"""

from collections.abc import Callable, Sequence

import torch
import triton.language as tl
from torch import Tensor

from linearize.kernels.configs import Tile, Tiles, gated_linear_tiles, is_hopper
from linearize.kernels.gated_linear_backward_triton import _key_grads, _state_grads, _value_grads
from linearize.kernels.gated_linear_forward_triton import _outputs, _states
from linearize.kernels.launch import Launch, contiguous, differentiable, play, unit_stride

GATE_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@torch.compiler.assume_constant_result
def supported(dtype: torch.dtype, key_dim: int, value_dim: int) -> bool:
    """Whether the kernels serve these head dims and this dtype."""
    return gated_linear_tiles(dtype, key_dim, value_dim, 1, 1, 1) is not None


def _gate_dtype(dtype: torch.dtype, bf16: bool) -> object:
    """What sums of gates are computed in: see `_sums`."""
    return "split" if bf16 and dtype == torch.float32 else GATE_DTYPES[dtype]


def _gate_mode(log_decay: Tensor | None) -> int:
    return 0 if log_decay is None else log_decay.dim() - 2


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


class Call:
    """Shapes, strides and compile-time constants that the launches of one call share; inputs as from `prepared`."""

    @staticmethod
    def table(*shape: object) -> Tiles | None:
        """The tiles of a shape."""
        return gated_linear_tiles(*shape)

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, starts: Tensor | None,
        initial_state: Tensor | None, initial_norm: Tensor | None, scale: float, with_normalizer: bool,
    ) -> None:  # fmt: skip
        self.q, self.k, self.v, self.gate, self.starts = q, k, v, log_decay, starts
        self.B, self.T, heads, self.K = q.shape
        self.G, self.V = v.shape[2:]  # value heads: the states; where there are more than keys, each has one query
        self.H = max(heads, self.G)
        self.R = self.H // self.G
        self.scale, self.norm = scale, with_normalizer
        mode = _gate_mode(log_decay)
        tiles = self.table(q.dtype, self.K, self.V, self.B * self.G, self.R, self.T, is_hopper(q.device))
        if tiles is None:
            raise ValueError(f"no Triton kernel for {q.dtype} with key dim {self.K} and value dim {self.V}.")
        self.tiles: Tiles = tiles
        self.N = _blocks(self.T, tiles.chunk)
        self.segment = _blocks(self.N, tiles.segments)
        self.slopes = (False, True) if mode == 2 else (False,)
        self.sizes = (self.T, self.G, self.N)
        gate_strides = (0, 0, 0) if self.gate is None else self.gate.stride()[:3]
        self.strides = [x.stride()[:3] for x in (self.q, self.k, self.v)] + [gate_strides]
        bf16 = q.dtype == torch.bfloat16
        self.state_dtype = torch.bfloat16 if bf16 else torch.float32
        self.constants = {
            "GATE": mode,
            "STARTS": starts is not None,
            "NORM": with_normalizer,
            "DELTA": False,
            "INIT": initial_state is not None,
            "R": self.R,
            "SHARE": self.G // k.shape[2],
            "K": self.K,
            "V": self.V,
            "C": tiles.chunk,
            "LOG_C": tiles.chunk.bit_length() - 1,
            "LIMIT": 20.0,
            "DT": tl.bfloat16 if bf16 else tl.float32,
            "GDT": tl.float32 if self.gate is None else _gate_dtype(self.gate.dtype, bf16),
            "HALF": q.dtype == torch.float16,
            "PREC": "tf32" if q.dtype == torch.float16 else "tf32x3",
            "SEGMENTS": tiles.segments,
        }
        self.s_0, self.z_0 = initial_state, initial_norm

    def scratch(self, *dims: int, when: bool) -> Tensor | None:
        """A buffer [B, G, *dims] in fp32 between launches, or None."""
        return self.q.new_empty((self.B, self.G, *dims), dtype=torch.float32) if when else None

    def new(self, *dims: int, when: bool = True) -> Tensor:
        """An fp32 tensor a state: [B, G, *dims], or an empty one."""
        return self.q.new_empty((self.B, self.G, *dims) if when else (0,), dtype=torch.float32)

    def launch(
        self, kernel: object, grid: tuple[int, int, int], tile: Tile, args: tuple[object, ...], **constants: object
    ) -> Launch:
        """A launch of `kernel` with what all launches share."""
        return Launch(kernel, grid, args, self.constants, constants, tile.warps, tile.stages)

    def segmented(
        self, kernel: object, tile: Tile, args: Callable[..., tuple[object, ...]], **more: object
    ) -> list[Launch]:
        """The launches of a walk over the chunks; `args` takes the buffers of the segments' summaries."""
        segments = self.tiles.segments
        split = segments > 1
        summaries = (
            self.scratch(segments, self.K, self.V, when=split),
            self.scratch(segments, self.K, when=split and self.norm),
            self.scratch(segments, self.K, when=split),
        )
        grid = (_blocks(self.K, tile.key), _blocks(self.V, tile.value), self.B * self.G * segments)
        more |= {"BK": tile.key, "BV": tile.value}
        return [
            self.launch(kernel, grid, tile, args(*summaries), SUMMARY=summary, **more)
            for summary in ((True, False) if split else (False,))
        ]

    def states(self, final: bool) -> tuple[list[Launch], tuple[Tensor | None, ...]]:
        """The launches of `_states`, and what they fill: states, norms, gate sums of chunks; last state, last norm."""
        vector = self.constants["GATE"] == 2
        before = (
            self.q.new_empty((self.B * self.G, self.N, self.K, self.V), dtype=self.state_dtype),
            self.scratch(self.N, self.K, when=self.norm),
            self.scratch(self.N, self.K, when=vector),
        )
        last = (None, None)
        if final:
            last = self.new(self.K, self.V), self.new(self.K, when=self.norm)
        _, k_s, v_s, g_s = self.strides

        def args(*summaries: Tensor | None) -> tuple[object, ...]:
            given = (self.k, self.v, self.gate, self.starts, self.s_0, self.z_0)
            return *given, *summaries, *before, *last, *self.sizes, self.segment, *k_s, *v_s, *g_s

        return self.segmented(_states, self.tiles.states, args, FINAL=final), (*before, *last)

    def forward(self) -> tuple[list[Launch], tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Launches of the forward, and o, sums, last state, last norm."""
        first, (*before, s_T, z_T) = self.states(final=True)
        o = self.v.new_empty((self.B, self.T, self.H, self.V))
        sums = self.q.new_empty((self.B, self.T, self.H) if self.norm else (0,), dtype=torch.float32)
        return [*first, *self.outputs(before, o, sums)], (o, sums, s_T, z_T)

    def outputs(self, before: Sequence[Tensor | None], o: Tensor, sums: Tensor | None) -> list[Launch]:
        """The launches of `_outputs`, which fill o and sums; `before` as `states` fills it."""
        tile = self.tiles.outputs
        grid = (self.N, _blocks(self.V, tile.value), self.B * self.G)
        args = (
            self.q, self.k, self.v, self.gate, self.starts, *before, o, sums, *self.sizes, self.scale,
            *(n for s in self.strides for n in s),
        )  # fmt: skip
        shape = {"BK": tile.key, "BV": tile.value}
        return [self.launch(_outputs, grid, tile, args, STEEP=steep, **shape) for steep in self.slopes]

    def backward(
        self, do: Tensor, d_sums: Tensor | None, d_state: Tensor | None, d_norm: Tensor | None
    ) -> tuple[list[Launch], tuple[Tensor, ...]]:
        """Launches of the backward, and the gradients of q, k, v, gates (in parts), first state, first norm."""
        first, (*before, _, _) = self.states(final=False)
        d_states, d_norms = torch.empty_like(before[0]), self.scratch(self.N, self.K, when=self.norm)
        init = bool(self.constants["INIT"])
        ds_0, dz_0 = self.new(self.K, self.V, when=init), self.new(self.K, when=init and self.norm)
        q_s, _, _, g_s = self.strides
        given = (self.q, do, self.gate, self.starts, d_sums, d_state, d_norm)

        def walked(*summaries: Tensor | None) -> tuple[object, ...]:
            filled = (d_states, d_norms, ds_0, dz_0)
            return *given, *summaries, *filled, *self.sizes, self.segment, self.scale, *q_s, *g_s

        ends = {"FINAL": d_state is not None, "NORM_FINAL": self.norm and d_norm is not None}
        second = self.segmented(_state_grads, self.tiles.state_grads, walked, **ends)
        dv = self.v.new_empty(self.v.shape)
        values = self.value_grads(do, d_states, before[2], dv)
        keys, (dq, dk, dg) = self.key_grads(do, d_sums, before, d_states, d_norms)
        return [*first, *second, *values, *keys], (dq, dk, dv, dg, ds_0, dz_0)

    def value_grads(
        self, do: Tensor, d_states: Tensor | None, totals: Tensor | None, dv: Tensor, parts: Tensor | None = None
    ) -> list[Launch]:
        """The launches of `_value_grads`, which fill dv, and parts for the delta rule."""
        tile = self.tiles.value_grads
        q_s, k_s, _, g_s = self.strides
        args = (
            self.q, self.k, self.gate, self.starts, do, d_states, totals, dv, parts, *self.sizes, self.scale,
            *q_s, *k_s, *g_s,
        )  # fmt: skip
        grid = (self.N, _blocks(self.V, tile.value), self.B * self.G)
        shape = {"BK": tile.key, "BV": tile.value}
        return [self.launch(_value_grads, grid, tile, args, STEEP=steep, **shape) for steep in self.slopes]

    def key_grads(
        self, do: Tensor, d_sums: Tensor | None, before: Sequence[Tensor | None], d_states: Tensor,
        d_norms: Tensor | None, dv: Tensor | None = None, query_dtype: torch.dtype | None = None,
        key_dtype: torch.dtype | None = None,
    ) -> tuple[list[Launch], tuple[Tensor, Tensor, Tensor]]:  # fmt: skip
        """The launches of `_key_grads`, and the gradients of q, k and gates (in parts); dv for the delta rule."""
        tile = self.tiles.key_grads
        blocks = _blocks(self.K, tile.key)
        dq, dk = (
            x.new_empty((self.B, self.T, heads, self.K), dtype=dtype)
            for x, heads, dtype in ((self.q, self.H, query_dtype), (self.k, self.G, key_dtype))
        )
        if self.gate is None:
            dg = self.q.new_empty((0,))
        elif self.gate.dim() == 4:
            dg = self.gate.new_empty(self.gate.shape)
        else:
            dg = self.gate.new_empty((blocks, *self.gate.shape), dtype=torch.float32)
        states, norms, totals = before
        args = (
            self.q, self.k, self.v, self.gate, self.starts, do, d_sums, states, norms, d_states, d_norms, totals, dv,
            dq, dk, dg, *self.sizes, self.scale, self.B * self.T * self.G, *(n for s in self.strides for n in s),
        )  # fmt: skip
        grid = (blocks, self.N, self.B * self.G)
        shape = {"BK": tile.key, "BV": tile.value}
        launches = [self.launch(_key_grads, grid, tile, args, STEEP=steep, **shape) for steep in self.slopes]
        return launches, (dq, dk, dg)


def prepared(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, starts: Tensor | None, initial_state: Tensor | None,
    initial_norm: Tensor | None, with_normalizer: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The inputs as the kernels read them: copies only of odd strides; both or no initial state and norm."""
    if log_decay is not None and log_decay.dim() == 4:
        log_decay = unit_stride(log_decay)
    if initial_state is None and initial_norm is not None:
        initial_state = initial_norm.new_zeros((*initial_norm.shape, v.shape[-1]), dtype=torch.float32)
    if initial_norm is None and initial_state is not None and with_normalizer:
        initial_norm = initial_state.new_zeros(initial_state.shape[:3], dtype=torch.float32)
    return (
        unit_stride(q), unit_stride(k), unit_stride(v), log_decay, *contiguous(starts, initial_state, initial_norm)
    )  # fmt: skip


def _run_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    starts: Tensor | None,
    initial_state: Tensor | None,
    initial_norm: Tensor | None,
    scale: float,
    with_normalizer: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    given = prepared(q, k, v, log_decay, starts, initial_state, initial_norm, with_normalizer)

    def later(outputs: Sequence[Tensor]) -> list[Launch]:
        return Call(*given, scale, with_normalizer).backward(*outputs[:2], None, None)[0] if q.requires_grad else []

    name = ("gated_linear", scale, with_normalizer)
    return tuple(play(name, given, lambda: Call(*given, scale, with_normalizer).forward(), later))


def _run_backward(
    do: Tensor | None,
    d_sums: Tensor | None,
    d_state: Tensor | None,
    d_norm: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    starts: Tensor | None,
    initial_state: Tensor | None,
    initial_norm: Tensor | None,
    scale: float,
    with_normalizer: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    given = prepared(q, k, v, log_decay, starts, initial_state, initial_norm, with_normalizer)
    grads = output_grads(do, d_sums, d_state, d_norm, q, v, with_normalizer)
    dq, dk, dv, dg, ds_0, dz_0 = play(
        ("gated_linear_grad", scale, with_normalizer),
        (*given, *grads),
        lambda: Call(*given, scale, with_normalizer).backward(*grads),
    )
    return dq, dk, dv, gate_grad(dg, log_decay), ds_0, dz_0


def output_grads(
    do: Tensor | None, d_sums: Tensor | None, d_state: Tensor | None, d_norm: Tensor | None, q: Tensor, v: Tensor,
    with_normalizer: bool,
) -> list[Tensor | None]:  # fmt: skip
    """The gradients of the outputs as the kernels read them, zeros for those of o and sums that are not there."""
    if do is None:
        do = v.new_zeros((*q.shape[:3], v.shape[-1]))
    if not with_normalizer:
        d_sums = None
    elif d_sums is None:
        d_sums = q.new_zeros(q.shape[:3], dtype=torch.float32)
    return contiguous(do, d_sums, d_state, d_norm)


def gate_grad(dg: Tensor, log_decay: Tensor | None) -> Tensor:
    """The gradient of the gates from what `Call.backward` left, in parts for one gate a token."""
    return dg.sum(0).to(log_decay.dtype) if log_decay is not None and log_decay.dim() == 3 else dg


def _fake(q, k, v, log_decay, starts, initial_state, initial_norm, scale, with_normalizer):
    B, T, H, K = q.shape
    G, V = k.shape[2], v.shape[-1]
    o = v.new_empty((B, T, H, V))
    sums = q.new_empty((B, T, H) if with_normalizer else (0,), dtype=torch.float32)
    state = q.new_empty((B, G, K, V), dtype=torch.float32)
    return o, sums, state, q.new_empty((B, G, K) if with_normalizer else (0,), dtype=torch.float32)


def _fake_grad(
    do, d_sums, d_state, d_norm, q, k, v, log_decay, starts, initial_state, initial_norm, scale, with_normalizer
):
    dg = q.new_empty((0,)) if log_decay is None else log_decay.new_empty(log_decay.shape)
    init = initial_state is not None or initial_norm is not None
    B, _, _, K = q.shape
    G, V = k.shape[2], v.shape[-1]
    ds_0 = q.new_empty((B, G, K, V) if init else (0,), dtype=torch.float32)
    dz_0 = q.new_empty((B, G, K) if init and with_normalizer else (0,), dtype=torch.float32)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dg, ds_0, dz_0


def _save(ctx, inputs, output):
    *tensors, ctx.scale, ctx.with_normalizer = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, backward, *grads):
    *_, log_decay, _, initial_state, initial_norm = ctx.saved_tensors
    dq, dk, dv, dg, ds_0, dz_0 = backward(*grads, *ctx.saved_tensors, ctx.scale, ctx.with_normalizer)
    return (
        dq, dk, dv, None if log_decay is None else dg, None,
        None if initial_state is None else ds_0, None if initial_norm is None else dz_0, None, None,
    )  # fmt: skip


_op = differentiable("gated_linear", _run_forward, _run_backward, (_fake, _fake_grad), _save, _gradients)


def gated_linear_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    scale: float,
    with_normalizer: bool,
    starts: Tensor | None,
    initial_state: Tensor | None,
    initial_norm: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Run `gated_linear_attention` (see there for shapes) through the registered op `linearize::gated_linear`."""
    if log_decay is not None and log_decay.dim() == 1:
        log_decay = log_decay.float().expand(*k.shape[:3])
    if initial_norm is not None and not with_normalizer:
        initial_norm = None
    given = (q, k, v, log_decay, starts, initial_state, initial_norm, scale, with_normalizer)
    o, sums, state, norm = _op(*given)
    return (o, sums, state, norm) if with_normalizer else (o, None, state, None)

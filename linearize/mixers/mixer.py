"""The token mixer: feature map, gate, memory, window and combine put together for a range of KV heads.

Legend: B batch, T tokens, H query heads, G KV heads, D head dim, W window (of a terrace, its two blocks), S sinks.

The layer's cache holds, per row, the tokens of the current document only: a ring of the last W keys and values (token t
in slot t % W), the first S of them, the memory's state, what the short convolution still reads and, where window and
memory are disjoint, the ring of streams that have not entered the memory yet, but for what the window's ring holds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linearize.errors import LinearizeError
from linearize.kernels.hybrid import HybridOutput, hybrid_attention, hybrid_step
from linearize.kernels.microscaling import as_stored, numbers
from linearize.kernels.window import WindowOutput, window_attention, window_step
from linearize.mixers.context import SequenceContext
from linearize.mixers.convolution import ShortConvolution
from linearize.mixers.parts import HeadShape
from linearize.mixers.terrace import READ, terrace_memory, terrace_reach, terrace_step
from linearize.registry import combines, feature_maps, gates, memories

Tensors = dict[str, Tensor]
Rotate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
# Queries and keys before the rotary embedding, the same after it, and values.
Sides = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor]
GROUP_NORM_EPS = 1e-5


def _build(registry: Any, part: dict[str, Any], *args: Any) -> Any:
    options = {key: value for key, value in part.items() if key != "name"}
    try:
        return registry.get(part["name"])(*args, **options)
    except ValueError as error:
        raise LinearizeError(f"The {registry.kind} {part['name']!r} of the mixer: {error}") from error


class HeadNorm(nn.Module):
    """RMS norm of each head [..., H, D], with a learned scale of `shape`: (D,), which heads share, or (H, D)."""

    def __init__(self, *shape: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(shape))

    def forward(self, x: Tensor) -> Tensor:
        return (F.rms_norm(x.float(), x.shape[-1:], eps=self.eps) * self.weight.float()).to(x.dtype)


class TokenMixer(nn.Module):
    """Replaces softmax attention on G KV heads and their query heads.

    Args:
        shape: the heads.
        spec: the recipe's `mixer`, as plain data.
        scaling: the teacher's factor on attention scores.
        max_window: the teacher's own sliding window; the mixer's never reaches further.
        softcap: the teacher's cap on attention scores.
        causal: tokens see no later ones. Without it, `check_mixer` makes sure that there is a memory alone, and there
            is no cache.
    """

    def __init__(
        self,
        shape: HeadShape,
        spec: dict[str, Any],
        scaling: float,
        max_window: int | None = None,
        softcap: float | None = None,
        causal: bool = True,
    ) -> None:
        super().__init__()
        self.causal = causal
        self.softcap = softcap
        self.scaling = scaling
        self.rotary = spec["rotary"]
        self.microscaled = spec.get("cache_dtype", "model") == "mxint8"  # keys and values come rounded
        self.overlap = bool(spec["overlap"])
        remembers = _remembers(spec.get("memory_layers", "all"), shape.layer)
        self.combine: Any = _build(combines, spec["combine"] if remembers else {"name": "window_only"}, shape)
        window = spec["window"] if self.combine.uses_window else None
        size = 0 if window is None else _own_size(window["size"], shape.layer)
        self.max_window = max_window
        self.window = self.bounded(size)
        self.terrace = 0  # tokens of a block
        if window is not None and window.get("kind", "sliding") == "terrace":
            self.terrace = max(1, min(size, (max_window or 2 * size) // 2))
            self.window = 2 * self.terrace
        self.sinks = 0 if window is None else window["sinks"]
        self.groups = shape.groups
        self.q_map: Any = None
        self.k_map: Any = None
        self.gate: Any = None
        self.memory: Any = None
        self.shared: tuple[str, ...] = ()  # of the memory's stream, what the window's rings hold too
        self.norm: HeadNorm | None = None
        self.conv: ShortConvolution | None = None
        self.group_norm = spec["output_norm"] == "group"
        if self.combine.uses_memory:
            per_query = spec.get("k_map_heads", "kv") == "query"
            self.repeat = shape.heads // shape.groups if per_query else 1
            self.memory_heads = shape.groups * self.repeat
            inner = HeadShape(shape.heads, self.memory_heads, *_rest(shape))
            self.q_map = _build(feature_maps, spec["feature_map"], shape.heads, shape.head_dim)
            self.k_map = _build(feature_maps, spec["feature_map"], inner.groups, shape.head_dim)
            self.gate = _build(gates, spec["gate"], inner)
            normalize = bool(spec["normalize"]) or self.combine.shares_denominator
            self.memory = _build(memories, spec["memory"], inner, self.k_map.feature_dim, normalize)
            if getattr(self.memory, "log_weights", False):
                self.memory.scale, self.memory.softcap = scaling, softcap
                self.memory.microscaled = self.microscaled
                self.shared = ("k", "v")
            if spec["output_norm"] is True:
                self.norm = HeadNorm(shape.head_dim, eps=1e-6)
            elif spec["output_norm"] == "per_head":
                self.norm = HeadNorm(shape.heads, shape.head_dim, eps=1e-5)
            if spec.get("conv") is not None:
                self.conv = self._build_conv(shape, inner, spec["conv"])
        self.output_gate: nn.Linear | None = None
        self.gates_memory = spec["output_gate"] == "silu" and self.memory is not None
        if self.gates_memory:
            self.output_gate = nn.Linear(shape.hidden, shape.heads * shape.head_dim, bias=False)
        elif spec["output_gate"] is True:
            self.output_gate = nn.Linear(shape.hidden, shape.heads * shape.head_dim, bias=True)
            nn.init.zeros_(self.output_gate.weight)
            nn.init.constant_(self.output_gate.bias, 4.0)

    def bounded(self, size: int) -> int:
        """Return a window of so many tokens, or the teacher's own where that is shorter."""
        return min(size, self.max_window or size)

    @staticmethod
    def _build_conv(shape: HeadShape, inner: HeadShape, conv: dict[str, Any]) -> ShortConvolution:
        heads = (inner.groups,) if conv["inputs"] == "v" else (shape.heads, shape.groups, shape.groups)
        silu, identity = conv["activation"] == "silu", conv["identity"]
        return ShortConvolution(heads, shape.head_dim, conv["taps"], silu=silu, identity=identity)

    def _joins(self, *what: str) -> bool:
        """Whether window and memory run as one op, which knows no cap on scores."""
        return (
            self.window > 0
            and self.softcap is None
            and not self.terrace
            and getattr(self.memory, "joins_window", None) in what
        )

    @property
    def delay(self) -> int:
        """Tokens between a token's arrival and its entry into the memory."""
        return 0 if self.overlap or self.memory is None else self.terrace or self.window

    def forward(
        self,
        x: Tensor,
        plain: tuple[Tensor, Tensor],
        rotated: tuple[Tensor, Tensor],
        v: Tensor,
        context: SequenceContext,
        cache: Tensors | None = None,
        rotate: Rotate | None = None,
    ) -> Tensor:
        """Mix the tokens of one call.

        Args:
            x: the layer's input [B, T, hidden].
            plain: queries [B, T, H, D] and keys [B, T, G, D] before the rotary embedding.
            rotated: the same after it.
            v: values [B, T, G, D].
            context: padding and documents of this call.
            cache: this layer's cached tensors, read, then brought up to date in place; an empty dict on the first call.
            rotate: the rotary embedding of queries and keys [B, T, heads, D] in packed order; None where a teacher has
                none.

        Returns:
            [B, T, H, D], 0 on padding.
        """
        with torch.autocast(x.device.type, enabled=False):  # autocast would round gates, weights and states to bf16
            # Exact heads fill the same cache before, so that it may hold something and yet nothing of the mixer's.
            if x.shape[1] == 1 and context.is_plain and cache is not None and "length" in cache:
                q, k, q_rotated, k_rotated = (t[:, 0] for t in (*plain, *rotated))
                out = self._step(x[:, 0], (q, k), (q_rotated, k_rotated), v[:, 0], cache, rotate)[:, None]
            else:
                out = self._sequence(x, plain, rotated, v, context, cache, rotate)
        if self.output_gate is None or self.gates_memory:
            return out
        gate: Tensor = self.output_gate(x).sigmoid()
        return out * gate.view_as(out)

    def _memory_inputs(
        self, x: Tensor, plain: tuple[Tensor, Tensor], rotated: tuple[Tensor, Tensor], v: Tensor, rotate: Rotate | None
    ) -> tuple[Tensor, Tensors]:
        """The features of the queries, and what enters the memory, per token."""
        assert self.k_map is not None and self.gate is not None and self.memory is not None
        q, k = rotated if self.rotary is True else plain
        k_plain = plain[1]
        k, v, k_plain = self._per_memory_head(k), self._per_memory_head(v), self._per_memory_head(k_plain)
        log_decay = self.gate(x, k_plain)
        q = self.q_map(q)
        k = self.gate.keys(k_plain) if getattr(self.gate, "writes_keys", False) else self.k_map(k)
        if self.rotary == "features" and rotate is not None:
            q, k = rotate(q, k)
        if getattr(self.gate, "scales_writes", False):
            log_decay, strength = log_decay
            k = (k * strength[..., None]).to(k.dtype)
        stream = {"k": k, "v": v, **self.memory.prepare(x)}
        if log_decay is not None:
            stream["g"] = log_decay
        return q, stream

    def _per_memory_head(self, t: Tensor) -> Tensor:
        """Repeat t [..., G, D] to the memory's heads, next to each other; what has them already stays."""
        return t if t.shape[-2] == self.memory_heads else t.repeat_interleave(self.repeat, -2)

    def _conv_inputs(self, plain: tuple[Tensor, Tensor], v: Tensor) -> tuple[Tensor, ...]:
        assert self.conv is not None
        return (self._per_memory_head(v),) if len(self.conv.heads) == 1 else (*plain, v)

    def _convolved(self, convolved: list[Tensor], sides: Sides, rotate: Rotate | None) -> Sides:
        """q, k and v as the memory reads them: before the rotary embedding, after it, and the values."""
        if len(convolved) == 1:
            return sides[0], sides[1], convolved[0]
        q, k, v = convolved
        rotated = rotate(q, k) if self.rotary is True and rotate is not None else (q, k)
        return (q, k), rotated, v

    def _read(self, memory: Tensor, stream: Tensors, x: Tensor) -> Tensor:
        """The memory's outputs [..., H, D] with its skip and its gate, before the norm."""
        skip = getattr(self.memory, "skip", None)
        if skip is not None:
            memory = skip(memory, stream["v"])
        if self.gates_memory:
            assert self.output_gate is not None
            gate = F.linear(x, self.output_gate.weight.to(x.dtype)).view_as(memory)
            memory = (memory * F.silu(gate.float())).to(memory.dtype)
        return memory

    def _finish(
        self, window: WindowOutput | None, memory: Tensor | None, normalizer: Tensor | None, x: Tensor
    ) -> Tensor:
        if memory is not None:
            if normalizer is not None and not self.combine.shares_denominator:
                memory = memory / normalizer.clamp(min=1e-6)[..., None].to(memory.dtype)
            if self.group_norm:
                memory = F.layer_norm(memory.float(), memory.shape[-1:], eps=GROUP_NORM_EPS).to(memory.dtype)
            elif self.norm is not None:
                memory = self.norm(memory)
        given = {"x": x} if getattr(self.combine, "reads_input", False) else {}
        mixed: Tensor = self.combine(window, memory, normalizer, **given)
        return mixed

    def _sequence(
        self,
        x: Tensor,
        plain: tuple[Tensor, Tensor],
        rotated: tuple[Tensor, Tensor],
        v: Tensor,
        context: SequenceContext,
        cache: Tensors | None,
        rotate: Rotate | None,
    ) -> Tensor:
        q, k = (context.pack(t) for t in rotated)
        v = context.pack(v)
        filled = cache if cache and "length" in cache else None
        window, memory, normalizer, after = None, None, None, None
        joint = self._joins("all") and filled is None  # after a cached past, the window alone also reads the ring
        if self.window and not joint:
            window = self._window(q, k, v, context.starts, filled)
        stream: Tensors = {}
        recent: Tensor | None = None
        if self.memory is not None:
            sides = (context.pack(plain[0]), context.pack(plain[1])), (q, k), v
            if self.conv is not None:
                past = None if filled is None else filled["conv"]
                *convolved, recent = self.conv(self._conv_inputs(sides[0], v), context, past)
                sides = self._convolved(convolved, sides, rotate)
            x = context.pack(x)
            q_memory, stream = self._memory_inputs(x, *sides, rotate)
            if context.lengths is not None:
                stream = {n: t * context.real(t) for n, t in stream.items()}
            if not self.causal:
                memory, normalizer = self.memory.both_ways(q_memory, stream, context.starts)
            elif joint:
                window, memory, normalizer, after = self._together((q, k, v), q_memory, stream, context)
            else:
                memory, normalizer, after = self._memorize(q_memory, stream, context, filled)
            memory = self._read(memory, stream, x)
        out = self._finish(window, memory, normalizer, x)
        if cache is not None:
            self._remember(cache, k, v, stream, after, context)
            if recent is not None:
                cache["conv"].copy_(recent)
        return context.unpack(out)

    def _together(
        self, near: tuple[Tensor, Tensor, Tensor], q: Tensor, stream: Tensors, context: SequenceContext
    ) -> tuple[WindowOutput, Tensor, Tensor | None, Tensors]:
        """Window and memory in one op: the window's output, then what `_memorize` returns."""
        entering, starts = self._delayed(stream, context, None) if self.delay else (stream, context.starts)
        both = hybrid_attention(
            *near, entering.get("g"), window=self.window, sinks=self.sinks, scale=self.scaling, memory_q=q,
            memory_k=entering["k"],
            memory_v=None if entering["v"] is near[2] else entering["v"],  # one gradient for what both branches read
            memory_scale=self.memory.scale, with_normalizer=self.memory.normalize, starts=context.starts,
            memory_starts=starts,
        )  # fmt: skip
        return _branches(both)

    def _memorize(
        self, q: Tensor, stream: Tensors, context: SequenceContext, cache: Tensors | None
    ) -> tuple[Tensor, Tensor | None, Tensors]:
        """The memory's outputs, sums of weights and next states, where the stream enters when the window lets it."""
        assert self.memory is not None
        entering, starts = stream, context.starts
        if self.delay:
            entering, starts = self._delayed(stream, context, cache)
        if self.delay and self.terrace:
            index = self._document_index(stream["k"], context.starts, cache)
            return terrace_memory(self.memory, q, entering, index, context, self.terrace, cache or {})
        state = None if cache is None else {n: cache[n] for n in self.memory.state_names}
        out: tuple[Tensor, Tensor | None, Tensors] = self.memory(q, entering, starts, state)
        return out

    def _window(self, q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, cache: Tensors | None) -> WindowOutput:
        span = 0 if cache is None else self.window + self.sinks
        first = starts
        if self.terrace:
            token = torch.arange(q.shape[1], device=q.device)
            first = token + span - terrace_reach(self._document_index(k, starts, cache), self.terrace)
        if cache is None:
            return self._attend(q, k, v, first)
        past = self._past(cache, "window_k", "sink_k", k.dtype), self._past(cache, "window_v", "sink_v", v.dtype)
        missing = (span - cache["length"]).clamp(min=0)[:, None]
        if not self.terrace:
            starts = torch.full(q.shape[:2], -1, device=q.device) if starts is None else starts
            first = torch.where(starts < 0, missing, starts + span)
        assert first is not None
        out = self._attend(
            torch.cat([q.new_zeros(q.shape[0], span, *q.shape[2:]), q], 1),
            torch.cat([past[0], k], 1),
            torch.cat([past[1], v], 1),
            torch.cat([missing.expand(-1, span), first], 1),
        )
        return WindowOutput(*(t[:, span:] for t in out))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None) -> WindowOutput:
        return window_attention(
            q,
            k,
            v,
            window=self.window,
            sinks=self.sinks,
            scale=self.scaling,
            starts=starts,
            softcap=self.softcap,
        )

    def _past(self, cache: Tensors, ring: str, sink: str, dtype: torch.dtype) -> Tensor:
        """The cached sinks and window in order of time, [B, S + W, G, D]; rows with fewer tokens begin with rubbish."""
        length = cache["length"]
        place = torch.arange(self.sinks + self.window, device=length.device)
        token = place - (self.sinks + self.window - length[:, None]).clamp(min=0)
        latest = length[:, None] - self.window + (place - self.sinks)
        rows = torch.arange(length.shape[0], device=length.device)[:, None]
        past = cache[ring][rows, (latest % self.window)[:, self.sinks :]]
        if self.sinks:
            early = cache[sink][rows, token[:, : self.sinks].clamp(min=0)]
            past = torch.cat([early, past], 1)
        return numbers(past, dtype)

    def _delayed(
        self, stream: Tensors, context: SequenceContext, cache: Tensors | None
    ) -> tuple[Tensors, Tensor | None]:
        """The stream `delay` tokens late, without the sinks, which never leave the window."""
        length = stream["k"].shape[1]
        if self.sinks:
            index = self._document_index(stream["k"], context.starts, cache)
            outside = index >= self.sinks
            stream = {n: t * outside.view(*outside.shape, *(1,) * (t.dim() - 2)).to(t.dtype) for n, t in stream.items()}
        entering = {}
        rows = torch.arange(stream["k"].shape[0], device=stream["k"].device)[:, None]
        for name, now in stream.items():
            if cache is None:
                pending = now.new_zeros(now.shape[0], self.delay, *now.shape[2:])
            else:
                slots = (cache["length"][:, None] + torch.arange(self.delay, device=now.device)) % self.delay
                pending = self._pending(cache, name, (rows, slots), now.dtype)
            entering[name] = torch.cat([pending, now], 1)[:, :length]
        if context.lengths is not None:
            entering = {n: t * context.real(t) for n, t in entering.items()}
        starts = context.starts
        return entering, None if starts is None else torch.where(starts < 0, starts, starts + self.delay)

    def _pending(self, cache: Tensors, name: str, at: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
        """What has not entered the memory yet of a part of the stream, at these rows and slots of its ring."""
        ring = cache[f"{'window' if name in self.shared else 'pending'}_{name}"]
        return numbers(ring[at], dtype).to(dtype)

    def _waiting(self, stream: Tensors, outside: Tensor) -> Tensors:
        """What rings hold of a stream [B, ...] until it enters the memory, 0 for sinks, which are not `outside`."""
        return {
            f"pending_{name}": t * outside.view(*outside.shape, *(1,) * (t.dim() - outside.dim())).to(t.dtype)
            for name, t in stream.items()
            if name not in self.shared
        }

    @staticmethod
    def _document_index(like: Tensor, starts: Tensor | None, cache: Tensors | None) -> Tensor:
        """[B, T]: how many tokens of its document stand before each token."""
        index = torch.arange(like.shape[1], device=like.device).expand(like.shape[:2])
        seen = 0 if cache is None else cache["length"][:, None]
        if starts is None:
            return index + seen
        return torch.where(starts < 0, index + seen, index - starts)

    def _remember(
        self, cache: Tensors, k: Tensor, v: Tensor, stream: Tensors, after: Tensors | None, context: SequenceContext
    ) -> None:
        """Bring the cache up to date with this call's packed tokens."""
        batch, length = k.shape[:2]
        if "length" not in cache:
            cache.update(self._empty_cache(k, v, stream))
        lengths = torch.full((batch,), length, device=k.device) if context.lengths is None else context.lengths
        # Token i of the call is token `before + i` of the row's current document (earlier documents count below 0).
        before = cache["length"].clone()
        if context.starts is not None:
            last = context.starts.gather(1, (lengths - 1).clamp(min=0)[:, None])[:, 0]
            before = torch.where((last < 0) | (lengths == 0), before, -last)
        total = before + lengths
        k, v = as_stored(k, self.microscaled), as_stored(v, self.microscaled)
        if self.window:
            self._write_ring(cache, {"window_k": k, "window_v": v}, self.window, before, total, length)
        if self.delay:
            outside = before[:, None] + torch.arange(length, device=k.device) >= self.sinks
            pending = self._waiting(stream, outside)
            token = self._write_ring(cache, pending, self.delay, before, total, length)
            for name in pending:  # nothing of an earlier document may enter the memory later
                cache[name].mul_((token >= 0).view(*token.shape, *(1,) * (cache[name].dim() - 2)))
        if self.sinks:
            token = torch.arange(self.sinks, device=k.device).expand(batch, -1)
            fits = (token >= before[:, None]) & (token < total[:, None])
            self._write(cache, {"sink_k": k, "sink_v": v}, token - before[:, None], fits, length)
        for name, state in (after or {}).items():
            cache[name].copy_(state)
        cache["length"].copy_(total)

    def _write_ring(
        self, cache: Tensors, names: Tensors, size: int, before: Tensor, total: Tensor, length: int
    ) -> Tensor:
        """Write the last tokens of a call into rings; return each slot's latest token in the document, or below 0."""
        slot = torch.arange(size, device=total.device)
        token = total[:, None] - 1 - (total[:, None] - 1 - slot) % size
        self._write(cache, names, token - before[:, None], (token >= 0) & (token >= before[:, None]), length)
        return token

    @staticmethod
    def _write(cache: Tensors, names: Tensors, index: Tensor, fits: Tensor, length: int) -> None:
        """cache[name][b, slot] = tensor[b, index[b, slot]] wherever `fits`."""
        index = index.clamp(0, length - 1)
        rows = torch.arange(index.shape[0], device=index.device)[:, None]
        for name, tensor in names.items():
            chosen = fits.view(*fits.shape, *(1,) * (tensor.dim() - 2))
            cache[name].copy_(torch.where(chosen, tensor[rows, index].to(cache[name].dtype), cache[name]))

    def _empty_cache(self, k: Tensor, v: Tensor, stream: Tensors) -> Tensors:
        batch = k.shape[0]
        cache = {"length": torch.zeros(batch, dtype=torch.long, device=k.device)}
        for kind, size in (("window", self.window), ("sink", self.sinks)):
            if size:
                for side, t in (("k", k), ("v", v)):
                    cache[f"{kind}_{side}"] = as_stored(t.new_zeros(batch, size, *t.shape[2:]), self.microscaled)
        if self.delay:
            for name, t in stream.items():
                if name not in self.shared:
                    cache[f"pending_{name}"] = t.new_zeros(batch, self.delay, *t.shape[2:])
        if self.conv is not None:
            cache["conv"] = self.conv.empty(batch, k)
        if self.memory is not None:
            cache.update(self.memory.initial_state(batch, k))
            if self.terrace and self.delay:
                cache.update({READ + name: t for name, t in self.memory.initial_state(batch, k).items()})
        return cache

    def _step(
        self,
        x: Tensor,
        plain: tuple[Tensor, Tensor],
        rotated: tuple[Tensor, Tensor],
        v: Tensor,
        cache: Tensors,
        rotate: Rotate | None,
    ) -> Tensor:
        """One token [B, ...], every cached tensor updated in place."""
        q, k = rotated
        length = cache["length"]
        rows = torch.arange(length.shape[0], device=length.device)
        window, memory, normalizer = None, None, None
        stream: Tensors = {}
        if self.memory is not None:
            sides = plain, rotated, v
            one = None if rotate is None else _for_one_token(rotate)
            if self.conv is not None:
                sides = self._convolved(self.conv.step(self._conv_inputs(plain, v), cache["conv"]), sides, one)
            q_memory, stream = self._memory_inputs(x, *sides, one)
            entering = stream
            if self.delay:
                at = rows, length % self.delay
                entering = {n: self._pending(cache, n, at, t.dtype) for n, t in stream.items()}
                for name, t in self._waiting(stream, length >= self.sinks).items():
                    cache[name].index_put_(at, t)
            if self._joins("all", "step"):
                both = hybrid_step(
                    q, k, v, entering.get("g"), cache["state"], cache["window_k"], cache["window_v"], length,
                    beta=entering.get("beta"), state_norm=cache.get("norm"), sink_k=cache.get("sink_k"),
                    sink_v=cache.get("sink_v"), memory_q=q_memory, memory_k=entering["k"], memory_v=entering["v"],
                    scale=self.scaling, memory_scale=self.memory.scale,
                )  # fmt: skip
                window, memory, normalizer, _ = _branches(both)
            elif self.terrace and self.delay:
                memory, normalizer = terrace_step(self.memory, q_memory, entering, length, self.terrace, cache)
            else:
                memory, normalizer = self.memory.step(q_memory, entering, cache)
            memory = self._read(memory, stream, x)
        if self.window and window is None:
            slot = (rows, length % self.window)
            early = (torch.arange(self.sinks, device=k.device) == length[:, None])[..., None, None]
            for side, new in (("k", as_stored(k, self.microscaled)), ("v", as_stored(v, self.microscaled))):
                cache[f"window_{side}"].index_put_(slot, new)
                if self.sinks:
                    sink = cache[f"sink_{side}"]
                    sink.copy_(torch.where(early, new[:, None], sink))
            window = window_step(
                q,
                cache["window_k"],
                cache["window_v"],
                cache.get("sink_k"),
                cache.get("sink_v"),
                length,
                scale=self.scaling,
                softcap=self.softcap,
                reach=terrace_reach(length, self.terrace) if self.terrace else None,
            )
        length.add_(1)
        return self._finish(window, memory, normalizer, x)


def _branches(both: HybridOutput) -> tuple[WindowOutput, Tensor, Tensor | None, Tensors]:
    """Window, memory, its normalizer, and the state behind the last token."""
    after = {"state": both.state}
    if both.state_norm is not None:
        after["norm"] = both.state_norm
    return WindowOutput(both.window, both.lse, both.row_max), both.memory, both.normalizer, after


def _for_one_token(rotate: Rotate) -> Rotate:
    """`rotate` for queries and keys [B, heads, D]."""

    def one(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        q, k = rotate(q[:, None], k[:, None])
        return q[:, 0], k[:, 0]

    return one


def _own_size(size: int | list[int] | dict[str, Any], layer: int) -> int:
    """A layer's window; of sizes that are still to be chosen, the smallest."""
    if isinstance(size, dict):
        return int(size["among"][0])
    return size[layer] if isinstance(size, list) else size


def _remembers(layers: str | list[int] | dict[str, Any], layer: int) -> bool:
    """Whether a layer has a memory; all do where they are still to be chosen."""
    return not isinstance(layers, list) or layer in layers


def _rest(shape: HeadShape) -> tuple[int, int, int, int]:
    return shape.head_dim, shape.hidden, shape.layer, shape.layers

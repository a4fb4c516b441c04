"""Memories: the recurrent state of a mixer and its update rule.

Legend: B batch, T tokens, H query heads, G KV heads, K features, V value dim.

A memory sees a *stream*: a dict of per-token tensors [B, T, G, ...] that holds `k`, `v`, `g` (log-decay, where there is
a gate) and whatever else the memory computes from the layer's input in `prepare`. A token whose stream is all zero
must leave the state as it is: that is how padding, sinks and tokens still inside a disjoint window stay out. A memory
that has no sum of weights to divide by says `normalizes = False`; one that is stable only for keys of length 1 at most
says `needs_unit`; one that needs a gate per channel says `needs_channels`; one whose decay is its own `own_decay`.
A memory may have a `skip`, a module that adds to its outputs what the token itself holds. `joins_window` says whether
`hybrid_step` (`step`) or `hybrid_attention` too (`all`) runs its update rule together with the window. One that is a
softmax over tokens says `log_weights`: it returns normalized outputs and, in the place of sums of weights, their
logarithms; the mixer sets its `scale` and `softcap` to the teacher's, and `microscaled` where tokens come rounded. Its
`k` and `v` are the window's own, which the cache holds once, so its stream must say otherwise what is no token.
One that serves encoders, whose tokens see later ones as well, says `bidirectional` and has
`both_ways(q, stream, starts) -> (outputs, sums of weights or None)`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linearize.kernels.bidirectional import bidirectional_linear_attention
from linearize.kernels.delta import gated_delta_rule, gated_delta_step
from linearize.kernels.gated_linear import gated_linear_attention, gated_linear_step
from linearize.kernels.scan import selective_scan, selective_scan_step
from linearize.kernels.slots import gated_slot_attention, gated_slot_step
from linearize.mixers.parts import Fp32Part, HeadShape, fp32_parameter, step_bias, uniform
from linearize.registry import memories

Stream = dict[str, Tensor]
State = dict[str, Tensor]


class Skip(Fp32Part):
    """Add to each query head's output its token's value, `o_t + D v_t` with a learned D (Mamba's D).

    Args:
        shape: the heads.
        channels: one D per channel (V) or one per head (1).
        value: where D starts.
    """

    def __init__(self, shape: HeadShape, channels: int, value: float) -> None:
        super().__init__()
        self.weight = fp32_parameter(shape.heads, channels, value=value)

    def forward(self, o: Tensor, v: Tensor) -> Tensor:
        """Add to o [..., H, V] the values v [..., G, V]."""
        values = v.float().repeat_interleave(o.shape[-2] // v.shape[-2], -2)
        return (o.float() + self.weight * values).to(o.dtype)


@memories.register("additive")
class AdditiveMemory(Fp32Part):
    """`S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T`: linear attention, RetNet, GLA, HGRN2, Mamba-2, mLSTM.

    Args:
        scale: factor on the outputs.
        skip: starting value of a learned factor per query head on the token's own value, which is added (Mamba-2's D,
            published at 1); None adds nothing.
    """

    bidirectional = True
    joins_window = "all"

    def __init__(
        self, shape: HeadShape, feature_dim: int, normalize: bool, *, scale: float = 1.0, skip: float | None = None
    ) -> None:
        super().__init__()
        if normalize and skip is not None:
            raise ValueError("`skip` has no share in the sum of weights that the output is divided by; drop one.")
        self.scale = scale
        self.skip = None if skip is None else Skip(shape, 1, skip)
        self.normalize = normalize
        self.state_shape = (shape.groups, feature_dim, shape.head_dim)
        self.state_names = ("state", "norm") if normalize else ("state",)

    def prepare(self, x: Tensor) -> Stream:
        """Return further entries of the stream, computed from the layer's input [..., hidden]."""
        return {}

    def initial_state(self, batch: int, like: Tensor) -> State:
        """Return an empty state in fp32, where the keys `like` are."""
        state = {"state": torch.zeros(batch, *self.state_shape, dtype=torch.float32, device=like.device)}
        if self.normalize:
            state["norm"] = torch.zeros(batch, *self.state_shape[:2], dtype=torch.float32, device=like.device)
        return state

    def forward(
        self, q: Tensor, stream: Stream, starts: Tensor | None, state: State | None
    ) -> tuple[Tensor, Tensor | None, State]:
        """Run over all tokens.

        Args:
            q: features of the queries [B, T, H, K].
            stream: `k` [B, T, G, K], `v` [B, T, G, V], `g`.
            starts: first visible token of each token (see `gated_linear_attention`).
            state: where to go on from; None is empty.

        Returns:
            Outputs [B, T, H, V], sums of weights [B, T, H] or None, and the state behind the last token.
        """
        out = gated_linear_attention(
            q,
            stream["k"],
            stream["v"],
            stream.get("g"),
            scale=self.scale,
            with_normalizer=self.normalize,
            starts=starts,
            initial_state=None if state is None else state["state"],
            initial_norm=None if state is None else state.get("norm"),
        )
        after = {"state": out.state}
        if out.state_norm is not None:
            after["norm"] = out.state_norm
        return out.o, out.normalizer, after

    def both_ways(self, q: Tensor, stream: Stream, starts: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Run over all tokens of an encoder, each of which sees all of its document; arguments as in `forward`."""
        return bidirectional_linear_attention(
            q,
            stream["k"],
            stream["v"],
            stream.get("g"),
            scale=self.scale,
            with_normalizer=self.normalize,
            starts=starts,
        )

    def step(self, q: Tensor, stream: Stream, state: State) -> tuple[Tensor, Tensor | None]:
        """Run over one token [B, heads, ...]; `state` is updated in place."""
        return gated_linear_step(
            q, stream["k"], stream["v"], stream.get("g"), state["state"], state.get("norm"), scale=self.scale
        )


@memories.register("delta")
class DeltaMemory(Fp32Part):
    """`S_t = (I - b_t k_t k_t^T) diag(exp(g_t)) S_{t-1} + b_t k_t v_t^T`: DeltaNet, Gated DeltaNet, KDA.

    A key writes over what it wrote before (arXiv:2406.06484; with decay arXiv:2412.06464, eq. 10; with a decay per
    channel arXiv:2510.26692, eq. 1). The write strength is `b_t = sigmoid(x_t W + c)` per KV head.

    Args:
        scale: factor on the outputs.
        bias: starting value of c. W starts at zero, so 0.0 gives every token b = 0.5 at first.
        negative: b lies in (0, 2) instead of (0, 1): a token can turn what its key holds around (arXiv:2411.12537).
    """

    normalizes = False
    needs_unit = True
    joins_window = "step"

    def __init__(
        self,
        shape: HeadShape,
        feature_dim: int,
        normalize: bool,
        *,
        scale: float = 1.0,
        bias: float = 0.0,
        negative: bool = False,
    ) -> None:
        super().__init__()
        if normalize:
            raise ValueError("it has no sum of weights that its output could be divided by.")
        self.scale = scale
        self.strength = 2.0 if negative else 1.0
        self.state_shape = (shape.groups, feature_dim, shape.head_dim)
        self.state_names = ("state",)
        self.weight = fp32_parameter(shape.groups, shape.hidden)
        self.bias = fp32_parameter(shape.groups, value=bias)

    def prepare(self, x: Tensor) -> Stream:
        """Return the write strengths, `beta` [..., G] in fp32, of the layer's input [..., hidden]."""
        return {"beta": self.strength * F.linear(x.float(), self.weight, self.bias).sigmoid()}

    def initial_state(self, batch: int, like: Tensor) -> State:
        """Return an empty state in fp32."""
        return {"state": torch.zeros(batch, *self.state_shape, dtype=torch.float32, device=like.device)}

    def forward(
        self, q: Tensor, stream: Stream, starts: Tensor | None, state: State | None
    ) -> tuple[Tensor, Tensor | None, State]:
        """Run over all tokens; arguments and results as in `AdditiveMemory.forward`, without sums of weights."""
        out = gated_delta_rule(
            q,
            stream["k"],
            stream["v"],
            stream["beta"],
            stream.get("g"),
            scale=self.scale,
            starts=starts,
            initial_state=None if state is None else state["state"],
        )
        return out.o, None, {"state": out.state}

    def step(self, q: Tensor, stream: Stream, state: State) -> tuple[Tensor, Tensor | None]:
        """Run over one token [B, heads, ...]; `state` is updated in place."""
        out = gated_delta_step(
            q, stream["k"], stream["v"], stream["beta"], stream.get("g"), state["state"], scale=self.scale
        )
        return out, None


@memories.register("slots")
class SlotMemory(Fp32Part):
    """As many slots as a head has channels, each a key and a value; a softmax reads them (GSA, arXiv:2409.07146).

    The gate's channel m is slot m's: it keeps `exp(g_tm)` and takes `1 - exp(g_tm)` of the token's key and value.

    Args:
        scale: factor on the scores of the slots.
    """

    normalizes = False
    needs_channels = True

    def __init__(self, shape: HeadShape, feature_dim: int, normalize: bool, *, scale: float = 1.0) -> None:
        super().__init__()
        if normalize:
            raise ValueError("its softmax over the slots is normalized already.")
        self.scale = scale
        self.key_shape = (shape.groups, feature_dim, shape.head_dim)
        self.value_shape = (shape.groups, shape.head_dim, shape.head_dim)
        self.state_names = ("state_keys", "state_values")

    def prepare(self, x: Tensor) -> Stream:
        """Return further entries of the stream: none."""
        return {}

    def initial_state(self, batch: int, like: Tensor) -> State:
        """Return empty slots in fp32."""
        return {
            "state_keys": torch.zeros(batch, *self.key_shape, dtype=torch.float32, device=like.device),
            "state_values": torch.zeros(batch, *self.value_shape, dtype=torch.float32, device=like.device),
        }

    def forward(
        self, q: Tensor, stream: Stream, starts: Tensor | None, state: State | None
    ) -> tuple[Tensor, Tensor | None, State]:
        """Run over all tokens; arguments and results as in `AdditiveMemory.forward`, without sums of weights."""
        out = gated_slot_attention(
            q,
            stream["k"],
            stream["v"],
            stream["g"],
            scale=self.scale,
            starts=starts,
            initial_keys=None if state is None else state["state_keys"],
            initial_values=None if state is None else state["state_values"],
        )
        return out.o, None, {"state_keys": out.keys, "state_values": out.values}

    def step(self, q: Tensor, stream: Stream, state: State) -> tuple[Tensor, Tensor | None]:
        """Run over one token [B, heads, ...]; `state` is updated in place."""
        keys, values = state["state_keys"], state["state_values"]
        return gated_slot_step(q, stream["k"], stream["v"], stream["g"], keys, values, scale=self.scale), None


@memories.register("scan")
class ScanMemory(Fp32Part):
    """Mamba-1's selective scan: each value channel has its own state and decays (arXiv:2312.00752).

    As a student of attention: arXiv:2408.15237. `s_tv = exp(-dt_tv exp(A_v)) s_(t-1)v + dt_tv v_tv k_t` and
    `o_tv = q_t . s_tv + D_v v_tv`, where channel v works with the N entries of queries and keys that stand at its own
    place in the head, and `dt_t = softplus(W2 W1 x_t + b)`. The decay is the memory's own. The start is Mamba's:
    `exp(A_vn) = n`, D = 1, and b such that dt is log-evenly drawn from [0.001, 0.1] where W2 W1 x = 0.

    Args:
        state: N, which divides the head dim.
        rank: columns of W1; a sixteenth of the layer's width by default.
    """

    normalizes = False
    own_decay = True

    def __init__(
        self, shape: HeadShape, feature_dim: int, normalize: bool, *, state: int = 16, rank: int | None = None
    ) -> None:
        super().__init__()
        if normalize:
            raise ValueError("it has no sum of weights that its output could be divided by.")
        if feature_dim != shape.head_dim:
            raise ValueError(f"it needs a feature per channel ({shape.head_dim}), the feature map gives {feature_dim}.")
        if state < 1 or shape.head_dim % state:
            raise ValueError(f"`state` must divide the head dim ({shape.head_dim}), got {state}.")
        rank = math.ceil(shape.hidden / 16) if rank is None else rank
        if rank < 1:
            raise ValueError(f"`rank` must be at least 1, got {rank}.")
        self.state_shape = (shape.groups, shape.head_dim, state)
        self.state_names = ("state",)
        channels, reach = shape.groups * shape.head_dim, shape.hidden**-0.5
        self.down = nn.Parameter(uniform(-reach, reach, rank, shape.hidden))
        self.up = nn.Parameter(uniform(-(rank**-0.5), rank**-0.5, channels, rank))
        self.bias = nn.Parameter(step_bias(1e-3, 0.1, channels))
        rates = torch.arange(1, state + 1, dtype=torch.float32).expand(self.state_shape)
        self.log_rate = nn.Parameter(rates.log().clone())
        self.skip = Skip(shape, shape.head_dim, 1.0)

    def prepare(self, x: Tensor) -> Stream:
        """Return the step sizes, `dt` [..., G, V] in fp32, of the layer's input [..., hidden]."""
        logits = F.linear(F.linear(x.float(), self.down), self.up, self.bias)
        return {"dt": F.softplus(logits).unflatten(-1, self.state_shape[:2])}

    def initial_state(self, batch: int, like: Tensor) -> State:
        """Return an empty state in fp32."""
        return {"state": torch.zeros(batch, *self.state_shape, dtype=torch.float32, device=like.device)}

    def forward(
        self, q: Tensor, stream: Stream, starts: Tensor | None, state: State | None
    ) -> tuple[Tensor, Tensor | None, State]:
        """Run over all tokens; arguments and results as in `AdditiveMemory.forward`, without sums of weights."""
        out = selective_scan(
            q,
            stream["k"],
            stream["v"],
            stream["dt"],
            self.log_rate.exp(),
            starts=starts,
            initial_state=None if state is None else state["state"],
        )
        return out.o, None, {"state": out.state}

    def step(self, q: Tensor, stream: Stream, state: State) -> tuple[Tensor, Tensor | None]:
        """Run over one token [B, heads, ...]; `state` is updated in place."""
        rate = self.log_rate.exp()
        return selective_scan_step(q, stream["k"], stream["v"], stream["dt"], rate, state["state"]), None

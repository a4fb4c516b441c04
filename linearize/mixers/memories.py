"""Memories: the recurrent state of a mixer and its update rule.

Legend: B batch, T tokens, H query heads, G KV heads, K features, V value dim.

A memory sees a *stream*: a dict of per-token tensors [B, T, G, ...] that holds `k`, `v`, `g` (log-decay, where there is
a gate) and whatever else the memory computes from the layer's input in `prepare`. A token whose stream is all zero
must leave the state as it is: that is how padding, sinks and tokens still inside a disjoint window stay out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.kernels.gated_linear import gated_linear_attention, gated_linear_step
from linearize.mixers.parts import Fp32Part, HeadShape
from linearize.registry import memories

Stream = dict[str, Tensor]
State = dict[str, Tensor]


@memories.register("additive")
class AdditiveMemory(Fp32Part):
    """`S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T`: linear attention, RetNet, GLA, HGRN2, Mamba-2, mLSTM.

    Args:
        scale: factor on the outputs.
    """

    def __init__(self, shape: HeadShape, feature_dim: int, normalize: bool, *, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.normalize = normalize
        self.state_shape = (shape.groups, feature_dim, shape.head_dim)
        self.state_names = ("state", "norm") if normalize else ("state",)

    def prepare(self, x: Tensor) -> Stream:
        """Return further entries of the stream, computed from the layer's input [..., hidden]."""
        return {}

    def initial_state(self, batch: int, device: torch.device) -> State:
        """Return an empty state in fp32."""
        state = {"state": torch.zeros(batch, *self.state_shape, dtype=torch.float32, device=device)}
        if self.normalize:
            state["norm"] = torch.zeros(batch, *self.state_shape[:2], dtype=torch.float32, device=device)
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

    def step(self, q: Tensor, stream: Stream, state: State) -> tuple[Tensor, Tensor | None]:
        """Run over one token [B, heads, ...]; `state` is updated in place."""
        return gated_linear_step(
            q, stream["k"], stream["v"], stream.get("g"), state["state"], state.get("norm"), scale=self.scale
        )

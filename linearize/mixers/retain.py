"""A memory of whole tokens: of those that left the window, each KV head keeps the M of highest score.

As learned retention scores evict from a KV cache (Locret, arXiv:2410.01805; H2O, arXiv:2306.14048, by attention seen).

Legend: B batch, T tokens, P kept tokens before them (M or 0), N = P + T, H query heads, G KV heads (H = G * R), D head
dim, M slots, C block of queries, L blocks, J keys of a block.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from linearize.kernels.microscaling import as_stored, numbers
from linearize.kernels.window import masked_softmax
from linearize.mixers.parts import Fp32Part, HeadShape, fp32_parameter
from linearize.registry import memories

QUERY_BLOCK = 128
COMPARED = 2**24  # pairs of tokens at a time, 100 MB


@memories.register("retain")
class RetainMemory(Fp32Part):
    """The M tokens of highest score `sigmoid(x_t W + c)` per KV head; a softmax with the teacher's scale reads them.

    A token that leaves the window takes the slot of the lowest score if its own is higher, so of equal scores the
    earlier token stays. The choice has no gradient: a transfer stage teaches W and c what the teacher attends to.

    Args:
        slots: M.
    """

    log_weights = True
    softcap: float | None = None
    scale = 1.0
    microscaled = False

    def __init__(self, shape: HeadShape, feature_dim: int, normalize: bool, *, slots: int = 128) -> None:
        super().__init__()
        if slots < 1:
            raise ValueError(f"`slots` must be at least 1, got {slots}.")
        self.slots = slots
        self.state_shape: tuple[int, ...] = (shape.groups, slots)
        self.head_dim = shape.head_dim
        self.state_names = ("state_keys", "state_values", "state_scores", "state_order")
        self.weight = fp32_parameter(shape.groups, shape.hidden)
        self.bias = fp32_parameter(shape.groups)

    def logits(self, x: Tensor) -> Tensor:
        """Return the scores before their sigmoid, [..., G] in fp64, of the layer's input [..., hidden].

        The same token twice must have one score, to the bit, in prefill and decoding alike: the sum's order, which
        depends on how many tokens are computed at once, then shows in no bit of fp32.
        """
        return F.linear(x.double(), self.weight.double(), self.bias.double())

    def prepare(self, x: Tensor) -> dict[str, Tensor]:
        """Return the tokens' scores, `score` [..., G] in fp32, of the layer's input [..., hidden]."""
        return {"score": self.logits(x).sigmoid().float()}

    def initial_state(self, batch: int, like: Tensor) -> dict[str, Tensor]:
        """Return empty slots: keys and values [B, G, M, D] as windows hold them, scores and order of arrival [B, G, M].

        All are zeros, in the dtype of the keys `like` or as bytes of MXINT8, scores and order in fp32; a slot of score
        0 is empty.
        """
        tokens = as_stored(like.new_zeros(batch, *self.state_shape, self.head_dim), self.microscaled)
        scores = torch.zeros(batch, *self.state_shape, dtype=torch.float32, device=like.device)
        states = tokens, tokens.clone(), scores, scores.clone()
        return dict(zip(self.state_names, states, strict=True))

    def forward(
        self, q: Tensor, stream: dict[str, Tensor], starts: Tensor | None, state: dict[str, Tensor] | None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Run over all tokens.

        Args:
            q: queries [B, T, H, D].
            stream: `k`, `v` [B, T, G, D], `score` [B, T, G]; a token of score 0 is none.
            starts: first visible token of each token [B, T], below 0 where its document began before this call.
            state: where to go on from; None is empty.

        Returns:
            Outputs [B, T, H, D], log-sum-exps of the visible scores [B, T, H] in fp32 (-inf where nothing is visible,
            and the output 0), and the state behind the last token.
        """
        k, v, score = (stream[name].float().movedim(2, 1) for name in ("k", "v", "score"))
        first = torch.full(q.shape[:2], -1, device=q.device) if starts is None else starts
        past = 0
        if state is not None:
            past = self.slots
            order = state["state_order"].argsort(-1)
            held = (_gathered(t, order) for t in _tokens(state))
            k, v = (torch.cat(pair, 2) for pair in zip(held, (k, v), strict=True))
            score = torch.cat([state["state_scores"].gather(-1, order), score], 2)
            first = F.pad(torch.where(first < 0, first, first + past), (past, 0))
        score, first = score.detach(), first.clamp(min=0)
        ends = expiries(score, first, self.slots)
        o, lse = self._read(q, k, v, score, first, ends)
        last = torch.full((1,), k.shape[2] - 1, device=q.device)
        kept = _alive(score, first, ends, last, last + 1)
        place, filled = _places(kept, self.slots)
        place, filled = place[:, :, 0], filled[:, :, 0]
        arrival = torch.arange(1, self.slots + 1, dtype=torch.float32, device=q.device)
        tokens = (as_stored(_gathered(t, place).to(stream["k"].dtype), self.microscaled) for t in (k, v))
        after = (*tokens, score.gather(-1, place), arrival.expand_as(filled))
        return (
            o.to(q.dtype),
            lse,
            {
                name: t * filled.view(*filled.shape, *(1,) * (t.dim() - 3))
                for name, t in zip(self.state_names, after, strict=True)
            },
        )

    def _read(
        self, q: Tensor, k: Tensor, v: Tensor, score: Tensor, first: Tensor, ends: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Blocks of C queries against the at most M + C tokens that one of them sees, so that memory is linear in T."""
        (length, heads), (groups, total) = q.shape[1:3], k.shape[1:3]
        past = total - length
        block = min(length, QUERY_BLOCK)
        blocks = -(-length // block)
        pad = blocks * block - length
        begin = past + block * torch.arange(blocks, device=q.device)
        place, found = _places(
            _alive(score, first, ends, begin, begin + block), min(total, self.slots + block)
        )  # [B, G, L, J]
        query = (begin[:, None] + torch.arange(block, device=q.device)).clamp(max=total - 1)  # [L, C]
        flat = place.flatten(2)
        until = ends.gather(-1, flat).view_as(place)[..., None, :]
        since = first[:, query][:, None, ..., None]  # [B, 1, L, C, 1]
        token, at = place[..., None, :], query[..., None]
        visible = found[..., None, :] & (token <= at) & (token >= since) & (at < until)
        keys, values = (_gathered(t, flat).unflatten(2, place.shape[2:]) for t in (k, v))
        queries = F.pad(q.float() * self.scale, (0, 0, 0, 0, 0, pad)).unflatten(1, (blocks, block))
        queries = queries.movedim(3, 1).unflatten(1, (groups, heads // groups))
        o, lse, _ = masked_softmax(queries, keys[:, :, None], values, visible[:, :, None], self.softcap)

        def join(t: Tensor) -> Tensor:
            """[B, G, R, L, C, ...] -> [B, T, H, ...]"""
            return t.flatten(1, 2).movedim(1, 3).flatten(1, 2)[:, :length]

        return join(o), join(lse)

    def step(self, q: Tensor, stream: dict[str, Tensor], state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Run over one token [B, heads, ...]; `state` is updated in place."""
        keys, values, scores, order = (state[name] for name in self.state_names)
        new = stream["score"].float()[..., None]
        lowest = scores.amin(-1, keepdim=True)
        slot = torch.where(scores == lowest, order, -1.0).argmax(-1, keepdim=True)
        enters = new > lowest
        for held, token in ((keys, stream["k"]), (values, stream["v"])):
            index = slot[..., None].expand(-1, -1, -1, held.shape[-1])
            one = as_stored(token, self.microscaled)[:, :, None]
            held.scatter_(2, index, torch.where(enters[..., None], one, held.gather(2, index)))
        latest = order.amax(-1, keepdim=True) + 1
        order.scatter_(-1, slot, torch.where(enters, latest, order.gather(-1, slot)))
        scores.scatter_(-1, slot, torch.where(enters, new, lowest))
        groups, (keys, values) = keys.shape[1], _tokens(state)
        queries = (q.float() * self.scale).unflatten(1, (groups, q.shape[1] // groups))[..., None, :]
        visible = (scores > 0)[:, :, None, None]
        o, lse, _ = masked_softmax(queries, keys[:, :, None], values, visible, self.softcap)
        return o.flatten(1, 3).to(q.dtype), lse.flatten(1)


@torch.library.custom_op("linearize::expiries", mutates_args=())
def expiries(score: Tensor, first: Tensor, slots: int) -> Tensor:
    """Return from which token on M others stand above each token, so that it is no longer kept.

    An op of its own, since `torch.compile` would unroll its loop: a dozen turns for a row of 8,192 tokens.

    Args:
        score: [B, G, N], 0 for what is no token.
        first: [B, N], first token that each token may see; never falls.
        slots: M.

    Returns:
        [B, G, N], N where a token is kept to the end; at most its own place where it is never kept. Later documents do
        not see a token, whatever its entry.
    """
    length = score.shape[-1]
    place = torch.arange(length, device=score.device)
    ends = []
    for j in place.split(max(1, COMPARED // score.numel())):
        own = score[:, :, j, None]
        above = torch.where(place < j[:, None], score[:, :, None] >= own, score[:, :, None] > own)
        above &= (place >= first[:, j, None])[:, None]
        ends.append((above.cumsum(-1, dtype=torch.int32) < slots).sum(-1))
    return torch.cat(ends, -1).contiguous()


@expiries.register_fake
def _(score: Tensor, first: Tensor, slots: int) -> Tensor:
    return score.new_empty(score.shape, dtype=torch.int64)


def _alive(score: Tensor, first: Tensor, ends: Tensor, begin: Tensor, end: Tensor) -> Tensor:
    """[B, G, L, N]: which tokens some query of the blocks [begin, end) may see."""
    place = torch.arange(score.shape[-1], device=score.device)
    near = (place < end[:, None]) & (place >= first[:, begin][..., None])
    until = ends.where(score > 0, 0)[:, :, None]
    return near[:, None] & (until > torch.maximum(place, begin[:, None]))


def _places(marks: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The places of the first `count` marks along the last axis, in order, and which of them there are."""
    sums = marks.cumsum(-1, dtype=torch.int32)
    rank = torch.arange(1, count + 1, dtype=torch.int32, device=marks.device)
    found = torch.searchsorted(sums, rank.expand(*sums.shape[:-1], -1).contiguous())
    return found.clamp(max=marks.shape[-1] - 1), found < marks.shape[-1]


def _tokens(state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The kept keys and values [B, G, M, D] in fp32."""
    keys, values = (numbers(state[name], torch.float32).float() for name in ("state_keys", "state_values"))
    return keys, values


def _gathered(t: Tensor, index: Tensor) -> Tensor:
    """t [B, G, N, D] at index [B, G, J]."""
    return t.gather(2, index[..., None].expand(-1, -1, -1, t.shape[-1]))

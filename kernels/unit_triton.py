"""Rows scaled to unit length in one launch, and their gradient in another.

Legend: B batch, T tokens, H heads, K dim. `y = x (x x + eps)^-1/2` and `dx = (dy - y (y dy)) (x x + eps)^-1/2`,
computed in fp32 and stored in x's dtype. Eager PyTorch takes some ten passes over the queries for it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from linearize.kernels.launch import Launch, layout, run

ROWS = 16


@triton.jit(do_not_specialize=["M", "T", "H"])
def _unit(
    x, dy, y, M, T, H, eps, x_b, x_t, x_h, d_b, d_t, d_h,
    K: tl.constexpr, BK: tl.constexpr, ROWS: tl.constexpr, GRAD: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    h, t, b = m % H, (m // H) % T, m // H // T
    h, t, b = h.to(tl.int64), t.to(tl.int64), b.to(tl.int64)
    ks = tl.arange(0, BK)
    inside = (m < M)[:, None] & (ks < K)[None, :]
    at = (b * x_b + t * x_t + h * x_h)[:, None] + ks[None, :]
    x_M = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x_M * x_M, 1) + eps)[:, None]
    out = x_M * scale
    if GRAD:
        at = (b * d_b + t * d_t + h * d_h)[:, None] + ks[None, :]
        dy_M = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        out = (dy_M - out * tl.sum(out * dy_M, 1)[:, None]) * scale
    tl.store(y + m.to(tl.int64)[:, None] * K + ks[None, :], out.to(y.dtype.element_ty), mask=inside)


def unit_triton(x: Tensor, eps: float) -> Tensor:
    """Scale x [B, T, H, K] to unit length, through the registered op `linearize::unit`."""
    op = torch.ops.linearize.unit if torch.compiler.is_compiling() else _Eager.apply
    return op(x, eps)


def _launch(x: Tensor, dy: Tensor | None, eps: float) -> Tensor:
    x = x if x.stride(-1) == 1 else x.contiguous()
    if dy is not None and dy.stride(-1) != 1:
        dy = dy.contiguous()
    B, T, H, K = x.shape
    y = x.new_empty(x.shape)
    given = (0, 0, 0) if dy is None else dy.stride()[:3]
    args = (x, dy, y, B * T * H, T, H, eps, *x.stride()[:3], *given)
    constants = {"K": K, "BK": max(16, triton.next_power_of_2(K)), "ROWS": ROWS, "GRAD": dy is not None}
    grid = (-(-B * T * H // ROWS), 1, 1)
    run([Launch(_unit, grid, args, constants, {}, warps=4, stages=1)], ("unit", layout(x, dy), eps))
    return y


def _run_forward(x: Tensor, eps: float) -> Tensor:
    return _launch(x, None, eps)


def _run_backward(dy: Tensor, x: Tensor, eps: float) -> Tensor:
    return _launch(x, dy, eps)


_forward = torch.library.custom_op("linearize::unit", _run_forward, mutates_args=())
_backward = torch.library.custom_op("linearize::unit_grad", _run_backward, mutates_args=())


@_forward.register_fake
def _(x, eps):
    return x.new_empty(x.shape)


@_backward.register_fake
def _(dy, x, eps):
    return x.new_empty(x.shape)


def _save(ctx, inputs, output):
    x, ctx.eps = inputs
    ctx.save_for_backward(x)


def _differentiate(ctx, dy):
    return torch.ops.linearize.unit_grad(dy, *ctx.saved_tensors, ctx.eps), None


_forward.register_autograd(_differentiate, setup_context=_save)


class _Eager(torch.autograd.Function):
    """The same op without the dispatcher, whose cost a launch would show outside `torch.compile`."""

    @staticmethod
    def forward(ctx, x, eps):
        _save(ctx, (x, eps), None)
        return _run_forward(x, eps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        return _run_backward(dy, *ctx.saved_tensors, ctx.eps), None

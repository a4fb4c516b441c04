"""Sums of gates and scores under decays, for the Triton kernels of gated linear attention and of the delta rule.

Legend: C chunk, BK block of key dims; gc_i is the sum of a chunk's gates up to and including token i.

With one gate a token, the [C, C] score is multiplied by exp(gc_i - gc_j). With a gate a key channel the score
is a product of q exp(x) and k exp(-x), x being gc from the middle of the chunk; |x| <= LIMIT there. Chunks that decay
by more than exp(-2 LIMIT) are steep: a second launch of the same kernel serves them and leaves the others. It covers
the pairs inside blocks of 16 tokens (of 1, if those are steep as well) in that way, and the rest by doubling levels:
in a block twice as large, the exponents of rows (later half) and columns (earlier half) are sums of gates up to the
boundary, so at most 0. This is exact for any gate and needs no elementwise [C, C, K] work.

The transpose of an accumulator is never fed to a dot (Triton 3.4 to 3.7.0 miscompile that on Hopper, also through a
transposed layout in shared memory that no `tl.trans` shows): A^T is its own product, and operands that are made from
accumulators are made in the orientation that they are used in. `tests/kernels/test_compiled.py` scans for it.
"""

import triton
import triton.language as tl


@triton.jit
def _cast(x, LIKE: tl.constexpr, HALF: tl.constexpr):
    """x in the dtype that dots run in; fp16 inputs run as fp32 rounded to tf32, so that products cannot overflow."""
    x = x.to(LIKE)
    if HALF:
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return x


@triton.jit
def _block_matrix(i, t, LEVEL: tl.constexpr):
    """M with (M g)_i = gc_i from the middle of the block of 2**LEVEL tokens that holds i."""
    return tl.where((i >> LEVEL) == (t >> LEVEL), tl.where(t <= i, 0.5, -0.5), 0.0)


@triton.jit
def _level_matrix(i, t, level):
    """M with (M g)_i = the sum of gates between i and the middle boundary of its block of 2**(level + 1) tokens."""
    middle = ((i >> (level + 1)) << (level + 1)) + (1 << level)
    later = (i >= middle) & (t >= middle) & (t <= i)
    earlier = (i < middle) & (t > i) & (t < middle)
    return tl.where(later | earlier, 1.0, 0.0)


@triton.jit
def _level_pairs(i, j, level):
    """Pairs (i, j) with i in the later and j in the earlier half of one block of 2**(level + 1) tokens."""
    return ((i >> (level + 1)) == (j >> (level + 1))) & ((i >> level) > (j >> level))


@triton.jit
def _sums(m, gate, GDT: tl.constexpr):
    """Sums of gates [C, BK] over the tokens named by a row of m [C, C]: a product, exact for 16-bit gates.

    GDT is the dtype of the product, or "split": fp32 gates in two halves of bf16, right to about 2**-17.
    """
    if GDT == "split":
        high = gate.to(tl.bfloat16)
        low = (gate - high.to(tl.float32)).to(tl.bfloat16)
        sums = tl.dot(m.to(tl.bfloat16), low, tl.dot(m.to(tl.bfloat16), high))
    else:
        sums = tl.dot(m.to(GDT), gate.to(GDT), input_precision="tf32x3")
    return sums


@triton.jit
def _sums_T(gate_T, m_T, GDT: tl.constexpr):
    """The same for gates [BK, C]: the transpose of an accumulator must not reach a dot, so it is computed anew."""
    if GDT == "split":
        high = gate_T.to(tl.bfloat16)
        low = (gate_T - high.to(tl.float32)).to(tl.bfloat16)
        sums = tl.dot(low, m_T.to(tl.bfloat16), tl.dot(high, m_T.to(tl.bfloat16)))
    else:
        sums = tl.dot(gate_T.to(GDT), m_T.to(GDT), input_precision="tf32x3")
    return sums


@triton.jit
def _from_here(x, i, t, DT: tl.constexpr):
    """Sums of x [C, BK] over t >= i, by a product with ones."""
    ones = tl.where(t >= i, 1.0, 0.0)
    if DT == tl.float32:  # noqa: SIM300
        return tl.dot(ones, x, input_precision="tf32x3")
    high = x.to(DT)
    low = (x - high.to(tl.float32)).to(DT)
    return tl.dot(ones.to(DT), low, tl.dot(ones.to(DT), high))


@triton.jit
def _safe_block(gate, i, t, GDT: tl.constexpr, LIMIT: tl.constexpr):
    """Exponents x [C, BK] inside blocks of 16 tokens if they are safe, else 0 for blocks of 1; log2 of the block."""
    level = tl.full([], 4, tl.int32)
    x = _sums(_block_matrix(i, t, 4), gate, GDT)
    if tl.max(tl.abs(x)) > LIMIT:
        level = tl.full([], 0, tl.int32)
        x = x * 0.0
    return x, level


@triton.jit
def _safe_block_T(gate_T, i_T, t_T, level, GDT: tl.constexpr):
    """The exponents of `_safe_block` as [BK, C], for the level that it found."""
    x = _sums_T(gate_T, _block_matrix(i_T, t_T, 4), GDT)
    return tl.where(level > 0, x, 0.0)


@triton.jit
def _segments(gate, c, DT: tl.constexpr):
    """Sums of gates [C] over j < t <= i as [C (i), C (j)], for i >= j; differences are exact enough for bf16."""
    if DT == tl.bfloat16:  # noqa: SIM300
        gc = tl.cumsum(gate, 0)
        return tl.minimum(gc[:, None] - gc[None, :], 0.0)
    return tl.cumsum(tl.where(c[:, None] > c[None, :], gate[:, None], 0.0), 0)


@triton.jit
def _segments_T(gate, c, DT: tl.constexpr):
    """The transpose of `_segments`."""
    if DT == tl.bfloat16:  # noqa: SIM300
        gc = tl.cumsum(gate, 0)
        return tl.minimum(gc[None, :] - gc[:, None], 0.0)
    return tl.cumsum(tl.where(c[:, None] < c[None, :], gate[None, :], 0.0), 1)

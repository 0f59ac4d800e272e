"""What generated kernels call: bounds of segments, and functions that Triton lacks."""

import triton
import triton.language as tl


@triton.jit
def bounds_of(cu_seqlens, segment, segments, T):
    """First token and end of a segment; the one past the last holds the tokens that none covers."""
    begin = tl.load(cu_seqlens + segment).to(tl.int32)
    end = tl.load(cu_seqlens + segment + 1, mask=segment < segments, other=0).to(tl.int32)
    return begin, tl.where(segment < segments, tl.maximum(end, begin), T)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def expm1(x):
    """e^x - 1; a series near 0, where the difference would be all rounding."""
    near = tl.where(tl.abs(x) < 0.5, x, 0.0)
    series = 1.0 + near / 7 * (1.0 + near / 8)
    series = 1.0 + near / 5 * (1.0 + near / 6 * series)
    series = 1.0 + near / 3 * (1.0 + near / 4 * series)
    return tl.where(tl.abs(x) < 0.5, near * (1.0 + near / 2 * series), tl.exp(x) - 1.0)


@triton.jit
def log1p(x):
    """log(1 + x); a series near 0: 2 artanh(x / (2 + x))."""
    small = tl.abs(x) < 0.25
    s = tl.where(small, x, 0.0)
    s = s / (2.0 + s)
    s2 = s * s
    series = 1.0 + s2 * (1.0 / 3 + s2 * (1.0 / 5 + s2 * (1.0 / 7 + s2 / 9)))
    return tl.where(small, 2.0 * s * series, tl.log(1.0 + x))


@triton.jit
def tanh(x):
    grown = expm1(2.0 * tl.minimum(tl.abs(x), 20.0, propagate_nan=tl.PropagateNan.ALL))
    return tl.where(x < 0, -1.0, 1.0) * (grown / (grown + 2.0))


@triton.jit
def sign(x):
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, x * 0.0))


@triton.jit
def trunc(x):
    return tl.where(x < 0, tl.ceil(x), tl.floor(x))

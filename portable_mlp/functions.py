"""Stable elementary functions that activations and losses share.

``x`` is an array of any shape and real floating dtype, ``xp`` its array API
namespace.  The functions neither overflow nor warn for inputs up to ±1e4.
"""

from __future__ import annotations

from portable_mlp.typing import Array, Namespace


def sigmoid(x: Array, xp: Namespace) -> Array:
    """Return the logistic function σ(x) = 1 / (1 + e⁻ˣ).

    The formula is split by sign without a branch: 1 / (1 + e⁻ˣ) for x ≥ 0, and
    eˣ / (1 + eˣ) for x < 0.  Every exponent is therefore at most zero.
    """
    # One expression for both signs: the numerator is 1 for x ≥ 0 and eˣ for x < 0
    return xp.exp(xp.minimum(x, 0.0)) / (1.0 + xp.exp(-xp.abs(x)))


def softplus(x: Array, xp: Namespace) -> Array:
    """Return log(1 + eˣ), computed as max(x, 0) + log(1 + e^(−|x|))."""
    return xp.maximum(x, 0.0) + xp.log1p(xp.exp(-xp.abs(x)))


def log_softmax(x: Array, xp: Namespace) -> Array:
    """Return log softmax(x) over the last axis: (x − max x) − log Σ exp(x − max x)."""
    x = x - xp.max(x, axis=-1, keepdims=True)
    return x - xp.log(xp.sum(xp.exp(x), axis=-1, keepdims=True))


def softmax(x: Array, xp: Namespace) -> Array:
    """Return softmax(x) over the last axis: exp(x − max x) / Σ exp(x − max x)."""
    e = xp.exp(x - xp.max(x, axis=-1, keepdims=True))
    e /= xp.sum(e, axis=-1, keepdims=True)
    return e


def sum_rows(x: Array, xp: Namespace) -> Array:
    """Return the sum over the rows, (..., n, d) -> (..., d), computed as the product 1ᵀ x.

    On NumPy the product is several times as fast as a sum over the axis.
    """
    column = x[(0,) * (x.ndim - 2) + (slice(None), 0)]  # (n,), of x's dtype and device
    return xp.matmul(xp.ones_like(column), x)


def transposed(x: Array) -> Array:
    """Return the transpose of a matrix, or of each matrix in a stack."""
    return x.T if x.ndim == 2 else x.mT  # sparse matrices lack ``mT``


def total_weight(weights: Array, xp: Namespace) -> Array:
    """Return the sum of the weights, (..., n) -> (...), or 1 where it is zero.

    The 1 makes a division by the result safe.
    """
    total = xp.sum(weights, axis=-1)
    return xp.where(total > 0.0, total, 1.0)


def log_mean_exp(x: Array, xp: Namespace) -> Array:
    """Return the log of the mean of eˣ over the first axis, (k, ...) -> (...).

    The maximum is subtracted first, so nothing overflows.
    """
    top = xp.max(x, axis=0)  # (...)
    return top + xp.log(xp.sum(xp.exp(x - top), axis=0) / x.shape[0])


def columns_first(x: Array, xp: Namespace) -> Array:
    """Return the transpose, (n, k) -> (k, n), contiguous in row-major order."""
    # A transpose alone may be a view; going through one axis makes the copy
    return xp.reshape(xp.reshape(x.T, (-1,)), (x.shape[1], x.shape[0]))


# sin(2π a) / a as polynomials in a², from the lowest power, for |a| ≤ ¼: minimax in the relative
# error, by the algorithm of Remez.  The errors are 5·10⁻⁹ and 3·10⁻¹⁹
_SINE = {
    32: (
        6.283185273770823, -41.341677478395813, 81.602231242559875, -76.574992171787987,
        39.710918036888178,
    ),
    64: (
        6.2831853071795864753, -41.341702240399756229, 81.605249276073406093,
        -76.705859752798497458, 42.058693923785235852, -15.09464162050996145,
        3.8199270504789338467, -0.71772358015544981943, 0.10085633077354055854,
    ),
}  # fmt: skip


def cosine_of_turns(t: Array, xp: Namespace) -> Array:
    """Return cos(2π t), from pure arithmetic.

    Libraries differ in their cosines, and a compiler cannot make a loop of them.  Whole turns
    are subtracted, which is exact; the rest is folded into the quarter turn around a zero.  The
    error is at most 2·10⁻⁷ in float32, and 4·10⁻¹⁶ in float64.

    Parameters
    ----------
    t : array
        Angles in turns.
    """
    a = 0.25 - xp.abs(t - xp.round(t))
    square = a * a
    *rest, last = _SINE[xp.finfo(t.dtype).bits]
    value = square * last + rest[-1]
    for coefficient in rest[-2::-1]:  # Horner's rule
        value *= square
        value += coefficient
    value *= a
    return value


def sine_of_turns(t: Array, xp: Namespace) -> Array:
    """Return sin(2π t), as the cosine a quarter of a turn before; see `cosine_of_turns`.

    The rounding of t − ¼ adds to the error, which is up to 8·10⁻⁷ in float32 and 2·10⁻¹⁵ in
    float64 within three turns.
    """
    return cosine_of_turns(t - 0.25, xp)

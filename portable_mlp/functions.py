"""Stable elementary functions that activations and losses share.

``x`` is an array of any shape and real floating dtype, ``xp`` its array API
namespace.  None of them overflows, warns or loses its sign at ±1e4.
"""

from __future__ import annotations

from portable_mlp.typing import Array, Namespace


def sigmoid(x: Array, xp: Namespace) -> Array:
    """Logistic function σ(x) = 1 / (1 + e⁻ˣ).

    Split by sign without a branch: for x ≥ 0 it is 1 / (1 + e⁻ˣ), for x < 0 it
    is eˣ / (1 + eˣ), so every exponent is at most zero.
    """
    return xp.exp(xp.minimum(x, 0.0)) / (1.0 + xp.exp(-xp.abs(x)))


def softplus(x: Array, xp: Namespace) -> Array:
    """log(1 + eˣ) = max(x, 0) + log(1 + e^(−|x|))."""
    return xp.maximum(x, 0.0) + xp.log1p(xp.exp(-xp.abs(x)))


def log_softmax(x: Array, xp: Namespace) -> Array:
    """Log softmax(x) over the last axis: (x − max x) − log Σ exp(x − max x)."""
    x = x - xp.max(x, axis=-1, keepdims=True)
    return x - xp.log(xp.sum(xp.exp(x), axis=-1, keepdims=True))


def softmax(x: Array, xp: Namespace) -> Array:
    """softmax(x) over the last axis: exp(x − max x) / Σ exp(x − max x)."""
    e = xp.exp(x - xp.max(x, axis=-1, keepdims=True))
    e /= xp.sum(e, axis=-1, keepdims=True)
    return e


def sum_rows(x: Array, xp: Namespace) -> Array:
    """Σₙ x, (..., n, d) -> (..., d), as a product: several times a sum's speed on NumPy."""
    column = x[(0,) * (x.ndim - 2) + (slice(None), 0)]
    return xp.matmul(xp.ones_like(column), x)


def transposed(x: Array) -> Array:
    """Return the transpose of a matrix, or of each of a stack."""
    return x.T if x.ndim == 2 else x.mT  # sparse matrices have the former only


def total_weight(weights: Array, xp: Namespace) -> Array:
    """Σₙ w, (..., n) -> (...); 1 if all weigh nothing."""
    total = xp.sum(weights, axis=-1)
    return xp.where(total > 0.0, total, 1.0)


def log_mean_exp(x: Array, xp: Namespace) -> Array:
    """Log of the mean of eˣ over the first axis, (k, ...) -> (...), without overflow."""
    top = xp.max(x, axis=0)
    return top + xp.log(xp.sum(xp.exp(x - top), axis=0) / x.shape[0])


def columns_first(x: Array, xp: Namespace) -> Array:
    """Return the transpose, (n, k) -> (k, n), laid out in memory row by row."""
    return xp.reshape(xp.reshape(x.T, (-1,)), (x.shape[1], x.shape[0]))

"""Prediction intervals and sets from held-out rows, by CV+.

Each group of members holds out some training rows.  How wrong the group is there tells how far
its predictions of new rows may be off.  If training and new rows are exchangeable, folds are of
equal size, and each group is fitted without its fold, the target is in the interval or set with
a probability of at least 1 − 2α − √(2 / n) for a nominal coverage of 1 − α, whatever the
distribution (Barber et al., 2021, on CV+; Romano et al., 2020, on its counterpart for labels).

Here the encoding of the columns, the epoch and the temperature are chosen with all rows, so the
guarantee holds approximately only; with groups or folds in time it does not hold.  The coverage
that was measured is the nominal one or more.  It is more where there is little noise: the errors
are those of a fold's members alone, and all members together are better.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, inf
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_ROUNDING = 1e-9  # 0.55 · 100 is above 55 in float64
_HALVINGS = 80  # after which the limits of a bisection are equal in float64


def upper_limits(centres: Floats, residuals: Sequence[Floats], coverage: float) -> Floats:
    """Return for each row the k-th smallest of the sums of a centre and a residual of its group.

    With n residuals, k = ⌈coverage · (n + 1)⌉; the limit is infinite if k > n.

    Parameters
    ----------
    centres : ndarray (groups, rows)
        Each group's predictions.
    residuals : sequence of ndarray
        Each group's residuals on the rows that it holds out, sorted.
    coverage : float in (0, 1)

    Returns
    -------
    ndarray (rows,)
    """
    k = ceil(coverage * (sum(map(len, residuals)) + 1) - _ROUNDING)
    if k > sum(map(len, residuals)):
        return np.full(centres.shape[1], inf)
    all_of_them = np.concatenate([*residuals])
    low = centres.min(axis=0) + all_of_them.min()
    high: Floats = centres.max(axis=0) + all_of_them.max()
    for _ in range(_HALVINGS):
        middle = low + 0.5 * (high - low)
        enough = _count(middle - centres, residuals, "right") >= k
        high, low = np.where(enough, middle, high), np.where(enough, low, middle)
    return high


def interval(centres: Floats, residuals: Sequence[Floats], coverage: float) -> Floats:
    """Return the limits (rows, 2) of CV+ (Barber et al., 2021); see `upper_limits`.

    The residuals are absolute errors.
    """
    above = upper_limits(centres, residuals, coverage)
    below = -upper_limits(-centres, residuals, coverage)
    return np.column_stack([below, above])


def adaptive_scores(p: Floats, u: Any) -> Floats:
    """Return the sum of the probabilities of all more probable classes, plus u times the class's.

    A class belongs to a set before those with larger scores (Romano et al., 2020).

    Parameters
    ----------
    p : ndarray (..., classes)
        Probabilities.
    u : ndarray (...,)
        Uniform random numbers, which make the coverage exact rather than conservative.

    Returns
    -------
    ndarray (..., classes)
    """
    order = np.argsort(-p, axis=-1, kind="stable")
    falling = np.take_along_axis(p, order, axis=-1)
    before = np.cumsum(falling, axis=-1) - falling
    scores = np.empty_like(p)
    np.put_along_axis(scores, order, before + np.asarray(u)[..., None] * falling, axis=-1)
    return scores


def label_sets(scores: Floats, calibration: Sequence[Floats], coverage: float) -> NDArray[np.bool_]:
    """Return which classes belong to the set of each row, by CV+ (Romano et al., 2020).

    Parameters
    ----------
    scores : ndarray (groups, rows, classes)
        `adaptive_scores` of each group's probabilities.
    calibration : sequence of ndarray
        Scores of the true classes of the rows that each group holds out, sorted.
    coverage : float in (0, 1)

    Returns
    -------
    ndarray (rows, classes) of bool
    """
    below = _count(scores, calibration, "left")
    return below < coverage * (sum(map(len, calibration)) + 1) - _ROUNDING


def _count(at: Floats, known: Sequence[Floats], side: Any) -> NDArray[np.intp]:
    """Return how many sorted values of all groups are below ``at``; for "right", at most that."""
    each = [np.searchsorted(own, some, side) for own, some in zip(known, at, strict=True)]
    count: NDArray[np.intp] = np.sum(each, axis=0)
    return count

"""Columns that are of no use, found with the held-out rows in the middle of a fit.

A network follows noise in a column that has nothing to do with the target, and errs the more.
After the second wave of the learning rate, a fifth of the fit (the third in a table of few rows),
each column is shuffled among the held-out rows (permutation importance; Breiman, 2001).  If that
does not make their losses larger, by a test, the fit begins anew without the column.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil, inf, sqrt

import numpy as np
from numpy.typing import NDArray

from portable_mlp.callbacks import Callback, Epoch
from portable_mlp.typing import Array

Floats = NDArray[np.float64]

MANY_ROWS = 2000
"""Rows from which on a weak column is told from one of no use."""

LEARNED = 5.0
"""What t has to be, of all columns together, for a judgement on single ones."""

Losses = Callable[
    [list[Array], Sequence[int], NDArray[np.intp], np.random.RandomState], tuple[Floats, Floats]
]
"""From the parameters, numbers of columns to shuffle, places of held-out rows, and a random
generator, to the rows' losses and weights."""

_MOST_LOOKS = 48  # at these rows, that judging single columns may take
_SHUFFLES = 2
_MOST_ROWS = 4096  # of the held-out rows that are looked at


class Selection(Callback):
    """A stop after an epoch, if there are columns of no use.

    Parameters
    ----------
    at : int
        The epoch.
    n_columns : int
        Number of columns of the table.
    n_folds, n_rows : int
        Number of folds, and of held-out rows of each.
    relevance : float
        Smallest t statistic of the rise of the loss, of a column that is used.  In a table of few
        rows it is smaller: there a weak column is not told from one of no use.
    losses : Losses
    rng : RandomState

    Attributes
    ----------
    useless : list of int
        The columns of no use.
    """

    def __init__(
        self,
        at: int,
        n_columns: int,
        n_folds: int,
        n_rows: int,
        relevance: float,
        losses: Losses,
        rng: np.random.RandomState,
    ) -> None:
        self._at = at
        self._columns = range(n_columns)
        self._n_rows, self._n_used = n_rows, min(n_rows, ceil(_MOST_ROWS / n_folds))
        self._relevance = relevance
        self._losses = losses
        self._seed = rng.randint(2**31 - 1)
        self.useless: list[int] = []

    def on_epoch_end(self, epoch: Epoch, params: Callable[[], list[Array]]) -> bool:
        if epoch.epoch != self._at:
            return False
        self.useless = self._found(params())
        return bool(self.useless)

    def _found(self, params: list[Array]) -> list[int]:
        rng = np.random.RandomState(self._seed)
        looks = len(self._columns) + 1  # with each column shuffled once
        seeds = rng.randint(2**31 - 1, size=max(1, min(_SHUFFLES, _MOST_LOOKS // looks)))
        n = ceil(self._n_used * min(1.0, _MOST_LOOKS / (looks * len(seeds))))
        places = np.sort(rng.permutation(self._n_rows)[:n])
        before, weights = self._losses(params, (), places, rng)
        least = self._relevance * min(1.0, sqrt(np.count_nonzero(weights) / MANY_ROWS))

        def rise(columns: Sequence[int]) -> float:
            """Return the t statistic of the rise of the losses if columns are shuffled."""
            after = [
                self._losses(params, columns, places, np.random.RandomState(seed))[0]
                for seed in seeds
            ]
            return t_statistic(np.mean(after, axis=0) - before, weights)

        if rise(self._columns) < LEARNED:
            return []
        return least_useful(self._columns, rise, least)


def t_statistic(x: Floats, weights: Floats) -> float:
    """Return the weighted mean by its standard error; 0 if all values are 0."""
    share = weights / weights.sum()
    mean = float(share @ x)
    error = sqrt(float(share**2 @ (x - mean) ** 2))
    return mean / error if error > 0.0 else inf * mean if mean else 0.0


def least_useful(
    columns: Sequence[int], rise: Callable[[Sequence[int]], float], least: float
) -> list[int]:
    """Return the columns that can be left out together.

    Of two columns that say the same, each alone is of no use.  So the candidates are judged
    together, and as long as they matter, the most useful one of them stays.

    Parameters
    ----------
    columns : sequence of int
    rise : callable
        From columns to a statistic of the rise of the loss without them.
    least : float
        Smallest statistic of what matters.
    """
    alone = {column: rise([column]) for column in columns}
    found = sorted((c for c in columns if alone[c] < least), key=alone.__getitem__)
    while found and rise(found) >= least:
        found.pop()
    return sorted(found)

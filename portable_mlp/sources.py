"""Sources: where the training loop takes its rows from.

The loop asks for all rows once an epoch and never indexes X itself, so a source may
hold them in any form.  It hands out *parts*: arrays on the backend, and which of
their rows in which order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from portable_mlp.backends import Backend
from portable_mlp.steps import Batch

Part = tuple[Batch, NDArray[np.intp] | None]


class Source(ABC):
    """Base of all sources.

    Attributes
    ----------
    n_rows : int
    """

    n_rows: int

    @abstractmethod
    def parts(self, batch_size: int, order: NDArray[np.intp] | None = None) -> Iterator[Part]:
        """All rows once.

        Parameters
        ----------
        batch_size : int
            Every part but the last has a multiple of so many rows.
        order : array of int, optional
            A permutation; the rows' own order if not given.

        Yields
        ------
        data : Batch
        rows : array of int, optional
            Rows of ``data`` in the order asked for, on the host; None: all, as they
            stand.
        """

    def whole(self, batch_size: int) -> Batch | None:
        """The one batch that every epoch repeats, on the backend; None if they differ."""
        return None


class ArraySource(Source):
    """Rows of arrays in memory, as one part.

    Parameters
    ----------
    data : Batch
        On the backend.
    rows : array of int, optional
        The rows to use, on the host; all if not given.
    """

    def __init__(self, data: Batch, rows: NDArray[np.intp] | None = None) -> None:
        self._data = data
        self._rows = rows
        self.n_rows = data.x.shape[0] if rows is None else len(rows)

    def parts(self, batch_size: int, order: NDArray[np.intp] | None = None) -> Iterator[Part]:
        if self._rows is not None:
            order = self._rows if order is None else self._rows[order]
        elif self.whole(batch_size) is not None:
            order = None
        yield self._data, order

    def whole(self, batch_size: int) -> Batch | None:
        # A mean over all rows does not depend on their order
        return self._data if self._rows is None and batch_size >= self.n_rows else None


class SparseSource(Source):
    """Rows of a sparse matrix, made dense and moved to the backend a batch at a time.

    Parameters
    ----------
    x : scipy.sparse matrix or array, CSR
    y : ndarray (n,) or (n, k)
    weights : ndarray (n,), optional
    backend : Backend
    dtype : {"float32", "float64"}
        Integer labels stay integers.
    rows : array of int, optional
        The rows to use; all if not given.
    """

    def __init__(
        self,
        x: Any,
        y: NDArray[Any],
        weights: NDArray[Any] | None,
        backend: Backend,
        dtype: str,
        rows: NDArray[np.intp] | None = None,
    ) -> None:
        self._host = x, y, weights
        self._backend = backend
        self._dtype = dtype
        self._rows = np.arange(x.shape[0]) if rows is None else rows
        self.n_rows = len(self._rows)

    def parts(self, batch_size: int, order: NDArray[np.intp] | None = None) -> Iterator[Part]:
        rows = self._rows if order is None else self._rows[order]
        x, y, weights = self._host
        for start in range(0, self.n_rows, batch_size):
            chosen = rows[start : start + batch_size]
            yield (
                on_backend(
                    x[chosen].toarray(),
                    y[chosen],
                    None if weights is None else weights[chosen],
                    self._backend,
                    self._dtype,
                ),
                None,
            )


def on_backend(x: Any, y: NDArray[Any], weights: Any, backend: Backend, dtype: str) -> Batch:
    """A batch on a backend, in its data type; integer labels as int32."""
    labels = "int32" if y.dtype.kind == "i" else dtype
    return Batch(
        backend.asarray(x, dtype),
        backend.asarray(y, labels),
        None if weights is None else backend.asarray(weights, dtype),
    )

"""Sources: where the training loop takes its rows from, and in which order.

The loop asks for all rows once an epoch and never indexes X itself.  A source may therefore
hold the rows in any form, and read them only when they are needed.  It yields *parts*: arrays,
together with the rows to use and their order.

To train on rows from elsewhere (a reader, a database), subclass `Source` and pass an instance
to ``fit`` in place of X.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import NDArray

from portable_mlp.backends import Backend, to_host
from portable_mlp.steps import Batch

Part = tuple[Batch, NDArray[np.intp] | None]


class Source(ABC):
    """Base class of all sources.

    Attributes
    ----------
    n_rows : int
        Number of rows in an epoch.
    """

    n_rows: int

    def begin(  # noqa: B027 (there need be no choice)
        self, epoch: int, rng: np.random.RandomState | None
    ) -> None:
        """Choose the order of an epoch, which the following calls of ``parts`` use.

        A source is read many times.  An estimator calls this method once or twice before
        training, to see the first rows and the classes.  When training resumes, it is called
        again for each completed epoch, without reading the parts.  The order must therefore
        depend only on the arguments and on the epochs before.

        Parameters
        ----------
        epoch : int
            Number of the epoch, counted from 0 in each run.
        rng : RandomState or None
            The run's random generator; None in a run with ``shuffle=False``.  Before training
            it is a different generator.
        """

    @abstractmethod
    def parts(self, batch_size: int) -> Iterator[Part]:
        """Yield each row of an epoch once, in parts.

        Parameters
        ----------
        batch_size : int
            The number of rows of every part but the last must be a multiple of it.

        Yields
        ------
        data : Batch
            For `Trainer.fit`, arrays on the backend.  For an estimator, a tuple (x, y) or
            (x, y, weights) of anything its ``fit`` takes; parts without rows are skipped.
        rows : array of int, optional
            Row numbers of ``data``, from 0, in the order to train on; on the host.  None
            stands for all rows in their own order.  Rows of ``data`` that are not listed are
            still checked, and their labels count among the classes.  For `Trainer.fit` they
            may be (members, rows): each member of an ensemble then has rows of its own.
        """

    def whole(self, batch_size: int) -> Batch | None:
        """Return the batch of all rows, on the backend, if every epoch is this one batch.

        Otherwise return None.
        """
        return None

    def targets(self, batch_size: int) -> NDArray[Any]:
        """Return all targets, in any order, as a host array (n,) or (n, k).

        A classifier calls this once to learn the classes.  By default the targets are
        collected in one pass over the parts for this batch size.
        """
        self.begin(0, np.random.RandomState(0))
        parts = (checked_part(part, type(self).__name__)[0] for part in self.parts(batch_size))
        return np.concatenate([np.asarray(to_host(data.y)) for data in parts])


class _Shuffled(Source):
    """A source with random access to its rows; their order is drawn for each epoch.

    Parameters
    ----------
    n : int
        Number of all rows.
    rows : array of int, optional
        Numbers of the rows to use, on the host; all if not given.
    """

    def __init__(self, n: int, rows: NDArray[np.intp] | None) -> None:
        self._rows = rows
        self._order: NDArray[np.intp] | None = None
        self.n_rows = n if rows is None else len(rows)

    def begin(self, epoch: int, rng: np.random.RandomState | None) -> None:
        if rng is None:
            self._order = None
            return
        if epoch == 0 or self._order is None:
            self._order = np.arange(self.n_rows)
        # Each epoch shuffles the order of the previous one, as in scikit-learn
        rng.shuffle(self._order)

    @property
    def chosen(self) -> NDArray[np.intp] | None:
        """The row numbers to use, in this epoch's order; None for all rows in their own order."""
        if self._rows is None or self._order is None:
            return self._order if self._rows is None else self._rows
        return self._rows[self._order]


class ArraySource(_Shuffled):
    """Rows of arrays in memory, as one part.

    Parameters
    ----------
    data : Batch
        Arrays on the backend.
    rows : array of int, optional
        Numbers of the rows to use, on the host; all if not given.
    """

    def __init__(self, data: Batch, rows: NDArray[np.intp] | None = None) -> None:
        super().__init__(data.x.shape[0], rows)
        self._data = data

    def parts(self, batch_size: int) -> Iterator[Part]:
        yield self._data, None if self.whole(batch_size) is not None else self.chosen

    def whole(self, batch_size: int) -> Batch | None:
        # The mean over all rows does not depend on their order, so no gather is needed
        return self._data if self._rows is None and batch_size >= self.n_rows else None


class MemberSource(Source):
    """Rows of arrays in memory, in an order of its own for each member of an ensemble.

    Every epoch has the same number of rows for each member.  A member with fewer rows sees some
    of them again, in a new order; one with more rows sees the others in later epochs, if rows
    are shuffled.  The array of row numbers is overwritten when the next epoch begins.

    Parameters
    ----------
    data : Batch
        Arrays on the backend.
    rows : sequence of arrays of int
        For each member, the numbers of its rows, on the host.
    n_rows : int
        Number of rows in an epoch, for each member.
    """

    def __init__(self, data: Batch, rows: Sequence[NDArray[np.intp]], n_rows: int) -> None:
        self._data = data
        self._rows = rows
        self.n_rows = n_rows
        self._order = np.empty((len(rows), n_rows), np.intp)

    def begin(self, epoch: int, rng: np.random.RandomState | None) -> None:
        for own, order in zip(self._rows, self._order, strict=True):
            for start in range(0, self.n_rows, len(own)):
                some = own if rng is None else rng.permutation(own)
                order[start : start + len(own)] = some[: self.n_rows - start]

    def parts(self, batch_size: int) -> Iterator[Part]:
        yield self._data, self._order


class SparseSource(_Shuffled):
    """Rows of a sparse matrix, made dense and moved to the backend one batch at a time.

    Parameters
    ----------
    x : scipy.sparse matrix or array (n, d), CSR
    y : ndarray (n,) or (n, k)
    weights : ndarray (n,), optional
    backend : Backend
    dtype : {"float32", "float64"}
        Type of x, weights and targets; integer labels become int32.
    rows : array of int, optional
        Numbers of the rows to use; all if not given.
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
        super().__init__(x.shape[0], rows)
        self._host = x, y, weights
        self._backend = backend
        self._dtype = dtype

    def parts(self, batch_size: int) -> Iterator[Part]:
        rows = np.arange(self.n_rows) if self.chosen is None else self.chosen
        x, y, weights = self._host
        for start in range(0, self.n_rows, batch_size):
            some = rows[start : start + batch_size]
            yield (
                on_backend(
                    x[some].toarray(),
                    y[some],
                    None if weights is None else weights[some],
                    self._backend,
                    self._dtype,
                ),
                None,
            )


class CheckedSource(Source):
    """A source whose parts are checked and prepared for the training loop.

    Parameters
    ----------
    source : Source
    prepare : callable
        Function from a part's data to arrays on the backend; it raises a ValueError for
        invalid data.

    Raises
    ------
    ValueError
        From the constructor, if the source's ``n_rows`` is invalid.  From ``parts``, if the
        number of rows is not ``n_rows``, a part is malformed, or lengths or shapes are wrong.
    """

    def __init__(self, source: Source, prepare: Callable[[Batch], Batch]) -> None:
        self._source = source
        self._prepare = prepare
        self.n_rows = row_count(source)

    def begin(self, epoch: int, rng: np.random.RandomState | None) -> None:
        self._source.begin(epoch, rng)

    def parts(self, batch_size: int) -> Iterator[Part]:
        seen, name = 0, type(self._source).__name__
        first: tuple[Any, ...] = ()
        for part in self._source.parts(batch_size):
            data, rows = checked_part(part, name)
            n = _length(data.x) if rows is None else len(rows)
            if not n:
                continue
            if seen % batch_size:
                raise ValueError(
                    f"{name}: a part that is not the last ends after {seen} rows, which are no"
                    f" multiple of the batch size {batch_size}"
                )
            seen += n
            if seen > self.n_rows:
                break
            batch = self._prepare(data)
            form = tuple(None if a is None else a.shape[1:] for a in batch)
            if form != (first := first or form):
                raise ValueError(
                    f"{name}: a part of x, y and weights of shapes (n, *{form}) after {first}"
                )
            yield batch, rows
        if seen != self.n_rows:
            more = "" if seen else ": parts() has to begin anew each time that it is called"
            raise ValueError(
                f"{name}: says n_rows={self.n_rows}, and gave {seen} in an epoch{more}"
            )


def row_count(source: Source) -> int:
    """Return the number of rows that a source declares.

    Raises
    ------
    ValueError
        If it is not an integer above 0.
    """
    n = getattr(source, "n_rows", None)
    if isinstance(n, bool) or not isinstance(n, Integral) or n < 1:
        raise ValueError(f"{type(source).__name__}.n_rows: expected an integer above 0, got {n!r}")
    return int(n)


def checked_part(part: Any, name: str) -> tuple[Batch, NDArray[np.intp] | None]:
    """Check a part from a custom source; return it as a `Batch` and row numbers.

    Raises
    ------
    ValueError
        If the part is malformed or a row number is out of range; the message begins with
        ``name``.
    """
    form = f"{name}: parts() has to yield pairs, ((x, y) or (x, y, weights), rows or None)"
    if not (isinstance(part, tuple | list) and len(part) == 2):
        raise ValueError(f"{form}, got {type(part).__name__}")
    data, rows = part
    if not (isinstance(data, tuple | list) and len(data) in (2, 3)):
        raise ValueError(f"{form}, got ({type(data).__name__}, {type(rows).__name__})")
    batch = Batch(*data)
    if rows is None:
        return batch, None
    rows, n = np.asarray(to_host(rows)), _length(batch.x)
    inside = rows.ndim == 1 and (not rows.size or (rows.dtype.kind in "iu" and rows.min() >= 0))
    # Engines gather rows without bounds checks, so a number out of range must not reach them
    if not inside or (rows.size and rows.max() >= n):
        raise ValueError(
            f"{name}: the rows of a part have to be numbers from 0 to {n - 1}, got {rows!r}"
        )
    return batch, rows.astype(np.intp, copy=False)


def _length(x: Any) -> int:
    return int(x.shape[0]) if hasattr(x, "shape") else len(x)


def on_backend(x: Any, y: NDArray[Any], weights: Any, backend: Backend, dtype: str) -> Batch:
    """Return a batch on a backend in the given dtype, with integer labels as int32."""
    labels = "int32" if y.dtype.kind == "i" else dtype
    return Batch(
        backend.asarray(x, dtype),
        backend.asarray(y, labels),
        None if weights is None else backend.asarray(weights, dtype),
    )

"""From a table's columns to the network's numbers, on the host.

Each column of numbers appears twice: scaled robustly, and as its rank among the training rows,
mapped to a normal distribution.  Text becomes one column for each frequent value.  Dates become
numbers first.  Missing numbers take the median, and a mark.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import narwhals as nw
import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri
from sklearn.utils.validation import validate_data

from portable_mlp.backends import to_host

Floats = NDArray[np.float64]

MOST_LEVELS = 64
"""Values of a column of text that get a column each; rarer ones are like unknown ones."""

_MOST_RANKED = 32
_MOST_EMBEDDED = 64  # embeddings of more columns would take most of the time

_PERIODS = {"year": 365.2425, "week": 7.0, "day": 1.0}  # in days
_FEWEST_QUANTILES, _MOST_QUANTILES, _ROWS_PER_QUANTILE = 10, 1000, 30
_EDGE = 1e-3  # ranks are clipped this far from 0 and 1
_RANK_SCALE = 0.67  # quartiles of a standard normal: ranks have the spread of scaled values
_CLIP = 3.0


@dataclass
class Column:
    """One column of a table as numbers, or as texts.

    Attributes
    ----------
    name : str or int
        Name in a data frame, position in an array.
    numbers : ndarray (n,), optional
        NaN where missing.
    texts : ndarray (n,) of str or None, optional
    is_date : bool
        Whether the numbers are days since 1970.
    """

    name: Any
    numbers: Floats | None = None
    texts: NDArray[Any] | None = None
    is_date: bool = False


def read_columns(estimator: Any, X: Any, reset: bool) -> list[Column]:
    """Return the columns of X, checked against those of the fit unless ``reset``.

    Parameters
    ----------
    estimator : estimator
        Its ``n_features_in_`` and ``feature_names_in_`` are set or checked.
    X : data frame that narwhals knows (pandas, polars, ...), or array-like (n, d)
        Columns of a frame are found by name, in any order.
    reset : bool
        Whether this is a fit.

    Raises
    ------
    ValueError
        If a column is missing, holds infinity or values of a kind that is not supported, or
        names are not unique.
    """
    given = map(str, getattr(X, "columns", ()))
    if twice := [name for name, n in Counter(given).items() if n > 1]:
        raise ValueError(f"X: column names have to be unique, got {twice} more than once")
    frame = nw.from_native(X, eager_only=True, pass_through=True)
    if not isinstance(frame, nw.DataFrame):
        return _of_array(estimator, X, reset)
    names = list(map(str, frame.columns))
    if reset:
        validate_data(estimator, X, skip_check_array=True)
        if not len(frame) or not names:
            raise ValueError(f"X: found a table of shape {frame.shape}, nothing to learn from")
        estimator._names = names
    elif estimator._names is None:  # fitted on an array
        validate_data(estimator, X, reset=False, skip_check_array=True)
    elif missing := [name for name in estimator._names if name not in names]:
        raise ValueError(
            f"X lacks columns that the model was fitted on: {', '.join(missing)};"
            " the feature names should match those that were passed during fit"
        )
    wanted = names if estimator._names is None else estimator._names
    return [_of_series(name, frame.get_column(frame.columns[names.index(name)])) for name in wanted]


def _of_series(name: str, series: Any) -> Column:
    dtype = series.dtype
    if dtype.is_numeric() or dtype == nw.Boolean:
        # Through float64 of the frame's own library, which turns its missing values into NaN
        numbers = series.cast(nw.Float64).to_numpy().astype(np.float64)
        return Column(name, numbers=_finite(name, numbers))
    if dtype in (nw.Date, nw.Datetime):
        if getattr(dtype, "time_zone", None) is not None:
            series = series.dt.convert_time_zone("UTC").dt.replace_time_zone(None)
        days = series.cast(nw.Datetime("us")).to_numpy().astype("datetime64[us]")
        return Column(name, numbers=_days(days), is_date=True)
    if dtype == nw.Duration:
        span = series.to_numpy().astype("timedelta64[us]")
        seconds = np.where(np.isnat(span), np.nan, span / np.timedelta64(1, "s"))
        return Column(name, numbers=seconds)
    if dtype in (nw.String, nw.Categorical, nw.Enum):
        return Column(name, texts=_texts(series.to_list()))
    if dtype == nw.Object:
        return _of_objects(name, series.to_list())
    raise ValueError(
        f"column {name!r} holds {dtype}: only numbers, text, booleans and dates can be used;"
        " remove or convert it"
    )


def _of_array(estimator: Any, X: Any, reset: bool) -> list[Column]:
    if reset:
        estimator._names = None
    X = to_host(X) if hasattr(X, "__array_namespace__") or hasattr(X, "device") else X
    X = validate_data(
        estimator, X, dtype=None, ensure_all_finite=False, reset=reset, ensure_min_samples=1
    )
    if X.dtype.kind in "OUS":
        return [_of_objects(i, X[:, i].tolist()) for i in range(X.shape[1])]
    if X.dtype.kind not in "biuf":
        raise ValueError(f"X: numbers or text are expected, got dtype {X.dtype}")
    X = X.astype(np.float64, copy=False)
    return [Column(i, numbers=_finite(i, X[:, i])) for i in range(X.shape[1])]


def _of_objects(name: Any, values: list[Any]) -> Column:
    """Return the column of Python objects: of numbers if all are, else of text."""
    known = [v for v in values if not _is_missing(v)]
    if all(isinstance(v, int | float | np.number | np.bool_) for v in known):
        numbers = [np.nan if _is_missing(v) else float(v) for v in values]
        return Column(name, numbers=_finite(name, np.array(numbers, np.float64)))
    for v in known:
        if isinstance(v, list | tuple | dict | set | np.ndarray | complex):
            raise TypeError(
                f"column {name!r}: argument must be a string or a number, not {type(v).__name__}"
            )
    return Column(name, texts=_texts(values))


def _is_missing(v: Any) -> bool:
    # pandas.NA is equal to nothing, and has no truth value
    return v is None or type(v).__name__ in ("NAType", "NaTType") or v != v


def _texts(values: list[Any]) -> NDArray[Any]:
    """Return the values as texts; None for missing ones, whatever their library's sign is."""
    found = np.empty(len(values), object)
    found[:] = [None if _is_missing(v) else str(v) for v in values]
    return found


def _finite(name: Any, numbers: Floats) -> Floats:
    if np.isinf(numbers).any():
        raise ValueError(f"Input X contains infinity: column {name!r}")
    return numbers


def _days(dates: NDArray[Any]) -> Floats:
    since = dates - np.datetime64(0, "us")
    return np.where(np.isnat(dates), np.nan, since / np.timedelta64(1, "D"))


# ------------------------------------------------------------------ encoding


@dataclass
class _Number:
    """A column of numbers: the number itself, and a mark if some are missing in training."""

    marked: bool

    @classmethod
    def of(cls, column: Column) -> _Number:
        assert column.numbers is not None
        return cls(bool(np.isnan(column.numbers).any()))

    def encode(self, column: Column) -> list[Floats]:
        x = _numbers_of(column)
        return [x, np.isnan(x).astype(np.float64)] if self.marked else [x]


@dataclass
class _Date(_Number):
    """A column of dates: days since 1970, and the place in the year, the week and the day."""

    periods: tuple[float, ...] = ()

    @classmethod
    def of(cls, column: Column) -> _Date:
        days = _numbers_of(column)
        known = days[~np.isnan(days)]
        # Nothing is periodic within less than a period, nor in dates without a time of day
        span = float(np.ptp(known)) if known.size else 0.0
        with_time = bool(known.size and np.any(known % 1.0))
        periods = [p for p in _PERIODS.values() if span > p and (p > 1.0 or with_time)]
        return cls(bool(np.isnan(days).any()), tuple(periods))

    def encode(self, column: Column) -> list[Floats]:
        parts = super().encode(column)
        for period in self.periods:
            # Whole turns are removed first: the sine of a large angle has rounding noise
            angle = 2.0 * np.pi * (parts[0] / period % 1.0)
            parts += [np.sin(angle), np.cos(angle)]
        return parts


@dataclass
class _Text:
    """A column of text: a column for each frequent value, or one of −1 and 1 for two values."""

    levels: list[str]

    @classmethod
    def of(cls, column: Column) -> _Text:
        counts = Counter(t for t in column.texts.tolist() if t is not None)  # type: ignore[union-attr]
        frequent = sorted(counts, key=lambda t: (-counts[t], t))[:MOST_LEVELS]
        return cls(sorted(frequent))

    def encode(self, column: Column) -> list[Floats]:
        texts = column.texts
        if texts is None:  # numbers in place of the text of training
            texts = _texts(_numbers_of(column).tolist())
        place = {level: i for i, level in enumerate(self.levels)}
        at = np.fromiter((place.get(t, -1) for t in texts), np.intp, len(texts))
        if len(self.levels) == 2:
            return [np.array([-1.0, 1.0, 0.0])[at]]  # the last for unknown and missing values
        return [(at == i).astype(np.float64) for i in range(len(self.levels))]


def _numbers_of(column: Column) -> Floats:
    if column.numbers is None:
        raise ValueError(
            f"column {column.name!r} holds text, but the model was fitted on numbers there"
        )
    return column.numbers


class TableEncoder:
    """A transformer from a table's columns to the network's input.

    Attributes
    ----------
    parts : list
        How each column becomes numbers.
    median, scale : ndarray (numbers,)
        Centre and factor of each number.
    used : ndarray of int
        The numbers that are not constant: first those with more than two values, and among
        these those with the most.
    n_ranked : int
        Number of the first ones that appear as ranks too.  In a wide table there are none.
    n_embedded : int
        Number of first columns of the result to embed: numbers with more than two values, and
        ranks; not all of them in a wide table.
    quantiles : list of ndarray
        For each ranked number, its quantiles over the training rows.
    """

    def fit(self, columns: list[Column]) -> TableEncoder:
        """Learn from the columns of the training rows."""
        kinds: list[Callable[[Column], Any]] = [
            _Text.of if c.numbers is None else _Date.of if c.is_date else _Number.of
            for c in columns
        ]
        self.parts = [kind(c) for kind, c in zip(kinds, columns, strict=True)]
        raw = self._raw(columns)
        n, d = raw.shape
        self.median, self.scale = np.zeros(d), np.zeros(d)
        n_values = np.zeros(d, int)
        for j in range(d):
            known = raw[~np.isnan(raw[:, j]), j]
            if known.size:
                self.median[j] = np.median(known)
                self.scale[j] = _robust_scale(known)
                n_values[j] = len(np.unique(known))
        # In order of the columns, but for wide tables, where the first ones are embedded
        several = np.flatnonzero((self.scale > 0.0) & (n_values > 2))
        if len(several) > _MOST_EMBEDDED:
            several = several[np.argsort(-n_values[several], kind="stable")]
        two = np.flatnonzero((self.scale > 0.0) & (n_values <= 2))
        self.used = np.concatenate([several, two])
        self.n_ranked = len(several) if len(several) <= _MOST_RANKED else 0
        self.n_embedded = min(len(several) + self.n_ranked, _MOST_EMBEDDED)
        n_quantiles = np.clip(n // _ROWS_PER_QUANTILE, _FEWEST_QUANTILES, _MOST_QUANTILES) + 1
        levels = np.linspace(0.0, 1.0, int(n_quantiles))
        self.quantiles = [
            np.unique(np.nanquantile(raw[:, j], levels)) for j in self.used[: self.n_ranked]
        ]
        return self

    @property
    def n_columns(self) -> int:
        """The number of columns of the result; at least one, which is zero."""
        return max(1, len(self.used) + self.n_ranked)

    def transform(self, columns: list[Column]) -> NDArray[np.float32]:
        """Return the network's input, (n, n_columns): scaled numbers, ranks, all others."""
        raw = self._raw(columns)[:, self.used]
        out = np.zeros((len(raw), self.n_columns), np.float32)
        if not len(self.used):
            return out
        k = self.n_ranked
        z = (raw - self.median[self.used]) * self.scale[self.used]
        z = np.where(np.isnan(z), 0.0, z / np.hypot(1.0, z / _CLIP))
        out[:, :k], out[:, 2 * k :] = z[:, :k], z[:, k:]
        for j, grid in enumerate(self.quantiles):
            out[:, k + j] = _rank(raw[:, j], grid)
        return out

    def _raw(self, columns: list[Column]) -> Floats:
        found = [a for part, c in zip(self.parts, columns, strict=True) for a in part.encode(c)]
        n = len(columns[0].numbers if columns[0].texts is None else columns[0].texts)  # type: ignore[arg-type]
        return np.column_stack(found) if found else np.zeros((n, 0))


def _robust_scale(x: Floats) -> float:
    """Return 1 / (q₇₅ − q₂₅), or 2 / (max − min) if that is not finite, or 0 for a constant.

    With the smooth clipping, z / √(1 + (z / 3)²), it is the scaling of RealMLP (Holzmüller et
    al., 2024, section 3).
    """
    low, high = np.quantile(x, [0.25, 0.75])
    if high > low:
        return float(1.0 / (high - low))
    span = float(np.ptp(x))
    return 2.0 / span if span > 0.0 else 0.0


def _rank(x: Floats, quantiles: Floats) -> Floats:
    """Return the places among the distinct quantiles of the training rows, through Φ⁻¹."""
    u = np.interp(x, quantiles, np.linspace(0.0, 1.0, len(quantiles)))
    return np.where(np.isnan(x), 0.0, _RANK_SCALE * ndtri(np.clip(u, _EDGE, 1.0 - _EDGE)))

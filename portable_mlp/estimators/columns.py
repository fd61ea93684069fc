"""From a table's columns to the network's numbers, on the host.

Each column of numbers appears twice: scaled robustly, and as its place among the distinct
quantiles of the training rows, mapped to a normal distribution.  Text becomes one column for each
frequent value.  Dates become numbers first.  A missing number is zero in both, which is the
median of the first, and is marked.
"""

from __future__ import annotations

import datetime as dt
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from decimal import Decimal
from numbers import Number
from typing import Any, ClassVar

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

PERIODS = 365.2425, 7.0, 1.0
"""A year, a week and a day, in days."""

_FEWEST_QUANTILES, _MOST_QUANTILES, _ROWS_PER_QUANTILE = 10, 1000, 30
EDGE = 1e-3
"""How far from 0 and 1 ranks are clipped."""

RANK_SCALE = 0.67
"""Factor on ranks: about the standard deviation of the scaled values of normal data."""

PLACES = 9
"""Decimal places of a date's place in a period."""

CLIP = 3.0
"""Limit of the smoothly clipped values."""


@dataclass
class Column:
    """One column of a table.

    Attributes
    ----------
    name : str or int
        Name in a data frame, position in an array.
    kind : {"number", "boolean", "date", "span", "text", "missing"}
        What its values are; "missing" if all are missing.
    numbers : ndarray (n,)
        Numbers, 0 and 1, days since 1970, or seconds; NaN where missing.  Of text all are NaN.
    texts : ndarray (n,) of str or None, optional
        Values of text.
    """

    name: Any
    kind: str
    numbers: Floats
    texts: NDArray[Any] | None = None

    def as_texts(self) -> NDArray[Any]:
        """Return the values as texts, whatever they are; None where missing.

        Raises
        ------
        ValueError
            If they are dates or time spans, which have no text of their own.
        """
        if self.texts is not None:
            return self.texts
        if self.kind in ("date", "span"):
            raise _wrong_kind(self, "text")
        if self.kind == "boolean":
            return _texts([v if v != v else bool(v) for v in self.numbers.tolist()])
        return _texts(self.numbers.tolist())


WORDS = {
    "number": "numbers", "boolean": "booleans", "date": "dates", "span": "time spans",
    "text": "text", "missing": "nothing",
}  # fmt: skip
"""What the values of a column are, by its kind."""


def _wrong_kind(column: Column, wanted: str) -> ValueError:
    return ValueError(
        f"column {column.name!r} holds {WORDS[column.kind]}, but the model was fitted on"
        f" {WORDS[wanted]} there"
    )


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
    if hasattr(X, "collect"):
        raise TypeError("X: a lazy frame has no rows yet; call its method collect()")
    try:
        frame = nw.from_native(X, eager_only=True, pass_through=True)
        names = list(map(str, frame.columns)) if isinstance(frame, nw.DataFrame) else None
    except nw.exceptions.DuplicateError as error:
        raise ValueError(f"X: column names have to be unique: {error}") from error
    if names is None:
        return _of_array(estimator, X, reset)
    if not len(frame) or not names:
        raise ValueError(f"X: found a table of shape {frame.shape}, nothing to learn from")
    if reset:
        validate_data(estimator, X, skip_check_array=True)
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
    if series.null_count() == len(series):
        return _missing(name, len(series))
    if dtype.is_numeric() or dtype == nw.Boolean:
        # Through float64 of the frame's own library, which turns its missing values into NaN
        numbers = series.cast(nw.Float64).to_numpy().astype(np.float64)
        kind = "boolean" if dtype == nw.Boolean else "number"
        return Column(name, kind, _finite(name, numbers))
    if dtype in (nw.Date, nw.Datetime):
        if getattr(dtype, "time_zone", None) is not None:
            series = series.dt.convert_time_zone("UTC").dt.replace_time_zone(None)
        return _of_dates(name, series.cast(nw.Datetime("us")).to_numpy())
    if dtype == nw.Duration:
        span = series.to_numpy().astype("timedelta64[us]")
        seconds = np.where(np.isnat(span), np.nan, span / np.timedelta64(1, "s"))
        return Column(name, "span", seconds)
    if dtype in (nw.String, nw.Categorical, nw.Enum):
        return _of_texts(name, series.to_list())
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
    if isinstance(X, list | tuple) and np.asarray(X).dtype.kind in "US":
        X = np.array(X, object)  # NumPy would make texts of the numbers beside texts
    X = validate_data(estimator, X, dtype=None, ensure_all_finite=False, reset=reset)
    if X.dtype.kind in "OUS":
        return [_of_objects(i, X[:, i].tolist()) for i in range(X.shape[1])]
    if X.dtype.kind not in "biuf":
        raise ValueError(f"X: numbers or text are expected, got dtype {X.dtype}")
    kind = "boolean" if X.dtype.kind == "b" else "number"
    X = X.astype(np.float64, copy=False)
    return [Column(i, kind, _finite(i, X[:, i])) for i in range(X.shape[1])]


def _of_objects(name: Any, values: list[Any]) -> Column:
    """Return the column of Python objects: of numbers, booleans or dates if all are, else text."""
    for v in values:
        if isinstance(v, list | tuple | dict | set | np.ndarray | complex):
            raise TypeError(
                f"column {name!r}: argument must be a string or a number, not {type(v).__name__}"
            )
    known = [v for v in values if not _is_missing(v)]
    if not known:
        return _missing(name, len(values))
    if all(isinstance(v, dt.date) for v in known):
        return _of_dates(name, np.array([_utc(v) for v in values], "datetime64[us]"))
    if all(isinstance(v, Number | Decimal | np.bool_) for v in known):
        kind = "boolean" if all(isinstance(v, bool | np.bool_) for v in known) else "number"
        try:
            numbers = [np.nan if _is_missing(v) else float(v) for v in values]
        except OverflowError as error:
            raise ValueError(f"column {name!r}: {error}") from error
        return Column(name, kind, _finite(name, np.array(numbers, np.float64)))
    return _of_texts(name, values)


def _missing(name: Any, n: int) -> Column:
    return Column(name, "missing", np.full(n, np.nan), _texts([None] * n))


def _of_texts(name: Any, values: list[Any]) -> Column:
    return Column(name, "text", np.full(len(values), np.nan), _texts(values))


def _of_dates(name: Any, dates: NDArray[Any]) -> Column:
    dates = dates.astype("datetime64[us]")
    days = (dates - np.datetime64(0, "us")) / np.timedelta64(1, "D")
    return Column(name, "date", np.where(np.isnat(dates), np.nan, days))


def _utc(date: Any) -> Any:
    """Return a date without a zone, None if it is missing."""
    if _is_missing(date):
        return None
    if getattr(date, "tzinfo", None) is not None:
        date = date.astimezone(dt.UTC).replace(tzinfo=None)
    return np.datetime64(date, "us")


def _is_missing(v: Any) -> bool:
    # pandas.NA is equal to nothing, and has no truth value
    return v is None or type(v).__name__ in ("NAType", "NaTType") or v != v


def _texts(values: list[Any]) -> NDArray[Any]:
    """Return values as texts; None for missing ones, whatever their library's sign is."""
    found = np.empty(len(values), object)
    found[:] = [None if _is_missing(v) else _text(v) for v in values]
    return found


def _text(v: Any) -> str:
    """Return a value as text; 1 and 1.0 have the same one."""
    whole = isinstance(v, float | np.floating) and float(v).is_integer()
    return str(int(v)) if whole else str(v)


def _finite(name: Any, numbers: Floats) -> Floats:
    if np.isinf(numbers).any():
        raise ValueError(f"Input X contains infinity: column {name!r}")
    return numbers


# ------------------------------------------------------------------ encoding


@dataclass
class NumberEncoder:
    """A column of numbers: the number itself, and a mark if some are missing in training."""

    kind: str
    marked: bool

    @classmethod
    def of(cls, column: Column) -> NumberEncoder:
        return cls(column.kind, bool(np.isnan(column.numbers).any()))

    @property
    def width(self) -> int:
        """The number of the numbers that a value becomes."""
        return 1 + self.marked

    def encode(self, column: Column) -> list[Floats]:
        kinds = {self.kind, column.kind} - {"missing"}
        if len(kinds) > 1 and kinds != {"number", "boolean"}:
            raise _wrong_kind(column, self.kind)
        x = column.numbers
        return [x, np.isnan(x).astype(np.float64)] if self.marked else [x]


@dataclass
class DateEncoder(NumberEncoder):
    """A column of dates: days since 1970, and the place in the year, the week and the day."""

    periods: tuple[float, ...] = ()

    @classmethod
    def of(cls, column: Column) -> DateEncoder:
        days = column.numbers
        known = days[~np.isnan(days)]
        # Nothing is periodic within less than a period, nor in dates without a time of day
        span = float(np.ptp(known)) if known.size else 0.0
        with_time = bool(known.size and np.any(known % 1.0))
        periods = [p for p in PERIODS if span > p and (p > 1.0 or with_time)]
        return cls("date", bool(np.isnan(days).any()), tuple(periods))

    @property
    def width(self) -> int:
        """The number of the numbers that a value becomes."""
        return super().width + 2 * len(self.periods)

    def encode(self, column: Column) -> list[Floats]:
        parts = super().encode(column)
        waves = [part for p in self.periods for part in place_in(parts[0], p)]
        # The same time of day is the same number on every day, and has one rank
        return parts + [np.round(wave, PLACES) for wave in waves]


@dataclass
class TextEncoder:
    """A column of text: a column for each frequent value, or one of −1 and 1 for two values."""

    levels: tuple[str, ...]

    @classmethod
    def of(cls, column: Column) -> TextEncoder:
        counts = Counter(t for t in column.as_texts().tolist() if t is not None)
        frequent = sorted(counts, key=lambda t: (-counts[t], t))[:MOST_LEVELS]
        return cls(tuple(sorted(frequent)))

    @property
    def width(self) -> int:
        """The number of the numbers that a value becomes."""
        return 1 if len(self.levels) == 2 else len(self.levels)

    def encode(self, column: Column) -> list[Floats]:
        place = {level: i for i, level in enumerate(self.levels)}
        for level, i in [*place.items()]:  # numbers in place of the texts of training
            try:
                place.setdefault(_text(float(level)), i)
            except ValueError:
                continue
        texts = column.as_texts()
        at = np.fromiter((place.get(t, -1) for t in texts), np.intp, len(texts))
        if self.width < len(self.levels):
            return [np.array([-1.0, 1.0, 0.0])[at]]  # the last for unknown and missing values
        return [(at == i).astype(np.float64) for i in range(len(self.levels))]


@dataclass
class UnusedEncoder:
    """A column of no use, which becomes no number."""

    width: ClassVar[int] = 0

    def encode(self, column: Column) -> list[Floats]:
        return []


Encoder = NumberEncoder | TextEncoder | UnusedEncoder


def place_in(days: Floats, period: float) -> list[Floats]:
    """Return the sine and cosine of the place of dates in a period, which is in days."""
    # Whole turns are removed first: the sine of a large angle has rounding noise, which a
    # scaling would amplify
    angle = 2.0 * np.pi * (days / period % 1.0)
    return [np.sin(angle), np.cos(angle)]


@dataclass
class TableEncoder:
    """A transformer from a table's columns to the network's input.

    Attributes
    ----------
    parts : list of Encoder
        How each column becomes numbers.
    median, scale : ndarray (numbers,)
        Centre and factor of each number.
    used : ndarray of int
        The numbers that are not constant: first those with more than two values.  In a wide
        table, these are in falling order of the number of their values.
    n_ranked : int
        Number of the first ones that appear as ranks too.  In a wide table there are none.
    n_embedded : int
        Number of first columns of the result to embed: numbers with more than two values, and
        ranks; not all of them in a wide table.
    quantiles : list of ndarray
        For each ranked number, its quantiles over the training rows.
    """

    parts: list[Encoder]
    median: Floats
    scale: Floats
    used: NDArray[np.int64]
    n_ranked: int
    n_embedded: int
    quantiles: list[Floats]

    @classmethod
    def of(cls, columns: list[Column], unused: Collection[int] = ()) -> TableEncoder:
        """Return the encoder for the columns of the training rows, without unused ones."""
        kinds: dict[str, Callable[[Column], Any]] = {"text": TextEncoder.of, "date": DateEncoder.of}
        parts = [
            UnusedEncoder() if j in unused else kinds.get(c.kind, NumberEncoder.of)(c)
            for j, c in enumerate(columns)
        ]
        raw = _numbers(parts, columns)
        n, d = raw.shape
        median, scale = np.zeros(d), np.zeros(d)
        n_values = np.zeros(d, int)
        for j in range(d):
            known = raw[~np.isnan(raw[:, j]), j]
            if known.size:
                median[j] = np.median(known)
                scale[j] = _robust_scale(known)
                n_values[j] = len(np.unique(known))
        # Of a wide table only the first ones are embedded
        several = np.flatnonzero((scale > 0.0) & (n_values > 2))
        if len(several) > _MOST_EMBEDDED:
            several = several[np.argsort(-n_values[several], kind="stable")]
        two = np.flatnonzero((scale > 0.0) & (n_values <= 2))
        used = np.concatenate([several, two])
        n_ranked = len(several) if len(several) <= _MOST_RANKED else 0
        n_embedded = min(len(several) + n_ranked, _MOST_EMBEDDED)
        n_quantiles = np.clip(n // _ROWS_PER_QUANTILE, _FEWEST_QUANTILES, _MOST_QUANTILES) + 1
        levels = np.linspace(0.0, 1.0, int(n_quantiles))
        quantiles = [np.unique(np.nanquantile(raw[:, j], levels)) for j in used[:n_ranked]]
        return cls(parts, median, scale, used, n_ranked, n_embedded, quantiles)

    @property
    def n_columns(self) -> int:
        """The number of columns of the result; at least one, which is zero."""
        return max(1, len(self.used) + self.n_ranked)

    @property
    def blocks(self) -> list[NDArray[np.intp]]:
        """For each column of the table, the columns of the result that come from it."""
        source = np.repeat(np.arange(len(self.parts)), [part.width for part in self.parts])
        used, k = source[self.used], self.n_ranked
        place = np.concatenate([used[:k], used[:k], used[k:]])
        return [np.flatnonzero(place == j) for j in range(len(self.parts))]

    def transform(self, columns: list[Column]) -> NDArray[np.float32]:
        """Return the network's input, (n, n_columns): scaled numbers, ranks, all others."""
        raw = _numbers(self.parts, columns)[:, self.used]
        out = np.zeros((len(raw), self.n_columns), np.float32)
        if not len(self.used):
            return out
        k = self.n_ranked
        z = (raw - self.median[self.used]) * self.scale[self.used]
        z = np.where(np.isnan(z), 0.0, z / np.hypot(1.0, z / CLIP))
        out[:, :k], out[:, 2 * k :] = z[:, :k], z[:, k:]
        for j, grid in enumerate(self.quantiles):
            out[:, k + j] = _rank(raw[:, j], grid)
        return out


def _numbers(parts: list[Any], columns: list[Column]) -> Floats:
    """Return the numbers that the values of columns become, (n, sum of the parts' widths)."""
    found = [a for part, c in zip(parts, columns, strict=True) for a in part.encode(c)]
    return np.column_stack(found) if found else np.zeros((len(columns[0].numbers), 0))


def _robust_scale(x: Floats) -> float:
    """Return 1 / (q₇₅ − q₂₅), or 2 / (max − min) if that is not finite, or 0 for a constant.

    With the smooth clipping, z / √(1 + (z / 3)²), it is the scaling of RealMLP (Holzmüller et
    al., 2024, section 3).
    """
    low, high = np.quantile(x, [0.25, 0.75])
    half = 0.5 * float(x.max()) - 0.5 * float(x.min())  # the range itself may overflow
    with np.errstate(over="ignore"):
        for width in (high - low, half):
            if width > 0.0 and np.isfinite(1.0 / width) and 1.0 / width > 0.0:
                return float(1.0 / width)
    return 0.0


def _rank(x: Floats, quantiles: Floats) -> Floats:
    """Return the places among the distinct quantiles of the training rows, through Φ⁻¹."""
    u = np.interp(x, quantiles, np.linspace(0.0, 1.0, len(quantiles)))
    return np.where(np.isnan(x), 0.0, RANK_SCALE * ndtri(np.clip(u, EDGE, 1.0 - EDGE)))

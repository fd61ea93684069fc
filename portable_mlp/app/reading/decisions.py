"""What the columns of a table are, decided over the values of all training files together.

`Evidence` collects what a column's values look like, a batch of rows at a time.  Neither the order
of the batches nor their division matters.  `decide` chooses a kind for each column from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import polars as pl

from portable_mlp.app.reading.columns import (
    Column,
    Reading,
    convert,
    plain_types,
    without_numbers,
)
from portable_mlp.app.reading.options import Options
from portable_mlp.app.reading.texts import (
    MISSING,
    MISSING_VALUES,
    booleans,
    clean,
    dates,
    has_decimal_mark,
    plain_numbers,
)
from portable_mlp.preprocessing import KINDS, kind_of

_MOST_OTHERS = 10  # distinct texts that are no numbers in a column of numbers
_MOST_SHARE = 0.1  # of the values
_EXACT = 2.0**53  # float64 holds smaller whole numbers exactly
_CODE = r"^(?:0\d+|[-+]?\d{16,})$"  # as a number it would lose its zeros, or its last digits
_SHOWN = 3  # examples


class Evidence:
    """What the values of a column look like.

    Parameters
    ----------
    name : str
    missing : tuple of str
        Texts that are missing values, in lower case.

    Attributes
    ----------
    n : int
        Number of values.
    n_plain : int
        Number of values that are plain numbers, see `texts.plain_numbers`.
    n_missing : int
    low, high : float
        Limits of the plain numbers.
    whole : bool
        Whether all plain numbers are whole and written without a decimal point.
    pointed : bool
        Whether a plain number has a decimal point that cannot group thousands.
    codes : bool
        Whether a plain number would not be written again as it is, such as 007.
    declared : set of str
        Kinds that the files themselves give the column.
    """

    def __init__(self, name: str, missing: tuple[str, ...]) -> None:
        self.name = name
        self.n = self.n_plain = self.n_missing = 0
        self.low, self.high = float("inf"), float("-inf")
        self.whole, self.pointed, self.codes = True, False, False
        self.declared: set[str] = set()
        self._missing = missing
        self._others: list[pl.DataFrame] = []
        self._dates: list[str] = []
        self._few: dict[str, int] | None = {}

    def add(self, values: pl.Series) -> None:
        """Add values of the column, as a file holds them."""
        declared = values.dtype.base_type() in (pl.Categorical, pl.Enum)
        values = without_numbers(plain_types(values), self._missing)
        if values.dtype == pl.String:
            if declared:
                self.declared.add("category")
            self._add_texts(values)
            return
        known = values.drop_nulls()
        self.n += len(known)
        self.n_missing += values.null_count()
        if known.is_empty():
            return
        kind = kind_of(self.name, values.dtype)
        self.declared.add(kind)
        if kind == "number":
            self._add_numbers(known.cast(pl.Float64))
            self.whole &= known.dtype.is_integer()
            self.codes |= bool(known.dtype.is_integer() and self._beyond(known.cast(pl.Float64)))
        if kind == "date":
            self._dates = sorted({*self._dates, *(str(d) for d in (known.min(), known.max()))})

    def _add_texts(self, texts: pl.Series) -> None:
        plain = plain_numbers(texts)
        are_plain = plain.is_not_null()
        if are_plain.any():
            written, numbers = texts.filter(are_plain), plain.filter(are_plain)
            self.n += len(numbers)
            self._add_numbers(numbers)
            if self.whole:
                self.whole = not written.str.contains(r"[.eEn]").any()
            if not self.pointed:
                self.pointed = has_decimal_mark(written.head(100), ".") or has_decimal_mark(
                    written, "."
                )
            if not self.codes:
                led = written.filter(written.str.starts_with("0") & ~written.str.starts_with("0."))
                self.codes = bool(led.str.contains(_CODE).any()) or (
                    self._beyond(numbers) and bool(written.str.contains(_CODE).any())
                )
            self._count_few(written)
        rest = texts.filter(~are_plain)
        if rest.is_empty():
            return
        counts = rest.value_counts(name="count of rows")
        bare = clean(counts.to_series(0), self._missing)
        rows = pl.DataFrame({"text": bare, "n": counts["count of rows"].cast(pl.Int64)})
        holes = rows["text"].is_null()
        self.n_missing += int(rows["n"].filter(holes).sum())
        self._others.append(rows.filter(~holes))
        self.n += int(self._others[-1]["n"].sum())

    def _count_few(self, written: pl.Series) -> None:
        """Count plain numbers by their texts, as long as there are few different ones."""
        if self._few is None or written.head(100 * _MOST_OTHERS).n_unique() > _MOST_OTHERS:
            self._few = None
            return
        for text, n in written.value_counts().iter_rows():
            self._few[text] = self._few.get(text, 0) + n
        if len(self._few) > _MOST_OTHERS:
            self._few = None

    def _add_numbers(self, numbers: pl.Series) -> None:
        self.n_plain += len(numbers)
        low, high = numbers.min(), numbers.max()
        self.low, self.high = min(self.low, low), max(self.high, high)
        if self.whole:
            self.whole = bool((numbers.floor() == numbers).all())

    def _beyond(self, numbers: pl.Series) -> bool:
        return bool((numbers.abs() >= _EXACT).any())

    @property
    def others(self) -> pl.DataFrame:
        """The distinct texts that are no plain numbers, sorted, and the rows of each."""
        if not self._others:
            return pl.DataFrame(schema={"text": pl.String, "n": pl.Int64})
        parts = pl.concat(self._others)
        self._others = [parts.group_by("text").agg(pl.col("n").sum()).sort("text")]
        return self._others[0]

    @property
    def few_numbers(self) -> pl.DataFrame | None:
        """The distinct texts of plain numbers, and the rows of each; None if there are many."""
        if self._few is None:
            return None
        texts = sorted(self._few.items())
        return pl.DataFrame(texts, schema={"text": pl.String, "n": pl.Int64}, orient="row")

    @property
    def examples(self) -> tuple[str, ...]:
        """The range of the numbers or dates, and the most frequent texts."""
        frequent = self.others.sort("n", "text", descending=[True, False])["text"].head(_SHOWN)
        ranges = []
        if self.n_plain:
            low, high = self.low + 0.0, self.high + 0.0  # no minus zero
            ranges.append(f"{low:.4g} to {high:.4g}")
        if self._dates:
            ranges.append(f"{self._dates[0]} to {self._dates[-1]}")
        return tuple([*ranges, *frequent.to_list()][:_SHOWN])


class _Fit(NamedTuple):
    """A column as one of the kinds, and the distinct texts that are not of the kind."""

    column: Column
    left: pl.DataFrame
    notes: tuple[str, ...] = ()


def decide(found: Mapping[str, Evidence], options: Options, *, comma: bool = False) -> Reading:
    """Choose a kind for each column.

    Parameters
    ----------
    found : dict
        From names to `Evidence`.
    options : Options
        Their kinds and formats are taken as they are.
    comma : bool, default=False
        Whether a comma is the decimal mark where no number of the table tells: in 1,234 it
        may be that, or group thousands.

    Returns
    -------
    Reading

    Raises
    ------
    ValueError
        If the options name a column that is not there, or a kind that does not exist.
    """
    unknown = [name for name in options.columns if name not in found]
    if unknown:
        raise ValueError(
            f"--column: there is no column {unknown[0]!r}; there are {', '.join(found)}"
        )
    sure = {mark for evidence in found.values() for mark in _marks(evidence)}
    table = _Table(
        options.decimal or ("," if sure == {","} or (comma and not sure) else "."),
        {order for evidence in found.values() if (order := _order(evidence)) is not None},
        options,
    )
    columns = {
        name: _decided(evidence, table, options.columns.get(name))
        for name, evidence in found.items()
    }
    return Reading(
        columns,
        MISSING + tuple(text.lower() for text in options.missing),
        separator=options.separator,
        header=options.header,
    )


@dataclass(frozen=True)
class _Table:
    """What the columns of a table tell each other.

    Attributes
    ----------
    decimal : str
        The decimal mark where a column does not tell.
    orders : set of bool
        The orders of day and month of the columns that tell; True for the day first.
    options : Options
    """

    decimal: str
    orders: set[bool]
    options: Options


def _decided(evidence: Evidence, table: _Table, kind: str | None) -> Column:
    """Return the column as what it is, or as the kind that the user says."""
    if kind is not None:
        fit = _FITS[kind](evidence, table)
        notes = ("as --column says", *fit.notes)
        return _described(evidence, fit._replace(notes=notes))
    category = _as_category(evidence, table)
    if "category" in evidence.declared or not evidence.n:
        return _described(evidence, category)
    for name, allowed in _ALLOWED.items():
        if not evidence.declared <= allowed:
            continue
        if name != "number" and evidence.few_numbers is None:  # most values are numbers
            continue
        fit = _FITS[name](evidence, table)
        n_left, n = int(fit.left["n"].sum()), evidence.n - _n_holes(evidence)
        if n_left < n and n_left <= _MOST_SHARE * n and len(fit.left) <= _MOST_OTHERS:
            if name == "number" and _has_codes(evidence):
                note = "text: as numbers, values such as 007 or 12345678901234567 would change"
                return _described(evidence, category._replace(notes=(note,)))
            return _described(evidence, fit)
        if n_left < n and 2 * n_left < n:
            such = ", ".join(fit.left["text"].head(_SHOWN))
            note = f"text: {n_left} of {n} values are no {name}s, such as {such}"
            category = category._replace(notes=(note,))
    return _described(evidence, category)


def _described(evidence: Evidence, fit: _Fit) -> Column:
    notes = list(fit.notes)
    if fit.column.kind != "category" and len(fit.left):
        shown = [f"{text} ({n})" for text, n in fit.left.head(_MOST_OTHERS).iter_rows()]
        more = f" and {len(fit.left) - _MOST_OTHERS} more" if len(fit.left) > _MOST_OTHERS else ""
        notes.append(f"taken as missing: {', '.join(shown)}{more}")
    if fit.column.kind != "category" and (holes := _n_holes(evidence)):
        words = evidence.others["text"].filter(
            ~evidence.others["text"].is_in(_texts(evidence)["text"].to_list())
        )
        notes.append(f"{', '.join(words.head(_SHOWN))} is missing ({holes})")
    return replace(
        fit.column,
        others=tuple(fit.left["text"].str.to_lowercase().unique().sort()),
        examples=evidence.examples,
        note="; ".join(notes),
    )


def _texts(evidence: Evidence) -> pl.DataFrame:
    """Return the texts of a column that are neither plain numbers nor missing among numbers."""
    others = evidence.others
    return others.filter(~others["text"].str.to_lowercase().is_in(MISSING_VALUES))


def _all_texts(evidence: Evidence) -> pl.DataFrame:
    """Return the texts of `_texts`, and those of plain numbers if these are few."""
    few = evidence.few_numbers
    return _texts(evidence) if few is None else pl.concat([_texts(evidence), few]).sort("text")


def _n_holes(evidence: Evidence) -> int:
    return int(evidence.others["n"].sum()) - int(_texts(evidence)["n"].sum())


def _has_codes(evidence: Evidence) -> bool:
    return evidence.codes or bool(evidence.others["text"].str.contains(_CODE).any())


# ------------------------------------------------------------------ a column as each kind


def _as_category(evidence: Evidence, table: _Table) -> _Fit:
    return _Fit(Column("category"), evidence.others.clear())


def _as_boolean(evidence: Evidence, table: _Table) -> _Fit:
    texts, column = _all_texts(evidence), Column("boolean")
    forced = table.options.columns.get(evidence.name) == "boolean"
    values = (convert if forced else _true_or_false)(texts["text"], column)
    return _Fit(column, texts.filter(values.is_null()))


def _true_or_false(texts: pl.Series, column: Column) -> pl.Series:
    return booleans(texts)


def _as_number(evidence: Evidence, table: _Table) -> _Fit:
    texts, marks = _texts(evidence), _marks(evidence)
    own = next(iter(marks)) if len(marks) == 1 else None
    decimal = table.options.decimal or own or table.decimal
    column = Column("number", decimal=decimal)
    values = convert(texts["text"], column)
    zero_or_one = evidence.whole and evidence.low >= 0 and evidence.high <= 1
    if not zero_or_one:  # true is 1 among zeros and ones alone
        values = values.zip_with(booleans(texts["text"]).is_null(), values.clear(len(values)))
    written = texts["text"].filter(values.is_not_null())
    notes = []
    if written.str.contains("%", literal=True).any():
        notes.append("12% is 0.12")
    if written.str.contains(",", literal=True).any():
        example = str(written.filter(written.str.contains(",", literal=True))[0])
        value = convert(pl.Series([example]), column)[0]
        notes.append(f"{example} is {value:.15g}")
        if not marks and table.options.decimal is None:
            notes[-1] += f" (--decimal {',' if decimal == '.' else '.'} says otherwise)"
    whole = evidence.whole and not written.str.contains(rf"[{decimal}%eE]").any()
    return _Fit(replace(column, whole=whole), texts.filter(values.is_null()), tuple(notes))


def _marks(evidence: Evidence) -> set[str]:
    """Return the decimal marks that the numbers of a column have for sure."""
    texts = evidence.others["text"]
    marks = {mark for mark in (".", ",") if has_decimal_mark(texts, mark)}
    return marks | ({"."} if evidence.pointed else set())


def _as_date(evidence: Evidence, table: _Table) -> _Fit:
    texts, said = _all_texts(evidence), table.options.date_format
    if said is not None and said not in _ORDERS:
        column = Column("date", date_format=said)
        values = convert(texts["text"], column)
        if values.is_not_null().any():
            return _Fit(column, texts.filter(values.is_null()))
    order, notes = _order(evidence), []
    if order is None and said in _ORDERS:
        order = _ORDERS[said]
    elif order is None:
        order = table.orders == {True}
        either = [dates(texts["text"], day_first=first) for first in (False, True)]
        differ = texts["text"].filter((either[0] != either[1]).fill_null(value=False))
        if len(differ):
            which = "another column has it so" if len(table.orders) == 1 else "it could be either"
            other = "month-first" if order else "day-first"
            notes.append(
                f"{differ[0]} is {dates(differ.head(1), day_first=order)[0]:%-d %B %Y}:"
                f" {which} (--date-format {other} says otherwise)"
            )
    column = Column("date", day_first=order)
    left = texts.filter(convert(texts["text"], column).is_null())
    return _Fit(column, left, tuple(notes))


_ORDERS = {"day-first": True, "month-first": False}


def _order(evidence: Evidence) -> bool | None:
    """Tell whether the dates of a column have the day first; None if nothing tells."""
    texts = _texts(evidence)
    if "date" in evidence.declared or not len(texts):
        return None
    n_month, n_day = (
        int(texts["n"].filter(dates(texts["text"], day_first=first).is_not_null()).sum())
        for first in (False, True)
    )
    return None if n_month == n_day else n_day > n_month


_FITS: dict[str, Callable[[Evidence, _Table], _Fit]] = {
    "number": _as_number,
    "boolean": _as_boolean,
    "date": _as_date,
    "category": _as_category,
}
assert _FITS.keys() == KINDS.keys()

# The kinds to try, in this order, and what the types of the files may be for each
_ALLOWED = {"boolean": {"boolean"}, "number": {"number", "boolean"}, "date": {"date"}}

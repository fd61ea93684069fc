"""What the columns of a table are, decided over the values of all training files together.

`Evidence` collects what a column's values look like, a batch of rows at a time.  Neither the order
of the batches nor their division matters.  `decide` chooses a kind for each column from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import polars as pl

from portable_mlp.app.reading.columns import (
    Column,
    Reading,
    convert,
    plain_types,
    without_numbers,
)
from portable_mlp.app.reading.options import DATE_ORDERS, Options
from portable_mlp.app.reading.texts import (
    MISSING,
    MISSING_VALUES,
    are_dates,
    are_numbers,
    booleans,
    clean,
    currencies,
    dates,
    dates_of_format,
    dressed_numbers,
    plain_numbers,
)
from portable_mlp.preprocessing import KINDS, kind_of

_MOST_OTHERS = 10  # distinct texts that are no numbers in a column of numbers
_MOST_SHARE = 0.1  # of the values
_EXACT = 2.0**53  # float64 holds smaller whole numbers exactly
_SHOWN, _MOST_SHOWN = 3, 24  # examples, and their characters
_MOST_STORED = 1000  # strangers in a column of a kind that the user says
_SAMPLE = 200  # texts
_GROUPED = r"^[-+]?[1-9][0-9]{0,2}\.[0-9]{3}$"  # the point may group thousands
_SHORT_DATE = r"^[0-9]{1,2}[-/.][0-9]{1,2}[-/.][0-9]{2}(?:[^0-9]|$)"  # a year of two digits
_NO_TEXTS = pl.DataFrame(schema={"text": pl.String, "n": pl.Int64})


class Evidence:
    """What the values of a column look like.

    Parameters
    ----------
    name : str
    options : Options

    Attributes
    ----------
    n : int
        Number of values.
    n_plain : int
        Number of values that are plain numbers, see `texts.plain_numbers`.
    n_formatted : int
        Number of plain numbers that are dates of the given format.
    low, high : float
        Limits of the plain numbers.
    whole : bool
        Whether all plain numbers are whole and written without a decimal point.
    pointed : bool
        Whether a plain number has a decimal point that cannot group thousands.
    grouped : str or None
        A plain number whose point may group thousands.
    codes : bool
        Whether a plain number would not be written again as it is, such as 007.
    declared : set of str
        Kinds that the files themselves give the column.
    """

    def __init__(self, name: str, options: Options) -> None:
        self.name = name
        self._missing = _missing(options)
        self._format = None if options.date_format in DATE_ORDERS else options.date_format
        self.n = self.n_plain = self.n_formatted = 0
        self.low, self.high = float("inf"), float("-inf")
        self.whole, self.pointed, self.codes = True, False, False
        self.grouped: str | None = None
        self.declared: set[str] = set()
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
        if known.is_empty():
            return
        kind = kind_of(self.name, values.dtype)
        self.declared.add(kind)
        if kind == "number":
            self._add_numbers(known.cast(pl.Float64))
            self.whole &= known.dtype.is_integer()
            self.codes |= bool(
                known.dtype.is_integer() and (known.cast(pl.Float64).abs() >= _EXACT).any()
            )
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
                # A hundred texts tell of nearly every column
                self.pointed = _has_point(written.head(100)) or _has_point(written)
                if not self.pointed:
                    grouped = written.filter(written.str.contains(_GROUPED)).min()
                    self.grouped = min(filter(None, (self.grouped, grouped)), default=None)
            if not self.codes:
                self.codes = _has_codes(written, numbers)
            self._count_few(written)
            if self._format is not None:
                self.n_formatted += dates_of_format(written, self._format).count()
        rest = texts.filter(~are_plain)
        if rest.is_empty():
            return
        counts = rest.value_counts(name="count of rows")
        bare = clean(counts.to_series(0), self._missing)
        rows = pl.DataFrame({"text": bare, "n": counts["count of rows"].cast(pl.Int64)})
        holes = rows["text"].is_null()
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

    # What follows is for after the last batch

    @cached_property
    def others(self) -> pl.DataFrame:
        """The distinct texts that are no plain numbers, sorted, and the rows of each."""
        if not self._others:
            return _NO_TEXTS
        parts = pl.concat(self._others)
        return parts.group_by("text").agg(pl.col("n").sum()).sort("text")

    @cached_property
    def texts(self) -> pl.DataFrame:
        """Those of `others` that are not missing among numbers."""
        if self.others.is_empty():
            return self.others
        return self.others.filter(~pl.col("text").str.to_lowercase().is_in(MISSING_VALUES))

    @cached_property
    def n_holes(self) -> int:
        """Number of values that are missing among numbers."""
        return int(self.others["n"].sum() - self.texts["n"].sum())

    @cached_property
    def all_texts(self) -> pl.DataFrame:
        """Those of `texts`, and those of plain numbers if these are few."""
        if not self._few:
            return self.texts
        few = pl.DataFrame(sorted(self._few.items()), schema=_NO_TEXTS.schema, orient="row")
        return pl.concat([self.texts, few]).sort("text")

    @property
    def many_numbers(self) -> bool:
        """Whether there are many different plain numbers."""
        return self._few is None

    @cached_property
    def marks(self) -> set[str]:
        """The decimal marks that the numbers have for sure.

        In 1,234 the comma may group thousands, or be a decimal mark.  In 1,23 and 1.234,5 it is
        one, and beside 1.234.567, whose points group thousands.
        """
        marks = {"."} if self.pointed else set()
        if self.texts.is_empty() or not self.may_be("number"):
            return marks
        point, comma = (dressed_numbers(self.texts["text"], mark) for mark in (".", ","))
        either = point.is_not_null() | comma.is_not_null()
        n_numbers = self.n_plain + int(self.texts["n"].filter(either).sum())
        if n_numbers < (1 - _MOST_SHARE) * (self.n - self.n_holes):
            return marks  # it is no column of numbers
        marks |= {"."} if (point.is_not_null() & comma.is_null()).any() else set()
        marks |= {","} if (comma.is_not_null() & point.is_null()).any() else set()
        return marks

    @cached_property
    def dates(self) -> dict[bool, pl.Series]:
        """The dates of `all_texts`, by whether the day is first."""
        texts = self.all_texts["text"]
        return {first: dates(texts, day_first=first) for first in (False, True)}

    @cached_property
    def day_first(self) -> bool | None:
        """Whether the dates have the day first; None if nothing tells."""
        if "date" in self.declared or self.texts.is_empty() or not self.may_be("date"):
            return None
        rows = self.all_texts["n"]
        n_month, n_day = (
            int(rows.filter(self.dates[first].is_not_null()).sum()) for first in (False, True)
        )
        return None if n_month == n_day else n_day > n_month

    def may_be(self, kind: str) -> bool:
        """Tell, from some of the texts, whether the column may be of a kind, or nearly so.

        The answer spares a look at all texts.  More strangers among some of them than are
        allowed among all decide.
        """
        if self.texts.is_empty() or (kind == "number" and 2 * self.n_plain > self.n):
            return True
        some = self.texts["text"].gather_every(max(1, len(self.texts) // _SAMPLE))
        found = booleans(some).is_not_null()
        if kind == "number":
            found |= are_numbers(some)
        if kind == "date":
            found |= are_dates(some)
        n_strangers = len(some) - int(found.sum())
        return n_strangers <= _MOST_OTHERS or 2 * n_strangers < len(some)

    @property
    def examples(self) -> tuple[str, ...]:
        """The range of the numbers or dates, and the most frequent texts."""
        frequent: list[str] = []
        if len(self.others):
            ordered = self.others.sort("n", "text", descending=[True, False])
            frequent = ordered["text"].head(_SHOWN).to_list()
        ranges = []
        if self.n_plain:
            low, high = self.low + 0.0, self.high + 0.0  # no minus zero
            ranges.append(f"{low:.4g} to {high:.4g}")
        if self._dates:
            ranges.append(f"{self._dates[0]} to {self._dates[-1]}")
        shown = [*ranges, *frequent][:_SHOWN]
        return tuple(
            text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}…" for text in shown
        )


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
        If the format of dates fits no column.
    """
    sure = {mark for evidence in found.values() for mark in evidence.marks}
    table = _Table(
        "," if sure == {","} else ".",
        comma and not sure,
        {e.day_first for e in found.values() if e.day_first is not None},
        options,
    )
    columns = {
        name: _decided(evidence, table, options.columns.get(name))
        for name, evidence in found.items()
    }
    said = options.date_format
    if said not in (None, *DATE_ORDERS) and all(c.date_format is None for c in columns.values()):
        raise ValueError(f"--date-format {said} fits the values of no column")
    return Reading(
        columns,
        _missing(options),
        separator=options.separator,
        header=options.header,
    )


def _missing(options: Options) -> tuple[str, ...]:
    """Return the texts that are missing values in every column, in lower case."""
    return MISSING + tuple(text.lower() for text in options.missing)


@dataclass(frozen=True)
class _Table:
    """What the columns of a table tell each other.

    Attributes
    ----------
    decimal : str
        The decimal mark of the columns that tell.
    comma : bool
        Whether a comma is the decimal mark if no column tells.
    orders : set of bool
        The orders of day and month of the columns that tell; True for the day first.
    options : Options
    """

    decimal: str
    comma: bool
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
    for name in _candidates(evidence, table):
        fit = _FITS[name](evidence, table)
        n_left, n = int(fit.left["n"].sum()), evidence.n - evidence.n_holes
        if n_left < n and n_left <= _MOST_SHARE * n and len(fit.left) <= _MOST_OTHERS:
            if name == "number" and (evidence.codes or _has_codes(evidence.texts["text"])):
                note = "text: as numbers, values such as 007 or 12345678901234567 would change"
                return _described(evidence, category._replace(notes=(note,)))
            return _described(evidence, fit)
        if n_left < n and 2 * n_left < n:
            such = ", ".join(fit.left["text"].head(_SHOWN))
            note = f"text: {n_left} of {n} values are no {name}s, such as {such}"
            category = category._replace(notes=(note,))
    clash = evidence.texts.height or evidence.n_plain or len(evidence.declared) > 1
    if evidence.declared and clash:
        types = " and ".join(sorted(evidence.declared))
        category = category._replace(notes=(f"text: some files have it as {types}",))
    return _described(evidence, category)


def _candidates(evidence: Evidence, table: _Table) -> list[str]:
    """Return the kinds that a column may be, the first choice first."""
    if evidence.n_formatted and evidence.n_formatted == evidence.n_plain:
        return ["date"]
    # What the types of the files may be for each kind
    kinds = {"boolean": {"boolean"}, "number": {"number", "boolean"}, "date": {"date"}}
    if evidence.many_numbers or (evidence.n_plain and evidence.texts.is_empty()):
        kinds = {"number": kinds["number"]}
    said = table.options.date_format is not None
    return [
        kind
        for kind, allowed in kinds.items()
        if evidence.declared <= allowed and (evidence.may_be(kind) or (kind == "date" and said))
    ]


def _described(evidence: Evidence, fit: _Fit) -> Column:
    notes = list(fit.notes)
    if fit.column.kind != "category" and len(fit.left):
        shown = [f"{text} ({n})" for text, n in fit.left.head(_MOST_OTHERS).iter_rows()]
        more = f" and {len(fit.left) - _MOST_OTHERS} more" if len(fit.left) > _MOST_OTHERS else ""
        notes.append(f"taken as missing: {', '.join(shown)}{more}")
    if fit.column.kind != "category" and (holes := evidence.n_holes):
        words = evidence.others.join(evidence.texts, on="text", how="anti").sort("text")["text"]
        notes.append(f"{', '.join(words.head(_SHOWN))} is missing ({holes})")
    strangers = fit.left["text"].head(_MOST_STORED)
    others = strangers.str.to_lowercase().unique().sort() if len(strangers) else ()
    return replace(
        fit.column,
        others=tuple(others),
        examples=evidence.examples,
        note="; ".join(notes),
    )


def _has_codes(texts: pl.Series, numbers: pl.Series | None = None) -> bool:
    """Tell whether numbers would not be written again as they are: 007, or beyond 2**53."""
    if texts.is_empty():
        return False
    numbers = plain_numbers(texts) if numbers is None else numbers
    zeros = texts.filter(texts.str.starts_with("0") & ~texts.str.starts_with("0."))
    large = texts.filter(numbers.abs() >= _EXACT)
    return bool(
        zeros.str.contains(r"^0[0-9]+$").any() or large.str.contains(r"^[-+]?[0-9]+$").any()
    )


def _has_point(texts: pl.Series) -> bool:
    """Tell whether some plain number has a decimal point that cannot group thousands."""
    pointed = texts.filter(texts.str.contains(".", literal=True))
    return bool((~pointed.str.contains(_GROUPED)).any())


# ------------------------------------------------------------------ a column as each kind


def _as_category(evidence: Evidence, table: _Table) -> _Fit:
    return _Fit(Column("category"), evidence.others.clear())


def _as_boolean(evidence: Evidence, table: _Table) -> _Fit:
    texts, column = evidence.all_texts, Column("boolean")
    n_truths = int(texts["n"].filter(booleans(texts["text"]).is_not_null()).sum())
    # Yes and no, and 1 and 0, are booleans among true and false alone
    forced = evidence.name in table.options.columns
    if not forced and "boolean" not in evidence.declared and 2 * n_truths <= texts["n"].sum():
        return _Fit(column, texts)
    return _Fit(column, texts.filter(convert(texts["text"], column).is_null()))


def _as_number(evidence: Evidence, table: _Table) -> _Fit:
    texts, marks, said = evidence.texts, evidence.marks, table.options.decimal
    commas = texts["text"].str.contains(",", literal=True).any()
    if said is not None:
        decimal = said
    elif len(marks) == 1:
        (decimal,) = marks
    else:
        decimal = "," if table.decimal == "," or (commas and table.comma) else "."
    zero_one = evidence.whole and evidence.low >= 0 and evidence.high <= 1
    column = Column("number", decimal=decimal, whole=evidence.whole, zero_one=zero_one)
    if texts.is_empty() and (decimal == "." or evidence.grouped is None):
        return _Fit(column, texts)
    values = convert(texts["text"], column)
    written = texts["text"].filter(values.is_not_null())
    notes, example = [], None
    if commas and len(with_comma := written.filter(written.str.contains(",", literal=True))):
        example = with_comma[0]
    elif decimal == ",":
        example = evidence.grouped
    if example is not None:
        value = convert(pl.Series([example]), column)[0]
        notes.append(f"{example} is {value:.15g}")
        if not marks and said is None:
            notes[-1] += f" (--decimal {',' if decimal == '.' else '.'} says otherwise)"
    n_percent = int(written.str.contains("%", literal=True).sum())
    if n_percent:
        notes.append("12% is 0.12")
        if n_percent < len(written) or evidence.n_plain:
            notes[-1] += ", and numbers without % are as they are"
    if len(signs := currencies(written)) > 1:
        notes.append(f"in different currencies: {', '.join(signs)}")
    whole = evidence.whole and not written.str.contains(rf"[{decimal}%eE]").any()
    return _Fit(replace(column, whole=whole), texts.filter(values.is_null()), tuple(notes))


def _as_date(evidence: Evidence, table: _Table) -> _Fit:
    said = table.options.date_format
    if said is not None and said not in DATE_ORDERS:
        column = Column("date", date_format=said)
        values = convert(evidence.texts["text"], column)
        if values.is_not_null().any() or evidence.n_formatted:
            return _Fit(column, evidence.texts.filter(values.is_null()))
    texts, order, notes = evidence.all_texts, evidence.day_first, []
    if order is None and said in DATE_ORDERS:
        order = DATE_ORDERS[said]
    elif order is None:
        order = table.orders == {True}
        month_first, day_first = evidence.dates[False], evidence.dates[True]
        differ = texts["text"].filter((month_first != day_first).fill_null(value=False))
        if len(differ):
            which = "another column has it so" if len(table.orders) == 1 else "it could be either"
            other = "month-first" if order else "day-first"
            said_so = f"{which} (--date-format {other} says otherwise)"
            notes.append(f"{_as_read(differ, order)}: {said_so}")
    are_dates = evidence.dates[order].is_not_null()
    short = texts["text"].filter(are_dates & texts["text"].str.contains(_SHORT_DATE))
    if len(short) and not notes:
        notes.append(_as_read(short, order))
    left = texts.filter(~are_dates)
    if evidence.name in table.options.columns:  # numbers are no missing dates if the user says so
        left = left.join(evidence.texts, on="text", how="semi")
    return _Fit(Column("date", day_first=order), left, tuple(notes))


def _as_read(texts: pl.Series, day_first: bool) -> str:
    date = dates(texts.head(1), day_first=day_first)[0]
    return f"{texts[0]} is {date.day} {date:%B} {date.year}"


_FITS: dict[str, Callable[[Evidence, _Table], _Fit]] = {
    "number": _as_number,
    "boolean": _as_boolean,
    "date": _as_date,
    "category": _as_category,
}
assert _FITS.keys() == KINDS.keys()

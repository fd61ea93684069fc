"""How the columns of a table are read: the same way in training and in every later file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any

import polars as pl

from portable_mlp.app.reading.texts import (
    MISSING,
    MISSING_VALUES,
    booleans,
    clean,
    dates,
    dates_of_format,
    dressed_numbers,
    plain_numbers,
    truths,
)
from portable_mlp.preprocessing import KINDS, kind_of

_MOST = 1e150  # the square, which a variance needs, is finite


@dataclass(frozen=True)
class Column:
    """How the values of a column are read.

    Attributes
    ----------
    kind : str
        A key of `portable_mlp.preprocessing.KINDS`.
    decimal : str
        Decimal mark of numbers.
    day_first : bool
        Whether 03/04/2021 is in April.
    date_format : str or None
        The only format of dates, in the notation of `time.strptime`; None for the usual ones.
    others : tuple of str
        Texts that are missing values in this column, in lower case.
    whole : bool
        Whether all numbers are whole and written without a decimal point.
    zero_one : bool
        Whether all numbers are 0 or 1; true and false are numbers then.
    examples : tuple of str
        Some texts, for people to look at.
    note : str
        What is not obvious about the decision.
    """

    kind: str
    decimal: str = "."
    day_first: bool = False
    date_format: str | None = None
    others: tuple[str, ...] = ()
    whole: bool = False
    zero_one: bool = False
    examples: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Reading:
    """How a table is read.

    Attributes
    ----------
    columns : dict
        From names to `Column`.
    missing : tuple of str
        Texts that are missing values in every column, in lower case.
    as_written : bool
        Whether spaces around texts belong to them, and ``missing`` is compared as it is.
        Models of version 0.2 and earlier were trained so.
    separator, header
        As in `Options`.
    names : tuple of str
        All columns of the table in their order, those that are left out too.
    """

    columns: dict[str, Column]
    missing: tuple[str, ...] = MISSING
    as_written: bool = False
    separator: str | None = None
    header: bool | None = None
    names: tuple[str, ...] = ()

    @classmethod
    def of_kinds(cls, kinds: Mapping[str, str]) -> Reading:
        """Return the reading of a model that stored no more than the kinds of its columns."""
        missing = ("", "?", "NA", "N/A", "#N/A", "NaN", "nan", "null", "NULL")
        return cls({name: Column(kind) for name, kind in kinds.items()}, missing, as_written=True)

    @classmethod
    def from_dict(cls, written: dict[str, Any]) -> Reading:
        """Return the reading that `to_dict` described; raise a TypeError if it is none."""
        columns = {name: _made(Column, of) for name, of in written["columns"].items()}
        reading: Reading = _made(cls, written | {"columns": columns})
        return reading

    def to_dict(self) -> dict[str, Any]:
        """Return the reading as plain values, for JSON, without those that are defaults."""
        columns = {name: _not_defaults(column) for name, column in self.columns.items()}
        return {**_not_defaults(self), "columns": columns}

    def only(self, names: list[str]) -> Reading:
        """Return the reading of some columns."""
        return replace(self, columns={name: self.columns[name] for name in names})

    def without_examples(self, names: list[str]) -> Reading:
        """Return the reading without the examples of some columns, which may be of persons."""
        columns = {
            name: replace(column, examples=()) if name in names else column
            for name, column in self.columns.items()
        }
        return replace(self, columns=columns)

    def apply(self, frame: pl.DataFrame, source: str, first_row: int = 1) -> pl.DataFrame:
        """Read the values of a batch of rows.

        Parameters
        ----------
        frame : polars.DataFrame
            Has the columns of the reading; others are left out.
        source : str
            Name of the file in error messages.
        first_row : int, default=1
            Number of the batch's first row in the file.

        Returns
        -------
        polars.DataFrame
            Its types are those of `portable_mlp.preprocessing.KINDS`.

        Raises
        ------
        ValueError
            If a value is not of its column's kind, or is infinite; the message names its row.
        """
        # Most columns of most tables are plain numbers: they are read together
        plain = self._plain_numbers(frame)
        read: dict[str, pl.Series] = {}
        for name, column in self.columns.items():
            if name in plain:
                read[name] = plain[name]
                continue
            given = frame[name]
            values, wrong = self._read(given, column)
            why = f"which is no {column.kind}"
            if wrong is None and column.kind == "number":
                wrong = values.abs() > _MOST
                why = f"beyond ±{_MOST:g}, which is too large to compute with"
            if wrong is not None and wrong.any():
                at = int(wrong.arg_true()[0])
                raise ValueError(
                    f"{source}, row {first_row + at}, column {name!r}: {str(given[at])!r}, {why}"
                )
            read[name] = values
        return pl.DataFrame(read)

    def _plain_numbers(self, frame: pl.DataFrame) -> pl.DataFrame:
        """Return the columns that are plain numbers throughout, within the limits."""
        names = [
            name
            for name, column in self.columns.items()
            if (column.kind, column.decimal) == ("number", ".") and frame[name].dtype == pl.String
        ]
        if not names or _numbers_of(self.missing):
            return pl.DataFrame()
        found = frame.select(pl.col(names).cast(pl.Float64, strict=False).fill_nan(None))
        lost = found.null_count() - frame.select(names).null_count()
        beyond = found.select((pl.all().abs() > _MOST).any())
        whole = [n for n in names if not lost[n][0] and not beyond[n][0]]
        return found.select(whole)

    def _read(self, given: pl.Series, column: Column) -> tuple[pl.Series, pl.Series | None]:
        """Return the values of a column, and where they are wrong; None if nowhere."""
        kind = KINDS[column.kind]
        values = plain_types(given)
        if column.kind != "category":
            values = without_numbers(values, self.missing)
        if values.dtype == pl.String:
            return self._read_texts(values, column)
        if column.kind == "category":
            return self._read_texts(texts_of(values), column)
        own = kind_of(given.name, values.dtype)
        if own == column.kind or (own == "boolean" and column.zero_one):
            return values.cast(kind), None
        if (own, column.kind) == ("number", "boolean"):
            return values == 1, values.is_not_null() & ~values.is_in([0, 1])
        return pl.repeat(None, len(values), dtype=kind, eager=True), values.is_not_null()

    def _read_texts(self, texts: pl.Series, column: Column) -> tuple[pl.Series, pl.Series | None]:
        if column.kind == "category":
            if self.as_written:
                return texts.replace(list(self.missing), None), None
            return clean(texts, self.missing), None
        # Most numbers are plain.  The other texts cost a look at each distinct one
        plain = plain_numbers(texts) if (column.kind, column.decimal) == ("number", ".") else None
        rest = texts if plain is None else texts.filter(plain.is_null())
        distinct = rest.drop_nulls().unique()
        if plain is not None and distinct.is_empty():
            return plain, None
        bare = clean(distinct, self.missing + MISSING_VALUES + column.others)
        found = convert(bare, column)
        wrong = distinct.filter(bare.is_not_null() & found.is_null())
        values = texts.replace_strict(
            distinct, found, default=None, return_dtype=KINDS[column.kind]
        )
        if plain is not None:
            values = plain.zip_with(plain.is_not_null(), values)
        return values, texts.is_in(wrong.to_list()) if len(wrong) else None


def convert(texts: pl.Series, column: Column) -> pl.Series:
    """Return the values of a column's texts; missing values for those that are none."""
    match column.kind:
        case "number":
            numbers = dressed_numbers(texts, column.decimal)
            if not column.zero_one:
                return numbers
            return numbers.zip_with(numbers.is_not_null(), booleans(texts).cast(pl.Float64))
        case "boolean":
            return truths(texts)
        case "date" if column.date_format is not None:
            return dates_of_format(texts, column.date_format)
        case _:
            return dates(texts, day_first=column.day_first)


def plain_types(values: pl.Series) -> pl.Series:
    """Convert decimals to floats, categories to text, times to UTC, and NaN to missing values."""
    match values.dtype.base_type():
        case pl.Decimal:
            return values.cast(pl.Float64)
        case pl.Categorical | pl.Enum:
            return values.cast(pl.String)
        case pl.Datetime:
            return values.cast(pl.Datetime("us"))
        case _:
            return values.fill_nan(None) if values.dtype.is_float() else values


def without_numbers(values: pl.Series, missing: tuple[str, ...]) -> pl.Series:
    """Make numbers that stand for a missing value, such as -999, missing values."""
    numbers = _numbers_of(missing)
    if not numbers:
        return values
    if values.dtype == pl.String:
        found = plain_numbers(values.str.strip_chars())
    elif values.dtype.is_numeric():
        found = values.cast(pl.Float64)
    else:
        return values
    kept = ~found.is_in(numbers).fill_null(value=False)
    return pl.select(pl.when(kept).then(values)).to_series().alias(values.name)


@cache
def _numbers_of(missing: tuple[str, ...]) -> list[float]:
    numbers: list[float] = plain_numbers(pl.Series(missing, dtype=pl.String)).drop_nulls().to_list()
    return numbers


def texts_of(values: pl.Series) -> pl.Series:
    """Return the texts of numbers, booleans or dates; whole numbers without a decimal point."""
    texts = values.cast(pl.String)
    return texts.str.strip_suffix(".0") if values.dtype.is_float() else texts


def _not_defaults(made: Column | Reading) -> dict[str, Any]:
    values = {f.name: (getattr(made, f.name), f.default) for f in fields(made)}
    return {name: value for name, (value, default) in values.items() if value != default}


def _made(cls: Any, written: dict[str, Any]) -> Any:
    tuples = {k: tuple(v) if isinstance(v, list) else v for k, v in written.items()}
    known = {f.name for f in fields(cls)}
    return cls(**{k: v for k, v in tuples.items() if k in known})

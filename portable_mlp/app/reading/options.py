"""What a user can say about how a table is read."""

from __future__ import annotations

from dataclasses import dataclass, field

COLUMN_KINDS = ("number", "category", "date", "boolean")
"""The kinds of columns."""

DECIMALS = (".", ",")
"""The marks between a number's whole part and its fraction."""


DATE_ORDERS = {"day-first": True, "month-first": False}
"""The orders of day and month in a date of numbers: whether the day is first."""


@dataclass(frozen=True)
class Options:
    """What a user says about a table.

    Attributes
    ----------
    columns : dict
        Kinds of columns, by name.
    drop : tuple of str
        Names of columns to leave out.
    missing : tuple of str
        Texts that are missing values, besides those of `texts.MISSING`.
    decimal : {".", ","} or None
    date_format : str or None
        A key of `DATE_ORDERS`, or a format in the notation of `time.strptime` for the columns
        that it fits.
    separator : str or None
        The character between the fields of CSV files.
    header : bool or None
        Whether the first row of CSV files names the columns.
    """

    columns: dict[str, str] = field(default_factory=dict)
    drop: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    decimal: str | None = None
    date_format: str | None = None
    separator: str | None = None
    header: bool | None = None

"""The values that texts stand for: numbers, dates and booleans, a column at a time.

Every function takes a column of texts without spaces around them.  It returns a missing value
for a text that it does not understand, so that the caller can tell which texts these are.
"""

from __future__ import annotations

import re

import polars as pl

from portable_mlp.app.reading.options import DECIMALS

MISSING = ("", "?", "na", "n/a", "#n/a", "nan", "null")
"""Texts that are a missing value in every column, in lower case."""

MISSING_VALUES = (
    "-", "--", "–", "—", ".", "none", "nil", "n.a.", "n.a", "missing", "unknown", "not available",
    "(null)", "\\n", "nat", "#value!", "#div/0!", "#num!", "#ref!", "#name?", "#null!",
)  # fmt: skip
"""Texts that are a missing value among numbers, dates or booleans, in lower case.

In a column of text they can be categories like any other.
"""

_SPACES = r"[ \u00a0\u2007\u2009\u202f]"  # with the no-break, figure, thin and narrow spaces
_MINUS = r"[-\u2212\u2012\u2013]"
_MONEY = (
    r"(?:(?:US|CA|A|NZ|HK|R)?\$|[€£¥₹₽₩₺₴₫฿₪₱]"
    r"|USD|EUR|GBP|CHF|JPY|CNY|INR|CAD|AUD|SEK|NOK|DKK|PLN|CZK|BRL)"
)
_GROUPS = {".": r",'’_", ",": r".'’_"}  # marks between the thousands, by the decimal mark


def _dressed(decimal: str) -> str:
    """Return the pattern of a number as people write it."""
    marks = [re.escape(mark) for mark in _GROUPS[decimal]] + [_SPACES]
    groups = "|".join(rf"[1-9][0-9]{{0,2}}(?:{mark}[0-9]{{3}})+" for mark in marks)
    number = rf"(?:(?:{groups}|[0-9]+)(?:{re.escape(decimal)}[0-9]*)?|{re.escape(decimal)}[0-9]+)"
    sign, space = rf"(?:\+|{_MINUS})?", f"{_SPACES}*"
    before = rf"(?:{sign}{space}(?:{_MONEY})?|(?:{_MONEY}){space}{sign}){space}"
    after = rf"{space}(?:{_MONEY}|%)?"
    power = rf"{sign}{space}{number}[eE][-+]?[0-9]+"
    brackets = rf"\({space}(?:{_MONEY})?{space}{number}{after}{space}\)"
    return rf"^(?:{before}{number}{after}|{power}|{brackets}{after})$"


_DRESSED = {decimal: _dressed(decimal) for decimal in DECIMALS}


def clean(texts: pl.Series, missing: tuple[str, ...]) -> pl.Series:
    """Remove the spaces around texts, and make those in ``missing`` missing values."""
    bare = texts.str.strip_chars()
    return _only(bare, ~bare.str.to_lowercase().is_in(missing))


def _only(texts: pl.Series, where: pl.Series) -> pl.Series:
    """Return the texts where a condition holds, and missing values elsewhere."""
    return pl.select(pl.when(where).then(texts)).to_series().alias(texts.name)


def plain_numbers(texts: pl.Series) -> pl.Series:
    """Return the numbers that are written in digits with a decimal point, such as -1.5e3."""
    return texts.cast(pl.Float64, strict=False).fill_nan(None)


def dressed_numbers(texts: pl.Series, decimal: str) -> pl.Series:
    """Return the numbers that are written as people write them.

    They may have thousands in groups (1,234,567 or 1 234 567 or 1'234'567), a currency, a plus
    sign, a typographic minus sign, or brackets if they are negative.  12% is 0.12.

    Parameters
    ----------
    texts : polars.Series of str
    decimal : {".", ","}
        The decimal mark.

    Returns
    -------
    polars.Series of float
    """
    if not texts.str.contains("[0-9]").any():
        return pl.repeat(None, len(texts), dtype=pl.Float64, eager=True).alias(texts.name)
    known = _only(texts, texts.str.contains(_DRESSED[decimal]))
    bare = known.str.replace_all(rf"{_MONEY}|{_SPACES}|[{_GROUPS[decimal]}]", "")
    bare = bare.str.replace(_MINUS, "-").str.replace(r"^\((.*)\)(.*)$", "-${1}${2}")
    bare = bare.str.replace(decimal, ".", literal=True)
    # As a power of ten it is exact; a division would round once more
    return plain_numbers(bare.str.replace("%", "e-2", literal=True))


def are_numbers(texts: pl.Series) -> pl.Series:
    """Tell which texts are numbers with one of the decimal marks."""
    first, second = (dressed_numbers(texts, mark).is_not_null() for mark in DECIMALS)
    return first | second


def currencies(texts: pl.Series) -> list[str]:
    """Return the different signs and codes of currencies, sorted."""
    return sorted(texts.str.extract(f"({_MONEY})").drop_nulls().unique())


def booleans(texts: pl.Series) -> pl.Series:
    """Return the booleans that true and false stand for, in any case."""
    small = texts.str.to_lowercase()
    return _only(small, small.is_in(["true", "false"])) == "true"


def truths(texts: pl.Series) -> pl.Series:
    """Return the booleans that true and false, yes and no, 1 and 0 stand for."""
    words = dict.fromkeys(("true", "yes", "t", "y", "1", "1.0"), True)
    words |= dict.fromkeys(("false", "no", "f", "n", "0", "0.0"), False)
    return texts.str.to_lowercase().replace_strict(words, default=None, return_dtype=pl.Boolean)


# ------------------------------------------------------------------ dates

_MONTHS = {
    name[:length]: str(number)
    for number, name in enumerate(
        ("january", "february", "march", "april", "may", "june", "july", "august", "september",
         "october", "november", "december"), 1,
    )
    for length in (3, 4, len(name))
}  # fmt: skip
_TIME = (
    r"(?:(?:[T ]|, ?)(?P<hour>[0-9]{1,2}):(?P<minute>[0-9]{2})(?::(?P<second>[0-9]{2})"
    r"(?:[.,](?P<fraction>[0-9]{1,9}))?)? ?(?:(?P<half>[AaPp])\.?[Mm]\.?)?"
    r" ?(?P<zone>Z|UTC|GMT|[-+][0-9]{2}(?::?[0-9]{2})?)?)?"
)
_YEAR, _WEEKDAY = r"(?P<year>[0-9]{4}|[0-9]{2})", r"(?:[A-Za-z]{3,9}\.?,? )?"
_DAY, _NAME = r"(?P<day>[0-9]{1,2})(?:st|nd|rd|th)?", r"(?P<month>[A-Za-z]{3,9})\.?"
_ISO = r"(?P<year>[0-9]{4})[-/.](?P<month>[0-9]{1,2})[-/.](?P<day>[0-9]{1,2})"
# 1001-2 is a part number
_MONTH = r"(?P<year>1[89][0-9]{2}|2[01][0-9]{2})[-/](?P<month>[0-9]{2})(?P<day>)"
_FORMS = [
    r"(?P<day>[0-9]{1,2})\.(?P<month>[0-9]{1,2})\.(?P<year>[0-9]{4})",
    r"(?P<day>[0-9]{2})\.(?P<month>[0-9]{2})\.(?P<year>[0-9]{2})",
    rf"{_WEEKDAY}{_DAY}(?:[-/ ]|\. ?){_NAME}[-/ ,]{{1,2}}{_YEAR}",
    rf"{_WEEKDAY}{_NAME} {_DAY},? (?P<year>[0-9]{{4}})",
]


def _patterns(day_first: bool) -> list[str]:
    first, second = ("day", "month") if day_first else ("month", "day")
    numeric = rf"(?P<{first}>[0-9]{{1,2}})[-/](?P<{second}>[0-9]{{1,2}})[-/]{_YEAR}"
    return [f"^{form}{_TIME}$" for form in (_ISO, _MONTH, numeric, *_FORMS)]


_PATTERNS = {day_first: _patterns(day_first) for day_first in (False, True)}


def dates(texts: pl.Series, *, day_first: bool) -> pl.Series:
    """Return the dates, with times where there are some, that texts stand for.

    Known are dates of ISO 8601; dates in numbers, whose order ``day_first`` gives; and dates with
    English names of months.  A time may follow, with seconds, AM or PM, and a zone, of which the
    result is in UTC.  Years of two digits are from 1969 to 2068.

    Parameters
    ----------
    texts : polars.Series of str
    day_first : bool
        Whether 03/04/2021 is the third of April, rather than the fourth of March.

    Returns
    -------
    polars.Series of datetime
        In microseconds, without a time zone.
    """
    found = pl.repeat(None, len(texts), dtype=pl.Datetime("us"), eager=True)
    if not texts.str.contains("[0-9]").any():
        return found.alias(texts.name)
    for pattern in _PATTERNS[day_first]:
        if found.null_count() == texts.null_count():
            break
        parts = texts.str.extract_groups(pattern).struct.unnest()
        if not parts["year"].is_null().all():
            found = found.zip_with(found.is_not_null(), _date(parts))
    return found.alias(texts.name)


def are_dates(texts: pl.Series) -> pl.Series:
    """Tell which texts are dates with one of the orders of day and month."""
    first, second = (dates(texts, day_first=first).is_not_null() for first in (False, True))
    return first | second


def dates_of_format(texts: pl.Series, format: str) -> pl.Series:
    """Return the dates that are written in a format, in the notation of `time.strptime`."""
    if "%H" in format and "%M" not in format:  # polars wants both
        texts, format = texts + ":00", format + ":%M"
    if "%z" in format.lower():
        found = texts.str.strptime(pl.Datetime("us", "UTC"), format, strict=False)
        return found.dt.replace_time_zone(None)
    return texts.str.strptime(pl.Datetime("us"), format, strict=False)


def _date(parts: pl.DataFrame) -> pl.Series:
    """Return the dates of a frame with the texts of their year, month, day and time."""
    year, month, hour = pl.col("year"), pl.col("month").str.to_lowercase(), pl.col("hour")
    late = pl.col("half").str.to_lowercase() == "p"
    twelve = hour.cast(pl.Int64)  # there is no 13:00 PM
    of_half = pl.when(twelve.is_between(1, 12)).then(twelve % 12 + late.cast(pl.Int64) * 12)
    zone = pl.col("zone").str.replace(":", "", literal=True)
    named = zone.str.contains("^[A-Z]")
    minutes = zone.str.slice(1, 2).cast(pl.Int64, strict=False) * 60 + zone.str.slice(3).cast(
        pl.Int64, strict=False
    ).fill_null(0)
    ahead = (
        pl.when(zone.is_null() | named)
        .then(0)
        .otherwise(minutes * pl.when(zone.str.starts_with("-")).then(-1).otherwise(1))
    )
    full = (
        pl.when(year.str.len_bytes() == 4).then(year)
        .otherwise(pl.when(year < "69").then(pl.lit("20") + year).otherwise(pl.lit("19") + year))
    )  # fmt: skip
    text = pl.format(
        "{}-{}-{} {}:{}:{}.{}",
        full,
        month.replace(_MONTHS),
        pl.col("day").replace("", "1"),
        pl.when(pl.col("half").is_null())
        .then(hour.fill_null("0"))
        .otherwise(of_half.cast(pl.String)),
        pl.col("minute").fill_null("0"),
        pl.col("second").fill_null("0"),
        pl.col("fraction").fill_null("0").str.slice(0, 6).str.pad_end(6, "0"),
    )
    # A day that does not exist, such as the thirtieth of February, is missing
    date = text.str.strptime(pl.Datetime("us"), "%Y-%m-%d %H:%M:%S%.6f", strict=False)
    return parts.select(date - pl.duration(minutes=ahead)).to_series()

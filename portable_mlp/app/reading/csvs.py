"""CSV files: what separates their fields, what names their columns, and their rows as texts."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from io import StringIO, TextIOWrapper
from itertools import pairwise
from pathlib import Path
from typing import IO, BinaryIO, NamedTuple

import polars as pl

from portable_mlp.app.reading.temporary import Place, Temporary
from portable_mlp.app.reading.texts import (
    MISSING,
    MISSING_VALUES,
    are_dates,
    are_numbers,
    booleans,
    clean,
)

_SEPARATORS = "\t;|,"  # the first of equals: a comma may be a decimal mark
_SAMPLE = 2**16  # bytes at the start of a file, or more if these hold no whole row
_ROWS = 100  # in the sample
_BLOCK = 2**22  # bytes that are parsed at a time
_LONGEST_ROW = 2**24


csv.field_size_limit(2**31 - 1)  # texts may be longer than the 131 072 characters of the default


class Hints(NamedTuple):
    """What is known about a file before it is read.

    Attributes
    ----------
    separator, header
        What the user says, see `Options`.
    target : str or None
        Name or position of the target; its name in the first row makes this the header.
    names : list of str or None
        The columns of the table that a model learned from, the target last.
    """

    separator: str | None = None
    header: bool | None = None
    target: str | None = None
    names: list[str] | None = None


@dataclass(frozen=True)
class Dialect:
    """How a CSV file is written.

    Attributes
    ----------
    separator : str
    skip : int
        Lines before the table.
    header : bool
        Whether the first row names the columns.
    columns : list of str
    spaced : bool
        Whether spaces stand between a separator and a quote, which polars does not read.
    note : str
        What is not obvious.
    """

    separator: str
    skip: int
    header: bool
    columns: list[str]
    spaced: bool = False
    note: str = ""


def find_dialect(path: Path, place: Place, hints: Hints) -> Dialect:
    """Find out how a file is written, from its first rows.

    Parameters
    ----------
    path : Path
        Name of the file in error messages.
    place : Place
        Path of the file's text in UTF-8.
    hints : Hints

    Raises
    ------
    ValueError
        If the file is empty, or its header names a column twice.
    """
    lines, header = _sample(place), hints.header
    skip, given = _preamble(lines)
    if not any(line.strip() for line in lines[skip:]) or not lines[skip].strip():
        raise ValueError(f"{path} is empty, or begins with an empty line")
    n_hashes = next((i for i, line in enumerate(lines[skip:]) if line[0] != "#"), 0)
    separator = hints.separator or given or _find_separator(lines[skip + n_hashes :])
    rows = _parsed(path, lines[skip + n_hashes :], separator)
    if n_hashes:
        # The last line behind a number sign is the header if it has as many fields as the rows
        last = _parsed(path, lines[skip + n_hashes - 1 : skip + n_hashes], separator)
        is_header = bool(rows) and len(last[0]) == len(rows[0]) > 1 and header is not False
        skip += n_hashes - is_header
        rows, header = (last + rows, True) if is_header else (rows, header)
    if not rows:
        raise ValueError(f"{path} has no rows")
    first = [field.strip() for field in rows[0]]
    if first[0].startswith("#"):
        first[0] = first[0].lstrip("# ")
    if header is None:
        header = _has_header(first, rows[1:], hints)
    note = ""
    if header:
        columns = named(path, first, hints.names)
    else:
        columns = positions(len(first), hints.names)
        if hints.names is None:
            note = f"{path} has no header: its first row is data (--header says otherwise)"
    spaced = any(re.search(rf"{re.escape(separator)} +\"", line) for line in lines)
    return Dialect(separator, skip, header, columns, spaced, note)


def are_positions(names: Sequence[str]) -> bool:
    """Tell whether columns are named by their positions."""
    return all(re.fullmatch(r"column_\d+", name) for name in names)


def positions(width: int, names: list[str] | None) -> list[str]:
    """Return names for ``width`` columns that have none.

    They are those of ``names`` without the last, the target, if these are positions and one
    more than the columns.
    """
    if names and are_positions(names) and width == len(names) - 1:
        return names[:-1]
    return [f"column_{i}" for i in range(width)]


def named(path: Path, first: list[str], names: list[str] | None) -> list[str]:
    """Return the names of columns; one without a name is called by its position.

    Raises
    ------
    ValueError
        If several have the same name.
    """
    first = [name.strip() for name in first]
    twice = [name for name, n in Counter(first).items() if n > 1 and name]
    if twice:
        at = ", ".join(str(i + 1) for i, name in enumerate(first) if name == twice[0])
        raise ValueError(
            f"{path} has several columns {twice[0]!r}, in places {at}: give each its own name"
        )
    if names and "" in names:  # a model of version 0.2
        return first
    own = []
    for i, name in enumerate(first):
        made_up = f"column_{i}"
        while not name and made_up in first:
            made_up += "_"
        own.append(name or made_up)
    return own


# ------------------------------------------------------------------ the first rows


def _sample(place: Place) -> list[str]:
    """Return the first lines of a file, with their ends."""
    size = _SAMPLE
    while True:
        with open(place, "rb") as file:
            data = file.read(size)
            more = bool(file.read(1))
        whole = data.rpartition(b"\n")[0] + b"\n" if more else data
        if not more or whole.count(b"\n") > 2:
            break
        size *= 8
    return list(StringIO(whole.decode("utf-8-sig", errors="replace"), newline=""))


def _preamble(lines: list[str]) -> tuple[int, str | None]:
    """Return the number of lines before the table, and the separator that Excel's line names."""
    if lines and (said := re.fullmatch(r"(?i)sep=(.)\s*", lines[0])):
        return 1, said[1]
    return 0, None


def _find_separator(lines: list[str]) -> str:
    """Return the separator by which most rows have as many fields as the first."""

    def quality(mark: str) -> tuple[float, int]:
        try:
            rows = _fields(lines, mark)
        except csv.Error:
            return 0.0, 0
        widths = [len(row) for row in rows if row]
        if not widths or widths[0] < 2:
            return 0.0, 0
        return widths.count(widths[0]) / len(widths), widths[0]

    found = max(_SEPARATORS, key=quality)
    return found if quality(found)[1] else ","


def _fields(lines: Sequence[str], separator: str) -> list[list[str]]:
    reader = csv.reader(iter(lines), delimiter=separator, skipinitialspace=True)
    return [row for row, _ in zip(reader, range(_ROWS), strict=False)]


def _parsed(path: Path, lines: list[str], separator: str) -> list[list[str]]:
    try:
        return [row for row in _fields(lines, separator) if row]
    except csv.Error as error:
        raise ValueError(f"{path}, line 1: {error}") from error


def _has_header(first: list[str], rows: list[list[str]], hints: Hints) -> bool:
    """Tell whether the first row names the columns."""
    target, names = hints.target, hints.names
    if names is not None:
        return not are_positions(names) or any(field in names for field in first)
    by_name = target is not None and not re.fullmatch(r"-?\d+", target)
    if by_name and (target in first or not are_positions([str(target)])):
        return True
    if _are_places(first):
        return True
    columns = [[row[i] for row in rows if len(row) == len(first)] for i in range(len(first))]
    values = zip(first, _are_values(first), strict=True)
    over = [is_value or field.lower() in MISSING for field, is_value in values]
    under = [_mostly_values(column) for column in columns]
    if any(below and not above for above, below in zip(over, under, strict=True)):
        return True
    if any(over):
        return _are_years([field for field, value in zip(first, over, strict=True) if value])
    # All is text: names of columns do not come again as values
    return not any(field and field in column for field, column in zip(first, columns, strict=True))


def _are_values(texts: list[str]) -> list[bool]:
    """Tell which texts are numbers, dates or booleans."""
    known = clean(pl.Series(texts, dtype=pl.String), MISSING + MISSING_VALUES)
    found = booleans(known).is_not_null() | are_numbers(known) | are_dates(known)
    return [bool(value) for value in found]


def _mostly_values(texts: list[str]) -> bool:
    """Tell whether nine in ten texts are numbers, dates or booleans."""
    if all(map(_is_plain_number, texts)):  # nearly always so, or not at all
        return bool(texts)
    known = clean(pl.Series(texts, dtype=pl.String), MISSING + MISSING_VALUES).drop_nulls()
    return len(known) > 0 and sum(_are_values(known.to_list())) >= 0.9 * len(known)


def _is_plain_number(text: str) -> bool:
    try:
        return float(text) == float(text)  # not NaN
    except ValueError:
        return False


def _are_places(first: list[str]) -> bool:
    """Tell whether fields are 0, 1, 2, …, but for the target: the names of an array's columns."""
    places = [field == str(i) for i, field in enumerate(first)]
    return len(first) > 2 and sum(places) >= len(first) - 1


def _are_years(numbers: list[str]) -> bool:
    """Tell whether numbers are years at equal distances, which name columns."""
    if len(numbers) < 2 or not all(re.fullmatch(r"[12]\d{3}", number) for number in numbers):
        return False
    steps = {int(b) - int(a) for a, b in pairwise(numbers)}
    return len(steps) == 1 and steps != {0}


# ------------------------------------------------------------------ all rows


class Rows:
    """The rows of a CSV file as texts.

    Parameters
    ----------
    path : Path
        Name of the file in error messages.
    place : Place
        Path of the file's text in UTF-8.
    dialect : Dialect
    """

    def __init__(self, path: Path, place: Place, dialect: Dialect) -> None:
        self._path = path
        self._place = place
        self._dialect = dialect
        self._height: int | None = None  # known once the rows were counted
        if dialect.spaced:
            self._rewrite()

    def batches(self, rows: int) -> Iterator[pl.DataFrame]:
        """Yield frames of at most ``rows`` rows.

        Raises
        ------
        ValueError
            If a row does not have as many fields as the first; the message names its line.
        """
        done = 0
        try:
            for part in self._parts(rows, done):
                done += part.height
                yield part
        except (pl.exceptions.PolarsError, _OddQuotes):
            if self._dialect.spaced:
                raise
            # Python's reader takes such quotes as they are, or names the line of the row at fault
            self._rewrite()
            yield from self._parts(rows, done)

    def _parts(self, rows: int, done: int) -> Iterator[pl.DataFrame]:
        before = done + self._dialect.header
        for frame, is_whole in _frames(self._place, self._dialect):
            # A row that is too short looks like one whose last values are missing
            if self._height is None and not is_whole and (frame[:, -1] == "").any():
                self._height = check_rows(self._path, self._place, self._dialect)
            part, before = frame.slice(before), max(0, before - frame.height)
            if self._height is not None:
                part = part.head(max(0, self._height - done))
            done += part.height
            yield from part.iter_slices(rows)

    def _rewrite(self) -> None:
        self._dialect = replace(self._dialect, spaced=True)
        self._height = check_rows(self._path, self._place, self._dialect)
        self._place = Temporary(partial(_rewrite, self._place, self._dialect))


def _frames(place: Place, dialect: Dialect) -> Iterator[tuple[pl.DataFrame, bool]]:
    """Yield the rows of a file, with its header, a block of text at a time.

    Each frame comes with True if no row is too short, and with False if that is not known.  Polars
    refuses rows that are too long.  So with the right number of separators, and without quotes,
    no row is too short.
    """
    schema, separator = dict.fromkeys(dialect.columns, pl.String), dialect.separator.encode()
    spaced = re.compile(re.escape(separator) + b' +"')
    with open(place, "rb") as file:
        for _ in range(dialect.skip):
            file.readline()
        for block in _blocks(file):
            if not dialect.spaced and spaced.search(block):
                raise _OddQuotes
            frame = pl.read_csv(
                block,
                separator=dialect.separator,
                has_header=False,
                schema=schema,
                empty_string_is_null=False,
            )
            n_separators = (frame.width - 1) * frame.height
            yield frame, b'"' not in block and block.count(separator) == n_separators


class _OddQuotes(Exception):
    """Quotes stand where polars does not expect them."""


def _blocks(file: BinaryIO) -> Iterator[bytes]:
    """Yield the text of a file in blocks of whole rows.

    A line feed ends a row if an even number of quotes stands before it.  A quote that is no
    bracket of a field would make the rest of the file one row: then this raises `_OddQuotes`.
    """
    block = b""
    while part := file.read(_BLOCK):
        block += part
        end = block.rfind(b"\n") + 1
        odd = block.count(b'"', 0, end) % 2
        while odd and end:
            last = block.rfind(b"\n", 0, end - 1) + 1
            odd ^= block.count(b'"', last, end) % 2
            end = last
        if end:
            yield block[:end]
            block = block[end:]
        elif len(block) > _LONGEST_ROW:
            raise _OddQuotes
    if block:
        yield block


def check_rows(path: Path, place: Place, dialect: Dialect) -> int:
    """Return the number of rows; raise a ValueError for one with another number of fields.

    Empty lines at the end are no rows.
    """
    width, n_rows, blank = len(dialect.columns), -1 if dialect.header else 0, None
    with open(place, "rb") as file:
        lines = _text_lines(path, file)
        for _ in range(dialect.skip):
            next(lines)
        reader = csv.reader(lines, delimiter=dialect.separator, skipinitialspace=dialect.spaced)
        try:
            for fields in reader:
                line = reader.line_num + dialect.skip
                if not fields and width > 1:
                    blank = blank or line
                    continue
                if blank or (fields and len(fields) != width):
                    line, found = (blank, 0) if blank else (line, len(fields))
                    raise ValueError(
                        f"{path}, line {line}: {found} fields, where the first line has {width}"
                    )
                n_rows += 1
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num + dialect.skip}: {error}") from error
    return n_rows


def _text_lines(path: Path, file: BinaryIO) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            byte = line[error.start]
            raise ValueError(
                f"{path}, line {number}: byte 0x{byte:02x} is not UTF-8 text; save it as UTF-8"
            ) from error


def _rewrite(place: Place, dialect: Dialect, file: IO[bytes]) -> None:
    """Write the rows of a file, with quotes where they have to be."""
    with open(place, encoding="utf-8-sig", newline="") as lines:
        for _ in range(dialect.skip):
            file.write(next(lines).encode())
        text = TextIOWrapper(file, encoding="utf-8", newline="")
        writer = csv.writer(text, delimiter=dialect.separator, lineterminator="\n")
        writer.writerows(csv.reader(lines, delimiter=dialect.separator, skipinitialspace=True))
        text.detach()

"""Reading of tables, from files or bundled data sets, as rows and a target."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from difflib import get_close_matches
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO
from zipfile import BadZipFile, is_zipfile

import numpy as np
from numpy.lib.format import MAGIC_PREFIX
from numpy.typing import NDArray

_MISSING = ["", "?", "NA", "N/A", "#N/A", "NaN", "nan", "null", "NULL"]
_AT_ONCE = 2**17  # rows per block when a file that is read as a whole is checked
_ARRAYS = (".npy", ".npz")

BUNDLED = ("digits", "breast_cancer", "iris", "wine", "diabetes")
"""Data sets that come with scikit-learn; the last is for regression, the others have classes."""

PENGUINS = Path(__file__).with_name("penguins.csv")
"""Penguins of three species; the target is their sex (Gorman et al. 2014).

Source: doi:10.1371/journal.pone.0090081, by way of the palmerpenguins package; CC0.  The table
has numbers, text, booleans, dates and missing values.
"""


def load_bundled(name: str) -> tuple[Any, NDArray[Any]]:
    """Return a data set of `BUNDLED` as (X, y)."""
    import sklearn.datasets

    X, y = getattr(sklearn.datasets, f"load_{name}")(return_X_y=True)
    return X, y


def bundled_table(name: str) -> Any:
    """Return a data set of `BUNDLED`, or `PENGUINS`, as a frame whose last column is the target."""
    if name == PENGUINS.stem:
        return read_table([PENGUINS])
    import sklearn.datasets

    pl = _polars()
    data = getattr(sklearn.datasets, f"load_{name}")()
    frame = pl.DataFrame(np.asarray(data.data), schema=list(map(str, data.feature_names)))
    target = data.target_names[data.target] if "target_names" in data else data.target
    return frame.with_columns(pl.Series("target", target.tolist()))


def is_array_file(path: Path) -> bool:
    """Tell, by its suffix, whether a file holds arrays, whose columns have no names."""
    return path.suffix.lower() in _ARRAYS


def read_table(paths: Sequence[Path], target: str = "-1") -> Any:
    """Read all rows of one or more files into a table.

    The suffix tells whether a file is Parquet (``.parquet``, ``.pq``) or holds NumPy arrays
    (``.npy``, ``.npz``; the content tells which of the two).  Any other file is CSV.  Its
    separator is the comma, semicolon or tab, whichever is most frequent in the first line.  The
    first line is a header unless all its fields other than the target's are numbers.  Empty
    fields and ?, NA, N/A, #N/A, NaN, nan, null, NULL are missing values.  The columns of a CSV
    file without header and of an ``.npy`` array are called column_0, column_1, …  Those of an
    ``.npz`` file take the array's name: X_0, X_1, … for a matrix X.

    Parameters
    ----------
    paths : sequence of path
        Files with the same columns, in any order.
    target : str, default="-1"
        Name or position of the target; used to tell a header from a row of numbers.

    Returns
    -------
    polars.DataFrame

    Raises
    ------
    ValueError
        If a file is empty or malformed, or its columns are not those of the first.
    FileNotFoundError
        If a file does not exist.
    """
    pl = _polars()
    frames: list[Any] = []
    for path in map(Path, paths):
        parts = list(_parts(path, None, target, None, {}))
        if not parts or not parts[0].height:
            raise ValueError(f"{path} has a header and no rows")
        frame = pl.concat(parts)
        if frames:
            check_columns(path, frames[0].columns, frame.columns)
            frame = frame.select(frames[0].columns)
        empty = [c.name for c in frame.select(pl.col(pl.String)) if c.null_count() == len(c)]
        # Another file may give such a column any type
        frames.append(frame.cast(dict.fromkeys(empty, pl.Null)))
    try:
        return plain_types(pl.concat(frames, how="vertical_relaxed"))
    except pl.exceptions.PolarsError as error:
        named = ", ".join(map(str, paths))
        raise ValueError(f"{named}: columns of the same name differ in type: {error}") from error


def read_chunks(
    paths: Sequence[Path], kinds: dict[str, str], rows: int | None, known: Sequence[str] = ()
) -> Iterator[Any]:
    """Yield the columns that a model takes, in chunks of rows.

    Only one chunk is in memory at a time; an ``.npz`` file has to be read as a whole.

    Parameters
    ----------
    paths : sequence of path
        Files to read one after the other.
    kinds : dict
        Map from the columns' names to their kinds, see `portable_mlp.preprocessing.KINDS`.
    rows : int or None
        Largest number of rows in a chunk; None for a chunk per file.
    known : sequence of str
        All columns of the table that the model was trained on, the target last.  Errors do
        not list these as extra.  In tables whose columns are named by position, the target
        may be absent.

    Yields
    ------
    polars.DataFrame

    Raises
    ------
    ValueError
        If columns are missing (the message also lists the extra ones), or hold values of
        another kind.
    FileNotFoundError
        If a file does not exist.
    """
    from portable_mlp.preprocessing import KINDS

    pl = _polars()
    types = {name: KINDS[kind] for name, kind in kinds.items()}
    for path in map(Path, paths):
        for frame in _parts(path, rows, None, list(known or kinds), types):
            check_columns(path, list(kinds), frame.columns, [*kinds, *known])
            try:
                yield plain_types(frame.select(list(kinds))).cast(types)
            except pl.exceptions.PolarsError as error:
                raise ValueError(f"{path} is not what the model learned from: {error}") from error


def split_target(frame: Any, target: str, source: str) -> tuple[Any, NDArray[Any], str]:
    """Split a table into the target column and the others.

    Parameters
    ----------
    frame : polars.DataFrame
    target : str
        Name of the target's column, or its position (from the end if negative).
    source : str
        Name of the table in error messages.

    Returns
    -------
    X : polars.DataFrame
    y : ndarray (n_samples,)
    name : str

    Raises
    ------
    ValueError
        If there is no such column or no other, or if its values are missing, not finite, or
        neither labels nor numbers.
    """
    name = find_column(frame.columns, target, source)
    if frame.width < 2:
        raise ValueError(
            f"{source} holds the target {name!r} alone: there is nothing to learn from"
        )
    y = frame[name]
    if y.null_count():
        raise ValueError(f"{source}: the target {name!r} is missing in {y.null_count()} rows")
    if y.dtype.is_float() and not y.is_finite().all():
        raise ValueError(f"{source}: the target {name!r} has values that are not finite")
    if y.dtype.is_temporal() or y.dtype.is_nested():
        raise ValueError(f"{source}: the target {name!r} is neither labels nor numbers: {y.dtype}")
    values: NDArray[Any] = y.to_numpy()
    if values.dtype.kind == "O":
        values = values.astype(str)
    return frame.drop(name), values, name


def find_column(names: Sequence[str], wanted: str, source: str) -> str:
    """Return the name of the column that ``wanted`` gives by name or position.

    Raises
    ------
    ValueError
        If there is no such column; the message suggests similar names.
    """
    if wanted in names:
        return wanted
    if re.fullmatch(r"-?\d+", wanted):
        if -len(names) <= int(wanted) < len(names):
            return names[int(wanted)]
        raise ValueError(f"{source} has {len(names)} columns; there is no column {wanted}")
    near = get_close_matches(wanted, names)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    raise ValueError(f"{source} has no column {wanted!r}; it has: {_listed(names)}.{hint}")


def check_columns(
    path: Path, expected: Sequence[str], found: Sequence[str], known: Sequence[str] | None = None
) -> None:
    """Raise a ValueError that lists missing and extra columns, if there are any.

    With ``known``, the columns that a table may have, extra columns alone are not an error.
    """
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in (known or expected)]
    if not missing and (known is not None or not extra):
        return
    said = [f"missing: {_listed(missing)}"] if missing else []
    said += [f"extra: {_listed(extra)}"] if extra else []
    raise ValueError(f"{path} has other columns than expected; {'; '.join(said)}")


def plain_types(frame: Any) -> Any:
    """Convert decimals to floats, categories to text, times to UTC, and NaN to missing values."""
    pl = _polars()
    plain = {pl.Decimal: pl.Float64, pl.Categorical: pl.String, pl.Enum: pl.String}
    plain |= {pl.Datetime: pl.Datetime}  # without a time zone
    return frame.cast({name: plain[t.base_type()] for name, t in frame.schema.items()
                       if t.base_type() in plain}).fill_nan(None)  # fmt: skip


def read_csv(path: str | Path, target: str | int = -1) -> tuple[Any, NDArray[Any]]:
    """Read a CSV file and split off the target column.

    Parameters
    ----------
    path : path
    target : str or int, default=-1
        Name of the target's column, or its position (from the end if negative).

    Returns
    -------
    X : polars.DataFrame
    y : ndarray (n_samples,)

    Raises
    ------
    ValueError
        If the file is empty or malformed, or has no such column or no other.
    FileNotFoundError
        If the file does not exist.
    """
    X, y, _ = split_target(read_table([Path(path)], str(target)), str(target), str(path))
    return X, y


# ------------------------------------------------------------------ files


def _parts(
    path: Path,
    rows: int | None,
    target: str | None,
    names: list[str] | None,
    types: dict[str, Any],
) -> Iterator[Any]:
    """Yield a file's rows as frames of at most ``rows`` rows; as one if that is None."""
    pl = _polars()
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    suffix = path.suffix.lower()
    try:
        if suffix in (".parquet", ".pq"):
            yield from _parquet_parts(path, rows)
        elif suffix in _ARRAYS:
            yield from _array_parts(path, rows, names)
        else:
            yield from _csv_parts(path, rows, target, names, types)
    except pl.exceptions.PolarsError as error:
        raise ValueError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error


def _parquet_parts(path: Path, rows: int | None) -> Iterator[Any]:
    lazy = _polars().scan_parquet(path)
    height = lazy.select(_polars().len()).collect().item()
    for start in range(0, height, rows or max(height, 1)):
        yield lazy.slice(start, rows).collect()


def _array_parts(path: Path, rows: int | None, names: list[str] | None) -> Iterator[Any]:
    try:
        with open(path, "rb") as file:
            magic = file.read(len(MAGIC_PREFIX))
        if magic != MAGIC_PREFIX and not is_zipfile(path):
            raise ValueError("it is not one of NumPy's files")
        loaded: Any = np.load(path, mmap_mode="r", allow_pickle=False)
        columns: dict[str, NDArray[Any]] = {}
        for name, array in {"": loaded}.items() if magic == MAGIC_PREFIX else loaded.items():
            if array.ndim not in (1, 2):
                raise ValueError(f"its array {name} has {array.ndim} dimensions")
            if array.ndim == 1:
                columns[name or "column_0"] = array
            else:
                made_up = [f"{name}_{i}" for i in range(array.shape[1])]
                own = made_up if name else _positions(array.shape[1], names)
                columns |= dict(zip(own, array.T, strict=True))
    except (ValueError, EOFError, BadZipFile) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    lengths = {len(array) for array in columns.values()}
    if len(lengths) != 1:
        raise ValueError(f"{path} holds arrays of different lengths: {sorted(lengths)}")
    (height,) = lengths
    for start in range(0, height, rows or max(height, 1)):
        part = slice(start, start + (rows or height))
        yield _polars().DataFrame({k: np.ascontiguousarray(a[part]) for k, a in columns.items()})


def _csv_parts(
    path: Path,
    rows: int | None,
    target: str | None,
    names: list[str] | None,
    types: dict[str, Any],
) -> Iterator[Any]:
    pl = _polars()
    first, separator = _first_line(path)
    header = _has_header(first, target, names)

    columns = None if header else _positions(len(first), names)

    def parse(source: Any, has_header: bool) -> Any:
        return pl.read_csv(
            source,
            separator=separator,
            has_header=has_header,
            new_columns=columns,
            null_values=_MISSING,
            infer_schema_length=0 if types else None,
            schema_overrides=types,
        )

    blocks = _checked_blocks(path, separator, len(first), header, rows or _AT_ONCE)
    if rows is None:
        height = sum(n for _, n in blocks)
        frame = parse(path, header).head(height)  # polars also reads empty lines at the end
        yield frame if types else _with_dates(path, frame)
        return
    for number, (block, _) in enumerate(blocks):
        frame = parse(BytesIO(block), header and number == 0)
        columns = frame.columns
        if frame.height:
            yield frame


def _with_dates(path: Path, frame: Any) -> Any:
    """Return the frame with columns of text that holds only dates converted to dates.

    Raises
    ------
    ValueError
        If a column holds numbers with spaces or decimal commas, which polars reads as text.
    """
    pl = _polars()
    for column in frame.select(pl.col(pl.String)):
        if column.null_count() == len(column):
            continue
        plain = column.str.strip_chars().str.replace(",", ".", literal=True)
        numbers = plain.cast(pl.Float64, strict=False).null_count() == column.null_count()
        if numbers and (plain != column).any():
            raise ValueError(
                f"{path}: column {column.name!r} has numbers with spaces or decimal commas, such"
                f" as {column.filter(plain != column)[0]!r}: write them as 1.5"
            )
        with suppress(pl.exceptions.PolarsError):
            frame = frame.with_columns(column.str.to_datetime())
    return frame


def _first_line(path: Path) -> tuple[list[str], str]:
    """Return the fields of the first line, and the character that separates them."""
    with open(path, "rb") as file:
        lines = _text_lines(path, file)
        line = next(lines, "")
        if not line.strip():
            raise ValueError(f"{path} is empty, or begins with an empty line")
        separator = max(",;\t", key=re.sub(r'"[^"]*("|$)', "", line).count)  # outside quotes
        try:
            return next(csv.reader(chain([line], lines), delimiter=separator)), separator
        except csv.Error as error:
            raise ValueError(f"{path}, line 1: {error}") from error


def _are_positions(names: list[str]) -> bool:
    return all(re.fullmatch(r"column_\d+", name) for name in names)


def _positions(width: int, names: list[str] | None) -> list[str]:
    """Return names for ``width`` columns that have none.

    They are those of ``names`` without the last, the target, if these are positions and one
    more than the columns.
    """
    if names and _are_positions(names) and width == len(names) - 1:
        return names[:-1]
    return [f"column_{i}" for i in range(width)]


def _has_header(first: list[str], target: str | None, names: list[str] | None) -> bool:
    if names is not None:
        return not _are_positions(names) or any(field in names for field in first)
    if target is None or not re.fullmatch(r"-?\d+", target):
        return True
    position = int(target) % len(first) if -len(first) <= int(target) < len(first) else None
    return not all(_is_number(field) for i, field in enumerate(first) if i != position)


def _checked_blocks(
    path: Path, separator: str, width: int, header: bool, rows: int
) -> Iterator[tuple[bytes, int]]:
    """Yield blocks of the text of ``rows`` rows each, and the number of rows of each block.

    Raise a ValueError for a row that does not have as many fields as the first line.  Polars
    would fill a short row with missing values, and would not say where a long one is.  Empty
    lines at the end are left out.
    """
    lines: list[str] = []
    n_rows, blank = -1 if header else 0, None

    def keep(text: Iterable[str]) -> Iterator[str]:
        for line in text:
            lines.append(line)
            yield line

    with open(path, "rb") as file:
        reader = csv.reader(keep(_text_lines(path, file)), delimiter=separator)
        try:
            for fields in reader:
                if not fields and width > 1:
                    blank = blank or reader.line_num
                    continue
                if blank or (fields and len(fields) != width):
                    line, found = (blank, 0) if blank else (reader.line_num, len(fields))
                    raise ValueError(
                        f"{path}, line {line}: {found} fields, where the first line has {width}"
                    )
                n_rows += 1
                if n_rows == rows:
                    yield "".join(lines).encode(), n_rows
                    lines.clear()
                    n_rows = 0
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: {error}") from error
    text = "".join(lines)
    if text := text.rstrip("\r\n") if width > 1 else text:
        yield text.encode(), n_rows


def _text_lines(path: Path, file: BinaryIO) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            byte = line[error.start]
            raise ValueError(
                f"{path}, line {number}: byte 0x{byte:02x} is not UTF-8 text; save it as UTF-8"
            ) from error


def _is_number(field: str) -> bool:
    try:
        float(field or "nan")
    except ValueError:
        return False
    return True


def _listed(names: Sequence[str], at_most: int = 20) -> str:
    more = f" and {len(names) - at_most} more" if len(names) > at_most else ""
    return ", ".join(names[:at_most]) + more


def _polars() -> Any:
    try:
        import polars
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "reading tables needs polars: pip install 'portable_mlp[cli]'"
        ) from error
    return polars

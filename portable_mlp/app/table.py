"""Tables: all rows of files as a frame with a reading, rows in chunks, bundled data sets."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from portable_mlp.app.reading.columns import Reading
    from portable_mlp.app.reading.options import Options

BUNDLED = ("digits", "breast_cancer", "iris", "wine", "diabetes")
"""Data sets that come with scikit-learn; the last is for regression, the others have classes."""

PENGUINS = Path(__file__).with_name("penguins.csv")
"""Penguins of three species; the target is their sex (Gorman et al. 2014).

Source: doi:10.1371/journal.pone.0090081, by way of the palmerpenguins package; CC0.  The table
has numbers, text, booleans, dates and missing values.
"""


class Table(NamedTuple):
    """A table, and how it was read.

    Attributes
    ----------
    frame : polars.DataFrame
        Its types are those of `portable_mlp.preprocessing.KINDS`.
    reading : Reading
    dropped : dict
        From the names of columns that are left out to the reasons.
    by_name : bool
        Whether a model finds the columns by name; those of arrays have positions.
    said : dict
        Kinds that the user says, by the names of the columns.
    notes : list of str
        What is not obvious about the files.
    """

    frame: Any
    reading: Reading
    dropped: dict[str, str]
    by_name: bool
    said: dict[str, str]
    notes: list[str]


def load_bundled(name: str) -> tuple[Any, NDArray[Any]]:
    """Return a data set of `BUNDLED` as (X, y)."""
    import sklearn.datasets

    X, y = getattr(sklearn.datasets, f"load_{name}")(return_X_y=True)
    return X, y


def bundled_table(name: str, options: Options | None = None) -> Table:
    """Return a data set of `BUNDLED`, or `PENGUINS`, as a table whose last column is the target."""
    if name == PENGUINS.stem:
        return read_table([PENGUINS], options=options)
    import sklearn.datasets

    pl = _polars()
    data = getattr(sklearn.datasets, f"load_{name}")()
    frame = pl.DataFrame(np.asarray(data.data), schema=list(map(str, data.feature_names)))
    target = data.target_names[data.target] if "target_names" in data else data.target
    frame = frame.with_columns(pl.Series("target", target.tolist()))
    from portable_mlp.app.reading.files import File

    whole = File(Path(name), frame.columns, False, frame.iter_slices)
    return _read([whole], "-1", _options(options))


def read_table(
    paths: Sequence[Path],
    target: str = "-1",
    options: Options | None = None,
    order: Callable[[Path], Any] | None = None,
) -> Table:
    """Read all rows of one or more files into a table.

    The content of a file tells what it is: CSV, Parquet, Arrow, arrays of NumPy's, Excel, or one
    of these compressed.  The columns of a CSV file without header and of an ``.npy`` array are
    called column_0, column_1, …  Those of an ``.npz`` file take the array's name: X_0, X_1, …
    for a matrix X.

    What a column is, is decided over the values of all files together.  The order of the files
    changes no more than the order of the rows.

    Parameters
    ----------
    paths : sequence of path
        Files with the same columns, in any order.
    target : str, default="-1"
        Name or position of the target; its name in the first row makes this the header.
    options : Options, optional
        What is known about the table.
    order : callable, optional
        Key of a file, by which the files are sorted before their rows are read.

    Returns
    -------
    Table

    Raises
    ------
    ValueError
        If a file is empty or malformed, or its columns are not those of the first.
    FileNotFoundError
        If a file does not exist.
    """
    _polars()
    from portable_mlp.app.reading.csvs import Hints
    from portable_mlp.app.reading.files import open_file

    options = _options(options)

    def opened(path: Path, header: bool | None) -> Any:
        return open_file(path, Hints(options.separator, header, target))

    files = [opened(path, options.header) for path in map(Path, paths)]
    if options.header is None and len({file.header for file in files} - {None}) == 2:
        # A header is seen more easily in one file than in another
        files = [opened(file.path, None if file.header is None else True) for file in files]
    return _read(files, target, options, order)


def _read(
    files: list[Any],
    target: str,
    options: Options,
    order: Callable[[Path], Any] | None = None,
) -> Table:
    pl = _polars()
    from portable_mlp.app.reading.decisions import Evidence, decide

    names = files[0].columns
    for file in files[1:]:
        check_columns(file.path, names, file.columns)
    if order is not None:
        files = sorted(files, key=lambda file: order(file.path))
        names = files[0].columns
    source = ", ".join(str(file.path) for file in files)
    targets = {find_column(file.columns, target, str(file.path)) for file in files}
    if len(targets) > 1:
        raise ValueError(
            f"--target {target} is {' or '.join(sorted(map(repr, targets)))}, for the columns of"
            " the files are in different orders: give its name"
        )
    said = {find_column(names, name, source): kind for name, kind in options.columns.items()}
    dropped = {find_column(names, name, source): "--drop" for name in options.drop}
    dropped |= {name: "--column" for name, kind in said.items() if kind == "drop"}
    kinds = {name: kind for name, kind in said.items() if kind != "drop"}
    if not targets.isdisjoint(dropped):
        raise ValueError(f"the target {targets.pop()!r} cannot be dropped")
    by_name = all(file.by_name for file in files)
    # A model finds the columns of an array by their positions, so all stay
    kept = [name for name in names if name not in dropped or not by_name]
    found = {name: Evidence(name, options) for name in kept}
    for file in files:
        n_rows = 0
        for batch in file.batches():
            n_rows += batch.height
            for name, evidence in found.items():
                evidence.add(batch[name])
        if not n_rows:
            raise ValueError(f"{file.path} has a header and no rows")
    semicolons = {file.separator for file in files} == {";"}
    reading = decide(found, replace(options, columns=kinds), comma=semicolons)
    reading = replace(reading, names=tuple(names))
    frames = [frame for file in files for frame in _chunks(file, reading, None)]
    notes = [file.note for file in files if file.note]
    return Table(pl.concat(frames), reading, dropped, by_name, kinds, notes)


def _chunks(file: Any, reading: Reading, rows: int | None) -> Iterator[Any]:
    from portable_mlp.app.reading.files import AT_ONCE

    row = 1
    for batch in file.batches(rows or AT_ONCE):
        yield reading.apply(batch, str(file.path), row)
        row += batch.height


def read_chunks(
    paths: Sequence[Path], reading: Reading, rows: int | None, known: Sequence[str] = ()
) -> Iterator[Any]:
    """Yield the columns that a model takes, in chunks of rows.

    Only one chunk is in memory at a time; an ``.npz`` file has to be read as a whole.

    Parameters
    ----------
    paths : sequence of path
        Files to read one after the other.
    reading : Reading
        How to read the columns that are wanted.
    rows : int or None
        Largest number of rows in a chunk; None for a default.
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
    from portable_mlp.app.reading.csvs import Hints
    from portable_mlp.app.reading.files import open_file

    wanted = list(reading.columns)
    hints = Hints(reading.separator, reading.header, names=list(known or wanted))
    for path in map(Path, paths):
        file = open_file(path, hints)
        check_columns(path, wanted, file.columns, [*wanted, *known])
        yield from _chunks(file, reading, rows)


def split_target(
    frame: Any, target: str, source: str, *, whole: bool = False
) -> tuple[Any, NDArray[Any], str]:
    """Split a table into the target column and the others, in the rows that have a target.

    Parameters
    ----------
    frame : polars.DataFrame
    target : str
        Name of the target's column, or its position (from the end if negative).
    source : str
        Name of the table in error messages.
    whole : bool, default=False
        Whether the target's numbers are whole, see `Column`.

    Returns
    -------
    X : polars.DataFrame
    y : ndarray (n_samples,)
        Integers, floats, booleans or text.
    name : str

    Raises
    ------
    ValueError
        If there is no such column or no other, if no row has a target, or if its values are
        neither labels nor numbers.
    """
    pl = _polars()
    name = find_column(frame.columns, target, source)
    if frame.width < 2:
        raise ValueError(
            f"{source} holds the target {name!r} alone: there is nothing to learn from"
        )
    frame = frame.filter(pl.col(name).is_not_null())
    y = frame[name]
    if y.is_empty():
        raise ValueError(f"{source}: the target {name!r} is missing in all rows")
    if y.dtype.is_temporal():
        raise ValueError(
            f"{source}: the target {name!r} holds dates, which are neither labels nor numbers"
            f" (--column {name}=category makes them labels)"
        )
    if whole and y.dtype.is_float() and (y.floor() == y).all():
        y = y.cast(pl.Int64)
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


def read_csv(path: str | Path, target: str | int = -1) -> tuple[Any, NDArray[Any]]:
    """Read a table's file and split off the target column, in the rows that have a target.

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
    frame, reading, *_ = read_table([Path(path)], str(target))
    name = find_column(frame.columns, str(target), str(path))
    X, y, _ = split_target(frame, name, str(path), whole=reading.columns[name].whole)
    if n_missing := frame[name].null_count():
        warnings.warn(f"{path}: rows without a target, left out: {n_missing}", stacklevel=2)
    return X, y


def _options(options: Options | None) -> Options:
    from portable_mlp.app.reading.options import Options

    return options or Options()


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

"""Files of tables: what a file is, told by its content, and its rows in batches.

A CSV file is read as texts.  A Parquet, Arrow, NumPy or Excel file has columns of its own types.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any
from zipfile import BadZipFile, ZipFile

import numpy as np
import polars as pl
from numpy.lib.format import MAGIC_PREFIX
from numpy.typing import NDArray

from portable_mlp.app.reading.csvs import Hints, Rows, find_dialect, named, positions
from portable_mlp.app.reading.temporary import Place, Temporary

AT_ONCE = 2**17
"""Rows in a batch of a file that is read as a whole."""

_PROMISED = {".npy": "npy", ".npz": "npz", ".parquet": "parquet", ".pq": "parquet", ".xlsx": "xlsx"}
_MAGIC = {
    "parquet": b"PAR1",
    "arrow": b"ARROW1",
    "npy": MAGIC_PREFIX,
    "zip": b"PK\x03\x04",
    "gzip": b"\x1f\x8b",
    "zstd": b"\x28\xb5\x2f\xfd",
    "bzip2": b"BZh",
    "xz": b"\xfd7zXZ\x00",
}
_FOREIGN = [
    (b"SQLite format 3", "a SQLite database"),
    (b"\x89HDF", "an HDF5 file"),
    (b"%PDF", "a PDF document"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an Excel file of the old format (.xls)"),
    (b"Obj\x01", "an Avro file"),
    (b"\x80\x04", "a pickle of Python's"),
    (b"\x80\x05", "a pickle of Python's"),
    (b"RDX2\n", "an RData file of R's"),
    (b"RDX3\n", "an RData file of R's"),
    (b"<!DOCTYPE", "a web page"),
    (b"<!doctype", "a web page"),
    (b"<html", "a web page"),
    (b"<HTML", "a web page"),
    (b"<?xml", "an XML document"),
    (b"MATLAB 5.0", "a file of MATLAB's"),
    (b"<stata_dta>", "a Stata file"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
]
_ENCODINGS = {
    b"\xff\xfe\x00\x00": "utf-32",
    b"\x00\x00\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}


@dataclass
class File:
    """A table's file, opened.

    Attributes
    ----------
    path : Path
        As the user gave it.
    columns : list of str
    by_name : bool
        Whether a model finds the columns by name; those of arrays have positions.
    separator : str or None
        What separates the fields of a CSV file.
    header : bool or None
        Whether the first row of a CSV file names the columns.
    note : str
        What is not obvious about the file.
    """

    path: Path
    columns: list[str]
    by_name: bool
    _batches: Callable[[int], Iterator[pl.DataFrame]] = field(repr=False)
    separator: str | None = None
    header: bool | None = None
    note: str = ""

    def batches(self, rows: int = AT_ONCE) -> Iterator[pl.DataFrame]:
        """Yield the rows in frames of at most ``rows`` rows; raise a ValueError for a bad file."""
        try:
            yield from self._batches(rows)
        except pl.exceptions.PolarsError as error:
            raise _unreadable(self.path, error) from error


def open_file(path: Path, hints: Hints) -> File:
    """Open a file, and find out what it is.

    Parameters
    ----------
    path : Path
    hints : Hints

    Raises
    ------
    ValueError
        If the file is empty, damaged, or not a table; the message says what it is.
    FileNotFoundError
        If there is no such file.
    ModuleNotFoundError
        If a library that reads the format is not installed.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name its files")
    try:
        kind = what_is(path)
        if kind == "parquet":
            return _lazy(path, pl.scan_parquet(path), hints.names)
        if kind == "arrow":
            return _lazy(path, pl.scan_ipc(path), hints.names)
        if kind == "xlsx":
            return _excel(path, hints)
        if kind in ("npy", "npz"):
            return _arrays(path, kind, hints.names)
        return _text(path, _as_utf8(path, kind), hints)
    except pl.exceptions.PolarsError as error:
        raise _unreadable(path, error) from error


def what_is(path: Path) -> str:
    """Return what a file is by its first bytes: a key of `_MAGIC`, npz, xlsx, or "text".

    Raises
    ------
    ValueError
        If it is something that is not read here, or not what its name promises.
    """
    with open(path, "rb") as file:
        start = file.read(64)
    kind = next((kind for kind, magic in _MAGIC.items() if start.startswith(magic)), "text")
    if kind == "zip":
        with _opened_zip(path) as archive:
            members = archive.namelist()
        if "[Content_Types].xml" in members:
            kind = "xlsx"
        elif members and all(name.endswith(".npy") for name in members):
            kind = "npz"
    promised = _PROMISED.get(path.suffix.lower())
    if kind == "parquet" and promised != "parquet" and not _ends_with(path, b"PAR1"):
        kind = "text"  # the name of a column
    if kind in ("text", "zip") and promised is not None:
        what = {"parquet": "a Parquet file", "xlsx": "an Excel file"}.get(
            promised, "one of NumPy's files"
        )
        raise ValueError(f"{path} cannot be read: it is not {what}")
    for magic, foreign in _FOREIGN:
        if start.startswith(magic):
            raise ValueError(
                f"{path} is {foreign}: write its table as CSV or Parquet, and take that"
            )
    if kind == "text" and start.lstrip()[:2] in (b'{"', b"[{"):
        raise ValueError(f"{path} is JSON: write its table as CSV or Parquet, and take that")
    return kind


def _ends_with(path: Path, magic: bytes) -> bool:
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - len(magic)))
        return file.read() == magic


def _unreadable(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} cannot be read: {str(error).splitlines()[0]}")


def _opened_zip(path: Path) -> ZipFile:
    try:
        return ZipFile(path)
    except BadZipFile as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


# ------------------------------------------------------------------ files with types


def _lazy(path: Path, lazy: pl.LazyFrame, names: list[str] | None) -> File:
    height = lazy.select(pl.len()).collect().item()
    own = lazy.collect_schema().names()
    columns = named(path, own, names)
    lazy = lazy.rename(dict(zip(own, columns, strict=True)))

    def batches(rows: int) -> Iterator[pl.DataFrame]:
        for start in range(0, height, rows):
            yield lazy.slice(start, rows).collect()

    return File(path, columns, True, batches)


def _excel(path: Path, hints: Hints) -> File:
    header = hints.header is not False
    try:
        frame = pl.read_excel(path, engine="calamine", has_header=header, infer_schema_length=None)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{path} is an Excel file, for which fastexcel is needed:"
            " pip install 'portable_mlp[excel]'"
        ) from error
    except Exception as error:  # fastexcel has exceptions of its own
        raise ValueError(f"{path} cannot be read as an Excel file: {error}") from error
    own = ["" if name.startswith("__UNNAMED__") else name for name in frame.columns]
    columns = named(path, own, hints.names) if header else positions(len(own), hints.names)
    frame.columns = columns
    return File(path, columns, True, lambda rows: iter(frame.iter_slices(rows)))


def _arrays(path: Path, kind: str, names: list[str] | None) -> File:
    try:
        loaded: Any = np.load(path, mmap_mode="r", allow_pickle=False)
        columns: dict[str, NDArray[Any]] = {}
        for name, array in {"": loaded}.items() if kind == "npy" else loaded.items():
            if array.ndim not in (1, 2):
                raise ValueError(f"its array {name} has {array.ndim} dimensions")
            if array.ndim == 1:
                own, parts = [name or "column_0"], [array]
            else:
                made_up = [f"{name}_{i}" for i in range(array.shape[1])]
                own, parts = made_up if name else positions(array.shape[1], names), array.T
            if twice := columns.keys() & own:
                raise ValueError(f"several of its columns would be called {min(twice)}")
            columns |= dict(zip(own, parts, strict=True))
    except (ValueError, EOFError, BadZipFile) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    lengths = {len(array) for array in columns.values()}
    if len(lengths) != 1:
        raise ValueError(f"{path} holds arrays of different lengths: {sorted(lengths)}")
    (height,) = lengths

    def batches(rows: int) -> Iterator[pl.DataFrame]:
        for start in range(0, height, rows):
            part = slice(start, start + rows)
            yield pl.DataFrame({k: np.ascontiguousarray(a[part]) for k, a in columns.items()})

    return File(path, list(columns), False, batches)


# ------------------------------------------------------------------ texts


def _text(path: Path, place: Place, hints: Hints) -> File:
    dialect = find_dialect(path, place, hints)
    batches = Rows(path, place, dialect).batches
    return File(
        path, dialect.columns, True, batches, dialect.separator, dialect.header, dialect.note
    )


def _as_utf8(path: Path, kind: str) -> Place:
    """Return the path of a file's text in UTF-8, with lines that end in a line feed.

    It is the file itself where that is so, and a temporary file otherwise.
    """
    place: Place = path if kind == "text" else Temporary(partial(_unpack, path, kind))
    start = _start(place)
    encoding = next((name for mark, name in _ENCODINGS.items() if start.startswith(mark)), None)
    if encoding is not None:
        place = Temporary(partial(_transcode, path, place, encoding))
    start = _start(place)
    if b"\x00" in start:
        raise ValueError(f"{path} is no text, for it has bytes of zero: save it as CSV in UTF-8")
    if b"\r" in start and b"\n" not in start:
        place = Temporary(partial(_with_line_feeds, place))
    return place


def _start(place: Place) -> bytes:
    with open(place, "rb") as file:
        return file.read(2**16)


def _unpack(path: Path, kind: str, file: IO[bytes]) -> None:
    """Write the content of a compressed file."""
    with ExitStack() as stack:
        try:
            content = stack.enter_context(_opened(path, kind, stack))
        except (RuntimeError, NotImplementedError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        while True:
            try:
                part = content.read(2**20)
            # Each library has exceptions of its own for what is damaged
            except Exception as error:
                raise ValueError(f"{path} cannot be read: it is damaged: {error}") from error
            if not part:
                return
            file.write(part)


def _opened(path: Path, kind: str, stack: ExitStack) -> Any:
    match kind:
        case "gzip":
            return gzip.open(path)
        case "bzip2":
            return bz2.open(path)
        case "xz":
            return lzma.open(path)
        case "zip":
            archive = stack.enter_context(_opened_zip(path))
            if len(archive.namelist()) != 1:
                raise ValueError(
                    f"{path} is an archive of {len(archive.namelist())} files: unpack it, and"
                    " name those that are tables"
                )
            return archive.open(archive.namelist()[0])
        case _:
            if sys.version_info >= (3, 14):
                from compression import zstd
            else:
                from backports import zstd
            return zstd.open(path)


def _transcode(path: Path, place: Place, encoding: str, file: IO[bytes]) -> None:
    with open(place, encoding=encoding, newline="") as text:
        try:
            while part := text.read(2**20):
                file.write(part.encode())
        except UnicodeError as error:
            raise ValueError(f"{path} begins as {encoding.upper()} and is not: {error}") from error


def _with_line_feeds(place: Place, file: IO[bytes]) -> None:
    with open(place, "rb") as text:
        while part := text.read(2**20):
            file.write(part.replace(b"\r", b"\n"))

"""The container of a model: arrays and JSON in one file, written atomically.

The format is safetensors (a length, a JSON header, the arrays' bytes), and the safetensors
library can read it.  Its metadata holds two strings.  ``portable_mlp`` is the JSON of everything
that is not an array.  ``sha256`` is the digest of the whole file, with the digest's own 64
digits replaced by zeros.  The digest detects damage; it does not show who wrote the file, so
no content is trusted because of it.  The header's size and the number of its values are
bounded before it is parsed.  Arrays are allocated only after their sizes have been checked
against the file's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from io import BufferedReader
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save as to_bytes

from portable_mlp.persistence.files import replacing

FORMAT, OLD_FORMAT = "portable_mlp/3", "portable_mlp/2"

# Parsed JSON takes many times its length in memory: these limits keep it below 50 MB
_MOST_CHARACTERS = 2**22
_MOST_VALUES = 2**18

_DIGEST = b'"sha256":"'
_ZEROS = b"0" * 64
_DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2",
    "I8": "<i1", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "<u1",
}  # fmt: skip


class ModelFileError(ValueError):
    """A file is not a model, is damaged, or has another version; the message names the file."""


# ---------------------------------------------------------------- writing


def write(path: str | Path, meta: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> Path:
    """Write a container; a crash at any point leaves the old file or the new one.

    A process that is killed while it writes leaves a file ``.NAME.*.part`` in the same folder;
    nothing reads it.

    Raises
    ------
    ValueError
        If ``meta`` is larger than what `opened` accepts.
    OSError
        If the file cannot be written; the previous file, if any, remains.
    """
    text = json.dumps({"format": FORMAT, **meta})
    # safetensors stores an array's memory as it lies: that of a transposed array would be wrong
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    data = to_bytes(contiguous, {"portable_mlp": text, "sha256": _ZEROS.decode()})
    start = data.index(_DIGEST) + len(_DIGEST)
    check_json(data[8 : 8 + int.from_bytes(data[:8], "little")])
    digest = sha256(data).hexdigest().encode()
    return write_whole(path, [data[:start], digest, memoryview(data)[start + 64 :]])


def write_whole(path: str | Path, parts: list[bytes | memoryview]) -> Path:
    """Write the concatenation of these parts to a file atomically, and return its path."""
    with replacing(path) as beside, open(beside, "wb") as file:
        file.writelines(parts)
    return Path(path)


# ---------------------------------------------------------------- reading


class _Entry(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


class _BeforeBeginningError(OSError):
    """A reader seeks before the start of a `Section`; an OSError as of files, but of bad data."""


class Section:
    """Range of a file's bytes as a read-only file object."""

    def __init__(self, file: BufferedReader, start: int, size: int) -> None:
        self._file = file
        self._start = start
        self._size = size
        self._at = 0

    def seekable(self) -> bool:
        """Return True: `seek` works."""
        return True

    def tell(self) -> int:
        """Return the position of the next byte to read."""
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        """Set the position and return it; ``whence`` is as for files."""
        at = (0, self._at, self._size)[whence] + offset
        if at < 0:
            raise _BeforeBeginningError("a place before the beginning")
        self._at = at
        return at

    def read(self, n: int | None = -1) -> bytes:
        """Return the next n bytes, or all that are left if these are fewer or n is negative."""
        left = max(0, self._size - self._at)
        n = left if n is None or n < 0 else min(n, left)
        self._file.seek(self._start + self._at)
        self._at += n
        return self._file.read(n)


class Contents:
    """Contents of an open container; arrays are read when they are asked for.

    Attributes
    ----------
    meta : dict
        The parsed JSON.
    shapes : dict
        Shapes of the arrays, by name.
    unread : set
        Names of the arrays that have not been read yet.
    """

    def __init__(self, file: BufferedReader, meta: dict[str, Any], entries: Any) -> None:
        self.meta = meta
        self._file = file
        self._entries: dict[str, _Entry] = entries
        self.unread = set(entries)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self._entries.items()}

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def _asked_for(self, name: str) -> _Entry:
        self.unread.discard(name)
        return self._entries[name]

    def array(self, name: str) -> NDArray[Any]:
        """Read an array, and return it as a new one."""
        entry = self._asked_for(name)
        self._file.seek(entry.start)
        found = np.fromfile(self._file, entry.dtype, prod(entry.shape))
        return found.reshape(entry.shape)

    def arrays(self, prefix: str) -> list[NDArray[Any]]:
        """Read all arrays ``prefix.0``, ``prefix.1``, ..., and return them in this order."""
        count = sum(name.startswith(prefix + ".") for name in self._entries)
        return [self.array(f"{prefix}.{i}") for i in range(count)]

    def section(self, name: str) -> Section:
        """Return an array's bytes as a file object."""
        entry = self._asked_for(name)
        return Section(self._file, entry.start, entry.size)


@contextmanager
def opened(path: str | Path) -> Iterator[Contents]:
    """Open a container, verify it, and yield its contents.

    Any error in the body of the ``with`` is raised as a `ModelFileError` that names the file.
    Errors of the operating system, such as a missing file, are raised unchanged.
    """
    try:
        with open(path, "rb") as file:
            yield _read(file)
    except ModelFileError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and not isinstance(error, _BeforeBeginningError):
            raise
        # Crafted bytes can make any reader fail in any way: hence every kind of exception
        said = str(error) if isinstance(error, ValueError) else repr(error)
        said = said.partition("\n")[0]
        raise ModelFileError(f"{path} is not a model file, or is damaged: {said}") from error


def _read(file: BufferedReader) -> Contents:
    size = os.fstat(file.fileno()).st_size
    head = file.read(8)
    length = int.from_bytes(head, "little")
    begin = 8 + length
    if len(head) < 8 or begin > size:
        raise ValueError("it is cut off in its header, or no safetensors file")
    if length > _MOST_CHARACTERS:
        raise ValueError(f"its header has {length} bytes, at most {_MOST_CHARACTERS} are read")
    raw = file.read(length)
    header = parse_json(raw)
    texts = header.pop("__metadata__", {})
    meta = parse_json(texts.get("portable_mlp", "{}").encode())
    if meta.get("format") not in (FORMAT, OLD_FORMAT):
        raise ModelFileError(
            f"{file.name} is no model of format {FORMAT!r}, which this version of portable_mlp"
            f" reads: it says {meta.get('format')!r}"
        )
    _verify(file, head, raw)
    entries = {}
    end = 0
    for name, fields in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype = _DTYPES[fields["dtype"]]
        shape, (start, stop) = fields["shape"], fields["data_offsets"]
        numbers = [*shape, start, stop]
        if not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError(f"array {name!r} has the shape {shape}")
        if start != end or stop - start != prod(shape) * np.dtype(dtype).itemsize:
            raise ValueError(f"array {name!r} is not where and as long as its shape {shape} says")
        end = stop
        entries[name] = _Entry(dtype, tuple(shape), begin + start, stop - start)
    if begin + end != size:
        raise ValueError(f"its arrays end at byte {begin + end}, the file at {size}")
    return Contents(file, meta, entries)


def _verify(file: BufferedReader, head: bytes, raw: bytes) -> None:
    """Raise a ValueError unless the digest is right; the file's position is after the header."""
    # Valid JSON escapes quotes inside strings, so the first match is the metadata's key
    start = raw.index(_DIGEST) + len(_DIGEST)
    digest = sha256(head + raw[:start] + _ZEROS + raw[start + 64 :])
    while chunk := file.read(2**20):
        digest.update(chunk)
    if digest.hexdigest().encode() != raw[start : start + 64]:
        raise ValueError("its checksum is not that of its content")


def parse_json(raw: bytes) -> dict[str, Any]:
    """Parse a JSON object; raise a ValueError if it is too large or repeats a name."""
    check_json(raw)
    found = json.loads(raw, object_pairs_hook=_without_duplicates)
    if not isinstance(found, dict):
        raise ValueError("its JSON is no object")
    return found


def check_json(raw: bytes) -> None:
    """Raise a ValueError if parsing this JSON could take much memory."""
    values = sum(raw.count(sign) for sign in (b",", b"[", b"{"))
    if len(raw) > _MOST_CHARACTERS or values > _MOST_VALUES:
        raise ValueError(
            f"JSON of {len(raw)} characters and {values} values: at most {_MOST_CHARACTERS}"
            f" and {_MOST_VALUES} are read"
        )
    if not raw.isascii():
        raise ValueError("its JSON has characters that are not ASCII")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("its JSON has a name twice")
    return found

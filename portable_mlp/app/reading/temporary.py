"""Temporary files that disappear with the object that holds them."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO


class Temporary:
    """A temporary file that lives as long as this object, which is its path.

    Parameters
    ----------
    write : callable
        Writes the content to the open file that it is given.
    """

    def __init__(self, write: Callable[[IO[bytes]], None]) -> None:
        handle, self._path = tempfile.mkstemp(suffix=".csv")
        weakref.finalize(self, _remove, self._path)
        with open(handle, "wb") as file:  # closed: Windows opens a file once
            write(file)

    def __fspath__(self) -> str:
        return self._path


Place = Path | Temporary
"""The path of a file, or a temporary file in its place."""


def _remove(path: str) -> None:
    with suppress(OSError):
        os.remove(path)

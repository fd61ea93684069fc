"""Temporary files that disappear with the object that holds them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
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
        self._file = tempfile.NamedTemporaryFile(suffix=".csv")  # noqa: SIM115  # it lives on
        write(self._file)
        self._file.flush()

    def __fspath__(self) -> str:
        return self._file.name


Place = Path | Temporary
"""The path of a file, or a temporary file in its place."""

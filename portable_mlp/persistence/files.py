"""Atomic writing: a file is complete, or not there at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; the file there replaces ``path`` at the end.

    The file is flushed to the disk before it replaces ``path``.  If the block raises, or the
    process ends, the previous file remains.

    Raises
    ------
    OSError
        If the file cannot be written; the error names ``path``.
    """
    target = Path(os.path.realpath(path))  # replace the target of a link, not the link
    beside = target.with_name(f".{target.stem}.{secrets.token_hex(4)}.part{target.suffix}")
    try:
        beside.touch(exist_ok=False)
        yield beside
        with open(beside, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(beside, target)
        if os.name == "posix":  # Windows cannot open folders
            folder = os.open(target.parent, os.O_RDONLY)
            try:
                os.fsync(folder)  # the renaming has to reach the disk too
            finally:
                os.close(folder)
    except BaseException as error:
        with suppress(OSError):  # a read-only disk refuses even if there is no such file
            beside.unlink()
        if isinstance(error, OSError) and error.errno is not None:
            said = f"cannot save: {os.strerror(error.errno)}"
            raise OSError(error.errno, said, str(path)) from error
        raise

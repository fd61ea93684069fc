"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a path beside ``path`` to write to, which takes its place when the block ends.

    What was written is forced to the disk before it does.  If the block raises, or the
    process ends, what was there before is what remains.

    Raises
    ------
    OSError
        If it cannot be written; it names ``path``.
    """
    target = Path(os.path.realpath(path))  # not the link, but what it leads to
    beside = target.with_name(f".{target.stem}.{secrets.token_hex(4)}.part{target.suffix}")
    try:
        beside.touch(exist_ok=False)
        yield beside
        with open(beside, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(beside, target)
        if os.name == "posix":  # elsewhere folders cannot be opened
            folder = os.open(target.parent, os.O_RDONLY)
            try:
                os.fsync(folder)  # the name, too, is on the disk
            finally:
                os.close(folder)
    except BaseException as error:
        with suppress(OSError):  # on a read-only disk, even if there is no such file
            beside.unlink()
        if isinstance(error, OSError) and error.errno is not None:
            said = f"cannot save: {os.strerror(error.errno)}"
            raise OSError(error.errno, said, str(path)) from error
        raise

"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write to, which takes its place when the block ends.

    It is forced to the disk before it does; if the block raises, it is removed, and
    what was there before stays.
    """
    beside = None
    try:
        handle, name = tempfile.mkstemp(f"-{path.name}", ".", path.parent)
        beside = Path(name)
        os.close(handle)
        yield beside
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        beside.chmod(0o666 & ~_umask())  # mkstemp's files are for their owner alone
        beside.replace(path)
    except BaseException as error:
        if beside is not None:
            beside.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

"""The machine's own C compiler, if it has one."""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path

FLAGS = (
    "-O3", "-march=native", "-shared", "-fPIC",
    # Each operation rounds, and NaN and zeros are what they are
    "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fno-strict-aliasing",
)  # fmt: skip


WHEN = ("later", "now", "never")


def when() -> str:
    """When steps of NumPy's are compiled, from the environment's ``PORTABLE_MLP_COMPILE``.

    "later", the default: in the background, once training has lasted for a while.  "now":
    before the first step, and with a warning if that fails.  Or "never".

    Raises
    ------
    ValueError
        If it is none of these.
    """
    chosen = os.environ.get("PORTABLE_MLP_COMPILE", WHEN[0])
    if chosen not in WHEN:
        raise ValueError(f"PORTABLE_MLP_COMPILE must be one of {', '.join(WHEN)}, not {chosen!r}")
    return chosen


class CompilerError(RuntimeError):
    """There is no compiler, or it does not compile; the message says why."""


def find() -> list[str]:
    """The compiler's command: the environment's ``CC``, or what stands for it; or nothing."""
    command = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    return shlex.split(command) if command else []


def compile_c(source: str) -> ctypes.PyDLL:
    """Compile and load a library.

    Its functions keep Python's lock: they are short, and to wait for the lock is not.

    Raises
    ------
    CompilerError
    """
    compiler = find()
    if not compiler:
        raise CompilerError("no C compiler found")
    with tempfile.TemporaryDirectory(prefix="portable_mlp", ignore_cleanup_errors=True) as folder:
        path = Path(folder, "loops.c")
        path.write_text(source)
        library = path.with_suffix(".so")
        command = [*compiler, *FLAGS, "-o", str(library), str(path), "-lm"]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
            return ctypes.PyDLL(str(library))  # stays when the file is gone
        except subprocess.CalledProcessError as error:
            raise CompilerError(error.stderr.strip() or str(error)) from error
        except (OSError, subprocess.SubprocessError) as error:
            raise CompilerError(str(error)) from error


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="portable_mlp compiler")


# A forked process has none of its parent's threads
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)


def compile_beside(source: str) -> Future[ctypes.PyDLL]:
    """`compile_c` while other things go on."""
    return _pool().submit(compile_c, source)

"""The machine's own C compiler, if it has one."""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import Future
from pathlib import Path
from threading import Thread

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
    """Return the compiler's command: the environment's ``CC``, else ``cc`` or ``gcc``; or nothing.

    On macOS ``CC`` alone.
    """
    command = os.environ.get("CC")
    # On macOS, cc is always there, and opens a window if there is no compiler
    if not command and sys.platform != "darwin":
        command = shutil.which("cc") or shutil.which("gcc")
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
            # In a session of its own: Ctrl-C in training is not meant for the compiler
            subprocess.run(
                command,
                check=True,
                capture_output=True,
                text=True,
                timeout=60,
                start_new_session=True,
            )
            return ctypes.PyDLL(str(library))  # stays when the file is gone
        except subprocess.CalledProcessError as error:
            raise CompilerError(error.stderr.strip() or str(error)) from error
        except (OSError, subprocess.SubprocessError) as error:
            raise CompilerError(str(error)) from error


def compile_beside(source: str) -> Future[ctypes.PyDLL]:
    """`compile_c`, in a thread of its own."""
    future: Future[ctypes.PyDLL] = Future()

    def work() -> None:
        try:
            future.set_result(compile_c(source))
        except Exception as error:  # whoever asks for the result gets it
            future.set_exception(error)

    try:
        # A daemon: the end of a program does not wait for it
        Thread(target=work, name="portable_mlp compiler", daemon=True).start()
    except RuntimeError as error:  # there can be no more threads
        future.set_exception(error)
    return future

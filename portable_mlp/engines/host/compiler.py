"""The C compiler of the machine, if it has one."""

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
    # Strict IEEE 754: each operation rounds, and NaN and signed zeros are kept
    "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fno-strict-aliasing",
    # Signed integers wrap, as NumPy's do
    "-fwrapv",
)  # fmt: skip

WHEN = ("later", "now", "never")


def when() -> str:
    """Return when to compile steps on NumPy, from the environment variable PORTABLE_MLP_COMPILE.

    "later", the default, compiles in the background once training has lasted for a while.
    "now" compiles before the first step, and warns if that fails.  "never" does not compile.

    Raises
    ------
    ValueError
        If the variable has another value.
    """
    chosen = os.environ.get("PORTABLE_MLP_COMPILE", WHEN[0])
    if chosen not in WHEN:
        raise ValueError(f"PORTABLE_MLP_COMPILE must be one of {', '.join(WHEN)}, not {chosen!r}")
    return chosen


class CompilerError(RuntimeError):
    """There is no compiler, or it fails; the message says why."""


def find() -> list[str]:
    """Return the command of the compiler as words; an empty list if there is none.

    It is the environment variable ``CC``, else ``cc`` or ``gcc``; on macOS only ``CC``.
    """
    command = os.environ.get("CC")
    # On macOS, cc always exists, and opens a dialog if no compiler is installed
    if not command and sys.platform != "darwin":
        command = shutil.which("cc") or shutil.which("gcc")
    return shlex.split(command) if command else []


def compile_c(source: str) -> ctypes.PyDLL:
    """Compile C source, and load the library.

    Calls of its functions keep the global interpreter lock: they are shorter than waiting for
    the lock afterwards.

    Raises
    ------
    CompilerError
        If there is no compiler, it fails, or it takes more than a minute.
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
    """Run `compile_c` in a background thread; return its future."""
    future: Future[ctypes.PyDLL] = Future()

    def work() -> None:
        try:
            future.set_result(compile_c(source))
        except Exception as error:  # raised again by the future's result
            future.set_exception(error)

    try:
        # A daemon thread, so that the interpreter does not wait for it at exit
        Thread(target=work, name="portable_mlp compiler", daemon=True).start()
    except RuntimeError as error:  # no thread can be started
        future.set_exception(error)
    return future

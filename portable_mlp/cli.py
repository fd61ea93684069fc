"""The command-line program: runs a command, and turns errors into one line and an exit code."""

from __future__ import annotations

import sys
import warnings
from typing import Any

from portable_mlp.backends import BackendError


def main(argv: list[str] | None = None) -> int:
    """Run ``portable-mlp``.

    Parameters
    ----------
    argv : list of str, optional
        Arguments without the program's name; those of the process if not given.

    Returns
    -------
    int
        Exit code: 0 on success, 2 after an error, 130 after Ctrl-C.  An error is reported
        in one line on stderr.  With ``--debug``, its exception is raised instead.
    """
    try:
        return _run(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _run(argv: list[str]) -> int:
    try:
        from cyclopts import CycloptsError

        from portable_mlp.app.commands import app
    except ModuleNotFoundError as error:
        return _fail(f"{error}: pip install 'portable_mlp[cli]'")
    with warnings.catch_warnings():
        warnings.showwarning = _one_line
        try:
            return (
                app(argv, exit_on_error=False, print_error=False, result_action="return_value") or 0
            )
        except Exception as error:
            known = (
                CycloptsError, BackendError, OSError, ValueError, MemoryError, ModuleNotFoundError
            )  # fmt: skip
            if "--debug" in argv or not isinstance(error, known + _polars_errors()):
                raise
            return _fail(_message(error))


def _polars_errors() -> tuple[type[Exception], ...]:
    """Return the base class of polars' exceptions, if polars was imported."""
    polars = sys.modules.get("polars")
    return () if polars is None else (polars.exceptions.PolarsError,)


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        named = f": {error.filename}" if error.filename else ""
        return f"{error.strerror}{named}"
    return str(error) or "out of memory"


def _fail(message: str) -> int:
    print("error:", " ".join(message.split()), file=sys.stderr)
    return 2


def _one_line(message: Warning | str, *_: Any, **__: Any) -> None:
    print("warning:", " ".join(str(message).split()), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())

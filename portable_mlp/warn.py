"""Warnings that point at the line of the user's code that led to them."""

from __future__ import annotations

import sys
import warnings

_BETWEEN = ("portable_mlp", "sklearn", "joblib")


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn from the nearest frame outside of this library, scikit-learn and joblib.

    A fixed ``stacklevel`` would not work: the number of scikit-learn's frames in between
    depends on its version.
    """
    frame = sys._getframe(1)
    while frame.f_back is not None and _package(frame.f_globals) in _BETWEEN:
        frame = frame.f_back
    there = frame.f_globals
    warnings.warn_explicit(
        message,
        category,
        frame.f_code.co_filename,
        frame.f_lineno,
        module=str(there.get("__name__", "<unknown>")),
        registry=there.setdefault("__warningregistry__", {}),
    )


def _package(there: dict[str, object]) -> str:
    return str(there.get("__name__")).partition(".")[0]

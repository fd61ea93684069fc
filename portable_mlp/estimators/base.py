"""What all estimators do with their settings and with a fit that fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Estimator:
    """Base of all estimators."""

    def _store(self, given: dict[str, Any]) -> None:
        """Store the constructor's arguments unchanged, as scikit-learn's ``clone`` requires."""
        for name, value in given.items():
            if name not in ("self", "__class__"):
                setattr(self, name, value)

    @contextmanager
    def _unchanged_on_error(self) -> Iterator[None]:
        # A shallow copy suffices: a fit replaces attributes, and never modifies them in place
        before = dict(vars(self))
        try:
            yield
        except BaseException:
            for name in vars(self).keys() - before.keys():
                delattr(self, name)
            for name, value in before.items():
                setattr(self, name, value)
            raise

"""Names for what the array API standard does not name in Python's type system."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

Array: TypeAlias = Any
"""An array of any namespace that follows the array API standard."""

Namespace: TypeAlias = Any
"""A module with the standard's functions, by custom called ``xp``."""

Params: TypeAlias = Sequence[Array]
"""Parameters, gradients or moments: arrays in the order of ``Network.params``."""

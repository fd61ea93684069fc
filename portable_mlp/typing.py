"""Type aliases for arrays and namespaces, which the array API standard does not define."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

Array: TypeAlias = Any
"""An array of any namespace that follows the array API standard."""

Namespace: TypeAlias = Any
"""A module with the standard's functions, conventionally called ``xp``."""

Params: TypeAlias = Sequence[Array]
"""Parameters, gradients or moments: arrays in the order of ``Network.params``."""

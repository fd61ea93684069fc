"""Numbers that differ between the members of an ensemble."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


class PerMember:
    """A number of a step, one value for each member.

    To the step it is a number, as others are, that has axes: engines bring the values in as an
    array of the data type that they meet.

    Parameters
    ----------
    values : sequence of int or float, one a member
    ndim : int
        Axes of what it is combined with; the members' is the first of them.

    Attributes
    ----------
    values : ndarray (members, 1, ...)
        In float64 or int64.
    dtype : type
        int or float.
    """

    def __init__(self, values: Sequence[float], ndim: int) -> None:
        whole = all(isinstance(value, int) for value in values)
        self.dtype: Any = int if whole else float
        kind = np.int64 if whole else np.float64
        self.values = np.array(values, kind).reshape(-1, *(1,) * (ndim - 1))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def __repr__(self) -> str:
        return f"PerMember({self.values.ravel().tolist()})"


def each(value: float | tuple[float, ...], members: int | None, name: str) -> list[float]:
    """Values of all members, from one for all or one for each; of one network, its own.

    Raises
    ------
    ValueError
        If there are other numbers of values and members; the message begins with ``name``.
    """
    if not isinstance(value, tuple):
        return [value] * (members or 1)
    if len(value) != (members or 0):
        raise ValueError(f"{name}: {len(value)} values for {members or 'no'} members: {value!r}")
    return list(value)

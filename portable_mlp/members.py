"""Numbers that differ between the members of an ensemble."""

from __future__ import annotations

from typing import Any

import numpy as np


class PerMember:
    """A number of a step with one value for each member.

    A step uses it like any other number.  Engines pass the values as an array whose dtype is
    that of the arrays it is combined with.

    Parameters
    ----------
    values : array-like of int or float (members,)
        One value for each member.
    ndim : int
        Number of axes of the arrays it is combined with; the first is that of the members.

    Attributes
    ----------
    values : ndarray (members, 1, ...)
        The values, in int64 if all are ints and in float64 otherwise.
    dtype : type
        int or float.
    """

    def __init__(self, values: Any, ndim: int) -> None:
        given = np.asarray(values)
        whole = given.dtype.kind in "iu"
        self.dtype: Any = int if whole else float
        kind = np.int64 if whole else np.float64
        self.values = given.astype(kind, copy=False).reshape(-1, *(1,) * (ndim - 1))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def __repr__(self) -> str:
        return f"PerMember({self.values.ravel().tolist()})"


def each(value: float | tuple[float, ...], members: int | None, name: str) -> list[float]:
    """Return a list with the value of each member.

    Parameters
    ----------
    value : float, or a tuple of them
        One value for all members, or a tuple with one for each.
    members : int or None
        Number of members; None for a single network, whose list has one value.
    name : str
        Beginning of the error message.

    Raises
    ------
    ValueError
        If the length of a tuple is not the number of members.
    """
    if not isinstance(value, tuple):
        return [value] * (members or 1)
    if len(value) != (members or 0):
        raise ValueError(f"{name}: {len(value)} values for {members or 'no'} members: {value!r}")
    return list(value)

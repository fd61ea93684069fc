"""Index arithmetic for generated source: which element of one array belongs to one of another.

An element is given by its position in row-major order and, if they are known, by its
indices.  Both are expressions of the loop variables of the source.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any, NamedTuple

from portable_mlp.engines.graph.program import Node, Shape


class Access(NamedTuple):
    """An element of an array: its position in row-major order, and its indices if known."""

    flat: str
    indices: tuple[str, ...] | None = None


def row_strides(shape: Shape) -> Shape:
    """Return the strides, in elements, of a contiguous array in row-major order."""
    return tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _term(text: str) -> str:
    return text if text.isalnum() else f"({text})"


def linear(shape: Shape, indices: Sequence[str]) -> Access:
    """Return the element at these indices."""
    terms = [
        index if stride == 1 else f"{_term(index)} * {stride}"
        for index, stride, n in zip(indices, row_strides(shape), shape, strict=True)
        if index != "0" and n > 1
    ]
    return Access(" + ".join(terms) or "0", tuple(indices))


def indices_of(shape: Shape, access: Access) -> tuple[str, ...]:
    """Return the indices of an element of an array of this shape."""
    if access.indices is not None and len(access.indices) == len(shape):
        return access.indices
    found = []
    whole = prod(shape)
    for n, stride in zip(shape, row_strides(shape), strict=True):
        index = access.flat if stride == 1 else f"{_term(access.flat)} / {stride}"
        if n * stride != whole:  # the first axis longer than one needs no remainder
            index = f"{_term(index)} % {n}"
        found.append("0" if n == 1 else index)
    return tuple(found)


def broadcast(operand: Node, shape: Shape, access: Access) -> Access:
    """Return the element of an operand that is broadcast to an element of the result."""
    if operand.shape == shape:
        return access
    indices = indices_of(shape, access)[len(shape) - operand.ndim :]
    return linear(
        operand.shape,
        ["0" if n == 1 else i for n, i in zip(operand.shape, indices, strict=True)],
    )


def through(x: Node, access: Access) -> Access:
    """Return the element of a view's operand that an element of the view is."""
    (operand,) = x.operands
    if x.op == "reshape":
        # Axes of length one change no index; any other reshape is known by its position only
        kept = [i for n, i in zip(x.shape, access.indices or (), strict=False) if n > 1]
        if access.indices and long_axes(x.shape) == long_axes(operand.shape):
            rest = iter(kept)
            return Access(access.flat, tuple("0" if n == 1 else next(rest) for n in operand.shape))
        return Access(access.flat)
    if x.op == "broadcast":
        return broadcast(operand, x.shape, access)
    indices = indices_of(x.shape, access)
    if x.op == "permute":
        (axes,) = x.attrs
        return linear(operand.shape, [indices[axes.index(axis)] for axis in range(x.ndim)])
    given = iter(indices)
    found = []
    for n, key in zip(operand.shape, keys(x, next_new=lambda: next(given)), strict=True):
        if isinstance(key, int):
            found.append(str(key % n))
            continue
        start, _, step = slice(*key[1:]).indices(n)
        index = next(given)
        index = index if step == 1 else f"{_term(index)} * {step}"
        found.append(index if start == 0 else f"{index} + {start}")
    return linear(operand.shape, found)


def keys(x: Node, next_new: Any) -> Iterator[Any]:
    """Yield the key of each axis of an index's operand; call ``next_new`` for each new axis."""
    (operand,) = x.operands
    n_given = sum(key is not None and key is not ... for key in x.attrs)
    whole = ("slice", None, None, None)
    attrs = x.attrs if ... in x.attrs else (*x.attrs, ...)
    for key in attrs:
        if key is None:
            next_new()
        elif key is ...:
            for _ in range(operand.ndim - n_given):
                yield whole
        else:
            yield key


def long_axes(shape: Shape) -> Shape:
    """Return a shape without the axes of length one."""
    return tuple(n for n in shape if n > 1)

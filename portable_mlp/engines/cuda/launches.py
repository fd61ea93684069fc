"""Launches: the kernels and products of a program on a CUDA device, and their memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from portable_mlp.engines.graph.program import (
    Shape,
)


class Place(NamedTuple):
    """A place in memory: the number of an input or of the work memory, and an offset in bytes."""

    memory: int
    offset: int


class View(NamedTuple):
    """An array at a place in memory, which a kernel gets as a pointer."""

    place: Place
    shape: Shape
    strides: Shape  # in elements
    dtype: Any


@dataclass(frozen=True)
class Kernel:
    """A launch of a kernel, with the table of numbers, the step counter, and arrays.

    Attributes
    ----------
    name : str
    blocks, threads : int
    arguments : tuple of View
    """

    name: str
    blocks: int
    threads: int
    arguments: tuple[View, ...]


@dataclass(frozen=True)
class Product:
    """A matrix product, out = left right, or a stack of products with one more axis in front.

    Each matrix has contiguous rows or contiguous columns.
    """

    left: View
    right: View
    out: View


@dataclass(frozen=True)
class Kernels:
    """A program as launches, from `compile_program`.

    Attributes
    ----------
    source : str
        CUDA C++, for readers: ``print(kernels.source)``.
    launches : tuple of Kernel and Product
        In order.
    n_numbers : int
        Width of the table of numbers: all values of the program's number inputs, in order.
    n_results : int
        Width of the table of results; the last kernel writes one row of it.
    n_bytes : int
        Size of the work memory.  Its number as a memory is the number of input arrays.
    constants : tuple of (View, number)
        Parts of the work memory to fill before the first launch.
    """

    source: str
    launches: tuple[Kernel | Product, ...]
    n_numbers: int
    n_results: int
    n_bytes: int
    constants: tuple[tuple[View, float], ...]

"""What a program becomes on a CUDA device: kernels and products, in order, and their memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from portable_mlp.engines.graph.program import (
    Shape,
)


class Place(NamedTuple):
    """A number of bytes behind the start of a memory: of an input's, or of the work memory."""

    memory: int
    offset: int


class View(NamedTuple):
    """An array that begins at a place; what a kernel gets as a pointer."""

    place: Place
    shape: Shape
    strides: Shape  # in elements
    dtype: Any


@dataclass(frozen=True)
class Kernel:
    """A launch of a kernel, which gets the table, the counter, and these arrays.

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
    """out = left right; matrices, each with contiguous rows or contiguous columns.

    Or stacks of as many matrices, with an axis more in front.
    """

    left: View
    right: View
    out: View


@dataclass(frozen=True)
class Kernels:
    """What `compile_program` returns.

    Attributes
    ----------
    source : str
        CUDA C++, to be read: ``print(kernels.source)``.
    launches : tuple of Kernel and Product
        In order.
    n_numbers : int
        Width of the table: the program's inputs that are numbers, in order, with all values
        of those that have axes.
    n_results : int
        Width of the table of results, which the last kernel writes a row of.
    n_bytes : int
        Of the work memory, whose number is that of the input arrays.
    constants : tuple of (View, number)
        Parts of the work memory to fill before the first launch.
    """

    source: str
    launches: tuple[Kernel | Product, ...]
    n_numbers: int
    n_results: int
    n_bytes: int
    constants: tuple[tuple[View, float], ...]

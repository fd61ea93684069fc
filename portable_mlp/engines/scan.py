"""The engine of JAX: loops of steps, compiled."""

from __future__ import annotations

import time
from functools import lru_cache, partial
from importlib import import_module
from typing import Any

import numpy as np

from portable_mlp.backends import Backend
from portable_mlp.engines.base import Engine, Task, Values
from portable_mlp.steps import Arrays, Batch, Hyper, Recipe, step
from portable_mlp.typing import Array


class ScanEngine(Engine):
    """Loops of steps, compiled by JAX.

    Ctrl-C and progress wait for a loop's end, so it is cut into pieces of at most
    ``SECONDS``; the number of steps in a piece is an argument, not a new program.
    """

    name = "scan"
    SECONDS = 0.5

    def __init__(self, backend: Backend, recipe: Recipe) -> None:
        super().__init__(backend, recipe)
        self._pace = 0.0  # steps a second
        self._loops: dict[tuple[int, int], Any] = {}

    def run(self, arrays: Arrays, task: Task) -> tuple[Arrays, Values]:
        n, batch_size, hypers = task.n_rows, task.batch_size, task.hypers
        indices = None if task.order is None else self.backend.indices(task.order)
        whole, short = divmod(n, batch_size)  # the short batch is a program of its own
        pieces = [(whole, batch_size)] * (whole > 0) + [(whole + 1, short)] * (short > 0)
        alone = len(hypers) == 1
        numbers: Any = hypers[0]  # Python's numbers are handed over much faster than arrays
        if not alone:
            table = [(h.alpha, *h.coefficients) for h in hypers]
            keys = np.asarray([h.keys for h in hypers], np.int32)
            numbers = np.asarray(table, arrays.leaves[0].dtype), keys
        values: Values = []
        done = task.first
        for end, size in pieces:
            if (size, batch_size) not in self._loops:  # to hash a recipe takes time
                self._loops[size, batch_size] = _loop(self.recipe, size, batch_size)
            loop = self._loops[size, batch_size]
            while done < end and not (done > task.first and task.stop()):
                upto = min(end, done + max(1, int(self._pace * self.SECONDS)))
                began = time.perf_counter()
                span = None if alone else np.asarray((done, upto), np.int32)
                arrays, piece = loop(arrays, task.data, indices, numbers, span)
                values += map(tuple, np.asarray(piece)[done:upto].tolist())
                self._pace = (upto - done) / (time.perf_counter() - began)
                done = upto
        return arrays, values


@lru_cache(maxsize=64)
def _loop(recipe: Recipe, size: int, batch_size: int) -> Any:
    """Compiled steps on batches of ``size`` rows, each ``batch_size`` after the other."""
    jax = import_module("jax")
    xp = recipe.xp

    def loop(
        arrays: Arrays,
        data: Batch,
        indices: Array | None,
        numbers: Any,
        span: Array | None,
    ) -> tuple[Arrays, Array]:
        def batch(i: Any) -> Batch:
            if indices is None:
                if size == data.x.shape[0]:
                    return data
                cut = partial(
                    jax.lax.dynamic_slice_in_dim, start_index=i * batch_size, slice_size=size
                )
            else:
                rows = jax.lax.dynamic_slice_in_dim(indices, i * batch_size, size)
                cut = partial(xp.take, indices=rows, axis=0, mode="clip")
            return Batch(*(None if a is None else cut(a) for a in data))

        def advance(arrays: Arrays, i: Any, hyper: Hyper) -> tuple[Arrays, Array]:
            arrays, pair = step(recipe, arrays, batch(i), hyper)
            dtype = arrays.leaves[0].dtype
            return arrays, xp.stack([xp.asarray(v, dtype=dtype) for v in pair])

        if span is None:
            arrays, pair = advance(arrays, 0, numbers)
            return arrays, pair[None, :]

        def body(i: Array, carried: tuple[Arrays, Array]) -> tuple[Arrays, Array]:
            arrays, values = carried
            alpha, *coefficients = table[i, :]
            arrays, pair = advance(arrays, i, Hyper(alpha, tuple(coefficients), tuple(keys[i, :])))
            return arrays, values.at[i, :].set(pair)

        table, keys = numbers
        values = xp.zeros((table.shape[0], 2), dtype=table.dtype)
        looped: tuple[Arrays, Array] = jax.lax.fori_loop(span[0], span[1], body, (arrays, values))
        return looped

    return jax.jit(loop, donate_argnums=0)

"""The engine of JAX, which compiles loops of steps."""

from __future__ import annotations

import time
from functools import lru_cache, partial
from importlib import import_module
from math import prod
from typing import Any

import numpy as np

from portable_mlp.backends import Backend
from portable_mlp.engines.base import EPOCHS_AT_ONCE, Engine, Reduce, Task, Values, table
from portable_mlp.engines.graph.program import flatten, specify, unflatten
from portable_mlp.steps import Arrays, Batch, Recipe, step
from portable_mlp.typing import Array


class ScanEngine(Engine):
    """An engine that runs loops of steps, compiled by JAX.

    Ctrl-C and progress wait for the end of a loop.  So a loop is cut into pieces that take
    about ``SECONDS``.  The number of steps in a piece is an argument of the program.
    """

    name = "scan"
    SECONDS = 0.5

    def __init__(self, backend: Backend, recipe: Recipe, reduce: Reduce | None = None) -> None:
        if reduce is not None:
            raise ValueError("JAX compiles whole steps: a step in two halves is for other backends")
        super().__init__(backend, recipe)
        self._pace = 0.0  # steps a second, of the last piece
        self._loops: dict[tuple[int, int], Any] = {}

    def run(self, arrays: Arrays, task: Task) -> tuple[Arrays, Values]:
        n, batch_size, hypers = task.n_rows, task.batch_size, task.hypers
        indices = None if task.order is None else self.backend.indices(task.order)
        if n <= batch_size:
            # The number of epochs varies; the shape of the table, and with it the program, do not
            pieces, lines = [(len(hypers), n)], EPOCHS_AT_ONCE
        else:
            whole, short = divmod(n, batch_size)  # the short batch is a program of its own
            pieces = [(whole, batch_size)] + [(whole + 1, short)] * (short > 0)
            lines = len(hypers)
        numbers = table(hypers)
        form = specify(hypers[0])
        specs = [*flatten(form)]
        is_whole = np.repeat([s.dtype is int for s in specs], [prod(s.shape) for s in specs])
        # Integers have a table of their own, since float32 cannot represent all of them
        tables = []
        for kind, wanted in ((arrays.leaves[0].dtype, False), (np.int32, True)):
            chosen = numbers[:, is_whole == wanted]
            tables.append(np.zeros((lines, chosen.shape[1]), kind))
            tables[-1][: len(hypers)] = chosen
        values: Values = []
        done = task.first
        for end, size in pieces:
            if (size, batch_size) not in self._loops:  # to hash a recipe takes time
                self._loops[size, batch_size] = _loop(self.recipe, form, size, batch_size)
            loop = self._loops[size, batch_size]
            while done < end and not (done > task.first and task.stop()):
                upto = min(end, done + max(1, int(self._pace * self.SECONDS)))
                began = time.perf_counter()
                span = np.asarray((done, upto), np.int32)
                arrays, piece = loop(arrays, task.data, indices, *tables, span)
                values += map(self._pair, np.asarray(piece)[done:upto].tolist())
                self._pace = (upto - done) / (time.perf_counter() - began)
                done = upto
        return arrays, values


@lru_cache(maxsize=64)
def _loop(recipe: Recipe, form: Any, size: int, batch_size: int) -> Any:
    """Return compiled steps on batches of ``size`` rows that begin ``batch_size`` rows apart.

    ``form`` is the tree of specs of the numbers of a step.
    """
    jax = import_module("jax")
    xp = recipe.xp

    def loop(
        arrays: Arrays,
        data: Batch,
        indices: Array | None,
        table: Array,
        whole: Array,
        span: Array,
    ) -> tuple[Arrays, Array]:
        def batch(i: Any) -> Batch:
            if indices is None:
                if size == data.x.shape[0]:
                    return data
                # A slice with a fixed size: JAX compiles for known shapes only
                cut = partial(
                    jax.lax.dynamic_slice_in_dim, start_index=i * batch_size, slice_size=size
                )
            else:
                rows = jax.lax.dynamic_slice_in_dim(indices, i * batch_size, size, axis=-1)
                # Clipped, since the default compares each index with the number of rows
                cut = partial(xp.take, indices=rows, axis=0, mode="clip")
            return Batch(*(None if a is None else cut(a) for a in data))

        def body(i: Array, carried: tuple[Arrays, Array]) -> tuple[Arrays, Array]:
            arrays, values = carried
            rows, used = {int: whole[i, :], float: table[i, :]}, {int: 0, float: 0}

            def number(spec: Any) -> Array:
                start = used[spec.dtype]
                used[spec.dtype] = end = start + prod(spec.shape)
                return xp.reshape(rows[spec.dtype][start:end], spec.shape)

            hyper = unflatten(form, map(number, flatten(form)))
            arrays, pair = step(recipe, arrays, batch(i), hyper)
            found = xp.concat([xp.reshape(xp.asarray(v, dtype=table.dtype), -1) for v in pair])
            return arrays, values.at[i, :].set(found)

        # (steps, losses and penalty)
        values = xp.zeros((table.shape[0], recipe.n_losses + 1), dtype=table.dtype)
        looped: tuple[Arrays, Array] = jax.lax.fori_loop(span[0], span[1], body, (arrays, values))
        return looped

    return jax.jit(loop, donate_argnums=0)

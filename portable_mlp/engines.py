"""Engines: how a backend runs one step over the batches of an epoch.

All run the same step (`portable_mlp.steps`); they differ in what stands between the step
and the library.  *Eager* calls it.  *Replay* records it once and repeats the calls into
fixed buffers.  *Scan* hands a loop of steps to JAX's compiler.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from importlib import import_module
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from portable_mlp.backends import Backend
from portable_mlp.recording import Recorder, Unrecordable, leaves, record, specify
from portable_mlp.replay import DIALECTS, Replay, lower
from portable_mlp.steps import Arrays, Batch, Hyper, Recipe, step
from portable_mlp.typing import Array

Values = list[tuple[float, float]]


class Engine:
    """Calls the step batch by batch; serves every backend.

    Parameters
    ----------
    backend : Backend
    recipe : Recipe
    """

    name: ClassVar[str] = "eager"

    def __init__(self, backend: Backend, recipe: Recipe) -> None:
        self.backend = backend
        self.recipe = recipe

    def run(
        self,
        arrays: Arrays,
        data: Batch,
        order: NDArray[np.intp] | None,
        batch_size: int,
        hypers: Sequence[Hyper],
        stop: Callable[[], bool],
        first: int = 0,
    ) -> tuple[Arrays, Values]:
        """One step for each of ``hypers`` from the ``first`` on, or fewer.

        Parameters
        ----------
        arrays : Arrays
            Overwritten; use what comes back.
        data : Batch
            Rows to take batches from, on the backend.
        order : array of int, optional
            Which rows, in which order; on the host.  All, as they stand, if not given.
        batch_size : int
            The last batch may be shorter.
        hypers : sequence of Hyper, one a batch
        stop : callable
            Asked between steps whether to end early.
        first : int, default=0
            Batches before this one have been done.

        Returns
        -------
        arrays : Arrays
        values : list of (float, float)
            Loss and penalty of each step that was done.
        """
        losses, penalties = [], []
        batches = self._batches(data, order, batch_size, first)
        for batch, hyper in zip(batches, hypers[first:], strict=False):
            arrays, (loss, penalty) = step(self.recipe, arrays, batch, hyper)
            losses.append(loss)
            penalties.append(penalty)
            if stop():
                break
        return arrays, self._fetch(losses, penalties)

    def _batches(
        self, data: Batch, order: NDArray[np.intp] | None, batch_size: int, first: int
    ) -> Iterator[Batch]:
        n = data.x.shape[0] if order is None else len(order)
        indices = None if order is None else self.backend.indices(order)
        take = self.backend.xp.take
        for start in range(first * batch_size, n, batch_size):
            rows = slice(start, min(start + batch_size, n))
            if indices is None:
                yield Batch(*(None if a is None else a[rows, ...] for a in data))
            else:
                chosen = indices[rows]
                yield Batch(*(None if a is None else take(a, chosen, axis=0) for a in data))

    def _fetch(self, losses: list[Any], penalties: list[Any]) -> Values:
        found = self.backend.fetch(losses).tolist()
        if not self.recipe.penalised:
            return [(loss, 0.0) for loss in found]
        return list(zip(found, self.backend.fetch(penalties).tolist(), strict=True))


class ReplayEngine(Engine):
    """Repeats a recorded step into fixed buffers (`portable_mlp.replay`).

    What cannot be recorded runs eagerly, with a warning that says why; and so do epochs
    within the first ``EAGER`` steps, which is as long as recording takes.
    """

    name = "replay"
    EAGER = 16

    def __init__(self, backend: Backend, recipe: Recipe) -> None:
        super().__init__(backend, recipe)
        self.dialect = DIALECTS[backend.name](backend)
        self._begun = 0  # steps
        self._arrays: Arrays | None = None
        self._programs: dict[int, tuple[list[Array], Callable[..., tuple[Any, ...]]]] = {}

    def run(
        self,
        arrays: Arrays,
        data: Batch,
        order: NDArray[np.intp] | None,
        batch_size: int,
        hypers: Sequence[Hyper],
        stop: Callable[[], bool],
        first: int = 0,
    ) -> tuple[Arrays, Values]:
        if self._begun + len(hypers) <= self.EAGER:
            self._begun += len(hypers)
            return super().run(arrays, data, order, batch_size, hypers, stop, first)
        if arrays is not self._arrays:
            self._programs.clear()
            self._arrays = arrays
        n = data.x.shape[0] if order is None else len(order)
        try:
            # The longer batch first: its memory is enough for the shorter
            for size in sorted({min(batch_size, n), n % batch_size or batch_size}, reverse=True):
                if size not in self._programs:
                    self._programs[size] = self._bind(arrays, data, size, hypers[0])
        except Unrecordable as reason:
            warnings.warn(
                f"the step runs eagerly, several times slower: {reason}",
                RuntimeWarning,
                stacklevel=7,
            )
            self.run = super().run  # type: ignore[method-assign]
            return super().run(arrays, data, order, batch_size, hypers, stop, first)
        indices = None if order is None else self.backend.indices(order)
        given = [a for a in data if a is not None]
        gather = self.dialect.gather
        values = []
        starts = range(first * batch_size, n, batch_size)
        for start, hyper in zip(starts, hypers[first:], strict=False):
            rows = slice(start, min(start + batch_size, n))
            buffers, program = self._programs[rows.stop - start]
            if indices is None:
                batch = [a[rows] for a in given] if n > batch_size else given
            else:
                chosen = indices[rows]
                batch = [gather(a, chosen, b) for a, b in zip(given, buffers, strict=True)]
            values.append(program(*batch, hyper.alpha, *hyper.coefficients, *hyper.keys))
            if stop():
                break
        if self.backend.name != "numpy":  # there they are numbers already
            losses, penalties = zip(*values, strict=True)
            values = self._fetch(list(losses), list(penalties))
        return arrays, values

    def _bind(
        self, arrays: Arrays, data: Batch, size: int, hyper: Hyper
    ) -> tuple[list[Array], Callable[..., tuple[Any, ...]]]:
        """Buffers for a batch of so many rows, and the function that does a step with it."""
        if self._programs:
            longest, _ = self._programs[max(self._programs)]
            buffers = [buffer[:size] for buffer in longest]
        else:
            buffers = [self.dialect.buffer(a, size) for a in data if a is not None]
        batch = Batch(*buffers)
        arguments = specify((arrays, batch, hyper))
        replay = _replay(self.recipe, self.backend.name, _Tree(arguments))
        return buffers, replay.bind(list(leaves(arrays)), self.dialect)


class _Tree:
    """A tree of specs as a key: equal if its leaves are."""

    def __init__(self, tree: Any) -> None:
        self.tree = tree
        self.leaves = tuple(leaves(tree))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Tree) and self.leaves == other.leaves

    def __hash__(self) -> int:
        return hash(self.leaves)


@lru_cache(maxsize=64)
def _replay(recipe: Recipe, dialect: str, arguments: _Tree) -> Replay:
    # Without buffers, so that it can outlive a fit
    recorder = Recorder()
    program, _ = record(
        lambda *args: step(replace(recipe, xp=recorder), *args), recorder, arguments.tree
    )
    return lower(program, len(list(leaves(arguments.tree[0]))), DIALECTS[dialect])


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

    def run(
        self,
        arrays: Arrays,
        data: Batch,
        order: NDArray[np.intp] | None,
        batch_size: int,
        hypers: Sequence[Hyper],
        stop: Callable[[], bool],
        first: int = 0,
    ) -> tuple[Arrays, Values]:
        n = data.x.shape[0] if order is None else len(order)
        indices = None if order is None else self.backend.indices(order)
        whole = n // batch_size  # the short batch is a program of its own
        pieces = [(whole, batch_size)] * (whole > 0) + [(whole + 1, n % batch_size)] * (
            n % batch_size > 0
        )
        alone = len(hypers) == 1
        numbers: Any = hypers[0]  # Python's numbers are handed over much faster than arrays
        if not alone:
            table = [(h.alpha, *h.coefficients) for h in hypers]
            keys = np.asarray([h.keys for h in hypers], np.int32)
            numbers = np.asarray(table, arrays.leaves[0].dtype), keys
        values: Values = []
        done = first
        for end, size in pieces:
            loop = _loop(self.recipe, size, batch_size)
            while done < end and not (done > first and stop()):
                upto = min(end, done + max(1, int(self._pace * self.SECONDS)))
                began = time.perf_counter()
                span = None if alone else np.asarray((done, upto), np.int32)
                arrays, piece = loop(arrays, data, indices, numbers, span)
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


ENGINES: dict[str, type[Engine]] = {
    engine.name: engine for engine in (Engine, ReplayEngine, ScanEngine)
}

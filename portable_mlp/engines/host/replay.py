"""The engine of NumPy and torch, which repeats a recorded step into fixed buffers."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future
from ctypes import PyDLL
from functools import lru_cache, partial
from time import perf_counter
from typing import Any

from portable_mlp.backends import Backend
from portable_mlp.engines.base import (
    FIRST,
    SECOND,
    WHOLE,
    RecordedEngine,
    Reduce,
    Task,
    Tree,
    Values,
    flat,
    recorded,
)
from portable_mlp.engines.graph.program import flatten, specify
from portable_mlp.engines.host import compiler
from portable_mlp.engines.host.dialects import DIALECTS
from portable_mlp.engines.host.python_source import Replay, lower
from portable_mlp.steps import Arrays, Batch, Hyper, Recipe
from portable_mlp.typing import Array
from portable_mlp.warn import warn


class ReplayEngine(RecordedEngine):
    """An engine that makes the calls of `portable_mlp.engines.host.python_source`.

    If there is a C compiler, and training has lasted for a while, it compiles the loops of
    `portable_mlp.engines.host.loops` in the background, and switches to them between two
    steps.  They give the same bits.  `compiler.when` reads the setting that changes this.
    """

    name = "replay"

    PATIENCE = 0.25  # seconds of training with the same step, over all fits, before it is compiled
    LOOK = 0.05  # seconds between two looks at whether loops are compiled

    def __init__(self, backend: Backend, recipe: Recipe, reduce: Reduce | None = None) -> None:
        super().__init__(backend, recipe, reduce)
        self.dialect = DIALECTS[backend.name](backend)
        self._when = compiler.when() if self.dialect.loops else "never"
        self._to_come: list[_Prepared] = []
        self._arrays: Arrays | None = None
        self._programs: dict[int, tuple[list[Array], Callable[..., tuple[Any, ...]]]] = {}

    def repeat(self, arrays: Arrays, task: Task, values: Values) -> None:
        first, finished = task.first, False
        while not finished:
            task = task._replace(first=first + len(values))
            finished = self._stretch(arrays, task, values)

    def _stretch(self, arrays: Arrays, task: Task, values: Values) -> bool:
        """Run steps until all are done or compiled loops are ready; return whether all are done."""
        if arrays is not self._arrays or self._goes_over():
            self._programs.clear()
            self._to_come.clear()
            self.dialect.release()  # writing a program takes about as much memory as running it
            self._arrays = arrays
        n, batch_size, hypers = task.n_rows, task.batch_size, task.hypers
        # The longer batch first, since its memory is enough for the shorter one
        for size in (min(batch_size, n), n % batch_size or batch_size):
            if size not in self._programs:
                self._bind(arrays, task, size)
        indices = None if task.order is None else self.backend.indices(task.order)
        given = [a for a in task.data if a is not None]
        gather = self.dialect.gather
        totals = task.totals if self.reduce is not None else None
        found: Values = []
        finished = True
        begun = perf_counter()
        for number, rows in enumerate(task.batches(), task.first):
            buffers, program = self._programs[rows.stop - rows.start]
            if indices is None:
                batch = [a[rows] for a in given] if n > batch_size else given
            else:
                chosen = indices[..., rows]
                batch = [gather(a, chosen, b) for a, b in zip(given, buffers, strict=True)]
            total = () if totals is None else (totals[number],)
            found.append(program(*batch, *flat(hypers[number]), *total))
            if task.stop():
                break
            if self._to_come and perf_counter() - begun > self.LOOK:
                finished = False
                break
        if self.backend.name != "numpy":  # on NumPy they are Python numbers already
            losses, penalties = zip(*found, strict=True)
            found = self._fetch(list(losses), list(penalties))
        values += found
        for prepared in self._to_come:
            prepared.seconds += perf_counter() - begun
        return finished

    def _goes_over(self) -> bool:
        """Tell whether to switch programs now: to start the compiler, or to take its result."""
        waiting = self._to_come
        return bool(waiting) and all(
            p.done if p.begun else p.seconds > self.PATIENCE for p in waiting
        )

    def _bind(self, arrays: Arrays, task: Task, size: int) -> None:
        """Make buffers for a batch of ``size`` rows, and the function of a step with them."""
        longest = max(self._programs, default=0)
        members = () if task.order is None else task.order.shape[:-1]
        if size <= longest and not members:
            buffers = [buffer[:size] for buffer in self._programs[longest][0]]
        else:
            given = (a for a in task.data if a is not None)
            buffers = [self.dialect.buffer(a, *members, size) for a in given]
        total = None if task.totals is None else float(task.totals[0])
        bound = self._bound(arrays, Batch(*buffers), task.hypers[0], total)
        self._programs[size] = buffers, bound

    def _bound(
        self, arrays: Arrays, batch: Batch, hyper: Hyper, total: float | None
    ) -> Callable[..., tuple[Any, ...]]:
        """Return a step as a function of a batch's arrays, numbers, and total."""
        own = list(flatten(arrays))
        reduce = self.reduce
        if reduce is None:
            return self._program(WHOLE, (arrays, batch, hyper), own)
        n = self._weight(batch, total)
        vector = self.dialect.buffer(
            arrays.leaves[0].reshape(-1), self._length(arrays, batch, total)
        )
        arguments = [vector], arrays.leaves, batch, hyper.forward, total
        first = self._program(FIRST, arguments, [vector, *arrays.leaves])
        second = self._program(SECOND, (arrays, vector, hyper, n), [*own, vector])
        n_arrays = sum(a is not None for a in batch)
        # The numbers of the forward pass are the last ones of a step
        forward = n_arrays + len(flat(hyper)) - len(flat(hyper.forward))
        rest = () if n is None or total is not None else (n,)

        def program(*given: Any) -> tuple[Any, ...]:
            first(*given[:n_arrays], *given[forward:])
            reduce(vector)
            return second(*given[n_arrays:], *rest)

        return program

    def _program(
        self, part: str, arguments: Any, given: list[Array]
    ) -> Callable[..., tuple[Any, ...]]:
        """Bind a program, with its compiled loops if they are ready."""
        prepared = _prepare(self.recipe, self.backend.name, Tree(specify(arguments)), part)
        if self._when == "now":
            prepared.compile()
            prepared.wait()
        elif self._when == "later" and prepared.seconds > self.PATIENCE:
            prepared.compile()
        replay, library = prepared.calls, None
        if self._when != "never":
            if prepared.done:
                replay, library = prepared.best
            else:
                self._to_come.append(prepared)
        return replay.bind(given, self.dialect, library)


class _Prepared:
    """A step as calls, and as calls with loops once these are compiled.

    It holds no buffers, so that it can outlive a fit.

    Attributes
    ----------
    seconds : float
        Time for which it has run as calls.
    """

    def __init__(self, recipe: Recipe, dialect: str, arguments: Tree, part: str) -> None:
        program, roles = recorded(recipe, arguments, part)
        lowered = partial(
            lower, program, roles.donated, DIALECTS[dialect], n_resident=roles.resident
        )
        self.calls = lowered()
        self.seconds = 0.0
        self._to_loop: Callable[[], Replay] | None = partial(lowered, loops=True)
        self._looped: tuple[Replay, Future[PyDLL]] | None = None

    def compile(self) -> None:
        """Start to compile the loops, if that has not been done."""
        to_loop = self._to_loop  # read once, since another thread may set it to None
        if to_loop is not None:
            replay = to_loop()
            self._looped = replay, compiler.compile_beside(replay.loops)
            self._to_loop = None  # which frees the program

    def wait(self) -> None:
        """Wait for the compiler; warn if it failed."""
        if self._looped is not None and (error := self._looped[1].exception()):
            warn(f"the step runs without loops in C: {error}", RuntimeWarning)

    @property
    def begun(self) -> bool:
        """Whether the compiler has been started."""
        return self._looped is not None

    @property
    def done(self) -> bool:
        """Whether the compiler has finished, with a library or an error."""
        return self._looped is not None and self._looped[1].done()

    @property
    def best(self) -> tuple[Replay, PyDLL | None]:
        """The calls to bind once it is ``done``, and the library of their loops."""
        if self._looped is None or self._looped[1].exception():
            return self.calls, None
        replay, library = self._looped
        return replay, library.result()


@lru_cache(maxsize=64)
def _prepare(recipe: Recipe, dialect: str, arguments: Tree, part: str) -> _Prepared:
    return _Prepared(recipe, dialect, arguments, part)


# A forked process has none of its parent's threads: what they compile would never be done
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_prepare.cache_clear)

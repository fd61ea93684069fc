"""The engine of CUDA devices: a step captured once in a graph, replayed for each batch.

What a step launches never changes: the kernels of `portable_mlp.engines.kernels` take the rows of
their batch, and the numbers that belong to the step, from where a counter on the device
points, and leave the loss there.  So the host asks for a step by one call, and looks at the
losses after the last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from math import isfinite
from typing import Any, ClassVar

import numpy as np

from portable_mlp.backends import Backend, is_out_of_memory
from portable_mlp.engines.base import (
    EPOCHS_AT_ONCE,
    RecordedEngine,
    Reduce,
    Task,
    Tree,
    Values,
    recorded,
    table,
)
from portable_mlp.engines.kernels import compile_program, gather_kernel
from portable_mlp.engines.launches import Kernel, Kernels, View
from portable_mlp.engines.program import leaves, specify
from portable_mlp.engines.recording import Unrecordable
from portable_mlp.engines.runtime import CaptureError, Cuda, Graph
from portable_mlp.steps import Arrays, Batch, Hyper, Recipe, step
from portable_mlp.typing import Array
from portable_mlp.warn import warn


@dataclass
class _Program:
    """A step that can be repeated.

    A graph holds addresses, and keeps no array alive: all that it points to lives as long as
    the program, for ``work`` holds it.

    Attributes
    ----------
    work : callable
        Launches kernel by kernel.
    graph : Graph, optional
        Of the same launches.
    """

    work: Callable[[], None]
    graph: Graph | None = None

    def __call__(self) -> None:
        if self.graph is None:
            self.work()
        else:
            self.graph.launch()


@dataclass
class _Memory:
    """What the programs for data of one shape point at: graphs hold pointers, not arrays.

    Attributes
    ----------
    given : list of array
        The data that came last.
    data : list of array
        Where it is: the same, or arrays of our own.
    own : bool
        Which of them.
    whole : bool
        Whether all data are one batch.
    table, rows, losses, at : array
        A step's numbers, row numbers of the data, values of each step, and the next step.
    programs : dict
        By the number of rows.
    """

    given: list[Array]
    data: list[Array]
    own: bool
    whole: bool
    table: Array
    rows: Array
    losses: Array
    at: Array
    programs: dict[int, _Program] = field(default_factory=dict)


class CaptureEngine(RecordedEngine):
    """Repeats a captured step.

    The first replay on batches of a size is compared with the step itself.  What cannot be
    captured is launched kernel by kernel; what differs, cannot be recorded, or needs more
    memory than there is, runs as the step itself.  A warning says which, and why.
    """

    name = "capture"

    _SHAPES = 4  # of data, to hold programs for: a reader's batches, and its last
    # Relative to the step's change, in the Euclidean norm
    _TOLERANCE: ClassVar[dict[str, float]] = {"float32": 1e-2, "float64": 1e-6}

    def __init__(self, backend: Backend, recipe: Recipe, reduce: Reduce | None = None) -> None:
        super().__init__(backend, recipe, reduce)
        self._cuda: Cuda | None = None
        self._arrays: Arrays | None = None
        self._memories: dict[Any, _Memory] = {}
        self._now: Any = None

    def repeat(self, arrays: Arrays, task: Task, values: Values) -> None:
        if self.reduce is not None:
            raise Unrecordable("a step in two halves is not captured")
        try:
            self._repeat(arrays, task, values)
        except Exception:
            # The step itself needs the memory
            self._memories.clear()
            self._cuda = self._arrays = self._now = None
            raise

    def _repeat(self, arrays: Arrays, task: Task, values: Values) -> None:
        done = task.first
        with _eager_for_want_of_memory():
            self._prepare(arrays, task)
            self._now.at[...] = done
        try:
            for rows, hyper in zip(task.batches(), task.hypers[done:], strict=False):
                self._advance(arrays, task, done, rows, hyper)
                done += 1
                if task.stop():
                    break
        finally:
            values += self._results(task.first, done)

    # ------------------------------------------------------------ an epoch

    def _prepare(self, arrays: Arrays, task: Task) -> None:
        """Put what an epoch's steps read where they read it."""
        to, given = self.backend.asarray, [a for a in task.data if a is not None]
        n, order, hypers = task.n_rows, task.order, task.hypers
        numbers = table(hypers)
        # Graphs point into it: it has room for whatever may come
        length = max(len(numbers), EPOCHS_AT_ONCE)
        rows = np.arange(n, dtype=np.int32) if order is None else order.astype(np.int32)
        whole = order is None and n <= task.batch_size
        if self._cuda is None:
            self._cuda = Cuda()
        if arrays is not self._arrays:
            self._memories.clear()
            self._arrays = arrays
        key = task.batch_size, whole, tuple((a.shape, str(a.dtype)) for a in given)
        now = self._memories.get(key)
        if now is not None and (len(rows) > len(now.rows) or len(numbers) > len(now.table)):
            now = None
        known = now is not None and all(a is b for a, b in zip(given, now.given, strict=True))
        if now is not None and now.own and not known:
            for mine, a in zip(now.data, given, strict=True):
                mine[...] = a
        elif now is None or not known:
            # Data that changes from call to call comes into arrays of our own
            own = now is not None
            if now is None and len(self._memories) == self._SHAPES:
                self._memories.clear()
            now = _Memory(
                given,
                [_row_by_row(to(a, copy=True) if own else a, self.backend.xp) for a in given],
                own,
                whole,
                to(np.zeros((length, numbers.shape[1]))),
                to(rows, copy=True),
                to(np.zeros((length, self.recipe.n_losses + 1))),
                to(np.zeros(1, np.int32)),
            )
            self._memories[key] = now
        now.given = given
        now.table[: len(numbers), ...] = to(numbers)
        now.rows[: len(rows)] = to(rows)
        self._now = now

    def _results(self, first: int, end: int) -> Values:
        found = self.backend.to_host(self._now.losses)[first:end].tolist()
        return [self._pair(row) for row in found]

    # ------------------------------------------------------------ a step

    def _advance(self, arrays: Arrays, task: Task, number: int, rows: slice, hyper: Hyper) -> None:
        size = rows.stop - rows.start
        program = self._now.programs.get(size)
        if program is None:
            with _eager_for_want_of_memory():  # which leaves the arrays as they were
                whole = self._now.whole
                batch = task.data if whole else self._take(task.data, self._now.rows[rows])
                work = self._bind(arrays, batch, task.batch_size, size, hyper)
                self._now.programs[size] = self._checked(arrays, batch, hyper, number, work)
            return
        try:
            program()
        except Exception as error:
            # A graph that is not launched has changed nothing.  Of kernels, some may have run:
            # what fails then is an error, for no step may be done twice
            if program.graph is None or not is_out_of_memory(error):
                raise
            program.graph = None
            _warn_of_kernels(error)
            program()

    def _take(self, data: Batch, chosen: Array) -> Batch:
        take = self.backend.xp.take
        return Batch(*(None if a is None else take(a, chosen, axis=0) for a in data))

    def _bind(
        self, arrays: Arrays, batch: Batch, batch_size: int, size: int, hyper: Hyper
    ) -> Callable[[], None]:
        """Allocate, and return the function that launches a step."""
        backend, cuda = self.backend, self._cuda
        assert cuda is not None
        kernels = _kernels(self.recipe, Tree(specify((arrays, batch, hyper))))
        now = self._now
        rows = [a for a in batch if a is not None]
        buffers = now.data if now.whole else [_row_by_row(a, backend.xp) for a in rows]
        work = backend.xp.zeros(
            kernels.n_bytes, dtype=backend.dtype("uint8"), device=backend.device
        )
        memories = [*leaves(arrays), *buffers, work]
        common = [now.table, now.at]

        def at(view: View) -> Array:
            return cuda.array(memories[view.place.memory], view)

        for view, value in kernels.constants:
            at(view)[...] = value
        calls: list[Callable[[], None]] = []

        def later(function: Callable[..., None], *arguments: Any) -> None:
            calls.append(lambda: function(*arguments))

        if not now.whole:
            source, gather = gather_kernel(list(specify(buffers)), size, batch_size)
            pairs = [a for pair in zip(now.data, buffers, strict=True) for a in pair]
            arguments = [*common, now.rows, *pairs]
            later(cuda.compile(source), gather, arguments)
        launch = cuda.compile(kernels.source)
        for number, each in enumerate(kernels.launches):
            if isinstance(each, Kernel):
                last = [now.losses] if number == len(kernels.launches) - 1 else []
                later(launch, each, [*common, *map(at, each.arguments), *last])
            else:
                later(cuda.multiply, at(each.left), at(each.right), at(each.out))

        def launch_all() -> None:
            for call in calls:
                call()

        return launch_all

    def _checked(
        self, arrays: Arrays, batch: Batch, hyper: Hyper, number: int, work: Callable[[], None]
    ) -> _Program:
        """Capture the work, do it once, and compare that with the step; undo it if they differ."""
        backend = self.backend
        own = [*leaves(arrays)]
        before = [backend.asarray(a, copy=True) for a in own]
        again = iter([backend.asarray(a, copy=True) for a in own])
        copies = Arrays(
            [next(again) for _ in arrays.leaves],
            [tuple(next(again) for _ in m) for m in arrays.moments],
        )
        wanted, wanted_values = step(self.recipe, copies, batch, self._numbers(hyper, arrays))

        def undo() -> None:
            for a, old in zip(own, before, strict=True):
                a[...] = old
            self._now.at[...] = number

        def attempt(action: Callable[[], None]) -> None:
            action()
            backend.synchronize()  # what fails on the device is seen only then

        try:
            attempt(work)  # loads the kernels, which cannot be while they are captured
            undo()
            program = self._captured(work)
            attempt(program)
            alike = self._alike(number, wanted_values, [*leaves(wanted)], own, before)
        except Exception as failure:  # the compiler's, CUDA's, cuBLAS's: no common base
            undo()
            if is_out_of_memory(failure):
                raise
            raise Unrecordable(f"its kernels fail: {failure}") from failure
        if not alike:
            undo()
            raise Unrecordable("its kernels do not compute what the step computes")
        return program

    def _alike(
        self,
        number: int,
        wanted_values: tuple[Array, Array],
        wanted: list[Array],
        got: list[Array],
        before: list[Array],
    ) -> bool:
        """Compare the arrays and values after a step with those wanted, on the device."""
        norm = self.backend.xp.linalg.vector_norm
        dtype = str(got[0].dtype)
        tolerance, eps = self._TOLERANCE[dtype], float(np.finfo(dtype).eps)
        host = self.backend.to_host
        each = (np.ravel(host(v) if hasattr(v, "shape") else v) for v in wanted_values)
        values = np.concatenate([*each])
        found = np.concatenate([*map(np.ravel, self._results(number, number + 1)[0])])
        if not np.allclose(found, values, rtol=tolerance, atol=tolerance, equal_nan=True):
            return False
        for w, g, b in zip(wanted, got, before, strict=True):
            norms = self.backend.fetch([norm(g - w), norm(w - b), norm(w)])
            error, change, size = norms.tolist()
            # Where the step overflows, the kernels may do so differently
            if isfinite(size) and not error <= tolerance * change + 10 * eps * size:
                return False
        return True

    def _captured(self, work: Callable[[], None]) -> _Program:
        """Return the work as a graph, or as it is."""
        assert self._cuda is not None
        try:
            return _Program(work, self._cuda.capture(work))
        except CaptureError as reason:
            _warn_of_kernels(reason)
            return _Program(work)


@contextmanager
def _eager_for_want_of_memory() -> Iterator[None]:
    """Make a want of memory a reason to run the step itself."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise Unrecordable(f"there is not enough memory for a graph: {error}") from error
        raise


def _warn_of_kernels(reason: Exception) -> None:
    warn(
        f"the step is launched kernel by kernel, without a CUDA graph: {reason}",
        RuntimeWarning,
    )


def _row_by_row(a: Array, xp: Any) -> Array:
    """The array, laid out row by row; itself, if it is."""
    return xp.reshape(xp.reshape(a, (-1,)), a.shape)


@lru_cache(maxsize=64)
def _kernels(recipe: Recipe, arguments: Tree) -> Kernels:
    # Without memory, so that it can outlive a fit
    program, roles = recorded(recipe, arguments)
    return compile_program(program, roles.donated)

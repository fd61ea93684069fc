"""The engine of CUDA devices, which captures a step in a graph and replays it for each batch.

The launches of a step never change.  The kernels (`portable_mlp.engines.cuda.kernels`) read the
rows of their batch and the numbers of the step at the position of a counter on the device, and
store the loss there.  So the host launches a step by one call, and reads the losses after the
last step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from math import isfinite
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from portable_mlp.backends import Backend, is_out_of_memory
from portable_mlp.engines.base import (
    EPOCHS_AT_ONCE,
    FIRST,
    SECOND,
    WHOLE,
    RecordedEngine,
    Reduce,
    Task,
    Tree,
    Values,
    recorded,
    table,
    take_rows,
)
from portable_mlp.engines.cuda.kernels import compile_program, gather_kernel
from portable_mlp.engines.cuda.launches import Kernel, Kernels, View
from portable_mlp.engines.cuda.runtime import CaptureError, Cuda, Graph
from portable_mlp.engines.graph.program import flatten, specify
from portable_mlp.engines.graph.recording import Unrecordable
from portable_mlp.steps import Arrays, Batch, Hyper, Recipe
from portable_mlp.typing import Array
from portable_mlp.warn import warn


@dataclass
class _Work:
    """A sequence of launches that can be repeated.

    A graph holds addresses, and does not keep arrays alive.  ``launch`` does: all arrays that
    the graph points to live as long as this object.

    Attributes
    ----------
    launch : callable
        Function that launches kernel by kernel.
    graph : Graph, optional
        The captured graph of the same launches.
    """

    launch: Callable[[], None]
    graph: Graph | None = None

    def __call__(self) -> None:
        if self.graph is not None:
            try:
                self.graph.launch()
                return
            except Exception as error:
                # A graph that fails to launch has changed nothing, so the kernels can do the
                # step.  If they fail halfway, it is an error: no step may be done twice
                if not is_out_of_memory(error):
                    raise
                self.graph = None
                _warn_of_kernels(error)
        self.launch()


@dataclass
class _Program:
    """A step that can be repeated: one work, or two with a reduction between them."""

    works: list[_Work]
    between: Callable[[], None] | None = None

    def __call__(self) -> None:
        self.works[0]()
        if self.between is not None:
            self.between()
            self.works[1]()


@dataclass
class _Memory:
    """The arrays that the programs for data of one shape point at.

    Attributes
    ----------
    given : list of array
        The data of the last task.
    data : list of array
        The arrays that the programs read: the same, or copies.
    own : bool
        Whether they are copies.
    whole : bool
        Whether all rows are one batch.
    tables : list of array
        The numbers of the steps, (steps, numbers); one table for each half of a step.
    rows : array (rows,) or (rows, members)
        Row numbers in the order of training, int32.
    losses : array (steps, losses + 1)
        Losses and penalty of each step.
    at : array (1,)
        Number of the next step, int32.
    programs : dict
        The program for each number of rows of a batch.
    """

    given: list[Array]
    data: list[Array]
    own: bool
    whole: bool
    tables: list[Array]
    rows: Array
    losses: Array
    at: Array
    programs: dict[int, _Program] = field(default_factory=dict)


class CaptureEngine(RecordedEngine):
    """An engine that repeats a captured step.

    The first replay for each size of batch is compared with the step itself.  A step that
    cannot be captured is launched kernel by kernel.  A step that differs, cannot be recorded,
    or needs more memory than there is, runs eagerly.  A warning says which, and why.
    """

    name = "capture"

    _SHAPES = 4  # of data whose programs are kept, such as a reader's parts and its last part
    # Largest error of a replay relative to the change of the step, in the Euclidean norm
    _TOLERANCE: ClassVar[dict[str, float]] = {"float32": 1e-2, "float64": 1e-6}

    def __init__(self, backend: Backend, recipe: Recipe, reduce: Reduce | None = None) -> None:
        super().__init__(backend, recipe, reduce)
        self._cuda: Cuda | None = None
        self._arrays: Arrays | None = None
        self._memories: dict[Any, _Memory] = {}
        self._now: Any = None

    def repeat(self, arrays: Arrays, task: Task, values: Values) -> None:
        try:
            self._repeat(arrays, task, values)
        except Exception:
            # The eager step that follows needs the memory
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
        """Write the data and the numbers of an epoch to where its programs read them."""
        to, given = self.backend.asarray, [a for a in task.data if a is not None]
        n, order = task.n_rows, task.order
        numbers = self._tables(task)
        # Graphs point into the tables, so these are as long as any later task needs
        length = max(len(numbers[0]), EPOCHS_AT_ONCE)
        chosen = np.arange(n) if order is None else order.T
        rows = np.ascontiguousarray(chosen, np.int32)
        whole = order is None and n <= task.batch_size
        if self._cuda is None:
            self._cuda = Cuda()
        if arrays is not self._arrays:
            self._memories.clear()
            self._arrays = arrays
        shapes = tuple((a.shape, str(a.dtype)) for a in given)
        key = task.batch_size, whole, rows.shape[1:], shapes
        now = self._memories.get(key)
        if now is not None and (len(rows) > len(now.rows) or length > len(now.losses)):
            now = None
        known = now is not None and all(a is b for a, b in zip(given, now.given, strict=True))
        if now is not None and now.own and not known:
            for mine, a in zip(now.data, given, strict=True):
                mine[...] = a
        elif now is None or not known:
            # Data that is another array at each call is copied into arrays that stay
            own = now is not None
            if now is None and len(self._memories) == self._SHAPES:
                self._memories.clear()
            now = _Memory(
                given,
                [_row_by_row(to(a, copy=True) if own else a, self.backend.xp) for a in given],
                own,
                whole,
                [to(np.zeros((length, own.shape[1]))) for own in numbers],
                to(rows, copy=True),
                to(np.zeros((length, self.recipe.n_losses + 1))),
                to(np.zeros(1, np.int32)),
            )
            self._memories[key] = now
        now.given = given
        for mine, own_numbers in zip(now.tables, numbers, strict=True):
            if own_numbers.size:
                mine[: len(own_numbers), ...] = to(own_numbers)
        now.rows[: len(rows)] = to(rows)
        self._now = now

    def _tables(self, task: Task) -> list[NDArray[np.float64]]:
        """Return the table of numbers for each program of a step, (steps, numbers)."""
        if self.reduce is None:
            return [table(task.hypers)]
        sizes = [rows.stop - rows.start for rows in task._replace(first=0).batches()]
        first, second = [], []
        for number, hyper in enumerate(task.hypers):
            total = None if task.totals is None else float(task.totals[number])
            n = total if total is not None or task.data.weights is not None else sizes[number]
            first.append((hyper.forward, total))
            second.append((hyper, n))
        return [table(first), table(second)]

    def _results(self, first: int, end: int) -> Values:
        found = self.backend.to_host(self._now.losses)[first:end].tolist()
        return [self._pair(row) for row in found]

    # ------------------------------------------------------------ a step

    def _advance(self, arrays: Arrays, task: Task, number: int, rows: slice, hyper: Hyper) -> None:
        size = rows.stop - rows.start
        program = self._now.programs.get(size)
        if program is not None:
            program()
            return
        with _eager_for_want_of_memory():  # which leaves the arrays as they were
            whole = self._now.whole
            batch = task.data
            if not whole:
                chosen = self._now.rows[rows]
                batch = take_rows(batch, chosen if chosen.ndim == 1 else chosen.T, self.backend.xp)
            total = None if task.totals is None else float(task.totals[number])
            program = self._bind(arrays, batch, task.batch_size, size, hyper, total)
            self._check(arrays, batch, hyper, total, number, program)
            self._now.programs[size] = program

    def _bind(
        self,
        arrays: Arrays,
        batch: Batch,
        batch_size: int,
        size: int,
        hyper: Hyper,
        total: float | None,
    ) -> _Program:
        """Allocate memory, and return the program of a step, not captured yet."""
        backend, now = self.backend, self._now
        rows = [a for a in batch if a is not None]
        buffers = now.data if now.whole else [_row_by_row(a, backend.xp) for a in rows]
        own = [*flatten(arrays)]
        gather = [] if now.whole else [self._gather(buffers, size, batch_size)]
        if self.reduce is None:
            arguments: Any = arrays, batch, hyper
            calls = self._calls(WHOLE, arguments, [*own, *buffers], now.tables[0])
            return _Program([_Work(_all_of([*gather, *calls]))])
        n = self._weight(batch, total)
        vector = backend.xp.zeros(
            self._length(arrays, batch, total), dtype=arrays.leaves[0].dtype, device=backend.device
        )
        arguments = [vector], arrays.leaves, batch, hyper.forward, total
        first = self._calls(FIRST, arguments, [vector, *arrays.leaves, *buffers], now.tables[0])
        second = self._calls(SECOND, (arrays, vector, hyper, n), [*own, vector], now.tables[1])
        works = [_Work(_all_of([*gather, *first])), _Work(_all_of(second))]
        return _Program(works, partial(self.reduce, vector))

    def _gather(self, buffers: list[Array], size: int, batch_size: int) -> Callable[[], None]:
        """Return the launch that copies the rows of a batch into buffers."""
        now, cuda = self._now, self._cuda
        assert cuda is not None
        members = None if now.rows.ndim == 1 else now.rows.shape[1]
        source, kernel = gather_kernel(list(specify(buffers)), size, batch_size, members)
        pairs = [a for pair in zip(now.data, buffers, strict=True) for a in pair]
        return partial(cuda.compile(source), kernel, [now.tables[0], now.at, now.rows, *pairs])

    def _calls(
        self, part: str, arguments: Any, given: list[Array], numbers: Array
    ) -> list[Callable[[], None]]:
        """Return the launches of a program on the given arrays and on new work memory."""
        backend, cuda, now = self.backend, self._cuda, self._now
        assert cuda is not None
        kernels = _kernels(self.recipe, Tree(specify(arguments)), part)
        work = backend.xp.zeros(
            kernels.n_bytes, dtype=backend.dtype("uint8"), device=backend.device
        )
        memories = [*given, work]

        def at(view: View) -> Array:
            return cuda.array(memories[view.place.memory], view)

        for view, value in kernels.constants:
            at(view)[...] = value
        calls: list[Callable[[], None]] = []
        launch = cuda.compile(kernels.source)
        for number, each in enumerate(kernels.launches):
            if isinstance(each, Kernel):
                is_last = kernels.n_results and number == len(kernels.launches) - 1
                last = [now.losses] if is_last else []
                calls.append(
                    partial(launch, each, [numbers, now.at, *map(at, each.arguments), *last])
                )
            else:
                calls.append(partial(cuda.multiply, at(each.left), at(each.right), at(each.out)))
        return calls

    def _check(
        self,
        arrays: Arrays,
        batch: Batch,
        hyper: Hyper,
        total: float | None,
        number: int,
        program: _Program,
    ) -> None:
        """Capture a step, replay it once, and compare the result with the step itself.

        Raises
        ------
        Unrecordable
            If they differ, or the replay fails.  The arrays are then as before the step.
        """
        backend = self.backend
        own = [*flatten(arrays)]
        before = [backend.asarray(a, copy=True) for a in own]
        again = iter([backend.asarray(a, copy=True) for a in own])
        copies = Arrays(
            [next(again) for _ in arrays.leaves],
            [tuple(next(again) for _ in m) for m in arrays.moments],
        )
        wanted, wanted_values = self._step(copies, batch, hyper, total)

        def undo() -> None:
            for a, old in zip(own, before, strict=True):
                a[...] = old
            self._now.at[...] = number

        def attempt(action: Callable[[], None]) -> None:
            action()
            backend.synchronize()  # errors on the device are reported only here

        try:
            attempt(program)  # loads the kernels, which is impossible during a capture
            undo()
            for work in program.works:
                self._capture(work)
            attempt(program)
            alike = self._alike(number, wanted_values, [*flatten(wanted)], own, before)
        except Exception as failure:  # those of NVRTC, CUDA and cuBLAS have no common base
            undo()
            if is_out_of_memory(failure):
                raise
            raise Unrecordable(f"its kernels fail: {failure}") from failure
        if not alike:
            undo()
            raise Unrecordable("its kernels do not compute what the step computes")

    def _alike(
        self,
        number: int,
        wanted_values: tuple[Array, Array],
        wanted: list[Array],
        got: list[Array],
        before: list[Array],
    ) -> bool:
        """Tell whether the arrays and values after a step are close to those wanted."""
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
            # If the step overflows, the kernels may overflow elsewhere: no comparison
            if isfinite(size) and not error <= tolerance * change + 10 * eps * size:
                return False
        return True

    def _capture(self, work: _Work) -> None:
        """Capture the work in a graph; warn if that is impossible."""
        assert self._cuda is not None
        try:
            work.graph = self._cuda.capture(work.launch)
        except CaptureError as reason:
            _warn_of_kernels(reason)


def _all_of(calls: list[Callable[[], None]]) -> Callable[[], None]:
    def launch() -> None:
        for call in calls:
            call()

    return launch


@contextmanager
def _eager_for_want_of_memory() -> Iterator[None]:
    """Turn an out-of-memory error into a reason to run the step eagerly."""
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
    """Return the array in row-major order, without a copy if it is."""
    return xp.reshape(xp.reshape(a, (-1,)), a.shape)


@lru_cache(maxsize=64)
def _kernels(recipe: Recipe, arguments: Tree, part: str) -> Kernels:
    # Kernels hold no memory, so that they can outlive a fit
    program, roles = recorded(recipe, arguments, part)
    return compile_program(program, roles.donated)

"""The engine of CUDA devices: a step captured once in a graph, replayed for each batch.

What a step launches never changes: the kernels of `portable_mlp.engines.kernels` take the rows of
their batch, and the numbers that belong to the step, from where a counter on the device
points, and leave the loss there.  So the host asks for a step by one call, and looks at the
losses after the last.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from importlib import import_module
from typing import Any, ClassVar

import numpy as np

from portable_mlp.backends import Backend
from portable_mlp.engines.base import EPOCHS_AT_ONCE, RecordedEngine, Task, Tree, Values, recorded
from portable_mlp.engines.kernels import compile_program, gather_kernel
from portable_mlp.engines.launches import Kernel, Kernels, View
from portable_mlp.engines.program import leaves, specify
from portable_mlp.engines.recording import Unrecordable
from portable_mlp.steps import Arrays, Batch, Hyper, Recipe, step
from portable_mlp.typing import Array
from portable_mlp.warn import warn


class CaptureError(RuntimeError):
    """Work cannot be captured in a graph; the message says why."""


class Cuda:
    """What the engine asks of CUDA, through CuPy and cuBLAS.

    CuPy refuses to call cuBLAS while it captures; nvmath-python's bindings do not.

    Attributes
    ----------
    refuses : str
        Why nothing can be captured; empty if it can.
    """

    _WORKSPACE = 32 << 20  # bytes, as cuBLAS recommends for Hopper

    def __init__(self) -> None:
        self._cupy = import_module("cupy")
        self.refuses = ""
        try:
            self._cublas = import_module("nvmath.bindings.cublas")
            self._handle = self._cublas.create()
        except Exception as error:  # not installed, or its libraries do not load
            self.refuses = f"nvmath-python gives no cuBLAS ({error})"
            return
        weakref.finalize(self, self._cublas.destroy, self._handle)
        self._workspace = self._cupy.empty(self._WORKSPACE, np.uint8)
        self._stream = -1

    def array(self, memory: Array, view: View) -> Array:
        """An array in another's memory."""
        size = view.dtype.itemsize
        return self._cupy.ndarray(
            view.shape,
            view.dtype,
            memptr=memory.data + view.place.offset,
            strides=tuple(stride * size for stride in view.strides),
        )

    def compile(self, source: str) -> Callable[[Kernel, Sequence[Array]], None]:
        """Return what launches a kernel of the source."""
        # CuPy's get_function makes a new one each time, which is loaded at its first launch
        function_of = cache(self._cupy.RawModule(code=source).get_function)

        def launch(kernel: Kernel, arguments: Sequence[Array]) -> None:
            function = function_of(kernel.name)
            function((kernel.blocks,), (kernel.threads,), tuple(arguments))

        return launch

    def multiply(self, left: Array, right: Array, out: Array) -> None:
        """A product of matrices; ``out`` lies row by row."""
        if self.refuses:
            self._cupy.matmul(left, right, out=out)
            return
        stream = self._cupy.cuda.get_current_stream().ptr
        if stream != self._stream:
            self._cublas.set_stream(self._handle, stream)
            # A new stream takes the workspace away
            self._cublas.set_workspace(self._handle, self._workspace.data.ptr, self._WORKSPACE)
            self._stream = stream
        gemm = self._cublas.sgemm if out.dtype == np.float32 else self._cublas.dgemm
        one, zero = np.ones(1, out.dtype), np.zeros(1, out.dtype)
        # cuBLAS thinks in columns, where these are the transposes: outᵀ = rightᵀ leftᵀ
        (n, k), m = left.shape, right.shape[1]
        (right_op, right_step), (left_op, left_step) = layout(right), layout(left)
        gemm(
            self._handle, right_op, left_op, m, n, k, one.ctypes.data, right.data.ptr, right_step,
            left.data.ptr, left_step, zero.ctypes.data, out.data.ptr, m,
        )  # fmt: skip

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Return what repeats the work, on the stream that is then current.

        Raises
        ------
        CaptureError
        """
        if self.refuses:
            raise CaptureError(self.refuses)
        stream = self._cupy.cuda.Stream(non_blocking=True)
        try:
            with stream:
                stream.begin_capture()
                try:
                    work()
                finally:
                    graph = stream.end_capture()
        except Exception as error:  # CuPy's and nvmath's errors have no common base
            raise CaptureError(str(error)) from error
        launch: Callable[[], None] = graph.launch
        return launch


def layout(a: Array) -> tuple[int, int]:
    """For cuBLAS, of a matrix read as columns: whether to transpose it, and its step.

    Parameters
    ----------
    a : array (n, m)
        With contiguous rows or contiguous columns.
    """
    n, m = a.shape
    down, along = (stride // a.dtype.itemsize for stride in a.strides)
    if along == 1 or m == 1:
        return 0, down if n > 1 else m
    return 1, along if m > 1 else n


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
    programs: dict[int, Callable[[], None]] = field(default_factory=dict)


class CaptureEngine(RecordedEngine):
    """Repeats a captured step.

    The first replay on batches of a size is compared with the step itself.  What cannot be
    captured is launched kernel by kernel, what differs or cannot be recorded runs as the
    step itself, with a warning that says why.
    """

    name = "capture"
    runtime: ClassVar[Callable[[], Any]] = Cuda

    _SHAPES = 4  # of data, to hold programs for: a reader's batches, and its last
    # Relative to the step's change, in the Euclidean norm
    _TOLERANCE: ClassVar[dict[str, float]] = {"float32": 1e-2, "float64": 1e-6}

    def __init__(self, backend: Backend, recipe: Recipe) -> None:
        super().__init__(backend, recipe)
        self.cuda: Any = None
        self._arrays: Arrays | None = None
        self._memories: dict[Any, _Memory] = {}
        self._now: Any = None

    def repeat(self, arrays: Arrays, task: Task, values: Values) -> None:
        self._prepare(arrays, task)
        done = task.first
        self._now.at[...] = done
        try:
            for rows, hyper in zip(task.batches(), task.hypers[done:], strict=False):
                self._step(arrays, task, done, rows, hyper)
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
        table = np.array([(h.alpha, *h.coefficients, *h.keys) for h in hypers], np.float64)
        # Graphs point into it: it has room for whatever may come
        room = np.zeros((max(len(table), EPOCHS_AT_ONCE), table.shape[1]))
        rows = np.arange(n, dtype=np.int32) if order is None else order.astype(np.int32)
        whole = order is None and n <= task.batch_size
        if self.cuda is None:
            self.cuda = type(self).runtime()
        if arrays is not self._arrays:
            self._memories.clear()
            self._arrays = arrays
        key = task.batch_size, whole, tuple((a.shape, str(a.dtype)) for a in given)
        now = self._memories.get(key)
        if now is not None and (len(rows) > len(now.rows) or len(table) > len(now.table)):
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
                to(room),
                to(rows, copy=True),
                to(room[:, :2], copy=True),
                to(np.zeros(1, np.int32)),
            )
            self._memories[key] = now
        now.given = given
        now.table[: len(table), ...] = to(table)
        now.rows[: len(rows)] = to(rows)
        self._now = now

    def _results(self, first: int, end: int) -> Values:
        found = self.backend.to_host(self._now.losses)[first:end].tolist()
        return [(loss, penalty) for loss, penalty in found]

    # ------------------------------------------------------------ a step

    def _step(self, arrays: Arrays, task: Task, number: int, rows: slice, hyper: Hyper) -> None:
        size = rows.stop - rows.start
        program = self._now.programs.get(size)
        if program is not None:
            program()
            return
        chosen = self._now.rows[rows]
        take = self.backend.xp.take
        batch = Batch(*(None if a is None else take(a, chosen, axis=0) for a in task.data))
        work = self._bind(arrays, batch, task.batch_size, size, hyper)
        self._now.programs[size] = self._checked(arrays, batch, hyper, number, work)

    def _bind(
        self, arrays: Arrays, batch: Batch, batch_size: int, size: int, hyper: Hyper
    ) -> Callable[[], None]:
        """Allocate, and return the function that launches a step."""
        backend, cuda = self.backend, self.cuda
        kernels = _kernels(self.recipe, Tree(specify((arrays, batch, hyper))))
        now = self._now
        rows = [_row_by_row(a, backend.xp) for a in batch if a is not None]
        buffers = now.data if now.whole else rows
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
    ) -> Callable[[], None]:
        """Capture the work, do it once, and compare that with the step; undo it if they differ."""
        backend = self.backend
        own = [*leaves(arrays)]
        before = [backend.asarray(a, copy=True) for a in own]
        again = iter([backend.asarray(a, copy=True) for a in own])
        copies = Arrays(
            [next(again) for _ in arrays.leaves],
            [tuple(next(again) for _ in m) for m in arrays.moments],
        )
        wanted, values = step(self.recipe, copies, batch, hyper)

        def undo() -> None:
            for a, old in zip(own, before, strict=True):
                a[...] = old
            self._now.at[...] = number

        def attempt(action: Callable[[], None]) -> None:
            try:
                action()
            except Exception as failure:  # the compiler's, CUDA's, cuBLAS's: no common base
                undo()
                raise Unrecordable(f"its kernels fail: {failure}") from failure

        attempt(work)  # loads the kernels, which cannot be while they are captured
        undo()
        program = self._captured(work)
        attempt(program)
        tolerance = self._TOLERANCE[str(own[0].dtype)]
        host = [backend.to_host(a).astype(np.float64) for a in (*leaves(wanted), *own, *before)]
        n = len(own)
        alike = np.allclose(
            self._results(number, number + 1)[0],
            [float(v) for v in values],
            rtol=tolerance,
            atol=tolerance,
            equal_nan=True,
        )
        for right, got, old in zip(host[:n], host[n : 2 * n], host[2 * n :], strict=True):
            error, change = np.linalg.norm(got - right), np.linalg.norm(right - old)
            rounding = np.finfo(str(own[0].dtype)).eps * np.linalg.norm(right)
            finite = np.isfinite(right).all()
            alike &= bool(not finite or error <= tolerance * change + 10 * rounding)
        if not alike:
            undo()
            raise Unrecordable("its kernels do not compute what the step computes")
        return program

    def _captured(self, work: Callable[[], None]) -> Callable[[], None]:
        """What repeats the work by one call, or the work itself."""
        try:
            replay: Callable[[], None] = self.cuda.capture(work)
        except CaptureError as reason:
            warn(
                f"the step is launched kernel by kernel, without a CUDA graph: {reason}",
                RuntimeWarning,
            )
            return work
        return replay


def _row_by_row(a: Array, xp: Any) -> Array:
    """The array, laid out row by row; itself, if it is."""
    return xp.reshape(xp.reshape(a, (-1,)), a.shape)


@lru_cache(maxsize=64)
def _kernels(recipe: Recipe, arguments: Tree) -> Kernels:
    # Without memory, so that it can outlive a fit
    return compile_program(*recorded(recipe, arguments))

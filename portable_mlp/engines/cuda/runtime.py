"""The interface to CUDA: arrays at addresses, kernels, matrix products, graphs.

CuPy does all of it but one thing: it refuses to call cuBLAS while it captures a graph.  So the
products of a captured step call the cuBLAS library that CuPy has loaded through `ctypes`.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from ctypes import addressof, c_double, c_float, c_int, c_longlong, c_size_t, c_void_p
from functools import cache
from importlib import import_module
from typing import Any, Protocol

import numpy as np

from portable_mlp.engines.cuda.launches import Kernel, View
from portable_mlp.typing import Array

_WORKSPACE = 32 << 20  # bytes, as cuBLAS recommends for Hopper
_ATTEMPTS = 3  # at a capture, which another thread may invalidate


class CaptureError(RuntimeError):
    """Launches cannot be captured in a graph; the message says why."""


class Graph(Protocol):
    """A captured graph; it holds addresses, and does not keep arrays alive."""

    def launch(self) -> None:
        """Launch the captured work on the current stream."""


class Cuda:
    """CUDA for one engine, on the current device; for one thread at a time.

    Attributes
    ----------
    refuses : str
        Why nothing can be captured; empty if capturing works.
    """

    def __init__(self) -> None:
        self._cupy = import_module("cupy")
        self._workspace: Array | None = None
        self._stream: Any = None
        self.refuses = ""
        try:
            self._cublas = _load_cublas(self._cupy)
        except (ImportError, OSError, AttributeError) as error:
            self.refuses = f"cuBLAS cannot be called directly ({error})"

    def array(self, memory: Array, view: View) -> Array:
        """Return an array in the memory of another one, which it keeps alive."""
        size = view.dtype.itemsize
        return self._cupy.ndarray(
            view.shape,
            view.dtype,
            memptr=memory.data + view.place.offset,
            strides=tuple(stride * size for stride in view.strides),
        )

    def compile(self, source: str) -> Callable[[Kernel, Sequence[Array]], None]:
        """Compile CUDA source; return a function that launches one of its kernels."""
        # CuPy's get_function makes a new function each time, and loads it at its first launch
        function_of = cache(self._cupy.RawModule(code=source).get_function)

        def launch(kernel: Kernel, arguments: Sequence[Array]) -> None:
            function = function_of(kernel.name)
            function((kernel.blocks,), (kernel.threads,), tuple(arguments))

        return launch

    def multiply(self, left: Array, right: Array, out: Array) -> None:
        """Multiply matrices, or stacks of them, on the current stream.

        Parameters
        ----------
        left : array (n, k) or (stack, n, k)
        right : array (k, m) or (stack, k, m)
            Each matrix has contiguous rows or contiguous columns; any stride of the stack.
        out : array (n, m) or (stack, n, m)
            With contiguous rows.  All three are float32, or all float64.
        """
        if self.refuses:
            self._cupy.matmul(left, right, out=out)
            return
        cuda = self._cupy.cuda
        if self._workspace is None:
            self._workspace = self._cupy.empty(_WORKSPACE, np.uint8)
        # CuPy has a handle for each thread and device, and sets its stream before each of its
        # own calls.  Afterwards we leave the default stream there: it is never destroyed, while
        # the stream of a capture may be
        handle = cuda.Device().cublas_handle
        call = self._cublas
        letter, one, zero = _GEMMS[str(out.dtype)]
        # cuBLAS expects column-major matrices, which ours are transposes of: outᵀ = rightᵀ leftᵀ
        (n, k), m = left.shape[-2:], right.shape[-1]
        (right_op, right_step), (left_op, left_step) = layout(right), layout(left)
        matrices: list[tuple[int, ...]] = [
            (right.data.ptr, right_step), (left.data.ptr, left_step), (out.data.ptr, m)
        ]  # fmt: skip
        gemm, count = f"cublas{letter}gemm_v2", []
        if out.ndim == 3:
            gemm, count = f"cublas{letter}gemmStridedBatched", [len(out)]
            strides = (a.strides[0] // a.dtype.itemsize for a in (right, left, out))
            matrices = [(*own, stride) for own, stride in zip(matrices, strides, strict=True)]
        first, second, third = matrices
        call("cublasSetStream_v2", handle, cuda.get_current_stream().ptr)
        try:
            # Without it, each launch of a graph would allocate a workspace
            call("cublasSetWorkspace_v2", handle, self._workspace.data.ptr, _WORKSPACE)
            call(
                gemm, handle, right_op, left_op, m, n, k, addressof(one), *first, *second,
                addressof(zero), *third, *count,
            )  # fmt: skip
        finally:
            call("cublasSetStream_v2", handle, 0)  # takes the workspace away, too

    def capture(self, work: Callable[[], None]) -> Graph:
        """Capture what the work launches in a graph, without running it.

        Parameters
        ----------
        work : callable
            It must have run before, since kernels cannot be loaded during a capture.  The graph
            points at its arrays, and at the workspace of this object.  The owner of the graph
            has to keep both alive.

        Raises
        ------
        CaptureError
            If it cannot be captured; it can still be launched without a graph.
        """
        if self.refuses:
            raise CaptureError(self.refuses)
        if self._stream is None:
            self._stream = self._cupy.cuda.Stream(non_blocking=True)
        reason = ""
        for _ in range(_ATTEMPTS):
            try:
                return self._capture(work)
            except Exception as error:  # CuPy's errors have no common base
                # Not the error itself: its traceback would keep this frame and its arrays alive
                reason = reason or str(error)
        raise CaptureError(reason)

    def _capture(self, work: Callable[[], None]) -> Graph:
        with self._stream as stream:
            stream.begin_capture()
            try:
                work()
            except BaseException:
                with suppress(Exception):  # the first error is the cause
                    stream.end_capture()
                raise
            graph: Graph = stream.end_capture()
        return graph


def layout(a: Array) -> tuple[int, int]:
    """Return how cuBLAS reads a matrix: whether to transpose it, and its leading dimension.

    Parameters
    ----------
    a : array (n, m) or (stack, n, m)
        With contiguous rows or contiguous columns.
    """
    n, m = a.shape[-2:]
    down, along = (stride // a.dtype.itemsize for stride in a.strides[-2:])
    if along == 1 or m == 1:
        return 0, down if n > 1 else m
    return 1, along if m > 1 else n


_GEMMS = {
    "float32": ("S", c_float(1), c_float(0)),
    "float64": ("D", c_double(1), c_double(0)),
}
"""For each data type, the letter of the functions, and the factors 1 and 0 on the host."""

# cublasStatus_t (handle, transa, transb, m, n, k, alpha, A, lda, B, ldb, beta, C, ldc)
_GEMM = [
    c_void_p, c_int, c_int, c_int, c_int, c_int, c_void_p, c_void_p, c_int, c_void_p, c_int,
    c_void_p, c_void_p, c_int,
]  # fmt: skip
# The same with a stride behind each of A, B and C, and a batchCount
_STACKED = [
    *_GEMM[:9], c_longlong, *_GEMM[9:11], c_longlong, *_GEMM[11:], c_longlong, c_int,
]  # fmt: skip
_SIGNATURES = {
    "cublasSetStream_v2": [c_void_p, c_void_p],
    "cublasSetWorkspace_v2": [c_void_p, c_void_p, c_size_t],
    "cublasSgemm_v2": _GEMM,
    "cublasDgemm_v2": _GEMM,
    "cublasSgemmStridedBatched": _STACKED,
    "cublasDgemmStridedBatched": _STACKED,
}


def _load_cublas(cupy: Any) -> Callable[..., None]:
    """Return a function that calls the cuBLAS library that CuPy uses, by name.

    Raises
    ------
    ImportError, OSError, AttributeError
        If it does not load, or lacks a function.
    """
    module = cupy.cuda.cublas
    # On Linux a symbol is also looked up in the libraries that CuPy's module depends on.  So this
    # is CuPy's own cuBLAS, whatever others are installed.  Windows finds it by its name
    major = cupy.cuda.runtime.runtimeGetVersion() // 1000
    path = f"cublas64_{major}.dll" if sys.platform == "win32" else module.__file__
    library = ctypes.CDLL(path)
    functions = {}
    for name, arguments in _SIGNATURES.items():
        functions[name] = getattr(library, name)
        functions[name].argtypes = arguments

    def call(name: str, *arguments: Any) -> None:
        module.check_status(functions[name](*arguments))

    return call

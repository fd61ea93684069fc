"""cuBLAS on the host: a shared library with its C functions, which ask the driver.

It works on addresses, on the stream of its handle, with a workspace that has to be alive.
"""

from __future__ import annotations

import ctypes
import threading
from contextlib import suppress
from ctypes import c_double, c_float, c_int, c_longlong, c_size_t, c_void_p
from types import ModuleType
from typing import Any

import numpy as np

from fake_cuda.driver import CUDARuntimeError, Driver, Node, Queue
from fake_cuda.kernels import build

SUCCESS, NOT_INITIALIZED, ALLOC_FAILED, INVALID_VALUE, EXECUTION_FAILED = 0, 1, 3, 7, 13
STATUS = {
    NOT_INITIALIZED: "CUBLAS_STATUS_NOT_INITIALIZED", ALLOC_FAILED: "CUBLAS_STATUS_ALLOC_FAILED",
    INVALID_VALUE: "CUBLAS_STATUS_INVALID_VALUE",
    EXECUTION_FAILED: "CUBLAS_STATUS_EXECUTION_FAILED",
}  # fmt: skip

_SOURCE = """
#include <cstddef>
typedef int (*Gemm)(int, void*, int, int, int, int, int, const void*, const void*, int, long long,
                    const void*, int, long long, const void*, void*, int, long long, int);
typedef int (*Stream)(void*, void*);
typedef int (*Workspace)(void*, void*, size_t);
static Gemm gemm;
static Stream stream;
static Workspace workspace;
extern "C" {
void serve(Gemm g, Stream s, Workspace w) { gemm = g; stream = s; workspace = w; }
int cublasSetStream_v2(void* handle, void* s) { return stream(handle, s); }
int cublasSetWorkspace_v2(void* handle, void* p, size_t n) { return workspace(handle, p, n); }
#define GEMMS(letter, type)                                                                      \\
int cublas##letter##gemm_v2(void* handle, int ta, int tb, int m, int n, int k, const type* alpha, \\
        const type* a, int lda, const type* b, int ldb, const type* beta, type* c, int ldc) {     \\
    return gemm(sizeof(type), handle, ta, tb, m, n, k, alpha, a, lda, 0, b, ldb, 0, beta, c, ldc, \\
                0, 1);                                                                            \\
}                                                                                                 \\
int cublas##letter##gemmStridedBatched(void* handle, int ta, int tb, int m, int n, int k,         \\
        const type* alpha, const type* a, int lda, long long sa, const type* b, int ldb,          \\
        long long sb, const type* beta, type* c, int ldc, long long sc, int count) {              \\
    return gemm(sizeof(type), handle, ta, tb, m, n, k, alpha, a, lda, sa, b, ldb, sb, beta, c,    \\
                ldc, sc, count);                                                                  \\
}
GEMMS(S, float)
GEMMS(D, double)
}
"""

_GEMM = ctypes.CFUNCTYPE(
    c_int, c_int, c_void_p, c_int, c_int, c_int, c_int, c_int, c_void_p, c_void_p, c_int,
    c_longlong, c_void_p, c_int, c_longlong, c_void_p, c_void_p, c_int, c_longlong, c_int,
)  # fmt: skip
_STREAM = ctypes.CFUNCTYPE(c_int, c_void_p, c_void_p)
_WORKSPACE = ctypes.CFUNCTYPE(c_int, c_void_p, c_void_p, c_size_t)


class CUBLASError(RuntimeError):
    """As CuPy's."""


class Handle:
    """What cuBLAS keeps for a thread and a device, as CuPy makes it."""

    def __init__(self, blas: Blas, number: int) -> None:
        self.number = number
        self.device = blas.driver.device
        self.thread = threading.get_ident()
        self.stream: Queue = blas.driver.queue(0)
        self.workspace: tuple[int, int] | None = None


class Blas:
    """cuBLAS of one driver."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.handles: dict[int, Handle] = {}
        self._numbers = iter(range(1, 1 << 30))
        self._callbacks = _GEMM(self.gemm), _STREAM(self.set_stream), _WORKSPACE(self.set_workspace)

    def module(self) -> ModuleType:
        """``cupy.cuda.cublas``."""
        path = build(_SOURCE)
        ctypes.CDLL(str(path)).serve(*self._callbacks)
        module = ModuleType("cupy_backends.cuda.libs.cublas")
        # CuPy's is a library without these functions, which loads cuBLAS
        module.__file__ = str(build("", path))
        module.CUBLASError = CUBLASError
        module.check_status = check_status
        module.create = self.create
        module.destroy = self.destroy
        module.getStream = lambda handle: self.handles[handle].stream.pointer
        return module

    def create(self) -> int:
        """Make a handle."""
        number = next(self._numbers)
        self.handles[number] = Handle(self, number)
        return number

    def destroy(self, number: int) -> None:
        """Destroy a handle; waits for the device."""
        handle = self.handles.pop(number)
        self.driver.synchronize_device(handle.device, "cublasDestroy")

    def left_behind(self) -> list[str]:
        """Handles on a capture's stream that is gone: to destroy one waits for its stream."""
        streams = [handle.stream for handle in self.handles.values()]
        gone = [stream for stream in streams if stream.captured and not stream.alive]
        return ["a cuBLAS handle is left on a destroyed stream"] * len(gone)

    def use(self) -> None:
        """Set the stream of the thread's handle, as CuPy does before each of its own calls."""
        handle = self.handles[thread_handle(self)]
        handle.stream, handle.workspace = self.driver.current, None

    def set_stream(self, number: int, pointer: int | None) -> int:
        handle = self._handle(number)
        if handle is None:
            return NOT_INITIALIZED
        stream = self.driver.queue(pointer or 0)
        if stream is None or not stream.alive:
            self.driver.faults.append("a cuBLAS handle is given a destroyed stream")
            return INVALID_VALUE
        handle.stream, handle.workspace = stream, None
        return SUCCESS

    def set_workspace(self, number: int, pointer: int | None, n_bytes: int) -> int:
        handle = self._handle(number)
        if handle is None:
            return NOT_INITIALIZED
        owner = self.driver.find(pointer, n_bytes) if pointer and pointer % 256 == 0 else None
        if owner is None or owner.device != handle.device:
            self.driver.faults.append("a cuBLAS workspace is no memory of its device")
            return INVALID_VALUE
        handle.workspace = pointer, n_bytes
        return SUCCESS

    def _handle(self, number: int) -> Handle | None:
        handle = self.handles.get(number)
        if handle is not None and handle.thread != threading.get_ident():
            self.driver.faults.append("a cuBLAS handle is used by two threads")
        return handle

    def gemm(self, *arguments: Any) -> int:
        """C = A B of columns, or of a stack of them, from addresses."""
        try:
            return self._gemm(*arguments)
        except CUBLASError as error:  # no exception passes through C
            return next(status for status, name in STATUS.items() if name == str(error))
        except CUDARuntimeError:
            return EXECUTION_FAILED
        except Exception as error:
            self.driver.faults.append(f"a product raised {error!r}")
            return EXECUTION_FAILED

    def _gemm(
        self, itemsize, number, ta, tb, m, n, k, alpha, a, lda, sa, b, ldb, sb, beta, c, ldc, sc,
        count,
    ) -> int:  # fmt: skip
        driver, handle = self.driver, self._handle(number)
        if handle is None:
            return NOT_INITIALIZED
        driver.event("product")
        kind = c_float if itemsize == 4 else c_double
        assert kind.from_address(alpha).value == 1.0
        assert kind.from_address(beta).value == 0.0
        dtype = np.dtype(f"f{itemsize}")
        shapes = ((k, m) if ta else (m, k)), ((n, k) if tb else (k, n)), (m, n)
        steps, apart = (lda, ldb, ldc), (sa, sb, sc)
        if any(step < max(1, rows) for step, (rows, _) in zip(steps, shapes, strict=True)):
            return INVALID_VALUE
        if count < 0 or min(apart) < 0:
            return INVALID_VALUE
        if count > 1 and sc < ldc * (n - 1) + m:
            driver.faults.append("the results of a stack of products overlap")
            return EXECUTION_FAILED
        stream = handle.stream
        if not stream.alive:
            driver.faults.append("a product on a destroyed stream")
            return EXECUTION_FAILED
        if stream.capture is not None and handle.workspace is None:
            driver.faults.append("cuBLAS allocates a workspace of its own in a graph")
        memory = []
        places = [*zip((a, b, c), steps, apart, shapes, strict=True)]
        for address, step, stride, (rows, columns) in places:
            n_bytes = (stride * (count - 1) + step * (columns - 1) + rows) * itemsize
            owner = driver.find(address, n_bytes) if address % itemsize == 0 else None
            if owner is None or owner.device != handle.device:
                driver.faults.append("a product of what is no memory of its device")
                return EXECUTION_FAILED
            memory.append(owner)
        workspace = handle.workspace
        if workspace is not None:
            memory.append(driver.find(*workspace))
            if memory[-1] is None:
                driver.faults.append("a cuBLAS workspace was freed")
                return EXECUTION_FAILED

        def run() -> None:
            if workspace is not None:
                driver.raw(workspace[0], 4096, np.uint8)[...] = 0xAA
            left, right, out = (
                driver.raw(
                    address, (count, *shape), dtype,
                    (stride * itemsize, itemsize, step * itemsize),
                )
                for address, step, stride, shape in places
            )  # fmt: skip
            with np.errstate(all="ignore"):
                product = np.matmul(left.mT if ta else left, right.mT if tb else right)
            out[...] = product

        driver.submit(stream, Node("a product", run, tuple(memory)))
        driver.counts["products"] += 1
        return SUCCESS


def check_status(status: int) -> None:
    if status:
        raise CUBLASError(STATUS[status])


def thread_handle(blas: Blas) -> int:
    """Return the thread's handle for the current device, which ends with the thread."""
    own = blas.driver.local.__dict__.setdefault("handles", {})
    device = blas.driver.device
    if device not in own:
        own[device] = _Owned(blas)
    found: int = own[device].number
    return found


class _Owned:
    """A handle that is destroyed with its owner."""

    def __init__(self, blas: Blas) -> None:
        self.number, self._destroy = blas.create(), blas.destroy

    def __del__(self) -> None:
        with suppress(RuntimeError):  # CuPy prints it
            self._destroy(self.number)

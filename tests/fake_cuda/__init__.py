"""A machine with CUDA devices, made of the host: ``cupy`` and cuBLAS with CUDA's rules.

`install` puts it in the place of CuPy.  The rules are in `driver`; `arrays` are CuPy's arrays,
`blas` is a cuBLAS with its C functions, and `kernels` compiles CUDA C++ for the host.  The real
`portable_mlp.backends.CuPyBackend` and `portable_mlp.engines.cuda.runtime.Cuda` run on it.
"""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from fake_cuda import arrays, blas
from fake_cuda.arrays import Device, MemoryPointer, call, driver, ndarray, words
from fake_cuda.driver import CUDARuntimeError, Driver, Node, OutOfMemoryError, Queue
from fake_cuda.kernels import COMPILER, CompileException, launcher, library

__all__ = ["COMPILER", "CUDARuntimeError", "CompileException", "Driver", "OutOfMemoryError",
           "install"]  # fmt: skip

# ---------------------------------------------------------------- streams and graphs


class Stream:
    """As ``cupy.cuda.Stream``."""

    null: Stream

    def __init__(self, null: bool = False, non_blocking: bool = False) -> None:
        self._null = null
        self._driver = None if null else driver()
        self._queue = None if null else driver().stream(blocking=not non_blocking)

    @property
    def queue(self) -> Queue:
        return driver().queue(0) if self._null else self._queue

    @property
    def ptr(self) -> int:
        return self.queue.pointer

    @property
    def device_id(self) -> int:
        return -1 if self._null else self.queue.device

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and self.ptr == other.ptr

    def __hash__(self) -> int:
        return self.ptr

    def __del__(self) -> None:
        if getattr(self, "_queue", None) is not None:
            self._driver.destroy(self._queue)

    def __enter__(self) -> Stream:
        if self.device_id not in (-1, driver().device):
            raise RuntimeError(
                f"The device that the stream is created on ({self.device_id})"
                f" does not match with the current device ({driver().device})"
            )
        stack = driver().local.__dict__.setdefault("stack", [])
        stack.append((driver().current, self))
        driver().current = self.queue
        return self

    def __exit__(self, *_: object) -> None:
        before, _self = driver().local.stack.pop()
        driver().current = before

    def use(self) -> Stream:
        driver().current = self.queue
        return self

    def synchronize(self) -> None:
        driver().synchronize(self.queue)

    def is_capturing(self) -> bool:
        return self.queue.capture is not None

    def begin_capture(self, mode: int | None = None) -> None:
        if mode not in (None, 2):  # others forbid what threads may do meanwhile
            driver().faults.append("a capture that is not relaxed")
        driver().begin_capture(self.queue)

    def end_capture(self) -> Graph:
        return Graph(driver().end_capture(self.queue))


Stream.null = Stream(null=True)


class Graph:
    """As ``cupy.cuda.Graph``: of addresses."""

    def __init__(self, nodes: list[Node]) -> None:
        self._nodes, self._device = nodes, driver().device

    def launch(self, stream: Stream | None = None) -> None:
        if stream is None:
            driver().replay(self._nodes, self._device)
            return
        with stream:
            driver().replay(self._nodes, self._device)


class _Current:
    """What ``get_current_stream`` returns: the thread's stream."""

    def __init__(self, queue: Queue) -> None:
        self.queue, self.ptr = queue, queue.pointer

    def synchronize(self) -> None:
        driver().synchronize(self.queue)


# ---------------------------------------------------------------- kernels


class RawModule:
    """As ``cupy.RawModule``: compiled at the first launch of one of its kernels."""

    def __init__(self, *, code: str, options: tuple[str, ...] = (), backend: str = "nvrtc") -> None:
        self.code = code

    def get_function(self, name: str) -> RawKernel:
        return RawKernel(self.code, name)


class RawKernel:
    """As ``cupy.RawKernel``: loaded for each device when it is first launched there."""

    def __init__(self, code: str, name: str) -> None:
        self._code, self.name = code, name
        self._loaded: set[int] = set()

    def __call__(
        self, grid: tuple[int], block: tuple[int], args: tuple[Any, ...], *, shared_mem: int = 0
    ) -> None:
        machine = driver()
        machine.event("launch", self.name)
        queue, device = machine.current, machine.device
        assert type(grid) is type(block) is type(args) is tuple
        assert 0 < block[0] <= 1024
        assert 0 < grid[0] < 2**31
        assert all(isinstance(a, ndarray) for a in args)
        assert all(a.flags.c_contiguous for a in args), "a kernel takes rows for contiguous"
        if device not in self._loaded:
            if queue.capture is not None:
                machine.faults.append(f"{self.name} is loaded during a capture")
            self._loaded.add(device)
        if any(a.data.device_id != device for a in args):
            machine.faults.append(f"{self.name} is given an array of another device")
        caller = library(self._code)[f"call_{self.name}"]
        addresses = [a.data.ptr for a in args]
        threads = min(block[0], machine.threads)

        def run() -> None:
            pointers = (ctypes.c_void_p * len(addresses))(*addresses)
            launcher().launch(caller, pointers, grid[0], threads)

        memory = tuple(a.data.mem.allocation for a in args)
        machine.submit(queue, Node(self.name, run, memory))
        machine.counts["kernels"] += 1


# ---------------------------------------------------------------- the modules


def _numpy_function(name: str) -> Callable[..., Any]:
    function = getattr(np, name)
    wrapped = partial(call, function)
    wrapped.__name__ = name  # type: ignore[attr-defined]
    return wrapped


_FUNCTIONS = words(
    "all any argmax argmin argsort ascontiguousarray asfortranarray broadcast_arrays"
    " broadcast_to clip concatenate copy count_nonzero cumprod cumsum diff dot empty_like"
    " expand_dims flip full_like linspace matrix_transpose max mean meshgrid min moveaxis"
    " nonzero ones_like outer prod repeat reshape roll round searchsorted sort squeeze stack"
    " std sum swapaxes take take_along_axis tensordot tile transpose trapezoid tril triu"
    " unique var where zeros_like eye arange vdot"
)
_NOT_CUPY = {"isnat", "matvec", "spacing", "vecdot", "vecmat"}
_ALIKE = words(
    "bool_ int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64"
    " complex64 complex128 intp pi e inf nan newaxis dtype finfo iinfo result_type can_cast"
    " issubdtype isdtype isscalar broadcast_shapes integer floating complexfloating inexact"
    " generic number signedinteger unsignedinteger"
)


def _cupy() -> dict[str, ModuleType]:
    """``cupy`` and its modules, whichever machine is installed."""
    names = "cupy", "cupy.linalg", "cupy.fft", "cupy.cuda", "cupy.cuda.device"
    cupy, linalg, fft, cuda, device = modules = [ModuleType(name) for name in names]
    ufuncs = [n for n in dir(np) if isinstance(getattr(np, n), np.ufunc) and n not in _NOT_CUPY]
    for name in (*ufuncs, *_FUNCTIONS):
        setattr(cupy, name, _numpy_function(name))
    for name in _ALIKE:
        setattr(cupy, name, getattr(np, name))
    cupy.abs = _numpy_function("abs")
    cupy.ndarray, cupy.RawModule, cupy.RawKernel = ndarray, RawModule, RawKernel
    for name in ("array", "asarray", "asnumpy", "empty", "full"):
        setattr(cupy, name, getattr(arrays, name))
    cupy.zeros, cupy.ones = arrays.filled(0), arrays.filled(1)
    cupy.get_default_memory_pool = lambda: _POOL
    cupy.__version__ = "14.2.0"
    for name in ("norm", "lstsq", "cholesky", "eigh", "qr", "svd", "slogdet", "pinv",
                 "matrix_rank", "inv", "solve", "det"):  # fmt: skip
        setattr(linalg, name, partial(call, getattr(np.linalg, name)))
    for name in words(
        "fft ifft fftn ifftn rfft irfft rfftn irfftn hfft ihfft fftfreq rfftfreq fftshift"
        " ifftshift"
    ):  # fmt: skip
        setattr(fft, name, partial(call, getattr(np.fft, name)))
    cupy.linalg, cupy.fft, cupy.cuda = linalg, fft, cuda
    cuda.device, device.Device = device, Device
    cuda.Device, cuda.Stream, cuda.Graph = Device, Stream, Graph
    cuda.MemoryPointer, cuda.set_allocator = MemoryPointer, arrays.set_allocator
    cuda.alloc = arrays.allocate
    cuda.get_current_stream = lambda: _Current(driver().current)
    cuda.runtime = _runtime()
    cuda.memory = SimpleNamespace(OutOfMemoryError=OutOfMemoryError)
    cuda.compiler = SimpleNamespace(CompileException=CompileException)
    return dict(zip(names, modules, strict=True))


def _runtime() -> SimpleNamespace:
    def count() -> int:
        driver().check()
        return driver().n_devices

    return SimpleNamespace(
        CUDARuntimeError=CUDARuntimeError,
        getDeviceCount=count,
        getDevice=lambda: driver().device,
        setDevice=lambda device: setattr(driver(), "device", device),
        deviceSynchronize=lambda: driver().synchronize_device(
            driver().device, "cudaDeviceSynchronize"
        ),
        runtimeGetVersion=lambda: 12090,
        driverGetVersion=lambda: 13000,
        streamCaptureModeRelaxed=2,
    )


_POOL = SimpleNamespace(
    used_bytes=lambda: driver().taken(driver().device),
    total_bytes=lambda: driver().taken(driver().device),
    free_all_blocks=lambda: None,
    malloc=arrays.pooled,
)
_MODULES = _cupy()


_OURS = re.compile(r"^(cupy|cupyx|cupy_backends)(\.|$)|array_api_compat\.cupy(\.|$)")


def _exchange(new: dict[str, ModuleType]) -> dict[str, ModuleType]:
    """Put CuPy's modules, and what array_api_compat makes of them, in the place of others."""
    old = {name: module for name, module in sys.modules.items() if _OURS.search(name)}
    for name in old:
        del sys.modules[name]
        _attach(name, None)
    sys.modules.update(new)
    for name, module in new.items():
        _attach(name, module)
    return old


def _attach(name: str, module: ModuleType | None) -> None:
    """Make a module an attribute of its package, as its import does."""
    package, _, child = name.rpartition(".")
    if package in sys.modules:
        if module is None:
            vars(sys.modules[package]).pop(child, None)
        else:
            setattr(sys.modules[package], child, module)


@contextmanager
def install(machine: Driver) -> Iterator[Driver]:
    """Put a machine in the place of CuPy, while the context lasts.

    Rules that were broken are an error in the end.
    """
    products = machine.blas = blas.Blas(machine)
    real = _exchange(_MODULES)
    _MODULES["cupy"].cuda.cublas = products.module()
    Device.cublas_handle = property(lambda self: blas.thread_handle(products))
    arrays._active.append(machine)
    arrays.set_allocator(arrays.pooled)
    try:
        yield machine
        machine.faults += products.left_behind()
        assert not machine.faults, machine.faults
    finally:
        arrays._active.remove(machine)
        _MODULES.update(_exchange(real))

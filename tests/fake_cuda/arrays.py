"""CuPy's arrays and functions, on the driver's memory.

CuPy's own functions run at once, behind what is queued on their stream.  Writes into an array
and copies from the host wait in the queue, as kernels, products and graphs do.  As in CuPy, an
array of another device is refused, and none becomes a NumPy array by itself.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np

from fake_cuda.driver import Allocation, CUDARuntimeError, Driver, Node

_active: list[Driver] = []


def driver() -> Driver:
    """The machine that is installed."""
    return _active[-1]


def words(text: str) -> list[str]:
    """Names in a text."""
    return text.split()


class Memory:
    """A piece of memory that is given back with the last array on it."""

    def __init__(self, n_bytes: int) -> None:
        self._driver = driver()
        self.allocation: Allocation = self._driver.allocate(n_bytes)
        self.ptr, self.size = self.allocation.address, self.allocation.size
        self.device_id = self.allocation.device

    def __del__(self) -> None:
        if hasattr(self, "allocation"):
            self._driver.free(self.allocation)


class Unpooled(Memory):
    """Memory of cudaMalloc: to free it waits for the device."""

    def __del__(self) -> None:
        if hasattr(self, "allocation"):
            with suppress(CUDARuntimeError):
                self._driver.synchronize_device(self.device_id, "cudaFree")
            super().__del__()


class MemoryPointer:
    """A place in memory."""

    def __init__(self, mem: Any, offset: int) -> None:
        self.mem, self.offset = mem, offset
        self.ptr, self.device_id = mem.ptr + offset, mem.device_id

    def __add__(self, n_bytes: int) -> MemoryPointer:
        return MemoryPointer(self.mem, self.offset + int(n_bytes))


def pooled(n_bytes: int) -> MemoryPointer:
    """Take memory from CuPy's pool."""
    return MemoryPointer(Memory(n_bytes), 0)


_allocator: list[Callable[[int], MemoryPointer]] = [pooled]


def set_allocator(allocator: Callable[[int], MemoryPointer] | None = None) -> None:
    """As CuPy's; None is cudaMalloc."""
    _allocator[0] = allocator or (lambda n: MemoryPointer(Unpooled(n), 0))


def allocate(n_bytes: int) -> MemoryPointer:
    return _allocator[0](n_bytes)


class Device:
    """As ``cupy.cuda.Device``."""

    def __init__(self, device: Any = None) -> None:
        driver().check()
        self.id = driver().device if device is None else int(device)
        self._before: list[int] = []

    def __int__(self) -> int:
        return self.id

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Device) and self.id == other.id

    def __hash__(self) -> int:
        return self.id

    def __repr__(self) -> str:
        return f"<CUDA Device {self.id}>"

    def use(self) -> None:
        driver().device = self.id

    def __enter__(self) -> Device:
        driver().check()
        self._before.append(driver().device)
        driver().device = self.id
        return self

    def __exit__(self, *_: object) -> None:
        driver().device = self._before.pop()

    def synchronize(self) -> None:
        driver().synchronize_device(self.id, "Device.synchronize")

    compute_capability = "90"


class ndarray:  # noqa: N801 (CuPy's name)
    """An array in device memory."""

    __array_priority__ = 100
    __hash__ = None

    def __init__(self, shape, dtype=float, memptr=None, strides=None, order="C") -> None:
        dtype = np.dtype(dtype)
        shape = (shape,) if isinstance(shape, int | np.integer) else tuple(shape)
        n = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        self.data = allocate(n) if memptr is None else memptr
        self.device = Device(self.data.device_id)
        if strides is None and order == "F":
            strides = np.empty(shape, dtype, order="F").strides
        self._host = driver().raw(self.data.ptr, shape, dtype, strides)
        if n:
            low, high = np.lib.array_utils.byte_bounds(self._host)
            assert self.data.mem.ptr <= low, "an array before its memory"
            assert high <= self.data.mem.ptr + self.data.mem.size, "an array beyond its memory"
        assert self.data.ptr % dtype.itemsize == 0, "an array at an odd address"

    # What it is

    shape = property(lambda self: self._host.shape)
    dtype = property(lambda self: self._host.dtype)
    strides = property(lambda self: self._host.strides)
    ndim = property(lambda self: self._host.ndim)
    size = property(lambda self: self._host.size)
    nbytes = property(lambda self: self._host.nbytes)
    itemsize = property(lambda self: self._host.itemsize)
    flags = property(lambda self: self._host.flags)
    T = property(lambda self: call(np.transpose, self))
    mT = property(lambda self: call(np.matrix_transpose, self))  # noqa: N815

    def __len__(self) -> int:
        return len(self._host)

    def __repr__(self) -> str:
        return repr(self.get())

    # To the host

    def get(self) -> np.ndarray:
        with self.device:
            driver().synchronize(driver().current)
        return self._host.copy()

    def __array__(self, *_: object, **__: object) -> np.ndarray:
        raise TypeError(
            "Implicit conversion to a NumPy array is not allowed."
            " Please use `.get()` to construct a NumPy array explicitly."
        )

    def __array_ufunc__(self, function: Any, *_: object, **__: object) -> Any:
        raise TypeError(f"NumPy's {function.__name__} of a device's array")

    def __array_function__(self, function: Any, *_: object, **__: object) -> Any:
        raise TypeError(f"NumPy's {function.__name__} of a device's array")

    def item(self) -> Any:
        return self.get().item()

    def tolist(self) -> Any:
        return self.get().tolist()

    def __bool__(self) -> bool:
        return bool(self.get())

    def __int__(self) -> int:
        return int(self.get())

    def __float__(self) -> float:
        return float(self.get())

    def __index__(self) -> int:
        return operator.index(self.get())

    # Elements

    def __getitem__(self, index: Any) -> ndarray:
        keys = index if isinstance(index, tuple) else (index,)
        if all(isinstance(key, int | np.integer) for key in keys):
            keys = (*keys, ...)  # a view without axes, where NumPy would take out the number
        return call(operator.getitem, self, keys)

    def __setitem__(self, index: Any, value: Any) -> None:
        call(operator.setitem, self, index, value)

    def __iter__(self) -> Iterator[ndarray]:
        return (self[i] for i in range(len(self)))

    def __deepcopy__(self, memo: Any) -> ndarray:
        with self.device:
            return self.copy()

    def __reduce__(self) -> tuple[Any, ...]:
        return array, (self.get(),)


def _method(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, *args, **kwargs: call(function, self, *args, **kwargs)


for _name in words(
    "reshape ravel flatten transpose squeeze swapaxes astype copy view fill take dot sum prod mean"
    " std var max min all any argmax argmin cumsum round clip nonzero repeat sort"
):
    setattr(ndarray, _name, _method(getattr(np.ndarray, _name)))
for _name in words("add sub mul truediv floordiv mod pow matmul and or xor lshift rshift"):
    _function = getattr(operator, _name + "_" * (_name in ("and", "or")))
    setattr(ndarray, f"__{_name}__", _method(_function))
    setattr(ndarray, f"__r{_name}__", _method(lambda a, b, f=_function: f(b, a)))
    setattr(ndarray, f"__i{_name}__", _method(getattr(operator, f"i{_name}")))
for _name in words("neg pos abs invert lt le gt ge eq ne"):
    setattr(ndarray, f"__{_name}__", _method(getattr(operator, _name)))


def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """NumPy's function, of the values of arrays on the current device."""
    machine = driver()
    machine.check()
    inputs: list[ndarray] = []
    args, kwargs = _unwrap(args, inputs), _unwrap(kwargs, inputs)
    if function in _VIEWS and inputs:
        viewed = _wrap(function(*args, **kwargs), inputs[:1], copy=False)
        if viewed is not None:
            return viewed
    for a in inputs:
        if a.data.device_id != machine.device:
            raise ValueError(
                "Array device must be same as the current device: array device ="
                f" {a.data.device_id} while current = {machine.device}."
            )
    product = function in _PRODUCTS
    if machine.current.capture is not None:
        raise NotImplementedError(
            "calling cuBLAS API during stream capture is currently unsupported"
            if product
            else "the emulation captures raw kernels and products only"
        )
    if product:
        machine.blas.use()
    if function is operator.setitem:
        # Written when the stream comes to it: what another stream reads must wait for that
        memory = tuple(a.data.mem.allocation for a in inputs)
        machine.submit(machine.current, Node("a[...] = b", partial(function, *args), memory))
        return None
    machine.synchronize(machine.current)
    with np.errstate(all="ignore"):
        return _wrap(function(*args, **kwargs), inputs)


_PRODUCTS = {np.matmul, np.dot, np.vdot, np.vecdot, np.tensordot, operator.matmul, np.ndarray.dot}
_VIEWS = {
    operator.getitem, np.ndarray.reshape, np.ndarray.transpose, np.ndarray.squeeze,
    np.ndarray.ravel, np.ndarray.view, np.reshape, np.transpose, np.matrix_transpose,
    np.broadcast_to, np.squeeze, np.expand_dims,
}  # fmt: skip
"""What looks at memory in another way, on whatever device, and launches nothing."""


def _unwrap(x: Any, inputs: list[ndarray]) -> Any:
    if isinstance(x, ndarray):
        inputs.append(x)
        return x._host
    if isinstance(x, np.ndarray):
        raise TypeError("Unsupported type <class 'numpy.ndarray'>")
    if isinstance(x, list | tuple):
        return type(x)(_unwrap(item, inputs) for item in x)
    if isinstance(x, dict):
        return {key: _unwrap(value, inputs) for key, value in x.items()}
    return x


def _wrap(x: Any, inputs: list[ndarray], copy: bool = True) -> Any:
    if isinstance(x, tuple | list):
        return type(x)(_wrap(item, inputs) for item in x)
    if not isinstance(x, np.ndarray | np.generic):
        return x
    x = np.asanyarray(x)
    for a in inputs:
        if x is a._host:
            return a
        address = x.__array_interface__["data"][0]
        if a.data.mem.ptr <= address < a.data.mem.ptr + a.data.mem.size:
            pointer = MemoryPointer(a.data.mem, address - a.data.mem.ptr)
            return ndarray(x.shape, x.dtype, pointer, x.strides)
    if not copy:
        return None
    return array(x)


def array(obj: Any, dtype: Any = None, copy: bool = True, order: str = "K") -> ndarray:
    """As CuPy's: from the host, or from the current device."""
    if isinstance(obj, ndarray):
        if dtype is None or np.dtype(dtype) == obj.dtype:
            return call(np.copy, obj) if copy else call(np.asarray, obj)
        return obj.astype(dtype)
    inputs: list[ndarray] = []
    unwrapped = _unwrap(obj, inputs) if not isinstance(obj, np.ndarray) else obj
    if inputs:
        driver().synchronize(driver().current)
    host = np.asarray(unwrapped, dtype=dtype)
    machine = driver()
    if machine.current.capture is not None:
        # The copy's source is memory that the host may use again
        machine.synchronize(machine.current)
    columns = host.flags.f_contiguous and not host.flags.c_contiguous
    turned = order == "F" or (order == "K" and columns)
    made = ndarray(host.shape, host.dtype, order="F" if turned else "C")
    copy = partial(np.copyto, made._host, host.copy())  # CuPy copies into memory of its own first
    machine.submit(machine.current, Node("a copy", copy, (made.data.mem.allocation,)))
    return made


def asarray(obj: Any, dtype: Any = None, order: str = "K") -> ndarray:
    return array(obj, dtype, copy=False, order=order)


def asnumpy(a: Any) -> np.ndarray:
    return a.get() if isinstance(a, ndarray) else np.asarray(a)


def empty(shape: Any, dtype: Any = float, order: str = "C") -> ndarray:
    return ndarray(shape, dtype, order=order)


def filled(value: Any) -> Callable[..., ndarray]:
    """``zeros``, ``ones``."""

    def make(shape: Any, dtype: Any = float, order: str = "C") -> ndarray:
        made = ndarray(shape, dtype, order=order)
        made[...] = value
        return made

    return make


def full(shape: Any, fill_value: Any, dtype: Any = None, order: str = "C") -> ndarray:
    made = ndarray(shape, np.asarray(fill_value).dtype if dtype is None else dtype, order=order)
    made[...] = fill_value
    return made

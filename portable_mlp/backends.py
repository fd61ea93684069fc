"""Backends: where arrays live, and how they get there.

A backend is a namespace with a device: it brings arrays there and back, and says how
a step is compiled.  To add one, subclass `Backend` and list it in `BACKENDS`; arrays
of any other library that follows the standard work through the base class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from importlib import import_module
from typing import Any, ClassVar, TypeVar

import array_api_compat
import numpy as np
from numpy.typing import NDArray

from portable_mlp.typing import Array, Namespace
from portable_mlp.warn import warn

F = TypeVar("F", bound=Callable[..., Any])


class BackendError(RuntimeError):
    """A backend or device that was asked for cannot be used; the message says why."""


class Backend:
    """A namespace and a device; this base serves any array API namespace.

    Parameters
    ----------
    xp : namespace
    device : object, optional
        As the namespace means it; its default device if not given.

    Attributes
    ----------
    packs : bool
        Whether parameters are packed into vectors (see `portable_mlp.packing`): few
        large calls beat many small ones where a vector has views.
    engine : str
        What runs a step over batches, see `portable_mlp.engines`.
    """

    name: ClassVar[str] = ""
    packs: bool = True
    engine: str = "eager"

    def __init__(self, xp: Namespace, device: Any = None) -> None:
        self.xp = xp
        self.device = device

    def __repr__(self) -> str:
        name = self.name or getattr(self.xp, "__name__", str(self.xp))
        return name if self.device is None else f"{name} on {self.device}"

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Backend)
            and self.xp is other.xp
            and str(self.device) == str(other.device)
        )

    __hash__ = None  # type: ignore[assignment]

    def dtype(self, name: str) -> Any:
        """Return the namespace's data type of a name such as "float32"."""
        return getattr(self.xp, name)

    def asarray(self, x: Any, dtype: str | None = None, copy: bool | None = None) -> Array:
        """Return an array here, from the host or from here; moved at most once."""
        return self.xp.asarray(
            x, dtype=None if dtype is None else self.dtype(dtype), device=self.device, copy=copy
        )

    def indices(self, host: NDArray[np.intp]) -> Array:
        """Row numbers here, in a type ``take`` accepts."""
        info = self.xp.__array_namespace_info__()
        indexing = str(info.default_dtypes(device=self.device)["indexing"]).split(".")[-1]
        return self.asarray(host.astype(indexing, copy=False))

    def to_host(self, x: Array) -> NDArray[Any]:
        """Return a NumPy array of the same values."""
        host = self.xp.__array_namespace_info__().default_device()
        return np.asarray(array_api_compat.to_device(x, host))

    def fetch(self, scalars: Sequence[Array]) -> NDArray[np.float64]:
        """Many 0-d arrays as one float64 vector on the host: one synchronisation."""
        return np.asarray(self.to_host(self.xp.stack(list(scalars))), dtype=np.float64)

    def synchronize(self) -> None:
        """Wait until what was asked for is done; for timing."""

    def compile(
        self, function: F, static: tuple[int, ...] = (), donated: tuple[int, ...] = ()
    ) -> F:
        """Make a pure function of arrays fast; here, it runs as it is.

        Parameters
        ----------
        function : callable
        static : tuple of int
            Positions of arguments that are not arrays, hashable.
        donated : tuple of int
            Positions of arguments that the function may overwrite.
        """
        return function

    def current(self) -> AbstractContextManager[Any]:
        """Make the device current, for a library that computes on its current device alone."""
        return nullcontext()

    @contextmanager
    def scope(self, dtype: str) -> Iterator[None]:
        """Library settings around a computation in this data type.

        Non-finite values are looked for where they matter; warnings about each
        operation that meets one would only repeat it.
        """
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"), self.current():
            yield


class NumPyBackend(Backend):
    """NumPy arrays, on the CPU."""

    name = "numpy"
    engine = "replay"

    def __init__(self, device: Any = None) -> None:
        # NumPy follows the standard by itself since 2.1; wrappers would cost time
        super().__init__(np, device)

    @classmethod
    def create(cls, device: str | None) -> Backend:
        if device == "gpu":
            raise BackendError(
                "backend='numpy' computes on the CPU only; for device='gpu' use 'cupy'"
            )
        return cls()

    @classmethod
    def of(cls, x: Array) -> Backend:
        return cls()

    def to_host(self, x: Array) -> NDArray[Any]:
        return np.asarray(x)

    def fetch(self, scalars: Sequence[Array]) -> NDArray[np.float64]:
        return np.asarray(scalars, dtype=np.float64)


class CuPyBackend(Backend):
    """CuPy arrays, on a CUDA device."""

    name = "cupy"
    engine = "capture"

    def __init__(self, device: Any = None) -> None:
        super().__init__(import_module("array_api_compat.cupy"), device)
        self._cupy = import_module("cupy")

    @classmethod
    def create(cls, device: str | None) -> Backend:
        if device == "cpu":
            raise BackendError(
                "backend='cupy' computes on the GPU only; for device='cpu' use 'numpy'"
            )
        _check_cuda()
        return cls(import_module("cupy").cuda.Device())

    @classmethod
    def of(cls, x: Array) -> Backend:
        return cls(x.device)

    def current(self) -> AbstractContextManager[Any]:
        device: AbstractContextManager[Any] = self.device
        return device

    def to_host(self, x: Array) -> NDArray[Any]:
        with self.current():
            host: NDArray[Any] = self._cupy.asnumpy(x)
        return host

    def fetch(self, scalars: Sequence[Array]) -> NDArray[np.float64]:
        with self.current():
            return super().fetch(scalars)

    def synchronize(self) -> None:
        with self.current():
            self._cupy.cuda.get_current_stream().synchronize()


class TorchBackend(Backend):
    """Torch tensors, without a graph for autograd."""

    name = "torch"
    engine = "replay"

    def __init__(self, device: Any = None) -> None:
        super().__init__(import_module("array_api_compat.torch"), device)
        self._torch = import_module("torch")
        if device is not None:
            # With its index, as tensors tell it: "cuda" is not equal to "cuda:0"
            self.device = self._torch.empty(0, device=device).device

    @classmethod
    def create(cls, device: str | None) -> Backend:
        torch = _import("torch", "pip install torch")
        if device == "gpu" and not torch.cuda.is_available():
            raise BackendError(
                "device='gpu': torch sees no CUDA device (torch.cuda.is_available())"
            )
        default = torch.get_default_device()
        kind = {"gpu": "cuda", "cpu": "cpu", None: default}.get(device, default)
        if device == "auto" and torch.cuda.is_available():
            kind = "cuda"
        return cls(torch.device(kind))

    @classmethod
    def of(cls, x: Array) -> Backend:
        return cls(x.device)

    def asarray(self, x: Any, dtype: str | None = None, copy: bool | None = None) -> Array:
        if isinstance(x, self._torch.Tensor):
            x = x.detach()
        else:
            x = np.asarray(x)
            if not x.flags.writeable or any(stride < 0 for stride in x.strides):
                x = x.copy()  # torch shares neither read-only nor reversed memory
        return super().asarray(x, dtype, copy)

    def to_host(self, x: Array) -> NDArray[Any]:
        host: NDArray[Any] = x.detach().cpu().numpy()
        return host

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            self._torch.cuda.synchronize(self.device)

    @contextmanager
    def scope(self, dtype: str) -> Iterator[None]:
        with super().scope(dtype), self._torch.no_grad():
            yield


class JaxBackend(Backend):
    """JAX arrays, with the step compiled by XLA."""

    name = "jax"
    engine = "scan"
    # Packing would copy: slices and concatenations of immutable arrays.
    packs = False

    def __init__(self, device: Any = None) -> None:
        super().__init__(import_module("jax.numpy"), device)
        self._jax = import_module("jax")

    @classmethod
    def create(cls, device: str | None) -> Backend:
        jax = _import("jax", "pip install 'portable_mlp[jax]'")
        try:
            found = jax.devices(None if device in (None, "auto") else device)
        except RuntimeError as error:
            raise BackendError(f"device={device!r}: JAX has no such device ({error})") from error
        return cls(found[0])

    @classmethod
    def of(cls, x: Array) -> Backend:
        return cls(next(iter(x.devices())))

    def to_host(self, x: Array) -> NDArray[Any]:
        return np.array(x)

    def fetch(self, scalars: Sequence[Array]) -> NDArray[np.float64]:
        return np.asarray(self._jax.device_get(list(scalars)), dtype=np.float64)

    def compile(
        self, function: F, static: tuple[int, ...] = (), donated: tuple[int, ...] = ()
    ) -> F:
        compiled: F = _jit(function, static, donated)
        return compiled

    @contextmanager
    def scope(self, dtype: str) -> Iterator[None]:
        precision = self._jax.default_matmul_precision("float32")
        with super().scope(dtype), precision, self._jax.enable_x64(dtype == "float64"):
            yield


@lru_cache(maxsize=64)
def _jit(function: Any, static: tuple[int, ...], donated: tuple[int, ...]) -> Any:
    # One jitted function for each step, so that what it compiled outlives a fit.
    return import_module("jax").jit(function, static_argnums=static, donate_argnums=donated)


BACKENDS: dict[str, type[NumPyBackend | CuPyBackend | TorchBackend | JaxBackend]] = {
    "numpy": NumPyBackend,
    "cupy": CuPyBackend,
    "torch": TorchBackend,
    "jax": JaxBackend,
}


DEVICES = ("cpu", "gpu", "auto")
DTYPES = ("float32", "float64")


def get_backend(
    device: str | None = None, backend: str | None = None, like: Array = None
) -> Backend:
    """Where to compute.

    Parameters
    ----------
    device : {"cpu", "gpu", "auto"}, optional
        Without ``backend``, "cpu" is NumPy, "gpu" is CuPy, and "auto" is CuPy where
        a GPU is usable and NumPy otherwise.
    backend : {"numpy", "cupy", "torch", "jax"}, optional
        On its default device unless ``device`` says otherwise.
    like : array, optional
        With neither of the above: its namespace and its device.

    Raises
    ------
    ValueError
        If a name is unknown.
    BackendError
        If the backend is not installed or has no such device.  There is no silent
        fall-back.
    """
    check_names(device, backend)
    home = backend_of(like)
    if backend is not None:
        # Arrays that are there already stay on their own device
        if device is None and home.name == backend:
            return home
        return BACKENDS[backend].create(device)
    if device is None:
        return home
    if device == "auto":
        if not isinstance(home, NumPyBackend):
            return home
        try:
            return CuPyBackend.create("gpu")
        except BackendError as error:
            if error.__cause__ is not None and is_out_of_memory(error.__cause__):
                warn(f"device='auto' computes on the CPU: {error}", RuntimeWarning)
            return home
    if device == "gpu":
        return home if isinstance(home, CuPyBackend) else CuPyBackend.create(device)
    return NumPyBackend()


def check_names(device: str | None, backend: str | None) -> None:
    """Raise a ValueError if a name is unknown."""
    for argument, value, known in (
        ("device", device, DEVICES),
        ("backend", backend, tuple(BACKENDS)),
    ):
        if value is not None and value not in known:
            raise ValueError(f"unknown {argument} {value!r}; known: {', '.join(known)}")


def backend_of(x: Any) -> Backend:
    """Return the backend an array lives on; NumPy for whatever is not an array."""
    if isinstance(x, np.ndarray) or not array_api_compat.is_array_api_obj(x):
        return NumPyBackend()
    for library, is_array in (
        ("cupy", array_api_compat.is_cupy_array),
        ("torch", array_api_compat.is_torch_array),
        ("jax", array_api_compat.is_jax_array),
    ):
        if is_array(x):
            return BACKENDS[library].of(x)
    return Backend(array_api_compat.array_namespace(x), array_api_compat.device(x))


def to_host(x: Any) -> NDArray[Any]:
    """Any array, or array-like, as a NumPy array."""
    return backend_of(x).to_host(x)


def move(x: Any, to: Backend, dtype: str | None = None) -> Array:
    """Return an array on another backend; from library to library it goes through the host."""
    home = backend_of(x)
    return to.asarray(x if home == to or isinstance(home, NumPyBackend) else home.to_host(x), dtype)


_WANT_OF_MEMORY = (
    "RESOURCE_EXHAUSTED",  # JAX
    "cudaErrorMemoryAllocation",
    "CUDA_ERROR_OUT_OF_MEMORY",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is a want of memory, on the host or on a device.

    Host and CuPy's pool raise a MemoryError, torch a class of its own; CUDA, cuBLAS and JAX say
    so in their messages.
    """
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or any(words in str(error) for words in _WANT_OF_MEMORY)
    )


def _import(library: str, remedy: str) -> Any:
    try:
        return import_module(library)
    except ModuleNotFoundError as error:
        raise BackendError(
            f"backend={library!r} needs {library}, which is not installed: {remedy}"
        ) from error


# cudaError_t
_INITIALIZATION, _INSUFFICIENT_DRIVER, _NO_DEVICE = 3, 35, 100


def _check_cuda() -> None:
    """Raise `BackendError`, with the remedy, unless CuPy can compute here."""
    lead = "device='gpu' (CuPy):"
    libraries = (
        f"{lead} CUDA libraries are missing or do not load: {{}}."
        " Install them with pip install 'cupy-cuda12x[ctk]' (CUDA 13: 'cupy-cuda13x[ctk]')"
    )
    try:
        cupy = import_module("cupy")
    except ModuleNotFoundError as error:
        raise BackendError(
            f"{lead} CuPy is not installed: pip install 'portable_mlp[gpu]' (CUDA 13; with a driver"
            " before 580 'portable_mlp[gpu12]')"
        ) from error
    except ImportError as error:
        raise BackendError(libraries.format(error)) from error
    runtime = cupy.cuda.runtime
    try:
        count = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        if error.status == _INSUFFICIENT_DRIVER:
            raise BackendError(
                f"{lead} no NVIDIA driver, or one older than this CuPy's CUDA"
                f" {runtime.runtimeGetVersion() // 1000} needs ({error}):"
                " install or update the driver, take the CuPy of an older CUDA"
                " ('portable_mlp[gpu12]'), or use device='cpu'"
            ) from error
        if error.status == _INITIALIZATION:
            raise BackendError(
                f"{lead} CUDA does not start ({error}). A process forked after CUDA was used"
                " cannot use it: start processes by 'spawn' or 'forkserver'"
            ) from error
        if error.status != _NO_DEVICE:
            raise BackendError(f"{lead} CUDA does not start ({error})") from error
        count = 0
    if count == 0:
        raise BackendError(f"{lead} the driver works but shows no CUDA device: use device='cpu'")
    try:
        probe = cupy.ones((2, 2)) * 2.0  # compiles a kernel (NVRTC)
        probe @ probe  # calls cuBLAS
    except Exception as error:  # CuPy's own errors have no base of their own
        if is_out_of_memory(error):
            raise BackendError(
                f"{lead} the GPU has no memory left ({error}): end what else uses it, or use"
                " device='cpu'"
            ) from error
        raise BackendError(libraries.format(error)) from error

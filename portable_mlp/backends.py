"""Backends: where arrays live, and how they get there.

A backend is an array namespace with a device.  It moves arrays there and back, and knows
how a step is compiled.  To add a backend, subclass `Backend` and list it in `BACKENDS`.
Arrays of any other library that follows the standard work through the base class.
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
    """Error for a requested backend or device that cannot be used; the message says why."""


class Backend:
    """A namespace and a device; the base class serves any array API namespace.

    Parameters
    ----------
    xp : namespace
    device : object, optional
        Device as the namespace defines it; its default device if not given.

    Attributes
    ----------
    name : str
        Key in `BACKENDS`; empty for the base class.
    packs : bool
        Whether parameters are packed into vectors (see `portable_mlp.packing`).  Few large
        calls are faster than many small ones if the library has views.
    engine : str
        Name of the engine that runs a step over batches, see `portable_mlp.engines`.
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
        """Return the namespace's dtype with a name such as "float32"."""
        return getattr(self.xp, name)

    def asarray(self, x: Any, dtype: str | None = None, copy: bool | None = None) -> Array:
        """Return an array on this backend.

        Parameters
        ----------
        x : array or array-like
            Data on the host or on this backend; it is moved at most once.
        dtype : str, optional
            Name of the dtype; that of ``x`` if not given.
        copy : bool, optional
            Whether to copy; only if needed if not given.
        """
        return self.xp.asarray(
            x, dtype=None if dtype is None else self.dtype(dtype), device=self.device, copy=copy
        )

    def indices(self, host: NDArray[np.intp]) -> Array:
        """Return row numbers on this backend, in a dtype that ``take`` accepts."""
        info = self.xp.__array_namespace_info__()
        indexing = str(info.default_dtypes(device=self.device)["indexing"]).split(".")[-1]
        return self.asarray(host.astype(indexing, copy=False))

    def to_host(self, x: Array) -> NDArray[Any]:
        """Return a NumPy array with the same values."""
        host = self.xp.__array_namespace_info__().default_device()
        return np.asarray(array_api_compat.to_device(x, host))

    def fetch(self, scalars: Sequence[Array]) -> NDArray[np.float64]:
        """Return many 0-d arrays as one float64 vector on the host, with one synchronisation."""
        return np.asarray(self.to_host(self.xp.stack(list(scalars))), dtype=np.float64)

    def synchronize(self) -> None:
        """Wait until all submitted work is done; for timing."""

    def compile(
        self, function: F, static: tuple[int, ...] = (), donated: tuple[int, ...] = ()
    ) -> F:
        """Compile a pure function of arrays; the base class returns it unchanged.

        Parameters
        ----------
        function : callable
        static : tuple of int
            Positions of hashable arguments that are not arrays.
        donated : tuple of int
            Positions of arguments that the function may overwrite.
        """
        return function

    def current(self) -> AbstractContextManager[Any]:
        """Return a context in which the device is current.

        Some libraries compute only on their current device; for others nothing changes.
        """
        return nullcontext()

    @contextmanager
    def scope(self, dtype: str) -> Iterator[None]:
        """Apply the library's settings during a computation in this dtype.

        NumPy's floating-point warnings are off: training checks its results for non-finite
        values itself, so a warning from each operation would only repeat that check.
        """
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"), self.current():
            yield


class NumPyBackend(Backend):
    """NumPy arrays, on the CPU."""

    name = "numpy"
    engine = "replay"

    def __init__(self, device: Any = None) -> None:
        # NumPy itself follows the standard since 2.1; the compat wrappers would cost time
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
    """Torch tensors, without autograd."""

    name = "torch"
    engine = "replay"

    def __init__(self, device: Any = None) -> None:
        super().__init__(import_module("array_api_compat.torch"), device)
        self._torch = import_module("torch")
        if device is not None:
            # Tensors report their device with an index, and "cuda" is not equal to "cuda:0"
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
                x = x.copy()  # torch cannot share read-only memory or negative strides
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
    # JAX arrays have no views: slices and concatenations would copy in every step
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
    # One jitted function for each step, so that its compiled programs outlive a fit
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
    """Return the backend to compute on.

    Parameters
    ----------
    device : {"cpu", "gpu", "auto"}, optional
        Kind of device.  Without ``backend``, "cpu" is NumPy and "gpu" is CuPy; "auto" is
        the library of ``like`` if that is not NumPy, else CuPy if a GPU is usable, else
        NumPy.
    backend : {"numpy", "cupy", "torch", "jax"}, optional
        Name of the backend.  Without ``device``, its default device is used, or the device
        of ``like`` if that is already an array of this backend.
    like : array, optional
        Array whose namespace and device are used if neither of the above is given.

    Returns
    -------
    Backend

    Raises
    ------
    ValueError
        If a name is unknown.
    BackendError
        If the backend is not installed or has no such device.  Only "auto" falls back
        to the CPU.
    """
    check_names(device, backend)
    home = backend_of(like)
    if backend is not None:
        # Arrays of this backend stay on their own device
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
            # "auto" expects that there may be no GPU, but one without free memory is a surprise
            if error.__cause__ is not None and is_out_of_memory(error.__cause__):
                warn(f"device='auto' computes on the CPU: {error}", RuntimeWarning)
            return home
    if device == "gpu":
        return home if isinstance(home, CuPyBackend) else CuPyBackend.create(device)
    return NumPyBackend()


def check_names(device: str | None, backend: str | None) -> None:
    """Raise a ValueError if the name of a device or backend is unknown."""
    for argument, value, known in (
        ("device", device, DEVICES),
        ("backend", backend, tuple(BACKENDS)),
    ):
        if value is not None and value not in known:
            raise ValueError(f"unknown {argument} {value!r}; known: {', '.join(known)}")


def backend_of(x: Any) -> Backend:
    """Return the backend of an array; NumPy for anything that is not an array."""
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
    """Return any array or array-like as a NumPy array on the host."""
    return backend_of(x).to_host(x)


def move(x: Any, to: Backend, dtype: str | None = None) -> Array:
    """Return an array on another backend; between two libraries it passes through the host."""
    home = backend_of(x)
    return to.asarray(x if home == to or isinstance(home, NumPyBackend) else home.to_host(x), dtype)


_WANT_OF_MEMORY = (
    "RESOURCE_EXHAUSTED",  # JAX
    "cudaErrorMemoryAllocation",
    "CUDA_ERROR_OUT_OF_MEMORY",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error means that memory ran out, on the host or on a device.

    The host and CuPy's memory pool raise a MemoryError, torch a class of its own.  CUDA,
    cuBLAS and JAX are recognised by their messages.
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


# Values of the CUDA runtime's cudaError_t
_INITIALIZATION, _INSUFFICIENT_DRIVER, _NO_DEVICE = 3, 35, 100


def _check_cuda() -> None:
    """Raise a `BackendError` that names the remedy if CuPy cannot compute here."""
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

"""The source of each operation for libraries whose functions take ``out=``."""

from __future__ import annotations

from importlib import import_module
from typing import Any, ClassVar

import numpy as np

from portable_mlp.backends import Backend
from portable_mlp.engines.graph.program import REDUCTIONS
from portable_mlp.typing import Array


class NumPyDialect:
    """Source of operations for NumPy."""

    # Chains of operations on arrays of more elements run in blocks of this size, so that
    # intermediate results stay in the cache
    block = 1 << 16
    # Where a vector is added to rows, several shorter rows are joined up to this length
    wide: int = 256
    # Functions for which NumPy has no vector instructions if an operand is a scalar
    vectors: tuple[str, ...] = ("maximum", "minimum")
    wider: int = 4096
    # A product with a transposed matrix and fewer columns than this is faster as the
    # transpose of the product, unless the matrix itself is that narrow
    narrow: int = 0
    # Whether loops in C can read and write its arrays
    loops: bool = True
    # Whether a comparison that returns numbers is faster than one that returns booleans
    numeric_masks: bool = False

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self._memory: Array | None = None

    def gather(self, x: Array, rows: Array, out: Array) -> Array:
        """Write the given rows of x (n, ...), which may be those of each member, into a buffer."""
        return x.take(rows, 0, out, "clip")

    def buffer(self, x: Array, *n: int) -> Array:
        """Return an uninitialised array for n rows of x, or for (members, n) rows."""
        return np.empty((*n, *x.shape[1:]), x.dtype)

    def globals(self) -> dict[str, Any]:
        """Return the global variables of a program's source."""
        return {"np": np, "empty": self.empty, "work": self.work}

    def empty(self, n_bytes: int) -> Array:
        """Return uninitialised bytes, aligned for the widest vector instructions."""
        raw = np.empty(n_bytes + 64, np.uint8)
        start = -raw.ctypes.data % 64
        return raw[start : start + n_bytes]

    def work(self, n_bytes: int) -> Array:
        """Return work memory; it holds nothing between calls, so all programs share it."""
        if self._memory is None or len(self._memory) < n_bytes:
            self._memory = self.empty(n_bytes)
        return self._memory

    def release(self) -> None:
        """Free the work memory; no program may be left."""
        self._memory = None

    @classmethod
    def dtype(cls, dtype: Any) -> str:
        return f"np.{dtype}"

    @classmethod
    def constant(cls, value: Any, shape: Any, dtype: Any) -> str:
        return f"np.full({shape}, {value}, {cls.dtype(dtype)})"

    @classmethod
    def arange(cls, bounds: str, dtype: Any) -> str:
        return f"np.arange({bounds}, dtype={cls.dtype(dtype)})"

    @classmethod
    def bytes_of(cls, x: str) -> str:
        return f"{x}.reshape(-1).view(np.uint8)"

    @classmethod
    def transpose(cls, x: str, axes: tuple[int, ...]) -> str:
        return f"{x}.transpose{axes}"

    @classmethod
    def broadcast(cls, x: str, shape: Any) -> str:
        return f"np.broadcast_to({x}, {shape})"

    @classmethod
    def copy(cls, x: str) -> str:
        return f"{x}.copy()"

    @classmethod
    def result(cls, x: str, shape: Any) -> str:
        return f"{x}.copy()" if shape else f"{x}.item()"

    @classmethod
    def assign(cls, out: str, x: str) -> str:
        return f"{out}[...] = {x}"

    @classmethod
    def fill(cls, out: str, number: str, shape: Any) -> str:
        """Write a number computed on the host into an array; with axes it is a NumPy array."""
        return f"{out}[...] = {number}" if shape else f"{out}[()] = {number}"

    @classmethod
    def where(cls, out: str, condition: str, a: str, b: str) -> str:
        return f"{out}[...] = {b}; np.copyto({out}, {a}, where={condition})"

    @classmethod
    def elementwise(cls, function: str) -> str:
        return f"np.{function}"

    @classmethod
    def reduction(cls, function: str) -> str:
        return f"np.{REDUCTIONS[function]}.reduce"

    @classmethod
    def reduce(cls, f: str, x: str, axes: tuple[int, ...], keepdims: bool, out: str) -> str:
        axis = axes[0] if len(axes) == 1 else axes
        return f"{f}({x}, {axis}, None, {out}, {keepdims})"

    @classmethod
    def matmul(cls, a: str, b: str, out: str, ndims: tuple[int, int]) -> str:
        # dot has half of matmul's overhead, and gives the same product
        return f"{a}.dot({b}, {out})" if max(ndims) <= 2 else f"np.matmul({a}, {b}, out={out})"


class TorchDialect(NumPyDialect):
    """Source of operations for torch."""

    loops = False
    block = 0  # torch works on several cores, for which blocks would be too short
    wide = wider = 0
    vectors = ()
    narrow = 16  # with fewer columns, MKL is several times slower
    numeric_masks = True  # five times faster

    _NAMES: ClassVar[dict[str, str]] = {
        "absolute": "abs", "power": "pow", "equal": "eq", "not_equal": "ne",
        "left_shift": "bitwise_left_shift", "right_shift": "bitwise_right_shift",
        "invert": "bitwise_not", "rint": "round",
    }  # fmt: skip

    def __init__(self, backend: Backend) -> None:
        super().__init__(backend)
        self.torch, self.device = import_module("torch"), backend.device

    def gather(self, x: Array, rows: Array, out: Array) -> Array:
        if rows.ndim == 1:
            return self.torch.index_select(x, 0, rows, out=out)
        stacked = out.view(-1, *x.shape[1:])
        self.torch.index_select(x, 0, rows.reshape(-1), out=stacked)
        return out

    def buffer(self, x: Array, *n: int) -> Array:
        return self.torch.empty((*n, *x.shape[1:]), dtype=x.dtype, device=x.device)

    def globals(self) -> dict[str, Any]:
        return {**super().globals(), "torch": self.torch, "device": self.device}

    def empty(self, n_bytes: int) -> Array:
        return self.torch.empty(n_bytes, dtype=self.torch.uint8, device=self.device)

    @classmethod
    def dtype(cls, dtype: Any) -> str:
        return f"torch.{dtype}"

    @classmethod
    def constant(cls, value: Any, shape: Any, dtype: Any) -> str:
        # Scalars stay on the host, since kernels take them as arguments
        where = ", device=device" if shape else ""
        return f"torch.full({shape}, {value}, dtype={cls.dtype(dtype)}{where})"

    @classmethod
    def arange(cls, bounds: str, dtype: Any) -> str:
        return f"torch.arange({bounds}, dtype={cls.dtype(dtype)}, device=device)"

    @classmethod
    def bytes_of(cls, x: str) -> str:
        return f"{x}.reshape(-1).view(torch.uint8)"

    @classmethod
    def transpose(cls, x: str, axes: tuple[int, ...]) -> str:
        return f"{x}.permute{axes}"

    @classmethod
    def broadcast(cls, x: str, shape: Any) -> str:
        return f"{x}.expand({shape})"

    @classmethod
    def copy(cls, x: str) -> str:
        return f"{x}.clone()"

    @classmethod
    def result(cls, x: str, shape: Any) -> str:
        return f"{x}.clone()"

    @classmethod
    def assign(cls, out: str, x: str) -> str:
        return f"{out}.copy_({x})"

    @classmethod
    def fill(cls, out: str, number: str, shape: Any) -> str:
        number = f"torch.from_numpy({number})" if shape else number
        return super().fill(out, number, shape)

    @classmethod
    def where(cls, out: str, condition: str, a: str, b: str) -> str:
        return f"torch.where({condition}, {a}, {b}, out={out})"

    @classmethod
    def elementwise(cls, function: str) -> str:
        return f"torch.{cls._NAMES.get(function, function)}"

    @classmethod
    def reduction(cls, function: str) -> str:
        return "torch." + {"max": "amax", "min": "amin"}.get(function, function)

    @classmethod
    def reduce(cls, f: str, x: str, axes: tuple[int, ...], keepdims: bool, out: str) -> str:
        return f"{f}({x}, {axes}, {keepdims}, out={out})"

    @classmethod
    def matmul(cls, a: str, b: str, out: str, ndims: tuple[int, int]) -> str:
        # torch.matmul costs more, and warns where an operand is a vector
        if ndims == (1, 2):
            return f"torch.mv({b}.T, {a}, out={out})"
        function = {(1, 1): "dot", (2, 1): "mv", (2, 2): "mm"}.get(ndims, "matmul")
        return f"torch.{function}({a}, {b}, out={out})"


DIALECTS: dict[str, type[NumPyDialect]] = {"numpy": NumPyDialect, "torch": TorchDialect}

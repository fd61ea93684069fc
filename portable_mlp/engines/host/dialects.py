"""How the calls of a replayed program are spelled, for each library that has ``out=``."""

from __future__ import annotations

from importlib import import_module
from typing import Any, ClassVar

import numpy as np

from portable_mlp.backends import Backend
from portable_mlp.engines.graph.program import REDUCTIONS
from portable_mlp.typing import Array


class NumPyDialect:
    """How operations are spelled for NumPy."""

    # Elements of an array; chains of operations on larger ones run in blocks of so many, so
    # that what stands between them is small
    block = 1 << 16
    # Elements of a row; shorter ones are added a vector several at a time
    wide: int = 256
    # With a scalar operand, NumPy has no vector instructions for these
    vectors: tuple[str, ...] = ("maximum", "minimum")
    wider: int = 4096
    # Columns of a product of a transposed matrix; with fewer it is quicker to compute the
    # product's transpose, if that matrix is not as narrow
    narrow: int = 0
    # Whether its arrays are where loops in C can read and write them
    loops: bool = True
    # Whether a comparison is quicker into numbers than into booleans that are then converted
    numeric_masks: bool = False

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self._memory: Array | None = None

    def gather(self, x: Array, rows: Array, out: Array) -> Array:
        """Rows of x, into a buffer."""
        return x.take(rows, 0, out, "clip")

    def buffer(self, x: Array, n: int) -> Array:
        """Room for n rows of x."""
        return np.empty((n, *x.shape[1:]), x.dtype)

    def globals(self) -> dict[str, Any]:
        """Return what a program's source refers to."""
        return {"np": np, "empty": self.empty, "work": self.work}

    def empty(self, n_bytes: int) -> Array:
        """Uninitialised bytes, aligned for the widest vector instructions."""
        raw = np.empty(n_bytes + 64, np.uint8)
        start = -raw.ctypes.data % 64
        return raw[start : start + n_bytes]

    def work(self, n_bytes: int) -> Array:
        """Memory that holds nothing between calls, so that all programs may have the same."""
        if self._memory is None or len(self._memory) < n_bytes:
            self._memory = self.empty(n_bytes)
        return self._memory

    def release(self) -> None:
        """Let that memory go, when no program is left."""
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
        """Bring in a number that the host has computed; with axes, it is one of its arrays."""
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
        # dot costs half of matmul's overhead, and is the same product
        return f"{a}.dot({b}, {out})" if max(ndims) <= 2 else f"np.matmul({a}, {b}, out={out})"


class TorchDialect(NumPyDialect):
    """How operations are spelled for torch."""

    loops = False
    block = 0  # torch works on several cores; blocks would be too short for that
    wide = wider = 0
    vectors = ()
    narrow = 16  # MKL is several times slower then
    numeric_masks = True  # five times

    _NAMES: ClassVar[dict[str, str]] = {
        "absolute": "abs", "power": "pow", "equal": "eq", "not_equal": "ne",
        "left_shift": "bitwise_left_shift", "right_shift": "bitwise_right_shift",
        "invert": "bitwise_not",
    }  # fmt: skip

    def __init__(self, backend: Backend) -> None:
        super().__init__(backend)
        self.torch, self.device = import_module("torch"), backend.device

    def gather(self, x: Array, rows: Array, out: Array) -> Array:
        return self.torch.index_select(x, 0, rows, out=out)

    def buffer(self, x: Array, n: int) -> Array:
        return self.torch.empty((n, *x.shape[1:]), dtype=x.dtype, device=x.device)

    def globals(self) -> dict[str, Any]:
        return {**super().globals(), "torch": self.torch, "device": self.device}

    def empty(self, n_bytes: int) -> Array:
        return self.torch.empty(n_bytes, dtype=self.torch.uint8, device=self.device)

    @classmethod
    def dtype(cls, dtype: Any) -> str:
        return f"torch.{dtype}"

    @classmethod
    def constant(cls, value: Any, shape: Any, dtype: Any) -> str:
        # Scalars stay on the host: kernels take them as arguments
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

"""Every backend that numerical tests run on, as a test sees it: host arrays in and out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from typing import Any

import numpy as np
import pytest

from portable_mlp.backends import Backend, BackendError, NumPyBackend, get_backend
from portable_mlp.engines.base import RecordedEngine
from portable_mlp.engines.host.compiler import find

SKLEARN = tuple(int(part) for part in version("scikit-learn").split(".")[:2])


@dataclass(frozen=True)
class Target:
    """A backend as tests see it: host arrays in, host arrays out."""

    name: str
    backend: Backend
    read_only: bool = False
    dtype: str = "float64"

    @property
    def xp(self) -> Any:
        return self.backend.xp

    @property
    def tol(self) -> float:
        """Allowed difference from NumPy in float64, relative."""
        return 1e-12 if self.dtype == "float64" else 2e-5

    def scope(self) -> AbstractContextManager[None]:
        return self.backend.scope(self.dtype)

    def array(self, host: Any) -> Any:
        host = np.asarray(host)
        if host.dtype == np.float64:
            array = self.backend.asarray(host, self.dtype, copy=True)
        else:
            array = self.backend.asarray(host.astype(np.int32), "int32", copy=True)
        if self.read_only:
            array.flags.writeable = False
        return array

    def run(self, function: Callable[..., Any], *arrays: Any) -> Any:
        """``function(*arrays)`` there; traced on JAX, where a hidden transfer would raise."""
        with self.scope():
            there = tree_map(self.array, arrays)
            return tree_map(self.backend.to_host, self.backend.compile(function)(*there))


def tree_map(function: Callable[[Any], Any], tree: Any) -> Any:
    """Apply to every array in nested lists and tuples."""
    if isinstance(tree, list | tuple):
        return type(tree)(tree_map(function, leaf) for leaf in tree)
    return None if tree is None else function(tree)


class ByEngine(NumPyBackend):
    """NumPy by a certain engine: in its scope whatever computes with NumPy does so."""

    def __init__(self, engine: str, compiled: str = "never") -> None:
        super().__init__()
        self.engine = engine
        self.compiled = compiled

    @contextmanager
    def scope(self, dtype: str) -> Iterator[None]:
        with super().scope(dtype), pytest.MonkeyPatch.context() as patch:
            patch.setattr(NumPyBackend, "engine", self.engine)
            patch.setattr(RecordedEngine, "EAGER", 0)
            patch.setenv("PORTABLE_MLP_COMPILE", self.compiled)
            yield


def _strict(device: str) -> Backend:
    xp = pytest.importorskip("array_api_strict")
    return Backend(xp, xp.Device(device))


def _library(name: str) -> Callable[[], Backend]:
    def build() -> Backend:
        # Not only missing: broken or without a device, too, is a reason to skip
        try:
            # torch and JAX on the CPU, also where their default is a GPU
            return get_backend("gpu" if name == "cupy" else "cpu", name)
        except BackendError as error:
            pytest.skip(f"{name}: {error}")

    return build


TARGETS: dict[str, Callable[[], Target]] = {
    "numpy": lambda: Target("numpy", get_backend()),
    "numpy-eager": lambda: Target("numpy-eager", ByEngine("eager")),
    "numpy-loops": lambda: Target("numpy-loops", ByEngine("replay", "now")),
    "cupy-emulated": lambda: Target("cupy-emulated", emulated_gpu()),
    "numpy-read-only": lambda: Target("numpy-read-only", get_backend(), read_only=True),
    "strict": lambda: Target("strict", _strict("CPU_DEVICE")),
    "strict-device1": lambda: Target("strict-device1", _strict("device1")),
    "strict-no_x64": lambda: Target("strict-no_x64", _strict("no_x64"), dtype="float32"),
    "torch": lambda: Target("torch", _library("torch")()),
    "jax": lambda: Target("jax", _library("jax")()),
    "cupy": lambda: Target("cupy", _library("cupy")()),
    "torch-cuda": lambda: Target("torch-cuda", get_gpu("torch")),
    "jax-cuda": lambda: Target("jax-cuda", get_gpu("jax")),
}

GPU = {"cupy", "torch-cuda", "jax-cuda"}


def emulated_gpu(device: int = 1) -> Backend:
    """A GPU of `cuda`: not the current one, which is 0."""
    with import_module("cupy").cuda.Device(device):
        return get_backend("gpu", "cupy")


def get_gpu(name: str) -> Backend:
    try:
        return get_backend("gpu", name)
    except BackendError as error:
        pytest.skip(f"{name} on a GPU: {error}")


def get_target(name: str, request: pytest.FixtureRequest) -> Target:
    if name == "cupy-emulated":
        request.getfixturevalue("cuda")
    elif name in GPU:
        # Most tests are too short to be recorded otherwise, and would never reach a graph
        request.getfixturevalue("monkeypatch").setattr(RecordedEngine, "EAGER", 0)
    if name == "numpy-loops" and not find():
        pytest.skip("no C compiler")
    try:
        return TARGETS[name]()
    except pytest.skip.Exception as skipped:
        if name in GPU and request.config.getoption("--require-gpu"):
            pytest.fail(f"--require-gpu: {skipped}")
        raise

"""The CUDA path on an emulated machine: who owns what, what fails, and what is said then.

The machine is `fake_cuda`; the backend and the engine's runtime are the real ones.  A rule of
CUDA's that was broken fails a test when its machine is taken away.
"""

from __future__ import annotations

import ctypes
import gc
import inspect
import os
import re
import subprocess
import sys
import threading
import warnings
import weakref
from contextlib import suppress
from importlib import import_module
from itertools import product
from pathlib import Path

import coverage
import fake_cuda
import numpy as np
import pytest
from helpers.paths import TESTS
from helpers.steps import NUMPY, case, fit, hyper_of
from helpers.targets import emulated_gpu

from portable_mlp import DivergenceError, MLPClassifier, backends
from portable_mlp.backends import (
    BackendError,
    CuPyBackend,
    get_backend,
    is_out_of_memory,
    to_host,
)
from portable_mlp.engines import CaptureEngine, Engine, Task
from portable_mlp.engines.cuda import capture, runtime
from portable_mlp.engines.cuda.launches import Kernel
from portable_mlp.engines.cuda.runtime import CaptureError, Cuda, layout
from portable_mlp.losses import SoftmaxCrossEntropy, SquaredError
from portable_mlp.optimizers import Adam
from portable_mlp.sources import Source
from portable_mlp.steps import Batch

pytestmark = pytest.mark.slow

BOTH = pytest.mark.parametrize("cuda", ["poison", "reuse"], indirect=True)


def on_gpu(loss=None, device=1, epochs=3, **settings_):
    """Parameters after a fit on a GPU, on the host."""
    backend = emulated_gpu(device)
    settings_ = {"batch_size": 5, "sizes": (5, 50, 3), "n": 32, **settings_}
    made = case(loss or SoftmaxCrossEntropy(), Adam(), backend=backend, **settings_)
    return [to_host(a) for a in fit(*made, epochs=epochs)]


def on_numpy(loss=None, epochs=3, **settings_):
    settings_ = {"batch_size": 5, "sizes": (5, 50, 3), "n": 32, **settings_}
    return fit(*case(loss or SoftmaxCrossEntropy(), Adam(), **settings_), epochs=epochs)


def gap(got, wanted):
    """The largest difference, relative to the largest parameter; not a number if one is not."""
    return max(
        float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(got, wanted, strict=True)
    )


# ---------------------------------------------------------------- the seam


@BOTH
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("captured", [False, True])
def test_products(cuda, dtype, captured):
    """Four transpositions, matrices and vectors, in the middle of other memory."""
    cupy, runtime_, rng = import_module("cupy"), Cuda(), np.random.RandomState(0)

    def placed(shape, turned):
        n = shape[0] * shape[1]
        whole = cupy.array(rng.standard_normal(n + 13).astype(dtype))
        a = whole[13:].reshape(shape[::-1] if turned else shape)
        return a.T if turned else a

    for turned_left, turned_right in product([False, True], repeat=2):
        for n, k, m in product([1, 2, 3, 17], repeat=3):
            left, right = placed((n, k), turned_left), placed((k, m), turned_right)
            out = placed((n, m), False)

            def work(operands=(left, right, out)):
                runtime_.multiply(*operands)

            if captured:
                work()
                out.fill(np.nan)
                graph = runtime_.capture(work)
                assert np.isnan(out.get()).all()
                graph.launch()
            else:
                work()
            np.testing.assert_allclose(
                out.get(), left.get() @ right.get(), rtol=1e-5 if dtype == "float32" else 1e-12,
                atol=1e-5 if dtype == "float32" else 1e-12,
            )  # fmt: skip


@pytest.mark.parametrize(
    ("a", "wanted"),
    [
        (np.empty((3, 4)), (0, 4)), (np.empty((4, 3)).T, (1, 4 - 1)), (np.empty((1, 4)), (0, 4)),
        (np.empty((3, 1)), (0, 1)), (np.empty((1, 1)), (0, 1)), (np.empty((3, 8))[:, :4], (0, 8)),
    ],
)  # fmt: skip
def test_layout(a, wanted):
    assert layout(a) == wanted


def test_a_kernel_is_loaded_once(cuda, monkeypatch):
    """CuPy's ``get_function`` makes a kernel that is loaded at its first launch."""
    kernel = 'extern "C" __global__ void {0}(const double* table, int* step) {{\n    ++*step;\n}}\n'
    cupy, made, original = import_module("cupy"), [], fake_cuda.RawModule.get_function

    def counted(self, name):
        made.append(name)
        return original(self, name)

    monkeypatch.setattr(fake_cuda.RawModule, "get_function", counted)
    launch = Cuda().compile(kernel.format("k0") + kernel.format("k1"))
    table, counter = cupy.zeros(1), cupy.zeros(1, np.int32)
    for name in ("k0", "k1", "k0"):
        launch(Kernel(name, 1, 1, ()), [table, counter])
    assert counter.get()[0] == 3
    assert made == ["k0", "k1"]


def test_a_capture_that_fails_leaves_the_stream_and_the_handle_as_they_were(cuda):
    cupy, runtime_ = import_module("cupy"), Cuda()
    a, out = cupy.ones((2, 2)), cupy.zeros((2, 2))
    handle = cupy.cuda.Device().cublas_handle

    def fails():
        runtime_.multiply(a, a, out)
        raise RuntimeError("in the middle")

    with pytest.raises(CaptureError, match="in the middle"):
        runtime_.capture(fails)
    assert cupy.cuda.cublas.getStream(handle) == cupy.cuda.get_current_stream().ptr == 0
    graph = runtime_.capture(lambda: runtime_.multiply(a, a, out))
    graph.launch()
    np.testing.assert_array_equal(out.get(), np.full((2, 2), 2.0))


def test_a_capture_waits_for_nothing(cuda):
    """To look at a value within a capture invalidates it, which is said."""
    cupy, runtime_ = import_module("cupy"), Cuda()
    a = cupy.ones((2, 2))
    with pytest.raises(CaptureError, match="cudaErrorStreamCapture"):
        runtime_.capture(lambda: float(a[0, 0]))
    assert set(cuda.invalidated) == {"synchronisation of the stream that captures"}


# ---------------------------------------------------------------- lifetimes


@BOTH
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_graph_owns_what_it_points_to(cuda, dtype):
    """However much is allocated and freed between its replays."""
    cupy, junk = import_module("cupy"), []

    def disturb():
        if not junk:
            gc.collect()
        junk.clear()
        junk.extend(cupy.full(n, 1e30) for n in (1, 3, 10, 33, 100, 333, 1000, 3333, 10_000) * 3)

    cuda.hooks["replay"] = disturb
    got = on_gpu(dtype=dtype, epochs=5)
    assert cuda.counts["replays"] == 5 * 7
    assert gap(got, on_numpy(dtype=dtype, epochs=5)) < (1e-12 if dtype == "float64" else 1e-5)


@BOTH
def test_models_trained_by_turns(cuda):
    """Two engines in one thread: neither takes the other's memory, stream or workspace."""
    made = [case(loss, Adam(), backend=emulated_gpu(), batch_size=5, n=32, sizes=(5, 50, 3))
            for loss in (SoftmaxCrossEntropy(), SquaredError())]  # fmt: skip
    states = [trainer.start(trainer.params(arrays.leaves)) for trainer, arrays, _ in made]
    engines = [CaptureEngine(trainer.backend, trainer.recipe) for trainer, *_ in made]
    arrays = [state.arrays for state in states]
    for epoch in range(4):
        for i, (trainer, _, batch) in enumerate(made):
            hypers = [hyper_of(trainer, 7 * epoch + j + 1) for j in range(7)]
            with trainer.backend.scope("float64"):
                task = Task(batch, np.arange(32), 5, hypers, lambda: False)
                arrays[i], _ = engines[i].run(arrays[i], task)
    for mine, loss in zip(arrays, (SoftmaxCrossEntropy(), SquaredError()), strict=True):
        plain = case(loss, Adam(), batch_size=5, n=32, sizes=(5, 50, 3), shuffle=False)
        wanted = fit(*plain, epochs=4)
        got = plain[0].params([to_host(a) for a in mine.leaves])
        assert gap(got, wanted) < 1e-12


@BOTH
def test_memory_that_cuda_frees_at_once(cuda):
    """Without CuPy's pool, as with ``set_allocator(None)``."""
    cupy = import_module("cupy")
    cupy.cuda.set_allocator(None)
    try:
        assert gap(on_gpu(), on_numpy()) < 1e-12
    finally:
        cupy.cuda.set_allocator(cupy.get_default_memory_pool().malloc)


def test_nothing_is_left_behind(cuda):
    """Memory, streams: all of a fit's is given back."""
    on_gpu()
    gc.collect()
    assert cuda.taken(1) == 0
    assert not cuda._streams


# ---------------------------------------------------------------- streams, devices, threads


@pytest.mark.parametrize("non_blocking", [False, True])
def test_on_a_stream_of_the_user_s_own(cuda, non_blocking):
    cupy = import_module("cupy")
    with cupy.cuda.Device(1):
        stream = cupy.cuda.Stream(non_blocking=non_blocking)
        with stream:
            got = on_gpu()
            handle = cupy.cuda.Device().cublas_handle
            # Not on the stream of a capture; CuPy's own products set theirs
            assert cupy.cuda.cublas.getStream(handle) in (0, stream.ptr)
    assert gap(got, on_numpy()) < 1e-12


@pytest.mark.parametrize("device", [0, 1])
def test_estimators_on_either_device(cuda, device):
    """Whichever is the current one, which stays so."""
    cupy = import_module("cupy")
    rng = np.random.RandomState(0)
    X, y = rng.standard_normal((60, 5)), rng.randint(3, size=60)
    settings_ = {"hidden_layer_sizes": (7,), "max_iter": 5, "random_state": 0, "tol": 0.0}
    with cupy.cuda.Device(device):
        there, labels = cupy.asarray(X), cupy.asarray(y)
    with cupy.cuda.Device(1 - device), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it has not converged
        for early in (False, True):
            plain = MLPClassifier(**settings_, early_stopping=early).fit(X, y)
            model = MLPClassifier(**settings_, early_stopping=early).fit(there, labels)
            assert model.coefs_[0].device == cupy.cuda.Device(device)
            for name in ("predict", "predict_proba", "predict_log_proba", "hidden_activations"):
                found = getattr(model, name)(there)
                assert found.device == cupy.cuda.Device(device)
                np.testing.assert_allclose(found.get(), getattr(plain, name)(X), rtol=1e-9)
            assert model.score(there, labels) == plain.score(X, y)
            model.continue_fit(there, labels)
        assert cupy.cuda.Device().id == 1 - device


def test_integers_and_bad_values_on_another_device(cuda):
    cupy = import_module("cupy")
    with cupy.cuda.Device(1):
        integers, bad = cupy.arange(12).reshape(6, 2), cupy.full((6, 2), np.nan)
    model = MLPClassifier((3,), max_iter=1, random_state=0)
    with pytest.raises(ValueError, match="X contains NaN or infinity"):
        model.fit(bad, [0, 1] * 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert model.fit(integers, [0, 1] * 3).predict(integers).device.id == 1


def in_a_thread(function):
    """Run in a thread of its own, to its end; errors and warnings come here."""
    found = []

    def run():
        try:
            found.append(function())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


class Beside:
    """A thread that fits while another captures, and lives until it is told to end."""

    def __init__(self, cuda):
        self.results, self._go, self._done = [], threading.Event(), threading.Event()
        self._end = threading.Event()
        self.thread = threading.Thread(target=self._run)
        self.thread.start()
        cuda.hooks["capturing"] = self.meet

    def _run(self):
        self._go.wait(600)
        self.results.append(on_gpu(SquaredError()))
        gc.collect()
        self._done.set()
        self._end.wait(600)

    def meet(self):
        if not self._go.is_set():
            self._go.set()
            assert self._done.wait(600)

    def close(self):
        self._go.set()
        self._end.set()
        self.thread.join()


@BOTH
def test_a_fit_in_a_thread_while_another_captures(cuda):
    beside = Beside(cuda)
    try:
        got = on_gpu()
    finally:
        beside.close()
    assert gap(got, on_numpy()) < 1e-12
    assert gap(beside.results[0], on_numpy(SquaredError())) < 1e-12
    assert not cuda.invalidated


def test_a_thread_that_ends_while_another_captures(cuda):
    """CuPy destroys its cuBLAS handle, which waits for the device: the capture is tried again."""
    others = []

    def meet():
        if not others:
            others.append(None)
            others.append(in_a_thread(lambda: on_gpu(SquaredError())))

    cuda.hooks["capturing"] = meet
    got = on_gpu()
    assert cuda.invalidated == ["cublasDestroy"]
    assert gap(got, on_numpy()) < 1e-12
    assert gap(others[1], on_numpy(SquaredError())) < 1e-12


def test_several_fits_at_once(cuda):
    results: dict[int, list] = {}
    threads = [
        threading.Thread(target=lambda i=i: results.update({i: on_gpu(device=i % 2)}))
        for i in range(4)
    ]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    # A capture may be invalidated by a thread that ends, more often than it is tried
    assert all("without a CUDA graph" in str(w.message) for w in warned)
    wanted = on_numpy()
    assert len(results) == 4
    for got in results.values():
        assert gap(got, wanted) < 1e-12


FORKS = """
import os, sys
import fake_cuda
from portable_mlp import BackendError, MLPClassifier, get_backend
def fit():
    return MLPClassifier((3,), max_iter=30, tol=0.0, random_state=0, device="gpu").fit(
        [[0.0], [1.0], [2.0], [3.0]], [0, 0, 1, 1])
with fake_cuda.install(fake_cuda.Driver()):
    before = fit().coefs_[0]
    if os.fork() == 0:
        try:
            get_backend("gpu")
        except BackendError as error:
            print(error, flush=True)
        os._exit(0)
    os.wait()
    print((fit().coefs_[0] == before).all())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_is_told_why_it_cannot_compute():
    """And its parent goes on."""
    if fake_cuda.COMPILER is None:
        pytest.skip("no g++ to compile CUDA's kernels for the host with")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKS],
        cwd=TESTS, capture_output=True, text=True, check=True,
    )  # fmt: skip
    told, right = done.stdout.strip().splitlines()
    assert re.match(r"device='gpu' \(CuPy\): CUDA does not start.*forked.*'spawn'", told)
    assert right == "True"


# ---------------------------------------------------------------- memory runs out


@pytest.mark.parametrize("loss", [SoftmaxCrossEntropy(), SquaredError()], ids=repr)
def test_memory_that_runs_out_at_any_allocation(loss, cuda, monkeypatch):
    """Within the engine, in whatever allocation: the fit goes on, and is right."""
    small = {"epochs": 2, "n": 12}
    inside, sizes = [], []

    def noted(self, *args, original=CaptureEngine._repeat):
        inside.append(len(sizes))
        original(self, *args)
        inside.append(len(sizes))

    cuda.hooks["allocate"] = sizes.append
    with monkeypatch.context() as patch:
        patch.setattr(CaptureEngine, "_repeat", noted)
        wanted = on_gpu(loss, **small)
    first, end = inside[:2]
    assert end - first > 40  # the first epoch's: buffers, the check, workspace
    for failing in [*range(first, end), *range(inside[2], inside[3])]:
        counted = []

        def fail(size, failing=failing, counted=counted):
            counted.append(size)
            if len(counted) == failing + 1:
                raise fake_cuda.OutOfMemoryError("Out of memory allocating")

        cuda.hooks["allocate"] = fail
        with pytest.warns(RuntimeWarning, match="memory for a graph: Out of memory allocating"):
            got = on_gpu(loss, **small)
        assert gap(got, wanted) < 1e-12


def test_less_memory_than_the_check_needs(cuda, monkeypatch):
    """Where a fit by the step itself still has room."""
    settings_ = {"sizes": (50, 200, 200, 3), "n": 64, "batch_size": 64}
    most = []
    cuda.hooks["allocate"] = lambda size: most.append(cuda.taken(1) + size)
    with monkeypatch.context() as patch:
        patch.setattr(CuPyBackend, "engine", "eager")
        wanted = on_gpu(**settings_)
    cuda.hooks.clear()
    cuda.limit = max(most) + 4096
    with pytest.warns(RuntimeWarning, match="runs eagerly.*not enough memory.*Out of memory"):
        got = on_gpu(**settings_)
    assert gap(got, wanted) < 1e-12


@pytest.mark.parametrize("event", ["begin_capture", "end_capture"])
def test_memory_that_runs_out_in_a_capture(cuda, event):
    def fail(*_):
        raise fake_cuda.CUDARuntimeError(2)

    cuda.hooks[event] = fail
    with pytest.warns(RuntimeWarning, match="without a CUDA graph: cudaErrorMemoryAllocation"):
        got = on_gpu()
    assert gap(got, on_numpy()) < 1e-12


def test_memory_that_runs_out_in_a_replay(cuda):
    replays = []

    def fail():
        replays.append(None)
        if len(replays) == 5:
            raise fake_cuda.CUDARuntimeError(2)

    cuda.hooks["replay"] = fail
    with pytest.warns(RuntimeWarning, match="without a CUDA graph: cudaErrorMemoryAllocation"):
        got = on_gpu()
    assert gap(got, on_numpy()) < 1e-12


def test_memory_that_runs_out_in_a_prediction(cuda):
    """One clear error; with memory, the same model predicts."""
    cupy, rng = import_module("cupy"), np.random.RandomState(0)
    X, y = rng.standard_normal((60, 5)), rng.randint(3, size=60)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = MLPClassifier((7,), max_iter=2, random_state=0).fit(cupy.asarray(X), y)
    there = cupy.asarray(X)
    cuda.limit = cuda.taken(0)
    with pytest.raises(MemoryError, match="Out of memory allocating") as failure:
        model.predict(there)
    assert is_out_of_memory(failure.value)
    cuda.limit = None
    assert model.predict(there).shape == (60,)


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (MemoryError(), True), (fake_cuda.OutOfMemoryError(), True),
        (RuntimeError("cudaErrorMemoryAllocation: out of memory"), True),
        (RuntimeError("CUDA_ERROR_OUT_OF_MEMORY: out of memory"), True),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory"), True),
        (RuntimeError("cudaErrorIllegalAddress"), False), (ValueError("memory"), False),
    ],
)  # fmt: skip
def test_what_a_want_of_memory_is(error, is_one):
    assert is_out_of_memory(error) is is_one


# ---------------------------------------------------------------- other bad days


def test_without_cublas_of_its_own_kernels_are_launched_one_by_one(cuda, monkeypatch):
    monkeypatch.setattr(import_module("cupy").cuda.cublas, "__file__", "/nowhere/cublas.so")
    with pytest.warns(RuntimeWarning, match="without a CUDA graph: cuBLAS cannot be called dire"):
        got = on_gpu()
    assert not cuda.counts["captures"]
    assert cuda.counts["kernels"]
    assert gap(got, on_numpy()) < 1e-12


def test_another_cublas_in_the_process_is_not_taken(cuda):
    """As torch's, of another version: the one that CuPy has loaded computes."""
    names = list(runtime._SIGNATURES)
    decoy = "".join(f'extern "C" int {name}() {{ return 13; }}\n' for name in names)
    ctypes.CDLL(str(fake_cuda.kernels.build(decoy)), mode=ctypes.RTLD_GLOBAL)
    assert gap(on_gpu(), on_numpy()) < 1e-12
    assert cuda.counts["captures"]


def test_a_cublas_that_lacks_a_function(cuda, monkeypatch):
    monkeypatch.setitem(runtime._SIGNATURES, "cublasNoSuchFunction", [])
    with pytest.warns(RuntimeWarning, match="without a CUDA graph.*cublasNoSuchFunction"):
        got = on_gpu()
    assert gap(got, on_numpy()) < 1e-12


def test_windows_knows_a_library_by_its_name(cuda, monkeypatch):
    asked = []

    def load(path):
        asked.append(path)
        raise OSError("not here")

    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(runtime.ctypes, "CDLL", load)
    assert "not here" in Cuda().refuses
    assert asked == ["cublas64_12.dll"]


def test_a_product_that_cublas_refuses_is_an_error(cuda):
    cupy = import_module("cupy")
    bad = cupy.ndarray((2, 4), float, cupy.ones(8).data, (8, 8))  # rows that overlap
    with pytest.raises(RuntimeError, match="CUBLAS_STATUS_INVALID_VALUE"):
        Cuda().multiply(bad, cupy.ones((4, 2)), cupy.ones((2, 2)))


def test_kernels_that_fail_change_nothing_and_the_step_itself_runs(cuda):
    """At their first launch, in the middle of a step."""
    launches = []

    def fail(name):
        launches.append(name)
        if len(launches) == 4:
            raise RuntimeError("CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES")

    cuda.hooks["launch"] = fail
    with pytest.warns(RuntimeWarning, match="runs eagerly.*kernels fail: CUDA_ERROR_LAUNCH"):
        got = on_gpu()
    assert gap(got, on_numpy()) < 1e-12


def test_a_kernel_that_does_not_compile(cuda, monkeypatch):
    from portable_mlp.engines.graph import c_source

    capture._kernels.cache_clear()
    monkeypatch.setitem(c_source.FUNCTIONS, "sqrt", "no_such_function({0})")
    with pytest.warns(RuntimeWarning, match="(?s)runs eagerly.*kernels fail.*no_such_function"):
        got = on_gpu(alpha=0.125)
    capture._kernels.cache_clear()
    assert gap(got, on_numpy(alpha=0.125)) < 1e-12


def test_what_fails_on_the_device_is_told_where_it_was_launched(cuda, monkeypatch):
    """Not later, where the host happens to look; nothing can be computed after it."""
    waited = []

    def synchronize(self, original=CuPyBackend.synchronize):
        waited.append(cuda.counts["captures"])
        original(self)

    class Fails:
        def launch(self, *_):
            raise fake_cuda.CUDARuntimeError(700)

    monkeypatch.setattr(CuPyBackend, "synchronize", synchronize)
    monkeypatch.setattr(fake_cuda, "launcher", Fails)
    with pytest.raises(RuntimeError, match="cudaErrorIllegalAddress"):
        on_gpu()
    assert waited == [0]  # behind the first launch, before anything is captured


def no_graphs():
    raise RuntimeError("no graphs")


@pytest.mark.parametrize("back", range(1, 25, 3))
@pytest.mark.filterwarnings("ignore:the step is launched kernel by kernel")
def test_no_step_is_done_twice(back, cuda):
    """A kernel that fails in a later step is an error: the parameters may have been updated."""
    launched = []
    cuda.hooks = {"begin_capture": no_graphs, "launch": launched.append}
    on_gpu()
    n_launched = len(launched)
    launched.clear()

    def fail(name):
        launched.append(name)
        if len(launched) == n_launched - back:
            raise fake_cuda.CUDARuntimeError(2)

    cuda.hooks["launch"] = fail
    with pytest.raises(RuntimeError, match="cudaErrorMemoryAllocation"):
        on_gpu()


def test_a_failed_capture_leaves_nothing_behind(cuda):
    """No cycle of the error, its traceback and the engine's frames holds the memory."""
    failing = iter([True])

    def fail():
        if next(failing, False):
            raise RuntimeError("planted")

    cuda.hooks["begin_capture"] = fail
    gc.collect()
    gc.disable()
    try:
        on_gpu()
        held = cuda.taken(1)
    finally:
        gc.enable()
    assert held < 100_000


def test_for_want_of_memory_the_engine_holds_nothing(cuda, monkeypatch):
    """The step itself has all of the memory, although nobody collects cycles."""
    held, seen = [], []
    cuda.hooks["allocate"] = seen.append
    on_gpu(epochs=1)
    n_first, cuda.hooks = len(seen), {}
    seen.clear()

    def fail(size):
        seen.append(size)
        if len(seen) == n_first - 40:
            raise fake_cuda.OutOfMemoryError("Out of memory allocating")

    def eager(self, *args, original=Engine._step):
        held.append(cuda.taken(1))
        return original(self, *args)

    gc.collect()
    gc.disable()
    cuda.hooks["allocate"] = fail
    monkeypatch.setattr(Engine, "_step", eager)
    try:
        with pytest.warns(RuntimeWarning, match="not enough memory for a graph"):
            on_gpu(epochs=1)
    finally:
        gc.enable()
    assert held[0] < 100_000  # the workspace alone is 32 MB


def test_a_gpu_without_memory_is_not_taken_for_missing_libraries(cuda):
    cuda.limit = 0
    with pytest.raises(BackendError, match="the GPU has no memory left.*Out of memory"):
        get_backend("gpu")
    with pytest.warns(RuntimeWarning, match="device='auto' computes on the CPU.*no memory left"):
        assert get_backend("auto") == NUMPY


def test_a_stream_of_the_user_s_that_is_gone_is_not_given_back(cuda):
    """To the handle, which a product of the user's had left there."""
    cupy, runtime_ = import_module("cupy"), Cuda()
    a, out = cupy.ones((2, 2)), cupy.zeros((2, 2))
    with cupy.cuda.Stream() as stream:
        a @ a
    del stream
    gc.collect()
    runtime_.multiply(a, a, out)
    np.testing.assert_array_equal(out.get(), np.full((2, 2), 2.0))


def test_arrays_of_its_own_are_written_and_not_the_user_s(cuda):
    """A source that hands out the same arrays in each epoch, one after the other."""
    backend = emulated_gpu()
    trainer, arrays, batch = case(
        SquaredError(), Adam(), backend=backend, batch_size=5, n=10, sizes=(5, 8, 3)
    )
    with backend.current():
        parts = [Batch(batch.x[i : i + 5].copy(), batch.y[i : i + 5].copy()) for i in (0, 5)]
    before = [to_host(a) for part in parts for a in part if a is not None]

    class Same(Source):
        n_rows = 10

        def parts(self, batch_size):
            yield from ((part, None) for part in parts)

    state = trainer.start(trainer.params(arrays.leaves))
    trainer.fit(state, Same(), 4, np.random.RandomState(0))
    for a, b in zip(before, (a for part in parts for a in part if a is not None), strict=True):
        np.testing.assert_array_equal(a, to_host(b))


@pytest.mark.parametrize("wrong", ["moments", "values"])
def test_the_check_looks_at_all_that_a_step_changes(wrong, cuda, monkeypatch):
    """At the moments, and at the loss, too."""

    def alike(self, number, values, wanted, got, before, original=CaptureEngine._alike):
        if wrong == "moments":
            with emulated_gpu().current():
                wanted = [*wanted[:-1], wanted[-1] * 1.5]
        else:
            values = (float(values[0]) * 1.5, values[1])
        return original(self, number, values, wanted, got, before)

    monkeypatch.setattr(CaptureEngine, "_alike", alike)
    with pytest.warns(RuntimeWarning, match="do not compute what the step computes"):
        on_gpu(SquaredError())


def test_programs_for_few_shapes_of_data_are_kept(cuda):
    backend = emulated_gpu()
    trainer, arrays, batch = case(SquaredError(), Adam(), backend=backend, sizes=(5, 8, 3), n=20)
    engine = CaptureEngine(backend, trainer.recipe)
    now = trainer.start(trainer.params(arrays.leaves)).arrays
    with backend.scope("float64"):
        for n in range(3, 14):
            part = Batch(batch.x[:n], batch.y[:n])
            now, _ = engine.run(now, Task(part, None, 20, [hyper_of(trainer, n)], lambda: False))
    assert len(engine._memories) <= CaptureEngine._SHAPES


@pytest.mark.parametrize("wrong", ["subtract", "sqrt"])
def test_a_wrong_kernel_is_found_out_and_the_step_itself_runs(wrong, cuda, monkeypatch):
    from dataclasses import replace

    from portable_mlp.engines.graph import c_source

    right = c_source.FUNCTIONS[wrong]
    monkeypatch.setitem(c_source.FUNCTIONS, wrong, f"({right} * 1.001)")
    capture._kernels.cache_clear()
    optimizer = replace(Adam(), beta_1=0.123)
    made = case(SquaredError(), optimizer, backend=emulated_gpu(), batch_size=5)
    with pytest.warns(RuntimeWarning, match="kernels do not compute what the step computes"):
        got = [to_host(a) for a in fit(*made)]
    capture._kernels.cache_clear()
    assert gap(got, fit(*case(SquaredError(), optimizer, batch_size=5))) < 1e-12


def test_a_wrong_graph_is_found_out(cuda, monkeypatch):
    """The launches are right, and their replay is not."""

    class Nothing:
        def launch(self):
            pass

    monkeypatch.setattr(Cuda, "capture", lambda self, work: Nothing())
    with pytest.warns(RuntimeWarning, match="kernels do not compute what the step computes"):
        got = on_gpu()
    assert gap(got, on_numpy()) < 1e-12


# ---------------------------------------------------------------- planted twins


def check_and_forget(self, *arguments, original=CaptureEngine._check):
    """Keep the graphs that have been checked, and nothing that they point to."""
    original(self, *arguments)
    for work in arguments[-1].works:
        work.launch = lambda: None


def faults_of(cuda):
    """What was broken; the machine is clean again."""
    gc.collect()
    found = {*cuda.faults, *cuda.blas.left_behind()}
    cuda.faults.clear()
    for handle in cuda.blas.handles.values():
        handle.stream = cuda.queue(0)
    return found


@BOTH
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_graph_that_outlives_its_arrays_would_be_seen(cuda, dtype, monkeypatch):
    """As the engine once was: what it replays held the graph, and nothing else."""

    monkeypatch.setattr(CaptureEngine, "_check", check_and_forget)
    try:
        wrong = gap(on_gpu(dtype=dtype), on_numpy(dtype=dtype))
    except DivergenceError:
        wrong = np.nan
    assert not wrong < 1e-3
    assert any(re.fullmatch("(k[0-9]+|gather) uses memory that was freed", fault)
               for fault in faults_of(cuda))  # fmt: skip


def test_a_handle_left_on_a_stream_that_is_gone_would_be_seen(cuda, monkeypatch):
    def careless(cupy, original=runtime._load_cublas):
        call, last = original(cupy), [""]

        def without_restoring(name, *arguments):
            restores = name == "cublasSetStream_v2" and last[0].endswith("gemm_v2")
            last[0] = name
            if not restores:
                call(name, *arguments)

        return without_restoring

    monkeypatch.setattr(runtime, "_load_cublas", careless)
    on_gpu()
    assert faults_of(cuda) == {"a cuBLAS handle is left on a destroyed stream"}


def test_a_handle_of_each_fit_would_be_seen(cuda, monkeypatch):
    """As the engine once had: to destroy it invalidates what another thread captures."""

    def init(self, original=Cuda.__init__):
        original(self)
        cublas = import_module("cupy").cuda.cublas

        def destroy(handle):
            with suppress(RuntimeError):
                cublas.destroy(handle)

        weakref.finalize(self, destroy, cublas.create())

    monkeypatch.setattr(Cuda, "__init__", init)
    beside = Beside(cuda)
    try:
        on_gpu()
    finally:
        beside.close()
    assert cuda.invalidated == ["cublasDestroy"]


def test_a_handle_of_all_threads_would_be_seen(cuda, monkeypatch):
    first = cuda.blas.create()
    monkeypatch.setattr(fake_cuda.Device, "cublas_handle", first, raising=False)
    beside = Beside(cuda)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            on_gpu()
        finally:
            beside.close()
    assert "a cuBLAS handle is used by two threads" in faults_of(cuda)


def test_an_array_of_another_device_would_be_seen(cuda):
    cupy = import_module("cupy")
    with cupy.cuda.Device(1):
        there = cupy.ones(3)
    with pytest.raises(ValueError, match="array device = 1 while current = 0"):
        there + 1.0


def test_work_that_no_stream_orders_comes_too_late(cuda):
    """A product on one stream, read on another that does not wait for it."""
    cupy, runtime_ = import_module("cupy"), Cuda()
    a, out = cupy.ones((2, 2)), cupy.zeros((2, 2))
    with cupy.cuda.Stream(non_blocking=True) as stream:
        runtime_.multiply(a, a, out)
    assert not out.get().any()
    stream.synchronize()
    np.testing.assert_array_equal(out.get(), np.full((2, 2), 2.0))


# ---------------------------------------------------------------- the emulation


def test_the_emulation_has_no_names_that_cupy_lacks():
    cupy = pytest.importorskip("cupy")
    for module in ("cupy", "cupy.linalg", "cupy.fft"):
        real = import_module(module)
        lacking = [name for name in vars(fake_cuda._MODULES[module])
                   if not name.startswith("_") and not hasattr(real, name)]  # fmt: skip
        assert not lacking
    for name in ("Device", "Stream", "Graph", "MemoryPointer", "set_allocator", "alloc",
                 "get_current_stream", "runtime", "memory", "compiler", "device"):  # fmt: skip
        assert hasattr(cupy.cuda, name)
    for name in vars(fake_cuda._MODULES["cupy"].cuda.runtime):
        assert hasattr(cupy.cuda.runtime, name)
    for name in vars(fake_cuda.ndarray):
        assert name.startswith("_") or hasattr(cupy.ndarray, name)


NOT_RUN: dict[str, str] = {}
"""Lines of the CUDA path that cannot run on the emulation, and why."""


def lines_of(code):
    """Numbers of a function's lines that can run, those of its inner functions too."""
    found = {line for *_, line in code.co_lines() if line} - {code.co_firstlineno}
    for constant in code.co_consts:
        if inspect.iscode(constant):
            found |= lines_of(constant)
    return found


def functions_in(thing):
    """The code of a function, or of all methods of a class."""
    if inspect.isfunction(thing):
        return [thing.__code__]
    methods = [getattr(m, "__func__", m) for m in vars(thing).values()]
    return [inspect.unwrap(m).__code__ for m in methods if callable(m)]


def all_of_it(cuda, monkeypatch):
    """Whatever the CUDA path can do."""
    backend = emulated_gpu()
    on_gpu(dropout=0.1)
    backend.synchronize()
    stack = import_module("cupy").ones((2, 3, 3))
    Cuda().multiply(stack, stack, stack.copy())
    for device in ("cpu", "gpu"):
        with suppress(BackendError):
            CuPyBackend.create(device)
    cuda.hooks["launch"] = lambda name: cuda.current.capture is not None and cuda.failing()
    cuda.failing = lambda: (_ for _ in ()).throw(RuntimeError("planted"))
    with warnings.catch_warnings(), monkeypatch.context() as patch:
        warnings.simplefilter("ignore")
        on_gpu()
        cuda.hooks.clear()
        patch.setattr(import_module("cupy").cuda.cublas, "__file__", "/nowhere/cublas.so")
        on_gpu()


def test_every_line_of_the_cuda_path_runs(cuda, monkeypatch, record_property):
    measured = coverage.Coverage(data_file=None, include=[runtime.__file__, backends.__file__])
    measured.start()
    try:
        all_of_it(cuda, monkeypatch)
    finally:
        measured.stop()
    for thing in (Cuda, layout, runtime._load_cublas, CuPyBackend):
        codes = functions_in(thing)
        path = codes[0].co_filename
        wanted = set().union(*map(lines_of, codes))
        missing = wanted - set(measured.get_data().lines(path))
        text = Path(path).read_text().splitlines()
        unexplained = [f"{n}: {line}" for n in sorted(missing)
                       if (line := text[n - 1].strip()) not in NOT_RUN]  # fmt: skip
        record_property(
            "coverage of the CUDA path, on the emulated machine",
            f"{thing.__name__:12s} {len(wanted) - len(missing)} of {len(wanted)} lines",
        )
        assert not unexplained


def test_a_line_that_does_not_run_would_be_seen(cuda, monkeypatch):
    """The planted twin: without captures that fail, there are such lines."""
    measured = coverage.Coverage(data_file=None, include=[runtime.__file__])
    measured.start()
    on_gpu()
    measured.stop()
    wanted = set().union(*map(lines_of, functions_in(Cuda)))
    assert wanted - set(measured.get_data().lines(runtime.__file__))

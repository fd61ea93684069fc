"""The stages of `gpu_check`: what each of them looks at on a GPU.

A stage is a function of a `Stage`, which it tells what it found.  It ends before its limit.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from itertools import combinations, product
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


@dataclass
class Result:
    """What a stage found.

    Attributes
    ----------
    verdict : {"pass", "FAIL", "not run"}
    paragraphs : list of str
        Markdown.
    """

    verdict: str
    paragraphs: list[str]


@dataclass
class Stage:
    """What a running stage is given, and tells what it finds.

    Attributes
    ----------
    emulated : bool
        Whether the GPU is one that is made of the host.
    end : float
        When it has to be done, by `time.monotonic`.
    """

    emulated: bool
    end: float
    file: Path
    result: Result = field(default_factory=lambda: Result("pass", []))

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    def say(self, *paragraphs: str) -> None:
        self.result.paragraphs += paragraphs
        self._write()

    def table(self, header: Sequence[Any], rows: Sequence[Sequence[Any]]) -> None:
        lines = [header, ["---"] * len(header), *rows]
        self.say("\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines))

    def check(self, what: str, holds: bool, found: str = "") -> None:
        """Note whether something is as it has to be."""
        if not holds:
            self.result.verdict = "FAIL"
        self.say(f"- {'ok' if holds else '**FAIL**'}: {what}{f' ({found})' if found else ''}")

    def skip(self, what: str, why: str) -> None:
        self.say(f"- not run: {what} ({why})")

    def _write(self) -> None:
        self.file.write_text(json.dumps(vars(self.result)), "utf-8")


@dataclass(frozen=True)
class Kind:
    """A stage: its title, its seconds, those on an emulated GPU (0: none), and what it needs."""

    title: str
    run: Callable[[Stage], None]
    limit: float
    emulated_limit: float = 0
    needs: str = "it measures a GPU"


def run_stage(number: int, emulated: bool, file: Path) -> None:
    """Run a stage, and leave what it found in a file."""
    kind = STAGES[number]
    seconds = kind.emulated_limit if emulated else kind.limit
    stage = Stage(emulated, time.monotonic() + seconds, file)
    stage._write()
    try:
        with machine(emulated):
            kind.run(stage)
    except Exception:
        stage.check("it ran to its end", False)
        stage.say(f"```\n{traceback.format_exc()}```")
    stage._write()


@contextmanager
def machine(emulated: bool) -> Iterator[None]:
    """Provide a GPU, and record steps from the first on, however few there are."""
    from portable_mlp.engines.base import RecordedEngine

    RecordedEngine.EAGER = 0
    if not emulated:
        yield
        return
    sys.path.insert(0, str(HERE.parent / "tests"))
    import fake_cuda

    with fake_cuda.install(fake_cuda.Driver()):
        yield


def run_program(command: Sequence[str], seconds: float, **how: Any) -> Any:
    """Run a program and all that it starts, for so many seconds at most.

    Raises
    ------
    subprocess.TimeoutExpired
        If it takes longer; nothing of it is left then.
    """
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, **how,
    ) as process:  # fmt: skip
        try:
            out, error = process.communicate(timeout=max(seconds, 0.1))
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, error)


def output_of(*command: str, seconds: float = 10) -> str:
    """Return what a program prints; why it does not."""
    if not shutil.which(command[0]):
        return f"no {command[0]}"
    done = run_program(command, seconds)
    return str(done.stdout + done.stderr).strip()


def clocks() -> str:
    query = "--query-gpu=name,driver_version,clocks.sm,clocks.mem,temperature.gpu,power.draw"
    return output_of("nvidia-smi", query, "--format=csv,noheader")


# ---------------------------------------------------------------- 0. environment


def environment(stage: Stage) -> None:
    """Versions, and which cuBLAS is loaded."""
    import cupy

    from portable_mlp.engines.cuda.runtime import Cuda

    handle = cupy.cuda.Device().cublas_handle
    a = cupy.ones((2, 2))
    stage.check("CuPy multiplies", float((a @ a)[0, 0]) == 2.0)
    stage.check("cuBLAS can be called directly", not Cuda().refuses, Cuda().refuses)
    rows = [
        ["card, driver, clocks (MHz), temperature, power", clocks()],
        ["Python", platform.python_version()],
        ["CUDA runtime, driver", f"{cupy.cuda.runtime.runtimeGetVersion()},"
         f" {cupy.cuda.runtime.driverGetVersion()}"],
        ["cuBLAS", cupy.cuda.cublas.getVersion(handle)],
        ["NVRTC", ".".join(map(str, cupy.cuda.nvrtc.getVersion()))],
        ["devices", cupy.cuda.runtime.getDeviceCount()],
        ["CUPY_TF32", os.environ.get("CUPY_TF32", "not set")],
    ]  # fmt: skip
    for name in ("portable_mlp", "numpy", "array-api-compat", "scikit-learn", "cupy-cuda12x",
                 "cupy-cuda13x", "torch", "jax"):  # fmt: skip
        try:
            rows.append([name, version(name)])
        except PackageNotFoundError:
            rows.append([name, "not installed"])
    stage.table(["what", "which"], rows)
    maps = Path("/proc/self/maps").read_text()
    loaded = sorted(set(re.findall(r"/\S*libcublas\.so\S*", maps)))
    majors = {re.search(r"libcublas\.so\.(\d+)", path)[1] for path in loaded}  # type: ignore[index]
    stage.check("one major version of cuBLAS is loaded", len(majors) == 1, ", ".join(loaded))


# ---------------------------------------------------------------- 1. the seam


def seam(stage: Stage) -> None:
    """Arrays at addresses, products and captures, by the engine's own runtime."""
    import cupy
    import numpy as np

    from portable_mlp.engines.cuda.launches import Place, View
    from portable_mlp.engines.cuda.runtime import CaptureError, Cuda

    cuda, rng = Cuda(), np.random.RandomState(0)
    memory = cupy.arange(64, dtype=np.uint8)
    odd = cuda.array(memory, View(Place(0, 4), (3, 2), (1, 3), np.dtype(np.float32)))
    wanted = np.arange(64, dtype=np.uint8)[4:28].view(np.float32).reshape(2, 3).T
    stage.check("an array within another's memory", bool((odd.get() == wanted).all()))

    for dtype, captured in product(("float32", "float64"), (False, True)):
        tolerance = 1e-5 if dtype == "float32" else 1e-12
        worst, n_products = 0.0, 0
        sizes = list(product((1, 2, 3, 17, 300), repeat=3))
        for turned, shape in product(product((False, True), repeat=2), sizes):
            (n, k, m), operands = shape, []
            for turn, (rows, columns) in zip(turned, ((n, k), (k, m)), strict=True):
                host = rng.standard_normal((columns, rows) if turn else (rows, columns))
                there = cupy.asarray(host.astype(dtype))
                operands.append(there.T if turn else there)
            out = cupy.full((n, m), np.nan, dtype)

            def work(left: Any = operands[0], right: Any = operands[1], out: Any = out) -> None:
                cuda.multiply(left, right, out)

            work()
            if captured:
                out.fill(np.nan)
                graph = cuda.capture(work)
                graph.launch()
            right_one = operands[0].get().astype(float) @ operands[1].get().astype(float)
            error = np.abs(out.get() - right_one).max() / np.sqrt(k)
            worst = max(worst, float(error)) if error == error else float("nan")
            n_products += 1
        stage.check(
            f"{n_products} products in {dtype}, {'captured' if captured else 'direct'}",
            worst <= tolerance, f"largest error {worst:.1e}, allowed {tolerance:.0e}",
        )  # fmt: skip

    a, out = cupy.ones((2, 2)), cupy.zeros((2, 2))
    try:
        cuda.capture(lambda: float(a[0, 0]))  # type: ignore[arg-type, return-value]
        stage.check("a capture that looks at a value fails", False)
    except CaptureError as reason:
        stage.check("a capture that looks at a value fails", True, str(reason))
    graph = cuda.capture(lambda: cuda.multiply(a, a, out))
    graph.launch()
    stage.check("and the next one works", bool((out.get() == 2.0).all()))
    with cupy.cuda.Stream(non_blocking=True) as stream:
        out.fill(0.0)
        graph.launch()
        stream.synchronize()
    stage.check("on a non-blocking stream", bool((out.get() == 2.0).all()))
    if stage.emulated:
        stage.skip("on the per-thread default stream", "not emulated")
        return
    with cupy.cuda.Stream.ptds:
        out.fill(0.0)
        graph.launch()
        cupy.cuda.Stream.ptds.synchronize()
    stage.check("on the per-thread default stream", bool((out.get() == 2.0).all()))


# ---------------------------------------------------------------- fits to compare


def rows(n: int = 190, d: int = 12, k: int = 3) -> tuple[Any, Any]:
    """Rows of a classification that can be learned."""
    import numpy as np

    rng = np.random.RandomState(0)
    X = rng.standard_normal((n, d))
    return X, np.argmax(X[:, :k] + 0.3 * rng.standard_normal((n, k)), axis=1)


def fitted(device: str, **params: Any) -> Any:
    """Fit an estimator, with fallbacks as errors; return its parameters on the host."""
    from sklearn.exceptions import ConvergenceWarning

    from portable_mlp import MLPClassifier

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.simplefilter("error", RuntimeWarning)
        settings = {"max_iter": 20, "random_state": 0, "batch_size": 40, "tol": 0.0}
        model = MLPClassifier((32, 16), device=device, **{**settings, **params})
        model.fit(*rows())
    return model.coefs_ + model.intercepts_


def gap(got: Sequence[Any], wanted: Sequence[Any]) -> float:
    """Return the largest difference relative to the largest parameter; NaN if one is NaN."""
    import numpy as np

    found = [np.max(np.abs(a - b)) / np.max(np.abs(b)) for a, b in zip(got, wanted, strict=True)]
    return float(np.max(found))


def same(some: Sequence[Any], others: Sequence[Any]) -> bool:
    """Whether arrays are equal to the bit."""
    return all(a.tobytes() == b.tobytes() for a, b in zip(some, others, strict=True))


# ---------------------------------------------------------------- 2. lifetimes


def lifetimes(stage: Stage) -> None:
    """Whether everything that a graph points to lives as long as the graph."""
    import cupy
    import numpy as np

    from portable_mlp import Callback

    pool = cupy.get_default_memory_pool()
    n_bytes = (16 << 20) if stage.emulated else (2 << 30)

    class Disturbs(Callback):
        """Takes all memory that is free, between two epochs, and fills it."""

        def on_epoch_end(self, epoch: Any, params: Any) -> None:
            gc.collect()
            pool.free_all_blocks()
            junk = [cupy.full(n, 255, np.uint8) for n in (512, 4096, 1 << 16, 1 << 20, n_bytes)]
            del junk

    wanted = fitted("cpu")
    kept = gap(fitted("gpu", callbacks=[Disturbs()]), wanted)
    stage.check(
        f"with {n_bytes >> 20} MB of other memory between epochs", kept < 1e-9, f"{kept:.1e}"
    )

    cupy.cuda.set_allocator(None)
    try:
        without = gap(fitted("gpu"), wanted)
    finally:
        cupy.cuda.set_allocator(pool.malloc)
    stage.check("without CuPy's memory pool", without < 1e-9, f"{without:.1e}")

    if stage.emulated:
        stage.say("- (freed memory is poisoned in all emulated stages)")
    else:
        cupy.cuda.set_allocator(poisoning(cupy, pool))
        try:
            poisoned = gap(fitted("gpu"), wanted)
        finally:
            cupy.cuda.set_allocator(pool.malloc)
        stage.check("with freed memory poisoned", poisoned < 1e-9, f"{poisoned:.1e}")

    class Nested(Callback):
        """Fits another model between two epochs."""

        def on_epoch_end(self, epoch: Any, params: Any) -> None:
            inner.append(gap(fitted("gpu", activation="tanh", max_iter=3), wanted_inner))

    inner: list[float] = []
    wanted_inner = fitted("cpu", activation="tanh", max_iter=3)
    outer = gap(fitted("gpu", max_iter=5, callbacks=[Nested()]), fitted("cpu", max_iter=5))
    found = max([outer, *inner])
    stage.check(f"a fit with {len(inner)} others between its epochs", found < 1e-9, f"{found:.1e}")

    gaps: list[float] = []

    def again() -> None:
        for _ in range(3):
            try:
                gaps.append(gap(fitted("gpu"), wanted))
            except RuntimeWarning as fallback:  # right, but it is not what was asked for
                stage.say(f"- note: a thread fell back: {fallback}")
            except Exception as error:
                gaps.append(float("nan"))
                stage.say(f"- a thread failed: {error}")

    threads = [threading.Thread(target=again) for _ in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    worst = max(gaps, default=float("nan"), key=lambda g: (g != g, g))
    stage.check("two threads, each fitting while the other captures", worst < 1e-9, f"{worst:.1e}")


def poisoning(cupy: Any, pool: Any) -> Callable[[int], Any]:
    """Return an allocator whose memory is overwritten when it is freed."""

    class Poisoned(cupy.cuda.memory.BaseMemory):  # type: ignore[misc]
        def __init__(self, size: int) -> None:
            self.inner = pool.malloc(size)
            self.ptr, self.size = self.inner.ptr, size
            self.device_id = self.inner.device_id

        def __del__(self) -> None:
            stream = cupy.cuda.get_current_stream().ptr
            cupy.cuda.runtime.memsetAsync(self.ptr, 0xFF, self.size, stream)

    return lambda size: cupy.cuda.MemoryPointer(Poisoned(max(size, 1)), 0)


# ---------------------------------------------------------------- 3. verdict


@contextmanager
def watched(**how: Any) -> Iterator[list[Any]]:
    """Collect the engine's runtimes, with what they compile and capture."""
    from portable_mlp.engines.cuda import capture

    made: list[Any] = []

    class Watched(capture.Cuda):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.sources: list[str] = []
            self.nodes: list[int] = []
            self.graphs: list[Timed] = []
            self.n_launched = 0
            made.append(self)

        def compile(self, source: str) -> Any:
            self.sources.append(source)
            launch = super().compile(source)

            def counted(*args: Any) -> None:
                self.n_launched += 1
                launch(*args)

            return counted

        def multiply(self, *args: Any) -> None:
            self.n_launched += 1
            super().multiply(*args)

        def capture(self, work: Any) -> Any:
            if how.get("kernels"):
                raise capture.CaptureError("asked for")
            before = self.n_launched
            self.graphs.append(Timed(super().capture(work)))
            self.nodes.append(self.n_launched - before)
            return self.graphs[-1]

    original = capture.Cuda
    capture.Cuda = Watched  # type: ignore[misc]
    try:
        yield made
    finally:
        capture.Cuda = original  # type: ignore[misc]


class Timed:
    """A graph that adds up the host's time of its launches."""

    def __init__(self, graph: Any) -> None:
        self.graph, self.seconds, self.launches = graph, 0.0, 0

    def launch(self) -> None:
        began = time.perf_counter()
        self.graph.launch()
        self.seconds += time.perf_counter() - began
        self.launches += 1


def workloads(stage: Stage) -> dict[int, Any]:
    from contestants import ON_A_GPU

    # The emulated kernels are compiled without optimization
    chosen = (1, 2) if stage.emulated else ON_A_GPU
    return {number: ON_A_GPU[number] for number in chosen}


def verdict(stage: Stage) -> None:
    """Check what runs each workload: graph, kernels or the step itself."""
    import cupy
    from contestants import PortableMLP

    lines, kernels = [], []
    for number, workload in workloads(stage).items():
        with watched() as made, warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", RuntimeWarning)
            contestant = PortableMLP(workload, "float32", "cupy", "gpu")
            contestant.reset()
            began = time.perf_counter()
            contestant.train(1)
            seconds = time.perf_counter() - began
        fallbacks = [str(w.message) for w in said if issubclass(w.category, RuntimeWarning)]
        ran = "; ".join(fallbacks) or "a graph"
        (cuda,) = made
        nodes = " and ".join(map(str, cuda.nodes))
        lines.append([number, workload, ran, nodes, f"{seconds:.2f}"])
        stage.check(f"workload {number} runs as a graph", not fallbacks)
        for source in cuda.sources:
            module = cupy.RawModule(code=source)
            for name in re.findall(r"__global__.*? void (\w+)\(", source):
                if not stage.emulated:
                    kernel = module.get_function(name)
                    kernels.append([number, name, kernel.num_regs, kernel.local_size_bytes,
                                    kernel.shared_size_bytes])  # fmt: skip
    stage.table(["workload", "network", "ran as", "nodes", "first epoch, s"], lines)
    if stage.emulated:
        stage.skip("registers and memory of the kernels", "not emulated")
        return
    stage.table(["workload", "kernel", "registers", "local bytes", "shared bytes"], kernels)
    local = [f"{number}:{name}" for number, name, _, n_bytes, _ in kernels if n_bytes]
    stage.say(f"With local memory, spilled or a stack: {', '.join(local) or 'none'}.")


# ---------------------------------------------------------------- 4. parity


def targets_of(loss: Any, X: Any, labels: Any) -> Any:
    """Targets that a loss takes."""
    import numpy as np

    hot = np.eye(3)[labels]
    return {"softmax": labels.astype(np.int32), "logistic": hot}.get(loss.link_name, 0.5 + hot)


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {}, "alpha": {"alpha": 0.1}, "dropout": {}, "clip_norm": {"clip_norm": 0.1},
    "weights": {}, "ragged": {}, "members": {"clip_norm": 0.1}, "halves": {"reduce": len},
}  # fmt: skip


def trained(case: dict[str, Any], how: str, epochs: int = 40) -> list[Any]:
    """Parameters after 200 steps of a case, on NumPy or one of the three ways on the GPU."""
    import numpy as np

    from portable_mlp import get_backend, mlp
    from portable_mlp.groups import Treatment
    from portable_mlp.losses import LOSSES
    from portable_mlp.sources import ArraySource
    from portable_mlp.steps import Batch
    from portable_mlp.training import Trainer

    setting, dtype, loss = case["setting"], case["dtype"], LOSSES[case["loss"]]
    X, labels = rows(190 if setting == "ragged" else 200)
    y = targets_of(loss, X, labels)
    weights = np.random.RandomState(1).uniform(0.1, 2.0, len(X)) if setting == "weights" else None
    backend = get_backend("cpu" if how == "NumPy" else "gpu")
    if how == "eager":
        backend.engine = "eager"
    members, drop, rate = None, 0.1 if setting == "dropout" else 0.0, 1.0
    if setting == "members":  # stacks of matrices, and numbers of each member
        members, drop, rate = 3, (0.0, 0.1, 0.3), (0.5, 1.0, 2.0)
    network = mlp((12, 16, 8, 3), case["activation"], dropout=drop, members=members)
    trainer = Trainer(
        network, loss, case["rule"], backend, dtype, 1e-3, batch_size=40, tol=0.0,
        patience=np.inf, treatments={"weight": Treatment(rate)}, **SETTINGS[setting],
    )  # fmt: skip
    rng = np.random.RandomState(0)
    state = trainer.start(network.init(rng))
    with backend.scope(dtype):
        integers = y.dtype.kind == "i"
        source = ArraySource(Batch(
            backend.asarray(X, dtype), backend.asarray(y, "int32" if integers else dtype),
            None if weights is None else backend.asarray(weights, dtype),
        ))  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        if how == "kernels":
            warnings.filterwarnings("ignore", "the step is launched kernel by kernel")
        with watched(kernels=True) if how == "kernels" else nullcontext():
            trainer.fit(state, source, epochs, rng)
    return [backend.to_host(p) for p in trainer.params(state.arrays.leaves)]


def cases() -> Iterator[dict[str, Any]]:
    """Cases without end, each chosen for the pairs of values that have not been there yet."""
    from portable_mlp.activations import ACTIVATIONS
    from portable_mlp.losses import LOSSES
    from portable_mlp.optimizers import SGD, Adam, AdamW, RMSprop, SklearnAdam, SklearnSGD

    factors: dict[str, Sequence[Any]] = {
        "loss": list(LOSSES),
        "rule": [SGD(), SGD(momentum=0.9, nesterov=True), SklearnSGD(), Adam(), SklearnAdam(),
                 AdamW(decay_biases=False), RMSprop()],
        "activation": list(ACTIVATIONS),
        "dtype": ["float64", "float32"],
        "setting": list(SETTINGS),
    }  # fmt: skip
    kinks = ("relu", "leaky_relu", "elu", "selu")
    chance, seen = random.Random(0), set()
    while True:
        drawn = [{name: chance.choice(values) for name, values in factors.items()}
                 for _ in range(200)]  # fmt: skip
        # In float32, rounding that crosses a kink parts two trajectories
        drawn = [c for c in drawn if c["dtype"] == "float64" or (
            c["activation"] not in kinks and c["loss"] not in ("huber", "quantile"))]  # fmt: skip

        def pairs(case: dict[str, Any]) -> set[Any]:
            return set(combinations(((k, repr(v)) for k, v in case.items()), 2))

        best = max(drawn, key=lambda c: len(pairs(c) - seen))
        seen |= pairs(best)
        yield best


def parity(stage: Stage) -> None:
    """Fits against scikit-learn; the step itself, its kernels and its graph against NumPy."""
    against_scikit_learn(stage)
    lines: list[Any] = []
    worst = dict.fromkeys(("float64", "float32"), 0.0)
    n_cases, failed, same_bits, again_bits = 0, False, True, True
    for case in cases():
        if stage.left < 10:  # for the last case
            break
        n_cases += 1
        wanted = trained(case, "NumPy")
        found = {how: trained(case, how) for how in ("eager", "kernels", "graph")}
        again = trained(case, "graph")
        gaps = {how: gap(got, wanted) for how, got in found.items()}
        allowed = 1e-9 if case["dtype"] == "float64" else 1e-4
        agrees = all(g <= allowed for g in gaps.values())
        failed |= not agrees
        worst[case["dtype"]] = max(worst[case["dtype"]], *gaps.values())
        same_bits &= same(found["kernels"], found["graph"])
        again_bits &= same(again, found["graph"])
        if not agrees or n_cases <= 6:
            case["rule"] = type(case["rule"]).__name__
            lines.append([*case.values(), *(f"{g:.1e}" for g in gaps.values()), f"{allowed:.0e}"])
    stage.say(
        "max|Δ| / max|parameter| against NumPy: the first six cases, and those that failed; the"
        f" largest of {n_cases} cases in float64 {worst['float64']:.1e}, in float32"
        f" {worst['float32']:.1e}."
    )
    names = "loss", "rule", "activation", "dtype", "setting"
    stage.table([*names, "eager", "kernels", "graph", "allowed"], lines)
    stage.check(f"{n_cases} cases agree with NumPy after 200 steps", not failed and n_cases > 5)
    stage.check("a graph computes the bits of its kernels", same_bits)
    stage.check("and the same bits again", again_bits)


def against_scikit_learn(stage: Stage) -> None:
    """Whole fits: the model that scikit-learn has from the same seed."""
    import numpy as np
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier, MLPRegressor

    import portable_mlp

    X, labels = rows()
    tasks = {
        "classes": ("MLPClassifier", labels), "two classes": ("MLPClassifier", labels > 0),
        "several labels": ("MLPClassifier", np.eye(3, dtype=int)[labels]),
        "regression": ("MLPRegressor", X[:, 0] * X[:, 1]),
    }  # fmt: skip
    solvers: dict[str, dict[str, Any]] = {
        "Adam": {}, "Adam, early stopping": {"early_stopping": True},
        "SGD": {"solver": "sgd", "learning_rate": "invscaling"},
        "L-BFGS": {"solver": "lbfgs", "alpha": 1.0},
    }  # fmt: skip
    peers = {"MLPClassifier": MLPClassifier, "MLPRegressor": MLPRegressor}
    worst = 0.0
    for (kind, y), params in product(tasks.values(), solvers.values()):
        settings = {"hidden_layer_sizes": (16, 8), "activation": "tanh", "max_iter": 15,
                    "random_state": 0, **params}  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            peer = peers[kind](**settings).fit(X, y)
            model = getattr(portable_mlp, kind)(**settings, device="gpu").fit(X, y)
        found = gap(model.coefs_ + model.intercepts_, peer.coefs_ + peer.intercepts_)
        worst = max(worst, found / (100.0 if params.get("solver") == "lbfgs" else 1.0))
    n = len(tasks) * len(solvers)
    stage.check(
        f"{n} fits are scikit-learn's", worst <= 1e-9,
        f"{worst:.1e}, allowed 1e-09, of L-BFGS a hundred times that",
    )  # fmt: skip


# ---------------------------------------------------------------- 5. gradients


def gradients(stage: Stage) -> None:
    """Compare derivatives on the GPU with finite differences, NumPy and JAX."""
    import numpy as np

    from portable_mlp import check_layer, check_loss, get_backend
    from portable_mlp.activations import ACTIVATIONS
    from portable_mlp.layers import Layer, Linear
    from portable_mlp.losses import LOSSES

    backend = get_backend("gpu")

    def there(tree: Any) -> Any:
        return [backend.asarray(np.array(a)) for a in tree]

    @dataclass(frozen=True)
    class OnDevice(Layer):
        """A layer that takes and gives the host's arrays, and computes on the GPU."""

        inner: Any

        @property
        def params(self) -> Any:
            return self.inner.params

        def forward(self, p: Any, x: Any, xp: Any) -> Any:
            y, residual = self.inner.forward(there(p), there([x])[0], backend.xp)
            return backend.to_host(y), residual

        def backward(self, p: Any, residual: Any, dy: Any, xp: Any) -> Any:
            return backend.to_host(
                self.inner.backward(there(p), residual, there([dy])[0], backend.xp)
            )

        def gradients(self, p: Any, residual: Any, dy: Any, xp: Any) -> Any:
            found = self.inner.gradients(there(p), residual, there([dy])[0], backend.xp)
            return [backend.to_host(a) for a in found]

    rng = np.random.RandomState(0)
    x = rng.uniform(0.1, 2.0, (6, 5)) * rng.choice([-1.0, 1.0], (6, 5))
    layers = {"linear": Linear(5, 4), **ACTIVATIONS}
    with backend.scope("float64"):
        errors = {name: check_layer(OnDevice(layer), x) for name, layer in layers.items()}
        z, labels = rng.standard_normal((6, 3)), rng.randint(3, size=6)
        for name, loss in LOSSES.items():
            y = targets_of(loss, z, labels)

            def function(z: Any, y: Any, xp: Any, loss: Any = loss) -> Any:
                values, dz = loss.per_row(*there([z, y]), backend.xp)
                return backend.to_host(values), backend.to_host(dz)

            errors[name] = check_loss(function, z, y)
    worst = max(errors, key=lambda name: errors[name])
    stage.check(
        f"{len(errors)} layers and losses against finite differences", errors[worst] <= 1e-6,
        f"{worst}: {errors[worst]:.1e}",
    )  # fmt: skip
    one_step(stage)


def one_step(stage: Stage) -> None:
    """Return a replayed step of plain descent at rate 1: what it takes away is the gradient."""
    import numpy as np

    from portable_mlp import get_backend, mlp
    from portable_mlp.engines import ENGINES, Task
    from portable_mlp.losses import SoftmaxCrossEntropy
    from portable_mlp.optimizers import SGD
    from portable_mlp.schedules import Clock
    from portable_mlp.steps import NO_NUMBERS, Batch, objective
    from portable_mlp.training import Trainer

    X, y = rows(50)
    network = mlp((12, 8, 3), "tanh")
    trainers = {
        name: Trainer(network, SoftmaxCrossEntropy(), SGD(), get_backend(name), "float64", 1.0)
        for name in ("gpu", "cpu")
    }
    trainer = trainers["gpu"]
    backend = trainer.backend
    arrays = trainer.start(network.init(np.random.RandomState(0))).arrays
    engine = ENGINES[backend.engine](backend, trainer.recipe)
    with backend.scope("float64"):
        batch = Batch(backend.asarray(X), backend.asarray(y.astype(np.int32)))
        points = []
        for _ in range(3):
            points.append([backend.to_host(p) for p in trainer.params(arrays.leaves)])
            hypers = [trainer.hyper(Clock(0, 3, 0, 0), None)[0]]
            arrays, _ = engine.run(arrays, Task(batch, None, 50, hypers, lambda: False))
    taken = [a - b for a, b in zip(points[1], points[2], strict=True)]
    plain = trainers["cpu"]
    leaves = plain.recipe.layout.pack(points[1], np)
    *_, grads = objective(plain.recipe, leaves, Batch(X, y.astype(np.int32)), (), NO_NUMBERS)
    found = gap(taken, plain.params(grads))
    stage.check("the gradient of a replayed step is NumPy's", found <= 1e-12, f"{found:.1e}")
    try:
        import jax
    except ImportError:
        stage.skip("the gradient against jax.grad", "JAX is not installed")
        return

    def mean_loss(params: Any) -> Any:
        w1, b1, w2, b2 = params
        z = jax.numpy.tanh(X @ w1 + b1) @ w2 + b2
        return -jax.nn.log_softmax(z)[np.arange(len(y)), y].mean()

    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        wanted = [
            np.asarray(g) for g in jax.grad(mean_loss)([jax.numpy.asarray(p) for p in points[1]])
        ]
    found = gap(taken, wanted)
    stage.check("the gradient of a replayed step is jax.grad's", found <= 1e-12, f"{found:.1e}")


# ---------------------------------------------------------------- 6 to 9, on a GPU alone

_TINY = "import gpu_stages; gpu_stages.tiny_fit()"


def tiny_fit() -> None:
    """Fit shortly without CuPy's pool, so that the sanitizer sees each array's memory."""
    import cupy

    from portable_mlp.engines.base import RecordedEngine

    RecordedEngine.EAGER = 0
    cupy.cuda.set_allocator(None)
    fitted("gpu", max_iter=2)


def sanitizer(stage: Stage) -> None:
    """NVIDIA's checks of memory, races, barriers and uninitialised reads."""
    if not shutil.which("compute-sanitizer"):
        stage.result.verdict = "not run"
        stage.skip("compute-sanitizer", "it is not installed")
        return
    tiny = [sys.executable, "-c", _TINY]
    run_program(tiny, 30, cwd=HERE)  # compiles, and keeps the kernels
    for tool in ("memcheck", "racecheck", "synccheck", "initcheck"):
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
        # What CuPy and cuBLAS try, and expect to fail, is no error
        command += ["--report-api-errors", "no"] if tool == "memcheck" else []
        try:
            done = run_program([*command, *tiny], stage.left, cwd=HERE)
        except subprocess.TimeoutExpired:
            stage.check(tool, False, "it did not end in time")
            continue
        said = (done.stdout + done.stderr).strip()
        # Races and reads within cuBLAS's kernels are not ours to judge
        ours = tool == "memcheck" or re.search(r"\b(k\d+|gather)\b", said) is not None
        stage.check(tool, not done.returncode or not ours, said.splitlines()[-1] if said else "")
        if done.returncode:
            stage.say(f"```\n{said[-3000:]}\n```")


def suite(stage: Stage) -> None:
    """Run the tests of everything that computes on a GPU."""
    from portable_mlp import BackendError, get_backend

    chosen = ["cupy"]
    for name in ("torch", "jax"):
        try:
            get_backend("gpu", name)
            chosen.append(f"{name}-cuda")
        except BackendError as reason:
            stage.skip(f"tests of {name} on the GPU", str(reason))
    command = [
        sys.executable, "-m", "pytest", "-n", "4", "-q", "--require-gpu", "-p", "no:cacheprovider",
        "-k", f"({' or '.join(chosen)}) and not emulated", "tests",
    ]  # fmt: skip
    try:
        done = run_program(command, stage.left, cwd=HERE.parent)
    except subprocess.TimeoutExpired:
        stage.check("the suite ends in time", False)
        return
    stage.check("the suite on the GPU", done.returncode == 0)
    stage.say(f"```\n{done.stdout[-6000:]}\n```")


def timing(stage: Stage) -> None:
    """Run the benchmark, and measure what a launch costs host and GPU."""
    import cupy
    from contestants import PortableMLP

    stage.say(f"Before: {clocks()}")
    lines = []
    for number, workload in workloads(stage).items():
        with watched() as made:
            contestant = PortableMLP(workload, "float32", "cupy", "gpu")
            contestant.reset()
            contestant.train(workload.head)
            for graph in made[0].graphs:
                graph.seconds, graph.launches = 0.0, 0
            begin, end = cupy.cuda.Event(), cupy.cuda.Event()
            epochs = max(1, 500 // workload.steps)
            contestant.reset()
            began = time.perf_counter()
            begin.record()
            contestant.train(epochs)
            end.record()
            end.synchronize()
            wall = time.perf_counter() - began
        graphs = [graph for cuda in made for graph in cuda.graphs]
        launches = sum(graph.launches for graph in graphs) or 1
        steps = epochs * workload.steps
        lines.append([
            number, workload, f"{1e6 * wall / steps:.1f}",
            f"{1e3 * cupy.cuda.get_elapsed_time(begin, end) / steps:.1f}",
            f"{1e6 * sum(graph.seconds for graph in graphs) / launches:.1f}", launches,
        ])  # fmt: skip
    stage.table(["workload", "network", "µs a step", "µs of the GPU", "µs of a launch on the host",
                 "launches"], lines)  # fmt: skip
    benchmark(stage, "--device", "gpu", "--rounds", "3", "--seconds", "0.2")
    stage.say(f"After: {clocks()}")


def memory(stage: Stage) -> None:
    """Peak memory of training, beside torch and JAX."""
    benchmark(stage, "--device", "gpu", "--memory")


def benchmark(stage: Stage, *arguments: str) -> None:
    command = [sys.executable, str(HERE / "benchmark.py"), *arguments]
    try:
        done = run_program(command, stage.left)
    except subprocess.TimeoutExpired:
        stage.check("the benchmark ends in time", False)
        return
    stage.check(
        "the benchmark runs", done.returncode == 0, done.stderr[-500:] * (done.returncode != 0)
    )
    stage.say(done.stdout)


STAGES = {
    0: Kind("environment", environment, 10, needs="it tells what a GPU's machine is"),
    1: Kind("seam", seam, 25, 20),
    2: Kind("lifetimes", lifetimes, 40, 20),
    3: Kind("verdict", verdict, 20, 15),
    4: Kind("parity", parity, 70, 75),
    5: Kind("gradients", gradients, 20, 15),
    6: Kind("sanitizer", sanitizer, 90, needs="NVIDIA's sanitizer looks at a GPU"),
    7: Kind("suite", suite, 100, needs="the same tests run without a GPU, on the emulated one"),
    8: Kind("timing", timing, 90),
    9: Kind("memory", memory, 15),
}

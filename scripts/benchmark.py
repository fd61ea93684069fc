"""Measure a training step, of portable_mlp and of its peers, side by side.

    python scripts/benchmark.py
    python scripts/benchmark.py --workloads 1,4 --only "portable_mlp numpy,scikit-learn"

or a whole fit of the estimators, against scikit-learn's:

    python scripts/benchmark.py --fit

Prints Markdown.  Every contestant trains the same networks on the same rows in the
same order, without an L2 penalty, on the CPU unless its name says otherwise, with its
library's default number of threads.  Each lives in a process of its own, so that no
thread pool disturbs another, and only one computes at a time.  Rounds are interleaved:
what disturbs the machine for a while disturbs all alike.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from importlib import import_module
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from itertools import pairwise
from math import ceil, inf
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

# Array libraries are imported where they are used: each process loads only its own.


@dataclass(frozen=True)
class Workload:
    """What to train; ReLU between the layers, softmax cross-entropy at the end."""

    sizes: tuple[int, ...]
    batch: int
    rows: int
    solver: str
    rate: float

    def __str__(self) -> str:
        rule = {"sgd": "SGD", "adam": "Adam"}[self.solver]
        batch = "all rows at once" if self.batch == self.rows else f"batch {self.batch}"
        return f"{'-'.join(map(str, self.sizes))}, {batch}, {rule} {self.rate:g}, {self.rows} rows"

    @property
    def steps(self) -> int:
        """Number of steps in an epoch."""
        return ceil(self.rows / self.batch)

    def data(self, dtype: str) -> tuple[Any, Any]:
        return normal_rows(self.rows, self.sizes[0], self.sizes[-1], dtype)

    def slices(self) -> Iterator[slice]:
        """The rows of each batch, in order."""
        for start in range(0, self.rows, self.batch):
            yield slice(start, start + self.batch)


WORKLOADS = {
    1: Workload((4, 16, 2), 100, 100, "sgd", 0.005),
    2: Workload((20, 100, 2), 200, 10_000, "adam", 1e-3),
    3: Workload((64, 8, 32, 8, 4), 9342, 9342, "sgd", 0.005),
    4: Workload((784, 256, 128, 10), 128, 12_800, "adam", 1e-3),
    5: Workload((1024, 1024, 1024, 10), 512, 10_240, "adam", 1e-3),
}


@dataclass(frozen=True)
class Fit:
    """What to fit, by an estimator whose other parameters are the defaults."""

    name: str
    data: Callable[[str], tuple[Any, Any]]
    hidden: tuple[int, ...]
    epochs: int

    def __str__(self) -> str:
        return f"{self.name}, hidden layers {self.hidden}, {self.epochs} epochs"

    @property
    def steps(self) -> int:
        """One: times are those of a whole fit."""
        return 1


def two_classes(dtype: str) -> tuple[Any, Any]:
    """10 000 rows of 20 features."""
    from sklearn.datasets import make_classification

    X, y = make_classification(10_000, 20, random_state=0)
    return X.astype(dtype), y


def digits(dtype: str) -> tuple[Any, Any]:
    """1797 rows of 64 features, ten classes."""
    from sklearn.datasets import load_digits

    X, y = load_digits(return_X_y=True)
    return (X / 16.0).astype(dtype), y


def normal_rows(rows: int, features: int, classes: int, dtype: str) -> tuple[Any, Any]:
    """Standard normal inputs, and labels drawn uniformly."""
    import numpy as np

    rng = np.random.default_rng(0)
    X = rng.standard_normal((rows, features)).astype(dtype)
    return X, rng.integers(classes, size=rows, dtype=np.int32)


FITS = {
    1: Fit("10000 rows of 20 features, two classes", two_classes, (100,), 20),
    2: Fit("digits", digits, (100,), 50),
    3: Fit(
        "12800 normal rows of 784 features, ten classes",
        partial(normal_rows, 12_800, 784, 10),
        (256, 128),
        5,
    ),
}

# ---------------------------------------------------------------- contestants


class Contestant(ABC):
    """Something that trains a workload's network.

    Parameters
    ----------
    workload : Workload
    dtype : {"float32", "float64"}
    """

    curve: Sequence[float] = ()  # losses of a fit's epochs

    def __init__(self, workload: Any, dtype: str) -> None:
        self.workload = workload
        self.dtype = dtype
        self.X, self.y = workload.data(dtype)

    def reset(self) -> None:  # noqa: B027 (not all have a state)
        """Begin anew, untimed.

        Trained for ever, units die and their moments decay to subnormal numbers,
        which are slow: so every timed run starts from fresh parameters.
        """

    @abstractmethod
    def train(self, epochs: int) -> None:
        """Train; whatever was asked of a device is done when this returns."""


class PortableMLP(Contestant):
    """`Trainer.fit` as the estimators call it, with all checks."""

    def __init__(self, workload: Workload, dtype: str, backend: str) -> None:
        import numpy as np

        from portable_mlp import get_backend, mlp
        from portable_mlp.losses import SoftmaxCrossEntropy
        from portable_mlp.optimizers import SGD, SklearnAdam
        from portable_mlp.sources import ArraySource
        from portable_mlp.steps import Batch
        from portable_mlp.training import Trainer

        self.backend = get_backend("gpu" if backend == "cupy" else "cpu", backend)
        super().__init__(workload, dtype)
        self.rng = np.random.RandomState(0)
        network = mlp(workload.sizes)
        self.trainer = Trainer(
            network,
            SoftmaxCrossEntropy(),
            SGD() if workload.solver == "sgd" else SklearnAdam(),
            self.backend,
            dtype,
            workload.rate,
            batch_size=workload.batch,
            shuffle=False,
            tol=0.0,
            patience=inf,
        )
        self.params = network.init(self.rng)
        with self.backend.scope(dtype):
            data = Batch(self.backend.asarray(self.X, dtype), self.backend.asarray(self.y, "int32"))
        self.source = ArraySource(data)

    def reset(self) -> None:
        self.state = self.trainer.start(self.params)
        self.backend.synchronize()

    def train(self, epochs: int) -> None:
        self.trainer.fit(self.state, self.source, epochs, self.rng)
        self.backend.synchronize()


class ScikitLearn(Contestant):
    """`MLPClassifier.fit`, whole: it validates and draws parameters within the time.

    Two classes are one logistic output in scikit-learn, not two of a softmax.
    """

    def train(self, epochs: int) -> None:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.neural_network import MLPClassifier

        model = MLPClassifier(
            self.workload.sizes[1:-1],
            solver=self.workload.solver,
            learning_rate_init=self.workload.rate,
            momentum=0.0,
            alpha=0.0,
            batch_size=self.workload.batch,
            max_iter=epochs,
            tol=0.0,
            n_iter_no_change=inf,
            shuffle=False,
            random_state=0,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(self.X, self.y)


class TorchEager(Contestant):
    """The usual training loop, with autograd, not compiled."""

    def __init__(self, workload: Workload, dtype: str) -> None:
        import torch

        super().__init__(workload, dtype)
        self.torch = torch
        self.X, self.y = torch.from_numpy(self.X), torch.from_numpy(self.y).long()

    def reset(self) -> None:
        nn, optim = self.torch.nn, self.torch.optim
        layers: list[Any] = []
        for n_in, n_out in pairwise(self.workload.sizes):
            layers += [nn.Linear(n_in, n_out), nn.ReLU()]
        self.model = nn.Sequential(*layers[:-1]).to(getattr(self.torch, self.dtype))
        rule = optim.SGD if self.workload.solver == "sgd" else optim.Adam
        self.optimizer = rule(self.model.parameters(), lr=self.workload.rate)

    def train(self, epochs: int) -> None:
        cross_entropy = self.torch.nn.functional.cross_entropy
        for _ in range(epochs):
            total = self.torch.zeros(())
            for rows in self.workload.slices():
                self.optimizer.zero_grad()
                loss = cross_entropy(self.model(self.X[rows]), self.y[rows])
                loss.backward()
                self.optimizer.step()
                total += loss.detach()
            total.item()


class Thinc(Contestant):
    """Thinc's layers on `NumpyOps`, without clipping or averages.

    Only the gradient of the loss is computed, as in Thinc's own examples: its value is
    never needed.
    """

    def __init__(self, workload: Workload, dtype: str) -> None:
        from thinc.api import CategoricalCrossentropy, NumpyOps, set_current_ops

        if dtype != "float32":
            raise ValueError("Thinc's parameters are float32")
        super().__init__(workload, dtype)
        set_current_ops(NumpyOps())
        self.loss = CategoricalCrossentropy()

    def reset(self) -> None:
        from thinc.api import SGD, Adam, Relu, Softmax, chain

        *hidden, last = pairwise(self.workload.sizes)
        layers = [Relu(n_out, n_in) for n_in, n_out in hidden]
        self.model = chain(*layers, Softmax(last[1], last[0])).initialize()
        rule = SGD if self.workload.solver == "sgd" else Adam
        self.optimizer = rule(self.workload.rate, grad_clip=0.0, L2=0.0, use_averages=False)

    def train(self, epochs: int) -> None:
        for _ in range(epochs):
            for rows in self.workload.slices():
                guess, backprop = self.model.begin_update(self.X[rows])
                backprop(self.loss.get_grad(guess, self.y[rows]))
                self.model.finish_update(self.optimizer)


class JaxStep(Contestant):
    """One compiled function a step: `jax.grad`, and an update written by hand."""

    def __init__(self, workload: Workload, dtype: str) -> None:
        import jax

        cpu = jax.devices("cpu")[0]
        jax.config.update("jax_default_device", cpu)
        jax.config.update("jax_enable_x64", dtype == "float64")
        super().__init__(workload, dtype)
        self.jax = jax
        self.X, self.y = jax.device_put((self.X, self.y), cpu)
        self.run = self.compile()

    def compile(self) -> Callable[..., Any]:
        return self.jax.jit(self.step, donate_argnums=0)

    def reset(self) -> None:
        import numpy as np

        rng = np.random.default_rng(0)
        params: Any = []
        for n_in, n_out in pairwise(self.workload.sizes):
            w = rng.standard_normal((n_in, n_out)) * (2 / n_in) ** 0.5
            params.append((w.astype(self.dtype), np.zeros(n_out, self.dtype)))
        zeros = self.jax.tree.map(np.zeros_like, params)
        moments = (zeros, zeros) if self.workload.solver == "adam" else ()
        state = params, moments, np.zeros((), np.int32)
        self.state = self.jax.block_until_ready(self.jax.tree.map(self.jax.numpy.array, state))

    def train(self, epochs: int) -> None:
        for _ in range(epochs):
            losses = []
            for rows in self.workload.slices():
                self.state, loss = self.run(self.state, self.X, self.y, rows.start)
                losses.append(loss)
            self.jax.device_get(losses)
        self.jax.block_until_ready(self.state)

    def objective(self, params: Any, x: Any, y: Any) -> Any:
        """Mean cross-entropy."""
        *hidden, (w, b) = params
        for v, c in hidden:
            x = self.jax.nn.relu(x @ v + c)
        log_p = self.jax.nn.log_softmax(x @ w + b)
        hot = self.jax.nn.one_hot(y, log_p.shape[1], dtype=log_p.dtype)
        return -self.jax.numpy.mean(self.jax.numpy.sum(hot * log_p, axis=1))

    def step(self, state: Any, X: Any, y: Any, start: Any) -> tuple[Any, Any]:
        """From (parameters, moments, steps done) to the next, and the loss before."""
        map_, sqrt, rate = self.jax.tree.map, self.jax.numpy.sqrt, self.workload.rate
        # Sliced in here: outside of the compiled function it is a dispatch of its own
        cut = partial(
            self.jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=self.workload.batch
        )
        params, moments, t = state
        loss, grads = self.jax.value_and_grad(self.objective)(params, cut(X), cut(y))
        t = t + 1
        if not moments:
            return (map_(lambda p, g: p - rate * g, params, grads), (), t), loss
        m = map_(lambda m, g: 0.9 * m + 0.1 * g, moments[0], grads)
        v = map_(lambda v, g: 0.999 * v + 0.001 * g * g, moments[1], grads)
        scale = rate * sqrt(1 - 0.999**t) / (1 - 0.9**t)
        params = map_(lambda p, m, v: p - scale * m / (sqrt(v) + 1e-8), params, m, v)
        return (params, (m, v), t), loss


class JaxScan(JaxStep):
    """The same step, an epoch of it compiled into one `lax.scan`."""

    def compile(self) -> Callable[..., Any]:
        starts = self.jax.numpy.arange(self.workload.steps) * self.workload.batch

        def epoch(state: Any, X: Any, y: Any) -> tuple[Any, Any]:
            return self.jax.lax.scan(lambda s, start: self.step(s, X, y, start), state, starts)

        return self.jax.jit(epoch, donate_argnums=0)

    def train(self, epochs: int) -> None:
        for _ in range(epochs):
            self.state, losses = self.run(self.state, self.X, self.y)
            self.jax.device_get(losses)
        self.jax.block_until_ready(self.state)


class Products(Contestant):
    """Nothing but the matrix products of a step, by NumPy, into fixed arrays.

    A floor for what computes with this BLAS.
    """

    def __init__(self, workload: Workload, dtype: str) -> None:
        import numpy as np

        super().__init__(workload, dtype)
        self.matmul = np.matmul
        rng = np.random.default_rng(0)

        def normal(*shape: int) -> Any:
            return rng.standard_normal(shape).astype(dtype)

        (n_in, n_out), *deeper = pairwise(workload.sizes)
        n = workload.batch
        self.w, self.dw = normal(n_in, n_out), normal(n_in, n_out)
        self.z, self.dz = normal(n, n_out), normal(n, n_out)
        self.deeper = []  # a product is (left, right, out); the operands never change
        for k, m in deeper:
            a, w, dz = normal(n, k), normal(k, m), normal(n, m)
            self.deeper += [
                (a, w, normal(n, m)),
                (a.T, dz, normal(k, m)),
                (dz, w.T, normal(n, k)),
            ]

    def train(self, epochs: int) -> None:
        for _ in range(epochs):
            for rows in self.workload.slices():
                x = self.X[rows]
                self.matmul(x, self.w, out=self.z)
                for left, right, out in self.deeper:
                    self.matmul(left, right, out=out)
                self.matmul(x.T, self.dz, out=self.dw)


class WholeFit(Contestant):
    """``MLPClassifier.fit`` of a module, as a user calls it."""

    def __init__(self, workload: Fit, dtype: str, module: str) -> None:
        super().__init__(workload, dtype)
        self.estimator = import_module(module).MLPClassifier

    def train(self, epochs: int) -> None:
        fit: Fit = self.workload
        params = {"max_iter": fit.epochs, "tol": 0.0, "n_iter_no_change": fit.epochs}
        for _ in range(epochs):
            model = self.estimator(fit.hidden, **params, random_state=0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that it did not converge
                model.fit(self.X, self.y)
        self.curve = model.loss_curve_


REFERENCE = "portable_mlp numpy"

# Name -> how to make it, and the module it cannot do without
CONTESTANTS: dict[str, tuple[Callable[[Workload, str], Contestant], str]] = {
    **{
        f"portable_mlp {backend}": (partial(PortableMLP, backend=backend), "portable_mlp")
        for backend in ("numpy", "torch", "jax", "cupy")
    },
    "scikit-learn": (ScikitLearn, "sklearn"),
    "torch eager": (TorchEager, "torch"),
    "Thinc": (Thinc, "thinc"),
    "JAX jitted step": (JaxStep, "jax"),
    "JAX scan": (JaxScan, "jax"),
    "GEMMs alone": (Products, "numpy"),
}
FITTERS: dict[str, tuple[Callable[[Fit, str], Contestant], str]] = {
    REFERENCE: (partial(WholeFit, module="portable_mlp"), "portable_mlp"),
    "scikit-learn": (partial(WholeFit, module="sklearn.neural_network"), "sklearn"),
}


@dataclass(frozen=True)
class Suite:
    """What is timed, whose, and the unit."""

    workloads: dict[int, Any]
    contestants: dict[str, tuple[Callable[..., Contestant], str]]
    unit: str
    per_second: float
    dtypes: tuple[str, ...]


SUITES = {
    "steps": Suite(WORKLOADS, CONTESTANTS, "µs a step", 1e6, ("float32",)),
    "fits": Suite(FITS, FITTERS, "ms a fit", 1e3, ("float32", "float64")),
}

# ---------------------------------------------------------------- processes


class ContestantError(Exception):
    """A contestant failed; the message says why."""


def serve(suite: str, name: str, pipe: Connection) -> None:
    """Do, in a child process, what a `Worker` asks, until it closes the pipe."""
    make, _ = SUITES[suite].contestants[name]
    contestant: Any = None
    while True:
        try:
            request = pipe.recv()
        except EOFError:
            return
        try:
            if isinstance(request, int):
                contestant.reset()
                time.sleep(0.05)  # idle threads of the one before may still spin
                began = time.perf_counter()
                contestant.train(request)
                pipe.send((time.perf_counter() - began, contestant.curve))
            else:
                contestant = None  # its arrays are freed before there are others
                contestant = make(*request)
                pipe.send((0.0, ()))
        except Exception as error:
            kind = type(error).__name__
            pipe.send(f"{'unavailable' if kind == 'BackendError' else kind}: {error}")


class Worker:
    """A contestant in a process of its own, which lives until it is closed."""

    def __init__(self, suite: str, name: str) -> None:
        self.curve: Sequence[float] = ()
        context = get_context("spawn")  # a fork would share what BLAS has started
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(suite, name, theirs), daemon=True)
        self._process.start()
        theirs.close()  # else the child's end would go unnoticed

    def enter(self, workload: Workload, dtype: str, seconds: float) -> int:
        """Set up a workload; returns how many epochs take about this many seconds."""
        self._ask((workload, dtype))
        self.time(2)  # JAX compiles in the first call, and anew when fed its own results
        epochs = 1
        while (elapsed := self.time(epochs)) < seconds / 4:
            epochs = ceil(epochs * min(seconds / elapsed, 10.0))
        return max(1, round(epochs * seconds / elapsed))

    def time(self, epochs: int) -> float:
        """Seconds that this many epochs take, from fresh parameters."""
        return self._ask(epochs)

    def close(self) -> None:
        self._pipe.close()
        self._process.join()

    def _ask(self, request: Any) -> float:
        try:
            self._pipe.send(request)
            reply = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise ContestantError("its process died") from error
        if isinstance(reply, str):
            raise ContestantError(reply)
        elapsed, self.curve = reply
        return float(elapsed)


@dataclass
class Results:
    """By contestant and workload: a time in each round, losses, and what went wrong."""

    samples: dict[str, dict[int, list[float]]]
    curves: dict[str, dict[int, Sequence[float]]]
    failures: dict[str, dict[int, str]]


def measure(args: argparse.Namespace, dtype: str) -> Results:
    """Time all contestants on all workloads, a workload after the other."""
    names, suite = args.only, SUITES[args.suite]
    results = Results(*({name: {} for name in names} for _ in range(3)))
    failures = results.failures
    workers: dict[str, Worker] = {}
    for name in names:
        if find_spec(module := suite.contestants[name][1]):
            workers[name] = Worker(args.suite, name)
        else:
            failures[name] = dict.fromkeys(args.workloads, f"missing: {module} is not installed")
    for number in args.workloads:
        workload, epochs = suite.workloads[number], {}
        for i in range(args.rounds + 1):  # the first only prepares
            print(f"{dtype}, workload {number}, round {i} of {args.rounds}", file=sys.stderr)
            turn = i % len(names)
            for name in [*names[turn:], *names[:turn]]:
                if number in failures[name]:
                    continue
                try:
                    if i == 0:
                        epochs[name] = workers[name].enter(workload, dtype, args.seconds)
                        results.samples[name][number] = []
                    else:
                        steps = epochs[name] * workload.steps
                        elapsed = workers[name].time(epochs[name])
                        results.samples[name][number].append(suite.per_second * elapsed / steps)
                        results.curves[name][number] = workers[name].curve
                except ContestantError as error:
                    failures[name][number] = " ".join(str(error).split())
                    results.samples[name].pop(number, None)
    for worker in workers.values():
        worker.close()
    return results


# ---------------------------------------------------------------- the report


def table(header: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    """Markdown, columns but the first aligned to the right; None is a dash."""

    def text(cell: Any) -> str:
        if isinstance(cell, float):  # three digits, or all before the point
            return f"{cell:.{2 if cell < 10 else 1 if cell < 100 else 0}f}"
        return "–" if cell is None else str(cell)

    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join(f"| {' | '.join(map(text, row))} |" for row in (header, rule, *rows))


def report(args: argparse.Namespace, dtype: str, results: Results) -> Iterator[str]:
    """Paragraphs of Markdown."""
    numbers, suite = args.workloads, SUITES[args.suite]
    samples, failures = results.samples, results.failures
    medians = {name: {n: median(s) for n, s in own.items()} for name, own in samples.items()}
    yield (
        f"In {dtype}, {suite.unit}: medians of {args.rounds} interleaved"
        f" rounds of about {args.seconds:g} s."
    )
    yield "\n".join(f"{number}. {suite.workloads[number]}" for number in numbers)
    yield table(
        [suite.unit, *numbers], [[name, *map(m.get, numbers)] for name, m in medians.items()]
    )

    own = medians.pop(REFERENCE, {})
    rows: list[list[Any]] = []
    for name, peer in medians.items():
        ratios = {n: own[n] / peer[n] for n in numbers if n in own and n in peer}
        if ratios:
            rows.append([name, *map(ratios.get, numbers), geometric_mean(ratios.values())])
    if rows:
        yield f"Time of {REFERENCE} ÷ time of the peer; below 1, {REFERENCE} is faster."
        yield table([f"{REFERENCE} ÷", *numbers, "geometric mean"], rows)

    if curves := results.curves.pop(REFERENCE, {}):
        for name, others in results.curves.items():
            gaps = [largest_gap(curves[n], others[n]) for n in numbers if curves.get(n)]
            if gaps:
                yield (
                    f"Largest relative difference of the loss curves from {name}'s:"
                    f" {', '.join(f'{gap:.1e}' for gap in gaps)}."
                )

    notes = [
        f"- {name}: {reason} (workloads {', '.join(str(n) for n in bad if bad[n] == reason)})"
        for name, bad in failures.items()
        for reason in dict.fromkeys(bad.values())
    ]
    # What else the machine computes slows the threads of one product several times over
    notes += [
        f"- {name}, workload {n}: unsteady, {min(s):.3g} to {max(s):.3g} {suite.unit}"
        for name, own_samples in samples.items()
        for n, s in own_samples.items()
        if max(s) > 1.5 * min(s)
    ]
    if notes:
        yield "\n".join(notes)


def largest_gap(curve: Sequence[float], other: Sequence[float]) -> float:
    """Of two curves, epoch for epoch."""
    return max(abs(a - b) / abs(b) for a, b in zip(curve, other, strict=True))


def machine() -> dict[str, str]:
    """What the numbers hold for."""
    cpu = platform.processor() or platform.machine()
    if (cpuinfo := Path("/proc/cpuinfo")).exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.partition(":")[2].strip()
    affinity = getattr(os, "sched_getaffinity", None)  # not on every system
    facts = {
        "date": date.today().isoformat(),
        "system": f"{platform.system()} {platform.machine()}",
        "CPU": cpu,
        "cores": str(len(affinity(0)) if affinity else os.cpu_count()),
        "Python": platform.python_version(),
    }
    if smi := shutil.which("nvidia-smi"):
        query = [smi, "--query-gpu=name", "--format=csv,noheader"]
        gpus = subprocess.run(query, capture_output=True, text=True, check=False)
        if gpus.returncode == 0:
            facts["GPU"] = ", ".join(gpus.stdout.split("\n")).strip(", ")
    distributions = packages_distributions()
    for module in dict.fromkeys([*(m for _, m in CONTESTANTS.values()), "cupy"]):
        if find_spec(module):
            distribution = distributions.get(module, [module])[0]
            facts[distribution] = version(distribution)
    return facts


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--fit", dest="suite", action="store_const", const="fits", default="steps",
        help="time whole fits of the estimators, instead of steps",
    )  # fmt: skip
    add("--rounds", type=int, default=5)
    add("--seconds", type=float, default=1.0, help="of each timed run, about")
    add("--json", type=Path, metavar="FILE", help="write every sample here too")
    add("--workloads", metavar="1,2,...", help="all by default")
    add("--only", metavar="NAME,...", help="all by default")
    add("--dtype", metavar="float32,float64", help="default: float32, of fits both")
    args = parser.parse_args()
    if args.rounds < 1 or args.seconds <= 0.0:
        parser.error("--rounds must be at least 1, and --seconds above 0")
    suite = SUITES[args.suite]

    def chosen(text: str | None, known: Sequence[Any], default: Sequence[Any]) -> list[Any]:
        if text is None:
            return list(default)
        by_name = {str(key): key for key in known}
        names = [name.strip() for name in text.split(",")]
        if unknown := set(names) - set(by_name):
            parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(by_name)}")
        return [by_name[name] for name in names]

    args.workloads = chosen(args.workloads, [*suite.workloads], [*suite.workloads])
    args.only = chosen(args.only, [*suite.contestants], [*suite.contestants])
    args.dtype = chosen(args.dtype, ["float32", "float64"], suite.dtypes)
    return args


def main() -> None:
    args = parse_args()
    results = {dtype: measure(args, dtype) for dtype in args.dtype}
    document = {
        "machine": machine(),
        "settings": {key: getattr(args, key) for key in ("suite", "rounds", "seconds")},
        "workloads": {
            number: str(SUITES[args.suite].workloads[number]) for number in args.workloads
        },
        "unit": SUITES[args.suite].unit,
        "results": {
            dtype: {"samples": found.samples, "failures": found.failures}
            for dtype, found in results.items()
        },
    }
    for dtype, found in results.items():
        print("\n\n".join(report(args, dtype, found)), end="\n\n")
    print("; ".join(f"{key} {value}" for key, value in machine().items()))
    if args.json:
        args.json.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()

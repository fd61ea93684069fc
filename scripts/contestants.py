"""What the benchmark trains, and who trains it.

Each contestant lives in a process of its own, which loads only its own libraries.
"""

from __future__ import annotations

import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import pairwise
from math import ceil, inf
from typing import Any


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

    @property
    def head(self) -> int:
        """Epochs after which all is compiled: of JAX two, of portable_mlp some steps."""
        return max(2, ceil(20 / self.steps))

    def data(self, dtype: str) -> tuple[Any, Any]:
        return normal_rows(self.rows, self.sizes[0], self.sizes[-1], dtype)

    def slices(self) -> Iterator[slice]:
        """Yield the rows of each batch, in order."""
        for start in range(0, self.rows, self.batch):
            yield slice(start, start + self.batch)


WORKLOADS = {
    1: Workload((4, 16, 2), 100, 100, "sgd", 0.005),
    2: Workload((20, 100, 2), 200, 10_000, "adam", 1e-3),
    3: Workload((64, 8, 32, 8, 4), 9342, 9342, "sgd", 0.005),
    4: Workload((784, 256, 128, 10), 128, 12_800, "adam", 1e-3),
    5: Workload((1024, 1024, 1024, 10), 512, 10_240, "adam", 1e-3),
}
ON_A_GPU = {
    **{number: WORKLOADS[number] for number in (1, 2, 3, 4)},
    5: Workload((1024, 1024, 1024, 10), 8192, 16_384, "adam", 1e-3),
}


def growth(axis: str) -> dict[int, Workload]:
    """Workloads that differ in one thing: width, depth, batch or rows."""

    def network(width: int = 64, depth: int = 2, batch: int = 200, rows: int = 10_000) -> Workload:
        return Workload((*[width] * (depth + 1), 10), batch, max(rows, batch), "adam", 1e-3)

    values = {
        "width": (16, 32, 64, 128, 256, 512, 1024),
        "depth": (1, 2, 4, 8, 16, 32),
        "batch": (10, 32, 100, 316, 1000, 3162, 10_000),
        "rows": (1000, 10_000, 100_000, 1_000_000),
    }[axis]
    return {value: network(**{axis: value}) for value in values}


@dataclass(frozen=True)
class Fit:
    """What to fit, by an estimator whose other parameters are the defaults."""

    name: str
    data: Callable[[str], tuple[Any, Any]]
    hidden: tuple[int, ...]
    epochs: int
    head = 1  # fits, as steps: see there

    def __str__(self) -> str:
        epochs = f"{self.epochs} epoch{'s' * (self.epochs > 1)}"
        return f"{self.name}, hidden layers {self.hidden}, {epochs}"

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
    """Draw standard normal inputs, and uniform labels."""
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
    4: Fit(
        "100 normal rows of 4 features, ten classes", partial(normal_rows, 100, 4, 10), (100,), 1
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

    def __init__(self, workload: Workload, dtype: str, backend: str, device: str = "cpu") -> None:
        import numpy as np

        from portable_mlp import get_backend, mlp
        from portable_mlp.losses import SoftmaxCrossEntropy
        from portable_mlp.optimizers import SGD, SklearnAdam
        from portable_mlp.sources import ArraySource
        from portable_mlp.steps import Batch
        from portable_mlp.training import Trainer

        # Before the first step, as JAX does: what it takes is told apart
        os.environ.setdefault("PORTABLE_MLP_COMPILE", "now")
        self.backend = get_backend(device, backend)
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


class WithoutTrick(PortableMLP):
    """NumPy's engine without one of the things that make it fast."""

    def __init__(self, workload: Workload, dtype: str, trick: str) -> None:
        from portable_mlp.backends import NumPyBackend
        from portable_mlp.engines.host import dialects, memory

        plan, dialect = memory.Plan, dialects.NumPyDialect
        if "loops" in trick:
            os.environ["PORTABLE_MLP_COMPILE"] = "never"
        if trick == "recording":
            NumPyBackend.engine = "eager"
        elif trick == "memory used again":
            plan._overwritten = lambda *_: None
            plan._take = lambda self, free, n_bytes: self._new(n_bytes)
        elif trick == "gradients in their place":
            plan._homes = lambda *_: {}
        elif trick == "loops and blocks":
            dialect.block = 0
        elif trick == "loops and long rows":
            dialect.wide, dialect.wider, dialect.vectors = 0, 0, ()
        super().__init__(workload, dtype, "numpy")


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
    """The usual training loop, with autograd, not compiled.

    Parameters
    ----------
    **adam
        Settings of `torch.optim.Adam`; SGD has none.
    """

    def __init__(self, workload: Workload, dtype: str, device: str = "cpu", **adam: bool) -> None:
        import torch

        super().__init__(workload, dtype)
        self.torch, self.device, self.adam = torch, device, adam
        self.X = torch.from_numpy(self.X).to(device)
        self.y = torch.from_numpy(self.y).long().to(device)
        layers: list[Any] = []
        for n_in, n_out in pairwise(workload.sizes):
            layers += [torch.nn.Linear(n_in, n_out), torch.nn.ReLU()]
        self.model = torch.nn.Sequential(*layers[:-1]).to(device, getattr(torch, dtype))

    def reset(self) -> None:
        for layer in self.model[::2]:  # in place: what is compiled stays valid
            layer.reset_parameters()
        optim = self.torch.optim
        rule = optim.SGD if self.workload.solver == "sgd" else partial(optim.Adam, **self.adam)
        self.optimizer = rule(self.model.parameters(), lr=self.workload.rate)

    def objective(self, x: Any, y: Any) -> Any:
        """Mean cross-entropy."""
        return self.torch.nn.functional.cross_entropy(self.model(x), y)

    def step(self, x: Any, y: Any) -> Any:
        """One update; returns the loss before it."""
        self.optimizer.zero_grad()
        loss = self.objective(x, y)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def train(self, epochs: int) -> None:
        for _ in range(epochs):
            total = self.torch.zeros((), device=self.device)
            for rows in self.workload.slices():
                total += self.step(self.X[rows], self.y[rows])
            total.item()


class TorchCompiled(TorchEager):
    """The same loop, with the objective and its gradient compiled, and Adam fused."""

    def __init__(self, workload: Workload, dtype: str, device: str, mode: str) -> None:
        super().__init__(workload, dtype, device, fused=True)
        self.torch.compiler.reset()  # what was compiled before counts against a limit
        # Whole or not at all: beyond the limit it would run eagerly and say nothing
        self.objective = self.torch.compile(self.objective, mode=mode, fullgraph=True)


class TorchGraph(TorchEager):
    """The same step, captured in a CUDA graph; Adam has to be ``capturable``."""

    def reset(self) -> None:
        super().reset()
        cuda = self.torch.cuda
        self.x, self.t = (
            self.X[: self.workload.batch].clone(),
            self.y[: self.workload.batch].clone(),
        )
        aside = cuda.Stream()
        aside.wait_stream(cuda.current_stream())
        with cuda.stream(aside):  # as its documentation asks
            for _ in range(3):
                super().step(self.x, self.t)
        cuda.current_stream().wait_stream(aside)
        self.graph = cuda.CUDAGraph()
        with cuda.graph(self.graph):
            self.loss = super().step(self.x, self.t)

    def step(self, x: Any, y: Any) -> Any:
        if len(x) != len(self.x):
            return super().step(x, y)
        self.x.copy_(x)
        self.t.copy_(y)
        self.graph.replay()
        return self.loss


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

    def __init__(self, workload: Workload, dtype: str, device: str = "cpu") -> None:
        import jax

        home = jax.devices(device)[0]
        jax.config.update("jax_default_device", home)
        jax.config.update("jax_enable_x64", dtype == "float64")
        jax.config.update("jax_default_matmul_precision", "float32")
        super().__init__(workload, dtype)
        self.jax = jax
        self.X, self.y = jax.device_put((self.X, self.y), home)
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
    """Nothing but the matrix products of a step, into fixed arrays.

    A floor for what computes with this BLAS.
    """

    def __init__(self, workload: Workload, dtype: str, library: str = "numpy") -> None:
        import numpy as np

        super().__init__(workload, dtype)
        self.xp: Any = import_module(library)
        self.X = self.xp.asarray(self.X)
        rng = np.random.default_rng(0)

        def normal(*shape: int) -> Any:
            return self.xp.asarray(rng.standard_normal(shape).astype(dtype))

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

    def epoch(self, multiply: Callable[[Any, Any, Any], Any]) -> None:
        """Compute all products of an epoch, each into its third argument."""
        for rows in self.workload.slices():
            x = self.X[rows]
            n = len(x)
            multiply(x, self.w, self.z[:n])
            for left, right, out in self.deeper:
                multiply(left, right, out)
            multiply(x.T, self.dz[:n], self.dw)

    def train(self, epochs: int) -> None:
        for _ in range(epochs):
            self.epoch(self.xp.matmul)


class CapturedProducts(Products):
    """The same on a GPU, an epoch captured in a CUDA graph.

    Launched one by one, small products take the time that Python does.
    """

    def __init__(self, workload: Workload, dtype: str) -> None:
        from portable_mlp.engines.cuda.runtime import CaptureError, Cuda

        super().__init__(workload, dtype, "cupy")
        self.cuda = Cuda()  # kept: the graph points at its workspace
        work = partial(self.epoch, self.cuda.multiply)
        work()  # loads the kernels, which cannot be while they are captured
        try:
            self.run = self.cuda.capture(work).launch
        except CaptureError as reason:
            warnings.warn(
                f"the products are launched one by one, without a CUDA graph: {reason}",
                RuntimeWarning,
                stacklevel=2,
            )
            self.run = work

    def train(self, epochs: int) -> None:
        for _ in range(epochs):
            self.run()
        self.xp.cuda.get_current_stream().synchronize()


class WholeFit(Contestant):
    """``MLPClassifier.fit`` of a module, as a user calls it."""

    def __init__(self, workload: Fit, dtype: str, module: str) -> None:
        super().__init__(workload, dtype)
        self.estimator = import_module(module).MLPClassifier

    def train(self, epochs: int) -> None:
        from sklearn.exceptions import ConvergenceWarning

        fit: Fit = self.workload
        params = {"max_iter": fit.epochs, "tol": 0.0, "n_iter_no_change": fit.epochs}
        for _ in range(epochs):
            model = self.estimator(fit.hidden, **params, random_state=0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                model.fit(self.X, self.y)
        self.curve = model.loss_curve_


# Name -> how to make it, and the module it cannot do without
Contestants = dict[str, tuple[Callable[[Any, str], Contestant], str]]

STEPPERS: Contestants = {
    **{
        f"portable_mlp {backend}": (partial(PortableMLP, backend=backend), "portable_mlp")
        for backend in ("numpy", "torch", "jax")
    },
    "scikit-learn": (ScikitLearn, "sklearn"),
    "torch eager": (TorchEager, "torch"),
    "Thinc": (Thinc, "thinc"),
    "JAX jitted step": (JaxStep, "jax"),
    "JAX scan": (JaxScan, "jax"),
    "GEMMs alone": (Products, "numpy"),
}
GPU_STEPPERS: Contestants = {
    **{
        f"portable_mlp {backend}": (
            partial(PortableMLP, backend=backend, device="gpu"),
            "portable_mlp",
        )
        for backend in ("cupy", "torch", "jax")
    },
    **{
        f"torch {name}": (partial(kind, device="cuda", **settings), "torch")
        for name, kind, settings in (
            ("eager", TorchEager, {}),
            ("fused Adam", TorchEager, {"fused": True}),
            ("compiled", TorchCompiled, {"mode": "default"}),
            ("compiled reduce-overhead", TorchCompiled, {"mode": "reduce-overhead"}),
            ("CUDA graphs", TorchGraph, {"capturable": True}),
            ("CUDA graphs fused Adam", TorchGraph, {"capturable": True, "fused": True}),
        )
    },
    "JAX scan": (partial(JaxScan, device="gpu"), "jax"),
    "GEMMs alone": (CapturedProducts, "cupy"),
}
TRICKS: Contestants = {
    "portable_mlp numpy": STEPPERS["portable_mlp numpy"],
    **{
        f"without {trick}": (partial(WithoutTrick, trick=trick), "portable_mlp")
        for trick in (
            "recording",
            "loops",
            "memory used again",
            "gradients in their place",
            "loops and blocks",
            "loops and long rows",
        )
    },
}
FITTERS: Contestants = {
    "portable_mlp numpy": (partial(WholeFit, module="portable_mlp"), "portable_mlp"),
    "scikit-learn": (partial(WholeFit, module="sklearn.neural_network"), "sklearn"),
}

# ---------------------------------------------------------------- memory of a GPU


def free_memory() -> int | None:
    """Bytes of the GPU that nobody holds; None if no library here can tell."""
    for module, name in (("cupy.cuda.runtime", "memGetInfo"), ("torch.cuda", "mem_get_info")):
        with suppress(Exception):  # not installed, or without a GPU: no common base
            return int(getattr(import_module(module), name)()[0])
    return None


def cupy_peak() -> int:
    """All that CuPy's pool has taken, which it keeps."""
    return int(import_module("cupy").get_default_memory_pool().total_bytes())


def torch_peak() -> int:
    """Most bytes of torch's arrays at once."""
    return int(import_module("torch").cuda.max_memory_allocated())


def jax_peak() -> int | None:
    """Most bytes of JAX's arrays at once, if its allocator counts them."""
    statistics = import_module("jax").devices("gpu")[0].memory_stats() or {}
    peak: int | None = statistics.get("peak_bytes_in_use")
    return peak


# Of the contestants whose memory on a GPU is told
PEAKS: dict[str, Callable[[], int | None]] = {
    "portable_mlp cupy": cupy_peak,
    "portable_mlp torch": torch_peak,
    "torch eager": torch_peak,
    "JAX scan": jax_peak,
}

"""Steps of every kind, and engines that run them."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np

from portable_mlp import mlp
from portable_mlp.backends import NumPyBackend
from portable_mlp.engines import Task
from portable_mlp.engines.graph.program import flatten
from portable_mlp.losses import BinaryCrossEntropy, SoftmaxCrossEntropy, SquaredError
from portable_mlp.optimizers import SGD, Adam, AdamW, RMSprop, SklearnAdam, SklearnSGD
from portable_mlp.schedules import Clock
from portable_mlp.sources import ArraySource
from portable_mlp.steps import Batch
from portable_mlp.training import Trainer

NUMPY = NumPyBackend()

RULES = [
    SGD(), SGD(momentum=0.9, nesterov=True), SklearnSGD(), SklearnSGD(nesterov=False), Adam(),
    SklearnAdam(), AdamW(decay_biases=False), RMSprop(),
]  # fmt: skip


def targets(loss, n, k, rng):
    if isinstance(loss, SoftmaxCrossEntropy):
        return rng.randint(k, size=n).astype(np.int32)
    if isinstance(loss, BinaryCrossEntropy):
        return rng.randint(2, size=(n, k)).astype(float)
    return rng.uniform(0.5, 2.0, size=(n, k))


def case(
    loss, optimizer, activation="tanh", backend=NUMPY, dtype="float64", weighted=False,
    sizes=(5, 7, 6, 3), n=12, **settings,
):  # fmt: skip
    """What a step takes."""
    rng = np.random.RandomState(0)
    dropout = settings.pop("dropout", 0.0)
    network = mlp(sizes, activation, dropout=dropout)
    trainer = Trainer(network, loss, optimizer, backend, dtype, 0.01, **settings)
    x, y = rng.standard_normal((n, sizes[0])), targets(loss, n, sizes[-1], rng)
    w = rng.uniform(0.5, 2.0, size=n) if weighted else None
    with backend.scope(dtype):
        state = trainer.start(network.init(rng))
        batch = Batch(*(
            None if a is None else backend.asarray(a, None if a.dtype == np.int32 else dtype)
            for a in (x, y, w)
        ))  # fmt: skip
    return trainer, state.arrays, batch


def hyper_of(trainer, step, keys=()):
    """The numbers of a step, from 1 on."""
    return trainer.hyper(Clock(step - 1, 100, 0, 0), trainer.schedule.init(), keys)[0]


def run(kind, trainer, arrays, batch, n_steps=4, batch_size=5):
    """Steps by one engine, from a copy: parameters and moments, and the values."""
    engine = kind(trainer.backend, trainer.recipe)
    with trainer.backend.scope(trainer.dtype):
        arrays = copy.deepcopy(arrays)
        values = []
        for epoch in range(n_steps):
            order = np.random.RandomState(epoch).permutation(batch.x.shape[0])
            n = -(-len(order) // batch_size)
            hypers = [
                hyper_of(trainer, epoch * n + i + 1, range(7 * i, 7 * i + trainer.network.n_random))
                for i in range(n)
            ]
            task = Task(batch, order, batch_size, hypers, lambda: False)
            arrays, found = engine.run(arrays, task)
            values += found
        return [trainer.backend.to_host(a) for a in flatten(arrays)], values


def fit(trainer, arrays, batch, epochs=3, **settings_):
    state = trainer.start(trainer.params(arrays.leaves))
    trainer.fit(
        state, ArraySource(batch), epochs, np.random.RandomState(0), **settings_
    )  # fmt: skip
    return trainer.params(state.arrays.leaves)


@dataclass(frozen=True)
class LooksAtValues(SquaredError):
    def per_row(self, z, y, xp):
        if float(xp.sum(z)) > 1e9:
            raise AssertionError
        return super().per_row(z, y, xp)


@dataclass(frozen=True)
class LeavesTheTable(SquaredError):
    def per_row(self, z, y, xp):
        values, dz = super().per_row(z, y, xp)
        return values + 0.0 * xp.cumulative_sum(values), dz

"""The step: from arrays, a batch and a few numbers to the next arrays.

A pure function of arrays: it never looks at a value, so an engine may record it,
compile it and replay it (`portable_mlp.engines`).  The mathematics is in the layers, the
losses and the optimizers; here it is put together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from portable_mlp.functions import total_weight
from portable_mlp.losses import Loss
from portable_mlp.network import Network
from portable_mlp.optimizers import Coefficients, Moments, Optimizer, clip_by_global_norm
from portable_mlp.packing import Layout
from portable_mlp.typing import Array, Namespace, Params


class Batch(NamedTuple):
    """Rows to learn from: x (n, d), y (n,) or (n, k), weights (n,) or None."""

    x: Array
    y: Array
    weights: Array | None = None


class Arrays(NamedTuple):
    """What a step changes: leaves of the parameters, and their moments."""

    leaves: list[Array]
    moments: list[Moments]


class Hyper(NamedTuple):
    """Numbers that may change from step to step without a new compilation."""

    alpha: float
    coefficients: Coefficients
    keys: tuple[int, ...]


@dataclass(frozen=True)
class Recipe:
    """What a step does; static, and hashable, so that a compiled step is found again.

    Parameters
    ----------
    xp : namespace
    network : Network
    loss : Loss
    optimizer : Optimizer
    layout : Layout
    clip_norm : float, optional
        Largest global norm of the gradients, see `optimizers.clip_by_global_norm`.
    penalised : bool, default=True
        Whether the penalty is computed; without it α is taken for 0.
    """

    xp: Namespace
    network: Network
    loss: Loss
    optimizer: Optimizer
    layout: Layout
    clip_norm: float | None = None
    penalised: bool = True


def objective(
    recipe: Recipe, leaves: Params, batch: Batch, alpha: float, keys: Sequence[int]
) -> tuple[Array, Array, list[Array]]:
    """The mean loss, the L2 penalty, and the gradient of their sum with respect to the leaves.

    The penalty is α / (2 n) Σ w² over the weights, not the biases, with n the number
    of rows or the sum of their weights, as in scikit-learn.
    """
    xp, network = recipe.xp, recipe.network
    params = recipe.layout.unpack(leaves, xp)
    z, residuals = network.forward(params, batch.x, xp, keys)
    value, dz = recipe.loss(z, batch.y, xp, batch.weights)
    grads = network.backward(params, residuals, dz, xp)
    penalty: Any = 0.0
    if recipe.penalised:
        n: Any = batch.x.shape[0]
        if batch.weights is not None:
            n = total_weight(batch.weights, xp)
        scale = alpha / n
        squares: Any = 0.0
        for i, param in enumerate(network.params):
            if param.group != "bias":
                flat = xp.reshape(params[i], (-1,))
                squares = squares + xp.vecdot(flat, flat)
                grads[i] += scale * params[i]
        penalty = 0.5 * scale * squares
    return value, penalty, recipe.layout.pack(grads, xp)


def step(
    recipe: Recipe, arrays: Arrays, batch: Batch, hyper: Hyper
) -> tuple[Arrays, tuple[Array, Array]]:
    """One update; returns the new arrays, and the loss and penalty before it.

    The arrays handed in are donated: only what comes back may be used.
    """
    xp = recipe.xp
    leaves, moments = arrays
    value, penalty, grads = objective(recipe, leaves, batch, hyper.alpha, hyper.keys)
    if recipe.clip_norm is not None:
        grads = clip_by_global_norm(grads, recipe.clip_norm, xp)
    groups = recipe.layout.groups
    updated = recipe.optimizer.apply(leaves, grads, moments, hyper.coefficients, xp, groups)
    return Arrays(*updated), (value, penalty)

"""The step: from arrays, a batch and a few numbers to the next arrays.

A step is a pure function of arrays.  It never inspects a value, so an engine may record it,
compile it and replay it (`portable_mlp.engines`).  The mathematics is in the layers, the
losses and the optimizers; this module combines them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from math import prod
from operator import add
from typing import Any, NamedTuple

from portable_mlp.functions import total_weight
from portable_mlp.losses import Loss
from portable_mlp.network import Network, Numbers
from portable_mlp.optimizers import Coefficients, Moments, Optimizer, clip_by_global_norm
from portable_mlp.packing import Layout
from portable_mlp.typing import Array, Namespace, Params


class Batch(NamedTuple):
    """Rows to learn from: x (n, d), y (n,) or (n, k), weights (n,) or None.

    If the members of an ensemble have separate rows, the members' axis comes first in each.
    """

    x: Array
    y: Array
    weights: Array | None = None


class Arrays(NamedTuple):
    """The arrays that a step changes: leaves of the parameters, and their moments."""

    leaves: list[Array]
    moments: list[Moments]


class Hyper(NamedTuple):
    """Numbers that may change from step to step without a new compilation.

    Attributes
    ----------
    alphas : tuple of float
        L2 penalties α, one for each factor in `Treatments.penalties`.
    coefficients : tuple of Coefficients
        The optimizer's coefficients, one for each treatment in `Treatments.updates`.
    keeps : tuple of float or PerMember
        For each of these treatments, 1 − learning rate · weight decay.
    layers : tuple of tuple
        Numbers for the layers, from `Network.per_step`.
    loss : tuple of float
        Numbers for the loss, from `Loss.per_step`.
    """

    alphas: tuple[float, ...]
    coefficients: tuple[Coefficients, ...]
    keeps: tuple[Any, ...]
    layers: Numbers
    loss: tuple[float, ...] = ()

    @property
    def forward(self) -> tuple[Numbers, tuple[float, ...]]:
        """The numbers that the first half of a step takes."""
        return self.layers, self.loss


NO_NUMBERS: tuple[Numbers, tuple[float, ...]] = (), ()
"""`Hyper.forward` if neither layers nor loss take numbers, or all behave as in prediction."""


@dataclass(frozen=True)
class Recipe:
    """The static part of a step.

    It is hashable, so that it can be the key of a cache of compiled steps.

    Parameters
    ----------
    xp : namespace
    network : Network
    loss : Loss
    optimizer : Optimizer
    layout : Layout
    kinds : tuple of int
        For each leaf, the index into `Hyper.coefficients` and `Hyper.keeps`.
    decays : tuple of bool
        For each entry of `Hyper.keeps`, whether it is applied.
    penalised : tuple of int or None
        For each parameter, the index into `Hyper.alphas`; None if it is not penalised.
    clip_norm : float, optional
        Largest global norm of the gradients, see `optimizers.clip_by_global_norm`.
    """

    xp: Namespace
    network: Network
    loss: Loss
    optimizer: Optimizer
    layout: Layout
    kinds: tuple[int, ...]
    decays: tuple[bool, ...]
    penalised: tuple[int | None, ...]
    clip_norm: float | None = None

    @property
    def has_penalty(self) -> bool:
        """Whether any parameter is penalised."""
        return any(kind is not None for kind in self.penalised)

    @property
    def n_losses(self) -> int:
        """The number of loss values: one, or one for each member."""
        return self.network.members or 1


def objective(
    recipe: Recipe, leaves: Params, batch: Batch, alphas: Sequence[float], numbers: Any
) -> tuple[Array, Array, list[Array]]:
    """Return the mean loss, the L2 penalty, and the gradient of their sum.

    The penalty is Σ α / (2 n) Σ w² over the groups of penalised parameters, with n the number
    of rows or the sum of their weights, as in scikit-learn.

    Parameters
    ----------
    recipe : Recipe
    leaves : list of arrays
    batch : Batch
    alphas : sequence of float
        Penalties, as `Hyper.alphas`.
    numbers : tuple
        Numbers of the step, as `Hyper.forward`.

    Returns
    -------
    value : array () or (members,)
    penalty : array (), or 0.0 if nothing is penalised
    grads : list of arrays
        Gradient with respect to the leaves.
    """
    value, grads = sums(recipe, leaves, batch, numbers)
    penalty, grads = penalise(recipe, leaves, grads, alphas, weight_of(recipe, batch))
    return value, penalty, grads


# ---------------------------------------------------------------- the two halves of a step


def sums(
    recipe: Recipe, leaves: Params, batch: Batch, numbers: Any, total: Any = None
) -> tuple[Array, list[Array]]:
    """Return the contribution of rows to the mean loss and to its gradient.

    Parameters
    ----------
    recipe : Recipe
    leaves : list of arrays
    batch : Batch
    numbers : tuple
        Numbers of the step, as `Hyper.forward`.
    total : float or array (), optional
        Sum of the weights of the whole batch, if ``batch`` is a part of it: see
        `Loss.__call__`.

    Returns
    -------
    value : array () or (members,)
    grads : list of arrays
        In the order of the parameters.
    """
    xp, network = recipe.xp, recipe.network
    params = recipe.layout.unpack(leaves, xp)
    of_layers, of_loss = numbers
    # z (rows, n_out) or (members, rows, n_out)
    z, residuals = network.forward(params, batch.x, xp, of_layers)
    # Passed only where needed, so that a custom loss may lack these parameters
    more = {} if total is None else {"total": total}
    if of_loss:
        more["numbers"] = of_loss
    _, y, weights = for_members(batch, network.members, xp)
    value, dz = recipe.loss(z, y, xp, weights, **more)
    return value, network.backward(params, residuals, dz, xp)


def for_members(batch: Batch, members: int | None, xp: Namespace) -> Batch:
    """Return the batch with targets and weights for each member.

    Targets and weights that all members share are broadcast.
    """
    if members is None or batch.x.ndim == 3:
        return batch

    def repeated(a: Array | None) -> Array | None:
        return None if a is None else xp.broadcast_to(a, (members, *a.shape))

    return Batch(batch.x, repeated(batch.y), repeated(batch.weights))


def weight_of(recipe: Recipe, batch: Batch) -> Any:
    """Return the divisor of the penalty: the number of rows, or the sum of their weights.

    If the members have separate rows, weights give one sum for each member, (members,).
    Without a penalty the sum is not needed: the result is then None for weighted rows.
    """
    if batch.weights is None:
        return batch.x.shape[-2]
    return total_weight(batch.weights, recipe.xp) if recipe.has_penalty else None


def penalise(
    recipe: Recipe, leaves: Params, grads: list[Array], alphas: Sequence[float], n: Any
) -> tuple[Any, list[Array]]:
    """Add the gradient of the L2 penalty to the gradients.

    Parameters
    ----------
    recipe : Recipe
    leaves : list of arrays
    grads : list of arrays
        Gradients in the order of the parameters; they may be overwritten.
    alphas : sequence of float
        Penalties, as `Hyper.alphas`.
    n : float or array, () or (members,)
        Divisor, from `weight_of`.

    Returns
    -------
    penalty : array (), or 0.0 if nothing is penalised
    grads : list of arrays
        Gradients of the leaves.
    """
    xp = recipe.xp
    params, grads = recipe.layout.unpack(leaves, xp), list(grads)
    penalties = []
    apart = getattr(n, "ndim", 0) == 1  # each member has an n of its own
    for kind in dict.fromkeys(k for k in recipe.penalised if k is not None):
        scale = alphas[kind] / n
        squares: Any = 0.0
        for i, own in enumerate(recipe.penalised):
            if own == kind:
                p, by_axes = params[i], (-1, *(1,) * (params[i].ndim - 1))
                flat = xp.reshape(p, (p.shape[0], -1) if apart else (-1,))
                squares = squares + xp.vecdot(flat, flat)  # (), or (members,) if apart
                grads[i] += (xp.reshape(scale, by_axes) if apart else scale) * p
        of_kind = 0.5 * scale * squares
        penalties.append(xp.sum(of_kind) if apart else of_kind)
    penalty = reduce(add, penalties) if penalties else 0.0
    return penalty, recipe.layout.pack(grads, xp)


def update(
    recipe: Recipe, arrays: Arrays, grads: list[Array], n: Any, hyper: Hyper
) -> tuple[Arrays, Any]:
    """Update the parameters, given the gradient over all rows of the batch.

    Parameters
    ----------
    recipe : Recipe
    arrays : Arrays
        Donated: they may be overwritten.
    grads : list of arrays
        Gradients of the mean loss, in the order of the parameters.
    n : float or array, () or (members,)
        Sum of the weights of all rows.
    hyper : Hyper

    Returns
    -------
    arrays : Arrays
    penalty : array (), or 0.0 if nothing is penalised
    """
    penalty, grads = penalise(recipe, arrays.leaves, grads, hyper.alphas, n)
    return descend(recipe, arrays, grads, hyper), penalty


def descend(recipe: Recipe, arrays: Arrays, grads: list[Array], hyper: Hyper) -> Arrays:
    """Clip the gradients of the leaves and apply the optimizer's rule."""
    xp = recipe.xp
    if recipe.clip_norm is not None:
        grads = clip_by_global_norm(grads, recipe.clip_norm, xp, recipe.network.members)
    leaves, moments = list(arrays.leaves), list(arrays.moments)
    for kind, decays in enumerate(recipe.decays):
        own = [i for i, other in enumerate(recipe.kinds) if other == kind]
        updated = recipe.optimizer.apply(
            [leaves[i] for i in own],
            [grads[i] for i in own],
            [moments[i] for i in own],
            hyper.coefficients[kind],
            xp,
            **({"keep": hyper.keeps[kind]} if decays else {}),
        )
        for i, leaf, moment in zip(own, *updated, strict=True):
            leaves[i], moments[i] = leaf, moment
    return Arrays(leaves, moments)


def step(
    recipe: Recipe, arrays: Arrays, batch: Batch, hyper: Hyper
) -> tuple[Arrays, tuple[Array, Array]]:
    """Do one update; return the new arrays, and the loss and penalty before it.

    The input arrays are donated: use only the returned ones.
    """
    value, grads = sums(recipe, arrays.leaves, batch, hyper.forward)
    arrays, penalty = update(recipe, arrays, grads, weight_of(recipe, batch), hyper)
    return arrays, (value, penalty)


def first_half(
    recipe: Recipe, leaves: Params, batch: Batch, numbers: Any, total: Any = None
) -> Array:
    """Return `sums` as one vector: the leaves' gradients, the loss and, for weighted rows, Σ w.

    The loss is one number, or one for each member.  Σ w is one number, or one for each member
    if the members have separate rows.  It is left out if ``total`` is given.
    """
    xp = recipe.xp
    value, grads = sums(recipe, leaves, batch, numbers, total)
    # Joined from the parameters' gradients in the order of the leaves, not from packed leaves:
    # that would copy each gradient twice
    parts = [*(grads[i] for leaf in recipe.layout.leaves for i in leaf), value]
    if batch.weights is not None and total is None:
        parts.append(total_weight(batch.weights, xp))
    return xp.concat([xp.reshape(part, (-1,)) for part in parts])


def second_half(
    recipe: Recipe, arrays: Arrays, vector: Array, hyper: Hyper, n: float | None = None
) -> tuple[Arrays, tuple[Array, Array]]:
    """Update the parameters from vectors of `first_half`, summed over all rows of the batch.

    Parameters
    ----------
    recipe : Recipe
    arrays : Arrays
        Donated: they may be overwritten.
    vector : array
        Sum of the vectors of `first_half`.
    hyper : Hyper
    n : float, optional
        Number of rows, or sum of their weights.  It may be omitted for weighted rows, whose
        Σ w is at the end of the vector.

    Returns
    -------
    arrays : Arrays
    values : tuple of arrays
        Loss and penalty before the update.
    """
    xp, alphas, m = recipe.xp, hyper.alphas, recipe.n_losses
    grads, start = [], 0
    for leaf in arrays.leaves:
        size = prod(leaf.shape)
        grads.append(xp.reshape(vector[start : start + size], leaf.shape))
        start += size
    one = recipe.network.members is None
    value = vector[start] if one else vector[start : start + m]
    penalty: Any = 0.0
    if recipe.has_penalty:
        rest = vector.shape[0] - start - m  # entries of Σ w: one, or one for each member
        total = n if n is not None else vector[-1] if rest == 1 else vector[start + m :]
        by_param = recipe.layout.unpack(grads, xp)
        penalty, grads = penalise(recipe, arrays.leaves, by_param, alphas, total)
    return descend(recipe, arrays, grads, hyper), (value, penalty)

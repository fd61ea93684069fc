"""L-BFGS over all rows at once, by SciPy."""

from __future__ import annotations

import time
from collections.abc import Sequence
from math import isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray

from portable_mlp.callbacks import Callback, Epoch
from portable_mlp.steps import NO_NUMBERS, Batch, objective
from portable_mlp.training import DivergenceError, StopReason, Trainer
from portable_mlp.typing import Array, Params


def fit_lbfgs(
    trainer: Trainer,
    params: Params,
    data: Batch,
    *,
    max_iter: int,
    max_fun: int,
    callbacks: Sequence[Callback] = (),
) -> tuple[list[Array], float, int, StopReason, str]:
    """Minimise the loss over all rows by SciPy's L-BFGS-B.

    The value and the gradient are computed on the backend.  SciPy works on the host, in
    float64.  On NumPy, ``data.x`` may be sparse.

    Parameters
    ----------
    trainer : Trainer
        Settings.  Its network, loss, penalty, backend, dtype and ``tol`` (on the largest
        component of the gradient) are used; its optimizer and schedule are not.
    params : list of arrays
        Initial parameters.
    data : Batch
        All rows, on the backend.
    max_iter, max_fun : int
        Limits on the number of iterations and of loss evaluations.
    callbacks : sequence of Callback
        Callbacks, for which an iteration counts as an epoch.

    Returns
    -------
    params : list of arrays
        Final parameters, in order.
    loss : float
        Final loss, including the penalty.
    n_iter : int
        Number of iterations.
    reason : {"converged", "max_epochs", "stopped", "failed"}
    message : str
        SciPy's message.

    Raises
    ------
    DivergenceError
        If the loss or a parameter is not finite.
    ValueError
        If the network is an ensemble.
    """
    from scipy.optimize import minimize

    backend, recipe = trainer.backend, trainer.recipe
    if trainer.network.members is not None:
        raise ValueError("solver='lbfgs' cannot take an ensemble: its members have no line search")
    evaluate = backend.compile(objective, static=(0,))

    def split(theta: NDArray[np.float64]) -> list[Array]:
        ends = np.cumsum([leaf.size for leaf in shapes])[:-1]
        parts = np.split(theta, ends)
        return [
            backend.asarray(part.reshape(leaf.shape), trainer.dtype)
            for part, leaf in zip(parts, shapes, strict=True)
        ]

    def value_and_grad(theta: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        value, penalty, grads = evaluate(recipe, split(theta), data, trainer.alphas, NO_NUMBERS)
        known = backend.fetch([value, penalty] if recipe.has_penalty else [value])
        loss = trainer.reported(*known)
        flat = [backend.to_host(g).astype(np.float64).ravel() for g in grads]
        return float(loss), np.concatenate(flat)

    began = time.perf_counter()
    n_iter = 0

    def after_iteration(intermediate_result: Any) -> None:
        nonlocal n_iter
        n_iter += 1
        seconds = time.perf_counter() - began
        record = Epoch(n_iter, float(intermediate_result.fun), seconds=seconds)
        theta = intermediate_result.x
        for callback in callbacks:
            callback.on_epoch_begin(n_iter)  # SciPy reports only finished iterations
        # Every callback is called, even after one has asked to stop
        asked = [c.on_epoch_end(record, lambda: trainer.params(split(theta))) for c in callbacks]
        if any(asked):
            raise StopIteration

    for callback in callbacks:
        callback.on_fit_begin(max_iter)
    try:
        with backend.scope(trainer.dtype):
            shapes = [backend.to_host(leaf) for leaf in trainer.load(params)]
            # All parameters in one float64 vector, in the order of the leaves
            theta = np.concatenate([leaf.astype(np.float64).ravel() for leaf in shapes])
            result = minimize(
                value_and_grad,
                theta,
                method="L-BFGS-B",
                jac=True,
                callback=after_iteration if callbacks else None,
                options={"maxfun": max_fun, "maxiter": max_iter, "gtol": trainer.tol},
            )
    finally:
        for callback in callbacks:
            callback.on_fit_end()
    with backend.scope(trainer.dtype):
        if not np.isfinite(result.x).all() or not isfinite(result.fun):
            raise DivergenceError(trainer.divergence(int(result.nit), float(result.fun)))
        # SciPy's status codes; 99 means that the callback raised StopIteration
        reasons: dict[int, StopReason] = {0: "converged", 1: "max_epochs", 99: "stopped"}
        reason = reasons.get(result.status, "failed")
        params = trainer.params(split(result.x))
        return params, float(result.fun), int(result.nit), reason, str(result.message)

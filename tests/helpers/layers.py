"""Every layer and loss, and inputs and targets for them."""

from __future__ import annotations

import numpy as np

from portable_mlp.activations import ACTIVATIONS
from portable_mlp.layers import Dropout, Layer, Linear
from portable_mlp.losses import (
    LOSSES,
    BinaryCrossEntropy,
    Huber,
    Loss,
    Quantile,
    SoftmaxCrossEntropy,
)

N, D = 17, 5


def inputs(rng: np.random.RandomState, shape: tuple[int, ...]) -> np.ndarray:
    """Normal, but at least 0.01 from the kinks at zero."""
    x = rng.standard_normal(shape)
    return np.sign(x) * (np.abs(x) + 0.01)


def targets(loss: Loss, rng: np.random.RandomState, k: int) -> np.ndarray:
    if isinstance(loss, SoftmaxCrossEntropy):
        return rng.randint(k, size=N)
    if isinstance(loss, BinaryCrossEntropy):
        return rng.randint(2, size=(N, k)).astype(float)
    if loss == LOSSES["poisson"]:
        return rng.poisson(2.0, size=(N, k)).astype(float)
    return rng.standard_normal((N, 1 if loss == ALL_LOSSES["quantiles"] else k))


ALL_LOSSES = {
    **LOSSES,
    "softmax_smoothed": SoftmaxCrossEntropy(0.1),
    "binary_smoothed": BinaryCrossEntropy(0.2),
    "softmax_clipped": SoftmaxCrossEntropy(clipped=True),
    "binary_clipped": BinaryCrossEntropy(clipped=True),
    "huber_small": Huber(0.3),
    "quantile_90": Quantile(0.9),
    "quantiles": Quantile((0.1, 0.5, 0.8)),
}

LAYERS: dict[str, Layer] = {**ACTIVATIONS, "linear": Linear(D, 3), "dropout": Dropout(0.4)}

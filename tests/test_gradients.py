"""Derivatives against finite differences and torch's autograd; the checker against planted bugs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import array_api_compat.numpy as xp
import numpy as np
import pytest
from helpers.layers import ALL_LOSSES, LAYERS, D, N, inputs, targets

from portable_mlp import GradientError, check_layer, check_loss, mlp
from portable_mlp.activations import ACTIVATIONS
from portable_mlp.backends import NumPyBackend
from portable_mlp.layers import Layer, Linear, Param
from portable_mlp.losses import (
    Huber,
    SquaredError,
)
from portable_mlp.optimizers import SGD
from portable_mlp.steps import NO_NUMBERS, Batch, objective
from portable_mlp.training import Trainer


@pytest.mark.parametrize("name", LAYERS)
def test_layer_meets_finite_differences(name, rng, record_property):
    error = check_layer(LAYERS[name], inputs(rng, (N, D)))
    record_property("gradient checks: largest relative error", f"layer {name:24s} {error:.1e}")


@pytest.mark.parametrize("size", [1e-3, 1e8])
def test_right_layers_pass_at_any_scale(size, rng):
    check_layer(ACTIVATIONS["gelu"], size * inputs(rng, (N, D)))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("name", ALL_LOSSES)
def test_loss_meets_finite_differences(name, k, weighted, rng, record_property):
    loss = ALL_LOSSES[name]
    weights = rng.uniform(0, 2, N) if weighted else None
    z, y = inputs(rng, (N, k)), targets(loss, rng, k)
    if isinstance(loss, Huber):
        # Off the kinks, where a difference straddles two pieces
        y = np.where(np.abs(np.abs(z - y) - loss.delta) < 0.01, y + 0.05, y)
    error = check_loss(loss, z, y, weights)
    record_property(
        "gradient checks: largest relative error",
        f"loss  {name:24s} {error:.1e}  outputs {k}, weighted {weighted}",
    )


def torch_activation(name: str) -> Any:
    F = pytest.importorskip("torch").nn.functional
    return {
        "identity": lambda x: x,
        "logistic": F.sigmoid,
        "tanh": F.tanh,
        "relu": F.relu,
        "leaky_relu": F.leaky_relu,
        "elu": F.elu,
        "selu": F.selu,
        "gelu": lambda x: F.gelu(x, approximate="tanh"),
        "silu": F.silu,
        "mish": F.mish,
        "softplus": lambda x: F.softplus(x, threshold=1e9),
    }[name]


def torch_loss(name: str) -> Any:
    """Per-row losses, written with torch's functions."""
    torch = pytest.importorskip("torch")
    F = torch.nn.functional
    q = torch.tensor([0.1, 0.5, 0.8], dtype=torch.float64)
    return {
        "binary_cross_entropy": lambda z, y: F.binary_cross_entropy_with_logits(
            z, y, reduction="none"
        ).sum(1),
        "softmax_cross_entropy": lambda z, y: F.cross_entropy(z, y, reduction="none"),
        "softmax_clipped": lambda z, y: F.nll_loss(F.softmax(z, 1).log(), y, reduction="none"),
        "binary_clipped": lambda z, y: F.binary_cross_entropy(
            F.sigmoid(z), y, reduction="none"
        ).sum(1),
        "softmax_smoothed": lambda z, y: F.cross_entropy(
            z, y, reduction="none", label_smoothing=0.1
        ),
        "binary_smoothed": lambda z, y: F.binary_cross_entropy_with_logits(
            z, 0.8 * y + 0.1, reduction="none"
        ).sum(1),
        "squared_error": lambda z, y: 0.5 * F.mse_loss(z, y, reduction="none").sum(1),
        "poisson": lambda z, y: (
            F.poisson_nll_loss(z, y, reduction="none") + torch.xlogy(y, y) - y
        ).sum(1),
        "huber": lambda z, y: F.huber_loss(z, y, reduction="none").sum(1),
        "huber_small": lambda z, y: F.huber_loss(z, y, reduction="none", delta=0.3).sum(1),
        "quantile": lambda z, y: torch.maximum(0.5 * (y - z), -0.5 * (y - z)).sum(1),
        "quantile_90": lambda z, y: torch.maximum(0.9 * (y - z), -0.1 * (y - z)).sum(1),
        "quantiles": lambda z, y: torch.maximum(q * (y - z), (q - 1.0) * (y - z)).sum(1),
    }[name]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("loss_name", ALL_LOSSES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_network_meets_autograd_and_differences(activation, loss_name, weighted, rng):
    """Every activation with every loss: value, penalty and all gradients."""
    torch = pytest.importorskip("torch")
    k, alpha, loss = 3, 0.3, ALL_LOSSES[loss_name]
    network = mlp([D, 6, 4, k], activation)
    params = [0.7 * p for p in network.init(rng)]
    x, y = rng.standard_normal((N, D)), targets(loss, rng, k)
    w = rng.uniform(0, 2, N) if weighted else None
    trainer = Trainer(network, loss, SGD(), NumPyBackend(), "float64", 1.0, alpha=alpha)
    recipe, layout = trainer.recipe, trainer.recipe.layout

    def packed(params: list[np.ndarray]) -> tuple[float, list[np.ndarray]]:
        value, penalty, grads = objective(
            recipe, layout.pack(params, xp), Batch(x, y, w), trainer.alphas, NO_NUMBERS
        )
        return float(value + penalty), layout.unpack(grads, xp)

    value, grads = packed(params)

    leaves = [torch.tensor(p, requires_grad=True) for p in params]
    z = torch.tensor(x)
    for i in range(0, len(leaves), 2):
        z = z @ leaves[i] + leaves[i + 1]
        if i < len(leaves) - 2:
            z = torch_activation(activation)(z)
    rows = torch_loss(loss_name)(z, torch.tensor(y))
    share = torch.ones(N, dtype=torch.float64) if w is None else torch.tensor(w)
    l2 = sum((leaf**2).sum() for leaf in leaves[::2])
    wanted = (rows * share).sum() / share.sum() + 0.5 * alpha * l2 / share.sum()
    wanted.backward()

    assert value == pytest.approx(float(wanted.detach()), rel=1e-12)
    for grad, leaf in zip(grads, leaves, strict=True):
        np.testing.assert_allclose(grad, leaf.grad.numpy(), rtol=1e-9, atol=1e-12)

    h = 1e-6
    directions = [rng.standard_normal(p.shape) for p in params]
    ahead = packed([p + h * u for p, u in zip(params, directions, strict=True)])[0]
    behind = packed([p - h * u for p, u in zip(params, directions, strict=True)])[0]
    slope = sum(float(np.sum(g * u)) for g, u in zip(grads, directions, strict=True))
    assert slope == pytest.approx((ahead - behind) / (2 * h), rel=1e-5, abs=1e-7)


# ---------------------------------------------------------------- planted bugs


@dataclass(frozen=True)
class WrongActivation(Layer):
    """d tanh = 1 − y, not 1 − y²."""

    def forward(self, p, x, xp):
        y = xp.tanh(x)
        return y, y

    def backward(self, p, y, dy, xp):
        return dy * (1.0 - y)


@dataclass(frozen=True)
class OneWrongElement(Linear):
    """The gradient of a single weight is off by a hundredth."""

    def gradients(self, p, x, dz, xp):
        dw, db = super().gradients(p, x, dz, xp)
        dw[2, 1] *= 1.01
        return dw, db


@dataclass(frozen=True)
class WrongShape(Linear):
    def gradients(self, p, x, dz, xp):
        dw, db = super().gradients(p, x, dz, xp)
        return dw, db[None, :]


@dataclass(frozen=True)
class Forgetful(Linear):
    def gradients(self, p, x, dz, xp):
        return super().gradients(p, x, dz, xp)[:1]


@dataclass(frozen=True)
class Mutating(Layer):
    def forward(self, p, x, xp):
        x *= 2.0
        return x, None

    def backward(self, p, residual, dy, xp):
        return 2.0 * dy


@dataclass(frozen=True)
class Silent(WrongActivation):
    def backward(self, p, y, dy, xp):
        return None


@dataclass(frozen=True)
class SharedScale(Layer):
    """One's own layer with a parameter of its own: y = s x."""

    @property
    def params(self):
        return (Param("scale", (D,), lambda rng, shape, *_: rng.uniform(1, 2, shape), 1, 1),)

    def forward(self, p, x, xp):
        return p[0] * x, x

    def backward(self, p, x, dy, xp):
        return dy * p[0]

    def gradients(self, p, x, dy, xp):
        return (xp.sum(dy * x, axis=0),)


def test_own_layer_passes(rng):
    assert check_layer(SharedScale(), rng.standard_normal((N, D))) < 1e-8


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (
            WrongActivation(),
            r"WrongActivation: the derivative with respect to the input is wrong.*Worst at \[",
        ),
        (OneWrongElement(D, 3), r"with respect to parameter 'weight' is wrong.*Worst at \[2, 1\]"),
        (WrongShape(D, 3), r"with respect to parameter 'bias' has shape \(1, 3\), expected \(3,\)"),
        (Forgetful(D, 3), "returns 1 arrays for 2 parameters"),
        (Mutating(), "changes an array it was given"),
        (Silent(), r"with respect to the input has shape None, expected \(17, 5\)"),
    ],
)
def test_checker_finds_planted_layer_bug(layer, message, rng):
    with pytest.raises(GradientError, match=message):
        check_layer(layer, rng.standard_normal((N, D)))


class HalfValue(SquaredError):
    """Value and gradient that disagree by a factor."""

    def per_row(self, z, y, xp):
        values, dz = super().per_row(z, y, xp)
        return 0.5 * values, dz


class ForgetsWeights(SquaredError):
    def __call__(self, z, y, xp, weights=None):
        value, _ = super().__call__(z, y, xp, weights)
        return value, super().__call__(z, y, xp)[1]


class NaNAtOne(SquaredError):
    def per_row(self, z, y, xp):
        values, dz = super().per_row(z, y, xp)
        dz[1, 0] = np.nan
        return values, dz


@pytest.mark.parametrize("loss", [HalfValue(), ForgetsWeights(), NaNAtOne()])
def test_checker_finds_planted_loss_bug(loss, rng):
    z, y, w = rng.standard_normal((N, 2)), rng.standard_normal((N, 2)), rng.uniform(0, 1, N)
    with pytest.raises(GradientError, match="the derivative with respect to the logits is wrong"):
        check_loss(loss, z, y, w)


def test_oracle_comparison_would_see_a_planted_bug(rng, monkeypatch):
    """The autograd comparison has to fail when backward is wrong."""
    monkeypatch.setitem(ACTIVATIONS, "tanh", WrongActivation())
    with pytest.raises(AssertionError):
        test_network_meets_autograd_and_differences("tanh", "squared_error", False, rng)

"""Layers and losses on every backend: the same numbers as NumPy, stable at the extremes."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.layers import ALL_LOSSES, LAYERS, targets
from hypothesis import given, settings
from hypothesis import strategies as st

from portable_mlp import Network, functions, mlp
from portable_mlp.activations import ELU
from portable_mlp.backends import Backend, NumPyBackend
from portable_mlp.layers import Dropout, random_bits
from portable_mlp.losses import (
    BinaryCrossEntropy,
    Huber,
    Quantile,
    SoftmaxCrossEntropy,
    SquaredError,
)
from portable_mlp.optimizers import OPTIMIZERS, SGD, SklearnAdam, SklearnSGD
from portable_mlp.schedules import Clock
from portable_mlp.steps import Arrays, Batch, step
from portable_mlp.training import Trainer

N, D = 17, 5
XP = NumPyBackend().xp
CLOCK = Clock(0, 1, 0, 0)


def close(got, wanted, tol):
    assert got.shape == np.shape(wanted)
    scale = max(1e-30, float(np.max(np.abs(wanted))))
    np.testing.assert_allclose(got / scale, wanted / scale, rtol=0, atol=tol)


@pytest.mark.parametrize("name", LAYERS)
def test_layer_matches_numpy(name, target, rng):
    layer = LAYERS[name]
    params = [p.init(rng, p.shape, p.fan_in, p.fan_out) for p in layer.params]
    x = rng.standard_normal((N, D))
    (numbers,) = Network((layer,)).per_step(CLOCK, [12345] * ("key" in layer.numbers)) or ((),)
    noise = dict(zip(layer.numbers, numbers, strict=True))

    def both(xp):
        def run(params, x, dy):
            y, residual = layer.forward(params, x, xp, **noise)
            return [
                y,
                layer.backward(params, residual, dy, xp),
                *layer.gradients(params, residual, dy, xp),
            ]

        return run

    dy = rng.standard_normal((N, getattr(layer, "n_out", D)))
    wanted = both(XP)(params, x, dy)
    for got, want in zip(target.run(both(target.xp), params, x, dy), wanted, strict=True):
        assert str(got.dtype) == target.dtype
        close(got, want, target.tol)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", ALL_LOSSES)
def test_loss_matches_numpy(name, weighted, target, rng):
    loss, k = ALL_LOSSES[name], 3
    z, y = rng.standard_normal((N, k)), targets(loss, rng, k)
    w = rng.uniform(0, 2, N) if weighted else None
    wanted = loss(z, y, XP, w)
    got = target.run(lambda z, y, w: loss(z, y, target.xp, w), z, y, w)
    for g, want in zip(got, wanted, strict=True):
        assert str(g.dtype) == target.dtype
        close(g, want, target.tol)
    link = target.run(lambda z: loss.link(z, target.xp), z)
    close(link, loss.link(z, XP), target.tol)


@pytest.mark.parametrize(
    "optimizer",
    [*(cls() for cls in OPTIMIZERS.values()), SklearnAdam(), SklearnSGD(), SGD(momentum=0.9)],
    ids=repr,
)
def test_step_matches_numpy(optimizer, target, rng):
    network = mlp([D, 6, 3], "tanh", dropout=0.3)
    params = network.init(rng)
    x, y = rng.standard_normal((N, D)), rng.randint(3, size=N)
    w = rng.uniform(0, 2, N)

    def one(xp):
        loss, backend = SoftmaxCrossEntropy(), Backend(xp)
        backend.packs = False
        trainer = Trainer(
            network, loss, optimizer, backend, target.dtype, 0.01, alpha=0.1, clip_norm=0.1
        )
        hyper, _ = trainer.hyper(CLOCK, None, (77,))

        def run(params, x, y, w):
            # Copied inside: a step may overwrite its state, never its batch
            leaves = [xp.asarray(p, copy=True) for p in params]
            arrays = Arrays(leaves, optimizer.init(leaves, xp))
            arrays, losses = step(trainer.recipe, arrays, Batch(x, y, w), hyper)
            return list(losses), list(arrays.leaves), list(arrays.moments)

        return run

    wanted = one(XP)([p.copy() for p in params], x, y, w)
    got = target.run(one(target.xp), params, x, y, w)
    for group, want in zip(got, wanted, strict=True):
        for a, b in zip(group, want, strict=True):
            for g, v in zip(np.atleast_1d(a), np.atleast_1d(b), strict=True):
                # Adam divides by √v: where a gradient is small its rounding is not
                np.testing.assert_allclose(
                    g,
                    v,
                    rtol=1e-8 if target.dtype == "float64" else 1e-2,
                    atol=1e-12 if target.dtype == "float64" else 1e-4,
                )


# ---------------------------------------------------------------- stability


def test_logits_of_ten_thousand(target):
    """Values at ±1e4 are exact, and no backend warns."""
    z = np.array([[1e4, -1e4], [-1e4, 1e4], [0.0, 0.0]])
    xp = target.xp

    def run(z, ones, zeros, labels):
        return (
            functions.sigmoid(z, xp),
            functions.softmax(z, xp),
            functions.softplus(z, xp),
            functions.log_softmax(z, xp),
            *BinaryCrossEntropy()(z, ones, xp),
            *BinaryCrossEntropy()(z, zeros, xp),
            *SoftmaxCrossEntropy()(z, labels, xp),
        )

    got = target.run(run, z, np.ones((3, 2)), np.zeros((3, 2)), np.array([0, 0, 0]))
    log2 = np.log(2.0)
    half = [0.5, 0.5]
    bce = (2e4 + 2 * log2) / 3
    wanted = (
        np.array([[1, 0], [0, 1], half]),
        np.array([[1, 0], [0, 1], half]),
        np.array([[1e4, 0], [0, 1e4], [log2, log2]]),
        np.array([[0, -2e4], [-2e4, 0], [-log2, -log2]]),
        bce,
        np.array([[0, -1], [-1, 0], [-0.5, -0.5]]) / 3,
        bce,
        np.array([[1, 0], [0, 1], half]) / 3,
        (2e4 + log2) / 3,
        np.array([[0, 0], [-1, 1], [-0.5, 0.5]]) / 3,
    )
    for g, w in zip(got, wanted, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-6 if target.dtype == "float32" else 1e-14)


@given(st.floats(-1e4, 1e4), st.floats(-1e4, 1e4))
def test_sigmoid_and_softmax_against_extended_precision(a, b):
    z = np.array([[a, b]])
    wide = z.astype(np.longdouble)
    sigmoid = 1 / (1 + np.exp(-np.maximum(wide, -11000.0)))
    np.testing.assert_allclose(
        functions.sigmoid(z, XP), sigmoid.astype(float), rtol=4e-16 * 4, atol=1e-300
    )
    shifted = wide - wide.max()
    softmax = np.exp(shifted) / np.exp(shifted).sum()
    # The difference to the maximum is rounded, and exp multiplies that error by its size
    rtol = np.finfo(float).eps * (4 + abs(a - b))
    np.testing.assert_allclose(
        functions.softmax(z, XP), softmax.astype(float), rtol=rtol, atol=1e-300
    )


# ---------------------------------------------------------------- dropout


def test_dropout_mask_is_bit_identical(target, rng):
    x = np.zeros((64, 33))
    bits = target.run(lambda x: random_bits(x, 987654321, target.xp), x)
    assert bits.dtype == np.int32
    assert np.array_equal(bits, reference_bits(64 * 33, 987654321).reshape(64, 33))


def reference_bits(n: int, key: int) -> np.ndarray:
    """The hash in Python's unbounded integers."""

    def mix(h: int) -> int:
        h = ((h ^ (h >> 16)) * 0x7FEB352D) % 2**32
        h = ((h ^ (h >> 15)) * 0x846CA68B) % 2**32
        return h ^ (h >> 16)

    return np.array([mix(mix(i) ^ key) % 2**31 for i in range(n)])


@settings(max_examples=20)
@given(st.integers(0, 2**31 - 1), st.sampled_from([0.1, 0.5, 0.9]))
def test_dropout_keeps_the_mean(key, rate):
    network = Network((Dropout(rate),))
    y, _ = network.forward((), np.ones((200, 100)), XP, network.per_step(CLOCK, [key]))
    # Six standard deviations of a mean of 20 000 draws
    assert abs(y.mean() - 1.0) < 6 * np.sqrt(rate / (1 - rate) / 20_000)


def test_dropout_keys_are_independent():
    masks = [random_bits(np.ones((100, 100)), key, XP) % 2 for key in (1, 2, 3)]
    for i in range(3):
        for j in range(i):
            assert abs((masks[i] == masks[j]).mean() - 0.5) < 0.03
    # ... and not one another's permutation
    assert len({int(np.sum(mask)) for mask in masks}) > 1


def test_prediction_has_no_noise(rng):
    network = mlp([D, 8, 2], dropout=0.5)
    params, x = network.init(rng), rng.standard_normal((N, D))
    z, _ = network.forward(params, x, XP)
    assert np.array_equal(z, network(params, x, XP))
    assert not np.array_equal(z, network.forward(params, x, XP, network.per_step(CLOCK, [3]))[0])


# ---------------------------------------------------------------- structure


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: BinaryCrossEntropy(1.0), r"label_smoothing must be in \[0, 1\), got 1.0"),
        (lambda: SoftmaxCrossEntropy(-0.1), r"label_smoothing must be in \[0, 1\), got -0.1"),
        (lambda: Huber(0.0), "delta must be positive"),
        (lambda: Quantile(1.0), r"quantile must be in \(0, 1\)"),
        (lambda: Quantile((0.5, 1.0)), r"quantile must be in \(0, 1\)"),
        (lambda: Quantile((0.5, 0.5)), "quantiles have to rise"),
        (lambda: Quantile([0.9, 0.1]), "quantiles have to rise"),
        (lambda: Quantile(()), "quantiles have to rise"),
        (lambda: Quantile(np.array([0.2, 0.1])), "quantiles have to rise"),
        (lambda: Quantile((0.1, 0.9)).n_logits(2), "a single target, got 2"),
        (lambda: ELU(alpha=-1.0), "alpha and scale must be positive"),
        (lambda: ELU(scale=0.0), "alpha and scale must be positive"),
    ],
)
def test_settings_beyond_their_range_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_widths_that_do_not_fit_name_the_layer():
    from portable_mlp import Network
    from portable_mlp.layers import Linear

    with pytest.raises(ValueError, match=r"layer 1, Linear\(n_in=7.*takes 7 columns.*give 5"):
        Network((Linear(3, 5), Linear(7, 2)))


def test_unknown_activation_names_the_nearest():
    with pytest.raises(ValueError, match="unknown activation 'rleu'. Did you mean 'relu'"):
        mlp([3, 4, 1], "rleu")


def test_activation_per_layer():
    network = mlp([3, 4, 5, 1], ["tanh", "relu"])
    assert [type(layer).__name__ for layer in network.layers] == [
        "Linear", "Tanh", "Linear", "ReLU", "Linear",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="one for each of the 2 hidden layers, got 1"):
        mlp([3, 4, 5, 1], ["tanh"])


def test_zero_weights_in_a_batch_give_no_gradient(target):
    got = target.run(
        lambda z, y, w: SquaredError()(z, y, target.xp, w),
        np.ones((3, 1)), np.zeros((3, 1)), np.zeros(3),
    )  # fmt: skip
    assert got[0] == 0.0
    assert not got[1].any()


def test_gradients_of_the_first_layer_need_no_input_gradient(rng, monkeypatch):
    from portable_mlp.layers import Linear

    calls = []
    backward = Linear.backward
    monkeypatch.setattr(
        Linear, "backward", lambda self, *a: calls.append(self) or backward(self, *a)
    )
    network = mlp([D, 4, 4, 1])
    params, x = network.init(rng), rng.standard_normal((N, D))
    z, residuals = network.forward(params, x, XP)
    network.backward(params, residuals, z, XP)
    assert [layer.n_in for layer in calls] == [4, 4]

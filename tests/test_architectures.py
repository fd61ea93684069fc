"""Networks beyond the plain MLP: members of an ensemble, embeddings, groups of their own."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pytest
from helpers.paths import DATA
from helpers.targets import get_target
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning

from portable_mlp import (
    Layer,
    MLPClassifier,
    MLPRegressor,
    Network,
    check_layer,
    load,
    mlp,
    register,
    save,
)
from portable_mlp.activations import Tanh
from portable_mlp.architectures import MLP, Architecture, Fixed
from portable_mlp.backends import get_backend, to_host
from portable_mlp.groups import Treatment
from portable_mlp.initializers import GlorotUniform
from portable_mlp.layers import Dropout, Linear, Param, Repeat
from portable_mlp.losses import LOSSES, BinaryCrossEntropy, SoftmaxCrossEntropy
from portable_mlp.members import PerMember
from portable_mlp.optimizers import SGD, AdamW, RMSprop
from portable_mlp.persistence import save_checkpoint
from portable_mlp.schedules import Clock, Scheduled, Step
from portable_mlp.sources import ArraySource
from portable_mlp.steps import NO_NUMBERS, Batch, sums
from portable_mlp.training import Trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning"),
    # A step that runs eagerly where it should not warns of it
    pytest.mark.filterwarnings("error::RuntimeWarning"),
]

N, D, K = 60, 5, 3
RNG = np.random.RandomState(1)
X = RNG.standard_normal((N, D))
LABELS = np.argmax(X[:, :K] + 0.3 * RNG.standard_normal((N, K)), axis=1)
WEIGHTS = RNG.uniform(0.1, 2.0, N)


@register
@dataclass(frozen=True)
class Embedding(Layer):
    """y = [x, z] with z_j = tanh(x_j w_j) V_j for each column j: small products of its own.

    x (..., n, d), w (..., d, 1, width), V (..., d, width, n_each).
    """

    n_in: int
    width: int = 4
    n_each: int = 2
    members: int | None = None

    @property
    def n_out(self) -> int:
        return self.n_in * (1 + self.n_each)

    @property
    def params(self):
        lead = () if self.members is None else (self.members,)
        shapes = (self.n_in, 1, self.width), (self.n_in, self.width, self.n_each)
        return tuple(
            Param(name, (*lead, *shape), GlorotUniform(), *shape[1:], "embedding", self.members)
            for name, shape in zip("wv", shapes, strict=True)
        )

    def _swapped(self, x, xp):
        """Rows and columns, the axes before the last, change places."""
        lead = range(x.ndim - 3)
        return xp.permute_dims(x, (*lead, x.ndim - 2, x.ndim - 3, x.ndim - 1))

    def forward(self, p, x, xp):
        w, v = p
        columns = self._swapped(x[..., None], xp)  # (..., d, n, 1)
        h = xp.tanh(columns * w)
        z = self._swapped(xp.matmul(h, v), xp)
        z = xp.reshape(z, (*x.shape[:-1], self.n_in * self.n_each))
        return xp.concat([x, z], axis=-1), (columns, h)

    def _split(self, dy, xp):
        own, rest = dy[..., : self.n_in], dy[..., self.n_in :]
        rest = xp.reshape(rest, (*dy.shape[:-1], self.n_in, self.n_each))
        return own, self._swapped(rest, xp)

    def backward(self, p, residual, dy, xp):
        (w, v), (_, h) = p, residual
        dx, dz = self._split(dy, xp)
        du = (1.0 - h * h) * xp.matmul(dz, v.mT)
        return dx + xp.sum(self._swapped(du * w, xp), axis=-1)

    def gradients(self, p, residual, dy, xp):
        _, v = p
        columns, h = residual
        _, dz = self._split(dy, xp)
        du = (1.0 - h * h) * xp.matmul(dz, v.mT)
        return xp.sum(columns * du, axis=-2, keepdims=True), xp.matmul(h.mT, dz)


@register
@dataclass(frozen=True)
class Embedded(Architecture):
    members: int | None = None

    def __call__(self, n_in, n_out):
        embedding = Embedding(n_in, members=self.members)
        first = () if self.members is None else (Repeat(self.members),)
        linear = Linear(embedding.n_out, n_out, members=self.members)
        return Network((*first, embedding, linear))


def own_function(n_in, n_out):
    return Network((Linear(n_in, 6), Tanh(), Linear(6, n_out)))


RATES = (1.0, 0.5, 2.0, 0.1, 0.7, 1.5, 0.3, 1.0)
DROPS = (0.0, 0.1, 0.2, 0.5, 0.3, 0.0, 0.4, 0.25)
TOYS = {
    "embedding": {
        "architecture": Embedded(),
        "treatments": {"embedding": Treatment(2.0, schedule=Step(2, 0.5))},
        "alpha": 0.1,
    },
    "members": {
        "architecture": MLP((7,), "tanh", dropout=DROPS, members=8),
        "treatments": {"weight": Treatment(RATES, decay=tuple(2.0 * r for r in RATES))},
        "solver": "adamw",
        "clip_norm": 0.5,
    },
    "members, embedded": {
        "architecture": Embedded(3),
        "treatments": {
            "embedding": Treatment((0.1, 1.0, 3.0), schedule=Step(2, 0.5)),
            "bias": Treatment(0.1, penalty=0.0),
        },
        "solver": "rmsprop",
        "alpha": 0.5,
    },
    "a function": {"architecture": own_function},
}


def estimator(toy, kind=MLPClassifier, **more):
    settings = {"max_iter": 6, "batch_size": 25, "random_state": 0, "learning_rate_init": 0.02}
    return kind(**settings | TOYS[toy] | more)


@pytest.mark.parametrize("members", [None, 3])
def test_the_layers_derivatives(members, rng):
    shape = (9, D) if members is None else (members, 9, D)
    x = rng.standard_normal(shape)
    assert check_layer(Embedding(D, members=members), x) < 1e-8
    assert check_layer(Linear(D, 4, members=members), x) < 1e-8
    if members:
        assert check_layer(Repeat(members), x) < 1e-8
        assert check_layer(Repeat(members), x[0]) < 1e-8
        assert check_layer(Dropout((0.0, 0.5, 0.9)), x) < 1e-8


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("toy", TOYS)
def test_on_every_engine(toy, weighted, target):
    weights = WEIGHTS if weighted else None
    wanted = estimator(toy, dtype=target.dtype).fit(X, LABELS, weights)
    with target.scope():
        mine = estimator(toy, dtype=target.dtype).fit(target.array(X), LABELS, weights)
        got = [to_host(p) for p in mine.params_]
        probabilities = to_host(mine.predict_proba(target.array(X)))
    bound = 1e-10 if target.dtype == "float64" else 1e-4
    for a, b in zip(got, wanted.params_, strict=True):
        assert np.abs(a - b).max() <= bound * np.abs(b).max()
    np.testing.assert_allclose(mine.loss_curve_, wanted.loss_curve_, rtol=bound)
    np.testing.assert_allclose(probabilities, wanted.predict_proba(X), rtol=0, atol=bound)


@pytest.mark.parametrize("name", ["numpy-eager", "numpy-loops"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("toy", TOYS)
def test_numpy_s_engines_give_the_same_bits(toy, dtype, name, request):
    target = get_target(name, request)
    with get_target("numpy", request).scope():
        wanted = estimator(toy, dtype=dtype).fit(X, LABELS, WEIGHTS)
    with target.scope():
        got = estimator(toy, dtype=dtype).fit(X, LABELS, WEIGHTS)
    for a, b in zip(got.params_, wanted.params_, strict=True):
        assert np.array_equal(a, b)
    assert got.loss_curve_ == wanted.loss_curve_


@pytest.mark.parametrize("toy", TOYS)
def test_saved_and_loaded(toy, tmp_path):
    for kind, y in ((MLPClassifier, LABELS), (MLPRegressor, X[:, 0] * X[:, 1])):
        model = estimator(toy, kind).fit(X, y)
        again = load(save(model, tmp_path / "model"))
        assert again.network_ == model.network_
        assert np.array_equal(again.predict(X), model.predict(X))
        np.testing.assert_array_equal(again.fit(X, y).predict(X), model.predict(X))
    if toy == "a function":
        assert again.architecture == Fixed(model.network_.layers)
        with pytest.raises(ValueError, match="its network takes 5 columns and gives 1, the data"):
            again.fit(X[:, :3], y)


@pytest.mark.parametrize("toy", TOYS)
def test_goes_on_from_a_checkpoint(toy, tmp_path):
    whole = estimator(toy).fit(X, LABELS, WEIGHTS)
    half = estimator(toy).continue_fit(X, LABELS, WEIGHTS, n_iter=3)
    save_checkpoint(half, tmp_path / "half")
    again = load(tmp_path / "half").continue_fit(X, LABELS, WEIGHTS)
    for a, b in zip(again.params_, whole.params_, strict=True):
        assert np.array_equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("toy", TOYS)
def test_exported(toy):
    ours = pytest.importorskip("portable_mlp.persistence.onnx")
    ort = pytest.importorskip("onnxruntime")
    rows = X.astype(np.float32)
    for kind, y in (
        (MLPClassifier, LABELS), (MLPClassifier, LABELS == 1),
        (MLPClassifier, np.eye(K, dtype=int)[LABELS]), (MLPRegressor, X[:, :2] * X[:, 1:3]),
    ):  # fmt: skip
        model = estimator(toy, kind, max_iter=40).fit(rows, y)
        graph = ours.to_onnx(model).SerializeToString()
        session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
        for some in (rows, rows[:1], rows[:2], rows[:8]):
            *label, values = session.run(None, {"X": some})
            if label:
                assert np.array_equal(label[0], model.predict(some))
                wanted = model.predict_proba(some)
            else:
                wanted = model.predict(some)
            np.testing.assert_allclose(values, wanted, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- members, against one network


RULES = [SGD(), SGD(momentum=0.9, weight_decay=0.1), AdamW(weight_decay=0.2), RMSprop()]
TARGETS = {
    "softmax_cross_entropy": LABELS.astype(np.int32),
    "binary_cross_entropy": np.eye(K)[LABELS],
    "squared_error": X[:, :K] ** 2,
    "poisson": np.round(np.abs(X[:, :K])),
}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("optimizer", RULES, ids=lambda o: type(o).__name__)
@pytest.mark.parametrize("loss", TARGETS)
def test_each_member_is_a_network_alone(loss, optimizer, weighted):
    rates, decays, backend = (1.0, 0.3, 2.5), (1.0, 0.0, 4.0), get_backend()
    batch = Batch(X, TARGETS[loss], WEIGHTS if weighted else None)

    def trained(network, params, treatment):
        trainer = Trainer(
            network, LOSSES[loss], optimizer, backend, "float64", 0.01, alpha=0.3, clip_norm=0.4,
            batch_size=25, treatments={"weight": treatment, "bias": treatment}, tol=0.0,
        )  # fmt: skip
        state = trainer.start(params)
        trainer.fit(state, ArraySource(batch), 8, np.random.RandomState(0))
        return trainer.params(state.final_leaves), [epoch.loss for epoch in state.history]

    together = mlp([D, 6, K], "tanh", members=3)
    params = together.init(np.random.RandomState(0))
    got, curve = trained(together, params, Treatment(rates, decays))
    curves = []
    for j, (rate, decay) in enumerate(zip(rates, decays, strict=True)):
        own = [p[j] if p.shape[1] > 1 else p[j, 0] for p in params]
        alone, losses = trained(mlp([D, 6, K], "tanh"), own, Treatment(rate, decay))
        curves.append(losses)
        for a, b in zip(got, alone, strict=True):
            np.testing.assert_allclose(a[j].reshape(b.shape), b, rtol=0, atol=1e-12)
    np.testing.assert_allclose(curve, np.mean(curves, axis=0), rtol=1e-12)


@pytest.mark.parametrize("loss", TARGETS)
def test_the_loss_of_members(loss, rng):
    loss, y = LOSSES[loss], TARGETS[loss]
    z = rng.standard_normal((4, N, K))
    for weights in (None, np.stack([WEIGHTS, np.zeros(N), WEIGHTS**2, np.ones(N)])):
        values, dz = loss(z, np.stack([y] * 4), np, weights)
        for j in range(4):
            value, gradient = loss(z[j], y, np, None if weights is None else weights[j])
            assert values[j] == pytest.approx(value, rel=1e-14, abs=1e-300)
            np.testing.assert_allclose(dz[j], gradient, rtol=1e-14)


def test_rows_of_the_members_own(rng):
    """(members, n, d), with weights of their own, are to each what (n, d) is to one network."""
    together, alone = mlp([D, 4, K], "tanh", members=3), mlp([D, 4, K], "tanh")
    make = SoftmaxCrossEntropy(), SGD(), get_backend(), "float64", 0.1
    params = together.init(rng)
    x, y = rng.standard_normal((3, N, D)), rng.randint(K, size=(3, N)).astype(np.int32)
    weights = rng.uniform(size=(3, N))
    trainer = Trainer(together, *make)
    values, grads = sums(trainer.recipe, trainer.load(params), Batch(x, y, weights), NO_NUMBERS)
    for j in range(3):
        one = Trainer(alone, *make)
        own = [p[j].reshape(q.shape) for p, q in zip(params, alone.params, strict=True)]
        batch = Batch(x[j], y[j], weights[j])
        value, wanted = sums(one.recipe, one.load(own), batch, NO_NUMBERS)
        assert values[j] == pytest.approx(value, rel=1e-13)
        for a, b in zip(grads, wanted, strict=True):
            np.testing.assert_allclose(a[j].reshape(b.shape), b, rtol=0, atol=1e-14)


@pytest.mark.parametrize("loss", LOSSES)
def test_together_members_predict_the_mean_of_their_predictions(loss, rng):
    loss, z = LOSSES[loss], 3.0 * rng.standard_normal((4, N, K))
    wanted = np.mean([loss.link(member, np) for member in z], axis=0)
    np.testing.assert_allclose(loss.link(loss.pool(z, np), np), wanted, rtol=1e-12)
    far = np.array([[[1e4, -1e4]], [[1e4, -1e4]]])
    if loss.link_name != "exp":
        assert np.isfinite(loss.pool(far, np)).all()


def test_masks_of_members_have_their_own_rates():
    x = np.ones((4, 300, 50))
    layer = Dropout((0.0, 0.25, 0.5, 0.9))
    threshold, scale = layer.per_step(Clock(0, 1, 0, 0))
    y, _ = layer.forward((), x, np, 7, threshold.values, scale.values)
    zeros = (y == 0.0).mean(axis=(1, 2))
    np.testing.assert_allclose(zeros, layer.rate, atol=0.02)
    kept = [np.unique(member[member != 0.0]) for member in y]
    np.testing.assert_allclose(np.ravel(kept), [1 / (1 - rate) for rate in layer.rate])
    falling = Dropout(Scheduled((0.2, 0.8), Step(1, 0.5)))
    threshold, _ = falling.per_step(Clock(9, 10, 1, 0))
    np.testing.assert_allclose(threshold.values.ravel() / 2**31, [0.1, 0.4], rtol=1e-9)


@pytest.mark.parametrize("name", ["numpy", "numpy-eager", "torch", "jax", "cupy-emulated"])
def test_scheduled_smoothing(name, request):
    """Each epoch's smoothing, in one fit, is that of fits with it alone."""
    target = get_target(name, request)
    losses = SoftmaxCrossEntropy, BinaryCrossEntropy
    for loss in losses[: 1 if name == "jax" else 2]:  # JAX compiles each of four fits
        y = LABELS if loss is SoftmaxCrossEntropy else LABELS == 1
        with target.scope():
            x = target.array(X)
            alike = {"shuffle": False, "solver": SGD()}
            falling = loss(Scheduled(0.4, Step(1, 0.5)))
            moving = estimator("a function", loss=falling, max_iter=3, **alike).fit(x, y)
            one = estimator("a function", max_iter=1, warm_start=True, **alike)
            for smoothing in (0.4, 0.2, 0.1):
                one.set_params(loss=loss(smoothing)).fit(x, y)
            for a, b in zip(moving.params_, one.params_, strict=True):
                np.testing.assert_allclose(to_host(a), to_host(b), rtol=0, atol=1e-13)
    with pytest.raises(ValueError, match="label_smoothing must be in"):
        SoftmaxCrossEntropy(Scheduled(1.5, Step(1)))


# ---------------------------------------------------------------- estimators


@pytest.mark.parametrize("toy", TOYS)
def test_an_estimator_as_any_other(toy):
    model = estimator(toy, max_iter=60, early_stopping=True)
    model.fit(X, LABELS, sample_weight=WEIGHTS)
    assert model.score(X, LABELS) > 0.5
    assert model.predict_proba(X).shape == (N, K)
    np.testing.assert_allclose(model.predict_proba(X).sum(axis=1), 1.0)
    np.testing.assert_allclose(np.exp(model.predict_log_proba(X)), model.predict_proba(X))
    assert [p.shape for p in model.params_] == [p.shape for p in model.network_.params]
    again = pickle.loads(pickle.dumps(model))
    assert np.array_equal(again.predict_proba(X), model.predict_proba(X))
    assert np.array_equal(clone(model).fit(X, LABELS, WEIGHTS).predict(X), model.predict(X))


def test_of_an_ensemble_the_hidden_layer_of_each_member(monkeypatch):
    model = estimator("members").fit(X, LABELS)
    w, b = model.params_[:2]
    wanted = np.tanh(X @ w + b)
    np.testing.assert_allclose(model.hidden_activations(X), wanted, atol=1e-12)
    monkeypatch.setattr("portable_mlp.estimators.inference._CHUNK", 5)  # rows in many chunks
    np.testing.assert_allclose(model.hidden_activations(X), wanted, atol=1e-12)


def test_scikit_learn_s_attributes_are_views():
    model = MLPClassifier((4,), max_iter=2).fit(X, LABELS)
    assert [p.shape for p in model.coefs_] == [(D, 4), (4, K)]
    assert all(a is b for a, b in zip(model.coefs_, model.params_[::2], strict=True))
    assert all(a is b for a, b in zip(model.intercepts_, model.params_[1::2], strict=True))
    assert model.layer_params_ == []
    before = model.predict_proba(X)
    shown = model.coefs_
    shown[0] = np.zeros((D, 4))
    assert not shown[0].any()
    assert not model.params_[0].any()
    model.intercepts_[-1] += 5.0
    model.intercepts_[:] = [b * 0.0 for b in model.intercepts_]
    assert not any(b.any() for b in model.params_[1::2])
    model.coefs_ = [w * 0.0 for w in model.coefs_]
    np.testing.assert_allclose(model.predict_proba(X), 1.0 / K)
    assert not np.allclose(before, 1.0 / K)
    assert type(pickle.loads(pickle.dumps(model.coefs_))) is list
    with pytest.raises(ValueError, match="zip"):
        model.coefs_ = model.coefs_[:1]
    embedded = estimator("embedding").fit(X, LABELS)
    assert [p.shape for p in embedded.layer_params_] == [(D, 1, 4), (D, 4, 2)]


def test_pickles_from_before_there_were_networks():
    model = MLPClassifier((4, 3), max_iter=2).fit(X, LABELS)
    state = model.__getstate__() | {
        "coefs_": list(model.coefs_), "intercepts_": list(model.intercepts_), "layer_params_": [],
    }  # fmt: skip
    del state["params_"], state["network_"], state["architecture"]
    again = MLPClassifier.__new__(MLPClassifier)
    again.__setstate__(state)
    assert np.array_equal(again.predict_proba(X), model.predict_proba(X))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        again.partial_fit(X, LABELS)
    assert not np.array_equal(again.predict_proba(X), model.predict_proba(X))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"hidden_layer_sizes": (3,)}, "an architecture says .* leave hidden_layer_sizes out"),
        ({"activation": "tanh", "dropout": 0.1}, "leave activation and dropout out"),
        ({"architecture": lambda n_in, n_out: None}, "expected a function that gives a Network"),
        ({"architecture": lambda n_in, n_out: mlp([n_in, n_out + 1])}, "gives 4, the data have"),
        ({"architecture": "mlp"}, "architecture"),
        ({"architecture": MLP(members=0)}, "members must be at least 1"),
        ({"architecture": MLP((3,), dropout=(0.1, 0.2), members=3)}, "for as many members"),
        ({"architecture": MLP((3,), dropout=(0.1, 0.2))}, "for as many members"),
        ({"architecture": MLP((3,), dropout=(0.1, 1.2), members=2)}, "dropout must be in"),
        (
            {"architecture": MLP(members=2), "treatments": {"bias": Treatment((1.0, 2.0, 3.0))}},
            "rate of 'bias': 3 values for 2 members",
        ),
        ({"treatments": {"bias": Treatment(decay=(1.0, 2.0))}}, "2 values for no members"),
        ({"architecture": MLP(members=2), "solver": "lbfgs"}, "cannot take an ensemble"),
    ],
)
def test_what_cannot_be(settings, words):
    with pytest.raises(ValueError, match=words):
        MLPClassifier(**{"architecture": own_function, **settings}).fit(X, LABELS)


def test_what_files_cannot_hold(tmp_path):
    @dataclass(frozen=True)
    class Unknown(Tanh):
        pass

    network = Network((Linear(D, 4), Unknown(), Linear(4, K)))
    model = MLPClassifier(architecture=lambda *_: network, max_iter=1).fit(X, LABELS)
    with pytest.raises(TypeError, match="Unknown"):
        save(model, tmp_path / "model")
    with pytest.raises(TypeError, match="only dataclasses"):
        register(own_function)
    other = dataclass(frozen=True)(type("Linear", (Tanh,), {}))
    with pytest.raises(ValueError, match="a class of the name Linear is registered"):
        register(other)
    with pytest.raises(ValueError, match="one number for all members"):
        AdamW(weight_decay=Scheduled((0.1, 0.2), Step(1)))


@register
@dataclass(frozen=True)
class Noted(Tanh):
    """Fields as people write them."""

    anything: Any = 3
    literal: Literal["a", "b"] | None = "a"
    dict: int = 3  # a name that marks maps in files
    derived: int = field(init=False, default=4)
    callback: Callable[[int], int] | None = None
    later: "NotThere" = 1.5  # noqa: F821, UP037 (imported for type checkers alone)


@register
@dataclass(frozen=True)
class Careless(Tanh):
    note: int = None


def test_registered_classes_of_any_fields(tmp_path):
    def chain(layer):
        return lambda n_in, n_out: Network((Linear(n_in, 4), layer, Linear(4, n_out)))

    model = MLPClassifier(architecture=chain(Noted()), max_iter=1).fit(X, LABELS)
    again = load(save(model, tmp_path / "model"))
    assert again.network_ == model.network_
    assert np.array_equal(again.predict(X), model.predict(X))
    model = MLPClassifier(architecture=chain(Careless()), max_iter=1).fit(X, LABELS)
    with pytest.raises(TypeError, match="could not be read again: Careless of note=None"):
        save(model, tmp_path / "model")


@dataclass(frozen=True)
class Scale(Layer):
    """One number, or one for each member, without axes beside."""

    members: int | None = None

    @property
    def params(self):
        shape = () if self.members is None else (self.members,)
        return (Param("scale", shape, lambda rng, s, i, o: np.ones(s), 1, 1, members=self.members),)

    def _axes(self, p, xp):
        return p[0] if self.members is None else p[0][:, None, None]

    def forward(self, p, x, xp):
        return x[()] * self._axes(p, xp), x

    def backward(self, p, x, dy, xp):
        return dy * self._axes(p, xp)

    def gradients(self, p, x, dy, xp):
        axes = (-2, -1)
        return (xp.sum(dy * x, axis=axes),)


@dataclass(frozen=True)
class Odd(Layer):
    """Sums and extremes along each axis, and parts without elements."""

    def forward(self, p, x, xp):
        m = xp.max(x, axis=-1, keepdims=True)
        e = xp.exp(x - m)
        y = e / xp.sum(e, axis=-1, keepdims=True)
        turned = xp.concat([y[..., 2:], y[..., :2]], axis=-1)
        return turned, y

    def backward(self, p, y, dy, xp):
        n = y.shape[-1] - 2
        dy = xp.concat([dy[..., n:], dy[..., :n]], axis=-1)
        return y * (dy - xp.sum(dy * y, axis=-1, keepdims=True))


@pytest.mark.parametrize("members", [None, 1, 3])
@pytest.mark.parametrize("width", [2, 4, 20])
@pytest.mark.parametrize("name", ["numpy", "numpy-loops", "torch", "jax", "cupy-emulated"])
def test_layers_that_look_along_axes(name, width, members, request):
    target = get_target(name, request)

    def build(n_in, n_out):
        first = () if members is None else (Repeat(members),)
        return Network((
            *first, Linear(n_in, width, members=members), Odd(), Scale(members),
            Linear(width, n_out, members=members),
        ))  # fmt: skip

    settings = {"max_iter": 8, "batch_size": 25, "random_state": 0, "learning_rate_init": 0.05}
    with get_target("numpy-eager", request).scope():
        wanted = MLPClassifier(architecture=build, **settings).fit(X, LABELS)
    with target.scope():
        got = MLPClassifier(architecture=build, **settings).fit(target.array(X), LABELS)
        probabilities = to_host(got.predict_proba(target.array(X)))
    np.testing.assert_allclose(probabilities, wanted.predict_proba(X), rtol=0, atol=1e-10)


def test_lists_where_tuples_are_meant():
    network = Network([Linear(D, 4), Tanh(), Linear(4, K)])
    model = MLPClassifier(architecture=Fixed(list(network.layers)), max_iter=20)
    assert model.fit(X, LABELS).network_ == network
    assert MLP([4], ["tanh"], [0.1, 0.2], 2) == MLP(4, ("tanh",), (0.1, 0.2), 2)

    @dataclass(frozen=True)
    class Listed(Tanh):
        items: Any = field(default_factory=list)

    with pytest.raises(TypeError, match="layer 1, .*Listed.*have to be hashable"):
        Network((Linear(D, 4), Listed(), Linear(4, K)))
    for members in (2.0, True, 0, "3"):
        with pytest.raises(ValueError, match="members must be at least 1"):
            MLP((4,), members=members)(D, K)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.InconsistentVersionWarning")
def test_files_from_before_there_were_networks():

    folder = DATA
    with np.load(folder / "format_2.npz") as known:
        x, y, probabilities, continued = (
            known[name] for name in ("X", "y", "probabilities", "continued")
        )
    model = load(folder / "format_2.safetensors")
    np.testing.assert_allclose(model.predict_proba(x), probabilities, rtol=1e-12)
    again = load(folder / "format_2_checkpoint.safetensors").continue_fit(x, y)
    np.testing.assert_allclose(again.predict_proba(x), continued, rtol=1e-12)


def test_logistic_among_other_activations_begins_as_these():
    """Only a network of logistic layers alone has their bound of the first values."""
    for activation, bound in ((("logistic", "relu"), 6.0), (("logistic", "logistic"), 2.0)):
        network = MLP((50, 50), activation)(50, 50)
        largest = max(np.abs(p).max() for p in network.init(np.random.RandomState(0)))
        limit = np.sqrt(bound / 100)
        assert 0.99 * limit < largest <= limit


def test_whole_and_broken_numbers_of_members():
    values = PerMember((1, 0.5, 2), ndim=2)
    assert values.dtype is float
    assert values.values.ravel().tolist() == [1.0, 0.5, 2.0]
    assert PerMember((1, 2), ndim=3).dtype is int


@dataclass(frozen=True, kw_only=True)
class Limited(SGD):
    """An optimizer defined elsewhere, whose coefficients do not take arrays, and change them."""

    def coefficients(self, step: int, rate: Any) -> Any:
        rate *= 0.5
        return min(rate, 0.03), self.momentum


def test_custom_optimizers_get_one_rate_at_a_time():
    network = mlp([D, 4, 1], members=2)
    treatments = {"weight": Treatment(rate=(1.0, 0.1), decay=(1.0, 2.0))}
    trainer = Trainer(
        network, LOSSES["squared_error"], Limited(weight_decay=0.5), get_backend(), "float64", 0.1,
        treatments=treatments,
    )  # fmt: skip
    hyper, _ = trainer.hyper(Clock(0, 10, 0, 0), None)
    kind = trainer.groups.kinds["weight"]
    np.testing.assert_allclose(hyper.coefficients[kind][0].values.ravel(), [0.03, 0.005])
    np.testing.assert_allclose(hyper.keeps[kind].values.ravel(), [0.95, 0.99])

"""Update rules against torch.optim and scikit-learn, and what packing must not change."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import chain
from math import nan, prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.datasets import load_iris
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network._stochastic_optimizers import AdamOptimizer, SGDOptimizer

from portable_mlp import MLPClassifier, load, mlp, optimizers
from portable_mlp.backends import BACKENDS, Backend, NumPyBackend, get_backend
from portable_mlp.groups import Treatments
from portable_mlp.initializers import Zeros
from portable_mlp.layers import Param
from portable_mlp.losses import SquaredError
from portable_mlp.optimizers import (
    OPTIMIZERS,
    SGD,
    Adam,
    AdamW,
    Optimizer,
    RMSprop,
    SklearnAdam,
    SklearnSGD,
    clip_by_global_norm,
)
from portable_mlp.packing import Layout
from portable_mlp.persistence import save_checkpoint
from portable_mlp.sources import ArraySource
from portable_mlp.steps import Batch
from portable_mlp.training import Trainer

XP = NumPyBackend().xp
STEPS = 100
SHAPES = ((4, 3), (3, 2), (3,), (2,))
GROUPS = ("weight", "weight", "bias", "bias")
SIZES = [prod(shape) for shape in SHAPES]

# Ours; the name in torch.optim and its arguments.  torch's own weight decay is coupled
# except in AdamW, so it stays 0 elsewhere.
TORCH = {
    "sgd": (SGD(), "SGD", {}),
    "sgd-momentum": (SGD(momentum=0.9), "SGD", {"momentum": 0.9}),
    "sgd-nesterov": (
        SGD(momentum=0.8, nesterov=True),
        "SGD",
        {"momentum": 0.8, "nesterov": True},
    ),
    "adam": (Adam(), "Adam", {}),
    "adam-large-epsilon": (
        Adam(beta_1=0.8, beta_2=0.9, epsilon=0.1),
        "Adam",
        {"betas": (0.8, 0.9), "eps": 0.1},
    ),
    "adam-decoupled": (Adam(weight_decay=0.3), "AdamW", {"weight_decay": 0.3}),
    "adamw": (AdamW(), "AdamW", {}),
    "adamw-no-decay": (AdamW(weight_decay=0.0), "AdamW", {"weight_decay": 0.0}),
    "rmsprop": (RMSprop(), "RMSprop", {}),
    "rmsprop-large-epsilon": (
        RMSprop(rho=0.8, epsilon=0.1),
        "RMSprop",
        {"alpha": 0.8, "eps": 0.1},
    ),
}
SKLEARN = {
    "sklearn-sgd": (SklearnSGD(), {}),
    "sklearn-sgd-heavy-ball": (
        SklearnSGD(momentum=0.7, nesterov=False),
        {"momentum": 0.7, "nesterov": False},
    ),
    "sklearn-sgd-plain": (
        SklearnSGD(momentum=0.0, nesterov=False),
        {"momentum": 0.0, "nesterov": False},
    ),
    "sklearn-adam": (SklearnAdam(), {}),
    "sklearn-adam-large-epsilon": (
        SklearnAdam(beta_1=0.8, beta_2=0.9, epsilon=0.1),
        {"beta_1": 0.8, "beta_2": 0.9, "epsilon": 0.1},
    ),
}
ALL = {name: case[0] for name, case in {**TORCH, **SKLEARN}.items()} | {
    "sgd-decay": SGD(weight_decay=0.1),
    "adamw-weights-only": AdamW(weight_decay=0.3, decay_biases=False),
}


def start() -> list[np.ndarray]:
    rng = np.random.RandomState(0)
    return [rng.standard_normal(shape) for shape in SHAPES]


def gradient(params):
    """Of ½ xᵀQx + Σ cos(3x) over all parameters x, with Q positive definite and not diagonal."""
    x = np.concatenate([np.asarray(p, np.float64).ravel() for p in params])
    root = np.random.RandomState(1).standard_normal((x.size, x.size)) / np.sqrt(x.size)
    g = (root @ root.T) @ x - 3.0 * np.sin(3.0 * x)
    parts = np.split(g, np.cumsum(SIZES)[:-1])
    return [part.reshape(shape) for part, shape in zip(parts, SHAPES, strict=True)]


def rates(base: float) -> list[float]:
    """Another rate every ten steps, up as well as down."""
    return [base * (1.0, 0.3, 0.7, 0.05)[step // 10 % 4] for step in range(STEPS)]


def stepped(optimizer, params, grads, moments, c, xp, groups):
    """A step of parameters in groups, treated as by default."""
    labels = tuple(Param("p", (), None, 0, 0, group) for group in groups)
    treatments = Treatments.of(labels, optimizer)
    new_params, new_moments = list(params), list(moments)
    for kind, treatment in enumerate(treatments.updates):
        own = [i for i, group in enumerate(groups) if treatments.kinds[group] == kind]
        decay = optimizer.weight_decay * treatment.decay
        keep = 1.0 - c[0] * decay if decay else None
        found = optimizer.apply(
            *([a[i] for i in own] for a in (params, grads, moments)), c, xp, keep
        )
        for i, p, m in zip(own, *found, strict=True):
            new_params[i], new_moments[i] = p, m
    return new_params, new_moments


def ours(optimizer, base, xp=XP):
    """Parameters after each step."""
    params, path = start(), []
    moments = optimizer.init(params, xp)
    for step, rate in enumerate(rates(base), start=1):
        c = optimizer.coefficients(step, rate)
        params, moments = stepped(optimizer, params, gradient(params), moments, c, xp, GROUPS)
        path.append([p.copy() for p in params])
    return path


def difference(path, wanted):
    """Largest |Δ| over all steps, relative to the largest parameter of the step."""
    a, b = (np.stack([np.concatenate([p.ravel() for p in at]) for at in x]) for x in (path, wanted))
    return float(np.max(np.max(np.abs(a - b), axis=1) / np.max(np.abs(b), axis=1)))


def concrete(base=Optimizer):
    """The package's own rules; tests elsewhere may define more."""
    children = {c for c in base.__subclasses__() if c.__module__ == optimizers.__name__}
    return {c for c in children if not inspect.isabstract(c)}.union(*map(concrete, children))


def test_every_optimizer_has_an_oracle():
    checked = {type(case[0]) for case in chain(TORCH.values(), SKLEARN.values())}
    assert checked == concrete()
    assert set(OPTIMIZERS.values()) <= checked


# ---------------------------------------------------------------- oracles


def torch_path(name, arguments, base, weights_only=False):
    torch = pytest.importorskip("torch", reason="torch.optim is the oracle")
    params = [torch.from_numpy(p) for p in start()]
    groups = [{"params": params}]
    if weights_only:
        groups = [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.0}]
    optimizer, path = getattr(torch.optim, name)(groups, lr=base, **arguments), []
    for rate in rates(base):
        for group in optimizer.param_groups:
            group["lr"] = rate
        for p, g in zip(params, gradient([p.numpy() for p in params]), strict=True):
            p.grad = torch.from_numpy(g)
        optimizer.step()
        path.append([p.numpy().copy() for p in params])
    return path


@pytest.mark.parametrize("name", TORCH)
def test_follows_torch(name):
    optimizer, *oracle = TORCH[name]
    wanted = torch_path(*oracle, base=0.02)
    assert difference(wanted[-1:], [start()]) > 0.05  # far from where it began
    assert difference(ours(optimizer, 0.02), wanted) <= 1e-10


def test_adamw_without_decay_of_biases_follows_two_groups_of_torch():
    path = ours(AdamW(weight_decay=0.3, decay_biases=False), 0.02)
    arguments = ("AdamW", {"weight_decay": 0.3}, 0.02)
    assert difference(path, torch_path(*arguments, weights_only=True)) <= 1e-10
    assert difference(path, torch_path(*arguments)) > 1e-3


@pytest.mark.parametrize("name", SKLEARN)
def test_follows_sklearn(name):
    optimizer, arguments = SKLEARN[name]
    adam = isinstance(optimizer, SklearnAdam)
    params, wanted = start(), []
    oracle = (AdamOptimizer if adam else SGDOptimizer)(params, **arguments)
    for rate in rates(0.02):
        setattr(oracle, "learning_rate_init" if adam else "learning_rate", rate)
        oracle.update_params(params, gradient(params))
        wanted.append([p.copy() for p in params])
    assert difference(wanted[-1:], [start()]) > 0.05
    assert difference(ours(optimizer, 0.02), wanted) <= 1e-12


def test_comparison_would_see_the_other_convention():
    """The planted twins: rates outside or inside the velocity, ε inside or outside the root."""
    momentum = ours(SklearnSGD(momentum=0.9, nesterov=False), 0.02)
    assert difference(ours(SGD(momentum=0.9), 0.02), momentum) > 1e-3
    assert difference(ours(Adam(), 0.02), ours(SklearnAdam(), 0.02)) > 1e-9


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_decay_of_sgd_by_hand(momentum):
    optimizer = SGD(momentum=momentum, weight_decay=0.5, decay_biases=False)
    w, b, gw, gb = ([2.0, -4.0], [1.0], [3.0, 1.0], [-2.0])
    params, grads = [np.asarray(w), np.asarray(b)], [np.asarray(gw), np.asarray(gb)]
    moments = optimizer.init(params, XP)
    c = optimizer.coefficients(1, 0.1)
    (w, b), _ = stepped(optimizer, params, grads, moments, c, XP, ("weight", "bias"))
    # w (1 − 0.1 · 0.5) − 0.1 g; a first step has no momentum yet
    np.testing.assert_allclose(w, [1.9 - 0.3, -3.8 - 0.1], rtol=1e-15)
    np.testing.assert_allclose(b, [1.2], rtol=1e-15)


# ---------------------------------------------------------------- clipping


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("share", [0.1, 0.999, 1.001, 10.0])
def test_clipping_follows_torch(library, share):
    torch = pytest.importorskip("torch", reason="clip_grad_norm_ is the oracle")
    grads = gradient(start())
    norm = np.sqrt(sum(np.sum(g**2) for g in grads))
    params = [torch.zeros(shape, dtype=torch.float64) for shape in SHAPES]
    for p, g in zip(params, grads, strict=True):
        p.grad = torch.from_numpy(g.copy())
    torch.nn.utils.clip_grad_norm_(params, share * norm)
    backend = get_backend(backend=library, device="cpu")
    clipped = clip_by_global_norm([backend.asarray(g) for g in grads], share * norm, backend.xp)
    clipped = [backend.to_host(g) for g in clipped]
    for got, p, g in zip(clipped, params, grads, strict=True):
        np.testing.assert_allclose(got, p.grad.numpy(), rtol=1e-12)
        assert np.array_equal(got, g) == (share > 1.0)
    length = np.sqrt(sum(np.sum(g**2) for g in clipped))
    np.testing.assert_allclose(length, min(share, 1.0) * norm, rtol=1e-6)


def test_clipping_of_zero_gradients_leaves_them():
    for g in clip_by_global_norm([np.zeros((2, 3)), np.zeros(3)], 1.0, XP):
        assert not g.any()


# ---------------------------------------------------------------- hyper-parameters


@pytest.mark.parametrize("value", [-0.1, nan])
@pytest.mark.parametrize(
    ("optimizer", "name"),
    [
        *((rule, "weight_decay") for rule in sorted(concrete(), key=lambda c: c.__name__)),
        (SGD, "momentum"),
        (SklearnSGD, "momentum"),
        (Adam, "beta_1"),
        (AdamW, "beta_2"),
        (SklearnAdam, "epsilon"),
        (RMSprop, "rho"),
        (RMSprop, "epsilon"),
    ],
)
def test_negative_and_nan_are_refused(optimizer, name, value):
    with pytest.raises(ValueError, match=f"^{name} must be at least 0 and finite, got {value!r}$"):
        optimizer(**{name: value})


def test_numpys_scalars_are_checked_too():
    for value in (np.float32(-1), np.float32("nan"), np.int64(-1)):
        with pytest.raises(ValueError, match="weight_decay must be at least 0 and finite"):
            AdamW(weight_decay=value)


@pytest.mark.parametrize(
    ("optimizer", "name"),
    [
        (SGD, "momentum"),
        (SklearnSGD, "momentum"),
        (Adam, "beta_1"),
        (AdamW, "beta_2"),
        (RMSprop, "rho"),
    ],
)
def test_above_one_is_refused(optimizer, name):
    with pytest.raises(ValueError, match=f"^{name} must be .*, got 1.5$"):
        optimizer(**{name: 1.5})


@dataclass(frozen=True, kw_only=True)
class Halved(SGD):
    """A user's rule, which reads its own settings."""

    kind: str = "any"
    floor: float | None = None

    def update(self, p, g, moments, c, xp):
        return p - c[0] * self.momentum * g, moments


@dataclass(frozen=True, kw_only=True)
class HalvedWhole(SGD):
    def apply(self, params, grads, moments, c, xp, keep=None):
        return [p - c[0] * self.momentum * g for p, g in zip(params, grads, strict=True)], moments


@pytest.mark.parametrize("rule", [Halved, HalvedWhole])
def test_a_rule_of_ones_own_sees_its_own_settings(rule):
    trainer = Trainer(
        mlp([2, 1]), SquaredError(), rule(momentum=0.5), get_backend(), "float64", 0.1
    )
    x, y = np.ones((3, 2)), np.zeros((3, 1))
    moved = []
    for t in (trainer, replace(trainer, optimizer=SGD(), learning_rate=0.05)):
        state = t.start([np.ones((2, 1)), np.zeros(1)])
        t.fit(state, ArraySource(Batch(x, y)), 1, np.random.RandomState(0))
        moved.append(t.params(state.final_leaves))
    np.testing.assert_array_equal(moved[0][0], moved[1][0])
    assert moved[0][0][0, 0] == 1.0 - 0.05 * 2.0


def test_nesterov_needs_momentum():
    with pytest.raises(ValueError, match="nesterov=True needs a momentum above 0"):
        SGD(nesterov=True)


def test_accepted_betas_have_coefficients():
    try:
        optimizer = Adam(beta_1=1.0)
    except ValueError:
        return
    assert np.isfinite(optimizer.coefficients(1, 0.1)).all()


# ---------------------------------------------------------------- data types and packing


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("library", ["numpy", "array_api_strict", "torch", "jax"])
def test_float32_stays(name, library):
    """On NumPy and torch in place; where assignments rebind, nothing but the rule holds it."""
    pytest.importorskip(library, reason=f"{library} is not installed")
    known = library in BACKENDS
    backend = get_backend("cpu", library) if known else Backend(import_module(library))
    optimizer = ALL[name]
    with backend.scope("float64"):
        params = [backend.asarray(p, "float32") for p in start()]
        grads = [backend.asarray(g, "float32") for g in gradient(start())]
        moments = optimizer.init(params, backend.xp)
        for step in (1, 2):
            c = optimizer.coefficients(step, 0.01)
            assert all(type(value) is float for value in c)
            params, moments = stepped(optimizer, params, grads, moments, c, backend.xp, GROUPS)
        clipped = clip_by_global_norm(grads, 0.5, backend.xp)
    assert all(len(m) == optimizer.n_moments for m in moments)
    assert all(a.dtype == backend.dtype("float32") for a in chain(params, clipped, *moments))


def layout(shapes, groups, treatment):
    params = [Param("p", s, Zeros(), 1, 1, g) for s, g in zip(shapes, groups, strict=True)]
    return Layout.plan(tuple(params), treatment)


@pytest.mark.parametrize("name", ALL)
def test_packing_changes_no_update(name):
    """Elementwise rules: the same bits, whether 4 arrays or one vector, or two."""
    optimizer, results = ALL[name], []
    labels = tuple(Param("p", (), None, 0, 0, group) for group in GROUPS)
    for treatment in (None, Treatments.of(labels, optimizer).kinds.get):
        plan = layout(SHAPES, GROUPS, treatment)
        apart = bool(optimizer.weight_decay) and not optimizer.decay_biases
        assert len(plan.leaves) == (4 if treatment is None else 1 + apart)
        leaves = plan.pack(start(), XP)
        moments = optimizer.init(leaves, XP)
        for step in range(1, 6):
            grads = plan.pack(gradient(plan.unpack(leaves, XP)), XP)
            c = optimizer.coefficients(step, 0.02)
            leaves, moments = stepped(optimizer, leaves, grads, moments, c, XP, plan.groups)
        results.append(plan.unpack(leaves, XP))
    for one, other, first in zip(*results, start(), strict=True):
        np.testing.assert_array_equal(one, other)
        assert not np.array_equal(one, first)


@given(
    params=st.lists(
        st.tuples(
            hnp.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=4),
            st.sampled_from(["weight", "bias", "scale"]),
        ),
        min_size=1,
        max_size=8,
    ),
    treatment=st.sampled_from([None, str, len, bool]),
)
def test_packing_keeps_values_shapes_and_order(params, treatment):
    shapes, groups = zip(*params, strict=True)
    numbers = iter(range(10_000))
    arrays = [np.reshape([next(numbers) for _ in range(prod(s))], s).astype(float) for s in shapes]
    plan = layout(shapes, groups, treatment)
    leaves = plan.pack(arrays, XP)

    if treatment is None:
        assert plan.leaves == tuple((i,) for i in range(len(params)))
    else:
        # One leaf for each treatment, in it group after group
        assert len(plan.leaves) == len({treatment(g) for g in groups})
        for members, group in zip(plan.leaves, plan.groups, strict=True):
            assert {treatment(groups[i]) for i in members} == {treatment(group)}
            assert list(members) == sorted(members, key=lambda i: (groups.index(groups[i]), i))
    assert sorted(chain(*plan.leaves)) == list(range(len(params)))
    in_order = np.concatenate([arrays[i].ravel() for i in chain(*plan.leaves)])
    np.testing.assert_array_equal(np.concatenate([leaf.ravel() for leaf in leaves]), in_order)
    for array, back in zip(arrays, plan.unpack(leaves, XP), strict=True):
        assert back.shape == array.shape
        np.testing.assert_array_equal(back, array)


def test_unpacked_parameters_are_views_of_the_vector():
    plan = layout(SHAPES, GROUPS, str)
    leaves = plan.pack(start(), XP)
    leaves[0][...] = 7.0
    weights, biases = plan.unpack(leaves, XP)[:2], plan.unpack(leaves, XP)[2:]
    assert all((w == 7.0).all() for w in weights)
    for b, first in zip(biases, start()[2:], strict=True):
        np.testing.assert_array_equal(b, first)


@pytest.mark.parametrize("members", [None, 2])
def test_the_running_average_of_the_parameters(members, target):
    """By hand, from the parameters after each step: weights δᵗ that sum to one."""
    decay, n = 0.8, 5
    rng = np.random.RandomState(0)
    x, y = rng.standard_normal((20, 3)), rng.standard_normal((20, 1))
    network = mlp([3, 4, 1], "tanh", members=members)
    params = network.init(rng)

    def after(n_steps, average):
        trainer = Trainer(
            network, SquaredError(), AdamW(average=average), target.backend, target.dtype, 0.05,
            batch_size=20, tol=0.0, patience=100,
        )  # fmt: skip
        with target.scope():
            data = Batch(target.array(x), target.array(y))
        state = trainer.start(params)
        trainer.fit(state, ArraySource(data), n_steps, np.random.RandomState(0))
        return [target.backend.to_host(p) for p in trainer.params(state.final_leaves)]

    each = [after(t + 1, 0.0) for t in range(n)]
    share = decay ** np.arange(n - 1, -1, -1)
    share /= share.sum()
    for i, got in enumerate(after(n, decay)):
        wanted = sum(w * p[i] for w, p in zip(share, each, strict=True))
        np.testing.assert_allclose(got, wanted, rtol=100 * target.tol, atol=10 * target.tol)


def test_a_fit_with_an_average_goes_on_exactly(tmp_path):
    x, y = load_iris(return_X_y=True)
    for early in (False, True):
        settings = {
            "solver": AdamW(average=0.9), "random_state": 0, "early_stopping": early,
            "n_iter_no_change": 100, "hidden_layer_sizes": (8,), "batch_size": 30,
        }  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            whole = MLPClassifier(**settings, max_iter=9).fit(x, y)
            part = MLPClassifier(**settings, max_iter=9).continue_fit(x, y, n_iter=4)
            save_checkpoint(part, tmp_path / "c.safetensors")
            for model in (part, load(tmp_path / "c.safetensors")):
                model.continue_fit(x, y)
                for a, b in zip(model.params_, whole.params_, strict=True):
                    np.testing.assert_array_equal(a, b)


def test_partial_fit_goes_on_from_the_last_parameters_not_from_their_average():
    """Calls with one batch each end where one fit over these batches does."""
    x, y = load_iris(return_X_y=True)
    settings = {"random_state": 0, "hidden_layer_sizes": (8,), "batch_size": 50, "shuffle": False}
    for average in (0.0, 0.9):
        solver = AdamW(average=average)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            whole = MLPClassifier(solver=solver, max_iter=4, **settings).fit(x, y)
        part = MLPClassifier(solver=solver, **settings)
        for start in [0, 50, 100] * 4:
            rows = slice(start, start + 50)
            part.partial_fit(x[rows], y[rows], classes=[0, 1, 2])
        for a, b in zip(part.params_, whole.params_, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9)

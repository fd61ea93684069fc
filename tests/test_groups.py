"""Groups of parameters and their treatments; numbers that change within a fit."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
import pytest
from helpers.steps import case, fit
from helpers.targets import TARGETS, get_target

from portable_mlp import Layer, MLPClassifier, Network, load, mlp, save
from portable_mlp.activations import Tanh
from portable_mlp.backends import NumPyBackend, to_host
from portable_mlp.engines import jax_scan
from portable_mlp.engines.host import replay as replay_module
from portable_mlp.groups import Treatment, Treatments
from portable_mlp.initializers import Zeros
from portable_mlp.layers import Dropout, Linear, Param
from portable_mlp.losses import SquaredError
from portable_mlp.optimizers import SGD, Adam, AdamW, RMSprop
from portable_mlp.schedules import (
    Adaptive,
    Clock,
    Cosine,
    ReduceOnPlateau,
    Schedule,
    Scheduled,
    Step,
)
from portable_mlp.sources import ArraySource
from portable_mlp.steps import Batch
from portable_mlp.training import Trainer

NUMPY = NumPyBackend()
CLOCK = Clock(0, 10, 0, 0)


@dataclass(frozen=True)
class Scale(Layer):
    """y = s x, with a group of its own."""

    n: int

    @property
    def params(self):
        return (Param("scale", (self.n,), Zeros(), 1, 1, group="scale"),)

    def forward(self, p, x, xp):
        return (1.0 + p[0]) * x, x

    def backward(self, p, x, dy, xp):
        return (1.0 + p[0]) * dy

    def gradients(self, p, x, dy, xp):
        return (xp.sum(x * dy, axis=0),)


NETWORK = Network((Scale(5), Linear(5, 4), Tanh(), Linear(4, 2)))
EACH = {
    "scale": Treatment(rate=3.0, decay=0.0, penalty=0.5),
    "weight": Treatment(rate=0.5, decay=2.0),
    "bias": Treatment(penalty=0.25, decay=0.5),
}


def trained(trainer, epochs=4, params=None):
    """Parameters after a fit in batches of 7 of 20 rows, on the host."""
    rng = np.random.RandomState(0)
    x, y = rng.standard_normal((20, 5)), rng.standard_normal((20, 2))
    backend, dtype = trainer.backend, trainer.dtype
    state = trainer.start(trainer.network.init(rng) if params is None else params)
    with backend.scope(dtype):
        source = ArraySource(Batch(backend.asarray(x, dtype), backend.asarray(y, dtype)))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # a fallback
        trainer.fit(state, source, epochs, rng)
    return [to_host(p) for p in trainer.params(state.final_leaves)]


def trainer(optimizer=None, backend=NUMPY, network=NETWORK, dtype="float64", **settings):
    settings = {"batch_size": 7, "shuffle": False, "tol": 0.0, "patience": np.inf, **settings}
    return Trainer(network, SquaredError(), optimizer or SGD(), backend, dtype, 0.01, **settings)


# ---------------------------------------------------------------- against torch


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "theirs"),
    [
        (SGD(momentum=0.9, weight_decay=0.3), ("SGD", {"momentum": 0.9})),
        (AdamW(weight_decay=0.3), ("AdamW", {})),
    ],
)
def test_groups_are_torch_s_parameter_groups(optimizer, theirs):
    """Rates and decays of each group; the decoupled decay of SGD by hand, which torch's is not."""
    torch = pytest.importorskip("torch")
    rng = np.random.RandomState(0)
    x, y = rng.standard_normal((20, 5)), rng.standard_normal((20, 2))
    params = NETWORK.init(rng)
    got = trained(trainer(optimizer, treatments=EACH, batch_size=20), 5, params)
    leaves = [torch.tensor(p, requires_grad=True) for p in params]
    name, how = theirs
    groups = []
    for leaf, param in zip(leaves, NETWORK.params, strict=True):
        treatment = EACH[param.group]
        own = {"params": [leaf], "lr": 0.01 * treatment.rate}
        if name == "AdamW":
            own["weight_decay"] = 0.3 * treatment.decay
        groups.append(own)
    rule = getattr(torch.optim, name)(groups, **how)
    x, y = torch.tensor(x), torch.tensor(y)
    for _ in range(5):
        rule.zero_grad()
        s, w1, b1, w2, b2 = leaves
        z = torch.tanh(((1.0 + s) * x) @ w1 + b1) @ w2 + b2
        (0.5 * ((z - y) ** 2).sum(axis=1).mean()).backward()
        if name == "SGD":
            with torch.no_grad():
                for group, param in zip(groups, NETWORK.params, strict=True):
                    shrink = group["lr"] * 0.3 * EACH[param.group].decay
                    group["params"][0].mul_(1.0 - shrink)
        rule.step()
    for a, b in zip(got, leaves, strict=True):
        np.testing.assert_allclose(a, b.detach().numpy(), rtol=1e-12, atol=1e-14)


def test_penalties_of_groups_are_their_share_of_the_gradient():
    """One step of plain descent at rate 1 takes α · factor / n · p from each parameter."""
    rng = np.random.RandomState(3)
    params = [rng.standard_normal(p.shape) for p in NETWORK.params]
    settings = {"learning_rate": 1.0, "batch_size": 20, "treatments": None}
    plain = replace(trainer(), **settings)
    treated = replace(plain, alpha=0.7, treatments={**EACH, "weight": Treatment(penalty=0.0)})
    same_rates = replace(treated, treatments={
        label: Treatment(penalty=t.penalty) for label, t in treated.treatments.items()
    })  # fmt: skip
    before, after = trained(plain, 1, params), trained(same_rates, 1, params)
    for a, b, p, param in zip(before, after, params, NETWORK.params, strict=True):
        factor = treated.treatments[param.group].penalty
        np.testing.assert_allclose(a - b, 0.7 * factor / 20 * p, rtol=1e-9, atol=1e-14)


def test_the_penalty_that_is_told_is_the_sum_over_groups():
    rng = np.random.RandomState(3)
    params = [rng.standard_normal(p.shape) for p in NETWORK.params]
    told = []
    for alpha in (0.0, 0.7):
        t = replace(trainer(batch_size=20), alpha=alpha, learning_rate=0.0, treatments=EACH)
        state = t.start(params)
        x, y = np.ones((20, 5)), np.zeros((20, 2))
        t.fit(state, ArraySource(Batch(x, y)), 1, rng)
        told.append(state.history[0].loss)
    wanted = sum(
        0.5 * 0.7 / 20 * EACH[param.group].penalty * np.sum(p * p)
        for p, param in zip(params, NETWORK.params, strict=True)
    )
    assert told[1] - told[0] == pytest.approx(wanted, rel=1e-9)


# ---------------------------------------------------------------- every engine


MOVING = {
    "scale": Treatment(rate=2.0, schedule=Step(2, 0.5)),
    "weight": Treatment(decay=0.5),
    "bias": Treatment(penalty=0.25, schedule=Cosine(warmup=0.2)),
}
DEEP = Network((
    Scale(5), Linear(5, 8), Tanh(), Dropout(Scheduled(0.5, Cosine())), Linear(8, 6), Tanh(),
    Dropout(0.2), Linear(6, 2),
))  # fmt: skip


@pytest.mark.parametrize("name", [name for name in TARGETS if name != "numpy-read-only"])
@pytest.mark.parametrize(
    "optimizer", [AdamW(weight_decay=Scheduled(0.3, Step(1, 0.5))), RMSprop()], ids=["w", "r"]
)
def test_every_engine_takes_the_same_numbers(name, optimizer, request):
    """Rates, decays, dropout by schedules of their own, without a fallback."""
    target = get_target(name, request)
    how = {"network": DEEP, "treatments": MOVING, "alpha": 0.1, "schedule": Cosine()}
    wanted = trained(trainer(optimizer, **how))
    got = trained(trainer(optimizer, target.backend, dtype=target.dtype, **how))
    for a, b in zip(got, wanted, strict=True):
        tol = 1e-11 if target.dtype == "float64" else 1e-4
        np.testing.assert_allclose(a, b, rtol=0, atol=tol * np.abs(b).max())


def test_numbers_that_change_cost_no_new_program():
    """Other rates, decays, dropout: the programs that were recorded and compiled are found."""
    replay_module._prepare.cache_clear()
    optimizer = AdamW(weight_decay=Scheduled(0.3, Step(1, 0.5)))
    trained(trainer(optimizer, network=DEEP, treatments=MOVING), epochs=30)
    recorded = replay_module._prepare.cache_info().currsize
    assert recorded == 2  # batches of 7, and one of 6
    other = {label: replace(t, rate=5.0 * t.rate, decay=0.1) for label, t in MOVING.items()}
    trained(trainer(replace(optimizer, weight_decay=0.01), network=DEEP, treatments=other), 30)
    assert replay_module._prepare.cache_info().currsize == recorded


@pytest.mark.slow
def test_numbers_that_change_cost_no_new_program_on_jax(request):
    backend = get_target("jax", request).backend
    jax_scan._loop.cache_clear()
    optimizer = AdamW(weight_decay=Scheduled(0.3, Step(1, 0.5)))
    for rate in (0.5, 5.0):
        treatments = {**MOVING, "weight": Treatment(rate=rate)}
        trained(trainer(optimizer, backend, DEEP, treatments=treatments))
    assert jax_scan._loop.cache_info().currsize == 2


# ---------------------------------------------------------------- layout


def test_parameters_share_a_leaf_where_their_update_is_the_same():
    """Only their update: the penalty is a part of the gradient, before it."""

    def leaves(optimizer, **treatments):
        return len(trainer(optimizer, treatments=treatments).recipe.layout.leaves)

    assert leaves(SGD()) == 1
    assert leaves(SGD(), bias=Treatment(penalty=2.0)) == 1
    assert leaves(SGD(), bias=Treatment(decay=2.0)) == 1  # there is none
    assert leaves(AdamW()) == 1
    assert leaves(AdamW(decay_biases=False)) == 2
    assert leaves(AdamW(), bias=Treatment(decay=2.0)) == 2
    assert leaves(SGD(), scale=Treatment(rate=2.0)) == 2
    assert leaves(SGD(), scale=Treatment(schedule=Step(1)), bias=Treatment(rate=0.1)) == 3


def test_a_rate_of_zero_leaves_parameters_as_they_are():
    rng = np.random.RandomState(0)
    params = NETWORK.init(rng)
    got = trained(trainer(Adam(), treatments={"scale": Treatment(rate=0.0)}), params=params)
    np.testing.assert_array_equal(got[0], params[0])
    assert all((a != b).any() for a, b in zip(got[1:], params[1:], strict=True))


# ---------------------------------------------------------------- numbers of layers


@dataclass(frozen=True)
class Blend(Layer):
    """y = (1 − t) x + t tanh x, with t by a schedule; in prediction t = 1."""

    t: float | Scheduled
    seen: list = field(default_factory=list, compare=False)
    numbers: ClassVar = ("t",)

    def forward(self, p, x, xp, t=1.0):
        self.seen.append(t)
        y = xp.tanh(x)
        return x + t * (y - x), (y, t)

    def backward(self, p, residual, dy, xp):
        y, t = residual
        return dy * (1.0 - t + t * (1.0 - y * y))


def test_a_layer_is_given_the_numbers_that_it_names():
    layer = Blend(Scheduled(0.8, Step(1, 0.5)))
    network = Network((Linear(5, 3), layer, Linear(3, 2)))
    t = trainer(network=network, batch_size=20, backend=eager())
    trained(t, epochs=3)
    assert layer.seen == [0.8, 0.4, 0.2]
    network(network.init(np.random.RandomState(0)), np.ones((1, 5)), np)
    assert layer.seen[-1] == 1.0


def eager():
    backend = NumPyBackend()
    backend.engine = "eager"
    return backend


def test_keys_are_drawn_and_other_numbers_computed():
    network = mlp([3, 4, 5, 2], dropout=Scheduled(0.5, Step(1, 0.5)))
    first = network.per_step(Clock(0, 9, 0, 0), [7, 8])
    assert first == ((7, 2**30, 2.0), (8, 2**30, 2.0))
    later = network.per_step(Clock(5, 9, 1, 20), [9, 10])
    assert later == ((9, 2**29, 1.0 / 0.75), (10, 2**29, 1.0 / 0.75))


def test_a_layer_that_says_it_is_random_is_told_how_to_say_it_now():
    @dataclass(frozen=True)
    class Old(Tanh):
        random: ClassVar = True

    with pytest.raises(TypeError, match=r"numbers = \('key',\)"):
        Network((Old(),))


def test_a_schedule_that_takes_dropout_too_far_is_an_error():
    @dataclass(frozen=True)
    class Grows(Schedule):
        def factor(self, clock, state):
            return 1.0 + clock.epoch

    t = trainer(network=mlp([5, 4, 2], dropout=Scheduled(0.4, Grows())))
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\), got 1.2"):
        trained(t)


@pytest.mark.parametrize("schedule", [Adaptive(), ReduceOnPlateau()])
def test_schedules_that_react_are_the_common_one_only(schedule):
    with pytest.raises(ValueError, match="must not react to the loss"):
        Treatment(schedule=schedule)
    with pytest.raises(ValueError, match="must not react to the loss"):
        Scheduled(0.5, schedule)


@pytest.mark.parametrize("name", ["rate", "decay", "penalty"])
@pytest.mark.parametrize("value", [-1.0, np.inf, np.nan])
def test_factors_are_finite_and_not_negative(name, value):
    with pytest.raises(ValueError, match=f"{name} must be at least 0 and finite"):
        Treatment(**{name: value})


def test_a_label_that_no_parameter_has_is_an_error():
    with pytest.raises(ValueError, match=r"no parameter is in the groups \['embedding'\]; known"):
        Treatments.of(NETWORK.params, SGD(), {"embedding": Treatment()})


# ---------------------------------------------------------------- estimators

X = np.random.RandomState(0).standard_normal((60, 4))
Y = (X[:, 0] > 0).astype(int)


def test_estimators_take_treatments_and_files_keep_them(tmp_path):
    settings = {
        "max_iter": 8, "random_state": 0, "tol": 0.0, "batch_size": 20, "solver": "adamw",
        "weight_decay": Scheduled(0.1, Step(2)), "dropout": Scheduled(0.3, Cosine()),
        "treatments": {"bias": Treatment(rate=0.0, schedule=Step(3, 0.5))},
        "activation": (Tanh(), Dropout(0.2)),
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = MLPClassifier((6, 5), **settings).fit(X, Y)
        fresh = MLPClassifier((6, 5), **settings).init_model(X, Y)
    for a, b in zip(model.intercepts_, fresh.intercepts_, strict=True):
        np.testing.assert_array_equal(a, b)
    loaded = load(save(model, tmp_path / "model"))
    assert loaded.treatments == settings["treatments"]
    assert loaded.weight_decay == settings["weight_decay"]
    assert loaded.dropout == settings["dropout"]
    assert loaded.activation == settings["activation"]
    np.testing.assert_array_equal(loaded.predict_proba(X), model.predict_proba(X))


def test_lbfgs_has_no_rates_to_treat():
    with pytest.raises(ValueError, match="solver='lbfgs' cannot take treatments"):
        MLPClassifier(solver="lbfgs", treatments={"bias": Treatment()}).fit(X, Y)


def test_fits_that_go_on_keep_their_treatments(tmp_path):
    made = case(SquaredError(), Adam(), treatments={"bias": Treatment(rate=0.1)})
    whole, parts = fit(*made, epochs=4), made
    state = parts[0].start(parts[0].params(parts[1].leaves))
    rng = np.random.RandomState(0)
    parts[0].fit(state, ArraySource(parts[2]), 2, rng)
    rng = np.random.RandomState(0)
    parts[0].fit(state, ArraySource(parts[2]), 4, rng)
    for a, b in zip(whole, parts[0].params(state.final_leaves), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_map_that_is_none_is_an_error():
    for given in ({"weight": 3}, {("weight",): Treatment()}):
        with pytest.raises(ValueError, match="expected labels of groups and instances of Treat"):
            MLPClassifier(treatments=given).fit(X, Y)


@pytest.mark.parametrize("value", [True, "1", None])
def test_factors_are_numbers(value):
    with pytest.raises(ValueError, match="rate must be at least 0 and finite"):
        Treatment(rate=value)


def test_a_given_treatment_stands_in_place_of_the_default():
    optimizer = AdamW(decay_biases=False)
    (_, bias) = Treatments.of(mlp([2, 2]).params, optimizer).updates
    assert bias.decay == 0.0
    given = {"bias": Treatment(decay=2.0)}
    (_, bias) = Treatments.of(mlp([2, 2]).params, optimizer, given).updates
    assert bias.decay == 2.0


def test_an_optimizer_that_decides_what_decays_is_told_how_that_is_said_now():
    class Old(SGD):
        def decays(self, group):
            return False

    with pytest.raises(TypeError, match="Old.decays: which parameters decay, treatments say"):
        trained(trainer(Old(weight_decay=0.5)))


# ---------------------------------------------------------------- kinds of numbers


@dataclass(frozen=True)
class NumPys(Schedule):
    """A schedule of NumPy's scalars."""

    def factor(self, clock, state):
        return np.float64(1.0) / np.int64(clock.epoch + 1)


@pytest.mark.parametrize("name", ["numpy", "numpy-eager", "torch", "jax", "cupy-emulated"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_numpy_s_scalars_are_numbers(name, dtype, request):
    """From a grid search over np.linspace, or a schedule of one's own; in float32, too."""
    backend = get_target(name, request).backend
    numbers = {
        "optimizer": AdamW(weight_decay=Scheduled(np.float64(0.25), NumPys())),
        "schedule": NumPys(), "alpha": np.float64(0.5),
        "treatments": {"bias": Treatment(rate=np.float64(0.5), penalty=np.int64(1))},
        "network": mlp([5, 4, 2], "tanh", dropout=Scheduled(np.float64(0.25), NumPys())),
    }  # fmt: skip

    @dataclass(frozen=True)
    class Plain(Schedule):
        def factor(self, clock, state):
            return 1.0 / (clock.epoch + 1)

    plain = {
        "optimizer": AdamW(weight_decay=Scheduled(0.25, Plain())), "schedule": Plain(),
        "alpha": 0.5, "treatments": {"bias": Treatment(rate=0.5, penalty=1.0)},
        "network": mlp([5, 4, 2], "tanh", dropout=Scheduled(0.25, Plain())),
    }  # fmt: skip
    found = [trained(trainer(backend=backend, dtype=dtype, **how)) for how in (numbers, plain)]
    for a, b in zip(*found, strict=True):
        assert a.dtype == dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ["numpy", "jax"])
def test_a_number_that_is_whole_at_first_keeps_its_fractions(name, request):
    """An int where a float is named, in the first steps: 1, then a half."""

    @dataclass(frozen=True)
    class Halves(Blend):
        def per_step(self, clock):
            return (1 if clock.epoch < 2 else 0.5,)

    backend = get_target(name, request).backend
    network = Network((Linear(5, 3), Halves(1.0), Linear(3, 2)))
    how = {"network": network, "batch_size": 20}
    wanted = trained(trainer(backend=eager(), **how), epochs=8)
    for a, b in zip(trained(trainer(backend=backend, **how), epochs=8), wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11)


def test_too_many_or_too_few_numbers_are_an_error():
    @dataclass(frozen=True)
    class Wrong(Blend):
        def per_step(self, clock):
            return self.t

    for values in ((), (1.0, 2.0)):
        with pytest.raises(ValueError, match="zip"):
            Network((Wrong(values),)).per_step(CLOCK, ())

"""Schedules against torch's and scikit-learn's, and at the ends of their ranges."""

from __future__ import annotations

from itertools import pairwise
from math import pi, sin

import numpy as np
import pytest
from helpers.paths import DATA
from hypothesis import given
from hypothesis import strategies as st
from sklearn.neural_network._stochastic_optimizers import SGDOptimizer

from portable_mlp import schedules
from portable_mlp.schedules import (
    Adaptive,
    Clock,
    Cosine,
    FlatCosine,
    InverseScaling,
    LogCosine,
    OneCycle,
    ReduceOnPlateau,
    Schedule,
    Step,
)

RATE = 0.3  # not a power of two


def factors(schedule: Schedule, total: int, start: int = 0) -> list[float]:
    """One factor a step, from ``start`` to the last; one epoch is one step of ten rows."""
    return [schedule.factor(Clock(i, total, i, 10 * i), None) for i in range(start, total)]


def torch_rates(name: str, steps: int, **arguments) -> list[float]:
    """Rates that a scheduler of torch gives to its first steps."""
    torch = pytest.importorskip("torch", reason="torch's schedulers are the oracle")
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=RATE)
    scheduler = getattr(torch.optim.lr_scheduler, name)(optimizer, **arguments)
    rates = []
    for step in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step < steps - 1:
            scheduler.step()
    return rates


def agree(found: list[float], rates: list[float], tol: float = 1e-12) -> None:
    """Relative to the largest rate: at its end a cosine is a difference of equal numbers."""
    np.testing.assert_allclose(np.multiply(RATE, found), rates, rtol=0, atol=tol * max(rates))


# Each schedule and the tests that hold it against something else
COVERED = {
    Schedule: "test_constant",
    Step: "test_step_follows_torch",
    Cosine: "test_cosine_follows_torch",
    OneCycle: "test_one_cycle_follows_torch",
    ReduceOnPlateau: "test_reduce_on_plateau_follows_torch",
    LogCosine: "test_log_cosine_follows_pytabkit",
    FlatCosine: "test_flat_cosine_follows_pytabkit",
    InverseScaling: "test_inverse_scaling_follows_sklearn",
    Adaptive: "test_adaptive_follows_sklearn",
}


def subclasses(base: type) -> set[type]:
    """The package's own; tests elsewhere may define more."""
    children = {c for c in base.__subclasses__() if c.__module__ == schedules.__name__}
    return children.union(*map(subclasses, children))


def test_every_schedule_has_an_oracle():
    assert set(COVERED) == {Schedule} | subclasses(Schedule)
    assert all(callable(globals().get(name)) for name in COVERED.values())


def test_constant():
    schedule = Schedule()
    assert factors(schedule, 20) == [1.0] * 20
    assert schedule.observe(schedule.init(), 3.0) == schedule.init()
    assert schedule.stalled(schedule.init(), RATE) is None


# ---------------------------------------------------------------- torch


@pytest.mark.parametrize(("every", "gamma"), [(1, 0.9), (3, 0.5), (7, 0.1), (40, 0.1)])
def test_step_follows_torch(every, gamma):
    rates = torch_rates("StepLR", 30, step_size=every, gamma=gamma)
    np.testing.assert_allclose(
        np.multiply(RATE, factors(Step(every, gamma), 30)), rates, rtol=1e-12
    )


def test_step_counts_epochs_not_steps():
    schedule = Step(2, 0.5)
    found = [schedule.factor(Clock(i, 32, i // 8, 0), None) for i in range(32)]
    assert found == [1.0] * 16 + [0.5] * 16


@pytest.mark.parametrize("total", [1, 2, 3, 50, 1000])
@pytest.mark.parametrize("final", [0.0, 0.2])
def test_cosine_follows_torch(total, final):
    rates = torch_rates("CosineAnnealingLR", total, T_max=total, eta_min=final * RATE)
    agree(factors(Cosine(final=final), total), rates)


@pytest.mark.parametrize(("warmup", "total"), [(0.2, 50), (0.5, 10), (0.25, 4)])
def test_cosine_after_warmup_follows_torch(warmup, total):
    up = round(warmup * total)
    rates = torch_rates("CosineAnnealingLR", total - up, T_max=total - up, eta_min=0.1 * RATE)
    agree(factors(Cosine(warmup, final=0.1), total, start=up), rates)


@pytest.mark.parametrize(("warmup", "total"), [(0.2, 50), (0.5, 10), (0.25, 4), (0.1, 1000)])
def test_cosine_warmup_is_a_ramp(warmup, total):
    up = round(warmup * total)
    ramp = np.arange(1, up + 2) / (up + 1)  # from one part above nothing to 1
    found = factors(Cosine(warmup), total)
    np.testing.assert_allclose(found[: up + 1], ramp, rtol=1e-15)
    assert found[up] == 1.0
    assert max(found) == 1.0
    assert all(a > b > 0.0 for a, b in pairwise(found[up:]))


@given(warmup=st.floats(0.0, 0.999), final=st.floats(0.0, 1.0), total=st.integers(1, 200))
def test_cosine_has_one_peak(warmup, final, total):
    found = factors(Cosine(warmup, final), total)
    top = sum(step < warmup * total for step in range(total))
    assert all(a < b <= 1.0 for a, b in pairwise(found[:top]))
    assert all(a >= b - 1e-15 for a, b in pairwise(found[top:]))
    assert max(found) <= 1.0 + 1e-15
    assert min(found) >= min(final, found[0]) - 1e-15


@pytest.mark.parametrize("total", [1, 3, 4, 7, 11, 99, 1000])
@pytest.mark.parametrize(
    "schedule",
    [OneCycle(), OneCycle(peak=0.5), OneCycle(0.1, 0.5, 0.01), OneCycle(0.9, 0.2, 0.1)],
    ids=str,
)
def test_one_cycle_follows_torch(schedule, total):
    arguments = {}
    if schedule != OneCycle():  # whose defaults are to be torch's
        arguments = {
            "pct_start": schedule.peak,
            "div_factor": 1.0 / schedule.start,
            "final_div_factor": schedule.start / schedule.final,
        }
    rates = torch_rates(
        "OneCycleLR",
        total,
        max_lr=RATE,
        total_steps=total,
        anneal_strategy="cos",
        cycle_momentum=False,
        **arguments,
    )
    agree(factors(schedule, total), rates)


@pytest.mark.parametrize(("peak", "total"), [(0.5, 2), (0.1, 10)])
def test_one_cycle_may_begin_at_its_peak(peak, total):
    """Where the way up has no steps; torch divides by zero there."""
    found = factors(OneCycle(peak), total)
    assert found[0] == 1.0
    assert all(a > b for a, b in pairwise(found))


@given(
    peak=st.floats(0.01, 0.99),
    start=st.floats(0.0, 1.0),
    final=st.floats(0.0, 1.0),
    total=st.integers(1, 200),
)
def test_one_cycle_stays_between_its_ends_and_one(peak, start, final, total):
    found = factors(OneCycle(peak, start, final), total)
    assert all(min(start, final) - 1e-15 <= value <= 1.0 + 1e-15 for value in found)
    assert found[-1] == pytest.approx(final, rel=1e-12, abs=1e-15)


PLATEAUS = {
    "patience-0": ReduceOnPlateau(patience=0, gamma=0.5),
    "patience-3": ReduceOnPlateau(patience=3, gamma=0.3),
    "floor": ReduceOnPlateau(patience=1, gamma=0.1, min_factor=0.02),
    "threshold": ReduceOnPlateau(patience=2, gamma=0.7, threshold=0.05),
    "no-threshold": ReduceOnPlateau(patience=2, gamma=0.7, threshold=0.0),
    "defaults": ReduceOnPlateau(),
}


@pytest.mark.parametrize("name", PLATEAUS)
def test_reduce_on_plateau_follows_torch(name):
    torch = pytest.importorskip("torch", reason="torch's scheduler is the oracle")
    schedule = PLATEAUS[name]
    # Stairs with noise, exact repeats, and a slope below some thresholds
    rng = np.random.RandomState(0)
    losses = [
        *(3.0 * 0.8 ** (i // 12) + 0.05 * rng.standard_normal() for i in range(100)),
        *[0.3] * 15,
        *(0.29 * 0.999**i for i in range(60)),
        *(2.0 + i for i in range(30)),
    ]
    arguments = {}
    if schedule != ReduceOnPlateau():  # whose defaults are to be torch's
        arguments = {
            "factor": schedule.gamma,
            "patience": schedule.patience,
            "threshold": schedule.threshold,
            "min_lr": schedule.min_factor * RATE,
        }
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=RATE)
    oracle = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, mode="min", threshold_mode="rel", eps=0.0, **arguments
    )
    state, found, wanted = schedule.init(), [], []
    for epoch, loss in enumerate(losses):
        found.append(schedule.factor(Clock(epoch, 1000, epoch, 0), state))
        wanted.append(optimizer.param_groups[0]["lr"])
        state = schedule.observe(state, loss)
        oracle.step(loss)
    np.testing.assert_allclose(np.multiply(RATE, found), wanted, rtol=1e-12)
    assert len(set(found)) > 2  # it did reduce
    assert schedule.stalled(state, RATE) is None


def test_reduce_on_plateau_of_a_score():
    """A negative validation score: improved means larger in size, by the threshold."""
    schedule = ReduceOnPlateau(gamma=0.5, patience=0, threshold=0.1)
    state, found = schedule.init(), []
    for loss in (-0.5, -0.6, -0.63, -0.7, -0.69):
        state = schedule.observe(state, loss)
        found.append(schedule.factor(Clock(1, 10, 1, 1), state))
    # −0.63 is not below −0.66, −0.7 is, −0.69 is not below −0.77
    assert found == [1.0, 1.0, 0.5, 0.5, 0.25]


# ---------------------------------------------------------------- pytabkit


REALMLP = np.load(DATA / "reference" / "realmlp_td_class.npz")


def test_log_cosine_follows_pytabkit():
    """The rates that RealMLP-TD had in its 20 steps, for the weights of a layer: 0.04 at most."""
    rates = REALMLP["lr"][:, 5]
    assert str(REALMLP["p5_name"]).endswith("weight")
    np.testing.assert_allclose(np.multiply(0.04, factors(LogCosine(), 20)), rates, atol=1e-16)
    # The waves take 1, 2, 4 and 8 fifteenths of the time
    fifteenths = factors(LogCosine(), 15)
    np.testing.assert_allclose([fifteenths[i] for i in (0, 1, 3, 7)], 0.0, atol=1e-15)
    with pytest.raises(ValueError, match="cycles must be at least 1"):
        LogCosine(0)


def test_flat_cosine_follows_pytabkit():
    """The weight decay that RealMLP-TD had in its 20 steps: 0.02 in the first half."""
    np.testing.assert_allclose(
        np.multiply(0.02, factors(FlatCosine(), 20)), REALMLP["wd"][:, 5], atol=1e-16
    )


# ---------------------------------------------------------------- scikit-learn


@pytest.mark.parametrize("power", [0.5, 0.25, 1.3])
@pytest.mark.parametrize("rows", [1, 57])
def test_inverse_scaling_follows_sklearn(power, rows):
    oracle = SGDOptimizer([], RATE, lr_schedule="invscaling", power_t=power)
    schedule = InverseScaling(power)
    for epoch in range(40):
        for step in range(3):  # the rate of an epoch is that of its steps
            clock = Clock(3 * epoch + step, 120, epoch, rows * epoch)
            found = RATE * schedule.factor(clock, schedule.init())
            assert found == pytest.approx(oracle.learning_rate, rel=1e-12)
        oracle.iteration_ends(rows * (epoch + 1))
    assert oracle.learning_rate < RATE


@pytest.mark.parametrize("rate", [1e-7, 1e-6, 3e-6, 1e-3, 0.1, 7.0])
def test_adaptive_follows_sklearn(rate):
    oracle = SGDOptimizer([], rate, lr_schedule="adaptive")
    schedule, clock = Adaptive(), Clock(1, 10, 1, 10)
    state = schedule.init()
    for _ in range(20):
        now = rate * schedule.factor(clock, state)
        assert now == pytest.approx(oracle.learning_rate, rel=1e-12)
        state = schedule.stalled(state, now)
        stops = oracle.trigger_stopping("", verbose=False)
        assert stops == (state is None)
        if stops:
            assert now <= 1e-6
            return
    pytest.fail("it never stopped")


def test_adaptive_stops_with_sklearn_to_the_last_bit():
    oracle, schedule = SGDOptimizer([], 0.000125, lr_schedule="adaptive"), Adaptive()
    state, divisions = schedule.init(), 0
    while not oracle.trigger_stopping("", verbose=False):
        divisions += 1
    while (state := schedule.stalled(state, 0.000125 * schedule.factor(None, state))) is not None:
        divisions -= 1
    assert divisions == 0


# ---------------------------------------------------------------- the ends


def test_a_single_step_divides_by_nothing():
    """The rate of the only step: full, half way up a ramp, the last of a cycle."""
    assert factors(Cosine(), 1) == [1.0]
    assert factors(Cosine(warmup=0.5), 1) == pytest.approx([1.0 / 1.5], rel=1e-15)
    assert factors(OneCycle(final=0.25), 1) == pytest.approx([0.25], rel=1e-15)


@pytest.mark.parametrize("schedule", [Cosine(), OneCycle()], ids=str)
def test_the_rate_stays_down_after_the_last_step(schedule):
    """partial_fit, whose calls are one epoch each, asks beyond what it took for the last."""
    late = [schedule.factor(Clock(10 + i, 10, 1, 10), None) for i in range(30)]
    assert max(late) <= schedule.factor(Clock(9, 10, 0, 0), None)


def test_tests_would_see_a_wrong_cosine():
    """The planted twin: half a step late is far outside the tolerance."""
    wanted = [RATE * (1.0 - sin(pi * step / 100) ** 2) for step in range(50)]
    agree(factors(Cosine(), 50), wanted)
    late = [Cosine().factor(Clock(step + 0.5, 50, 0, 0), None) for step in range(50)]
    with pytest.raises(AssertionError):
        agree(late, wanted)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Step(0), "every must be at least 1"),
        (lambda: Step(1, gamma=-0.1), "gamma must be at least 0"),
        (lambda: ReduceOnPlateau(gamma=1.0), r"gamma must be in \(0, 1\)"),
        (lambda: ReduceOnPlateau(patience=-1), "patience must be at least 0, got -1"),
        (lambda: ReduceOnPlateau(threshold=-0.1), "threshold must be at least 0"),
        (lambda: ReduceOnPlateau(min_factor=float("nan")), "min_factor must be at least 0"),
        (lambda: Cosine(warmup=-0.1), r"warmup must be in \[0, 1\)"),
        (lambda: Cosine(warmup=1.0), r"warmup must be in \[0, 1\)"),
        (lambda: OneCycle(peak=0.0), r"peak must be in \(0, 1\)"),
        (lambda: OneCycle(peak=1.0), r"peak must be in \(0, 1\)"),
    ],
)
def test_settings_that_make_no_schedule(build, message):
    with pytest.raises(ValueError, match=message):
        build()

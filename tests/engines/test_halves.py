"""A step in two halves: what rows add up to, and what that does to the parameters."""

from __future__ import annotations

import warnings
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from helpers.steps import RULES, case, fit, run
from helpers.targets import get_target
from hypothesis import given, settings
from hypothesis import strategies as st

from portable_mlp import mlp
from portable_mlp.backends import NumPyBackend, to_host
from portable_mlp.engines import CaptureEngine, Engine, ReplayEngine, ScanEngine
from portable_mlp.engines.base import Task
from portable_mlp.engines.graph.program import flatten, specify
from portable_mlp.engines.graph.recording import Recorder, record
from portable_mlp.engines.graph.verifier import verify
from portable_mlp.engines.host import replay as replay_module
from portable_mlp.engines.host.dialects import NumPyDialect
from portable_mlp.engines.host.memory import Plan
from portable_mlp.engines.host.python_source import lower
from portable_mlp.losses import LOSSES, SoftmaxCrossEntropy, SquaredError
from portable_mlp.optimizers import SGD, Adam
from portable_mlp.schedules import Clock
from portable_mlp.sources import ArraySource
from portable_mlp.steps import (
    NO_NUMBERS,
    Arrays,
    Batch,
    first_half,
    second_half,
    sums,
    update,
    weight_of,
)
from portable_mlp.training import Trainer

pytestmark = pytest.mark.slow

NUMPY = NumPyBackend()
CLOCK = Clock(0, 10, 0, 0)
SETTINGS = [{}, {"alpha": 0.1}, {"dropout": 0.3}, {"clip_norm": 0.05, "alpha": 0.1}]


def halved(kind, made, **how):
    """Steps in halves, with nothing done in between; all that was handed over."""
    seen = []

    def engine(backend, recipe):
        return kind(backend, recipe, seen.append)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return run(engine, *made, **how), seen


@pytest.mark.parametrize("engine", ["eager", "calls", "loops"])
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_nothing_in_between_changes_nothing(engine, loss, monkeypatch):
    """To the last bit: every loss and rule, penalty, clipping, dropout, weights, both types."""
    monkeypatch.setattr(replay_module.RecordedEngine, "EAGER", 0)
    monkeypatch.setenv("PORTABLE_MLP_COMPILE", "now" if engine == "loops" else "never")
    kind = Engine if engine == "eager" else ReplayEngine
    turns = [*enumerate(product([False, True], SETTINGS, ["float64", "float32"]))]
    if engine == "loops":  # compiled for each: every case with two of the losses
        turns = turns[[*LOSSES.values()].index(loss) % 3 :: 3]
    for turn, (weighted, how, dtype) in turns:
        optimizer = RULES[turn % len(RULES)]
        made = case(loss, optimizer, weighted=weighted, dtype=dtype, **how)
        (arrays, values), seen = halved(kind, made)
        wanted, wanted_values = run(kind, *made)
        assert len(seen) == len(values) == 12
        np.testing.assert_array_equal(values, wanted_values)
        for a, b in zip(arrays, wanted, strict=True):
            np.testing.assert_array_equal(a, b)


def test_on_torch(request):
    backend = get_target("torch", request).backend
    made = case(SoftmaxCrossEntropy(), Adam(), backend=backend, alpha=0.1, weighted=True)
    (arrays, values), _ = halved(ReplayEngine, made)
    wanted, wanted_values = run(ReplayEngine, *made)
    np.testing.assert_array_equal(values, wanted_values)
    for a, b in zip(arrays, wanted, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", [Engine, ReplayEngine])
@pytest.mark.parametrize("weighted", [False, True])
def test_what_is_handed_over_is_the_gradient_the_loss_and_the_weights(kind, weighted, monkeypatch):
    monkeypatch.setattr(replay_module.RecordedEngine, "EAGER", 0)
    made = case(SquaredError(), Adam(), weighted=weighted, alpha=0.1)
    trainer, arrays, batch = made
    copies = []

    def engine(backend, recipe):
        return kind(backend, recipe, lambda vector: copies.append(vector.copy()))

    _, values = run(engine, *made, n_steps=1, batch_size=12)
    order = np.random.RandomState(0).permutation(12)
    rows = Batch(*(None if a is None else a[order] for a in batch))
    value, grads = sums(trainer.recipe, arrays.leaves, rows, NO_NUMBERS)
    wanted = [*map(np.ravel, trainer.recipe.layout.pack(grads, np)), [value]]
    wanted += [[batch.weights.sum()]] if weighted else []
    np.testing.assert_allclose(copies[0], np.concatenate(wanted), rtol=1e-14)
    assert values[0][0] == copies[0][-2 if weighted else -1]


@pytest.mark.parametrize("kind", [Engine, ReplayEngine])
def test_what_is_done_in_between_counts(kind, monkeypatch):
    """Twice the gradient is that of the loss twice; where clipping and penalty come after it."""
    monkeypatch.setattr(replay_module.RecordedEngine, "EAGER", 0)
    made = case(SquaredError(), replace(RULES[0]), batch_size=12)

    def doubles(vector):
        vector *= 2.0

    trainer, arrays, batch = made
    twice = replace(trainer, learning_rate=2.0 * trainer.learning_rate)
    got = run(lambda *a: kind(*a, doubles), *made, batch_size=12)
    wanted = run(kind, twice, arrays, batch, batch_size=12)
    for a, b in zip(got[0], wanted[0], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-14)
    np.testing.assert_allclose([v for v, _ in got[1]], [2.0 * v for v, _ in wanted[1]], rtol=1e-13)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("settings", SETTINGS[:2] + SETTINGS[3:])
def test_parts_of_a_batch_add_up_to_its_step(weighted, settings):
    """What many processes will do: each its rows' share of the whole, added, then one update."""
    trainer, arrays, batch = case(SoftmaxCrossEntropy(), Adam(), weighted=weighted, **settings)
    recipe = trainer.recipe
    whole = Batch(*(None if a is None else a for a in batch))
    n = 12 if not weighted else batch.weights.sum()
    value, grads = 0.0, None
    for rows in (slice(0, 3), slice(3, 3), slice(3, 12)):
        part = Batch(*(None if a is None else a[rows] for a in batch))
        if part.x.shape[0] == 0:
            continue
        own, theirs = sums(recipe, arrays.leaves, part, NO_NUMBERS, total=n)
        value += own
        grads = theirs if grads is None else [a + b for a, b in zip(grads, theirs, strict=True)]
    hyper, _ = trainer.hyper(CLOCK, None)
    wanted_value, wanted_grads = sums(recipe, arrays.leaves, whole, NO_NUMBERS)
    np.testing.assert_allclose(value, wanted_value, rtol=1e-14)
    for a, b in zip(grads, wanted_grads, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-16)
    copies = [
        type(arrays)(
            [a.copy() for a in arrays.leaves],
            [tuple(m.copy() for m in own) for own in arrays.moments],
        )
        for _ in range(2)
    ]
    got, penalty = update(recipe, copies[0], grads, n, hyper)
    wanted, wanted_penalty = update(
        recipe, copies[1], wanted_grads, weight_of(recipe, whole) or n, hyper
    )
    assert penalty == pytest.approx(wanted_penalty, rel=1e-14)
    for a, b in zip(got.leaves, wanted.leaves, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9)


def test_whole_fits_take_it_too():
    seen = []
    trainer, arrays, batch = case(SquaredError(), Adam(), batch_size=5)
    got = fit(replace(trainer, reduce=seen.append), arrays, batch, epochs=8)
    assert len(seen) == 8 * 3
    for a, b in zip(got, fit(trainer, arrays, batch, epochs=8), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("how", SETTINGS)
def test_on_a_gpu(how, weighted, request, cuda):
    """Two graphs a batch size, and what is in between on the device."""
    backend = get_target("cupy-emulated", request).backend
    turn = 2 * SETTINGS.index(how) + weighted
    loss = [*LOSSES.values()][turn % len(LOSSES)]
    optimizer = RULES[turn % len(RULES)]
    made = case(loss, optimizer, backend=backend, weighted=weighted, **how)
    before = cuda.counts["captures"]
    (arrays, values), seen = halved(CaptureEngine, made)
    assert len(seen) > len(values) == 12  # the first steps are checked
    assert cuda.counts["captures"] - before == 2 * 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wanted, wanted_values = run(CaptureEngine, *made)
    np.testing.assert_allclose(values, wanted_values, rtol=1e-11)
    for a, b in zip(arrays, wanted, strict=True):
        np.testing.assert_allclose(to_host(a), to_host(b), rtol=0, atol=1e-12)


@pytest.mark.parametrize("members", [None, 3])
@pytest.mark.parametrize("kind", [Engine, ReplayEngine, CaptureEngine])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_total_comes_from_outside(kind, weighted, members, request, cuda, monkeypatch):
    """Of a part of the rows, and what others add, the step of all rows is made."""
    monkeypatch.setattr(replay_module.RecordedEngine, "EAGER", 0)
    on_gpu = kind is CaptureEngine
    backend = get_target("cupy-emulated", request).backend if on_gpu else NUMPY
    rng = np.random.RandomState(0)
    x, y = rng.standard_normal((12, 4)), rng.randint(3, size=12).astype(np.int32)
    weights = rng.uniform(0.1, 2.0, 12) if weighted else None
    network = mlp([4, 5, 3], "tanh", members=members)
    trainer = Trainer(
        network, SoftmaxCrossEntropy(), Adam(), backend, "float64", 0.1, alpha=0.3, clip_norm=0.5
    )
    params = network.init(np.random.RandomState(1))
    total = 12.0 if weights is None else float(weights.sum())

    def batch(rows):
        return Batch(
            backend.asarray(x[rows]), backend.asarray(y[rows]),
            None if weights is None else backend.asarray(weights[rows]),
        )  # fmt: skip

    hyper = [trainer.hyper(CLOCK, None)[0]]
    with backend.scope("float64"), warnings.catch_warnings():
        warnings.simplefilter("error")
        other = first_half(
            trainer.recipe, trainer.load(params), batch(slice(5, 12)), NO_NUMBERS, total
        )

        def reduce(vector):
            vector += other

        part = Task(batch(slice(0, 5)), None, 5, hyper, lambda: False, totals=[total])
        mine = trainer.start(params).arrays
        mine, values = kind(backend, trainer.recipe, reduce).run(mine, part)
        whole = Task(batch(slice(0, 12)), None, 12, hyper, lambda: False)
        wanted = trainer.start(params).arrays
        wanted, wanted_values = Engine(backend, trainer.recipe).run(wanted, whole)
    np.testing.assert_allclose(np.hstack(values[0]), np.hstack(wanted_values[0]), rtol=1e-13)
    for a, b in zip([*flatten(mine)], [*flatten(wanted)], strict=True):
        np.testing.assert_allclose(to_host(a), to_host(b), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", [Engine, ReplayEngine])
def test_each_step_has_a_total_of_its_own(kind, monkeypatch):
    """Two batches of which these are parts: with half of each, and the totals of all."""
    monkeypatch.setattr(replay_module.RecordedEngine, "EAGER", 0)
    trainer, arrays, batch = case(SquaredError(), SGD(), alpha=0.5, n=10)
    hypers = [trainer.hyper(CLOCK, None)[0]] * 2
    totals = [10.0, 40.0]
    found = kind(NUMPY, trainer.recipe, lambda vector: None)
    got, _ = found.run(
        trainer.start(trainer.params(arrays.leaves)).arrays,
        Task(batch, None, 5, hypers, lambda: False, totals=totals),
    )
    params = trainer.params(trainer.start(trainer.params(arrays.leaves)).arrays.leaves)
    leaves = trainer.load(params)
    for start, total in zip((0, 5), totals, strict=True):
        part = Batch(*(None if a is None else a[start : start + 5] for a in batch))
        vector = first_half(trainer.recipe, leaves, part, NO_NUMBERS, total)
        after, _ = second_half(
            trainer.recipe, Arrays(leaves, [() for _ in leaves]), vector, hypers[0], total
        )
        leaves = after.leaves
    for a, b in zip(got.leaves, leaves, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-13)


@pytest.mark.parametrize("members", [3])
@pytest.mark.parametrize("weighted", [False, True])
def test_halves_of_members(members, weighted, monkeypatch):
    monkeypatch.setattr(replay_module.RecordedEngine, "EAGER", 0)
    rng = np.random.RandomState(0)
    data = Batch(
        rng.standard_normal((24, 4)), rng.standard_normal((24, 2)),
        rng.uniform(size=24) if weighted else None,
    )  # fmt: skip
    network = mlp([4, 5, 2], "tanh", members=members)
    found = []
    for reduce in (None, lambda vector: None):
        trainer = Trainer(
            network, SquaredError(), Adam(), NUMPY, "float64", 0.1, alpha=0.3, batch_size=10,
            reduce=reduce,
        )  # fmt: skip
        state = trainer.start(network.init(np.random.RandomState(1)))
        trainer.fit(state, ArraySource(data), 5, np.random.RandomState(2))
        found.append([*state.final_leaves, [epoch.loss for epoch in state.history]])
    for a, b in zip(*found, strict=True):
        np.testing.assert_array_equal(a, b)


def test_jax_has_no_halves():
    made = case(SquaredError(), Adam())
    with pytest.raises(ValueError, match="JAX compiles whole steps"):
        ScanEngine(NUMPY, made[0].recipe, lambda vector: None)


def test_the_halves_together_are_the_step():
    """In NumPy's own functions, without an engine."""
    trainer, arrays, batch = case(SquaredError(), Adam(), weighted=True, alpha=0.1)
    vector = first_half(trainer.recipe, arrays.leaves, batch, NO_NUMBERS)
    hyper, _ = trainer.hyper(CLOCK, None)
    (leaves, _), (value, _) = second_half(trainer.recipe, arrays, vector, hyper)
    assert value == vector[-2]
    assert leaves[0].shape == arrays.leaves[0].shape


def test_a_loss_of_ones_own_need_not_know_of_parts():
    class Plain(SquaredError):
        def __call__(self, z, y, xp, weights=None):
            return super().__call__(z, y, xp, weights)

    trainer, arrays, batch = case(Plain(), Adam(), batch_size=5)
    for a, b in zip(
        fit(trainer, arrays, batch),
        fit(*case(SquaredError(), Adam(), batch_size=5)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


# ---------------------------------------------------------------- programs at random

N = 8
OPS = ["add", "half", "joined", "turned", "sum", "view", "greater"]


@st.composite
def joining(draw):
    """Instructions on a stack of vectors, some of them joined of parts; and which are returned."""
    index = st.integers(0, 30)
    steps = draw(st.lists(st.tuples(st.sampled_from(OPS), index, index), min_size=3, max_size=10))
    return steps, draw(st.tuples(index, index, index, st.booleans()))


def joined(program, xp, p, q, kept, passed):
    """The first two results replace p and q; an element of what is kept is shown."""
    steps, (i, j, k, prefers_joined) = program
    stack, vectors = [p, q, kept, passed], []
    for op, a, b in steps:
        x, y = stack[a % len(stack)], stack[b % len(stack)]
        if op == "add":
            new = x + y
        elif op == "half":
            new = x * 0.5
        elif op == "joined":
            vectors.append(xp.concat([x[:4] * 2.0, y[4:] + 1.0]))
            new = vectors[-1]
        elif op == "turned":
            vectors.append(xp.concat([x[4:], y[:4] * 1.5]))
            new = vectors[-1]
        elif op == "sum":
            new = x - xp.sum(y)
        elif op == "view":
            new = xp.reshape(xp.permute_dims(xp.reshape(x, (2, 4)), (1, 0)), (N,)) + y
        else:
            new = xp.maximum(x, y) * 0.5
        stack.append(new)
    new = stack[4:]
    first = vectors if vectors and prefers_joined else new
    return (first[i % len(first)], new[j % len(new)]), (new[k % len(new)][1], kept[3])


def repeated(program):
    """The program twice, each time from what the last left; p and q donated, one resident."""
    rng = np.random.RandomState(0)
    given = [rng.standard_normal(N) for _ in range(4)]
    recorder = Recorder()
    recorded, _ = record(lambda *a: joined(program, recorder, *a), recorder, specify(tuple(given)))
    verify(recorded, 2, 1)
    replay = lower(recorded, 2, NumPyDialect, n_resident=1)
    mine, (p, q, kept, passed) = [a.copy() for a in given[:3]], given
    run_it = replay.bind(mine, NumPyDialect(NUMPY))
    for _ in range(2):
        (p, q), shown = joined(program, np, p.copy(), q.copy(), kept, passed)
        found = run_it(passed)
        np.testing.assert_array_equal(found, shown)
        np.testing.assert_array_equal(mine[0], p)
        np.testing.assert_array_equal(mine[1], q)
        np.testing.assert_array_equal(mine[2], kept)


@settings(max_examples=300, deadline=None)
@given(joining())
def test_joined_results_are_written_over_nothing_that_is_read(program):
    repeated(program)


def test_a_result_may_have_taken_the_place_that_another_replaces():
    """t lies over p, which nobody reads any more; what replaces p has to wait for t."""
    steps = [("half", 0, 0), ("joined", 3, 3), ("sum", 1, 4), ("add", 6, 4)]
    repeated((steps, (0, 3, 0, True)))


def test_a_planner_that_forgot_it_would_be_seen(monkeypatch):
    """The planted twin: it looks at who reads the donated array, not at what lies there."""

    def replaced(self, x, until, now):
        read = {o.root for segment in self.segments[now:] for y in segment for o in y.arrays}
        for memory, (old, output) in enumerate(
            zip(self.donated, self.program.outputs, strict=False)
        ):
            if output is x and old not in read:
                return memory
        return None

    monkeypatch.setattr(Plan, "_replaced", replaced)

    @settings(max_examples=300, deadline=None, database=None, derandomize=True)
    @given(joining())
    def check(program):
        repeated(program)

    with pytest.raises(AssertionError):
        check()

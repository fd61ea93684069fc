"""Engines: recorded steps are the step itself, to the last bit on NumPy."""

from __future__ import annotations

import copy
import re
import warnings
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from helpers.programs import forget_later_reads, programs, replayed
from helpers.steps import (
    NUMPY,
    RULES,
    LeavesTheTable,
    LooksAtValues,
    case,
    fit,
    hyper_of,
    run,
)
from helpers.targets import get_target
from hypothesis import given, settings

from portable_mlp import ACTIVATIONS
from portable_mlp.callbacks import Callback
from portable_mlp.engines import ENGINES, Engine, ReplayEngine, Task, base
from portable_mlp.engines.base import RecordedEngine, Tree, recorded
from portable_mlp.engines.graph.program import flatten, specify
from portable_mlp.engines.graph.recording import Recorder, Unrecordable, record
from portable_mlp.engines.graph.verifier import ProgramError, verify
from portable_mlp.engines.host import replay as replay_module
from portable_mlp.engines.host.dialects import NumPyDialect, TorchDialect
from portable_mlp.engines.host.memory import Plan
from portable_mlp.engines.host.plan_verifier import verify_plan
from portable_mlp.engines.host.python_source import lower
from portable_mlp.losses import LOSSES, SoftmaxCrossEntropy, SquaredError
from portable_mlp.members import PerMember
from portable_mlp.optimizers import Adam
from portable_mlp.steps import Batch, step


@pytest.fixture(autouse=True)
def _recorded_from_the_first_step(monkeypatch):
    monkeypatch.setattr(RecordedEngine, "EAGER", 0)


@pytest.mark.parametrize("optimizer", RULES, ids=repr)
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_replay_is_the_step_to_the_last_bit(loss, optimizer):
    for weighted, settings_ in product(
        [False, True],
        [{}, {"alpha": 0.1}, {"dropout": 0.3}, {"clip_norm": 0.05, "alpha": 0.1}],
    ):
        made = case(loss, optimizer, weighted=weighted, **settings_)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            arrays, values = run(ReplayEngine, *made)
        wanted, wanted_values = run(Engine, *made)
        # A reduction over all, NumPy's pairwise sum and a product differ in rounding
        np.testing.assert_allclose(values, wanted_values, rtol=1e-14)
        for a, b in zip(arrays, wanted, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("sizes", [(5, 3), (4, 1, 300, 2, 3), (2, 600, 3)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_replay_of_every_activation_and_width(activation, sizes):
    for dtype, n in product(["float64", "float32"], [12, 13]):
        made = case(
            SoftmaxCrossEntropy(0.1), Adam(), activation, dtype=dtype, sizes=sizes, n=n, alpha=0.1
        )
        arrays, values = run(ReplayEngine, *made)
        wanted, wanted_values = run(Engine, *made)
        np.testing.assert_array_equal(values, wanted_values)
        for a, b in zip(arrays, wanted, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ["torch", "jax", "torch-cuda", "jax-cuda", "cupy"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_engines_of_other_backends_agree_with_eager_numpy(name, loss, weighted, request):
    backend = get_target(name, request).backend
    kind = ENGINES[backend.engine]
    options = {"weighted": weighted, "alpha": 0.1, "dropout": 0.3, "clip_norm": 0.5}
    # Twelve cases: each rule and each activation in turn, for XLA compiles long
    turn = 2 * list(LOSSES).index(loss) + weighted
    optimizer = RULES[turn % len(RULES)]
    activation = [*ACTIVATIONS][turn % len(ACTIVATIONS)]
    arrays, values = run(kind, *case(LOSSES[loss], optimizer, activation, backend, **options))
    made = case(LOSSES[loss], optimizer, activation, **options)
    wanted, wanted_values = run(Engine, *made)
    np.testing.assert_allclose(values, wanted_values, rtol=1e-11)
    if not backend.packs:
        n = len(made[0].recipe.layout.leaves)
        arrays, wanted = arrays[: len(made[0].network.params)], made[0].params(wanted[:n])
    for a, b in zip(arrays, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-11 * np.abs(b).max())


def test_narrow_products_and_masks_are_the_same_in_other_words(request):
    backend = get_target("torch", request).backend
    sizes, n = (20, 18, 17, 3), 40
    what = SoftmaxCrossEntropy(), Adam(), "relu"
    made = case(*what, backend, sizes=sizes, n=n)
    arrays, values = run(ReplayEngine, *made, batch_size=20)
    made = case(*what, sizes=sizes, n=n)
    wanted, wanted_values = run(Engine, *made, batch_size=20)
    np.testing.assert_allclose(values, wanted_values, rtol=1e-11)
    for a, b in zip(arrays, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-11 * np.abs(b).max())
    source = source_of(TorchDialect, sizes=sizes, n=n)
    assert source.count(".copy_(p") == 1  # the last layer's weights
    assert "torch.bool" not in source


# ---------------------------------------------------------------- programs at random


def test_a_choice_is_not_written_over_its_condition():
    """In blocks, where scratch memory is used again."""
    steps = [("tanh", 0, 0), ("where", 0, 4), *[("tanh", 0, 0)] * 3, ("tanh", 23, 0)]
    replayed(([*steps, ("tanh", 0, 0)], [0, 0, 20], 0), block=10)


def test_a_mask_that_is_a_condition_too_stays_one():
    replayed(([("astype", 0, 0), ("where", 0, 0)], [4, 5, 0], 1), numeric_masks=True)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(programs())
def test_programs_at_random(program):
    """Whatever is reused, overwritten or cut into blocks, the values are NumPy's own."""
    replayed(program)
    replayed(program, block=10)
    replayed(program, block=10, narrow=3, numeric_masks=True)
    replayed(program, (5, 5))
    replayed(program, (5, 5), block=10)


@pytest.mark.slow
@pytest.mark.parametrize("slip", ["later reads forgotten", "every operand overwritten"])
def test_a_planner_with_a_slip_would_be_seen(slip, monkeypatch):
    """The planted twins of the test above: by the values, without the plan's verifier."""
    monkeypatch.delenv("PORTABLE_MLP_VERIFY")
    if slip == "later reads forgotten":
        forget_later_reads(monkeypatch)
    else:
        monkeypatch.setattr("portable_mlp.engines.graph.program.NOT_ELEMENTWISE", set())

    @settings(max_examples=300, deadline=None, database=None)
    @given(programs())
    def check(program):
        replayed(program)

    with pytest.raises(Exception):  # noqa: B017, PT011 (which one depends on the slip)
        check()


@pytest.mark.parametrize("block", [0, 5])
def test_a_number_with_axes_is_neither_turned_nor_cut(block):
    """One value for each row of what is turned beside it, and what is cut into blocks."""
    number = PerMember((1.0, 2.0, 3.0), ndim=2)
    a, donated = np.random.RandomState(0).standard_normal((4, 3)), np.ones((3, 4))
    xp = Recorder()

    def function(d, a, n):
        return [xp.tanh(xp.abs(d[0]) * n) + xp.tanh(a.T * n)], [xp.sum(a)]

    program, _ = record(function, xp, specify(([donated], a, number)))
    dialect = type("Dialect", (NumPyDialect,), {"block": block})
    replay = lower(program, 1, dialect, loops=False).bind([donated], dialect(NUMPY), None)
    for _ in range(2):
        wanted = np.tanh(np.abs(donated) * number.values) + np.tanh(a.T * number.values)
        replay(a, number.values)
        np.testing.assert_array_equal(donated, wanted)


# ---------------------------------------------------------------- what runs


def test_few_steps_are_not_worth_recording(monkeypatch):
    """Epochs within the first steps run eagerly, and what follows is as if they had not."""
    monkeypatch.setattr(RecordedEngine, "EAGER", 7)
    made = case(SquaredError(), Adam(), alpha=0.1)
    replay_module._prepare.cache_clear()
    arrays, values = run(ReplayEngine, *made, n_steps=3)
    assert replay_module._prepare.cache_info().currsize == 2  # batches of 5 and 2 rows
    wanted, wanted_values = run(Engine, *made, n_steps=3)
    np.testing.assert_allclose(values, wanted_values, rtol=1e-14)
    for a, b in zip(arrays, wanted, strict=True):
        np.testing.assert_array_equal(a, b)
    replay_module._prepare.cache_clear()
    run(ReplayEngine, *made, n_steps=2)
    assert replay_module._prepare.cache_info().currsize == 0


@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_no_namespace_is_called_during_an_epoch(name, request, monkeypatch):
    """After the first epoch has recorded it, the step itself is never called again."""
    backend = get_target(name, request).backend
    calls = []

    def counted(*args):
        calls.append(args)
        return step(*args)

    monkeypatch.setattr(base, "step", counted)
    replay_module._prepare.cache_clear()

    class After(Callback):
        def on_epoch_end(self, epoch, params):
            seen.append(len(calls))

    seen: list[int] = []
    trainer, arrays, batch = case(SquaredError(), Adam(), backend=backend, batch_size=5)
    fit(trainer, arrays, batch, callbacks=[After()])
    # 12 rows: batches of 5, and one of 2
    assert seen == [2, 2, 2]
    fit(trainer, arrays, batch)
    assert len(calls) == 2  # recorded programs outlive a fit


@pytest.mark.parametrize(
    ("loss", "reason"),
    [(LooksAtValues(), "looks at the value"), (LeavesTheTable(), "no cumulative_sum")],
)
def test_what_cannot_be_recorded_runs_eagerly_and_says_so(loss, reason):
    trainer, arrays, batch = case(loss, Adam(), batch_size=5)
    with pytest.warns(RuntimeWarning, match=f"the step runs eagerly.*{reason}"):
        got = fit(trainer, arrays, batch)
    plain = replace(trainer, loss=SquaredError())
    for a, b in zip(got, fit(plain, arrays, batch), strict=True):
        np.testing.assert_array_equal(a, b)


def test_two_fits_at_once_share_a_program_but_no_buffer():
    trainer, arrays, batch = case(SquaredError(), Adam())
    first, second = (copy.deepcopy(arrays) for _ in range(2))
    one, two = (ReplayEngine(NUMPY, trainer.recipe) for _ in range(2))
    hypers = [hyper_of(trainer, 1)]
    for _ in range(3):
        one.run(first, Task(batch, None, 12, hypers, lambda: False))
        two.run(second, Task(batch, None, 12, hypers, lambda: False))
    for a, b in zip(flatten(first), flatten(second), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_short_batch_may_come_first():
    # As where a fit over a sparse matrix goes on at its last batch
    trainer, arrays, batch = case(SquaredError(), Adam())
    short = Batch(*(a if a is None else a[:3] for a in batch))
    hypers = [hyper_of(trainer, 1)]
    results = []
    for kind in (ReplayEngine, Engine):
        engine, own = kind(NUMPY, trainer.recipe), copy.deepcopy(arrays)
        engine.EAGER = 0
        for data in (short, batch, short):
            order = np.arange(len(data.x))[::-1]
            own, _ = engine.run(own, Task(data, order, 12, hypers, lambda: False))
        results.append(own)
    for a, b in zip(*map(flatten, results), strict=True):
        np.testing.assert_array_equal(a, b)


def source_of(dialect, **settings_):
    trainer, arrays, batch = case(SoftmaxCrossEntropy(), Adam(), "relu", **settings_)
    recorder = Recorder()
    arguments = specify((arrays, batch, hyper_of(trainer, 1)))
    program, _ = record(
        lambda *args: step(replace(trainer.recipe, xp=recorder), *args), recorder, arguments
    )
    return lower(program, len(list(flatten(arrays))), dialect).source


def test_gradients_are_written_where_they_belong():
    """No concatenation and no copy is left of packing, whatever the depth."""
    for dialect in (NumPyDialect, TorchDialect):
        source = source_of(dialect, sizes=(5, 7, 6, 5, 3))
        assert "concat" not in source
        assert "cat(" not in source
        assert "moved" not in source


def test_memory_of_a_deep_network_is_that_of_its_activations():
    """Buffers: the gradients, what backward needs of each layer, and little else."""
    n, width, depth = 64, 128, 6
    source = source_of(NumPyDialect, sizes=(width,) * (depth + 1) + (3,), n=n)
    (n_bytes,) = map(int, re.findall(r"= work\((\d+)\)", source))
    activations = n * width * depth * 8
    parameters = (width * width + width) * depth * 8
    # Adam's two temporaries are a block each, or a parameter vector
    assert activations < n_bytes <= activations + 3 * n * width * 8 + 3 * parameters


@pytest.mark.parametrize(
    "function",
    [
        lambda x, xp: x if x > 0 else -x,
        lambda x, xp: xp.asarray([1.0]),
        lambda x, xp: x + np.ones(3),
        lambda x, xp: x[x > 0],
        lambda x, xp: xp.sort(x),
        lambda x, xp: x + 1j,
    ],
)
def test_recorder_refuses_what_it_cannot_hold(function):
    recorder = Recorder()
    with pytest.raises(Unrecordable):
        record(lambda x: function(x, recorder), recorder, specify((np.ones(3),)))


# ---------------------------------------------------------------- the rules of programs


def test_a_transpose_of_more_than_two_axes_runs_eagerly():
    """The standard has T of matrices alone; NumPy reverses the order of all axes."""
    for array in (np.ones((2, 3, 4)), np.ones(3)):
        arguments = specify((array,))
        with pytest.raises(Unrecordable, match=f"transpose T of an array of {array.ndim} dim"):
            record(lambda x: x.T, Recorder(), arguments)


@pytest.mark.parametrize("axes", [(0, 0, 1), (0, 1), (0, 1, 3), (-4, 1, 2)])
def test_axes_that_are_none_are_an_error(axes):
    recorder = Recorder()
    with pytest.raises(ValueError, match="are not the axes"):
        record(lambda x: recorder.permute_dims(x, axes), recorder, specify((np.ones((2, 3, 4)),)))


def any_program(x, w, n, xp):
    """Something of every kind of operation, on three axes."""
    y = xp.permute_dims(x, (2, 0, 1))
    y = xp.reshape(y * n + 1, (4, 6)) @ w
    y = xp.concat([y[1:3, :], y[:, None, 0] + xp.zeros_like(y)], axis=0)
    y = xp.where(y > 0.0, y, -n * y) - xp.max(y, axis=1, keepdims=True)
    y = xp.broadcast_to(xp.exp(y)[None, ...], (3, *y.shape))
    total = xp.sum(xp.astype(y, xp.float32), axis=(0, 2)) + xp.arange(6, dtype=xp.float32)
    return [x + 1.0], [total, xp.matmul(x, xp.full((2, 4, 5), 2.0, dtype=x.dtype))]


def made_program():
    recorder = Recorder()
    arguments = specify((np.ones((2, 3, 4)), np.ones((6, 5)), 0.5))
    return record(lambda *a: any_program(*a, recorder), recorder, arguments)[0]


def test_a_program_keeps_the_rules():
    program = made_program()
    assert len({node.op for node in program.nodes}) > 14
    verify(program, n_donated=1)


def test_large_arrays_are_verified_without_their_memory():
    recorder = Recorder()
    arguments = specify((np.broadcast_to(1.0, (2**20, 2**20)),))
    program, _ = record(
        lambda x: recorder.reshape(x[5:, :], (-1,))[7:] + x[0, :1], recorder, arguments
    )
    verify(program)


def with_node(program, change):
    """The program with other nodes, and their readers with them."""
    made = {}

    def remade(x):
        return made.get(id(x), x)

    for x in (*program.inputs, *program.nodes):
        new = replace(x, operands=tuple(remade(o) for o in x.operands))
        made[id(x)] = change(new) or new
    return replace(
        program,
        inputs=tuple(map(remade, program.inputs)),
        nodes=tuple(map(remade, program.nodes)),
        outputs=tuple(map(remade, program.outputs)),
    )


@pytest.mark.parametrize(
    "op", sorted({node.op for node in made_program().nodes if not node.is_number})
)
@pytest.mark.parametrize("slip", ["shape", "dtype"])
def test_a_wrong_node_would_be_seen(op, slip):
    """The planted twins: of each operation, a wrong shape and a wrong data type."""

    def change(node):
        if node.op == op and not node.is_number:
            if slip == "shape":
                return replace(node, shape=(*node.shape[:-1], 7) if node.shape else (7,))
            return replace(node, dtype=np.dtype(np.float16 if node.dtype.kind == "f" else "i1"))
        return None

    if slip == "dtype" and op in ("astype", "full", "arange"):
        pytest.skip("its data type is its own")
    with pytest.raises(ProgramError):
        verify(with_node(made_program(), change))


def test_other_slips_would_be_seen():
    program = made_program()
    with pytest.raises(ProgramError, match="stands before its operand"):
        verify(replace(program, nodes=program.nodes[::-1]))
    with pytest.raises(ProgramError, match="an output is not in the program"):
        verify(replace(program, nodes=program.nodes[:-1]))
    with pytest.raises(ProgramError, match="is to replace"):
        verify(replace(program, outputs=program.outputs[::-1]), n_donated=1)
    with pytest.raises(ProgramError, match="are donated, for 3 outputs"):
        verify(program, n_donated=4)

    def taken_for_contiguous(node):
        return replace(node, contiguous=True) if node.op == "permute" else None

    with pytest.raises(ProgramError, match="is taken for contiguous"):
        verify(with_node(program, taken_for_contiguous))


def test_a_program_that_breaks_a_rule_is_no_reason_to_run_eagerly(monkeypatch):
    """A fault of ours is an error where programs are verified."""

    def wrong(self, op, operands, attrs, shape, dtype, contiguous=True, node=Recorder.node):
        dtype = np.dtype(np.float32) if op == "tanh" else dtype
        return node(self, op, operands, attrs, shape, dtype, contiguous)

    monkeypatch.setattr(Recorder, "node", wrong)
    replay_module._prepare.cache_clear()
    with pytest.raises(ProgramError, match="tanh"):
        run(ReplayEngine, *case(SquaredError(), Adam()))


@pytest.mark.parametrize("loops", [False, True])
def test_a_plan_that_overwrites_what_is_still_read_is_seen(loops):
    """Each result is moved to where another lies that is read later: the planted bugs."""
    trainer, arrays, batch = case(SoftmaxCrossEntropy(), Adam(), weighted=True, alpha=0.1)
    arguments = Tree(specify((arrays, batch, hyper_of(trainer, 1))))
    program, roles = recorded(trainer.recipe, arguments)

    plan = Plan(program, roles.donated, NumPyDialect.block, loops=loops)
    verify_plan(plan)
    order = [x for segment in plan.segments for x in segment if x not in plan.registers]
    written = {x: i for i, x in enumerate(order)}
    read = {o.root: i for i, x in enumerate(order) for o in x.arrays}
    seen = 0
    for x, y in product(order, (*plan.given, *order)):
        alive = written.get(y, -1) < written[x] < read.get(y, -1)
        apart = plan.place[x][0] != plan.place[y][0] and not {x, y} & plan.homes.keys()
        if alive and apart and y.n_bytes >= x.n_bytes:
            right, plan.place[x] = plan.place[x], plan.place[y]
            with pytest.raises(ProgramError, match="by now|is written over"):
                verify_plan(plan)
            plan.place[x] = right
            seen += 1
    assert seen > 50

"""The CUDA engine without a GPU: its kernels and graphs on an emulated machine."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from functools import partial
from importlib import import_module

import numpy as np
import pytest
from helpers.programs import SHAPE, interpret, programs
from helpers.steps import NUMPY, RULES, LeavesTheTable, LooksAtValues, case, fit, hyper_of, run
from helpers.targets import emulated_gpu
from hypothesis import HealthCheck, Phase, given, settings

from portable_mlp import ACTIVATIONS, mlp
from portable_mlp.backends import CuPyBackend, to_host
from portable_mlp.engines import CaptureEngine, Engine, Task, base
from portable_mlp.engines.cuda import fusion, kernels
from portable_mlp.engines.cuda.runtime import Cuda
from portable_mlp.engines.graph.program import flatten, specify
from portable_mlp.engines.graph.recording import Recorder, Unrecordable, record
from portable_mlp.losses import LOSSES, SoftmaxCrossEntropy, SquaredError
from portable_mlp.optimizers import Adam, SklearnAdam
from portable_mlp.sources import ArraySource, Source
from portable_mlp.steps import Batch
from portable_mlp.training import Trainer

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def machine(cuda):
    return cuda


def agree(got, wanted, rtol):
    for a, b in zip(got[0], wanted[0], strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * np.abs(b).max())
    np.testing.assert_allclose(got[1], wanted[1], rtol=10 * rtol, atol=rtol)


def check(loss, optimizer, *args, rtol=1e-13, how=None, **settings_):
    """The engine on a GPU against the step itself on NumPy."""
    how = how or {}
    got = run(
        CaptureEngine, *case(loss, optimizer, *args, backend=emulated_gpu(), **settings_), **how
    )
    agree(got, run(Engine, *case(loss, optimizer, *args, **settings_), **how), rtol)


# ---------------------------------------------------------------- the arithmetic


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_emitted_kernels_are_the_step(loss, weighted):
    """Every loss, weighted or not, with every rule and the step's other parts in turn."""
    turn = 2 * list(LOSSES).index(loss) + weighted
    options = [{}, {"alpha": 0.1}, {"dropout": 0.3}, {"clip_norm": 0.05, "alpha": 0.1}][turn % 4]
    optimizer = RULES[turn % len(RULES)]
    check(LOSSES[loss], optimizer, weighted=weighted, **options)


@pytest.mark.parametrize("sizes", [(5, 3), (4, 1, 300, 2, 3), (2, 20, 70)])
def test_widths_and_more_classes_than_a_thread_keeps(sizes, machine):
    check(SoftmaxCrossEntropy(0.1), Adam(), sizes=sizes, n=13, alpha=0.1)
    assert machine.counts["captures"] == 2  # 13 rows: batches of 5, and one of 3


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation):
    how = {"batch_size": 12}
    check(SquaredError(), SklearnAdam(), activation, sizes=(5, 7, 3), rtol=1e-12, how=how)


def test_threads_add_up_together(machine, monkeypatch):
    """Sums over many elements, by several threads of several blocks."""
    machine.threads = 8
    monkeypatch.setattr(fusion, "_SHARE", 100)
    how = {"n_steps": 2, "batch_size": 450}
    check(SquaredError(), RULES[0], sizes=(12, 30, 2), n=450, alpha=0.1, how=how)


def test_in_float32(machine):
    check(SoftmaxCrossEntropy(), RULES[1], "selu", dtype="float32", alpha=0.1, rtol=1e-6)
    assert machine.counts["replays"]


def compiled(program, donated, passed):
    recorder = Recorder()
    recorded, _ = record(
        lambda d, p, n: interpret(program, recorder, d, p, n),
        recorder,
        specify((donated, passed, 0.5)),
    )
    return kernels.compile_program(recorded, len(donated))


class OnDevice:
    """Kernels bound to arrays on a GPU.

    Parameters
    ----------
    built : Kernels
    arrays : list of ndarray
        Inputs; copied to the device.
    table : list of list of float
        Numbers of each step.
    """

    def __init__(self, built, arrays, table):
        cupy = import_module("cupy")
        self.cuda = cuda = Cuda()
        self.arrays = [cupy.array(a) for a in arrays]
        memories = [*self.arrays, cupy.full(built.n_bytes, 255, np.uint8)]
        self.at, self.results = cupy.zeros(1, np.int32), cupy.zeros((len(table), built.n_results))
        table = cupy.array(np.array(table))
        launch = cuda.compile(built.source)

        def array(view):
            return cuda.array(memories[view.place.memory], view)

        for view, value in built.constants:
            array(view)[...] = value
        self.calls = []
        for each in built.launches:
            if isinstance(each, kernels.Kernel):
                last = [self.results] if each is built.launches[-1] else []
                arguments = [table, self.at, *map(array, each.arguments), *last]
                self.calls.append(partial(launch, each, arguments))
            else:
                self.calls.append(
                    partial(cuda.multiply, *map(array, (each.left, each.right, each.out)))
                )

    def launch(self):
        for call in self.calls:
            call()


def launched(program):
    """The program three times, each from what the last left; all that it returned.

    Launch by launch at first, and then as a graph.
    """
    rng = np.random.RandomState(1)
    donated = [rng.standard_normal(SHAPE) for _ in range(3)]
    passed = rng.standard_normal(SHAPE)
    bound = OnDevice(compiled(program, donated, passed), [*donated, passed], [[0.5], [1.5], [2.5]])
    for i in range(3):
        wanted, shown = interpret(program, np, [a.copy() for a in donated], passed, 0.5 + i)
        if i == 0:
            bound.launch()
            graph = bound.cuda.capture(bound.launch)
        else:
            graph.launch()
        *mine, same = [a.get() for a in bound.arrays]
        assert bound.at.get()[0] == i + 1
        np.testing.assert_array_equal(same, passed)
        if not all(np.abs(a).max() < 1e6 for a in wanted):
            return
        for a, b in zip(mine, wanted, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12 * np.abs(b).max())
        np.testing.assert_allclose(bound.results.get()[i, 0], shown[0], rtol=1e-9, atol=1e-10)
        donated = [np.array(a) for a in wanted]


# A machine that has run a program runs the next one, too
LASTING = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


@settings(max_examples=30, **LASTING)
@given(programs())
def test_programs_at_random(program):
    """However it is cut into kernels, and whatever memory is used again."""
    launched(program)


@pytest.mark.parametrize("slip", ["memory free too early", "every read taken for local"])
def test_a_builder_with_a_slip_would_be_seen(slip, monkeypatch):
    """The planted twins of the test above."""
    if slip == "memory free too early":

        def allocate(self, original=fusion.Fusion._allocate):
            n_bytes = original(self)
            work = len(self.arrays)
            for x, place in self.places.items():
                if place.memory == work:
                    self.places[x] = kernels.Place(work, 0)
            return n_bytes

        monkeypatch.setattr(fusion.Fusion, "_allocate", allocate)
    else:
        own = fusion.Fusion._own
        monkeypatch.setattr(
            fusion.Fusion, "_own", lambda self, x, rows: own(self, x, rows)._replace(flat="i")
        )

    # Without shrinking, which would compile hundreds more
    @settings(max_examples=60, database=None, derandomize=True, phases=[Phase.generate], **LASTING)
    @given(programs())
    def check(program):
        launched(program)

    with pytest.raises(Exception):  # noqa: B017, PT011 (which one depends on the slip)
        check()


def written(function, donated, *passed):
    """What `function` returns, by NumPy and by its kernels: the outputs and the results."""
    recorder = Recorder()
    recorded, _ = record(
        lambda d, *p: function(recorder, d, *p), recorder, specify((donated, *passed))
    )
    built = kernels.compile_program(recorded, len(donated))
    wanted = function(np, [a.copy() for a in donated], *passed)
    arrays = [a for a in passed if isinstance(a, np.ndarray)]
    numbers = [[a for a in passed if not isinstance(a, np.ndarray)]]
    bound = OnDevice(built, [*donated, *arrays], numbers)
    bound.launch()
    mine = [a.get() for a in bound.arrays[: len(donated)]]
    return (mine, bound.results.get()[0, : len(wanted[1])]), wanted


def joined(xp, x, b):
    other = xp.astype(b[1:, :], x.dtype)
    return xp.concat([xp.reshape(x[:1, :], (-1,)), xp.reshape(other, (-1,))])


@pytest.mark.parametrize(
    "function",
    [
        lambda xp, d, b, i: ([d[0] - 0.1 * xp.sum(d[1]), d[1] * d[0]], [0.5 * xp.sum(d[1] * d[0])]),
        lambda xp, d, b, i: ([d[1][0, 0] + d[0], xp.tanh(d[1])], []),
        lambda xp, d, b, i: ([d[0], xp.astype(~b, d[1].dtype) + d[1]], []),
        lambda xp, d, b, i: ([d[0], xp.reshape(joined(xp, d[1], b), (3, 2))], []),
        lambda xp, d, b, i: ([d[0], xp.where(xp.isfinite(i), xp.floor(i), 0) + d[1]], []),
        lambda xp, d, b, i: (
            [d[0], xp.astype(xp.where(b, i, xp.astype(i, np.float32)), d[1].dtype)],
            [],
        ),
    ],
    ids=[
        "without axes",
        "an element of what is overwritten",
        "not",
        "joined",
        "integers",
        "where converts",
    ],
)
def test_corners(function):
    donated = [np.array(2.5), np.arange(6.0).reshape(3, 2)]
    bools = np.array([[True, False], [False, False], [True, True]])
    integers = np.array([[2**40 + 1, 3], [-5, 0], [7, 2**40]])
    got, wanted = written(function, donated, bools, integers)
    for a, b in zip(got[0], wanted[0], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-15)
    np.testing.assert_allclose(got[1], wanted[1], rtol=1e-15)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda xp, x, n: xp.matmul(x[:, ::2], x[:2, :]), "gaps"),
        (lambda xp, x, n: xp.matmul(x[::-1, :], x), "gaps"),
        (lambda xp, x, n: xp.matmul(xp.arange(4, dtype=x.dtype), x), "nowhere in memory"),
        (lambda xp, x, n: xp.matmul(xp.full((4, 4), n, dtype=x.dtype), x), "nowhere in memory"),
        (lambda xp, x, n: x + xp.astype(xp.max(xp.astype(x, np.int32)), x.dtype), "max of int32"),
        (lambda xp, x, n: x + xp.astype(xp.astype(x, np.float16), x.dtype), "kernels of float16"),
        (lambda xp, x, n: x + xp.sum(xp.broadcast_to(x, (2**27, 4, 4))), "elements"),
        (lambda xp, x, n: x + xp.astype(xp.astype(x, np.int32) ** 2, x.dtype), "of integers"),
    ],
)
def test_refused(function, reason, monkeypatch):
    monkeypatch.setattr(fusion, "_LONG", 8)  # a maximum of 16 elements is a launch of its own
    recorder = Recorder()
    program, _ = record(
        lambda d, n: ([function(recorder, d[0], n)], []),
        recorder,
        specify(([np.ones((4, 4))], 0.5)),
    )
    with pytest.raises(Unrecordable, match=reason):
        kernels.compile_program(program, 1)


def test_a_result_out_of_what_is_overwritten_is_refused():
    recorder = Recorder()
    program, _ = record(
        lambda d: ([recorder.tanh(d[0])], [d[0][0] * 2.0]), recorder, specify(([np.ones(4)],))
    )
    with pytest.raises(Unrecordable, match="an array that it overwrites"):
        kernels.compile_program(program, 1)


# ---------------------------------------------------------------- the source


def built_step(sizes=(4, 16, 2), n=100, alpha=0.0, dtype="float32", **settings_):
    trainer, arrays, batch = case(
        SoftmaxCrossEntropy(), SklearnAdam(), "relu", sizes=sizes, n=n, dtype=dtype,
        alpha=alpha, **settings_,
    )  # fmt: skip
    hyper = hyper_of(trainer, 1, range(trainer.network.n_random))
    program, roles = base.recorded(trainer.recipe, base.Tree(specify((arrays, batch, hyper))))
    return kernels.compile_program(program, roles.donated)


ACTIVATION = """
extern "C" __global__ void k1(const double* table, int* step, float* m16, float* m0, float* out18) {
    int first = blockIdx.x * blockDim.x + threadIdx.x, all = gridDim.x * blockDim.x;
    for (int i = first; i < 1600; i += all) {
        float v17 = (m16[i] + m0[i % 16 + 96]);
        float v18 = (v17 > (float)(0.0) || v17 != v17 ? v17 : (float)(0.0));
        out18[i] = v18;
    }
}
"""

DERIVATIVE = """
    for (int i = first; i < 1600; i += all) {
        bool v47 = (m18[i] > (float)(0.0));
        float v48 = (float)v47;
        float v49 = (v48 * m46[i]);
        out49[i] = v49;
    }
"""

UPDATE = """
    for (int i = first; i < 114; i += all) {
        float v56 = (m1[i] * (float)(0.9));
        float v57 = (v56 + m55[i]);
        float v58 = (m2[i] * (float)(0.999));
        float v59 = (m55[i] * m55[i]);
        float v60 = (v58 + v59);
        float v61 = sqrt(v60);
        float v62 = (v61 + (float)(h[3]));
        float v63 = (v57 / v62);
        float v64 = (v63 * (float)(h[2]));
        float v65 = (m0[i] - v64);
        out57[i] = v57;
        out60[i] = v60;
        out65[i] = v65;
    }
"""


def test_activation_derivative_loss_and_update_are_a_kernel_each():
    built = built_step()
    for expected in (ACTIVATION, DERIVATIVE, UPDATE):
        assert expected in built.source
    # Bias and activation; bias and loss; its sum; derivative; update; the counter
    assert sum(isinstance(each, kernels.Kernel) for each in built.launches) == 6
    assert sum(isinstance(each, kernels.Product) for each in built.launches) == 7


def test_large_blocks_are_told_to_the_compiler_and_rows_are_found_beyond_an_int():
    source = built_step(alpha=0.1).source
    assert source.count("__launch_bounds__(1024)") == source.count("parts[1024]") > 0
    text, gather = kernels.gather_kernel(specify([np.ones((4, 3))]), 4, 4)
    assert "(long long)rows[" in text
    assert gather.threads == 256  # with up to 255 registers each, a block fits


def test_updates_are_in_place_and_gradients_where_they_belong():
    """Nothing is copied, whatever the depth: a layer more is two kernels and four products."""
    shallow = built_step((5, 7, 6, 3), alpha=0.1)
    deep = built_step((5, 7, 6, 5, 3), alpha=0.1)
    for built in (shallow, deep):
        assert "to[i]" not in built.source
    # and the penalty's sum, and its gradient
    assert len(deep.launches) - len(shallow.launches) == 2 + 4 + 2


def test_functions_without_an_overload_for_integers_are_not_called_with_one():
    """The host's compiler has overloads that NVIDIA's lacks."""
    recorder = Recorder()

    def function(d, i):
        return [d + recorder.where(recorder.isfinite(i), recorder.floor(i), 0)], []

    program, _ = record(
        lambda d, i: function(d[0], i), recorder, specify(([np.ones(3)], np.ones(3, np.int32)))
    )
    source = kernels.compile_program(program, 1).source
    assert "isfinite((double)m1[i])" in source
    assert "floor" not in source


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("sizes", [(4, 16, 2), (16, 16, 16), (8, 32, 64)])
def test_nvidia_s_compiler_takes_the_source(sizes, dtype, tmp_path):
    source = tmp_path / "kernels.cu"
    built = built_step(sizes, alpha=0.1, dropout=0.1, weighted=True, dtype=dtype)
    source.write_text(built.source)
    command = ["nvcc", "-arch=sm_90", "-cubin", "-Werror", "all-warnings", "-Xptxas", "-v"]
    done = subprocess.run(
        [*command, "-o", tmp_path / "kernels.cubin", source],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # All that stands between is in registers
    assert done.stderr.count("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads") == (
        done.stderr.count("bytes stack frame")
    )


# ---------------------------------------------------------------- what runs


def gpu_case(loss, **settings_):
    return case(loss, Adam(), backend=emulated_gpu(), batch_size=5, **settings_)


def same(got, wanted, rtol=1e-12):
    for a, b in zip(map(to_host, got), wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * np.abs(b).max())


def test_a_graph_is_all_that_is_launched(machine, monkeypatch):
    calls = []

    def counted(*args, original=CaptureEngine._step):
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(CaptureEngine, "_step", counted)
    fit(*gpu_case(SquaredError()))
    assert len(calls) == 2  # the checks: 12 rows are batches of 5, and one of 2
    assert machine.counts["captures"] == 2
    assert machine.counts["replays"] == 3 * 3


@pytest.mark.parametrize(
    "settings_", [{"alpha": 0.1}, {"dropout": 0.2, "shuffle": False}, {"clip_norm": 0.1}]
)
def test_a_whole_fit_is_numpy_s(settings_):
    got = fit(*gpu_case(SoftmaxCrossEntropy(), **settings_), epochs=6)
    same(got, fit(*case(SoftmaxCrossEntropy(), Adam(), batch_size=5, **settings_), epochs=6))


class ByBatch(Source):
    """Rows that come in arrays of their own, as a reader's or a sparse matrix's do."""

    def __init__(self, data, backend):
        self.data = data
        self.n_rows = len(data.x)
        self.backend = backend

    def begin(self, epoch, rng):
        if epoch == 0:
            self.order = np.arange(self.n_rows)
        rng.shuffle(self.order)

    def parts(self, batch_size):
        order = self.order
        for start in range(0, self.n_rows, batch_size):
            rows = self.backend.indices(order[start : start + batch_size])
            yield Batch(*(None if a is None else a[rows] for a in self.data)), None


@pytest.mark.parametrize(
    # Captured of the data itself, and then of arrays of its own; a shorter last batch twice, too
    ("n", "epochs", "captures"),
    [(20, 3, 2), (22, 6, 4)],
)
def test_data_that_changes_from_call_to_call(n, epochs, captures, machine):
    trainer, arrays, batch = gpu_case(SquaredError(), n=n)
    before = [to_host(a) for a in batch if a is not None]
    states = []
    for source in (ByBatch(batch, trainer.backend), ArraySource(batch)):
        state = trainer.start(trainer.params(arrays.leaves))
        trainer.fit(state, source, epochs, np.random.RandomState(0))
        states.append([to_host(a) for a in state.arrays.leaves])
        counts = machine.counts["captures"]
        if len(states) == 1:
            assert counts == captures
    same(*states)
    for a, b in zip(before, batch, strict=False):
        np.testing.assert_array_equal(a, to_host(b))


@pytest.mark.parametrize("batch_size", [12, 5])
def test_columns_first(batch_size):
    """Data that lies in memory column by column."""
    trainer, arrays, batch = case(SquaredError(), Adam(), backend=emulated_gpu())
    with trainer.backend.current():
        turned = batch._replace(x=trainer.backend.asarray(np.asfortranarray(to_host(batch.x))))
    assert not turned.x.flags.c_contiguous
    got = run(CaptureEngine, trainer, arrays, turned, batch_size=batch_size)
    wanted = run(Engine, *case(SquaredError(), Adam()), batch_size=batch_size)
    agree(got, wanted, 1e-13)


def test_epochs_at_once_are_replays_of_one_graph(machine):
    """However many of them a task has: few at first, as after a pause, and then more."""
    outcomes = []
    for kind, backend in ((CaptureEngine, emulated_gpu()), (Engine, NUMPY)):
        trainer, arrays, batch = case(SquaredError(), Adam(), backend=backend, alpha=0.1)
        engine = kind(trainer.backend, trainer.recipe)
        now, found, done = trainer.start(trainer.params(arrays.leaves)).arrays, [], 0
        for n in (1, 3, base.EPOCHS_AT_ONCE, 2):
            hypers = [hyper_of(trainer, done + i + 1) for i in range(n)]
            with backend.scope("float64"):
                now, values = engine.run(now, Task(batch, None, 12, hypers, lambda: False))
            found += values
            done += n
        outcomes.append((now.leaves, found))
    (got, values), (wanted, wanted_values) = outcomes
    np.testing.assert_allclose(values, wanted_values, rtol=1e-12)
    assert len(values) == 6 + base.EPOCHS_AT_ONCE
    same(got, wanted)
    assert machine.counts["captures"] == 1


def test_it_goes_on_in_the_middle_of_an_epoch(machine):
    trainer, arrays, batch = gpu_case(SquaredError(), alpha=0.1)
    results = []
    for pieces in ([(0, 3)], [(0, 1), (1, 2), (2, 3)]):
        engine = CaptureEngine(trainer.backend, trainer.recipe)
        now = trainer.start(trainer.params(arrays.leaves)).arrays
        for epoch in range(2):
            hypers = [hyper_of(trainer, 3 * epoch + i) for i in (1, 2, 3)]
            order = np.random.RandomState(epoch).permutation(12)
            for first, end in pieces:
                stops = iter([False] * (end - first - 1) + [True])
                task = Task(batch, order, 5, hypers, stops.__next__, first)
                with trainer.backend.scope("float64"):
                    now, values = engine.run(now, task)
                assert len(values) == end - first
        results.append([to_host(a) for a in now.leaves])
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)
    assert machine.counts["captures"] == 4


@dataclass(frozen=True)
class NoKernel(SquaredError):
    def per_row(self, z, y, xp):
        values, dz = super().per_row(z, y, xp)
        return values + 0.0 * xp.nextafter(values, values), dz


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        (LooksAtValues(), "looks at the value"),
        (LeavesTheTable(), "no cumulative_sum"),
        (NoKernel(), "no CUDA kernel of nextafter"),
    ],
)
def test_what_has_no_kernels_runs_eagerly_and_says_so(loss, reason):
    with pytest.warns(RuntimeWarning, match=f"the step runs eagerly.*{reason}"):
        got = fit(*gpu_case(loss))
    same(got, fit(*case(SquaredError(), Adam(), batch_size=5)))


def test_work_memory_does_not_come_from_the_host(monkeypatch):
    """Gigabytes of zeros would go through page-locked memory, which CuPy keeps."""
    moved = []

    def counted(self, x, dtype=None, copy=None, original=CuPyBackend.asarray):
        moved.append(x.nbytes if isinstance(x, np.ndarray) else 0)
        return original(self, x, dtype, copy)

    made = case(SquaredError(), Adam(), backend=emulated_gpu(), sizes=(5, 50, 3), n=500)
    monkeypatch.setattr(CuPyBackend, "asarray", counted)
    run(CaptureEngine, *made, n_steps=1, batch_size=500)
    assert max(moved) < 500 * 50 * 8


def test_memory_is_that_of_a_step():
    """Beside parameters and moments: activations, gradients, and little else."""
    n, width, depth = 64, 128, 6
    sizes = (width,) * (depth + 1) + (3,)
    trainer = Trainer(mlp(sizes), SoftmaxCrossEntropy(), Adam(), NUMPY, "float64", 0.01)
    arrays = trainer.start(trainer.network.init(np.random.RandomState(0))).arrays
    batch = Batch(np.zeros((n, width)), np.zeros(n, np.int32))
    hyper = hyper_of(trainer, 1)
    program, roles = base.recorded(trainer.recipe, base.Tree(specify((arrays, batch, hyper))))
    built = kernels.compile_program(program, roles.donated)
    activations = n * width * depth * 8
    parameters = sum(a.nbytes for a in flatten(arrays.leaves))
    assert activations < built.n_bytes <= activations + 3 * n * width * 8 + parameters + 16384


def test_a_result_that_is_part_of_a_vector_is_there_at_the_end(machine):
    """Memory of the joined vector is not given to others before its part is returned."""

    def function(xp, d, a, b):
        part = xp.prod(a, axis=0, keepdims=True)
        whole = xp.concat([part, b])
        t = whole * 2.0
        square = xp.matmul(t[:, None], t[None, :])
        u = xp.tanh(xp.sum(xp.matmul(t[None, :], square)) + d[0])
        big = xp.matmul(xp.reshape(t, (2, 2)), xp.reshape(t + 1.0, (2, 2)))
        return [u], [part, xp.sum(xp.minimum(whole, whole)), xp.sum(big)]

    d, a, b = [np.ones(3)], np.array([2.0, 3.0]), np.array([1.0, 2.0, 3.0])
    recorder = Recorder()
    arguments = specify((d, a, b))
    program, _ = record(lambda *given: function(recorder, *given), recorder, arguments)
    bound = OnDevice(kernels.compile_program(program, 1), [*d, a, b], [[0.0]])
    bound.launch()
    _, wanted = function(np, d, a, b)
    np.testing.assert_allclose(bound.results.get()[0], np.hstack(wanted))

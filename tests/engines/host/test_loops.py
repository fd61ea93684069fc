"""Loops in C: NumPy's bits, whatever is compiled and whenever."""

from __future__ import annotations

import gc
import os
import re
import signal
import subprocess
import sys
import threading
import warnings
import weakref
from concurrent.futures import Future

import numpy as np
import pytest
from helpers.programs import assert_same_bits, forget_later_reads, programs, replayed
from helpers.steps import RULES, case, run
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from portable_mlp import ACTIVATIONS, MLPClassifier
from portable_mlp.engines import Engine, ReplayEngine
from portable_mlp.engines.base import RecordedEngine
from portable_mlp.engines.graph.program import specify
from portable_mlp.engines.graph.recording import Recorder, record
from portable_mlp.engines.host import compiler
from portable_mlp.engines.host import replay as replay_module
from portable_mlp.engines.host.dialects import NumPyDialect
from portable_mlp.engines.host.loops import EXACT, OF_INTEGERS
from portable_mlp.engines.host.python_source import lower
from portable_mlp.layers import _hash_int32
from portable_mlp.losses import LOSSES, SoftmaxCrossEntropy
from portable_mlp.optimizers import Adam, SklearnAdam

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not compiler.find(), reason="no C compiler")]

DTYPES = ["float32", "float64"]


@pytest.fixture(autouse=True)
def _recorded_from_the_first_step(monkeypatch):
    monkeypatch.setattr(RecordedEngine, "EAGER", 0)
    monkeypatch.delenv("PORTABLE_MLP_COMPILE", raising=False)
    replay_module._prepare.cache_clear()


@pytest.fixture
def now(monkeypatch):
    monkeypatch.setenv("PORTABLE_MLP_COMPILE", "now")


def written(function, *arrays):
    """A function as a program that overwrites its arguments, the first by its result."""
    recorder = Recorder()
    program, _ = record(
        lambda *args: [function(recorder, *args), *args[1:]], recorder, specify(arrays)
    )
    dialect = type("Dialect", (NumPyDialect,), {"block": 0})
    return lower(program, len(arrays), dialect, loops=True)


def computed(function, *arrays):
    """What the loops make of the first argument."""
    replay = written(function, *arrays)
    mine = [a.copy() for a in arrays]
    replay.bind(mine, NumPyDialect(None), compiler.compile_c(replay.loops))()
    return mine[0], replay


def calls(replay):
    """The lines that run at each call."""
    _, body = replay.source.split("def run():\n")
    return "\n".join(line.strip() for line in body.split("        return")[0].splitlines())


# ---------------------------------------------------------------- operations

FUNCTIONS = {
    **{name: lambda xp, x, y, f=name: getattr(xp, f)(x)
       for name in ("sqrt", "square", "reciprocal", "negative")},
    "absolute": lambda xp, x, y: xp.abs(x),
    "rint": lambda xp, x, y: xp.round(x),
    **{name: lambda xp, x, y, f=name: getattr(xp, f)(x) for name in ("floor", "ceil", "trunc")},
    **{name: lambda xp, x, y, f=name: getattr(xp, f)(x, y)
       for name in ("add", "subtract", "multiply", "divide", "maximum", "minimum")},
    **{name: lambda xp, x, y, f=name: xp.astype(getattr(xp, f)(x, y), x.dtype)
       for name in ("equal", "not_equal", "less", "less_equal", "greater", "greater_equal")},
    **{name: lambda xp, x, y, f=name: xp.astype(getattr(xp, f)(x > y, y > 0.0), x.dtype)
       for name in ("logical_and", "logical_or", "bitwise_and", "bitwise_or", "bitwise_xor")},
    "logical_not": lambda xp, x, y: xp.astype(xp.logical_not(x > y), x.dtype),
    "where": lambda xp, x, y: xp.where(x > y, x, 0.3),
    "astype": lambda xp, x, y: xp.astype(xp.astype(x, "float32") * 3.0, x.dtype) + y,
    "copy": lambda xp, x, y: xp.reshape(xp.reshape(x.T, (-1,)) * 0.1, x.shape) + y,
}  # fmt: skip
SPECIAL = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    0.1,
    -3.7,
    0.5,
    2.5,
    -1.5,
    1e-40,
    3e38,
    1e-310,
    np.inf,
    -np.inf,
    np.nan,
]


def test_every_operation_is_listed():
    assert set(FUNCTIONS) == EXACT


@pytest.mark.parametrize("dtype", DTYPES)
def test_operations_are_numpys_on_whatever_values(dtype):
    """Zeros, infinities, NaN and subnormal numbers, each with each; in vectors and beyond."""
    with np.errstate(all="ignore"):
        x, y = (a.astype(dtype) for a in np.meshgrid(SPECIAL, SPECIAL))
        x, y = np.tile(x, (3, 1)), np.tile(y, (3, 1))
        for name, function in FUNCTIONS.items():
            got, replay = computed(function, x, y)
            assert re.fullmatch(r"loops\d+\(\)", calls(replay)), name
            assert_same_bits(got, function(np, x, y))


def test_integers_are_compared_and_masked():
    x = np.arange(-6, 6, dtype=np.int64).reshape(3, 4)
    bits = np.arange(12, dtype=np.uint32).reshape(3, 4) * np.uint32(400_000_003)
    for function in (
        lambda xp, x, b: xp.astype(x > 2, x.dtype),
        lambda xp, x, b: xp.astype(xp.astype(b, "uint8"), x.dtype),
    ):
        got, replay = computed(function, x, bits)
        assert "run0" in replay.loops
        np.testing.assert_array_equal(got, function(np, x, bits))
    got, replay = computed(lambda xp, b, x: ((b * 2654435769) ^ (b + 7)) | 1, bits, x)
    np.testing.assert_array_equal(got, ((bits * np.uint32(2654435769)) ^ (bits + np.uint32(7))) | 1)


INTEGER_FUNCTIONS = {
    **{name: lambda xp, x, y, f=name: getattr(xp, f)(x, y)
       for name in ("add", "subtract", "multiply", "bitwise_and", "bitwise_or", "bitwise_xor")},
    **{name: lambda xp, x, y, f=name: xp.astype(getattr(xp, f)(x, y), x.dtype)
       for name in ("equal", "not_equal", "less", "less_equal", "greater", "greater_equal")},
    "left_shift": lambda xp, x, y: x << 7,
    "right_shift": lambda xp, x, y: x >> 9,
    "where": lambda xp, x, y: xp.where(x > y, x, -3),
    "copy": lambda xp, x, y: xp.reshape(xp.reshape(x.T, (-1,)) * 3, x.shape) + y,
}  # fmt: skip


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_integers_wrap_as_numpys_do(dtype):
    """Each function on large numbers of either sign, and the hash of which dropout is made."""
    assert set(INTEGER_FUNCTIONS) == OF_INTEGERS
    info, rng = np.iinfo(dtype), np.random.RandomState(0)
    x, y = (rng.randint(info.min, info.max, (5, 40), dtype=dtype) for _ in range(2))
    x[0, :3] = info.min, info.max, -1
    with np.errstate(all="ignore"):
        for name, function in INTEGER_FUNCTIONS.items():
            got, replay = computed(function, x, y)
            assert re.fullmatch(r"loops\d+\(\)", calls(replay)), name
            np.testing.assert_array_equal(got, function(np, x, y), err_msg=name)
        if dtype == np.int32:
            got, replay = computed(lambda xp, x, y: _hash_int32(x ^ y), x, y)
            assert re.fullmatch(r"loops\d+\(\)", calls(replay))
            np.testing.assert_array_equal(got, _hash_int32(x ^ y))


@pytest.mark.parametrize(
    "function",
    [
        lambda xp, x, y: x >> 32,
        lambda xp, x, y: x << -1,
        lambda xp, x, y: x >> y,
        lambda xp, x, y: x // 3,
        lambda xp, x, y: xp.abs(x),
    ],
)
def test_integers_that_c_treats_otherwise_are_no_loops(function):
    x = np.arange(1, 13, dtype=np.int32).reshape(3, 4)
    assert not written(function, x, x % 5).loops


@pytest.mark.parametrize(
    "function",
    [
        lambda xp, x, y: xp.exp(x),
        lambda xp, x, y: x**3.0,
        lambda xp, x, y: xp.astype(xp.astype(x, "int32"), x.dtype),
        lambda xp, x, y: x - xp.max(x, axis=1, keepdims=True),
        lambda xp, x, y: x - xp.sum(xp.reshape(y[1:, :1], (-1,))),
    ],
)
def test_what_has_not_one_right_result_stays_a_call(function):
    x = np.arange(12.0).reshape(4, 3)
    got, replay = computed(function, x, x + 1.0)
    assert re.search(r"^\w+_\(|^v\d+\[\.\.\.\] = ", calls(replay), re.MULTILINE)
    np.testing.assert_array_equal(got, function(np, x, x + 1.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["sum", "max", "min", "prod"])
@pytest.mark.parametrize("shape", [(2, 100), (10, 65), (64, 65), (3, 9000)])
def test_rows_are_added_up_as_numpy_does(dtype, name, shape):
    x = np.random.RandomState(0).standard_normal(shape).astype(dtype)
    x[1, 3], x[0, 4] = np.nan, -0.0
    x[:, 5] = -0.0

    def function(xp, x):
        return x - getattr(xp, name)(x, axis=0)

    got, replay = computed(function, x)
    assert "reduce" not in replay.source
    assert_same_bits(got, function(np, x))


def test_a_sum_of_negative_zeros_is_zero():
    x = np.full((4, 80), -0.0)
    got, replay = computed(lambda xp, x: xp.reciprocal(xp.sum(x, axis=0) * xp.ones_like(x)), x)
    assert "reduce" not in replay.source
    np.testing.assert_array_equal(got, np.inf)


def test_signed_numbers_are_compared_with_unsigned_by_value():
    x, y = np.array([-1, 2, -3, 4]), np.ones(4, np.uint64)
    got, _ = computed(lambda xp, x, y: xp.astype(xp.less(x, y), x.dtype), x, y)
    np.testing.assert_array_equal(got, [1, 0, 1, 0])


def test_a_sum_of_no_rows_is_zero():
    x, y = np.ones(100), np.ones((0, 100))
    got, _ = computed(lambda xp, x, y: x + xp.sum(y, axis=0), x, y)
    np.testing.assert_array_equal(got, 1.0)


@pytest.mark.parametrize("loops", [False, True])
def test_an_array_joined_of_joined_ones(loops):
    def function(xp, x):
        joined = xp.concat([xp.abs(x), 2.0 * x])
        return xp.concat([0.5 * joined, x])[: x.shape[0]]

    x = np.arange(1.0, 4.0)
    recorder = Recorder()
    program, _ = record(lambda x: [function(recorder, x)], recorder, specify((x,)))
    replay = lower(program, 1, NumPyDialect, loops=loops)
    mine = x.copy()
    library = compiler.compile_c(replay.loops) if loops else None
    replay.bind([mine], NumPyDialect(None), library)()
    np.testing.assert_array_equal(mine, function(np, x))


@pytest.mark.parametrize("loops", [False, True])
def test_what_is_returned_is_that_from_before_it_is_overwritten(loops):
    recorder = Recorder()

    def function(xp, x, y):
        doubled = 2.0 * x
        return [xp.tanh(y), y, doubled]

    x, y = np.array([1.0, 2.0, 3.0]), np.array([4.0, 5.0, 6.0])
    program, _ = record(lambda *args: function(recorder, *args), recorder, specify((x, y)))
    replay = lower(program, 2, NumPyDialect, loops=loops)
    mine = [x.copy(), y.copy()]
    library = compiler.compile_c(replay.loops) if loops else None
    (got,) = replay.bind(mine, NumPyDialect(None), library)()
    np.testing.assert_array_equal(got, 2.0 * x)
    np.testing.assert_array_equal(mine, [np.tanh(y), y])


def test_adam_is_read_as_it_is_computed():
    """Each moment once through memory, the parameters at the end, a block at a time."""
    rule, n = Adam(), 5000

    def function(xp, p, g, m, v):
        new, moments = rule.update(p, g, (m, v), (0.1, 0.01, 1e-8), xp)
        return [new, g, *moments]

    arrays = np.abs(np.random.RandomState(0).standard_normal((4, n)).astype(np.float32))
    recorder = Recorder()
    program, _ = record(lambda *args: function(recorder, *args), recorder, specify((*arrays,)))
    replay = lower(program, 4, NumPyDialect, loops=True)
    assert ADAM in replay.loops
    mine, wanted = ([a.copy() for a in arrays] for _ in range(2))
    replay.bind(mine, NumPyDialect(None), compiler.compile_c(replay.loops))()
    for a, b in zip(mine, function(np, *wanted), strict=True):
        assert_same_bits(a, b)


ADAM = """\
    for (long start = 0; start < 5000; start += 512) {
        const long end = start < 4488 ? start + 512 : 5000;
        for (long i = start; i < end; ++i) {
            const float v0 = (m0[i] * (float)0.9);
            const float v1 = (v0 + m1[i]);
            m0[i] = v1;
        }
        for (long i = start; i < end; ++i) {
            const float v1 = (m2[i] * (float)0.999);
            const float v2 = (m1[i] * m1[i]);
            const float v3 = (v1 + v2);
            m2[i] = v3;
        }
        for (long i = start; i < end; ++i) {
            const float v2 = sqrt(m2[i]);
            const float v3 = (v2 + (float)1e-08);
            const float v4 = (m0[i] / v3);
            const float v5 = (v4 * (float)0.01);
            const float v6 = (m3[i] - v5);
            m3[i] = v6;
        }
    }
"""


# ---------------------------------------------------------------- programs

SLOW = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
UNSHRUNK = settings(SLOW, database=None, phases=[Phase.generate])


@SLOW
@given(programs(), st.sampled_from([(6, 4), (5, 5)]))
def test_programs_at_random(program, shape):
    replayed(program, shape, loops=True)


@pytest.mark.parametrize("slip", ["later reads forgotten", "views taken for the same element"])
def test_a_planner_with_a_slip_would_be_seen(slip, monkeypatch):
    """The planted twins of the test above: by the values, without the plan's verifier."""
    monkeypatch.delenv("PORTABLE_MLP_VERIFY")
    if slip == "later reads forgotten":
        forget_later_reads(monkeypatch)
    else:
        monkeypatch.setattr("portable_mlp.engines.host.loops.through", lambda x, access: access)

    @UNSHRUNK
    @given(programs(), st.sampled_from([(6, 4), (5, 5)]))
    def check(program, shape):
        replayed(program, shape, loops=True)

    with pytest.raises(AssertionError, match="Arrays are not equal"):
        check()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("weighted", [False, True])
def test_steps_are_the_same_to_the_last_bit(loss, weighted, now):
    turn = 2 * list(LOSSES).index(loss) + weighted
    options = [{}, {"alpha": 0.1}, {"dropout": 0.3}, {"clip_norm": 0.05, "alpha": 0.1}]
    for i in range(2):
        optimizer = RULES[(turn + 5 * i) % len(RULES)]
        activation = [*ACTIVATIONS][(turn + i) % len(ACTIVATIONS)]
        made = case(
            LOSSES[loss], optimizer, activation, dtype=DTYPES[turn % 2], weighted=weighted,
            sizes=[(5, 7, 6, 3), (2, 600, 3)][i], **options[(turn + i) % 4],
        )  # fmt: skip
        arrays, values = run(ReplayEngine, *made)
        wanted, wanted_values = run(Engine, *made)
        np.testing.assert_allclose(values, wanted_values, rtol=1e-14 if turn % 2 else 1e-6)
        for a, b in zip(arrays, wanted, strict=True):
            assert_same_bits(a, b)


# ---------------------------------------------------------------- when


@pytest.fixture
def bound(monkeypatch):
    """For each program that is bound, whether loops come with it.

    Within an epoch the engine does not look at the clock.
    """
    found = []
    monkeypatch.setattr(ReplayEngine, "LOOK", float("inf"))

    def bind(self, donated, dialect, library=None, original=replay_module.Replay.bind):
        found.append(library is not None)
        return original(self, donated, dialect, library)

    monkeypatch.setattr(replay_module.Replay, "bind", bind)
    return found


def wait():
    """Until nothing is compiled any more."""
    for thread in threading.enumerate():
        if thread.name == "portable_mlp compiler":
            thread.join()


def test_loops_take_over_between_two_epochs(monkeypatch, bound):
    """For both sizes of batches at once; the steps are as if nothing had happened."""
    monkeypatch.setattr(ReplayEngine, "PATIENCE", 0.0)
    begun = []

    def compile_beside(source):
        begun.append((source, Future()))
        return begun[-1][1]

    monkeypatch.setattr(compiler, "compile_beside", compile_beside)
    seen = []

    class Watched(ReplayEngine):
        def run(self, arrays, task):
            done = super().run(arrays, task)
            seen.append(bound.copy())
            if len(seen) in (2, 3):
                source, future = begun[len(seen) - 2]
                future.set_result(compiler.compile_c(source))
            return done

    made = case(SoftmaxCrossEntropy(), SklearnAdam(), "relu", alpha=0.1)
    arrays, _ = run(Watched, *made, n_steps=6)
    assert len(begun) == 2
    calls, loops = [False, False], [True, True]
    # Bound anew when the compiler has been asked, for that takes memory
    assert seen == [calls, 2 * calls, 2 * calls, *[2 * calls + loops] * 3]
    wanted, _ = run(Engine, *made, n_steps=6)
    for a, b in zip(arrays, wanted, strict=True):
        np.testing.assert_array_equal(a, b)
    # A later engine has them from the beginning
    run(ReplayEngine, *made, n_steps=1)
    assert bound[6:] == loops


def test_loops_take_over_in_an_epoch(monkeypatch, bound):
    """An epoch may be long."""
    monkeypatch.setattr(ReplayEngine, "PATIENCE", 0.0)
    monkeypatch.setattr(ReplayEngine, "LOOK", 0.0)

    def compile_beside(source):
        future = Future()
        future.set_result(compiler.compile_c(source))
        return future

    monkeypatch.setattr(compiler, "compile_beside", compile_beside)
    made = case(SoftmaxCrossEntropy(), SklearnAdam(), "relu", alpha=0.1, n=22)
    arrays, values = run(ReplayEngine, *made, n_steps=1)
    assert bound == [False, False, True, True]
    assert len(values) == 5
    wanted, _ = run(Engine, *made, n_steps=1)
    for a, b in zip(arrays, wanted, strict=True):
        np.testing.assert_array_equal(a, b)


def test_memory_goes_with_its_function():
    """At once: were it part of a cycle it would stay until the collector comes."""
    x = np.ones((300, 100))
    replay, dialect = written(lambda xp, x: xp.exp(x) + xp.exp(-x), x), NumPyDialect(None)
    function = replay.bind([x], dialect, compiler.compile_c(replay.loops))
    function()
    memory = weakref.ref(dialect._memory)
    gc.disable()
    try:
        del function, dialect
        assert memory() is None
    finally:
        gc.enable()


def test_many_short_trainings_are_a_while_too(monkeypatch, bound):
    """As by ``partial_fit``: an engine for each."""
    monkeypatch.setattr(ReplayEngine, "PATIENCE", 0.0)
    made = case(SoftmaxCrossEntropy(), Adam())
    for _ in range(3):
        run(ReplayEngine, *made, n_steps=1)
        wait()
    assert bound == [False] * 4 + [True] * 2


def test_a_compiler_of_other_arithmetic_is_refused(monkeypatch):
    """Before it is loaded, which would change that of the whole process."""
    monkeypatch.setenv("CC", " ".join([*compiler.find(), "-ffast-math"]))
    monkeypatch.setenv("PORTABLE_MLP_COMPILE", "now")
    with pytest.warns(RuntimeWarning, match=r"not that of IEEE 754"):
        run(ReplayEngine, *case(SoftmaxCrossEntropy(), Adam()))
    assert (np.full(4, 1e-40, np.float32) * np.float32(1.0) > 0.0).all()


def test_nothing_is_compiled_for_a_short_training(monkeypatch, bound):
    monkeypatch.setattr(compiler, "compile_beside", None)
    for when in ("later", "never"):
        monkeypatch.setenv("PORTABLE_MLP_COMPILE", when)
        run(ReplayEngine, *case(SoftmaxCrossEntropy(), Adam()))
    assert bound == [False] * 4


def test_a_compiler_is_asked_after_a_while(monkeypatch, bound):
    """As by default, and by the machine's own."""
    monkeypatch.setattr(ReplayEngine, "PATIENCE", 0.0)
    made = case(SoftmaxCrossEntropy(), Adam())
    run(ReplayEngine, *made, n_steps=2)
    wait()
    run(ReplayEngine, *made, n_steps=2)
    assert bound == [False] * 4 + [True] * 2


@pytest.mark.parametrize("command", ["false", "no-such-compiler --at all"])
def test_what_does_not_compile_runs_as_calls(command, monkeypatch, bound):
    monkeypatch.setenv("CC", command)
    monkeypatch.setattr(ReplayEngine, "PATIENCE", 0.0)
    made = case(SoftmaxCrossEntropy(), Adam())
    wanted, _ = run(Engine, *made)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        arrays, _ = run(ReplayEngine, *made)
    wait()
    run(ReplayEngine, *made)
    replay_module._prepare.cache_clear()
    monkeypatch.setenv("PORTABLE_MLP_COMPILE", "now")
    with pytest.warns(RuntimeWarning, match="without loops in C: .+"):
        again, _ = run(ReplayEngine, *made)
    assert not any(bound)
    for a, b, c in zip(arrays, again, wanted, strict=True):
        np.testing.assert_array_equal(a, c)
        np.testing.assert_array_equal(b, c)


def test_an_environment_that_says_something_else_is_an_error(monkeypatch):
    monkeypatch.setenv("PORTABLE_MLP_COMPILE", "yes")
    X, y = np.eye(20), np.arange(20) % 2
    with pytest.raises(ValueError, match="PORTABLE_MLP_COMPILE must be one of later, now, never"):
        MLPClassifier(max_iter=1).fit(X, y)


def test_two_fits_share_a_library_but_no_memory(now):
    """Interleaved, they do what each does alone."""
    trainer, arrays, batch = case(SoftmaxCrossEntropy(), Adam())
    alone, _ = run(ReplayEngine, trainer, arrays, batch)
    others = []

    class Beside(ReplayEngine):
        def run(self, own, task):
            others.append(run(ReplayEngine, trainer, arrays, batch))
            return super().run(own, task)

    arrays, _ = run(Beside, trainer, arrays, batch)
    for found in (arrays, others[-1][0]):
        for a, b in zip(found, alone, strict=True):
            np.testing.assert_array_equal(a, b)


def test_where_there_can_be_no_thread_there_are_calls(monkeypatch, bound):
    monkeypatch.setattr(ReplayEngine, "PATIENCE", 0.0)

    def refused(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    run(ReplayEngine, *case(SoftmaxCrossEntropy(), Adam()))
    assert bound
    assert not any(bound)


FORK = """
import os, sys
import numpy as np
from portable_mlp.engines.host import replay
from portable_mlp import MLPClassifier
MLPClassifier(max_iter=30).fit(np.eye(20), np.arange(20) % 2)
assert replay._prepare.cache_info().currsize == 1
child = os.fork()
if child == 0:
    os._exit(replay._prepare.cache_info().currsize)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_forked_process_does_not_wait_for_its_parents_threads():
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORK], check=True)


def test_ctrl_c_is_not_for_the_compiler(monkeypatch, tmp_path):
    """The terminal sends it to all of a session's processes in the foreground."""
    script = tmp_path / "compiler.py"
    script.write_text("import os, sys; sys.exit(str(os.getsid(0)))")
    monkeypatch.setenv("CC", f"{sys.executable} {script}")
    with pytest.raises(compiler.CompilerError) as said:
        compiler.compile_c("")
    assert int(str(said.value)) != os.getsid(0)


def test_the_end_of_a_program_does_not_wait(tmp_path):
    pid = tmp_path / "pid"
    script = tmp_path / "compiler.py"
    script.write_text(
        f"import os, pathlib, time; pathlib.Path({str(pid)!r}).write_text(str(os.getpid()));"
        " time.sleep(600)"
    )
    ends = (
        "import pathlib, time; from portable_mlp.engines.host import compiler;"
        f" compiler.compile_beside(''); pid = pathlib.Path({str(pid)!r})\n"
        "while not (pid.exists() and pid.read_text()): time.sleep(0.01)"
    )
    environment = os.environ | {"CC": f"{sys.executable} {script}"}
    try:
        subprocess.run([sys.executable, "-c", ends], check=True, env=environment, timeout=500)
    finally:
        os.kill(int(pid.read_text()), signal.SIGKILL)


def test_on_macos_only_a_compiler_that_is_named_is_called(monkeypatch):
    monkeypatch.setattr(compiler.sys, "platform", "darwin")
    monkeypatch.delenv("CC", raising=False)
    assert compiler.find() == []
    monkeypatch.setenv("CC", "'/opt/my clang' -m64")
    assert compiler.find() == ["/opt/my clang", "-m64"]

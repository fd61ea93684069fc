"""Programs at random, and what becomes of them."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from helpers.steps import NUMPY
from portable_mlp.engines.graph.program import specify
from portable_mlp.engines.graph.recording import Recorder, record
from portable_mlp.engines.host.compiler import compile_c
from portable_mlp.engines.host.dialects import NumPyDialect
from portable_mlp.engines.host.memory import Plan
from portable_mlp.engines.host.python_source import lower

SHAPE = (6, 4)

UNARY = ["tanh", "exp", "abs", "negative", "square"]

BINARY = ["add", "subtract", "multiply", "maximum", "minimum"]

ALONG = ["sum", "max", "T", "reshape", "matmul", "index", "concat", "narrow", "cross"]

OTHER = [*ALONG, "where", "astype"]


@st.composite
def programs(draw):
    """Instructions on a stack of (6, 4) arrays: (operation, operand, operand, number)."""
    names = st.sampled_from(UNARY + BINARY + OTHER)
    index = st.integers(0, 30)
    steps = draw(st.lists(st.tuples(names, index, index), min_size=4, max_size=30))
    return steps, draw(st.lists(index, min_size=3, max_size=3)), draw(index)


def interpret(program, xp, donated, passed, number):
    """The program on arrays of a namespace; the first results replace the donated arrays."""
    steps, replaced, shown = program
    (rows, columns), size = passed.shape, passed.size
    stack = [*donated, passed]
    for op, i, j in steps:
        a, b = stack[i % len(stack)], stack[j % len(stack)]
        if op in UNARY:
            a = xp.minimum(a, 3.0) if op in ("exp", "square") else a
            new = getattr(xp, op)(a)
        elif op in BINARY:
            new = getattr(xp, op)(a, b if (i + j) % 3 else number)
        elif op == "sum":
            new = a - xp.sum(b, axis=0)
        elif op == "max":
            new = a - xp.max(b, axis=1, keepdims=True)
        elif op == "T":
            new = xp.reshape(xp.reshape(xp.tanh(a.T) + b.T, (-1,)), (rows, columns))
        elif op == "reshape":
            new = xp.reshape(xp.reshape(a, (-1,)) * 0.5 + xp.reshape(b, (-1,)), (rows, columns))
        elif op == "matmul":
            new = xp.tanh(xp.matmul(a, xp.matmul(b.T, xp.ones_like(a))))
        elif op == "index":
            new = xp.concat([a[2:, :], b[:2, :]], axis=0)
        elif op == "where":
            new = xp.where(a > (b if (i + j) % 3 else number), a, number)
        elif op == "concat":
            flat = xp.concat([xp.reshape(a, (-1,)), xp.reshape(xp.tanh(b), (-1,))])
            new = xp.reshape(flat[columns : columns + size], (rows, columns))
        elif op == "cross":  # elements that other results of the same shape may be written over
            new = xp.maximum(a * number + (b.T if rows == columns else b), -b)
        elif op == "narrow":  # of zeros and ones: exact, in whatever order it is summed
            tall, short = xp.astype(b > number, b.dtype), xp.astype(a[:, :2] > 0.0, a.dtype)
            new = a + xp.reshape(xp.matmul(tall.T, short), (-1,))[:columns]
        else:
            new = xp.astype(a > number, a.dtype) * b
        stack.append(new)
    return [stack[i % len(stack)] for i in replaced], [xp.sum(stack[shown % len(stack)])]


def assert_same_bits(got, wanted):
    """Of zeros the sign too; of NaN only that it is one."""
    assert got.dtype == wanted.dtype
    np.testing.assert_array_equal(got, wanted)
    known = ~np.isnan(wanted)
    np.testing.assert_array_equal(np.signbit(got[known]), np.signbit(wanted[known]))


def replayed(program, shape=SHAPE, *, loops=False, **settings_):
    """The program three times, each from what the last left; all it returned."""
    rng = np.random.RandomState(1)
    donated = [rng.standard_normal(shape) for _ in range(3)]
    passed = rng.standard_normal(shape)
    mine = [a.copy() for a in donated]
    recorder = Recorder()
    recorded, _ = record(
        lambda d, p, n: interpret(program, recorder, d, p, n),
        recorder,
        specify((donated, passed, 0.5)),
    )

    chosen = type("Dialect", (NumPyDialect,), {"block": 0, **settings_})
    replay = lower(recorded, 3, chosen, loops=loops)
    library = compile_c(replay.loops) if loops else None
    function = replay.bind(mine, chosen(NUMPY), library)
    for i in range(3):
        before = passed.copy()
        wanted, shown = interpret(program, np, [a.copy() for a in donated], passed, 0.5 + i)
        got = function(passed, 0.5 + i)
        np.testing.assert_array_equal(passed, before)
        for a, b in zip(mine, wanted, strict=True):
            assert_same_bits(a, b)
        np.testing.assert_array_equal(got, shown)
        donated = [np.array(a) for a in wanted]


def forget_later_reads(monkeypatch):
    """A slip: every memory is taken for one that is not read any more."""

    def overwritten(self, x, segment, until, now, original=Plan._overwritten):
        return original(self, x, segment, dict.fromkeys(until, -1), now)

    monkeypatch.setattr(Plan, "_overwritten", overwritten)

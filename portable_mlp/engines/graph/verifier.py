"""The rules of programs: the shape, data type and layout that each operation must have.

`verify` checks a recorded program node by node.  It derives each node from its operands
alone, by NumPy's own rules, and shares no code with the recorder.  The tests run with it on
(``PORTABLE_MLP_VERIFY=1``).  It is off otherwise, because it takes about as long as recording.
"""

from __future__ import annotations

import os
from math import prod
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from portable_mlp.engines.graph.program import NUMBERS, REDUCTIONS, Node, Program, Shape


class ProgramError(AssertionError):
    """A program breaks a rule; the message names the node and the rule."""


def verifying() -> bool:
    """Tell whether programs are verified when they are recorded."""
    return bool(os.environ.get("PORTABLE_MLP_VERIFY"))


def verify(program: Program, n_donated: int = 0, n_resident: int = 0) -> None:
    """Check every node of a program, and the outputs that replace donated inputs.

    Parameters
    ----------
    program : Program
    n_donated : int, default=0
        Number of first array inputs that are overwritten by the first outputs.
    n_resident : int, default=0
        Number of array inputs behind them that are only read.  No output that replaces a
        donated input may be a view of one.

    Raises
    ------
    ProgramError
        If the program breaks a rule.
    """
    known: set[int] = set()
    for node in (*program.inputs, *program.nodes):
        if node.op == "input" and node.operands:
            raise ProgramError(f"an input of operands: {node}")
        for operand in node.operands:
            if isinstance(operand, Node) and id(operand) not in known:
                raise ProgramError(f"{name(node)} stands before its operand {name(operand)}")
        known.add(id(node))
        if node.op != "input":
            _check_node(node)
    for output in program.outputs:
        if isinstance(output, Node) and id(output) not in known:
            raise ProgramError(f"an output is not in the program: {name(output)}")
    arrays = [x for x in program.inputs if not x.is_number]
    if len(program.outputs) < n_donated:
        raise ProgramError(f"{n_donated} inputs are donated, for {len(program.outputs)} outputs")
    for x, y in zip(arrays[:n_donated], program.outputs, strict=False):
        if (x.shape, x.dtype) != (y.shape, y.dtype):
            raise ProgramError(f"{name(y)} is to replace {name(x)}")
    resident = arrays[n_donated : n_donated + n_resident]
    for y in program.outputs[:n_donated]:
        if y.root in resident:
            raise ProgramError(f"{name(y)} is to stand where only is read")


def name(node: Node) -> str:
    """Return the name of a node in messages."""
    return f"{node.op} {node.shape} {node.dtype}"


def _check_node(node: Node) -> None:
    if node.is_number:
        numbers = [o for o in node.operands if not isinstance(o, Node) or o.is_number]
        known = node.op in NUMBERS and len(numbers) == len(node.operands)
        if not known or node.shape != _common_shape(node):
            raise ProgramError(f"{name(node)} is no operation on numbers")
        return
    try:
        wanted = _expected(node)
    except Exception as error:
        raise ProgramError(f"{name(node)} of {node.attrs}: {error}") from error
    shape, dtype = wanted.shape, wanted.dtype
    if (node.shape, node.dtype) != (shape, dtype):
        operands = [name(o) if isinstance(o, Node) else o for o in node.operands]
        raise ProgramError(f"{name(node)} of {operands} is {shape} {dtype}")
    # A computed result is contiguous; of a view, NumPy tells
    contiguous = wanted.flags.c_contiguous if node.op in ("permute", "index", "broadcast") else True
    if node.contiguous and not contiguous:
        raise ProgramError(f"{name(node)} is taken for contiguous")


def _stand_in(x: Any) -> Any:
    """Return an array like an operand, without memory of that size; or the number."""
    if not isinstance(x, Node):
        return x
    if x.is_number:
        return x.dtype(1)  # its axes are looked at elsewhere
    if not x.contiguous:
        return _empty(x.shape, x.dtype)
    # Beyond its first element this points to memory that is not its own: it is never read
    strides = np.cumprod((x.dtype.itemsize, *x.shape[:0:-1]))[::-1] if x.shape else ()
    return as_strided(np.empty((), x.dtype), x.shape, strides)


def _expected(node: Node) -> np.ndarray[Any, Any]:
    """Return an array of the shape and data type that NumPy gives the result of a node.

    Reductions and products are not computed.
    """
    operands = [_stand_in(o) for o in node.operands]
    op, attrs = node.op, node.attrs
    if op == "matmul":
        a, b = operands
        return _empty(_matmul_shape(a.shape, b.shape), np.result_type(a.dtype, b.dtype))
    if op in REDUCTIONS:
        axes, keepdims = attrs
        reduced = getattr(np, op)(np.empty((1,) * operands[0].ndim, operands[0].dtype), axis=axes)
        kept = [
            (1 if keepdims else None) if i in axes else n for i, n in enumerate(operands[0].shape)
        ]
        return _empty(tuple(n for n in kept if n is not None), reduced.dtype)
    if op == "argmax":
        shape = operands[0].shape
        return _empty(shape[: attrs[0]] + shape[attrs[0] + 1 :], np.dtype(np.int64))
    if op == "sort":
        axis, length = attrs
        if operands[0].shape[axis] != length:
            raise ProgramError(f"it sorts {length} of {operands[0].shape[axis]} elements")
        return _empty(operands[0].shape, operands[0].dtype)
    if op == "concat":
        axis = attrs[0]
        others = {o.shape[:axis] + o.shape[axis + 1 :] for o in operands}
        if len(others) > 1:
            raise ValueError(f"parts of {[o.shape for o in operands]} cannot be joined")
        shape = list(operands[0].shape)
        shape[axis] = sum(o.shape[axis] for o in operands)
        return _empty(tuple(shape), np.result_type(*(o.dtype for o in operands)))
    if op == "permute":
        return np.transpose(operands[0], attrs[0])
    if op == "index":
        keys = tuple(slice(*k[1:]) if isinstance(k, tuple) else k for k in attrs)
        part: np.ndarray[Any, Any] = operands[0][keys if ... in keys else (*keys, ...)]
        return part
    if op == "broadcast":
        return np.broadcast_to(operands[0], node.shape)
    if op == "reshape":
        if not operands[0].flags.c_contiguous or operands[0].size != prod(node.shape):
            raise ValueError(f"{operands[0].shape} is not of that size, or has gaps")
        return _empty(node.shape, operands[0].dtype)
    if op == "full":
        return _empty(node.shape, node.dtype)
    if op == "arange":
        return _empty((len(range(*operands)),), node.dtype)
    if op in ("astype", "copy"):
        return _empty(operands[0].shape, node.dtype if op == "astype" else operands[0].dtype)
    shape = _common_shape(node)
    if op == "where":
        values = [o if isinstance(o, np.ndarray) else type(o) for o in operands[1:]]
        kinds = [v.dtype if isinstance(v, np.ndarray) else v for v in values]
        return _empty(shape, np.add.resolve_dtypes((*kinds, None))[-1])
    ufunc = getattr(np, op)
    # Python numbers do not take part in type promotion, whatever they were computed from
    kinds = [o.dtype if isinstance(o, np.ndarray) else type(o) for o in operands]
    *taken, dtype = ufunc.resolve_dtypes((*kinds, None))
    if tuple(taken) != attrs:
        raise ProgramError(f"its operands are taken as {attrs}, not as {tuple(taken)}")
    return _empty(shape, dtype)


def _common_shape(node: Node) -> Shape:
    return np.broadcast_shapes(*(o.shape for o in node.operands if isinstance(o, Node)))


def _empty(shape: Shape, dtype: Any) -> np.ndarray[Any, Any]:
    return np.broadcast_to(np.empty((), dtype), shape)


def _matmul_shape(a: Shape, b: Shape) -> Shape:
    """Return the shape of a matrix product; stacks of matrices are broadcast."""
    n, k = a[-2:] if len(a) > 1 else (None, *a)
    rows, m = b[-2:] if len(b) > 1 else (*b, None)
    if k != rows:
        raise ValueError(f"matrices of {a} and {b} do not match")
    stack = np.broadcast_shapes(a[:-2], b[:-2])
    return (*stack, *(size for size in (n, m) if size is not None))

"""The base of all engines; it calls the step itself, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import repeat
from math import prod
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from portable_mlp.backends import Backend
from portable_mlp.engines.graph.program import Program, flatten, unflatten
from portable_mlp.engines.graph.recording import Recorder, Unrecordable, record
from portable_mlp.engines.graph.verifier import ProgramError, verify, verifying
from portable_mlp.members import PerMember
from portable_mlp.steps import (
    Arrays,
    Batch,
    Hyper,
    Recipe,
    first_half,
    second_half,
    step,
)
from portable_mlp.typing import Array, Namespace
from portable_mlp.warn import warn

Values = list[tuple[Any, float]]
"""Loss and penalty of each step; with members, a list of their losses."""
Reduce = Callable[[Array], None]

# The most epochs in one task.  Where an epoch is one step, handing it over takes about as long
# as a small step does
EPOCHS_AT_ONCE = 16


class Task(NamedTuple):
    """A number of steps: one for each entry of ``hypers``, from number ``first`` on.

    Parameters
    ----------
    data : Batch
        The rows from which batches are taken, on the backend.
    order : array of int (rows,) or (members, rows), optional
        Row numbers in the order of training, on the host; with two axes, each member of an
        ensemble has rows of its own.  If it is not given, all rows are taken in their own
        order.
    batch_size : int
        Rows of a batch.  The last batch may be shorter.
    hypers : sequence of Hyper
        The numbers of each step, one entry a batch.  If all rows are one batch, there is one
        entry for each epoch, and at most `EPOCHS_AT_ONCE`.
    stop : callable
        Tells between steps whether to end early.
    first : int, default=0
        Number of the first step to do; the steps before it are done.
    totals : sequence of float, optional
        If each batch is a part of a larger one, and steps are cut in two halves: the number
        of rows, or the sum of weights, of each larger batch; see `Loss.__call__`.
    """

    data: Batch
    order: NDArray[np.intp] | None
    batch_size: int
    hypers: Sequence[Hyper]
    stop: Callable[[], bool]
    first: int = 0
    totals: Sequence[float] | None = None

    @property
    def n_rows(self) -> int:
        """The number of rows of all batches."""
        n: int = self.data.x.shape[0] if self.order is None else self.order.shape[-1]
        return n

    def batches(self) -> Iterator[slice]:
        """Yield the rows of each batch to come, as slices of the order."""
        n = self.n_rows
        if n <= self.batch_size:
            yield from repeat(slice(0, n), len(self.hypers) - self.first)
            return
        for start in range(self.first * self.batch_size, n, self.batch_size):
            yield slice(start, min(start + self.batch_size, n))


def take_rows(data: Batch, rows: Array, xp: Namespace) -> Batch:
    """Return the batch of some rows, numbered (n,), or (members, n) for those of each member."""

    def of(a: Array) -> Array:
        found = xp.take(a, xp.reshape(rows, (-1,)), axis=0)  # the standard has one axis only
        return found if rows.ndim == 1 else xp.reshape(found, (*rows.shape, *a.shape[1:]))

    return Batch(*(None if a is None else of(a) for a in data))


def flat(numbers: Any) -> tuple[Any, ...]:
    """Return the numbers of a step in the order in which a program takes them.

    A number with one value for each member is an array (members,) in float64 or int64.
    """
    found: list[Any] = []
    _flatten(numbers, found)
    return tuple(found)


def _flatten(tree: Any, found: list[Any]) -> None:
    # This runs in every step, and takes half the time of a recursive generator
    for x in tree:
        if isinstance(x, tuple):
            _flatten(x, found)
        elif x is not None:
            found.append(x.values if type(x) is PerMember else x)


def table(steps: Sequence[Any]) -> NDArray[np.float64]:
    """Return the numbers of several steps in the order of `flat`, an array (steps, numbers)."""
    rows = [[np.ravel(x) for x in flat(numbers)] for numbers in steps]
    return np.array([np.concatenate(row) if row else [] for row in rows], np.float64)


class Engine:
    """An engine that calls the step itself for each batch, on every backend.

    Parameters
    ----------
    backend : Backend
    recipe : Recipe
    reduce : callable, optional
        Function that changes the vector of `first_half` in place, between the two halves of
        each step.  The sums are divided by the weight of the engine's own batch, unless a
        task has ``totals``.  Without ``reduce``, steps are not cut in halves.
    """

    name: ClassVar[str] = "eager"

    def __init__(self, backend: Backend, recipe: Recipe, reduce: Reduce | None = None) -> None:
        self.backend = backend
        self.recipe = recipe
        self.reduce = reduce

    def run(self, arrays: Arrays, task: Task) -> tuple[Arrays, Values]:
        """Do the steps of a task, or fewer if it asks to stop.

        Parameters
        ----------
        arrays : Arrays
            Donated: they may be overwritten, so use the returned ones.
        task : Task

        Returns
        -------
        arrays : Arrays
        values : list of (float, float)
            Loss and penalty of each step done.
        """
        losses, penalties = [], []
        for number, batch in enumerate(self._batches(task), task.first):
            total = None if task.totals is None else task.totals[number]
            arrays, (loss, penalty) = self._step(arrays, batch, task.hypers[number], total)
            losses.append(loss)
            penalties.append(penalty)
            if task.stop():
                break
        return arrays, self._fetch(losses, penalties)

    def _step(
        self, arrays: Arrays, batch: Batch, hyper: Hyper, total: float | None = None
    ) -> tuple[Arrays, tuple[Array, Array]]:
        hyper = self._numbers(hyper, arrays)
        if self.reduce is None:
            return step(self.recipe, arrays, batch, hyper)
        vector = first_half(self.recipe, arrays.leaves, batch, hyper.forward, total)
        self.reduce(vector)
        return second_half(self.recipe, arrays, vector, hyper, self._weight(batch, total))

    def _weight(self, batch: Batch, total: float | None) -> float | None:
        """Return the sum of weights for the second half; None if it is part of the vector."""
        if total is not None or batch.weights is not None:
            return total
        return float(batch.x.shape[-2])

    def _length(self, arrays: Arrays, batch: Batch, total: float | None) -> int:
        """Return the length of the vector between the two halves."""
        length: int = sum(prod(leaf.shape) for leaf in arrays.leaves) + self.recipe.n_losses
        if batch.weights is not None and total is None:
            length += prod(batch.weights.shape[:-1])
        return length

    def _numbers(self, hyper: Hyper, arrays: Arrays) -> Hyper:
        """Return the numbers as the step takes them: values of members as arrays."""
        if self.recipe.network.members is None:
            return hyper
        kind = str(arrays.leaves[0].dtype).rpartition(".")[2]

        def here(x: Any) -> Any:
            if not isinstance(x, PerMember):
                return x
            return self.backend.asarray(x.values, "int32" if x.dtype is int else kind)

        numbers: Hyper = unflatten(hyper, map(here, flatten(hyper)))
        return numbers

    def _batches(self, task: Task) -> Iterator[Batch]:
        data = task.data
        indices = None if task.order is None else self.backend.indices(task.order)
        for rows in task.batches():
            if indices is None:
                yield Batch(*(None if a is None else a[rows, ...] for a in data))
            else:
                yield take_rows(data, indices[..., rows], self.backend.xp)

    def _pair(self, row: list[float]) -> tuple[Any, float]:
        """Return the loss and the penalty of a step, from a row of its values."""
        *losses, penalty = row
        return (losses[0] if self.recipe.network.members is None else losses), penalty

    def _fetch(self, losses: list[Any], penalties: list[Any]) -> Values:
        found = self.backend.fetch(losses).tolist()
        if not self.recipe.has_penalty:
            return [(loss, 0.0) for loss in found]
        return list(zip(found, self.backend.fetch(penalties).tolist(), strict=True))


class RecordedEngine(Engine):
    """Base of the engines that record a step, and repeat it in another form.

    A step that cannot be recorded runs eagerly, with a warning that says why.  Epochs within
    the first ``EAGER`` steps run eagerly, too: recording takes about as long as these steps.
    """

    EAGER = 16

    def __init__(self, backend: Backend, recipe: Recipe, reduce: Reduce | None = None) -> None:
        super().__init__(backend, recipe, reduce)
        self._begun = 0  # steps done eagerly
        self._recordable = True

    def run(self, arrays: Arrays, task: Task) -> tuple[Arrays, Values]:
        few = self._begun + len(task.hypers) <= self.EAGER
        if few or not self._recordable:
            self._begun += len(task.hypers)
            return super().run(arrays, task)
        values: Values = []
        try:
            self.repeat(arrays, task, values)
            return arrays, values
        except Unrecordable as reason:
            warn(
                f"the step runs eagerly, several times slower: {reason}",
                RuntimeWarning,
            )
        self._recordable = False
        arrays, more = super().run(arrays, task._replace(first=task.first + len(values)))
        return arrays, values + more

    def repeat(self, arrays: Arrays, task: Task, values: Values) -> None:
        """Do the steps of a task, as `run` does, in place, and append to ``values``.

        Raises
        ------
        Unrecordable
            If that is impossible.  The arrays then are those after the last step in ``values``.
        """
        raise NotImplementedError


class Tree:
    """A tree of specs as the key of a cache; trees with equal leaves are equal."""

    def __init__(self, tree: Any) -> None:
        self.tree = tree
        self.leaves = tuple(flatten(tree))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tree) and self.leaves == other.leaves

    def __hash__(self) -> int:
        return hash(self.leaves)


class Roles(NamedTuple):
    """The roles of a program's first array inputs.

    Attributes
    ----------
    donated : int
        Number of first arrays that are overwritten by the outputs at the same positions.
    resident : int
        Number of arrays behind them that are only read.  Donated and resident arrays have the
        same memory at every call; all others may have another memory at each call.
    """

    donated: int
    resident: int = 0


WHOLE, FIRST, SECOND = "whole", "first", "second"


def recorded(recipe: Recipe, arguments: Tree, part: str = WHOLE) -> tuple[Program, Roles]:
    """Record a step, or a half of one; return its program and the roles of the arguments.

    Parameters
    ----------
    recipe : Recipe
    arguments : Tree
        Specs of the arguments.  A whole step takes (arrays, batch, hyper), its first half
        (vector, leaves, batch, numbers, total), its second half (arrays, vector, hyper, n).
    part : {"whole", "first", "second"}
        The part of the step to record.

    Raises
    ------
    Unrecordable
        If the step does what a program cannot hold.
    """
    recorder = Recorder()
    recipe = replace(recipe, xp=recorder)
    count = [len(list(flatten(branch))) for branch in arguments.tree]

    def first(vector: Array, *rest: Any) -> Array:
        return first_half(recipe, *rest)  # a donated input: the result is written into it

    parts: dict[str, tuple[Callable[..., Any], Roles]] = {
        WHOLE: (partial(step, recipe), Roles(count[0])),
        FIRST: (first, Roles(*count[:2])),
        SECOND: (partial(second_half, recipe), Roles(*count[:2])),
    }
    function, roles = parts[part]
    try:
        program, _ = record(function, recorder, arguments.tree)
    except (Unrecordable, ProgramError):
        raise
    except Exception as error:  # a custom loss or layer may ask for what stand-ins do not have
        raise Unrecordable(f"{type(error).__name__}: {error}") from error
    if verifying():
        verify(program, *roles)
    return program, roles

"""The engine of NumPy and torch: a recorded step, repeated into fixed buffers."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from portable_mlp.backends import Backend
from portable_mlp.engines.base import RecordedEngine, Task, Tree, Values, recorded
from portable_mlp.engines.calls import Replay, lower
from portable_mlp.engines.dialects import DIALECTS
from portable_mlp.engines.program import leaves, specify
from portable_mlp.steps import Arrays, Batch, Hyper, Recipe
from portable_mlp.typing import Array


class ReplayEngine(RecordedEngine):
    """Makes the calls of `portable_mlp.engines.calls`."""

    name = "replay"

    def __init__(self, backend: Backend, recipe: Recipe) -> None:
        super().__init__(backend, recipe)
        self.dialect = DIALECTS[backend.name](backend)
        self._arrays: Arrays | None = None
        self._programs: dict[int, tuple[list[Array], Callable[..., tuple[Any, ...]]]] = {}

    def repeat(self, arrays: Arrays, task: Task, values: Values) -> None:
        if arrays is not self._arrays:
            self._programs.clear()
            self._arrays = arrays
        n, batch_size, hypers = task.n_rows, task.batch_size, task.hypers
        # The longer batch first: its memory is enough for the shorter
        for size in (min(batch_size, n), n % batch_size or batch_size):
            if size not in self._programs:
                self._bind(arrays, task.data, size, hypers[0])
        indices = None if task.order is None else self.backend.indices(task.order)
        given = [a for a in task.data if a is not None]
        gather = self.dialect.gather
        found: Values = []
        for rows, hyper in zip(task.batches(), hypers[task.first :], strict=False):
            buffers, program = self._programs[rows.stop - rows.start]
            if indices is None:
                batch = [a[rows] for a in given] if n > batch_size else given
            else:
                chosen = indices[rows]
                batch = [gather(a, chosen, b) for a, b in zip(given, buffers, strict=True)]
            found.append(program(*batch, hyper.alpha, *hyper.coefficients, *hyper.keys))
            if task.stop():
                break
        if self.backend.name != "numpy":  # there they are numbers already
            losses, penalties = zip(*found, strict=True)
            found = self._fetch(list(losses), list(penalties))
        values += found

    def _bind(self, arrays: Arrays, data: Batch, size: int, hyper: Hyper) -> None:
        """Make buffers for a batch of so many rows, and the function that does a step with it."""
        longest = max(self._programs, default=0)
        if size <= longest:
            buffers = [buffer[:size] for buffer in self._programs[longest][0]]
        else:
            buffers = [self.dialect.buffer(a, size) for a in data if a is not None]
        batch = Batch(*buffers)
        arguments = specify((arrays, batch, hyper))
        replay = _replay(self.recipe, self.backend.name, Tree(arguments))
        self._programs[size] = buffers, replay.bind(list(leaves(arrays)), self.dialect)


@lru_cache(maxsize=64)
def _replay(recipe: Recipe, dialect: str, arguments: Tree) -> Replay:
    # Without buffers, so that it can outlive a fit
    return lower(*recorded(recipe, arguments), DIALECTS[dialect])

"""Where each result of a program lies, so that memory is used again.

A result takes the place of an operand that nobody needs any more, a part of the vector it
will be joined in, or a buffer that an earlier result has left.
"""

from __future__ import annotations

from collections import Counter, defaultdict

from portable_mlp.engines.graph.program import (
    REDUCTIONS,
    VIEWS,
    Node,
    Program,
    parts_at_home,
)
from portable_mlp.engines.host.loops import is_loop


class Plan:
    """Where each result of a program lies in memory.

    Attributes
    ----------
    segments : list of lists of Node
        What is calculated, in order; a segment of more than one is a chain of
        elementwise operations, which run block by block, or in one loop.
    loops : set of Node
        What runs in loops.
    registers : set of Node
        What only its own loop needs: it has no place.
    place : dict
        For each calculated node, its memory's number and its offset there in bytes.
        Negative numbers are scratch memories, as large as a block.
    sizes : list of int
        Bytes of the memories; the first are those of the ``given`` arrays, donated or resident.
    homes : dict
        For a result that is written straight into the array it will be joined in,
        that array's node and the offset there.
    """

    def __init__(
        self,
        program: Program,
        n_donated: int,
        block: int,
        *,
        n_resident: int = 0,
        loops: bool = False,
    ) -> None:
        self.program = program
        n_given = n_donated + n_resident
        self.donated = program.inputs[:n_donated]
        self.given = program.inputs[:n_given]
        self.passed = program.inputs[n_given:]
        self.block = block
        self.fixed = self._fixed()
        calculated = [
            x for x in program.nodes
            if x.op not in VIEWS and x not in self.fixed and not x.is_number
        ]  # fmt: skip
        passed = set(self.passed)
        self.loops = {x for x in calculated if loops and is_loop(x, passed)}
        self.registers: set[Node] = set()
        self.place: dict[Node, tuple[int, int]] = {}
        self.sizes: list[int] = []
        self.scratch: list[int] = []
        self.homes = self._homes(calculated)
        self.segments = self._segments(calculated)
        self._assign()

    def _fixed(self) -> set[Node]:
        """Return what depends on no input: computed once."""
        fixed: set[Node] = set()
        for x in self.program.nodes:
            if all(o in fixed for o in x.operands if isinstance(o, Node)):
                fixed.add(x)
        return fixed

    def _homes(self, calculated: list[Node]) -> dict[Node, tuple[Node, int]]:
        known = set(calculated)
        homes = parts_at_home(calculated)
        # And what such a result is calculated from elementwise, if nobody else reads it
        readers = Counter(o.root for x in calculated for o in {*x.arrays})
        readers.update(y.root for y in self.program.outputs if isinstance(y, Node))
        for x in reversed(calculated):
            if x in homes and x.elementwise and x.op != "where":
                for a in x.arrays:
                    alike = (a.shape, a.dtype) == (x.shape, x.dtype)
                    own = a in known and a.op != "concat"  # whose parts are at home in it
                    if alike and own and a not in homes and readers[a] == 1:
                        homes[a] = homes[x]
                        break
        return homes

    def _segments(self, calculated: list[Node]) -> list[list[Node]]:
        segments: list[list[Node]] = []
        chained: tuple[bool, tuple[int, ...]] | None = None
        for x in calculated:
            loop = x in self.loops
            if loop:
                together = x.op not in REDUCTIONS
            else:
                together = 0 < self.block < x.size and x.elementwise
                together &= all(a.shape in ((), x.shape) for a in x.arrays)
                together &= len(x.arrays) == len(x.with_axes)  # numbers are not cut
            # Of a result, the same element: others are not there yet
            crossed = segments and any(a.root in segments[-1] and a.op in VIEWS for a in x.arrays)
            if together and chained == (loop, x.shape) and not crossed:
                segments[-1].append(x)
            else:
                segments.append([x])
            chained = (loop, x.shape) if together else None
        return segments

    def rows(self, segment: list[Node]) -> int:
        """Rows of a block; 0 if the segment is not to be cut."""
        (first, *more) = segment
        if not more or first in self.loops or first.size <= self.block:
            return 0
        return max(1, first.shape[0] * self.block // first.size)

    # ------------------------------------------------------------ memory

    def _assign(self) -> None:
        uses: dict[Node, list[int]] = defaultdict(list)  # by segment
        for i, segment in enumerate(self.segments):
            for x in segment:
                for operand in x.arrays:
                    uses[operand.root].append(i)
        end = len(self.segments)
        for output in self.program.outputs:
            if isinstance(output, Node):
                uses[output.root].append(end)
        last = {x: max(segments) for x, segments in uses.items()}
        until: dict[int, int] = {}  # the segment after which a memory is free
        for x in self.given:
            self.place[x] = self._new(x.n_bytes), 0
            until[self.place[x][0]] = last.get(x, -1) if x in self.donated else end + 1
        n_given = len(self.sizes)
        free: list[int] = []
        for now, segment in enumerate(self.segments):
            rows = self.rows(segment)
            left = {x: len([o for y in segment for o in y.arrays if o.root is x])
                    for x in segment}  # fmt: skip
            spare = list(range(len(self.scratch)))  # other segments' is free again
            for x in segment:
                if x in self.loops and last[x] == now:
                    self.registers.add(x)
                    continue
                if x in self.homes:
                    home, offset = self.homes[x]
                    if home not in self.place:
                        replaced = self._replaced(home, until, now)
                        given = self._take(free, home.n_bytes) if replaced is None else replaced
                        self.place[home] = given, 0
                    memory, _ = self.place[home]
                    self.place[x] = memory, offset
                    until[memory] = max(last[home], last[x], until.get(memory, 0))
                elif x not in self.place:
                    dead = self._overwritten(x, segment, until, now)
                    local = rows and last[x] == now
                    if local and (dead is None or dead >= n_given):
                        self._place_scratch(x, left, spare, rows)
                        continue
                    memory = self._take(free, x.n_bytes) if dead is None else dead
                    self.place[x] = memory, 0
                    until[memory] = last[x]
                self._retire(x, left, spare)
            free += [
                m for m, done in until.items() if done == now and m >= n_given and m not in free
            ]

    def _replaced(self, x: Node, until: dict[int, int], now: int) -> int | None:
        """Return the donated memory that x replaces, if nobody reads what is there from now on.

        What is there may be another result, which was written over the donated array.
        """
        for memory, output in enumerate(self.program.outputs[: len(self.donated)]):
            if output is x and until[memory] < now:
                return memory
        return None

    def _place_scratch(self, x: Node, left: dict[Node, int], spare: list[int], rows: int) -> None:
        """Return a result that only its own segment reads: a block of it is enough."""
        # An operand's memory serves if each element is read before it is written over
        alike = all(o.dtype.itemsize == x.dtype.itemsize for o in x.arrays)
        over_operands = alike and x.op != "where"
        if over_operands:
            self._retire(x, left, spare)
        n_bytes = rows * (x.n_bytes // x.shape[0])
        fits = [s for s in spare if self.scratch[s] >= n_bytes]
        if fits:
            number = fits[-1]
            spare.remove(number)
        else:
            number = len(self.scratch)
            self.scratch.append(n_bytes)
        self.place[x] = -1 - number, 0
        if not over_operands:
            self._retire(x, left, spare)

    def _retire(self, x: Node, left: dict[Node, int], spare: list[int]) -> None:
        """Scratch memory that x is the last to read; an elementwise result may go there."""
        for operand in x.arrays:
            root = operand.root
            if root in left and root in self.place:
                left[root] -= 1
                memory = self.place[root][0]
                if not left[root] and memory < 0:
                    spare.append(-1 - memory)

    def _overwritten(
        self, x: Node, segment: list[Node], until: dict[int, int], now: int
    ) -> int | None:
        """Return a memory that nobody reads any more where x is written, if there is one.

        That of an operand, where each element is read before it is written; or that of
        the donated array which x replaces.
        """
        place = self.place
        later = segment[segment.index(x) + 1 :]
        still_read = {place[o.root][0] for y in later for o in y.arrays if o.root in place}
        # What the segment reads elsewhere than it writes would be overwritten before
        still_read |= {
            place[o.root][0]
            for y in segment
            for o in y.arrays
            if o.root in place and not (o.contiguous and o.size == o.root.size == y.size)
        }
        candidates: dict[int, bool] = {}
        loop = x in self.loops
        readers = segment[: segment.index(x) + 1] if loop else [x]
        for operand in (o for y in readers for o in y.arrays):
            memory, offset = place.get(operand.root, (-1, 0))
            fits = (
                x.elementwise and (loop or x.op != "where")
                and (operand.shape, operand.dtype) == (x.shape, x.dtype) and operand.contiguous
                and offset == 0 and memory >= 0 and self.sizes[memory] == x.n_bytes
                and until[memory] <= now and memory not in still_read
            )  # fmt: skip
            # Any other view of the same memory would be read after it was overwritten
            candidates[memory] = candidates.get(memory, True) and fits
        for memory, output in enumerate(self.program.outputs[: len(self.donated)]):
            if output is x and until[memory] <= now and memory not in still_read:
                candidates.setdefault(memory, True)
        # Donated memory first: its result is to be there in the end
        return min((m for m, fits in candidates.items() if fits), default=None)

    def _new(self, n_bytes: int) -> int:
        self.sizes.append(n_bytes)
        return len(self.sizes) - 1

    def _take(self, free: list[int], n_bytes: int) -> int:
        fits = [m for m in free if n_bytes <= self.sizes[m] <= 2 * n_bytes + 4096]
        if not fits:
            return self._new(n_bytes)
        best = min(fits, key=lambda m: self.sizes[m])
        free.remove(best)
        return best

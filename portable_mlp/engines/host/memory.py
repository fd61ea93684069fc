"""Memory planning: a place for each result of a program, with reuse.

A result takes the place of an operand that is no longer needed, or a part of the vector it
will be joined in, or a buffer that an earlier result no longer needs.
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
    """The place of each result of a program in memory.

    Attributes
    ----------
    segments : list of lists of Node
        The operations to compute, in order.  A segment of several is a chain of elementwise
        operations that run block by block, or in one loop.
    loops : set of Node
        Operations that run in loops in C.
    registers : set of Node
        Results that only their own loop reads.  They have no place in memory.
    place : dict
        For each computed node, the number of its memory and the offset there in bytes.
        Negative numbers are scratch memories, each as large as a block.
    sizes : list of int
        Bytes of the memories.  The first ones are the ``given`` arrays, donated or resident.
    homes : dict
        For a result that is written directly into the array it will be joined in, the
        node of that array and the offset there in bytes.
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
        """Return the nodes that depend on no input; they are computed once."""
        fixed: set[Node] = set()
        for x in self.program.nodes:
            if all(o in fixed for o in x.operands if isinstance(o, Node)):
                fixed.add(x)
        return fixed

    def _homes(self, calculated: list[Node]) -> dict[Node, tuple[Node, int]]:
        known = set(calculated)
        homes = parts_at_home(calculated)
        # An operand of such an elementwise result can be computed there, too, if nothing else
        # reads it
        readers = Counter(o.root for x in calculated for o in {*x.arrays})
        readers.update(y.root for y in self.program.outputs if isinstance(y, Node))
        for x in reversed(calculated):
            if x in homes and x.elementwise and x.op != "where":
                for a in x.arrays:
                    alike = (a.shape, a.dtype) == (x.shape, x.dtype)
                    own = a in known and a.op != "concat"  # its parts have their homes in it
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
                together &= len(x.arrays) == len(x.with_axes)  # a number with axes has no rows
            # A view of a result may read elements that the segment has not computed yet
            crossed = segments and any(a.root in segments[-1] and a.op in VIEWS for a in x.arrays)
            if together and chained == (loop, x.shape) and not crossed:
                segments[-1].append(x)
            else:
                segments.append([x])
            chained = (loop, x.shape) if together else None
        return segments

    def rows(self, segment: list[Node]) -> int:
        """Return the number of rows of a block; 0 if the segment runs whole."""
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
        until: dict[int, int] = {}  # the last segment that needs a memory
        for x in self.given:
            self.place[x] = self._new(x.n_bytes), 0
            until[self.place[x][0]] = last.get(x, -1) if x in self.donated else end + 1
        n_given = len(self.sizes)
        free: list[int] = []
        for now, segment in enumerate(self.segments):
            rows = self.rows(segment)
            # Reads of each result by its own segment that are still to come
            left = {x: len([o for y in segment for o in y.arrays if o.root is x])
                    for x in segment}  # fmt: skip
            spare = list(range(len(self.scratch)))  # earlier segments are done with theirs
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
        """Return the donated memory that x replaces, if its content is no longer read.

        The content may be another result, which was written over the donated array.
        """
        for memory, output in enumerate(self.program.outputs[: len(self.donated)]):
            if output is x and until[memory] < now:
                return memory
        return None

    def _place_scratch(self, x: Node, left: dict[Node, int], spare: list[int], rows: int) -> None:
        """Place a result that only its own segment reads in scratch memory for one block."""
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
        """Count the reads of x, and free scratch memory of which x is the last reader."""
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
        """Return a memory that x may overwrite, if there is one.

        It is the memory of an operand that is no longer needed, where each element is read
        before it is written, or that of the donated array which x replaces.
        """
        place = self.place
        later = segment[segment.index(x) + 1 :]
        still_read = {place[o.root][0] for y in later for o in y.arrays if o.root in place}
        # An array that the segment reads at other positions than it writes would be overwritten
        # too early
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
            # If x reads the memory through another view as well, it reads overwritten elements
            candidates[memory] = candidates.get(memory, True) and fits
        for memory, output in enumerate(self.program.outputs[: len(self.donated)]):
            if output is x and until[memory] <= now and memory not in still_read:
                candidates.setdefault(memory, True)
        # Donated memory first: its output must be there at the end
        return min((m for m, fits in candidates.items() if fits), default=None)

    def _new(self, n_bytes: int) -> int:
        self.sizes.append(n_bytes)
        return len(self.sizes) - 1

    def _take(self, free: list[int], n_bytes: int) -> int:
        # A memory much larger than needed is left for a larger result
        fits = [m for m in free if n_bytes <= self.sizes[m] <= 2 * n_bytes + 4096]
        if not fits:
            return self._new(n_bytes)
        best = min(fits, key=lambda m: self.sizes[m])
        free.remove(best)
        return best

"""The rule of memory plans: a result is not overwritten before its last reader.

The check uses only the places in a plan, not the planner's reasoning.  It is on whenever the
verifier of programs is.
"""

from __future__ import annotations

from portable_mlp.engines.graph.program import Node
from portable_mlp.engines.graph.verifier import ProgramError, name
from portable_mlp.engines.host.memory import Plan


def verify_plan(plan: Plan) -> None:
    """Check that every array is still in memory when it is read.

    Goes through the results of a plan in order, and keeps track of which array lies where.

    Parameters
    ----------
    plan : Plan

    Raises
    ------
    ProgramError
        If an array is read after it was overwritten.
    """
    there: dict[Node, tuple[int, int, int]] = {}  # memory, first byte, end

    def lies(x: Node) -> tuple[int, int, int]:
        memory, start = plan.place[x]
        scratch = memory < 0  # holds one block, so two arrays in it always overlap
        return memory, start, start + (1 if scratch else max(x.n_bytes, 1))

    def overlap(a: tuple[int, int, int], b: tuple[int, int, int]) -> bool:
        return a[0] == b[0] and a[1] < b[2] and b[1] < a[2]

    def in_memory(x: Node) -> bool:
        return not (x in plan.fixed or x in plan.passed or x in plan.registers)

    def look(x: Node, reader: str) -> None:
        if in_memory(x.root) and x.root not in there:
            raise ProgramError(f"{reader} reads {name(x.root)} where something else is by now")

    there |= {x: lies(x) for x in plan.given}
    for segment in plan.segments:
        for x in segment:
            for operand in x.arrays:
                look(operand, name(x))
            if x in plan.registers:
                continue
            own = lies(x)
            parts = {o.root for o in x.operands} if x.op == "concat" else set()
            there = {y: at for y, at in there.items() if y in parts or not overlap(at, own)}
            there[x] = own
            # A segment runs element by element: other elements of what x overwrites may be
            # needed later
            for reader in segment:
                for operand in reader.arrays:
                    moved = not (operand.contiguous and operand.size == x.size)
                    read = operand.root in plan.place and operand.root is not x
                    if moved and read and x.elementwise and overlap(lies(operand.root), own):
                        raise ProgramError(
                            f"{name(x)} is written over {name(operand.root)}, of which"
                            f" {name(reader)} reads other elements"
                        )
    for y in plan.program.outputs:
        if isinstance(y, Node) and not y.is_number:
            look(y, "an output")

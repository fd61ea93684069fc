"""The rule of memory plans: what is read is still what was written there.

Looks at where a plan's results lie, without the planner's reasons.  On and off as the verifier of
programs is.
"""

from __future__ import annotations

from portable_mlp.engines.graph.program import Node
from portable_mlp.engines.graph.verifier import ProgramError, name
from portable_mlp.engines.host.memory import Plan


def verify_plan(plan: Plan) -> None:
    """Check that what is read in memory is still what was written there.

    Goes through a plan's results in order, and notes which array lies where.

    Parameters
    ----------
    plan : Plan

    Raises
    ------
    ProgramError
    """
    there: dict[Node, tuple[int, int, int]] = {}  # memory, and from which byte to which

    def lies(x: Node) -> tuple[int, int, int]:
        memory, start = plan.place[x]
        scratch = memory < 0  # as long as a block: two arrays there are never apart
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
            # A segment goes on element by element: others of an array may still be needed
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

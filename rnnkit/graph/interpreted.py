"""A cell's functions as programs for the interpreter, csrc/cpu/interpreter.h."""

from collections.abc import Iterator, Mapping, Sequence

from rnnkit.graph.derive import Derived
from rnnkit.graph.trace import Node, order

#: An instruction: its name, the register of the result, three operands, a constant.
Instruction = tuple[str, int, int, int, int, float]
#: The number of registers, and the instructions.
Program = tuple[int, list[Instruction]]
#: A member of the block that a function is called with, and which of its values.
Place = tuple[str, int]

#: For each kind of leaf the members with its values, which are added.
_GATES = {"x": ("x", "x_bias"), "r": ("h", "h_bias")}


def _places(node: Node) -> list[Place]:
    """The places of a leaf's value, or of what is added to it."""
    k = int(node.of)
    if node.op in _GATES:
        return [(member, k) for member in _GATES[node.op]]
    if node.op == "parameter":
        return [("parameters", k)]
    first, others = {"state": ("previous_h", "other_states"), "grad": ("grad_h", "grad_others")}[
        node.op
    ]
    return [(others, k - 1) if k else (first, 0)]


class _Writer:
    """Writes a program. A register is free again after its last use."""

    def __init__(self) -> None:
        self.instructions: list[Instruction] = []
        self.count = 0
        self.free: list[int] = []

    def write(self, name: str, *operands: int, value: float = 0.0) -> int:
        """An instruction with a result, whose register it returns."""
        if not self.free:
            self.free.append(self.count)
            self.count += 1
        to = self.free.pop()
        a, b, c = (*operands, 0, 0, 0)[:3]
        self.instructions.append((name, to, a, b, c, value))
        return to

    def load(self, places: Sequence[Place]) -> int:
        """The sum of the values at these places."""
        first, *others = (self.write(f"load {member}", 0, k) for member, k in places)
        for other in others:
            first = self._added(first, other)
        return first

    def _added(self, a: int, b: int) -> int:
        self.free += [a, b]
        return self.write("add", a, b)


def _program(
    nodes: Sequence[Node],
    known: Mapping[int, Place],
    targets: Sequence[tuple[Place, int]],
) -> Program:
    """A program that stores a node at each target, the last of all instructions.

    Args:
        nodes: the nodes of a graph.
        known: where nodes are that are there already.
        targets: the places, and the node.
    """
    writer = _Writer()
    needed = order(nodes, [number for _, number in targets], known)
    operands = {n: () if n in known else nodes[n].args for n in needed}
    last = {operand: n for n in needed for operand in operands[n]}
    kept = {number for _, number in targets}
    registers: dict[int, int] = {}
    for number in needed:
        node = nodes[number]
        given = [registers[a] for a in operands[number]]
        # The result may take the place of an operand: an operation reads each value before it writes it.
        done = {a for a in operands[number] if last[a] == number and a not in kept}
        writer.free += [registers[a] for a in done]
        if number in known:
            registers[number] = writer.load([known[number]])
        elif node.op == "constant":
            registers[number] = writer.write("constant", value=float(node.of))
        elif node.args:
            registers[number] = writer.write(node.op, *given)
        else:
            registers[number] = writer.load(_places(node))
    stores = [
        (f"store {member}", 0, 0, k, registers[number], 0.0) for (member, k), number in targets
    ]
    return writer.count, writer.instructions + stores


def _array(member: str, nodes: Sequence[int]) -> list[tuple[Place, int]]:
    return [((member, k), number) for k, number in enumerate(nodes)]


def programs(derived: Derived) -> Iterator[Program]:
    """The programs of the functions of csrc/cpu/pointwise.h, in their order; empty ones of those that there are not."""
    graph, nodes = derived.graph, derived.nodes
    save = [("saved", k) for k in range(len(derived.saved))]
    known = derived.known(save, ("h", 0), ("previous_h", 0))
    grad_operand = Node("grad", (), len(graph.results))
    if grad_operand in nodes:
        known[nodes.index(grad_operand)] = "grad_operand", 0
    yield _program(nodes, {}, _array("states", graph.results) + _array("saved", derived.saved))
    columns = _array("grad", derived.columns)
    late = [columns[k][1] for k in derived.late_columns]
    del columns[derived.late_columns.start : derived.late_columns.stop]
    yield _program(nodes, known, _array("result", derived.previous_grads) + columns)
    several = derived.grad_states if len(graph.states) > 1 else ()
    yield _program(nodes, known, _array("result", several))
    yield _program(nodes, known, _array("result", graph.results[:1] if derived.projects else ()))
    operand = () if graph.operand is None else (graph.operand,)
    yield _program(nodes, {}, _array("states", operand))
    yield _program(nodes, known, _array("result", late))

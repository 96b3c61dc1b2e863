"""What the printers share: statements that compute nodes, one after the other."""

from collections.abc import Callable, Iterable, Mapping, Sequence

from rnnkit.graph.trace import LEAVES, Node, order

#: Operators that C++ and Python write alike.
INFIX = {
    "add": "+",
    "sub": "-",
    "mul": "*",
    "div": "/",
    "lt": "<",
    "le": "<=",
    "gt": ">",
    "ge": ">=",
    "eq": "==",
    "ne": "!=",
}

#: What the arrays of leaves are called.
ARRAYS = dict(zip(LEAVES, ("x", "h", "state", "parameter", "grad_state"), strict=True))

#: The text of an operation: its name and the text of each operand.
Call = Callable[[str, list[str]], str]


def statements(
    nodes: Sequence[Node],
    roots: Iterable[int],
    known: Mapping[int, str],
    constant: Callable[[str], str],
    call: Call,
) -> tuple[dict[int, str], dict[int, str]]:
    """What to compute for `roots`, and how it is called.

    Args:
        nodes: the nodes of a graph.
        roots: the nodes that are wanted.
        known: the text of nodes that are there already.
        constant: the text of a constant.
        call: the text of an operation that is no operator.

    Returns:
        For each node that is to be computed its name and the text that computes it, operands first; and the name of
        every node.
    """
    names: dict[int, str] = {}
    made: dict[int, str] = {}
    for number in order(nodes, roots, known):
        node = nodes[number]
        if node.op == "constant":
            names[number] = constant(str(node.of))
        else:
            operands = [] if number in known else [names[a] for a in node.args]
            made[number] = known.get(number) or _text(node, operands, call)
            names[number] = f"v{number}"
    return made, names


def _text(node: Node, operands: list[str], call: Call) -> str:
    if node.op in ARRAYS:
        return f"{ARRAYS[node.op]}[{node.of}]"
    if node.op in INFIX:
        return f" {INFIX[node.op]} ".join(operands)
    return f"-{operands[0]}" if node.op == "neg" else call(node.op, operands)

"""From the graph of a step to its backward pass: a graph of gradients, and what the step saves for it."""

import math
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from rnnkit.graph.trace import LEAVES, OPERATIONS, Graph, Node, Nodes, Value, evaluate, order

T = TypeVar("T")


@dataclass(frozen=True)
class Derived:
    """A cell with its backward pass.

    The gradients are made of the leaves "grad", one for each result of the step and, of a cell with late gates, one for
    the second operand, of saved nodes, of parameters, and of h after and before the step (nodes `h` and `previous_h`)
    where these are at hand. The gradients of late gates come first: the second operand's is made of them.

    Attributes:
        graph: the cell.
        projects: whether h may be projected; then the output is made again of what is saved.
        nodes: the graph's nodes, and those of the gradients.
        saved: the nodes that the step saves.
        recurrent_columns: the gradient of each gate's recurrent part.
        input_columns: the gradients of input parts that are no gradient of a recurrent part.
        parameter_columns: the gradient of each parameter, to be summed over rows and steps as biases' are.
        input_grads: for each gate with an input part, the place of its gradient among the columns.
        grad_states: the whole gradient of each state after the step, with what comes through the step's other results.
        previous_grads: the gradient of each state before the step, without what comes through the recurrent parts.
        h: the node of h after the step, if the gradients may read it beside what is saved.
        previous_h: the node of h before the step, if the gradients may read it.
        uses_h: whether the gradients read h after the step, beside what is saved.
        uses_previous_h: whether the step or the gradients read h before the step, other than by recurrent parts.
    """

    graph: Graph
    projects: bool
    nodes: tuple[Node, ...]
    saved: tuple[int, ...]
    recurrent_columns: tuple[int, ...]
    input_columns: tuple[int, ...]
    parameter_columns: tuple[int, ...]
    input_grads: tuple[int, ...]
    grad_states: tuple[int, ...]
    previous_grads: tuple[int, ...]
    h: int | None
    previous_h: int | None
    uses_h: bool
    uses_previous_h: bool

    @property
    def grads(self) -> int:
        """How many gradients the gates have."""
        return len(self.recurrent_columns) + len(self.input_columns)

    @property
    def columns(self) -> tuple[int, ...]:
        """All columns: of recurrent parts, of input parts, of parameters; last a value, the second operand."""
        gradients = self.recurrent_columns + self.input_columns + self.parameter_columns
        return gradients + _operand(self.graph)

    @property
    def late_columns(self) -> range:
        """The places of the late gates' gradients among the columns."""
        return range(self.graph.early, len(self.graph.recurrent))

    def known(self, save: Sequence[T], h: T, previous_h: T) -> dict[int, T]:
        """What the backward pass is given, by the node: what is saved, and h where the gradients may read it."""
        known = dict(zip(self.saved, save, strict=True))
        if self.h is not None and self.previous_h is not None:
            known = {self.h: h, self.previous_h: previous_h, **known}
        return known


def _operand(graph: Graph) -> tuple[int, ...]:
    """The node of the second operand; empty if there is none."""
    return () if graph.operand is None else (graph.operand,)


class _Shortened(Nodes):
    """Nodes without factors 1, and with few signs: a + (-b) is a - b, and (-a) b is -(a b). No bit changes by it."""

    def apply(self, op: str, *args: int) -> int:
        """The node of an operation, or the shorter one that is equal."""
        a, *rest = args
        b = rest[0] if rest else a
        if op in ("mul", "div") and self._is_one(b):
            return a
        if op == "mul" and self._is_one(a):
            return b
        if op == "neg" and self._negated(a) >= 0:
            return self._negated(a)
        if op in ("add", "sub") and self._negated(b) >= 0:
            return self.apply("sub" if op == "add" else "add", a, self._negated(b))
        if op == "add" and self._negated(a) >= 0:
            return self.apply("sub", b, self._negated(a))
        if op in ("mul", "div") and self._negated(a) >= 0:
            return self.apply("neg", self.apply(op, self._negated(a), b))
        if op in ("mul", "div") and self._negated(b) >= 0:
            return self.apply("neg", self.apply(op, a, self._negated(b)))
        return super().apply(op, *args)

    def _is_one(self, number: int) -> bool:
        return self.nodes[number] == Node("constant", (), "1.0")

    def _negated(self, number: int) -> int:
        """What the node is the negative of; -1 if it has no sign."""
        return self.nodes[number].args[0] if self.nodes[number].op == "neg" else -1

    def where(self, condition: Value, a: Any, b: Any) -> Value:
        """The value a where the condition holds, else b; either may be a number."""
        values = (v.node if isinstance(v, Value) else self.constant(v) for v in (a, b))
        return Value(self, self.apply("where", condition.node, *values))

    def total(self, a: Value, b: Value) -> Value:
        """The sum of two shares of a gradient, with a common first factor taken out: g - g z is g (1 - z)."""
        if self._negated(a.node) >= 0:
            a, b = b, a
        negated = self._negated(b.node)
        first, of_a = self._factors(a.node)
        second, of_b = self._factors(b.node if negated < 0 else negated)
        total: Value
        if first == second and (isinstance(of_a, Value) or isinstance(of_b, Value)):
            total = Value(self, first) * (of_a - of_b if negated >= 0 else of_a + of_b)
        else:
            total = a + b
        return total

    def _factors(self, number: int) -> tuple[int, Any]:
        """A product's first factor and the rest of it, or what is no product and 1."""
        node = self.nodes[number]
        return (node.args[0], Value(self, node.args[1])) if node.op == "mul" else (number, 1)


def _shares(nodes: _Shortened, y: Value, grad: Value) -> tuple[Value | None, ...]:
    """The share of each operand in the gradient of y; in terms of y where that is cheaper.

    Where a function has no derivative it is torch's: half for each of two equal operands of maximum and minimum, 0 for
    abs and relu at 0.
    """
    node = nodes.nodes[y.node]
    a, b = ([Value(nodes, n) for n in node.args] + [y, y])[:2]
    match node.op:
        case "add":
            return grad, grad
        case "sub":
            return grad, -grad
        case "mul":
            return grad * b, grad * a
        case "div":
            return grad / b, -(grad * y / b)
        case "neg":
            return (-grad,)
        case "abs":
            return (nodes.where(a > 0, grad, nodes.where(a < 0, -grad, 0)),)
        case "exp":
            return (grad * y,)
        case "log1p":
            return (grad / (1 + a),)
        case "sigmoid":
            return (grad * y * (1 - y),)
        case "logsigmoid":
            return (grad * (-a).sigmoid(),)
        case "tanh":
            return (grad * (1 - y * y),)
        case "relu":
            return (nodes.where(y <= 0, 0, grad),)
        case "softplus":  # torch's is the identity above 20
            return (nodes.where(a > 20, grad, grad * a.sigmoid()),)
        case "maximum" | "minimum":
            half = nodes.where(a == b, grad * 0.5, grad)
            below, above = (a < b, a > b) if node.op == "maximum" else (a > b, a < b)
            return nodes.where(below, 0, half), nodes.where(above, 0, half)
        case "where":
            return None, nodes.where(a, grad, 0), nodes.where(a, 0, grad)
    return tuple(None for _ in node.args)


def _gradients(nodes: _Shortened, graph: Graph) -> dict[int, Value]:
    """The gradient of each node of the graph that has one."""
    grads: dict[int, Value] = {}

    def add(number: int, share: Value | None) -> None:
        if share is not None and nodes.nodes[number].op != "constant":
            grads[number] = nodes.total(grads[number], share) if number in grads else share

    for k, result in enumerate((*graph.results, *_operand(graph))):
        add(result, nodes.leaf("grad", k))
    for number in reversed(range(len(graph.nodes))):
        if number in grads:
            shares = _shares(nodes, Value(nodes, number), grads[number])
            for operand, share in zip(graph.nodes[number].args, shares, strict=False):
                add(operand, share)
    return grads


def derive(graph: Graph, projects: bool = False) -> Derived:
    """The backward pass of a cell.

    Args:
        graph: the cell.
        projects: whether h may be projected. Then neither step nor gradients may read it, and what is saved suffices
            for the output.

    Raises:
        ValueError: `projects`, and the step reads h before the step.
    """
    nodes = _Shortened(graph.nodes)
    gradients = _gradients(nodes, graph)
    zero = Value(nodes, nodes.constant(0))
    of = {
        kind: [gradients.get(nodes.number(Node(kind, (), k)), zero).node for k in range(len(names))]
        for kind, names in graph.leaves.items()
    }
    input_columns = list(dict.fromkeys(n for n in of["x"] if n not in of["r"]))
    columns = of["r"] + input_columns
    grad_states = [gradients.get(n, zero).node for n in graph.results[: len(graph.states)]]
    operand = _operand(graph)
    roots = (*columns, *of["parameter"], *of["state"], *operand)

    # Where h is the only state it is in the output after each step.
    previous_h = nodes.number(Node("state", (), 0))
    reads = previous_h in order(graph.nodes, (*graph.results, *operand))
    if projects and reads:
        raise ValueError(f"expected a cell that projects not to read its state {graph.states[0]}")
    at_hand = len(graph.states) == 1 and not projects and not graph.has_output
    free = {graph.results[0], previous_h} if at_hand else set()
    needed = {*_needed(nodes.nodes, roots), *(graph.results[:1] if projects else ())}
    saved = smallest_cut(nodes.nodes, needed, free)
    used = order(nodes.nodes, roots, {*saved, *free})
    return Derived(
        graph=graph,
        projects=projects,
        nodes=tuple(nodes.nodes),
        saved=tuple(sorted(saved, key=lambda n: (nodes.nodes[n].op in LEAVES, n))),
        recurrent_columns=tuple(of["r"]),
        input_columns=tuple(input_columns),
        parameter_columns=tuple(of["parameter"]),
        input_grads=tuple(columns.index(n) for n in of["x"]),
        grad_states=tuple(grad_states),
        previous_grads=tuple(of["state"]),
        h=graph.results[0] if at_hand else None,
        previous_h=previous_h if at_hand else None,
        uses_h=at_hand and graph.results[0] in used,
        uses_previous_h=reads or (at_hand and previous_h in used),
    )


def _needed(nodes: Sequence[Node], roots: Iterable[int]) -> Iterator[int]:
    """The nodes without a gradient in them that gradients are made of."""
    with_grad = set[int]()
    for number, node in enumerate(nodes):
        if node.op == "grad" or not with_grad.isdisjoint(node.args):
            with_grad.add(number)
    for number in order(nodes, roots):
        if number in with_grad:
            yield from (a for a in nodes[number].args if a not in with_grad)
        elif number in roots:
            yield number


def smallest_cut(nodes: Sequence[Node], sinks: Iterable[int], free: Iterable[int]) -> list[int]:
    """The fewest nodes of which `sinks` can be computed; of several such sets, the one with the least to compute.

    Constants, parameters and `free` nodes are at hand anyway. A truth value is not saved. The set is a minimum vertex
    cut between the leaves and the sinks, found as a maximum flow that enters at the sinks.
    """
    given = {*free, *(n for n, node in enumerate(nodes) if node.op in ("constant", "parameter"))}
    capacity: dict[Any, dict[Any, float]] = defaultdict(lambda: defaultdict(int))
    inner = [n for n in order(nodes, sinks, given) if n not in given]
    for number in inner:
        op, args, _ = nodes[number]
        truth = op in OPERATIONS and OPERATIONS[op].gives == "t"
        capacity[number, "in"][number, "out"] = math.inf if truth else 1
        for operand in args:
            if operand not in given:
                capacity[number, "out"][operand, "in"] = math.inf
        if op in LEAVES:
            capacity[number, "out"]["end"] = math.inf
    for number in set(sinks) - given:
        capacity["begin"][number, "in"] = math.inf
    while "end" in (came := _reached(capacity)):
        place: Any = "end"
        while place != "begin":
            before = came[place]
            capacity[before][place] -= 1
            capacity[place][before] += 1
            place = before
    return [n for n in inner if (n, "in") in came and (n, "out") not in came]


def _reached(capacity: dict[Any, dict[Any, float]]) -> dict[Any, Any]:
    """Every place to which more can flow from the beginning, and the place before it on the way."""
    came: dict[Any, Any] = {"begin": None}
    todo: deque[Any] = deque(["begin"])
    while todo:
        place = todo.popleft()
        for after, left in list(capacity[place].items()):
            if left > 0 and after not in came:
                came[after] = place
                todo.append(after)
    return came


def run_backward(
    derived: Derived,
    save: Sequence[Tensor],
    h: Tensor,
    previous_h: Tensor,
    grads: Sequence[Tensor],
    parameters: Sequence[Tensor] = (),
) -> tuple[list[Tensor], list[Tensor]]:
    """The backward pass of one step on tensors, [N, H].

    Args:
        derived: the cell.
        save: the saved values.
        h: h after the step.
        previous_h: h before the step.
        grads: the gradient of each result of the step, and of the second operand if there is one.
        parameters: the parameters, [H].

    Returns:
        The gradients of the states before the step, without what comes through the recurrent parts of h, and the
        columns.
    """
    known = derived.known(save, h, previous_h)
    roots = (*derived.previous_grads, *derived.columns)
    leaves = {"grad": grads, "parameter": parameters}
    values = evaluate(derived.nodes, roots, leaves, grads[0], known)
    states = len(derived.previous_grads)
    return values[:states], values[states:]

"""From a function of one step of a cell to its graph of scalar operations, and from the graph to results on tensors.

The function is called once, with a `Value` in the place of each tensor. Values write down what is done with them.
"""

import inspect
import json
import keyword
import linecache
import operator
import sys
import traceback
from collections import namedtuple
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial, partialmethod
from numbers import Real
from types import FrameType
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.nn import functional

Step = Callable[..., Any]


class Operation(NamedTuple):
    """An operation of a graph.

    Attributes:
        takes: a letter for each operand: n for a number, t for a truth value.
        gives: the letter of the result.
        on_tensors: the function that computes it on tensors.
    """

    takes: str
    gives: str
    on_tensors: Callable[..., Any]


OPERATIONS = {
    "add": Operation("nn", "n", operator.add),
    "sub": Operation("nn", "n", operator.sub),
    "mul": Operation("nn", "n", operator.mul),
    "div": Operation("nn", "n", operator.truediv),
    "neg": Operation("n", "n", operator.neg),
    "abs": Operation("n", "n", torch.abs),
    "exp": Operation("n", "n", torch.exp),
    "log1p": Operation("n", "n", torch.log1p),
    "sigmoid": Operation("n", "n", torch.sigmoid),
    "logsigmoid": Operation("n", "n", functional.logsigmoid),
    "tanh": Operation("n", "n", torch.tanh),
    "relu": Operation("n", "n", torch.relu),
    "softplus": Operation("n", "n", functional.softplus),
    "maximum": Operation("nn", "n", torch.maximum),
    "minimum": Operation("nn", "n", torch.minimum),
    "lt": Operation("nn", "t", operator.lt),
    "le": Operation("nn", "t", operator.le),
    "gt": Operation("nn", "t", operator.gt),
    "ge": Operation("nn", "t", operator.ge),
    "eq": Operation("nn", "t", operator.eq),
    "ne": Operation("nn", "t", operator.ne),
    "where": Operation("tnn", "n", torch.where),
}

#: The leaves: a gate's input part and recurrent part, a state before the step, a parameter of a unit, and the gradient
#: of a result of the step or, after these, of the second operand.
LEAVES = ("x", "r", "state", "parameter", "grad")

#: torch's functions and methods by their names, where these are not the operation's.
_OTHER_NAMES = {
    "absolute": "abs",
    "negative": "neg",
    "multiply": "mul",
    "subtract": "sub",
    "divide": "div",
    "true_divide": "div",
    "max": "maximum",
    "min": "minimum",
    "log_sigmoid": "logsigmoid",
}

_ALLOWED = (
    "a cell can use + - * / and comparisons, torch.abs, exp, log1p, maximum, minimum, neg, relu, sigmoid, tanh, where, "
    "and torch.nn.functional.logsigmoid, softplus"
)


class Node(NamedTuple):
    """A node of a graph.

    Attributes:
        op: a name of `OPERATIONS` or `LEAVES`, or "constant"; while a step is traced also "product", the recurrent part
            of a gate, its first operand, with the second operand in place of h.
        args: the numbers of the operands' nodes.
        of: which leaf of its kind, counted from 0, or the constant as Python writes it.
    """

    op: str
    args: tuple[int, ...] = ()
    of: int | str = ""


class Nodes:
    """Nodes that are made one after the other, each once: an equal node has the number of the first."""

    def __init__(self, nodes: Iterable[Node] = ()) -> None:
        self.nodes: list[Node] = []
        self._numbers: dict[Node, int] = {}
        for node in nodes:
            self.number(node)

    def number(self, node: Node) -> int:
        """The number of a node, which is added if it is new."""
        if node not in self._numbers:
            self._numbers[node] = len(self.nodes)
            self.nodes.append(node)
        return self._numbers[node]

    def apply(self, op: str, *args: int) -> int:
        """The node of an operation."""
        return self.number(Node(op, args))

    def leaf(self, kind: str, index: int) -> "Value":
        """The value of a leaf."""
        return Value(self, self.number(Node(kind, (), index)))

    def constant(self, value: float) -> int:
        """The node of a constant."""
        return self.number(Node("constant", (), repr(float(value))))


def _is_step(frame: FrameType) -> bool:
    """Whether a frame is of the function being traced or of what it calls, not of torch or of this module."""
    module = str(frame.f_globals.get("__name__", ""))
    return module != __name__ and module.partition(".")[0] not in ("torch", "functools")


def _line(frame: FrameType, number: int) -> str:
    """A line of the function being traced: file, number and, where it is known, text."""
    name = frame.f_code.co_filename
    line = linecache.getline(name, number).strip()
    return f"{name}:{number}" + f": `{line}`" * bool(line)


def _where_now() -> str:
    """The line of the function being traced that is being run."""
    frame = sys._getframe(1)
    while not _is_step(frame) and frame.f_back is not None:
        frame = frame.f_back
    return _line(frame, frame.f_lineno)


def _refuse(what: str, instead: str) -> NoReturn:
    raise Refused(f"{_where_now()}: {what}: {instead}")


class Refused(TypeError):
    """What a graph cannot have; the text names the line."""


def _with_line(error: TypeError) -> TypeError:
    """An error that torch raised, where the step's line is not in the text."""
    lines = [
        _line(frame, number)
        for frame, number in traceback.walk_tb(error.__traceback__)
        if _is_step(frame)
    ]
    words = str(error).partition("\n")[0]
    of_two = words.startswith(("maximum()", "minimum()"))
    instead = "use torch.where(a > b, a, b) with a Python number" if of_two else _ALLOWED
    return Refused(f"{lines[-1]}: {words}: {instead}") if lines else error


class Value:
    """A number, or a truth value, of each unit and row, in a function that is being traced.

    It has the operators, and the methods, of a tensor that `OPERATIONS` lists; torch's functions take it.
    """

    __slots__ = ("node", "nodes")
    __array_ufunc__ = None  # numpy's numbers leave operators to this class

    def __init__(self, nodes: Nodes, node: int) -> None:
        self.nodes, self.node = nodes, node

    @property
    def kind(self) -> str:
        """n for a number, t for a truth value."""
        op = self.nodes.nodes[self.node].op
        return OPERATIONS[op].gives if op in OPERATIONS else "n"

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> "Value":
        name = function.__name__
        op = _OTHER_NAMES.get(name, name)
        # torch.nn.Softplus gives its defaults by place.
        if op == "softplus" and args[1:] in ((1,), (1, 20)):
            args = args[:1]
        if op in OPERATIONS and kwargs and kwargs != {"inplace": False}:
            _refuse(f"torch's {name} with {', '.join(kwargs)}=", "give operands alone, by place")
        return _apply(op, f"torch's {name}", *args)

    def __getattr__(self, name: str) -> Any:
        op = _OTHER_NAMES.get(name, name)
        if name.startswith("__"):
            raise AttributeError(name)
        if op not in OPERATIONS or op == "where" or not hasattr(Tensor, name):
            _refuse(f"a cell cannot use .{name}", _ALLOWED)
        return partial(_apply, op, f".{name}", self)

    def __call__(self, *operands: Any, **named: Any) -> "Value":
        """`r.n(value)`: the recurrent part of a gate with `value` in place of h, W_hh value + b_hh."""
        leaf = self.nodes.nodes[self.node]
        if leaf.op != "r":
            _refuse("a call of a value", "only a gate's recurrent part, r.name, can be called")
        if named or len(operands) != 1 or not isinstance(operands[0], Value):
            given = ", ".join([*(type(operand).__name__ for operand in operands), *named])
            instead = "give it a value of the step: r.n(a * s.h)"
            _refuse(f"a recurrent part of {given or 'nothing'}", instead)
        nodes, number = self.nodes, _operand(self.nodes, operands[0], "n", "a recurrent part")
        if nodes.nodes[number] == Node("state", (), 0):
            return self
        products = {node.args[1] for node in nodes.nodes if node.op == "product"}
        if products - {number}:
            _refuse("recurrent parts of two values", "a step has one such value beside h")
        return Value(nodes, nodes.apply("product", self.node, number))

    def _operator(self, op: str, *other: Any) -> "Value":
        return _apply(op, op, self, *other)

    def _reversed(self, op: str, other: Any) -> "Value":
        return _apply(op, op, other, self)

    def _refused(self, what: str, instead: str, *_: Any) -> NoReturn:
        _refuse(what, instead)

    __hash__ = object.__hash__
    __neg__ = partialmethod(_operator, "neg")
    __abs__ = partialmethod(_operator, "abs")
    __add__ = partialmethod(_operator, "add")
    __radd__ = partialmethod(_reversed, "add")
    __sub__ = partialmethod(_operator, "sub")
    __rsub__ = partialmethod(_reversed, "sub")
    __mul__ = partialmethod(_operator, "mul")
    __rmul__ = partialmethod(_reversed, "mul")
    __truediv__ = partialmethod(_operator, "div")
    __rtruediv__ = partialmethod(_reversed, "div")
    __lt__ = partialmethod(_operator, "lt")
    __le__ = partialmethod(_operator, "le")
    __gt__ = partialmethod(_operator, "gt")
    __ge__ = partialmethod(_operator, "ge")
    __eq__ = partialmethod(_operator, "eq")
    __ne__ = partialmethod(_operator, "ne")


class _Named(tuple[Value, ...]):
    """The base of what a step gets: named tuples, which say what there is instead of a name that is not."""

    _title = ""
    _fields: tuple[str, ...]

    def _example(self) -> str:
        return f"{self._title}.{self._fields[0]}" if self._fields else "there are none"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        there = ", ".join(f"{self._title}.{field}" for field in self._fields) or "nothing"
        raise AttributeError(f"{_where_now()}: there is no {self._title}.{name}: there is {there}")

    def __call__(self, *_: Any) -> NoReturn:
        _refuse(f"a call of {self._title}", f"call one of its parts: {self._example()}(value)")


def _named(title: str, fields: Sequence[str]) -> Callable[..., _Named]:
    make: Any = namedtuple  # mypy wants a literal
    made = make(title, fields)
    return type(title, (made, _Named), {"_title": title, "__slots__": ()})


def _refuse_operators() -> None:
    """Operators that Values do not have, and what to write instead."""
    branch = "`if`, `and`, `or`, `not`, max() or min() of a value", "use torch.where"
    number = "a value in the place of a Python number", "use torch functions of the value itself"
    power = "the operator **", "write x * x, or torch.exp"
    refused = dict.fromkeys(("float", "int", "complex", "index", "round", "trunc"), number)
    refused |= {"bool": branch, "pow": power, "rpow": power}
    refused |= dict.fromkeys(("getitem", "len", "iter"), ("a value is no sequence", "use it whole"))
    for name, sign in {"add": "+", "sub": "-", "mul": "*", "truediv": "/"}.items():
        refused["i" + name] = f"the operator {sign}=", f"write a = a {sign} b"
    nested = "nest torch.where, once for each comparison"
    instead = dict.fromkeys(("and", "or", "xor", "invert"), nested)
    for name in ("mod", "floordiv", "matmul", "lshift", "rshift", *instead):
        for prefix in ("", "r", "i") if name != "invert" else ("",):
            operator_of = f"the operator of __{prefix}{name}__"
            refused[prefix + name] = operator_of, instead.get(name, _ALLOWED)
    for name, words in refused.items():
        setattr(Value, f"__{name}__", partialmethod(Value._refused, *words))


_refuse_operators()


def _apply(op: str, written: str, *operands: Any) -> Value:
    """The value of an operation, which the function has `written` so."""
    if op not in OPERATIONS:
        _refuse(f"a cell cannot use {written}", _ALLOWED)
    takes = OPERATIONS[op].takes
    if len(operands) != len(takes):
        _refuse(f"{written} with {len(operands)} arguments", f"give it {len(takes)}")
    nodes = next(a.nodes for a in operands if isinstance(a, Value))
    args = [_operand(nodes, *pair, written) for pair in zip(operands, takes, strict=True)]
    if instead := _wrong_numbers(op, [not isinstance(a, Value) for a in operands]):
        _refuse(f"{written} of Python numbers", instead)
    return Value(nodes, nodes.apply(op, *args))


def _wrong_numbers(op: str, numbers: Sequence[bool]) -> str:
    """What to write instead where these operands may not all be numbers of Python; empty if they may."""
    if op in ("maximum", "minimum"):  # torch takes none there
        return "use torch.where(a > b, a, b)" if any(numbers) else ""
    return (
        "add one of them to a value, whose dtype it gets" if all(numbers[op == "where" :]) else ""
    )


def _operand(nodes: Nodes, operand: Any, kind: str, written: str) -> int:
    if isinstance(operand, Value):
        if operand.nodes is not nodes:
            _refuse("a value of another call of a cell", "compute it from the arguments")
        if operand.kind != kind:
            is_number = operand.kind == "n"
            what = "a number where a comparison" if is_number else "a comparison where a number"
            _refuse(f"{written} takes {what} is needed", "use torch.where(a > b, a, b)")
        return operand.node
    if isinstance(operand, _Named):
        _refuse(f"{written} of all of {operand._title}", f"name one: {operand._example()}")
    if isinstance(operand, Tensor):
        _refuse("a tensor", "make it a parameter of the cell, or a Python number")
    if not isinstance(operand, Real) or kind != "n":
        _refuse(f"{written} of {type(operand).__name__} {operand!r}", _ALLOWED)
    return nodes.constant(float(operand))


@dataclass(frozen=True)
class Graph:
    """A cell: the graph of its step, and names.

    Attributes:
        inputs: the names of the gates that have an input part.
        recurrent: the names of the gates that have a recurrent part.
        states: the names of the states; the first is h, which the recurrent parts are made of.
        parameters: the names of the parameters that each unit has one of.
        nodes: every node once, operands first, leaves first of all, in an order that follows from the graph alone.
        results: the nodes of the states after the step, and last of the output if that is not the first state.
        late: how many of the recurrent gates, the last ones, have a recurrent part that is not made of h.
        operand: the node of what theirs is made of, the second operand; None without late gates. It is made of no
            recurrent part of theirs.
    """

    inputs: tuple[str, ...]
    recurrent: tuple[str, ...]
    states: tuple[str, ...]
    parameters: tuple[str, ...]
    nodes: tuple[Node, ...]
    results: tuple[int, ...]
    late: int = 0
    operand: int | None = None

    @property
    def early(self) -> int:
        """How many of the recurrent gates have a recurrent part that is made of h."""
        return len(self.recurrent) - self.late

    @property
    def has_output(self) -> bool:
        """Whether the output is another value than the first state."""
        return len(self.results) > len(self.states)

    def with_output_as_state(self) -> "Graph":
        """The graph with the output as one more state, which no step reads; itself if the first state is the output."""
        return replace(self, states=(*self.states, "output")) if self.has_output else self

    @property
    def leaves(self) -> dict[str, tuple[str, ...]]:
        """The names of the leaves of each kind."""
        kinds = LEAVES[:4]
        return dict(
            zip(kinds, (self.inputs, self.recurrent, self.states, self.parameters), strict=True)
        )

    def unused(self) -> list[str]:
        """The input parts, recurrent parts and parameters that nothing is made of, as the function names them."""
        used = {(node.op, node.of) for node in self.nodes}
        return [
            f"{title}.{name}"
            for title, (kind, names) in zip("xrsp", self.leaves.items(), strict=True)
            for k, name in enumerate(names)
            if kind != "state" and (kind, k) not in used
        ]

    def to_json(self) -> str:
        """The graph as one line of JSON; of equal graphs it is the same."""
        content = {name: getattr(self, name) for name in _members(self.late)}
        content["nodes"] = [
            [node.op, *node.args] if node.op in OPERATIONS else [node.op, node.of]
            for node in self.nodes
        ]
        return json.dumps(content, separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> "Graph":
        """The graph that `to_json` wrote.

        Raises:
            ValueError: the text is no graph; says what is wrong.
        """
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"expected the JSON of a graph: {error}") from None
        names = _members("late" in content if isinstance(content, dict) else 0)
        if not isinstance(content, dict) or sorted(content) != sorted(names):
            raise ValueError(f"expected the JSON of a graph, with {', '.join(names)}")
        for name in _members(0):
            if not isinstance(content[name], list):
                raise ValueError(f"expected {name} to be a list, got {content[name]!r}")
        of_leaves = [checked_names(name, content[name]) for name in names[:4]]
        nodes = Nodes()
        counts = dict(zip(LEAVES, map(len, of_leaves), strict=False))
        for place, node in enumerate(content["nodes"]):
            if nodes.number(_checked(node, counts, nodes.nodes)) != place:
                raise ValueError(f"expected nodes once each, got {node!r} again")
        results, states = content["results"], counts["state"]
        if len(results) not in (states, states + 1):
            raise ValueError(f"expected {states} or {states + 1} results, got {results!r}")
        for one in results:
            if not _is_index(one, len(nodes.nodes)) or Value(nodes, one).kind != "n":
                raise ValueError(f"expected results to be numbers of nodes, got {one!r}")
        if "late" not in content:
            return _graph(of_leaves, nodes.nodes, results)
        late, operand = content["late"], content["operand"]
        if type(late) is not int or not 1 <= late <= counts["r"]:
            raise ValueError(f"expected late to be 1 to {counts['r']}, got {late!r}")
        if not _is_index(operand, len(nodes.nodes)) or Value(nodes, operand).kind != "n":
            raise ValueError(f"expected operand to be the number of a node, got {operand!r}")
        for number in order(nodes.nodes, [operand]):
            op, _, of = nodes.nodes[number]
            if op == "r" and int(of) >= counts["r"] - late:
                raise ValueError(f"expected operand to be made of no late gate, got {operand!r}")
        return _graph(of_leaves, nodes.nodes, results, late, operand)


def _members(late: object) -> list[str]:
    """What the JSON of a graph has; of one with late gates also how many, and the second operand."""
    names = [field.name for field in fields(Graph)]
    return names if late else names[:-2]


def _is_index(number: Any, count: int) -> bool:
    return type(number) is int and 0 <= number < count


def _checked(node: Any, counts: Mapping[str, int], before: list[Node]) -> Node:
    """The node that a list [op, ...] of a JSON text stands for."""
    if not isinstance(node, list) or not node or not isinstance(node[0], str):
        raise ValueError(f"expected a node [operation, operands...], got {node!r}")
    op, *args = node
    if op in OPERATIONS:
        operands = [before[a] for a in args if _is_index(a, len(before))]
        kinds = [OPERATIONS[of.op].gives if of.op in OPERATIONS else "n" for of in operands]
        fits = len(kinds) == len(args) and "".join(kinds) == OPERATIONS[op].takes
        if fits and not _wrong_numbers(op, [of.op == "constant" for of in operands]):
            return Node(op, tuple(args))
    elif op in counts:
        if len(args) == 1 and _is_index(args[0], counts[op]):
            return Node(op, (), args[0])
    elif op == "constant" and len(args) == 1 and isinstance(args[0], str):
        try:
            return Node(op, (), repr(float(args[0])))
        except ValueError:
            pass
    raise ValueError(f"expected an operation of nodes before it, a leaf or a constant, got {node}")


def order(nodes: Sequence[Node], roots: Iterable[int], known: Iterable[int] = ()) -> list[int]:
    """The nodes that `roots` are made of, as an expression is evaluated: a node after its operands, the first first.

    What `known` nodes are made of is left out. Compilers choose by the order which of two products to fuse with a sum.
    """
    done: dict[int, None] = {}
    todo, known = [*roots][::-1], set(known)
    while todo:
        args = () if todo[-1] in known else nodes[todo[-1]].args
        if missing := [a for a in reversed(args) if a not in done]:
            todo += missing
        else:
            done[todo.pop()] = None
    return list(done)


def _graph(
    names: Sequence[tuple[str, ...]],
    nodes: list[Node],
    results: Sequence[int],
    late: int = 0,
    operand: int | None = None,
) -> Graph:
    """The graph with its nodes in the one order: by depth, then by their operands' places, then by name."""
    depth: dict[int, int] = {}
    levels: dict[int, list[int]] = {}
    for number in order(nodes, [*results, *([] if operand is None else [operand])]):
        depth[number] = 1 + max((depth[a] for a in nodes[number].args), default=-1)
        levels.setdefault(depth[number], []).append(number)
    made, place = Nodes(), dict[int, int]()
    for level in sorted(levels):
        renumbered = {
            n: nodes[n]._replace(args=tuple(place[a] for a in nodes[n].args)) for n in levels[level]
        }
        for number, node in sorted(renumbered.items(), key=lambda item: _key(item[1])):
            place[number] = made.number(node)
    inputs, recurrent, states, parameters = names
    new = tuple(place[result] for result in results)
    second = None if operand is None else place[operand]
    return Graph(inputs, recurrent, states, parameters, tuple(made.nodes), new, late, second)


def _late(nodes: list[Node], results: Sequence[int], recurrent: Sequence[str]) -> int:
    """How many recurrent gates, the last ones, are made of the second operand.

    Raises:
        ValueError: others than the last ones are, or one is also made of h.
    """
    used = [nodes[n] for n in order(nodes, results)]
    late = {int(nodes[node.args[0]].of) for node in used if node.op == "product"}
    without = [n._replace(args=n.args[1:]) if n.op == "product" else n for n in nodes]
    of_h = {int(without[n].of) for n in order(without, results) if without[n].op == "r"}
    for name in [recurrent[gate] for gate in sorted(late & of_h)]:
        raise ValueError(
            f"r.{name} and r.{name}(value): use one of them, or add a name for the other, such as "
            f'recurrent="{" ".join(recurrent)} {name}2"'
        )
    if late and min(late) != len(recurrent) - len(late):
        last = [name for gate, name in enumerate(recurrent) if gate in late]
        every = [*(name for name in recurrent if name not in last), *last]
        raise ValueError(
            f"r.{last[0]}(value), but {', '.join(last)} must be last among the recurrent gates: write "
            f'recurrent="{" ".join(every)}"'
        )
    return len(late)


def _key(node: Node) -> tuple[Any, ...]:
    kind = LEAVES.index(node.op) if node.op in LEAVES else len(LEAVES)
    return kind, node.args, node.op, node.of


def checked_names(argument: str, names: Any) -> tuple[str, ...]:
    """The names that an argument gives, in one string or a sequence; raises a ValueError if they are none."""
    if isinstance(names, str):
        names = names.split()
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"expected {argument} to be names, got {names!r}")
    for name in names:
        if not name.isidentifier() or keyword.iskeyword(name) or name.startswith("_"):
            raise ValueError(
                f"expected names that Python can have in {argument}, without a leading underscore and with spaces "
                f"between them, got {name!r}"
            )
    if len(set(names)) < len(names):
        raise ValueError(f"expected different names in {argument}, got {', '.join(names)}")
    if not names and argument not in ("recurrent", "parameters"):
        raise ValueError(f"expected at least one name in {argument}")
    return tuple(names)


def trace(
    step: Step,
    *,
    inputs: str | Sequence[str],
    recurrent: str | Sequence[str],
    states: str | Sequence[str],
    parameters: str | Sequence[str] = (),
) -> Graph:
    """The graph of a step.

    Args:
        step: the function `step(x, r, s)`, or `step(x, r, s, p)` for a cell with parameters. The arguments are named
            tuples: the gates' input parts, their recurrent parts, the states before the step, and the parameters. It
            returns the states after the step, a tuple in the order of `states` or a dict by their names; a dict may
            also have an "output" that is no state. It computes with torch's functions and, without late gates, runs on
            tensors as well.
        inputs: names of the gates with an input part; in one string, with spaces between them, or a sequence.
        recurrent: names of the gates with a recurrent part. In the function `r.name` is it, made of h, and
            `r.name(value)` is made of a value instead; the gates of which it takes that are the last ones.
        states: names of the states. The first is h, which the recurrent parts are made of.
        parameters: names of the parameters of each unit.

    Raises:
        TypeError: the function uses what a graph cannot have; the text names the line, and what to write instead.
        ValueError: a name is none, or the function returns other states than it should.
    """
    given = {"inputs": inputs, "recurrent": recurrent, "states": states, "parameters": parameters}
    names = [checked_names(argument, of) for argument, of in given.items()]
    nodes = Nodes()
    arguments = []
    for title, kind, of_kind in zip("xrsp", LEAVES, names, strict=False):
        leaves = (nodes.leaf(kind, k) for k in range(len(of_kind)))
        arguments.append(_named(title, of_kind)(*leaves))
    arguments = arguments if names[3] else arguments[:3]
    _check_arguments(step, arguments)
    try:
        returned = step(*arguments)
    except Refused:
        raise
    except TypeError as error:
        raise _with_line(error) from error
    results = _results(step, returned, names[2], nodes)
    try:
        late = _late(nodes.nodes, results, names[1])
    except ValueError as error:
        raise ValueError(f"{_where(step)} uses {error}") from None
    operand = next((node.args[1] for node in nodes.nodes if node.op == "product" and late), None)
    made = [nodes.nodes[n.args[0]] if n.op == "product" else n for n in nodes.nodes]
    return _graph(names, made, results, late, operand)


def _check_arguments(step: Step, arguments: Sequence[Any]) -> None:
    """Checks that the step takes so many arguments."""
    try:
        inspect.signature(step).bind(*arguments)
    except TypeError as error:
        p, of = (", p", "with") if len(arguments) == 4 else ("", "without")
        words = f"a cell {of} parameters is a function step(x, r, s{p})"
        raise TypeError(f"{_where(step)}: {error}: {words}") from None
    except ValueError:  # nothing is known of the signature
        pass


def _where(step: Step) -> str:
    """The place of the function's first line, and its name."""
    code = getattr(step, "__code__", None)
    at = f"{code.co_filename}:{code.co_firstlineno}: " if code else ""
    return f"{at}{getattr(step, '__name__', step)}"


def _results(step: Step, returned: Any, states: tuple[str, ...], nodes: Nodes) -> list[int]:
    """The nodes of what the function returned, the states in order and then the output."""
    where, wanted = f"{_where(step)} returned", ", ".join(states)
    if isinstance(returned, Mapping):
        extra = ("output",) if "output" in returned and "output" not in states else ()
        missing = [name for name in states if name not in returned]
        other = [str(name) for name in returned if name not in (*states, *extra)]
        if missing or other:
            got = ", ".join(map(str, returned)) or "nothing"
            what = [f"{', '.join(missing)} missing"] * bool(missing)
            what += [f"{', '.join(other)} no state"] * bool(other)
            raise ValueError(
                f"{where} {got}, {' and '.join(what)}: return {wanted}, and besides only an output"
            )
        returned = tuple(returned[name] for name in (*states, *extra))
    elif not isinstance(returned, tuple | list):
        raise TypeError(f"{where} {type(returned).__name__}: return a tuple or dict of {wanted}")
    elif len(returned) != len(states):
        raise ValueError(f"{where} {len(returned)} values: return {wanted}")
    results = []
    for one in returned:
        if isinstance(one, Value) and one.nodes is nodes and one.kind == "n":
            results.append(one.node)
        elif isinstance(one, Real):
            results.append(nodes.constant(float(one)))
        else:
            kind = "a comparison" if isinstance(one, Value) else type(one).__name__
            raise TypeError(f"{where} {kind} among them: return a number for each of {wanted}")
    return results


def evaluate(
    nodes: Sequence[Node],
    roots: Sequence[int],
    leaves: Mapping[str, Sequence[Tensor]],
    like: Tensor,
    known: Mapping[int, Tensor] | None = None,
) -> list[Tensor]:
    """The values of `roots` on tensors, where the leaves of each kind and `known` nodes have these values.

    A root that is a constant is a tensor like `like`.
    """
    values: dict[int, Any] = dict(known or {})
    for number in order(nodes, roots, values):
        node = nodes[number]
        if number in values:
            continue
        if node.op in OPERATIONS:
            values[number] = OPERATIONS[node.op].on_tensors(*(values[a] for a in node.args))
        elif node.op == "constant":
            values[number] = float(node.of)
        else:
            values[number] = leaves[node.op][int(node.of)]
    return [
        torch.full_like(like, value) if isinstance(value, float) else value
        for value in (values[r] for r in roots)
    ]


def run(
    graph: Graph,
    x: Sequence[Tensor],
    r: Sequence[Tensor],
    states: Sequence[Tensor],
    parameters: Sequence[Tensor] = (),
    known: Mapping[int, Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """One step on tensors: the states after it, and last the output if the cell has one of its own.

    Args:
        graph: the cell.
        x: the input part of each gate, [N, H].
        r: the recurrent part of each gate, [N, H].
        states: the states before the step, [N, H].
        parameters: the parameters, [H].
        known: the values of nodes that are there already, see `second_operand`.
    """
    leaves = dict(zip(LEAVES, (x, r, states, parameters), strict=False))
    return tuple(evaluate(graph.nodes, graph.results, leaves, x[0], known))


def second_operand(
    graph: Graph,
    x: Sequence[Tensor],
    r: Sequence[Tensor],
    states: Sequence[Tensor],
    parameters: Sequence[Tensor] = (),
) -> tuple[Tensor, dict[int, Tensor]]:
    """What the late gates' recurrent parts are made of, [N, H], and the values of the nodes that it is made of.

    `r`: the recurrent parts of the other gates.
    """
    nodes, operand = graph.nodes, graph.operand
    assert operand is not None, "the graph has no late gates"
    leaves = dict(zip(LEAVES, (x, r, states, parameters), strict=False))
    numbers = [n for n in order(nodes, [operand]) if n == operand or nodes[n].op != "constant"]
    known = dict(zip(numbers, evaluate(nodes, numbers, leaves, x[0]), strict=True))
    return known[operand], known

"""Graphs of cells: traced as the function computes, with autograd's gradients, and refused with words that help."""

import json
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable, Sequence
from random import Random
from types import SimpleNamespace
from typing import Any

import hypothesis
import pytest
import torch
from graph_cells import BUILTIN, CELLS, LATE, Cell
from hypothesis import strategies as st
from torch import Tensor

from rnnkit import specs
from rnnkit.graph import Derived, Graph, builtin, derive, run, trace
from rnnkit.graph.derive import run_backward
from rnnkit.graph.trace import LEAVES, OPERATIONS, evaluate, second_operand

EVERY = CELLS | LATE
each_cell = pytest.mark.parametrize("name", CELLS)
each_or_late = pytest.mark.parametrize("name", EVERY)
each_builtin = pytest.mark.parametrize("name", BUILTIN)

Leaves = list[list[Tensor]]


def drawn(cell: Cell, dtype: torch.dtype = torch.float64, scale: float = 1.5) -> Leaves:
    """Values of x, r, states and parameters, [7, 5] and [5]; the states are positive: the sLSTM divides by one."""
    generator = torch.Generator().manual_seed(0)
    names = (cell.inputs, cell.recurrent, cell.states, cell.parameters)
    shapes = ((7, 5), (7, 5), (7, 5), (5,))
    leaves = [
        [torch.randn(shape, generator=generator, dtype=dtype) * scale for _ in of.split()]
        for of, shape in zip(names, shapes, strict=True)
    ]
    leaves[2] = [state.abs() for state in leaves[2]]
    return leaves


def saved(derived: Derived, leaves: Leaves) -> list[Tensor]:
    return evaluate(
        derived.nodes, derived.saved, dict(zip(LEAVES, leaves, strict=False)), leaves[0][0]
    )


def autograds(
    results: Sequence[Tensor], inputs: Sequence[Tensor], grads: Sequence[Tensor]
) -> Sequence[Tensor]:
    """The gradients of the inputs, where some results may not depend on any."""
    given = [(t, g) for t, g in zip(results, grads, strict=True) if t.requires_grad]
    if not given:
        return [torch.zeros_like(t) for t in inputs]
    outputs, of_outputs = zip(*given, strict=True)
    options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    return torch.autograd.grad(outputs, inputs, of_outputs, **options)


def assert_derives(
    cell: Cell, leaves: Leaves, projects: bool = False, rtol: float = 1e-13, atol: float = 1e-13
) -> None:
    """The backward pass of saved values gives autograd's gradients."""
    derived = derive(cell.graph(), projects)
    save, previous = saved(derived, leaves), leaves[2][0]
    every = [leaf.requires_grad_() for of_kind in leaves for leaf in of_kind]
    results = cell.on_tensors(*leaves)  # and last the second operand
    grads = [torch.randn_like(result) for result in results]
    unread = torch.full_like(previous, torch.nan)
    h = results[0].detach() if derived.uses_h else unread
    previous = previous.detach() if derived.uses_previous_h else unread
    parameters = [p.detach() for p in leaves[3]]
    states, columns = run_backward(derived, save, h, previous, grads, parameters)
    actual = [columns[k] for k in derived.input_grads] + columns[: len(leaves[1])] + states
    of_parameters = columns[derived.grads :][: len(parameters)]
    for parameter, grad in zip(parameters, of_parameters, strict=True):
        actual.append(grad.sum(0) if parameter.dim() == 1 else grad)
    for a, e in zip(actual, autograds(results, every, grads), strict=True):
        torch.testing.assert_close(a, e, rtol=rtol, atol=atol)

    known, of_leaves = derived.known(save, h, previous), {"grad": grads, "parameter": parameters}
    whole = evaluate(derived.nodes, derived.grad_states, of_leaves, h, known)
    graph = derived.graph
    every = (*graph.results, *(() if graph.operand is None else (graph.operand,)))
    of_kind = dict(zip(LEAVES, leaves, strict=False))
    of_graph = evaluate(graph.nodes, every, of_kind, previous)  # equal values are one tensor
    if graph.operand is not None:
        assert columns[-1].equal(results[-1])
        late = {number: columns[number] for number in derived.late_columns}
        alone = [derived.columns[number] for number in late]  # made without the operand's gradient
        of_leaves_before = {"grad": grads[:-1], "parameter": parameters}
        before = evaluate(derived.nodes, alone, of_leaves_before, previous, known)
        for a, number in zip(before, late, strict=True):
            assert a.equal(late[number])
    for a, result in zip(whole, of_graph, strict=False):
        if result.requires_grad:
            (e,) = autograds(of_graph, [result], grads)
            torch.testing.assert_close(a, e, rtol=rtol, atol=atol)
    if projects:
        output = evaluate(derived.nodes, derived.graph.results[:1], of_leaves, h, known)[0]
        assert output.equal(results[0])


def assert_runs(cell: Cell, leaves: Leaves) -> None:
    """The graph gives the function's own bits."""
    graph = cell.graph()
    found = run(graph, *leaves)
    if graph.late:
        operand, known = second_operand(graph, leaves[0], leaves[1][: graph.early], *leaves[2:])
        found = (*run(graph, *leaves, known), operand)
    for a, e in zip(found, cell.on_tensors(*leaves), strict=True):
        assert a.dtype == e.dtype
        torch.testing.assert_close(a, e, rtol=0, atol=0, equal_nan=True)


@each_or_late
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_graph_gives_the_functions_bits(name: str, dtype: torch.dtype) -> None:
    assert_runs(EVERY[name], drawn(EVERY[name], dtype))
    special = torch.tensor(
        [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-40, 300, -300], dtype=dtype
    )
    leaves = drawn(EVERY[name], dtype)
    for of_kind in leaves[:3]:
        for k, leaf in enumerate(of_kind):
            leaf.view(-1)[k : k + len(special)] = special
    assert_runs(EVERY[name], leaves)


@each_or_late
@pytest.mark.parametrize("scale", [0.1, 1.5, 20.0])
def test_derived_gradients_are_autograds(name: str, scale: float) -> None:
    assert_derives(EVERY[name], drawn(EVERY[name], scale=scale))


@each_or_late
def test_gradients_where_operands_are_equal_or_zero(name: str) -> None:
    leaves = [[leaf.round() for leaf in of_kind] for of_kind in drawn(EVERY[name])]
    leaves[2] = [state + 1 for state in leaves[2]]
    assert_derives(EVERY[name], leaves)


@pytest.mark.parametrize("name", [n for n in CELLS if "c" in CELLS[n].states.split()[1:]])
def test_what_a_cell_that_projects_saves_gives_the_output(name: str) -> None:
    assert_derives(CELLS[name], drawn(CELLS[name]), projects=True)


def test_a_cell_that_reads_h_does_not_project() -> None:
    with pytest.raises(ValueError, match="expected a cell that projects not to read its state h"):
        derive(builtin.GRAPHS["gru"], projects=True)


@each_or_late
def test_least_is_saved(name: str) -> None:
    assert len(derive(EVERY[name].graph()).saved) == EVERY[name].saved


@pytest.mark.parametrize("name", LATE)
def test_late_gates(name: str) -> None:
    cell, graph = LATE[name], LATE[name].graph()
    assert " ".join(graph.recurrent[graph.early :]) == cell.late
    assert graph.late == len(cell.late.split()) and graph.operand is not None


def test_every_own_cell_has_a_graph() -> None:
    assert list(builtin.GRAPHS) == list(specs.CELLS)


@each_builtin
def test_own_cells_are_what_specs_tells(name: str) -> None:
    spec, graph = specs.CELLS[name], builtin.GRAPHS[name]
    derived = derive(graph, projects=spec.projects)
    assert len(graph.inputs) == len(graph.recurrent) == spec.gates
    assert len(graph.states) == spec.states
    assert len(derived.saved) == spec.saved
    assert derived.input_grads == spec.input_grads
    assert derived.grads == len(derived.columns) == spec.grad_columns


@each_builtin
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_own_cells_are_the_references(name: str, dtype: torch.dtype) -> None:
    x, r, states, _ = leaves = drawn(BUILTIN[name], dtype)
    expected = specs.CELLS[name].step(x, r, states)
    for a, e in zip(run(builtin.GRAPHS[name], *leaves), expected, strict=True):
        # The reference's GRU is (1 - z) n + z h, which rounds otherwise than n + z (h - n).
        torch.testing.assert_close(a, e, **({} if "gru" in name else {"rtol": 0, "atol": 0}))


NUMBERS = [-2.0, -1.0, -0.5, -0.0, 0.0, 0.5, 1.0, 2.0, 25.0]


def program(random: Random, late: bool = False) -> Cell:
    """A cell of a random graph: two gates, a recurrent one, two states and a parameter; and a late gate."""
    numeric = [op for op in OPERATIONS if OPERATIONS[op].gives == "n"]
    compare = [op for op in OPERATIONS if OPERATIONS[op].gives == "t"]
    lines = [
        (random.choice(numeric), random.choice(compare), [random.random() for _ in range(4)])
        for _ in range(random.randrange(2, 16))
    ]
    number = random.choice(NUMBERS)

    def step(x: Any, r: Any, s: Any, p: Any) -> tuple[Any, ...]:
        values = [x.a, x.b, r.a, s.h, s.c, p.v]
        for k, (op, comparison, places) in enumerate(lines):
            if late and k == len(lines) // 2:
                values.append(r.l(values[-1]))
            operands = [values[int(place * len(values))] for place in places]
            takes = OPERATIONS[op].takes
            if len(takes) > 1 and op not in ("maximum", "minimum") and places[3] < 0.3:
                operands[int(op == "where") + (places[3] < 0.15)] = number
            if op == "where":
                operands[0] = OPERATIONS[comparison].on_tensors(operands[0], operands[3])
            values.append(OPERATIONS[op].on_tensors(*operands[: len(takes)]))
        return values[-1], values[-2] * values[-1]

    return Cell(step, "a b", "a l" if late else "a", "h c", -1, "v", late="l" * late)


SEEDS = st.integers(0, 2**32 - 1)


@hypothesis.settings(max_examples=300)
@hypothesis.given(seed=SEEDS, late=st.booleans())
def test_random_graphs(seed: int, late: bool) -> None:
    """Of random values, and of few different ones, which meet ties; where all values are small."""
    random = Random(seed)
    cell = program(random, late)
    of_each = [
        [random.choice(NUMBERS) if k % 2 else random.gauss(0, 1) for k in range(20)]
        for _ in range(6)
    ]
    a, b, c, h, other, v = torch.tensor(of_each, dtype=torch.float64).unsqueeze(1)
    leaves = [[a, b], [c, torch.linspace(-2, 2, 20).double()[None]][: 1 + late], [h, other], [v]]
    graph = cell.graph()
    assert Graph.from_json(graph.to_json()) == graph
    assert_runs(cell, leaves)
    numbers = range(len(graph.nodes))
    every = evaluate(graph.nodes, numbers, dict(zip(LEAVES, leaves, strict=False)), a)
    small = torch.stack([value.double().abs() < 1e3 for value in every]).all(0)
    if small.any():
        kept = [[leaf[small].unsqueeze(0) for leaf in of_kind] for of_kind in leaves]
        assert_derives(cell, kept, rtol=1e-9, atol=1e-6)


def test_random_graphs_have_every_operation() -> None:
    seen = {node.op for seed in range(300) for node in program(Random(seed)).graph().nodes}
    assert seen >= set(OPERATIONS)


@each_or_late
def test_json(name: str) -> None:
    graph = EVERY[name].graph()
    text = graph.to_json()
    assert "\n" not in text and " " not in text
    again = Graph.from_json(text)
    assert again == graph and again.to_json() == text
    assert derive(again) == derive(graph)


def test_equal_graphs_have_equal_json() -> None:
    def other_order(x: Any, r: Any, s: Any) -> Any:
        unused = x.i * 3
        o, g = (x.o + r.o).sigmoid(), torch.tanh(x.g + r.g)
        c = torch.sigmoid(x.f + r.f) * s.c + torch.sigmoid(x.i + r.i) * g
        return {"c": c, "h": o * torch.tanh(c)} if unused is not None else {}

    names = {"inputs": ["i", "f", "g", "o"], "recurrent": "i f g o", "states": ("h", "c")}
    assert trace(other_order, **names).to_json() == builtin.GRAPHS["lstm"].to_json()


def test_constants_in_json() -> None:
    def step(x: Any, r: Any, s: Any) -> Any:
        y = torch.where(x.a > float("-inf"), x.a * -0.0, float("nan")) + torch.where(
            x.a > 0.0, 1e-320, x.a
        )
        return (torch.where(x.a < float("inf"), y, 0.1),)

    cell = Cell(step, "a", "", "h", 0)
    graph = Graph.from_json(cell.graph().to_json())
    constants = {node.of for node in graph.nodes if node.op == "constant"}
    assert constants == {"-inf", "inf", "nan", "0.0", "-0.0", "1e-320", "0.1"}
    assert json.loads(cell.graph().to_json(), parse_constant=pytest.fail)
    assert_runs(cell, [[torch.tensor([[-1.0, 0.0, 2.0, torch.nan]])], [], [torch.zeros(1, 4)], []])


def malformed() -> dict[str, tuple[Callable[[dict], Any], str]]:
    def put(**new: Any) -> Callable[[dict], Any]:
        return lambda content: {**content, **new}

    def node(new: Any) -> Callable[[dict], Any]:
        return lambda content: {**content, "nodes": [*content["nodes"], new]}

    return {
        "a list": (lambda content: [content], "expected the JSON of a graph, with inputs"),
        "more": (put(more=1), "expected the JSON of a graph, with inputs"),
        "less": (lambda content: {"nodes": []}, "expected the JSON of a graph, with inputs"),
        "names": (put(inputs=["a", 1]), r"expected inputs to be names, got \['a', 1\]"),
        "no name": (put(states=["1"]), "expected names that Python can have in states, .*got '1'"),
        "twice": (put(inputs=["a", "a"]), "expected different names in inputs, got a, a"),
        "no states": (put(states=[]), "expected at least one name in states"),
        "nodes": (put(nodes={}), "expected nodes to be a list, got {}"),
        "one name": (put(inputs="h"), "expected inputs to be a list, got 'h'"),
        "node": (node("x"), r"expected a node \[operation, operands...\], got 'x'"),
        "empty": (node([]), r"expected a node"),
        "operation": (node(["pow", 0, 1]), r"before it, a leaf or a constant, got \['pow', 0, 1\]"),
        "operands": (node(["add", 0]), "expected an operation"),
        "later": (node(["neg", 99]), "expected an operation"),
        "negative": (node(["neg", -1]), "expected an operation"),
        "true": (node(["neg", True]), "expected an operation"),
        "kind": (node(["where", 0, 1, 1]), "expected an operation"),
        "again": (node(["x", 0]), r"expected nodes once each, got \['x', 0\] again"),
        "leaf": (node(["x", 1]), "expected an operation"),
        "leaf's place": (node(["x", "0"]), "expected an operation"),
        "gradient": (node(["grad", 0]), "expected an operation"),
        "constant": (node(["constant", "one"]), "expected an operation"),
        "number": (node(["constant", 1.5]), "expected an operation"),
        "results": (put(results=[]), r"expected 1 or 2 results, got \[\]"),
        "result": (put(results=[7]), "expected results to be numbers of nodes, got 7"),
        "no result": (put(results=["h"]), "expected results to be numbers of nodes, got 'h'"),
    }


@pytest.mark.parametrize("what", malformed())
def test_malformed_json(what: str) -> None:
    change, words = malformed()[what]
    content = json.loads(builtin.GRAPHS["rnn_tanh"].to_json())
    with pytest.raises(ValueError, match=words):
        Graph.from_json(json.dumps(change(content)))


def test_operations_of_constants_alone_in_json() -> None:
    content = json.loads(builtin.GRAPHS["rnn_tanh"].to_json())
    content["nodes"] += [["constant", "1.0"], ["exp", 4]]
    with pytest.raises(ValueError, match="expected an operation"):
        Graph.from_json(json.dumps(content))
    content["nodes"][-1] = ["maximum", 0, 4]
    with pytest.raises(ValueError, match="expected an operation"):
        Graph.from_json(json.dumps(content))


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000])
def test_no_json(text: str) -> None:
    with pytest.raises(ValueError, match="expected the JSON of a graph: "):
        Graph.from_json(text)


#: A line of a step, and words of the error that names it.
REFUSED = {
    "y = torch.sin(x.a)": "a cell cannot use torch's sin: a cell can use [+]",
    "y = x.a.cumsum(0)": "a cell cannot use .cumsum: a cell can use [+]",
    "y = x.a.where(x.a > 0, x.a)": "a cell cannot use .where",
    "y = x.a if x.a > 0 else -x.a": "`if`, `and`, `or`, `not`.* of a value: use torch.where",
    "y = max(x.a, x.b)": "max.. or min.. of a value: use torch.where",
    "y = x.a + [1.0, 2.0][x.b]": "in the place of a Python number: use torch functions",
    "y = x.a * float(x.b)": "in the place of a Python number: use torch functions",
    "y = torch.relu_(x.a)": "a cell cannot use torch's relu_: a cell can use",
    "y = torch.zeros_like(x.a)": "a cell cannot use torch's zeros_like: a cell can use",
    "y = x.a.dtype": "a cell cannot use .dtype: a cell can use",
    "y = x.a[0]": "a value is no sequence: use it whole",
    "y, z = x.a": "a value is no sequence: use it whole",
    "y = x.a ** 2": r"the operator \*\*: write x \* x",
    "y = 2 ** x.a": r"the operator \*\*: write x \* x",
    "y = x.a % 2": "the operator of __mod__: a cell can use",
    "y = x.a @ x.b": "the operator of __matmul__: a cell can use",
    "y = (x.a > 0) & (x.b > 0)": "the operator of __and__: nest torch.where, once for each",
    "y = ~(x.a > 0)": "the operator of __invert__: nest torch.where, once for each",
    "x.a += 1": r"the operator \+=: write a = a \+ b",
    "y = x.a * torch.ones(5)": "a tensor: make it a parameter of the cell, or a Python number",
    "y = torch.ones(5) - x.a": "a tensor: make it a parameter of the cell, or a Python number",
    "y = x.a * 'a'": "mul of str 'a': a cell can use",
    "y = x.a + None": "add of NoneType None: a cell can use",
    "y = x.a * (x.a > 0)": "mul takes a comparison where a number is needed: use torch.where",
    "y = torch.where(x.a, x.a, x.b)": "torch's where takes a number where a comparison is needed",
    "y = torch.where(True, x.a, x.b)": r"where\(\) received an invalid .*: a cell can use",
    "y = torch.where(x.a > 0, 1.0, 0.0)": "torch's where of Python numbers: add one of them to a value",
    "y = torch.where(x.a > 0)": "torch's where with 1 arguments: give it 3",
    "y = torch.maximum(x.a, 0.0)": r"must be Tensor, not float: use torch.where\(a > b, a, b\)",
    "y = x.a.maximum(0.0)": r".maximum of Python numbers: use torch.where\(a > b",
    "y = torch.max(x.a)": "torch's max with 1 arguments: give it 2",
    "y = torch.add(x.a, x.b, alpha=2)": "torch's add with alpha=: give operands alone, by place",
    "y = torch.nn.functional.softplus(x.a, 2.0)": "torch's softplus with 2 arguments: give it 1",
    "y = x.a + kept.value": "a value of another call of a cell: compute it from the arguments",
}


REFUSED |= {
    "y = r.a()": "a recurrent part of nothing: give it a value of the step",
    "y = r.a(x.a, x.b)": "a recurrent part of Value, Value: give it a value",
    "y = r.a(value=x.a)": "a recurrent part of value: give it a value of the step",
    "y = r.a(2.0)": r"a recurrent part of float: give it a value of the step: r.n\(a",
    "y = r.a(x.a > 0)": "a recurrent part takes a comparison where a number is needed",
    "y = x.a(x.b)": "a call of a value: only a gate's recurrent part, r.name, can be called",
    "y = (r.a + x.a)(x.b)": "a call of a value: only a gate's recurrent part, r.name, can be called",
    "y = r.a(x.a) + r.b(x.b)": "recurrent parts of two values: a step has one such value beside h",
    "y = x + r.a": "add of all of x: name one: x.a",
    "y = torch.tanh(s)": "must be Tensor, not s: a cell can use",
    "y = r(s.h)": r"a call of r: call one of its parts: r.a\(value\)",
    "y = torch.nn.functional.leaky_relu(x.a, negative_slope=0.1)": "cannot use torch's leaky_relu",
    "y = torch.nn.functional.softplus(x.a, 2)": "torch's softplus with 2 arguments: give it 1",
    "y = r.b(r.a(x.a))": "recurrent parts of two values: a step has one such value beside h",
}


def failing_step(line: str) -> Callable[..., Any]:
    """A step with this line, from a file that can be shown."""
    import linecache

    text = f"def step(x, r, s):\n    {line}\n    return (x.a,)\n"
    name = f"/steps/{abs(hash(line))}.py"
    linecache.cache[name] = (len(text), None, text.splitlines(True), name)
    kept = SimpleNamespace()
    trace(
        lambda x, r, s: (setattr(kept, "value", x.a), x.a)[1:], inputs="a", recurrent="", states="h"
    )
    scope: dict[str, Any] = {"torch": torch, "kept": kept}
    exec(compile(text, name, "exec"), scope)
    return scope["step"]


@pytest.mark.parametrize("line", REFUSED)
def test_refused_lines(line: str) -> None:
    with pytest.raises(TypeError, match=rf"^/steps/\d+.py:2: `.*`: .*{REFUSED[line]}") as error:
        trace(failing_step(line), inputs="a b", recurrent="a b", states="h")
    assert f"`{line}`" in str(error.value)


class Half:
    """A function object, which has no line."""

    def __call__(self, x: Any, r: Any, s: Any) -> Any:
        return ()


RETURNED = {
    "one": (lambda x, r, s: (x.a,), ValueError, "returned 1 values: return h, c"),
    "three": (lambda x, r, s: (x.a, x.a, x.a), ValueError, "returned 3 values: return h, c"),
    "no tuple": (lambda x, r, s: x.a, TypeError, "returned Value: return a tuple or dict of h, c"),
    "nothing": (lambda x, r, s: None, TypeError, "returned NoneType: return a tuple or dict"),
    "missing": (
        lambda x, r, s: {"h": x.a},
        ValueError,
        "returned h, c missing: return h, c, and besides only",
    ),
    "empty": (lambda x, r, s: {}, ValueError, "returned nothing, h, c missing: return h, c"),
    "other": (
        lambda x, r, s: {"h": 1, "c": 2, "d": 3},
        ValueError,
        "returned h, c, d, d no state: return h, c",
    ),
    "truth": (lambda x, r, s: (x.a, x.a > 0), TypeError, "returned a comparison among them"),
    "tensor": (lambda x, r, s: (x.a, torch.ones(1)), TypeError, "returned Tensor among them"),
    "no line": (Half(), ValueError, "Half object.*returned 0 values"),
}


@pytest.mark.parametrize("what", RETURNED)
def test_wrong_results(what: str) -> None:
    step, kind, words = RETURNED[what]
    at = "" if what == "no line" else rf"^{__file__}:\d+: <lambda> "
    with pytest.raises(kind, match=f"{at}.*{words}"):
        trace(step, inputs="a", recurrent="a", states="h c")


def test_products_of_h_itself_are_not_late() -> None:
    def step(x: Any, r: Any, s: Any) -> Any:
        return (torch.tanh(x.h + r.h(s.h)),)

    assert trace(step, inputs="h", recurrent="h", states="h") == builtin.GRAPHS["rnn_tanh"]


def test_products_that_nothing_is_made_of() -> None:
    def step(x: Any, r: Any, s: Any) -> Any:
        r.h(2 * s.h)
        return (torch.tanh(x.h + r.h),)

    assert trace(step, inputs="h", recurrent="h", states="h") == builtin.GRAPHS["rnn_tanh"]


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (
            lambda x, r, s: (r.a(x.a) + r.a,),
            r'uses r.a and r.a\(value\): use one of them, or .* recurrent="a b a2"',
        ),
        (lambda x, r, s: (r.b(r.b * x.a),), r"uses r.b and r.b\(value\): use one of them"),
        (
            lambda x, r, s: (r.a(x.a) + r.b,),
            r'uses r.a\(value\), but a must be last among the recurrent gates: write recurrent="b a"',
        ),
    ],
)
def test_wrong_late_gates(step: Callable[..., Any], words: str) -> None:
    with pytest.raises(ValueError, match=rf"^{__file__}:\d+: <lambda> {words}"):
        trace(step, inputs="a", recurrent="a b", states="h")


@pytest.mark.parametrize(
    ("new", "words"),
    [
        ({"late": 0}, "expected late to be 1 to 3, got 0"),
        ({"late": 4}, "expected late to be 1 to 3, got 4"),
        ({"late": True}, "expected late to be 1 to 3, got True"),
        ({"late": []}, r"expected late to be 1 to 3, got \[\]"),
        ({"late": -1}, "expected late to be 1 to 3, got -1"),
        ({"late": 2}, ""),
        ({"late": 3}, "expected operand to be made of no late gate, got 14"),
        ({"operand": 99}, "expected operand to be the number of a node, got 99"),
        ({"operand": None}, "expected operand to be the number of a node, got None"),
        ({"operand": 16}, "expected operand to be made of no late gate, got 16"),
    ],
    ids=str,
)
def test_malformed_json_of_late_gates(new: dict[str, Any], words: str) -> None:
    content = json.loads(LATE["reset_before"].graph().to_json())
    assert content["late"] == 1 and content["operand"] == 14
    if not words:  # z, too, from the same value
        assert Graph.from_json(json.dumps(content | new)).early == 1
        return
    with pytest.raises(ValueError, match=words):
        Graph.from_json(json.dumps(content | new))


def test_late_without_operand_in_json() -> None:
    content = json.loads(LATE["reset_before"].graph().to_json())
    del content["operand"]
    with pytest.raises(
        ValueError, match=r"expected the JSON of a graph, with inputs.*late, operand"
    ):
        Graph.from_json(json.dumps(content))


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ({"inputs": ""}, "expected at least one name in inputs"),
        ({"states": ()}, "expected at least one name in states"),
        ({"inputs": "a a"}, "expected different names in inputs, got a, a"),
        (
            {"recurrent": "a-b"},
            "expected names that Python can have in recurrent, without .*got 'a-b'",
        ),
        (
            {"recurrent": "if"},
            "expected names that Python can have in recurrent, without .*got 'if'",
        ),
        (
            {"parameters": "_a"},
            "expected names that Python can have in parameters, without .*got '_a'",
        ),
        ({"states": 2}, "expected states to be names, got 2"),
    ],
    ids=str,
)
def test_wrong_names(names: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        trace(lambda *_: (), **{"inputs": "a", "recurrent": "a", "states": "h", **names})


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("y = x.c", "there is no x.c: there is x.a, x.b"),
        ("y = r.c", "there is no r.c: there is r.a"),
        ("y = s.c", "there is no s.c: there is s.h"),
    ],
)
def test_names_that_are_not_there(line: str, words: str) -> None:
    with pytest.raises(AttributeError, match=rf"^/steps/\d+.py:2: `{line}`: {words}$"):
        trace(failing_step(line), inputs="a b", recurrent="a", states="h")


def test_steps_of_other_arguments() -> None:
    names = {"inputs": "a", "recurrent": "a", "states": "h"}
    words = (
        r"too many positional arguments: a cell with parameters is a function step\(x, r, s, p\)"
    )
    with pytest.raises(TypeError, match=rf"^{__file__}:\d+: <lambda>: {words}"):
        trace(lambda x, r, s: (x.a,), **names, parameters="u")
    words = (
        r"missing a required argument: 'p': a cell without parameters is a function step\(x, r, s\)"
    )
    with pytest.raises(TypeError, match=words):
        trace(lambda x, r, s, p: (x.a,), **names)


def test_torchs_modules_with_default_arguments() -> None:
    softplus, relu = torch.nn.Softplus(), torch.nn.ReLU()
    graph = trace(
        lambda x, r, s: (softplus(x.a) + relu(r.a),), inputs="a", recurrent="a", states="h"
    )
    assert [node.op for node in graph.nodes] == ["x", "r", "softplus", "relu", "add"]


def test_code_without_a_file() -> None:
    scope: dict[str, Any] = {"torch": torch}
    exec("def step(x, r, s):\n    return (torch.sin(x.a),)", scope)
    with pytest.raises(TypeError, match=r"^<string>:2: a cell cannot use torch's sin"):
        trace(scope["step"], inputs="a", recurrent="a", states="h")


def test_numbers_of_numpy_and_methods_of_tensors() -> None:
    numpy = pytest.importorskip("numpy")

    def step(x: Any, r: Any, s: Any) -> Any:
        return (numpy.float64(2) * x.a.exp().neg() + x.a.maximum(s.h).sub(numpy.float32(0.5)),)

    cell = Cell(step, "a", "", "h", 0)
    assert_runs(cell, drawn(cell))


def test_functions_by_all_their_names() -> None:
    functional = torch.nn.functional

    def step(x: Any, r: Any, s: Any) -> Any:
        a = functional.relu(x.a) + functional.sigmoid(x.b) - functional.tanh(torch.negative(x.b))
        return (torch.max(torch.mul(a, 2), torch.absolute(x.a)) - torch.div(1 - a, torch.exp(s.h)),)

    cell = Cell(step, "a b", "", "h", 0)
    assert_runs(cell, drawn(cell))


@each_cell
def test_compiled_and_transformed(name: str) -> None:
    cell = CELLS[name]
    graph, leaves = cell.graph(), drawn(cell)
    expected = run(graph, *leaves)
    torch.compiler.reset()
    compiled = torch.compile(run, backend="eager", fullgraph=True)(graph, *leaves)
    rows = torch.func.vmap(lambda x, r, s: run(graph, x, r, s, leaves[3]))(*leaves[:3])
    for a, b, e in zip(compiled, rows, expected, strict=True):
        assert a.equal(e) and b.equal(e)
    tangents = torch.func.jvp(lambda x: run(graph, x, *leaves[1:]), (leaves[0],), (leaves[0],))[1]
    own = torch.func.jvp(lambda x: cell.on_tensors(x, *leaves[1:]), (leaves[0],), (leaves[0],))[1]
    for a, e in zip(tangents, own, strict=True):
        assert a.equal(e)


def test_named_tuples() -> None:
    """A step may take its arguments apart, by place as by name."""
    gates = namedtuple("gates", "a b")

    def step(x: Any, r: Any, s: Any) -> Any:
        a, b = x
        assert x._fields == gates._fields
        return (a * x[1] + b * r[0] + s.h,)

    graph = trace(step, inputs="a b", recurrent="c", states="h")
    assert run(graph, *([torch.ones(1)] * n for n in (2, 1, 1)))[0].item() == 3


def test_rnnkit_does_not_import_graphs() -> None:
    code = "import sys, rnnkit; assert not [m for m in sys.modules if m.startswith('rnnkit.graph')]"
    subprocess.run([sys.executable, "-c", code], check=True)

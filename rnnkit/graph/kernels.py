"""A graph as a cell of the scans: what layers and kernels need to know of it."""

from collections.abc import Sequence
from functools import lru_cache, partial

from torch import Tensor

from rnnkit.graph.derive import Derived, derive
from rnnkit.graph.trace import Graph, Node, run
from rnnkit.specs import CellSpec


@lru_cache
def derived_of(graph: Graph) -> Derived:
    """The backward pass. h may be projected if it is not the only state, and the step reads others alone."""
    reads_h = Node("state", (), 0) in graph.nodes
    return derive(graph, projects=len(graph.states) > 1 and not reads_h and not graph.has_output)


def spec_of(text: str) -> CellSpec:
    """The `CellSpec` of the cell that is this graph's JSON.

    Raises:
        RuntimeError: the text is no graph.
    """
    try:
        graph = Graph.from_json(text)
    except ValueError as error:
        raise RuntimeError(f"expected cell to be the name of a cell or a graph: {error}") from error
    derived = derived_of(graph)
    return CellSpec(
        text,
        gates=len(graph.inputs),
        states=len(graph.states),
        saved=len(derived.saved),
        input_grads=derived.input_grads,
        step=partial(_step, graph),
        projects=derived.projects,
        recurrent_gates=len(graph.recurrent),
        parameters=len(graph.parameters),
        uses_h=derived.uses_h,
    )


def _step(
    graph: Graph,
    x: Sequence[Tensor],
    r: Sequence[Tensor],
    states: Sequence[Tensor],
    parameters: Sequence[Tensor] = (),
) -> tuple[Tensor, ...]:
    return run(graph, x, r, states, parameters)

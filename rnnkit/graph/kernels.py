"""A graph as a cell of the scans: what layers and kernels need to know of it, and the CPU kernels' functions for it."""

import os
import threading
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial

from torch import Tensor

from rnnkit import backends, specs
from rnnkit.graph.derive import Derived, derive
from rnnkit.graph.trace import Graph, Node, run, second_operand
from rnnkit.specs import CellSpec


@lru_cache
def derived_of(graph: Graph) -> Derived:
    """The backward pass. h may be projected if it is not the only state, and the step reads others alone."""
    reads_h = Node("state", (), 0) in graph.nodes
    alone = len(graph.states) == 1 or reads_h or graph.late
    return derive(graph, projects=not alone)


def graph_of(text: str) -> Graph:
    """The graph that is a cell's name in ops; an output that is no state is one there, the last.

    Raises:
        RuntimeError: the text is no graph.
    """
    try:
        return Graph.from_json(text).with_output_as_state()
    except ValueError as error:
        raise RuntimeError(f"expected cell to be the name of a cell or a graph: {error}") from error


def spec_of(text: str) -> CellSpec:
    """The `CellSpec` of the cell that is this graph's JSON.

    Raises:
        RuntimeError: the text is no graph.
    """
    graph = graph_of(text)
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
        late=graph.late,
        operand=partial(_operand, graph) if graph.late else None,
    )


def _operand(
    graph: Graph, x: Sequence[Tensor], *others: Sequence[Tensor]
) -> tuple[Tensor, dict[int, Tensor]]:
    operand, known = second_operand(graph, x, *others)
    return operand.expand_as(x[0]), known


def _step(
    graph: Graph,
    x: Sequence[Tensor],
    r: Sequence[Tensor],
    states: Sequence[Tensor],
    parameters: Sequence[Tensor] = (),
    known: Mapping[int, Tensor] | None = None,
) -> tuple[Tensor, ...]:
    after = run(graph, x, r, states, parameters, known)
    # A state of parameters alone is [H].
    return tuple(t.expand_as(x[0]) if t.dim() < x[0].dim() else t for t in after)


#: "compiled" or "interpreted", for each cell that `register` has registered, by its name in ops.
_kinds: dict[str, str] = {}
#: Why a cell cannot be registered, by its name in ops.
_refused: dict[str, str] = {}

_lock = threading.Lock()


def _new_lock() -> None:
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):  # another thread may hold the lock when this one forks
    os.register_at_fork(after_in_child=_new_lock)


def register(name: str) -> str:
    """Makes the CPU kernels find the cell that is this graph's JSON. They call this at a cell's first call.

    Its functions are compiled; where that is not wanted or cannot be, they are interpreted. Of several threads the
    first does it, and the others wait.

    Returns:
        "compiled" or "interpreted".

    Raises:
        RuntimeError: the text is no graph, or the cell is larger than the kernels allow.
    """
    from rnnkit.graph import compiled, interpreted

    extension = backends.EXTENSION
    assert extension is not None
    with _lock:
        if name in _refused:
            raise RuntimeError(_refused[name])
        if name not in _kinds:
            spec = specs.of(name)
            derived = derived_of(graph_of(name))
            functions = compiled.load(derived) if compiled.wanted() else None
            kind = "interpreted" if functions is None else "compiled"
            functions = functions or extension.interpret([*interpreted.programs(derived)])
            try:
                extension.register_cell(
                    name,
                    gates=spec.gates,
                    recurrent=spec.recurrent,
                    states=spec.states,
                    saved=spec.saved,
                    parameters=spec.parameters,
                    input_grads=spec.input_grads,
                    uses_h=derived.uses_h,
                    uses_previous_h=derived.uses_previous_h,
                    projects=spec.projects,
                    late=spec.late,
                    **functions,
                )
            except RuntimeError as error:
                words = str(error).replace(specs.shown(name), "the cell")
                _refused[name] = f'{words}: it runs under `with rnnkit.backend("reference")`'
                raise RuntimeError(_refused[name]) from None
            _kinds[name] = kind
        return _kinds[name]

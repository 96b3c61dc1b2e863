"""A cell's functions for Triton kernels, with the arguments and results that rnnkit/triton/cells.py tells of.

A cell with parameters has them as the last argument of each function, a tuple; their gradients follow the gates'.
Where the output is no state, it is the last of the states after the step, and its gradient of their gradients.
"""

from collections.abc import Mapping, Sequence

from rnnkit.graph.derive import Derived
from rnnkit.graph.text import statements

#: Where the functions are that Triton's language has not.
_MODULES = {
    "cells": ("sigmoid", "tanh"),
    "functions": ("log1p", "logsigmoid", "maximum", "minimum", "relu", "softplus"),
}


def _constant(value: str) -> str:
    return f'float("{value}")' if value.lstrip("-") in ("inf", "nan") else value


def _is_constant(text: str) -> bool:
    return not text.startswith("v")


def _filled(text: str, like: str) -> str:
    """A tile for a constant, in the type of the tile `like`; minus 0 keeps the sign of a 0."""
    if not _is_constant(text):
        return text
    return f"tl.zeros_like({like})" if text == "0.0" else f"({text} - tl.zeros_like({like}))"


def _call(op: str, operands: list[str]) -> str:
    like = next(text for text in reversed(operands) if not _is_constant(text))
    name = f"tl.{op}" if op in ("abs", "exp", "where") else op
    return f"{name}({', '.join(_filled(text, like) for text in operands)})"


def _tuple(items: Sequence[str]) -> str:
    return f"({', '.join(items)}{',' if len(items) == 1 else ''})"


def _function(
    derived: Derived,
    signature: str,
    known: Mapping[int, str],
    results: Sequence[Sequence[int]],
    like: str,
) -> str:
    """A function that returns a tuple of nodes for each of `results`; constants are in the type of the tile `like`."""
    roots = [number for part in results for number in part]
    made, names = statements(derived.nodes, roots, known, _constant, _call)
    lines = [f"    {names[number]} = {text}\n" for number, text in made.items()]
    returned = [_tuple([_filled(names[n], like) for n in part]) for part in results]
    parameter = ", parameter" if derived.graph.parameters else ""
    head = f"@triton.jit\ndef {signature}{parameter}):\n"
    return f"{head}{''.join(lines)}    return {', '.join(returned)}\n"


def source(derived: Derived, name: str) -> str:
    """The text of a module with the functions `{name}_forward`, `{name}_backward` and, where there are, others.

    `{name}_output` is there for a cell that projects, `{name}_grad_states` for one with several states.
    """
    graph = derived.graph
    saved = {number: f"save[{k}]" for k, number in enumerate(derived.saved)}
    known = {derived.h: "h", derived.previous_h: "previous_h", **saved}
    functions = [
        _function(
            derived, f"{name}_forward(x, h, state", {}, (graph.results, derived.saved), "x[0]"
        ),
        _function(
            derived,
            f"{name}_backward(save, h, previous_h, grad_state",
            known,
            (derived.previous_grads, derived.columns),
            "h",
        ),
    ]
    if len(graph.states) > 1:
        results = (derived.grad_states,)
        signature = f"{name}_grad_states(save, grad_state"
        functions.append(_function(derived, signature, known, results, "grad_state[0]"))
    if derived.projects:
        text = _function(derived, f"{name}_output(save", saved, (graph.results[:1],), "save[0]")
        functions.append(text.replace("return (", "return ").replace(",)", ""))
    body = "\n\n".join(functions)
    imports = [
        f"from rnnkit.triton.{module} import {', '.join(used)}\n"
        for module, names in _MODULES.items()
        if (used := [one for one in names if f" {one}(" in body])
    ]
    return f"import triton\nfrom triton import language as tl\n\n{''.join(imports)}\n\n{body}"

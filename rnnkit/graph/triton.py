"""A cell's functions for Triton kernels, with the arguments and results that rnnkit/triton/cells.py tells of.

`source` prints them, `module` runs what is printed.

A cell with parameters has them as the last argument of each function, a tuple; their gradients follow the gates'.
Where the output is no state, it is the last of the states after the step, and its gradient of their gradients.
"""

import hashlib
import linecache
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType

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
    """A tile for a constant, in the type of the tile `like`; c - 0 is c also where c is -0."""
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
    head: str,
    known: Mapping[int, str],
    results: Sequence[Sequence[int] | int],
    like: str,
) -> str:
    """A function that returns a tile, or a tuple of tiles, for each of `results`.

    Args:
        derived: the cell.
        head: the name and the arguments.
        known: the text of nodes that are there already.
        results: the node of a tile, or the nodes of a tuple.
        like: a tile; constants are of its type.
    """
    parts = [[part] if isinstance(part, int) else part for part in results]
    roots = [number for part in parts for number in part]
    made, names = statements(derived.nodes, roots, known, _constant, _call)
    lines = [f"{names[number]} = {text}" for number, text in made.items()]
    filled = [[_filled(names[number], like) for number in part] for part in parts]
    texts = [
        t[0] if isinstance(r, int) else _tuple(t) for r, t in zip(results, filled, strict=True)
    ]
    lines.append(f"return {', '.join(texts)}")
    parameter = ", parameter" if derived.graph.parameters else ""
    body = "".join(f"    {line}\n" for line in lines)
    return f"\n\n@triton.jit\ndef {head}{parameter}):\n{body}"


def _functions(derived: Derived, name: str) -> Iterator[str]:
    graph = derived.graph
    save = [f"save[{k}]" for k in range(len(derived.saved))]
    known = derived.known(save, "h", "previous_h")
    results = graph.results, derived.saved
    yield _function(derived, f"{name}_forward(x, h, state", {}, results, "x[0]")
    results, head = (derived.previous_grads, derived.columns), "save, h, previous_h, grad_state"
    yield _function(derived, f"{name}_backward({head}", known, results, "h")
    if len(graph.states) > 1:
        head, whole = f"{name}_grad_states(save, grad_state", derived.grad_states
        yield _function(derived, head, known, (whole,), "grad_state[0]")
    if derived.projects:
        of_saved = dict(zip(derived.saved, save, strict=True))
        result = graph.results[:1]
        yield _function(derived, f"{name}_output(save", of_saved, result, "save[0]")


def source(derived: Derived, name: str) -> str:
    """The text of a module with the functions `{name}_forward`, `{name}_backward` and, where there are, others.

    `{name}_output` is there for a cell that projects, `{name}_grad_states` for one with several states.
    """
    body = "".join(_functions(derived, name))
    imports = [
        f"from rnnkit.triton.{module} import {', '.join(used)}\n"
        for module, names in _MODULES.items()
        if (used := [one for one in names if f" {one}(" in body])
    ]
    separated = "\n" if imports else ""
    head = f"import triton\nfrom triton import language as tl\n{separated}{''.join(imports)}"
    return head + body


def module(derived: Derived, name: str) -> ModuleType:
    """The module that `source` prints.

    Triton reads the sources of its functions as Python's tracebacks do, by `linecache`: there is no file.
    """
    text = source(derived, name)
    file = f"<rnnkit.graph.triton {hashlib.sha256(text.encode()).hexdigest()[:32]}>"
    linecache.cache[file] = len(text), None, text.splitlines(True), file
    made = ModuleType(f"rnnkit_{name}")
    made.__file__ = file
    exec(compile(text, file, "exec"), vars(made))
    return made

"""A cell's C++ struct, with the members that csrc/cells/all.h lists, of a lane type's operators and functions.

A cell with parameters has them as the last argument of each function, an array; their gradients follow the gates'.
Where the output is no state, it is the last of `state` and of `grad_state`.
"""

from collections.abc import Iterator, Mapping, Sequence

from rnnkit.graph.derive import Derived
from rnnkit.graph.text import statements

#: C++ writes these constants otherwise than Python.
_SPECIAL = {"inf": "__builtin_inf()", "-inf": "-__builtin_inf()", "nan": '__builtin_nan("")'}

_UNITS = {1: 64, 2: 32}  # for more gates 16, so that a panel of packed weights fits the caches


def _constant(value: str) -> str:
    return f"T({_SPECIAL.get(value, value)})"


def _filled(text: str) -> str:
    """A constant in every lane; c - 0 is c also where c is -0."""
    return f"({text} - V{{}})" if text.startswith("T(") else text


def _call(op: str, operands: list[str]) -> str:
    name = "select" if op == "where" else op
    return f"{name}({', '.join(map(_filled, operands))})"


def _array(name: str, nodes: Sequence[int]) -> dict[str, int]:
    return {f"{name}[{k}]": number for k, number in enumerate(nodes)}


def _function(
    derived: Derived,
    head: str,
    arguments: Sequence[str],
    known: Mapping[int, str],
    targets: Mapping[str, int],
    last: Sequence[str] = (),
) -> str:
    """A function that stores a node in each target.

    Args:
        derived: the cell.
        head: the type of the result, and the name.
        arguments: types and names.
        known: the text of nodes that are there already.
        targets: what is assigned to, and the node.
        last: the statements that follow.
    """
    if derived.graph.parameters:
        arguments = [*arguments, "const V* parameter"]
    made, names = statements(derived.nodes, targets.values(), known, _constant, _call)
    lines = [f"const auto {names[number]} = {text};" for number, text in made.items()]
    lines += [f"{target} = {_filled(names[number])};" for target, number in targets.items()]
    if any("T(" in line for line in lines):
        lines.insert(0, "using T = Element<V>;")
    listed = ", ".join(f"[[maybe_unused]] {argument}" for argument in arguments)
    body = "".join(f"    {line}\n" for line in [*lines, *last])
    return f"\n  template <class V>\n  static RNNKIT_INLINE {head}({listed}) {{\n{body}  }}\n"


def _functions(derived: Derived) -> Iterator[str]:
    graph = derived.graph
    save = [f"save[{k}]" for k in range(len(derived.saved))]
    known = derived.known(save, "h", "previous_h")
    arguments = ["const V* x", "const V* h", "V* state", "V* save"]
    stores = _array("save", derived.saved) | _array("state", graph.results)
    yield _function(derived, "void forward", arguments, {}, stores)

    of_saved = dict(zip(derived.saved, save, strict=True))
    if derived.projects:
        made, last = {"const V output": graph.results[0]}, "return output;"
    else:
        made, last = {}, "return V{};  // never called: h is not projected"
    yield _function(derived, "V output", ["const V* save"], of_saved, made, [last])

    if len(graph.states) > 1:
        arguments = ["const V* save", "V* grad_state"]
        stores = _array("grad_state", derived.grad_states)
        yield _function(derived, "void grad_states", arguments, known, stores)

    arguments = ["const V* save", "V h", "V previous_h", "V* grad_state", "V* grad"]
    stores = _array("grad", derived.columns)
    late = [stores.pop(f"grad[{k}]") for k in derived.late_columns]
    stores |= _array("grad_state", derived.previous_grads)
    yield _function(derived, "void backward", arguments, known, stores)

    if graph.operand is not None:
        made, last = {"const V operand": graph.operand}, "return operand;"
        of_step = ["const V* x", "const V* h", "const V* state"]
        yield _function(derived, "V operand", of_step, {}, made, [last])
        yield _function(derived, "void late_grads", arguments, known, _array("grad", late))


def struct(derived: Derived, name: str) -> str:
    """The text of the struct `name`."""
    graph = derived.graph
    flag = {True: "true", False: "false"}
    late = f", late = {graph.late}" * (graph.late > 0)
    return f"""struct {name} {{
  static constexpr int gates = {len(graph.inputs)}, recurrent = {len(graph.recurrent)}{late};
  static constexpr int states = {len(graph.states)}, parameters = {len(graph.parameters)};
  static constexpr int units = {_UNITS.get(len(graph.inputs), 16)};
  static constexpr int saved = {len(derived.saved)}, grads = {derived.grads};
  static constexpr int input_grad[] = {{{", ".join(map(str, derived.input_grads))}}};
  static constexpr bool uses_h = {flag[derived.uses_h]};
  static constexpr bool uses_previous_h = {flag[derived.uses_previous_h]};
  static constexpr bool has_source = false;
{"".join(_functions(derived))}}};
"""

"""A cell's C++ struct, with the members that csrc/cells/all.h lists, of a lane type's operators and functions.

A cell with parameters has them as the last argument of each function, an array; their gradients follow the gates'.
Where the output is no state, it is the last of `state` and of `grad_state`.
"""

from collections.abc import Mapping, Sequence

from rnnkit.graph.derive import Derived
from rnnkit.graph.text import statements

#: C++ writes these constants otherwise than Python.
_SPECIAL = {"inf": "__builtin_inf()", "-inf": "-__builtin_inf()", "nan": '__builtin_nan("")'}

_UNITS = {1: 64, 2: 32}  # for more gates 16, so that a panel of packed weights fits the caches


def _constant(value: str) -> str:
    return f"T({_SPECIAL.get(value, value)})"


def _filled(text: str) -> str:
    """A constant in every lane; minus 0 keeps the sign of a 0."""
    return f"({text} - V{{}})" if text.startswith("T(") else text


def _call(op: str, operands: list[str]) -> str:
    name = "select" if op == "where" else op
    return f"{name}({', '.join(map(_filled, operands))})"


def _body(derived: Derived, known: Mapping[int, str], targets: Mapping[str, int]) -> str:
    """The statements that compute a node for each target, and then store it."""
    made, names = statements(derived.nodes, targets.values(), known, _constant, _call)
    lines = ["using T = Element<V>;"] if "T(" in "".join([*made.values(), *names.values()]) else []
    lines += [f"const auto {names[number]} = {text};" for number, text in made.items()]
    lines += [f"{target} = {_filled(names[number])};" for target, number in targets.items()]
    return "".join(f"    {line}\n" for line in lines)


def _array(name: str, nodes: Sequence[int]) -> dict[str, int]:
    return {f"{name}[{k}]": number for k, number in enumerate(nodes)}


def _function(signature: str, derived: Derived, body: str) -> str:
    parameter = ", const V* parameter" if derived.graph.parameters else ""
    arguments = "".join(
        f"{', ' if k else ''}[[maybe_unused]] {argument}"
        for k, argument in enumerate((signature.split("(")[1] + parameter).split(", "))
    )
    return f"""
  template <class V>
  static RNNKIT_INLINE {signature.split("(")[0]}({arguments}) {{
{body}  }}
"""


def struct(derived: Derived, name: str) -> str:
    """The text of the struct `name`."""
    graph = derived.graph
    saved = {number: f"save[{k}]" for k, number in enumerate(derived.saved)}
    known = {derived.h: "h", derived.previous_h: "previous_h", **saved}
    stores = {**_array("save", derived.saved), **_array("state", graph.results)}
    backward = {
        **_array("grad", derived.columns),
        **_array("grad_state", derived.previous_grads),
    }
    output = "    return V{};  // never called: h is not projected\n"
    if derived.projects:
        body = _body(derived, saved, {"const V output": graph.results[0]})
        output = f"{body}    return output;\n"
    flag = {True: "true", False: "false"}
    functions = [
        _function(
            "void forward(const V* x, const V* h, V* state, V* save",
            derived,
            _body(derived, {}, stores),
        ),
        _function("V output(const V* save", derived, output),
        _function(
            "void backward(const V* save, V h, V previous_h, V* grad_state, V* grad",
            derived,
            _body(derived, known, backward),
        ),
    ]
    if len(graph.states) > 1:
        body = _body(derived, known, _array("grad_state", derived.grad_states))
        functions.insert(
            2, _function("void grad_states(const V* save, V* grad_state", derived, body)
        )
    return f"""struct {name} {{
  static constexpr int gates = {len(graph.inputs)}, recurrent = {len(graph.recurrent)};
  static constexpr int states = {len(graph.states)}, parameters = {len(graph.parameters)};
  static constexpr int units = {_UNITS.get(len(graph.inputs), 16)};
  static constexpr int saved = {len(derived.saved)}, grads = {derived.grads};
  static constexpr int input_grad[] = {{{", ".join(map(str, derived.input_grads))}}};
  static constexpr bool uses_h = {flag[derived.uses_h]};
  static constexpr bool uses_previous_h = {flag[derived.uses_previous_h]};
  static constexpr bool has_source = false;
{"".join(functions)}}};
"""

"""`cell`: makes a recurrent cell of a function that computes one step, for `rnnkit.Recurrent` and `RecurrentCell`."""

import functools
import importlib
import pickle
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from numbers import Real
from types import FunctionType
from typing import TYPE_CHECKING, Any, overload

from torch import Tensor, nn

from rnnkit import backends, parameters, specs

if TYPE_CHECKING:  # imported where it is used: a program without such cells does not need it
    from rnnkit.graph.trace import Graph

Names = str | Sequence[str]
#: The initial value of a parameter, or what writes it: takes the tensor [H].
Start = float | Callable[[Tensor], Any]
#: What makes the matrix that h is multiplied with of the parameter `weight_hh`.
Prepare = Callable[[Tensor], Tensor]

#: Names that a parameter cannot have, besides those of a module's methods: `RecurrentCell` has them.
_TAKEN = {*parameters.KINDS, "bias", "cell", "hidden_size", "input_size", "training"}


class Cell:
    """A recurrent cell of one's own, see `cell`.

    Attributes:
        name: the function's name.
        gates: the names of the gates that have an input part.
        recurrent: the names of the gates that have a recurrent part.
        states: the names of the states; the first is h, which the recurrent parts are made of.
        parameters: the names of the parameters that each hidden unit has one of.
        init: the initial values of parameters, by their names.
        prepare: what makes the matrix that h is multiplied with of `weight_hh`; None for the parameter itself.
        has_output: whether the output is another value than h.
        graph: what the function computes; an output that is no state is one here, the last.
    """

    def __init__(
        self,
        name: str,
        graph: "Graph",
        init: Mapping[str, Start] | None = None,
        prepare: Prepare | None = None,
        has_output: bool = False,
    ) -> None:
        if init is not None and not isinstance(init, Mapping):
            raise TypeError(
                f"expected init to be a dict of parameters' names and values, got {init!r}"
            )
        self.name, self.init, self.prepare = name, dict(init or {}), prepare
        self.has_output = has_output or graph.has_output
        self.graph = graph = graph.with_output_as_state()
        self.gates, self.recurrent = graph.inputs, graph.recurrent
        self.states = graph.states[: len(graph.states) - self.has_output]
        self.parameters = graph.parameters
        if prepare is not None and not callable(prepare):
            raise TypeError(f"expected prepare to be a function of weight_hh, got {prepare!r}")
        if prepare is not None and not self.recurrent:
            raise ValueError("expected prepare to be None for a cell without W_hh, got a function")
        for parameter in self.parameters:
            if parameter in _TAKEN or hasattr(nn.RNNCellBase, parameter):
                raise ValueError(
                    f"expected names in parameters that a module does not have itself, got {parameter!r}"
                )
        for parameter, start in self.init.items():
            if parameter not in self.parameters:
                names = ", ".join(self.parameters) or "there are none"
                raise ValueError(
                    f"expected init to name parameters of the cell, {names}, got {parameter!r}"
                )
            if not callable(start) and (not isinstance(start, Real) or isinstance(start, bool)):
                raise TypeError(
                    f"expected init of {parameter} to be a number or a function of its tensor, got {start!r}"
                )
        #: The parameters whose function in `init` was not found when the cell was loaded.
        self.lost: tuple[str, ...] = ()
        #: The cell's name in ops, which holds all of it: a program that was exported needs no function.
        self.op_name = graph.to_json()
        self.spec = specs.of(self.op_name)

    def __call__(
        self,
        x: Sequence[Tensor],
        r: Sequence[Tensor],
        s: Sequence[Tensor],
        p: Sequence[Tensor] = (),
    ) -> tuple[Tensor, ...]:
        """One step on tensors: the states after it, and last the output if it is no state.

        Args:
            x: the input part of each gate, [N, H].
            r: the recurrent part of each gate, [N, H]; of gates that are called, as `r.n(value)`, what that gives.
            s: the states before the step, [N, H].
            p: the parameters, [H].
        """
        from rnnkit.graph.trace import run

        return run(self.graph, x, r, s, p)

    def build(self) -> None:
        """Compile the CPU kernels now, which otherwise the first call does; later processes load what was compiled.

        Without the C++ extension it does nothing.
        """
        if backends.EXTENSION is not None:
            from rnnkit.graph import kernels

            kernels.register(self.op_name)

    def __repr__(self) -> str:
        parts = f"gates={self.gates}, states={self.states}"
        if self.recurrent != self.gates:
            parts += f", recurrent={self.recurrent}"
        return f"{self.name}({parts}{f', parameters={self.parameters}' * bool(self.parameters)})"

    def __reduce__(self) -> Any:
        """With the functions in `init` by name, so that those which are not found do not keep a cell from loading."""
        init = {name: _by_name(start) for name, start in self.init.items()}
        init |= dict.fromkeys(self.lost)
        return _unpickled, (self.name, self.op_name, init, self.prepare, self.has_output)

    def __deepcopy__(self, memo: Any) -> "Cell":
        return self  # it does not change


class _Function:
    """A function as pickle finds it again: by its module and its name there."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name

    def found(self) -> Any:
        """The function; None if there is none of that name."""
        found: Any = None
        with suppress(ImportError, AttributeError):
            found = importlib.import_module(self.module)
            for part in self.name.split("."):
                found = getattr(found, part)
        return found if callable(found) else None


def _by_name(start: Start) -> Any:
    """What is pickled of an initial value: of a function its name, None of what cannot be pickled, as of a lambda."""
    if isinstance(start, FunctionType):
        function = _Function(start.__module__, start.__qualname__)
        return function if function.found() is start else None
    found: Any = start
    if isinstance(start, functools.partial):
        function = _by_name(start.func)
        found = function and (function, start.args, start.keywords)
    try:
        pickle.dumps(found)
    except Exception:  # whatever an object of a user's raises
        return None
    return found


def _from_name(start: Any) -> Any:
    """The inverse of `_by_name`; None if a function is not found."""
    if isinstance(start, tuple):
        function, arguments, named = start
        found = _from_name(function)
        return found and functools.partial(found, *arguments, **named)
    return start.found() if isinstance(start, _Function) else start


def _unpickled(
    name: str,
    op_name: str,
    init: Mapping[str, Any],
    prepare: Prepare | None = None,
    has_output: bool = False,
) -> Cell:
    from rnnkit.graph.trace import Graph

    found = {parameter: _from_name(start) for parameter, start in init.items()}
    there = {parameter: start for parameter, start in found.items() if start is not None}
    cell = Cell(name, Graph.from_json(op_name), there, prepare, has_output)
    cell.lost = tuple(parameter for parameter in init if parameter not in there)
    return cell


@overload
def cell(
    function: None = None,
    *,
    gates: Names,
    states: Names,
    recurrent: Names | None = None,
    parameters: Names = (),
    init: Mapping[str, Start] | None = None,
    prepare: Prepare | None = None,
) -> Callable[[Callable[..., Any]], Cell]: ...
@overload
def cell(
    function: Callable[..., Any],
    *,
    gates: Names,
    states: Names,
    recurrent: Names | None = None,
    parameters: Names = (),
    init: Mapping[str, Start] | None = None,
    prepare: Prepare | None = None,
) -> Cell: ...
def cell(
    function: Callable[..., Any] | None = None,
    *,
    gates: Names,
    states: Names,
    recurrent: Names | None = None,
    parameters: Names = (),
    init: Mapping[str, Start] | None = None,
    prepare: Prepare | None = None,
) -> Any:
    r"""Make a recurrent cell of a function that computes one step.

    The function gets, for each gate, the input part W_ih x_t + b_ih and the recurrent part W_hh h_{t-1} + b_hh, and
    the states before the step, and returns the states after it. It is called once, here, to write down what it
    computes, and derivatives follow from that. `rnnkit.Recurrent` makes a layer of the cell:

        @rnnkit.cell(gates="i f g o", states="h c", parameters="p_i p_f p_o")
        def peephole(x, r, s, p):
            i = torch.sigmoid(x.i + r.i + p.p_i * s.c)
            f = torch.sigmoid(x.f + r.f + p.p_f * s.c)
            c = f * s.c + i * torch.tanh(x.g + r.g)
            o = torch.sigmoid(x.o + r.o + p.p_o * c)
            return {"h": o * torch.tanh(c), "c": c}

        layer = rnnkit.Recurrent(peephole, 64, 128)

    Args:
        function: `step(x, r, s)`, or `step(x, r, s, p)` for a cell with parameters. The arguments are named tuples of
            the gates' input parts, their recurrent parts, the states and the parameters. It may compute with + - * /,
            comparisons, and torch's abs, exp, log1p, maximum, minimum, neg, relu, sigmoid, tanh, where,
            torch.nn.functional.logsigmoid and softplus, each unit for itself, and returns a dict or a tuple of the
            states after the step. `r.n(value)` is the recurrent part of the gate n with a value of the step in place of
            h, W_hh value + b_hh: for one value of a step, and of the last recurrent gates. A dict may have an "output"
            that is no state.
        gates: the gates' names, in one string or a sequence. The rows of weights are blocks in this order.
        states: the states' names. The first is h, which W_hh multiplies, and the output if there is no other.
        recurrent: the names of the gates that have a recurrent part, in the order of the blocks of W_hh; `()` for a
            cell without W_hh. Default `gates`.
        parameters: names of parameters that each hidden unit has one of, [H] in each layer and direction.
        init: for some of these, the initial value or a function that writes it in place, as those of `torch.nn.init`.
            The others begin like weights. Pickle takes functions by their names: one that is not found at loading, such
            as a lambda, is lost, and `reset_parameters` then warns.
        prepare: a differentiable function that makes what multiplies h, [R*H, H], of the parameter `weight_hh`, with
            several heads of each head's; it is called once in a call of the layer. Pickle takes it by its name, so that
            it cannot be a lambda in a cell that is pickled. Default None: the parameter itself.

    The CPU kernels take up to 4 states, an output among them, 16 gates, 64 parameters and 64 values that a step saves;
    larger cells run under `rnnkit.backend("reference")` alone.

    Returns:
        The `Cell`; without `function`, a decorator that makes it.

    Raises:
        TypeError: the function does what a cell cannot; the text names the line and what to write instead.
        ValueError: a name is none or is taken, or the function returns other states than it should.
    """
    if function is None:
        given = {"gates": gates, "states": states, "recurrent": recurrent, "parameters": parameters}
        return functools.partial(cell, **given, init=init, prepare=prepare)
    from rnnkit.graph.trace import Refused, checked_names, trace

    gates = checked_names("gates", gates)
    try:
        graph = trace(
            function,
            inputs=gates,
            recurrent=gates if recurrent is None else recurrent,
            states=states,
            parameters=parameters,
        )
    except Refused as error:  # its text names the line; the way there is of no use
        raise TypeError(str(error)) from None
    name = getattr(function, "__name__", type(function).__name__)
    if unused := graph.unused():
        # The line is that of the call, also of a decorator's, which functools.partial makes without a frame.
        warnings.warn(f"rnnkit.cell: {name} does not use {', '.join(unused)}", stacklevel=2)
    return functools.update_wrapper(Cell(name, graph, init, prepare), function, updated=())

"""`Recurrent` and `RecurrentCell`: a layer, and one step of it, of a cell of one's own (`rnnkit.cell`)."""

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence

from rnnkit import backends, interop, parameters, stack
from rnnkit.cells import _Cell
from rnnkit.definition import Cell
from rnnkit.init import Initializer
from rnnkit.layers import _NOTHING, Device, Lengths, Rows, Weights, _asked, _Layers

States = Tensor | Sequence[Tensor]

#: `mode` of a `Recurrent`, where torch.nn's layers have a name of their cell.
_MODE = "OWN"


class _OfCell(nn.Module):
    """The base of both: a module that has a cell of one's own."""

    cell: Cell
    heads: int = 1
    _cell: str

    def _set_cell(self, cell: Cell, heads: int, **sizes: int) -> None:
        if not isinstance(cell, Cell):
            call = getattr(cell, "__module__", "") == "rnnkit.library" and callable(cell)
            instead = f": call it, {cell.__name__}()" if call else ""
            raise TypeError(f"expected cell to be made by rnnkit.cell, got {cell!r}{instead}")
        if not isinstance(heads, int) or isinstance(heads, bool):
            raise TypeError(f"expected heads to be an int, got {heads!r}")
        if heads < 1:
            raise ValueError(f"expected heads to be at least 1, got {heads}")
        for name, size in sizes.items():
            if isinstance(size, int) and size % heads != 0:
                raise ValueError(f"expected {name} to be a multiple of heads={heads}, got {size}")
        vars(self).update(cell=cell, heads=heads, _cell=cell.op_name)

    def extra_repr(self) -> str:
        """The cell, what torch.nn's modules show, and the heads if there are several."""
        heads = f", heads={self.heads}" * (self.heads > 1)
        return f"{self.cell.name}, {super().extra_repr()}{heads}"

    @torch.no_grad()
    def _start(self, suffix: str = "") -> None:
        """Initializes the cell's own parameters as the cell says, those whose names end in `suffix`."""
        for kind in self.cell.lost:
            backends.warn(
                f"rnnkit cannot initialize {kind} of {self.cell.name} as before: the function in init= was not found "
                "when the cell was loaded"
            )
        for kind, start in self.cell.init.items():
            name = kind + suffix
            tensor = getattr(self, name)
            if not callable(start):
                nn.init.constant_(tensor, start)
            elif isinstance(made := start(tensor), Tensor) and made.data_ptr() != tensor.data_ptr():
                raise ValueError(
                    f"expected init of {kind} to write to the tensor, as t.fill_(1) does, got a function that returns "
                    "another one"
                )
            if parametrize.is_parametrized(self, name):  # then `tensor` is what was computed
                setattr(self, name, tensor)

    def _as_call(self, names: Sequence[str], given: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The weights of one direction, of all its heads, from its parameters, whose names `_names` tells.

        The cell's own become one, [U, H].
        """
        found = dict(zip(names, given, strict=True))
        if self.cell.prepare is not None:
            found["weight_hh"] = self._prepared(found["weight_hh"])
        own = [tensor for name in self.cell.parameters if (tensor := found[name]) is not None]
        return [*map(found.get, parameters.KINDS), *([torch.stack(own)] if own else [])]

    def _prepared(self, weight_hh: Tensor | None) -> Tensor | None:
        """What the cell's `prepare` makes of `weight_hh`, of each head for itself, in its own dtype."""
        prepare = self.cell.prepare
        if prepare is None or weight_hh is None:
            return weight_hh
        heads = weight_hh.unbind(0) if self.heads > 1 else [weight_hh]
        version = _version(weight_hh)
        kind = weight_hh.device.type
        casts = kind != "meta" and torch.is_autocast_enabled(kind)
        with torch.autocast(kind, enabled=False) if casts else nullcontext():
            made = [prepare(of_head) for of_head in heads]
        name, like = self.cell.name, _described(heads[0])
        if _version(weight_hh) != version:
            raise ValueError(
                f"expected prepare of {name} to leave weight_hh as it is, got a change of it"
            )
        for of_head in made:
            if _described(of_head) != like:
                raise ValueError(
                    f"expected prepare of {name} to return a Tensor like weight_hh, {like}, got {_described(of_head)}"
                )
        return torch.stack(made) if self.heads > 1 else made[0]

    def _of_heads(self, given: Sequence[Tensor | None]) -> list[list[Tensor | None]]:
        """The weights of each head as a call takes them, from what `_as_call` returns."""
        if self.heads == 1:
            return [list(given)]
        apart: list[Sequence[Tensor | None]] = []
        for k, weight in enumerate(given):
            if weight is None:
                apart.append([None] * self.heads)
            elif k < len(parameters.KINDS):
                by_head = weight if weight.dim() == 3 else weight.unflatten(0, (self.heads, -1))
                apart.append(by_head.unbind(0))
            else:
                apart.append(weight.unflatten(-1, (self.heads, -1)).unbind(1))
        return [list(of_head) for of_head in zip(*apart, strict=True)]


def _version(tensor: Tensor) -> int:
    """How often the tensor was written to; 0 where nobody counts."""
    unknown = torch.compiler.is_compiling() or tensor.is_inference()
    return 0 if unknown else tensor._version


def _described(tensor: Any) -> str:
    """A tensor's dtype, shape and device in the text of an error."""
    if not isinstance(tensor, Tensor):
        return repr(tensor)
    return f"{tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}"


class _OwnWeights(_OfCell, nn.RNNBase):
    """torch.nn's base of layers with the weights of a cell of one's own.

    torch's constructor, which knows its own cells only, checks the arguments and sets the attributes; its parameters,
    without memory, are replaced.
    """

    def __init__(
        self, *args: Any, device: Device = None, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> None:
        super().__init__("RNN_TANH", *args, **{**kwargs, "device": "meta"})
        self.mode = _MODE
        for name in self._flat_weights_names:
            delattr(self, name)
        layers = [(k, d) for k in range(self.num_layers) for d in range(1 + self.bidirectional)]
        self._all_weights = []
        for k, direction in layers:
            suffix = f"_l{k}" + "_reverse" * direction
            width = (self.proj_size or self.hidden_size) * (1 + self.bidirectional)
            shapes = _shapes(self, self.input_size if k == 0 else width, self.proj_size)
            for kind, shape in shapes.items():
                tensor = torch.empty(shape, device=device, dtype=dtype)
                self.register_parameter(kind + suffix, nn.Parameter(tensor))
            self._all_weights.append([kind + suffix for kind in shapes])
        self._flat_weights_names = [name for names in self._all_weights for name in names]
        self._init_flat_weights()
        self.reset_parameters()

    def flatten_parameters(self) -> None:
        """Nothing: cuDNN has no such cells."""

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialize the parameters again: as torch.nn does, those of units as the cell says."""
        super().reset_parameters()
        if self.mode != _MODE:  # in torch's constructor
            return
        for names in self._all_weights:
            self._start(names[0].removeprefix("weight_ih"))


def _names(module: _OfCell, bias: bool, projected: int = 0) -> list[str]:
    """The names of the parameters of one layer and direction, without suffix."""
    recurrent = len(module.cell.recurrent) > 0
    there = True, recurrent, bias, bias and recurrent, projected > 0
    return [*compress(parameters.KINDS, there), *module.cell.parameters]


def _shapes(module: Any, inputs: int, projected: int = 0) -> dict[str, tuple[int, ...]]:
    """The parameters of one layer and direction: name without suffix -> shape."""
    hidden, heads = module.hidden_size, module.heads
    gates, recurrent = len(module.cell.gates) * hidden, len(module.cell.recurrent) * hidden
    of_heads = (heads,) * (heads > 1)
    shapes: tuple[tuple[int, ...], ...] = (
        (gates, inputs),
        (*of_heads, recurrent // heads, (projected or hidden) // heads),
        (gates,),
        (recurrent,),
        (*of_heads, projected // heads, hidden // heads),
    )
    of_kind = dict(zip(parameters.KINDS, shapes, strict=True))
    return {name: of_kind.get(name, (hidden,)) for name in _names(module, module.bias, projected)}


class Recurrent(_Layers, _OwnWeights):
    r"""A layer, or a stack of layers, of a recurrent cell of one's own.

    .. math::
        x^{(g)}_t &= W^{(g)}_{ih} x_t + b^{(g)}_{ih}, \quad r^{(g)}_t = W^{(g)}_{hh} h_{t-1} + b^{(g)}_{hh} \\
        (h_t, \ldots) &= \mathrm{cell}(x_t, r_t, (h_{t-1}, \ldots), p)

    Args:
        cell: what `rnnkit.cell` made of a function.
        input_size: I, features of the input.
        hidden_size: H, features of each state.
        num_layers: L, number of stacked layers. Default 1.
        bias: whether the layer has `b_ih` and `b_hh`. Default True.
        batch_first: whether input and output are [N, T, ·] instead of [T, N, ·]. Default False.
        dropout: in training, probability of zeroing an element of the output of every layer except the last.
        bidirectional: whether a second direction runs from the end (D = 2). Default False.
        proj_size: P < H, features of the projected h, for a cell that reads h in its recurrent parts alone; 0 for
            none. Default 0.
        device, dtype: device and dtype of the parameters.
        recompute, grad_clip, grad_cut, weight_dropout, recurrent_dropout: as those of `rnnkit.LSTM`.
        zoneout: as of `rnnkit.LSTM`: p, or one p for each state.
        learn_initial_state: whether the states before the first step are parameters, `h_0` and so on, by the states'
            names. Default False.
        init: a callable that takes the module and initializes its parameters. Default None.
        heads: how many heads the hidden units are divided into, of H / heads consecutive units each. The recurrent
            product of a head multiplies the h of its own units alone. Default 1.

    Parameters: `weight_ih_l0` [G*H, I or D*(P or H)], `weight_hh_l0` [R*H, P or H], `bias_ih_l0` [G*H], `bias_hh_l0`
    [R*H], `weight_hr_l0` [P, H], and the cell's own [H] by their names, such as `p_i_l0`; G gates with an input part,
    R with a recurrent part. Names of the second direction end in `_reverse`. With E > 1 heads `weight_hh_l0` is
    [E, R*H/E, P/E or H/E], `weight_hr_l0` is [E, P/E, H/E], and the rows of `weight_ih_l0` and of biases are blocks of
    heads, each with its gates: [E, G, H/E].

    Shape:
        input [T, N, I], [T, I] or a PackedSequence. `hx`: the initial states, of a cell with one state a tensor
        [L*D, N, P or H], of others a tuple of one for each state [L*D, N, H]; zeros or the learned states if None.
        Returns the output [T, N, D*(P or H)] (or [T, ·], or a PackedSequence), which is h unless the step returns
        another, and the final states in the form of `hx`.
        `lengths`, `reset`, `reset_to` and `all_states` are those of `rnnkit.LSTM`.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: the input's rank or dtype does not fit; in the constructor, an option has no such value or is not
            for this cell, or `hidden_size` or `proj_size` is not a multiple of `heads`.
        RuntimeError: a size does not fit, or there is no time step.
    """

    def __init__(
        self,
        cell: Cell,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        recompute: bool = False,
        grad_clip: float | None = None,
        grad_cut: int | None = None,
        weight_dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        zoneout: float | tuple[float, ...] = 0.0,
        learn_initial_state: bool = False,
        init: Initializer | None = None,
        heads: int = 1,
    ) -> None:
        self._set_cell(cell, heads, hidden_size=hidden_size, proj_size=proj_size)
        if proj_size and (cell.has_output or not cell.spec.projects):
            why = "step reads h itself"
            if cell.has_output or cell.graph.late:
                why = (
                    "output is not h" if cell.has_output else "step has a product of another value"
                )
            raise ValueError(
                f"expected proj_size to be 0 for {cell.name}, whose {why}, got {proj_size}"
            )
        super().__init__(
            *(input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional),
            proj_size,
            device=device,
            dtype=dtype,
            recompute=recompute,
            grad_clip=grad_clip,
            grad_cut=grad_cut,
            weight_dropout=weight_dropout,
            recurrent_dropout=recurrent_dropout,
            zoneout=zoneout,
            learn_initial_state=learn_initial_state,
            init=init,
        )

    @property
    def _kind(self) -> str:
        return self.cell.name

    @property
    def _heads(self) -> int:  # type: ignore[override]
        return self.heads

    @property
    def _state_names(self) -> tuple[str, ...]:
        return self.cell.states

    @property
    def _has_output(self) -> bool:  # type: ignore[override]
        return self.cell.has_output

    def _kinds(self) -> int:
        return len(_names(self, bool(self.bias), self.proj_size))

    def _of_direction(self, given: list[Tensor | None]) -> list[Tensor | None]:
        return self._as_call(_names(self, bool(self.bias), self.proj_size), given)

    def _weights(self) -> Weights:
        """Those of each layer, direction and head."""
        found = super()._weights()
        if self.heads == 1:
            return found
        return [of_head for of_direction in found for of_head in self._of_heads(of_direction)]

    def check_forward_args(self, input: Tensor, hidden: Any, batch_sizes: Tensor | None) -> None:
        """torch.nn's checks, for any number of states."""
        self.check_input(input, batch_sizes)
        states = (hidden,) if isinstance(hidden, Tensor) else hidden
        of_h = self.get_expected_hidden_size(input, batch_sizes)
        for k, state in enumerate(states):
            expected = of_h if k == 0 else (*of_h[:2], self.hidden_size)
            name = "hidden" if len(states) == 1 else f"hidden[{k}]"
            self.check_hidden_size(state, expected, f"Expected {name} size {{}}, got {{}}")

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: States | None = None,
        *,
        lengths: Lengths | None = None,
        reset: Rows | None = None,
        reset_to: States | None = None,
        all_states: bool = False,
    ) -> Any:
        """Run the layer; see the class."""
        asked = _NOTHING
        given = (lengths, reset, reset_to)
        if any(one is not None for one in given) or all_states is not False:
            asked = _asked(lengths, reset, reset_to, all_states)
        return self._forward(input, hx, asked)


class _OwnCellWeights(_OfCell, nn.RNNCellBase):
    """torch.nn's base of cells with the weights of a cell of one's own, see _OwnWeights."""

    def __init__(
        self, *args: Any, device: Device = None, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **{**kwargs, "num_chunks": 1, "device": "meta"})
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            delattr(self, name)
        for name, shape in _shapes(self, self.input_size).items():
            tensor = torch.empty(shape, device=device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(tensor))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialize the parameters again: as torch.nn does, those of units as the cell says."""
        if self.weight_ih.is_meta:  # in torch's constructor, or without values
            return
        super().reset_parameters()
        self._start()


class RecurrentCell(_Cell, _OwnCellWeights):
    r"""One step of a recurrent cell of one's own.

    Args:
        cell: what `rnnkit.cell` made of a function.
        input_size: I, features of the input.
        hidden_size: H, features of each state.
        bias: whether the module has `b_ih` and `b_hh`. Default True.
        device, dtype: device and dtype of the parameters.
        init: a callable that takes the module and initializes its parameters. Default None.
        heads: how many heads the hidden units are divided into, see `Recurrent`. Default 1.

    Parameters: `weight_ih` [G*H, I], `weight_hh` [R*H, H], `bias_ih` [G*H], `bias_hh` [R*H], and the cell's own [H] by
    their names; G gates with an input part, R with a recurrent part. With several heads as in `Recurrent`.

    Shape:
        input [N, I] or [I]; `hx`, of a cell with one state a tensor [N, H] or [H], of others a tuple of one for each
        state; zeros if None. Returns the new states in the form of `hx`; of a cell whose output is not h, a pair of the
        output and these.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a rank does not fit; in the constructor, `hidden_size` is not a multiple of `heads`.
        RuntimeError: a size does not fit.
    """

    def __init__(
        self,
        cell: Cell,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        init: Initializer | None = None,
        heads: int = 1,
    ) -> None:
        self._set_cell(cell, heads, hidden_size=hidden_size)
        super().__init__(input_size, hidden_size, bias=bias, device=device, dtype=dtype, init=init)

    @property
    def _kind(self) -> str:
        return self.cell.name

    @property
    def _has_output(self) -> bool:  # type: ignore[override]
        return self.cell.has_output

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """Take one step; see the class."""
        if interop.is_traced(input, hx):
            return interop.traced(self, input, hx)
        names = _names(self, self.bias)
        weights = stack.parameters(self, names)
        if interop.runs_as_torchs(weights):
            return interop.run_as_torchs(self, input, hx)
        if len(self.cell.states) == 1:
            states = stack.as_states(hx)
        else:
            states = stack.as_several_states(self.cell.states, self.cell.name, hx)
        found = self._step(input, states, *self._of_heads(self._as_call(names, weights)))
        finals = found[self.cell.has_output :]
        new = finals[0] if len(finals) == 1 else finals
        return (found[0], new) if self.cell.has_output else new

"""Initializers of recurrent layers and cells, gate by gate, and `init`, the constructors' argument that names one.

A weight [G*H, I] holds a matrix [H, I] for each gate: i, f, g, o in an LSTM; r, z, n in a GRU. `torch.nn.init` would
take it for one matrix. The initializers write in place. They take a layer or cell of rnnkit or torch.nn, a subclass of
one, or a model, in which they write to every recurrent module. They check everything before they write anything.
Parameters stay the same objects; a parametrized tensor is set through its parametrizations' `right_inverse`. Parameters
on the meta device have no values, and nothing happens to them.

With FSDP2 every process has to call an initializer. After a forward pass FSDP2's root module keeps its parameters
unsharded, as plain tensors, and what is written to these is lost when it shards them again: call `reshard()` of the
model first.
"""

import math
import numbers
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Generator, Tensor, nn
from torch.nn.utils import parametrize

from rnnkit import parameters, sharding, update_gate

__all__ = [
    "chrono_",
    "forget_bias_",
    "identity_",
    "keras_",
    "orthogonal_",
    "xavier_",
]

Module = TypeVar("Module", bound=nn.Module)
Initializer = str | Callable[[Any], object]

_GATES = {"RNN": 1, "LSTM": 4, "GRU": 3}
_BIASES = ("bias_ih", "bias_hh")
#: Row block of the gate that keeps the old state: f in i, f, g, o; z in r, z, n.
_KEEPING = 1


@torch.no_grad()
def orthogonal_(module: Module, gain: float = 1.0, *, generator: Generator | None = None) -> Module:
    r"""Make each gate's recurrent matrix orthogonal.

    .. math:: W_{hk}^T W_{hk} = \mathrm{gain}^2 \, I \quad \text{for each gate } k

    Each matrix is drawn uniformly from all orthogonal ones. With `proj_size` P, the matrix of a gate [H, P] has
    orthogonal columns, and the projection `weight_hr` [P, H] has orthonormal rows whatever `gain` is. Input weights
    and biases stay as they are: `orthogonal_(xavier_(module))` sets them, too.

    Args:
        module: a layer, a cell, or a model that contains some; changed in place.
        gain: factor of the matrices. Default 1.
        generator: what draws, on the parameters' device; torch's default generator if None.

    Returns:
        `module`.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: `gain` is not finite, or `module` contains no RNN, LSTM, GRU or cell.
        RuntimeError: `generator` is on another device; or a tensor to write to is no parameter, because of a hook, or
            has a parametrization without `right_inverse`.

    Source: Saxe, McClelland & Ganguli 2013, "Exact solutions to the nonlinear dynamics of learning in deep linear
    neural networks".
    """
    _check_number("gain", gain)
    for weights in _each_direction(module, ("weight_hh", "weight_hr"), generator):
        for gate in weights.gates("weight_hh"):
            nn.init.orthogonal_(gate, gain, generator)
        for projection in weights.whole("weight_hr"):
            nn.init.orthogonal_(projection, generator=generator)
    return module


@torch.no_grad()
def xavier_(module: Module, gain: float = 1.0, *, generator: Generator | None = None) -> Module:
    r"""Draw each gate's input and recurrent matrix from Glorot's uniform distribution, and set biases to 0.

    .. math:: W_k \sim U(-a, a), \quad a = \mathrm{gain} \sqrt{\frac{6}{\mathrm{rows} + \mathrm{columns}}}

    A gate's matrix [H, I] has H rows and I columns. A projection `weight_hr` [P, H] is drawn in the same way.

    Args:
        module: a layer, a cell, or a model that contains some; changed in place.
        gain: factor of the bound. Default 1.
        generator: what draws, on the parameters' device; torch's default generator if None.

    Returns:
        `module`.

    Raises:
        TypeError, ValueError, RuntimeError: as `orthogonal_`.

    Source: Glorot & Bengio 2010, "Understanding the difficulty of training deep feedforward neural networks".
    """
    _check_number("gain", gain)
    for weights in _each_direction(module, parameters.KINDS, generator):
        gates = [*weights.gates("weight_ih"), *weights.gates("weight_hh")]
        for matrix in [*gates, *weights.whole("weight_hr")]:
            nn.init.xavier_uniform_(matrix, gain, generator)
        weights.zero_biases()
    return module


@torch.no_grad()
def keras_(module: Module, *, generator: Generator | None = None) -> Module:
    r"""Initialize as Keras does by default.

    .. math::
        W_{ih} &\sim U(-a, a), \quad a = \sqrt{6 / (I + G H)} \\
        W_{hh}^T W_{hh} &= I \\
        b_f &= 1, \quad \text{all other biases } 0

    Keras draws the weights of all gates as one matrix, and so does this: the columns of the whole `weight_hh`
    [G*H, H] are orthonormal, not those of each gate. The bias 1 is for the LSTM's forget gate (`unit_forget_bias`).
    Keras has no projections: with `proj_size`, `weight_hr` is drawn like an input weight.

    Args:
        module: a layer, a cell, or a model that contains some; changed in place.
        generator: what draws, on the parameters' device; torch's default generator if None.

    Returns:
        `module`.

    Raises:
        TypeError, ValueError, RuntimeError: as `orthogonal_`.

    Source: `keras.layers.SimpleRNN`, `LSTM` and `GRU`, Keras 3: `kernel_initializer="glorot_uniform"`,
    `recurrent_initializer="orthogonal"`, `bias_initializer="zeros"`, `unit_forget_bias=True`.
    """
    for weights in _each_direction(module, parameters.KINDS, generator):
        for matrix in [*weights.whole("weight_ih"), *weights.whole("weight_hr")]:
            nn.init.xavier_uniform_(matrix, generator=generator)
        for matrix in weights.whole("weight_hh"):
            nn.init.orthogonal_(matrix, generator=generator)
        weights.zero_biases()
        if weights.cell == "LSTM":
            for bias in weights.gates("bias_ih")[_KEEPING : _KEEPING + 1]:
                bias.fill_(1)
    return module


@torch.no_grad()
def forget_bias_(module: Module, value: float = 1.0) -> Module:
    r"""Set the bias of the LSTM's forget gate.

    .. math:: b_{if} = \mathrm{value}, \quad b_{hf} = 0

    torch.nn's modules add two biases, so that their sum is `value`. Everything else stays as it is.

    Args:
        module: an LSTM, an LSTMCell, or a model that contains some; changed in place.
        value: the bias. Default 1.

    Returns:
        `module`.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: `value` is not finite; `module` contains no LSTM or LSTMCell; it contains one without biases; or
            it contains another recurrent module, which has no forget gate (`chrono_` sets the bias of a GRU's z).
        RuntimeError: as `orthogonal_`.

    Source: Gers, Schmidhuber & Cummins 2000, "Learning to forget"; Jozefowicz, Zaremba & Sutskever 2015, "An empirical
    exploration of recurrent network architectures".
    """
    _check_number("value", value)
    for weights in _each_direction(module, _BIASES, cells=("LSTM",), biased=True):
        weights.gates("bias_ih")[_KEEPING].fill_(value)
        weights.gates("bias_hh")[_KEEPING].zero_()
    return module


@torch.no_grad()
def chrono_(module: Module, t_max: float, *, generator: Generator | None = None) -> Module:
    r"""Draw the biases of an LSTM or GRU so that its units forget after 2 to `t_max` steps.

    .. math::
        b_f &= \log u, \quad b_i = -b_f \quad \text{(LSTM)} \\
        b_z &= \log u \quad \text{(GRU)} \\
        u &\sim U(1, t_{max} - 1)

    These are sums of torch.nn's two biases. All other biases are 0. In torch.nn's GRU, z keeps the old state and so has
    the forget gate's sign; with `update_gate="writes"`, b_z is -log u. Weights stay as they are.

    Args:
        module: an LSTM, a GRU, a cell of theirs, or a model that contains some; changed in place.
        t_max: the longest dependency expected, in steps; at least 2.
        generator: what draws, on the parameters' device; torch's default generator if None.

    Returns:
        `module`.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: `t_max` is below 2 or not finite; `module` contains no LSTM, GRU or cell of theirs; it contains
            one without biases; or it contains an RNN or RNNCell, which has no gates.
        RuntimeError: as `orthogonal_`.

    Source: Tallec & Ollivier 2018, "Can recurrent neural networks warp time?"; the zeros are those of implementations.
    """
    _check_number("t_max", t_max, at_least=2)
    cells = ("LSTM", "GRU")
    for weights in _each_direction(module, _BIASES, generator, cells=cells, biased=True):
        weights.zero_biases()
        gates = weights.gates("bias_ih")
        gates[_KEEPING].uniform_(1, t_max - 1, generator=generator).log_()
        if weights.cell == "LSTM":
            gates[0].copy_(-gates[_KEEPING])
        if weights.writes:
            gates[_KEEPING].neg_()
    return module


@torch.no_grad()
def identity_(
    module: Module,
    scale: float = 1.0,
    *,
    input_std: float = 0.001,
    generator: Generator | None = None,
) -> Module:
    r"""Make an RNN add its input to its state: an IRNN, if `nonlinearity` is `"relu"`, as in the paper.

    .. math:: W_{hh} = \mathrm{scale} \cdot I, \quad W_{ih} \sim N(0, \mathrm{input\_std}^2), \quad b = 0

    Args:
        module: an RNN, an RNNCell, or a model that contains some; changed in place.
        scale: factor of the identity. Default 1; a smaller one makes the RNN forget.
        input_std: standard deviation of the input weights. Default 0.001.
        generator: what draws, on the parameters' device; torch's default generator if None.

    Returns:
        `module`.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: `scale` or `input_std` is not finite, or `input_std` is negative; `module` contains no RNN or
            RNNCell; or it contains another recurrent module.
        RuntimeError: as `orthogonal_`.

    Source: Le, Jaitly & Hinton 2015, "A simple way to initialize recurrent networks of rectified linear units".
    """
    _check_number("scale", scale)
    _check_number("input_std", input_std, at_least=0)
    for weights in _each_direction(module, parameters.KINDS, generator, cells=("RNN",)):
        for matrix in weights.whole("weight_hh"):
            nn.init.eye_(matrix).mul_(scale)
        for matrix in weights.whole("weight_ih"):
            matrix.normal_(0, input_std, generator=generator)
        weights.zero_biases()
    return module


#: What `init` may name: the initializers that need no argument.
NAMED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "orthogonal": orthogonal_,
    "xavier": xavier_,
    "keras": keras_,
    "identity": identity_,
    "forget_bias": forget_bias_,
}


class Initialized(nn.Module):
    """Base of all layers and cells: their `init`, applied after torch.nn's own initialization."""

    # Set only where `init` is given. It is not called `init`, which users' subclasses may have as a method.
    _initializer: Initializer | None = None

    def __init__(self, *args: Any, init: Initializer | None = None, **kwargs: Any) -> None:
        if isinstance(init, str) and init not in NAMED:
            names = ", ".join(map(repr, NAMED))
            raise ValueError(
                f"expected init to be one of {names}, a callable or None, got {init!r}"
            )
        if init is not None and not isinstance(init, str) and not callable(init):
            raise TypeError(f"expected init to be a str, a callable or None, got {init!r}")
        super().__init__(*args, **kwargs)
        if init is not None:
            vars(self)["_initializer"] = init  # not as a submodule, if it is a module
            self._initialize()

    def _initialize(self) -> None:
        init = self._initializer
        if init is not None:
            (NAMED[init] if isinstance(init, str) else init)(self)

    def reset_parameters(self) -> None:
        """Initialize the parameters again: as torch.nn does, then by the constructor's `init`."""
        super().reset_parameters()  # type: ignore[misc]
        self._initialize()

    def extra_repr(self) -> str:
        """torch.nn's `extra_repr`, followed by `init` where it was given."""
        init = self._initializer
        if init is None:
            return super().extra_repr()
        shown = repr(init) if isinstance(init, str) else getattr(init, "__name__", repr(init))
        return f"{super().extra_repr()}, init={shown}"


@dataclass(frozen=True)
class _Weights:
    """Some weights and biases of a cell or of one direction of a layer: plain tensors, which are written back.

    Attributes:
        cell: a name in `_GATES`.
        values: a name in `parameters.KINDS` -> the tensor, if the module has one of that name.
        writes: whether the cell is a GRU with `update_gate="writes"`.
    """

    cell: str
    values: dict[str, Tensor]
    writes: bool

    def whole(self, name: str) -> list[Tensor]:
        """The tensor of this name; empty if the module has none."""
        return [self.values[name]] if name in self.values else []

    def gates(self, name: str) -> list[Tensor]:
        """Each gate's rows of a tensor; empty if the module has none of this name."""
        return [gate for rows in self.whole(name) for gate in rows.chunk(_GATES[self.cell])]

    def zero_biases(self) -> None:
        for name in _BIASES:
            for bias in self.whole(name):
                bias.zero_()


def _each_direction(
    module: nn.Module,
    names: Sequence[str],
    generator: Generator | None = None,
    *,
    cells: Sequence[str] = tuple(_GATES),
    biased: bool = False,
) -> Iterator[_Weights]:
    """Yields the tensors `names` of each direction of each recurrent module, and writes them back afterwards.

    Modules without values, on the meta device or with H = 0, are left as they are, like tensors by torch.nn.init.

    Args:
        module: the caller's argument.
        names: some of `parameters.KINDS`.
        generator: the caller's argument.
        cells: the cells that the caller knows, of `_GATES`.
        biased: whether every module must have biases.
    """
    found = list(_recurrent(module))
    _check_cells(module, found, cells, biased)
    if generator is not None and not isinstance(generator, Generator):
        raise TypeError(
            f"expected generator to be a torch.Generator or None, got {type(generator).__name__}"
        )
    directions = []
    for _, cell, part in found:
        for of_direction in parameters.names(part):
            own = {name: of_direction[name] for name in names if name in of_direction}
            for name in own.values():
                _check_writable(part, name)
            directions.append((cell, part, own))
        device = next(part.parameters()).device.type
        if generator is not None and device not in ("meta", generator.device.type):
            raise RuntimeError(
                f"expected generator to be on the parameters' device, {device}, got {generator.device.type}"
            )
    for cell, part, own in directions:
        held = {name: getattr(part, own[name]) for name in own}
        if not any(tensor.is_meta or part.hidden_size == 0 for tensor in held.values()):
            values = {name: _plain(tensor) for name, tensor in held.items()}
            weights = _Weights(cell, values, update_gate.writes(part))
            yield weights
            for name, value in values.items():
                _write(part, own[name], held[name], value)
            vars(part).pop("_packed", None)  # a frozen layer packs its weights again


def _recurrent(module: nn.Module) -> Iterator[tuple[str, str, Any]]:
    """The path, the cell and the module of each recurrent module in `module`."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"expected module to be a torch.nn.Module, got {type(module).__name__}")
    for path, part in module.named_modules():
        if cell := parameters.cell_of(part):
            yield path, cell, part


def _check_cells(
    module: nn.Module, found: Sequence[tuple[str, str, Any]], cells: Sequence[str], biased: bool
) -> None:
    kinds = ", ".join(f"{cell}, {cell}Cell" for cell in cells)
    if not found:
        raise ValueError(
            f"expected module to be or contain one of {kinds} of rnnkit or torch.nn, got {type(module).__name__}"
        )
    for path, cell, part in found:
        name = type(part).__name__
        where = (name if cell in name else f"{name}, a kind of {cell}") + f" ({path})" * bool(path)
        if cell not in cells:
            raise ValueError(f"expected every recurrent module to be one of {kinds}, got {where}")
        if biased and not part.bias:
            raise ValueError(
                f"expected every recurrent module to have biases, got {where} with bias=False"
            )


def _check_writable(part: nn.Module, name: str) -> None:
    if parametrize.is_parametrized(part, name):
        for parametrization in part.parametrizations[name]:  # type: ignore[index]
            if not hasattr(parametrization, "right_inverse"):
                raise RuntimeError(
                    f"expected the parametrization of {name} to have a right_inverse, "
                    f"got {type(parametrization).__name__}, which has none"
                )
    elif parameters.held(part, name) is None:
        raise RuntimeError(f"expected {name} to be a parameter, got None")


def _check_number(name: str, value: float, at_least: float = -math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"expected {name} to be a number, got {value!r}")
    if not math.isfinite(value) or value < at_least:
        least = "" if at_least == -math.inf else f" of at least {at_least}"
        raise ValueError(f"expected {name} to be a finite number{least}, got {value}")


def _plain(held: Any) -> Tensor:
    """A copy of all values, in float32 or float64: QR needs one of them."""
    whole = sharding.whole(held)
    dtype = torch.promote_types(held.dtype, torch.float32)
    return torch.empty(whole.shape, dtype=dtype, device=whole.device).copy_(whole)


def _write(part: nn.Module, name: str, held: Any, values: Tensor) -> None:
    values = sharding.sharded_like(held, values.to(held.dtype))
    if parametrize.is_parametrized(part, name):
        setattr(part, name, values)  # by the parametrizations' right_inverse
    else:
        held.copy_(values)

"""Calls of other packages on rnnkit's kernels: `flashrnn`, and what `rnnkit.patch` puts into xlstm, TiRex and TiRex-2.

Sources of layouts and gates: https://github.com/NX-AI/flashrnn, https://github.com/NX-AI/xlstm,
https://github.com/NX-AI/tirex and https://pypi.org/project/tirex-2.
"""

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rnnkit import autograd, stack
from rnnkit.call import LayerCall
from rnnkit.specs import WEIGHTS

#: For each function of FlashRNN: its states, and its gates with an input part, a recurrent part and a bias.
_COUNTS = {"elman": (1, 1, 1, 1), "lstm": (2, 4, 4, 4), "gru": (1, 3, 3, 4), "slstm": (4, 4, 4, 4)}

#: The axes of FlashRNN's tensors where no config says otherwise: batch, time, gates, heads, units, units before the
#: step, states.
_AXES = {"input": "BTGHD", "recurrent": "GHDP", "bias": "GHD", "output": "SBTHD"}


#: What a config may ask for that rnnkit does not have.
_RULES = ("gradient_recurrent_cut", "gradient_recurrent_clipval", "forward_clipval")


def flashrnn(
    Wx: Tensor,
    R: Tensor,
    b: Tensor,
    states: Tensor | None = None,
    function: str = "lstm",
    config: Any = None,
    backend: str | None = None,
    dtype: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""FlashRNN's `flashrnn`: a recurrence with heads over inputs that are products already, on rnnkit's kernels.

    Code written for it runs with one import changed, without CUDA and without nvcc, and with gradients of any order.
    The functions, of each head alone:

    - `"elman"`: :math:`h_t = \tanh(W x_t + R h_{t-1} + b)`;
    - `"lstm"`: as `torch.nn.LSTM`, with the gates i, f, z (its g), o;
    - `"gru"`: as `torch.nn.GRU`; `Wx` has the gates r, z, n, `R` n, r, z, and `b` the n of R, r, z and the n of W;
    - `"slstm"`: as `rnnkit.library.slstm`, with the gates i, f, z, o. FlashRNN sets an n below 1 to 1. Sequences that
      begin with zeros have none; here, given states with such an n go on as they are.

    Args:
        Wx: the products of the input [B, T, G, N, D]: batch, time, gates, heads, units of a head.
        R: the recurrent weights [G, N, D, D], from the last axis to the one before it.
        b: the biases [G, N, D].
        states: the states before the first step [S, B, 1, N, D]; zeros if None. h comes first, then c, n and m.
        function: `"elman"`, `"lstm"`, `"gru"` or `"slstm"`.
        config: a `flashrnn.FlashRNNConfig`, or an object with some of its attributes: `function`, `input_shape`,
            `recurrent_shape`, `bias_shape` and `output_shape`, which name other orders of the axes, and `initial_val`,
            what each state begins with where there are no `states`.
        backend: not used: rnnkit picks it.
        dtype: not used: rnnkit computes in the dtype of `Wx`, and casts the others to it.

    Returns:
        All states after each step [S, B, T, N, D], and the last ones [S, B, 1, N, D].

    Raises:
        TypeError: an argument is no Tensor.
        ValueError: there is no such function, or a rule for gradients is asked for that rnnkit does not have.
        RuntimeError: a shape or device does not fit, a tensor is not dense, or there is no time step or head.

    Source: Pöppel et al. 2024, "FlashRNN: I/O-aware optimization of traditional RNNs on modern hardware".
    """
    function = getattr(config, "function", function)
    axes = {kind: getattr(config, f"{kind}_shape", order) for kind, order in _AXES.items()}
    if function not in _COUNTS:
        known = ", ".join(map(repr, _COUNTS))
        raise ValueError(f"expected function to be one of {known}, got {function!r}")
    for name in _RULES:
        if value := getattr(config, name, None):
            raise ValueError(
                f"expected no {name}, got {value}: rnnkit.Recurrent has grad_clip and grad_cut, for all states"
            )
    n_states, of_input, recurrent, biases = _COUNTS[function]
    x = _in_order("Wx", Wx, axes["input"], "TBHGD", {"G": of_input})
    steps, batch, heads, _, units = x.shape
    if steps == 0 or heads == 0:
        raise RuntimeError(
            f"expected Wx to have at least one time step and one head, got shape {list(Wx.shape)}"
        )
    sizes = {"B": batch, "H": heads, "D": units, "P": units}
    r = _in_order("R", R, axes["recurrent"], "HGDP", {**sizes, "G": recurrent})
    bias = _in_order("b", b, axes["bias"], "HGD", {**sizes, "G": biases})
    initial: Sequence[Tensor] = ()
    if states is not None:
        of_states = {**sizes, "S": n_states, "T": 1}
        given = _in_order("states", states, axes["output"], "STHBD", of_states)
        initial = given.squeeze(1).unbind(0)
    elif value := getattr(config, "initial_val", 0.0):
        values = value if isinstance(value, Sequence) else [value] * n_states
        initial = [x.new_full((heads, batch, units), one) for one in values]
    of_h = None
    if function == "gru":  # the n of R has a bias of its own
        of_h = torch.cat([torch.zeros_like(bias[:, :2]), bias[:, :1]], 1)
        r, bias = r[:, [1, 2, 0]], bias[:, 1:]
    outputs, finals = recurrence(_cell(function), x, r, bias, initial, of_h)
    every = torch.stack(outputs).unflatten(-1, (heads, units))  # [S, T, B, N, D]
    last = torch.stack(finals).unsqueeze(1)  # [S, 1, N, B, D]
    to = axes["output"]
    return _permuted(every, "STBHD", to), _permuted(last, "STHBD", to)


def recurrence(
    cell: str,
    x: Tensor,
    r: Tensor,
    bias: Tensor,
    states: Sequence[Tensor] = (),
    of_h: Tensor | None = None,
    all_states: bool = True,
) -> tuple[list[Tensor], list[Tensor]]:
    """Runs a cell with several heads, whose input is the product already.

    Args:
        cell: a name in `specs.CELLS` or `specs.REGISTERED`.
        x: [T, B, N, G, D].
        r: the recurrent weights [N, G, D, D].
        bias: [N, G, D].
        states: the initial states [N, B, D] each; empty for zeros.
        of_h: the biases of the recurrent parts [N, G, D], if they are apart.
        all_states: whether to return all states after each step, or h alone.

    Returns:
        The states after each step [T, B, N*D], and the final ones [N, B, D].
    """
    heads = x.size(2)
    x = x.flatten(2)

    def of_heads(tensor: Tensor | None) -> Sequence[Tensor | None]:
        return [None] * heads if tensor is None else tensor.flatten(1, 2).to(x.dtype).unbind(0)

    weights: list[Tensor | None] = []
    for w_hh, b_ih, b_hh in zip(of_heads(r), of_heads(bias), of_heads(of_h), strict=True):
        found = {"w_hh": w_hh, "b_ih": b_ih, "b_hh": b_hh}
        weights += map(found.get, WEIGHTS)
    initial = [state.to(x.dtype) for state in states]
    call = LayerCall(cell, x, initial, weights, None, all_states, heads=heads)
    if not torch.is_autocast_enabled(x.device.type):
        return autograd.run(call)
    with torch.autocast(x.device.type, enabled=False):  # it is computed in the dtype of x
        return autograd.run(call)


def _cell(function: str) -> str:
    """The name of FlashRNN's function among cells."""
    if function == "slstm":
        name: str = importlib.import_module("rnnkit.library").slstm.op_name
        return name
    return {"elman": "rnn_tanh"}.get(function, function)


# For torch.compile, which cannot trace an import, as in stack.py.
_cell._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _in_order(name: str, tensor: Tensor, axes: str, order: str, sizes: dict[str, int]) -> Tensor:
    """The tensor with its axes in another order; raises a RuntimeError if one has another size than in `sizes`."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"expected {name} to be a Tensor, got {type(tensor).__name__}")
    stack.check_plain(name, tensor)
    wanted = [sizes.get(axis) for axis in axes]
    fits = [want in (None, size) for want, size in zip(wanted, tensor.shape, strict=False)]
    if tensor.dim() != len(axes) or not all(fits):
        told = [f"{axis}={sizes[axis]}" if axis in sizes else axis for axis in axes]
        raise RuntimeError(
            f"expected {name} with the axes {', '.join(told)}, got shape {list(tensor.shape)}"
        )
    return _permuted(tensor, axes, order)


def _permuted(tensor: Tensor, axes: str, order: str) -> Tensor:
    return tensor.permute([axes.index(axis) for axis in order])


# What `rnnkit.patch` puts into other packages.


def _xlstm_impl(original: Callable[..., Any]) -> Callable[..., Any]:
    """`sLSTMCell_vanilla._impl` of xlstm: all states [S, T + 1, B, E], the initial ones first."""

    def _impl(self: Any, training: bool, input: Tensor, state: Tensor) -> Tensor:
        config = self.config
        if config.function not in ("slstm", "lstm") or not _is_ours(input, config):
            result: Tensor = original(self, training, input, state)
            return result
        sizes = config.num_gates, config.num_heads, config.head_dim
        x = input.unflatten(-1, sizes).transpose(2, 3)  # was gate by gate
        r = self._recurrent_kernel.unflatten(1, (config.num_gates, -1))
        bias = self._bias.view(sizes).transpose(0, 1)
        initial = state.unflatten(-1, (config.num_heads, -1)).transpose(1, 2).unbind(0)
        outputs, _ = recurrence(_cell(config.function), x, r, bias, initial)
        return torch.cat([state.unsqueeze(1).to(x.dtype), torch.stack(outputs)], 1)

    return _impl


def _tirex_impl(original: Callable[..., Any]) -> Callable[..., Any]:
    """`sLSTMCell._impl_torch` of TiRex: input [T, B, G, N, D], states [4, B, E] -> h [T, B, E], states [4, B, E].

    In float32, where the original computes in bfloat16 and rounds the states to it in every step.
    """

    def _impl_torch(self: Any, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        config = self.config
        if not _is_ours(input, config):
            result: tuple[Tensor, Tensor] = original(self, input, state)
            return result
        heads, gates, units = config.num_heads, config.num_gates, config.head_dim
        x = input.float().transpose(2, 3)
        r = self._recurrent_kernel_.view(heads, units, gates, units).permute(0, 2, 3, 1)
        bias = self._bias_.view(heads, gates, units)
        initial = state.unflatten(-1, (heads, units)).transpose(1, 2).unbind(0)
        (output,), finals = recurrence(_cell("slstm"), x, r, bias, initial, all_states=False)
        return output, torch.stack([last.transpose(0, 1).flatten(1) for last in finals])

    return _impl_torch


def _tirex2_flashrnn(original: Callable[..., Any]) -> Callable[..., Any]:
    """`slstm_flashrnn` of TiRex-2's layers."""

    def slstm_flashrnn(
        self: Any, Wx: Tensor, R: Tensor, b: Tensor, config: Any, states: Tensor | None = None
    ) -> Any:
        if not _is_ours(Wx, config):
            return original(self, Wx, R, b, config, states)
        return flashrnn(Wx, R, b, states, config=config)

    return slstm_flashrnn


def _flashrnn_or(original: Callable[..., Any]) -> Callable[..., Any]:
    """FlashRNN's `flashrnn`."""

    @functools.wraps(original)
    def either(Wx: Tensor, *arguments: Any, **options: Any) -> Any:
        config = options.get("config", arguments[4] if len(arguments) > 4 else None)
        return (flashrnn if _is_ours(Wx, config) else original)(Wx, *arguments, **options)

    return either


def _is_ours(x: Tensor, config: Any) -> bool:
    """Whether rnnkit computes it: on the CPU, where the packages have no kernels, and with a rule that rnnkit has."""
    return x.device.type == "cpu" and not any(getattr(config, name, None) for name in _RULES)


#: For each package: a module, a class in it or nothing, the name of what is replaced there, and what makes of it the
#: function that takes its place.
PLACES: dict[str, tuple[str, str, str, Callable[[Any], Any]]] = {
    "flashrnn": ("flashrnn", "", "flashrnn", _flashrnn_or),
    "tirex": ("tirex.models.slstm.cell", "sLSTMCell", "_impl_torch", _tirex_impl),
    "tirex2": (
        "tirex2.model.component.flashrnn_slstm",
        "_FlashRNNLayer",
        "slstm_flashrnn",
        _tirex2_flashrnn,
    ),
    "xlstm": ("xlstm.blocks.slstm.cell", "sLSTMCell_vanilla", "_impl", _xlstm_impl),
}


def replacement(package: str) -> tuple[Any, str, Any]:
    """Where `package` has what rnnkit computes, its name there, and rnnkit's function for it.

    Raises:
        ImportError: the package is not installed, or has it no longer.
    """
    module, cls, name, make = PLACES[package]
    place: Any = importlib.import_module(module)
    if cls:
        place = getattr(place, cls, None)
    if not hasattr(place, name):
        where = f"{module}.{cls}.{name}" if cls else f"{module}.{name}"
        raise ImportError(f"expected {package} to have {where}: this version of it is not known")
    return place, name, make(getattr(place, name))

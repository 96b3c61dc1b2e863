"""RNNCell, LSTMCell and GRUCell: torch.nn's cells; a call is one step of a layer.

They subclass torch.nn's cells, which provide parameters, initialization, state_dict and repr.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from rnnkit import backends, interop, stack
from rnnkit.call import Keep
from rnnkit.init import Initialized, Initializer
from rnnkit.interop import Interop
from rnnkit.layers import Device
from rnnkit.update_gate import UpdateGate


class _Cell(Initialized, Interop, nn.RNNCellBase):
    """The base of the three cells: turns torch.nn's arguments into a call of `stack.run`, and its results back."""

    input_size: int
    hidden_size: int
    _torchs: ClassVar[type[nn.RNNCellBase]]
    _cell: str  #: The cell's name in `specs.CELLS`.
    _has_output = False  #: Whether the output is no state, see `stack.run`.

    def _forward(self, input: Tensor, hx: Any) -> Any:
        """Returns h' or (h', c')."""
        weight_names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        weights = [*stack.parameters(self, weight_names), None]
        direct = backends.fast_path("direct_cell")
        if direct is not None:
            found = direct(self._cell, input, hx, [weights], Keep.EVERYTHING)
            if found is not None:
                return found
        if interop.is_traced(input, hx):
            return interop.traced(self, input, hx)
        if interop.runs_as_torchs(weights):
            return interop.run_as_torchs(self, input, hx)
        if self._cell == "lstm":
            states = stack.as_several_states(("h", "c"), "lstm", hx, too_few=RuntimeError)
            return self._step(input, states, weights)
        return self._step(input, stack.as_states(hx), weights)[0]

    @property
    def _kind(self) -> str:
        """The cell's name in error messages, also for subclasses of another name."""
        return self._torchs.__name__

    def _step(
        self, input: Tensor, states: Sequence[Tensor], *weights: Sequence[Tensor | None]
    ) -> tuple[Tensor, ...]:
        """One step: input [N, I] or [I], states [N, H] or [H] (empty for zeros), weights of each head -> new states.

        An output that is no state is the first result.
        """
        stack.check_plain("input", input)
        name = self._kind
        if input.dim() not in (1, 2):
            raise ValueError(f"{name}: Expected input to be 1D or 2D, got {input.dim()}D instead")
        for index, state in enumerate(states):
            if state.dim() not in (1, 2):
                argument = "hidden" if len(states) == 1 else f"hx[{index}]"
                raise ValueError(
                    f"{name}: Expected {argument} to be 1D or 2D, got {state.dim()}D instead"
                )
        _check_sizes(self, input, states)
        batched = input.dim() == 2
        outputs, finals = stack.run(
            self._cell,
            input.unsqueeze(0) if batched else input[None, None],
            [state.unsqueeze(0) if batched else state[None, None] for state in states],
            weights,
            heads=len(weights),
            step=True,
            has_output=self._has_output,
        )
        found = (*(outputs if self._has_output else ()), *finals)
        return tuple(stack.reshaped(s, "squeeze", 0) if batched else s[0, 0] for s in found)


def _check_sizes(module: nn.RNNCellBase, input: Tensor, states: Sequence[Tensor]) -> None:
    """Checks that the sizes fit the module and each other, with torch.nn's error messages."""
    if input.size(-1) != module.input_size:
        raise RuntimeError(
            f"input has inconsistent input_size: got {input.size(-1)} expected {module.input_size}"
        )
    for index, state in enumerate(states):
        if state.size(-1) != module.hidden_size:
            raise RuntimeError(
                f"hidden{index} has inconsistent hidden_size: "
                f"got {state.size(-1)}, expected {module.hidden_size}"
            )
        if state.dim() != input.dim():
            raise RuntimeError(
                f"expected hidden{index} to be {input.dim()}D like the input, got {state.dim()}D"
            )
        if input.dim() == 2 and state.size(0) != input.size(0):
            raise RuntimeError(
                f"Input batch size {input.size(0)} doesn't match "
                f"hidden{index} batch size {state.size(0)}"
            )


class RNNCell(_Cell, nn.RNNCell):
    r"""One step of an Elman RNN, `torch.nn.RNNCell` on rnnkit's kernels.

    .. math:: h' = \tanh(W_{ih} x + b_{ih} + W_{hh} h + b_{hh})

    with ReLU in place of tanh if `nonlinearity` is `"relu"`.

    Args:
        input_size: I, features of the input.
        hidden_size: H, features of the hidden state.
        bias: whether the cell has `b_ih` and `b_hh`. Default True.
        nonlinearity: `"tanh"` or `"relu"`. Default `"tanh"`.
        init: what initializes the parameters after torch.nn's own initialization, also in `reset_parameters()`: an
            initializer of `rnnkit.init` by its name (`"orthogonal"`, `"xavier"`, `"keras"` or `"identity"`), or a
            callable that takes the module. Default None.
        device, dtype: device and dtype of the parameters.

    Shape:
        input [N, I] or [I]; `hx` [N, H] or [H], zeros if None. Returns h', shaped like `hx`.

    Raises:
        ValueError: a rank does not fit; in the constructor, `init` is unknown or not for this cell.
        RuntimeError: a size does not fit, or the nonlinearity is unknown.
    """

    _torchs = nn.RNNCell

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        init: Initializer | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, nonlinearity, device, dtype, init=init)

    @property
    def _cell(self) -> str:  # type: ignore[override]
        return f"rnn_{self.nonlinearity}"

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Take one step; see the class."""
        if self.nonlinearity not in ("tanh", "relu"):
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        return self._forward(input, hx)  # type: ignore[no-any-return]

    if TYPE_CHECKING:  # nn.Module.__call__ is typed as returning Any
        __call__ = forward


class LSTMCell(_Cell, nn.LSTMCell):
    r"""One step of an LSTM, `torch.nn.LSTMCell` on rnnkit's kernels.

    .. math::
        i, f, o &= \sigma(W_i x + b_i + W_{hi} h + b_{hi}), \ldots \\
        g &= \tanh(W_g x + b_g + W_{hg} h + b_{hg}) \\
        c' &= f \odot c + i \odot g \\
        h' &= o \odot \tanh(c')

    Args:
        input_size: I, features of the input.
        hidden_size: H, features of the hidden and the cell state.
        bias: whether the cell has `b_ih` and `b_hh`. Default True.
        init: what initializes the parameters after torch.nn's own initialization, also in `reset_parameters()`: an
            initializer of `rnnkit.init` by its name (`"orthogonal"`, `"xavier"`, `"keras"` or `"forget_bias"`), or a
            callable that takes the module. Default None.
        device, dtype: device and dtype of the parameters.

    Shape:
        input [N, I] or [I]; `hx` a pair h, c, each [N, H] or [H], zeros if None. Returns (h', c').

    Raises:
        ValueError: a rank does not fit; in the constructor, `init` is unknown or not for this cell.
        RuntimeError: a size does not fit.
    """

    _torchs = nn.LSTMCell
    _cell = "lstm"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        init: Initializer | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, device, dtype, init=init)

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Take one step; see the class."""
        return self._forward(input, hx)  # type: ignore[no-any-return]

    if TYPE_CHECKING:  # nn.Module.__call__ is typed as returning Any
        __call__ = forward


class GRUCell(UpdateGate, _Cell, nn.GRUCell):
    r"""One step of a GRU, `torch.nn.GRUCell` on rnnkit's kernels.

    .. math::
        r, z &= \sigma(W_r x + b_r + W_{hr} h + b_{hr}), \ldots \\
        n &= \tanh(W_n x + b_n + r \odot (W_{hn} h + b_{hn})) \\
        h' &= (1 - z) \odot n + z \odot h

    or, if the update gate z `"writes"`, :math:`h' = z \odot n + (1 - z) \odot h`, and if the reset gate r comes
    `"before"` the product, :math:`n = \tanh(W_n x + b_n + W_{hn} (r \odot h) + b_{hn})`.

    Args:
        input_size: I, features of the input.
        hidden_size: H, features of the hidden state.
        bias: whether the cell has `b_ih` and `b_hh`. Default True.
        init: what initializes the parameters after torch.nn's own initialization, also in `reset_parameters()`: an
            initializer of `rnnkit.init` by its name (`"orthogonal"`, `"xavier"` or `"keras"`), or a
            callable that takes the module. Default None.
        device, dtype: device and dtype of the parameters.
        update_gate: what z = 1 does: `"keeps"` the unit's state, as in torch.nn, or `"writes"` the new value. Default
            `"keeps"`. See `rnnkit.GRU`.
        reset: whether the reset gate multiplies `"after"` the recurrent product or `"before"` it. Default `"after"`.
            See `rnnkit.GRU`.

    Shape:
        input [N, I] or [I]; `hx` [N, H] or [H], zeros if None. Returns h', shaped like `hx`.

    Raises:
        ValueError: a rank does not fit; in the constructor, an option has no such value or is not for this cell.
        RuntimeError: a size does not fit.
    """

    _torchs = nn.GRUCell

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        init: Initializer | None = None,
        update_gate: str = "keeps",
        reset: str = "after",
    ) -> None:
        self._set_gates(update_gate, reset)
        super().__init__(input_size, hidden_size, bias, device, dtype, init=init)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Take one step; see the class."""
        return self._forward(input, hx)  # type: ignore[no-any-return]

    if TYPE_CHECKING:  # nn.Module.__call__ is typed as returning Any
        __call__ = forward

"""RNN, LSTM and GRU: torch.nn's layers, run by `stack.run`.

They subclass `nn.RNNBase`, which provides parameters, initialization, state_dict, checks and error messages. They do
not subclass `nn.RNN`, `nn.LSTM` or `nn.GRU`, because torch.compile breaks the graph at these classes.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast, overload

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from rnnkit import backends, interop, packing, resets, stack
from rnnkit.call import Keep
from rnnkit.init import Initialized, Initializer
from rnnkit.interop import Interop
from rnnkit.update_gate import UpdateGate

Device = torch.device | str | int | None
States = tuple[Tensor, Tensor]
Rows = Tensor | PackedSequence
Lengths = Tensor | Sequence[int]
Weights = list[list[Tensor | None]]
Init = TypeVar("Init", bound=Callable[..., None])

#: For each check that a call runs, torch.nn's implementations. The fast path skips the checks, so that it is used only
#: if no subclass has replaced one.
_CHECKS = {
    name: {getattr(cls, name, None) for cls in (nn.RNNBase, nn.LSTM)}
    for name in (
        "check_input",
        "check_forward_args",
        "check_hidden_size",
        "get_expected_hidden_size",
        "get_expected_cell_size",
    )
}


#: rnnkit's own options of a layer, which torch.nn's do not have.
_OPTIONS = ("recompute", "frozen", "grad_clip", "grad_cut")


def _check_gradient_rule(grad_clip: Any, grad_cut: Any) -> None:
    """Checks these attributes of a layer."""
    if grad_clip is not None:
        if not isinstance(grad_clip, int | float) or isinstance(grad_clip, bool):
            raise TypeError(f"expected grad_clip to be a number or None, got {grad_clip!r}")
        if not grad_clip > 0:
            raise ValueError(f"expected grad_clip to be positive, got {grad_clip}")
    if grad_cut is not None:
        if not isinstance(grad_cut, int) or isinstance(grad_cut, bool):
            raise TypeError(f"expected grad_cut to be a number of steps or None, got {grad_cut!r}")
        if grad_cut < 1:
            raise ValueError(f"expected grad_cut to be at least 1, got {grad_cut}")


def _implemented_by(implementation: Callable[..., None]) -> Callable[[Init], Init]:
    """Replaces an `__init__` by `implementation`, but keeps its signature for readers and type checkers.

    `implementation` takes any arguments, as torch.nn's constructors do: torch's base class checks them, so that the
    errors are torch's.
    """

    def decorate(shown: Init) -> Init:
        return cast(Init, functools.update_wrapper(implementation, shown))

    return decorate


class _Layers(Initialized, Interop, nn.RNNBase):
    """The base of RNN, LSTM and GRU: turns torch.nn's arguments into a call of `stack.run`, and its results back."""

    recompute = frozen = False  # defaults for modules pickled by a version without these attributes
    grad_clip: float | None = None
    grad_cut: int | None = None
    _packed: tuple[Tensor, ...] = ()
    _torchs: ClassVar[type[nn.RNNBase]]
    _cell: str  #: The cell's name in `specs.CELLS`.

    def __init__(
        self,
        *args: Any,
        device: Device = None,
        recompute: bool = False,
        grad_clip: float | None = None,
        grad_cut: int | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(recompute, bool):
            raise TypeError(f"expected recompute to be a bool, got {recompute!r}")
        _check_gradient_rule(grad_clip, grad_cut)
        if device is not None:  # None: `device` may still be one of the positional args
            kwargs["device"] = device
        super().__init__(*args, **kwargs)
        self.recompute = recompute
        if grad_clip is not None:
            self.grad_clip = grad_clip
        if grad_cut is not None:
            self.grad_cut = grad_cut

    def extra_repr(self) -> str:
        """torch.nn's `extra_repr`, followed by `init` and rnnkit's other options where they are set."""
        options = {name: getattr(self, name) for name in _OPTIONS}
        added = [f", {name}={value}" for name, value in options.items() if value]
        return super().extra_repr() + "".join(added)

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        # The layout of packed weights depends on this CPU's ISA; the copy packs them again.
        state.pop("_packed", None)
        return state

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._packed = ()
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._packed = ()
        super()._load_from_state_dict(*args, **kwargs)

    def _packed_weights(self, weights: Weights) -> tuple[Tensor, ...]:
        """The packed weights of a frozen layer, packed now if they are not; empty for other layers and in graphs."""
        if not self.frozen and self._packed:
            self._packed = ()  # a user set `frozen` back to False
        if not self.frozen or torch.compiler.is_compiling():
            return ()
        if not self._packed:
            self._packed = stack.pack(self._cell, weights, directions=self._directions)
        return self._packed

    @property
    def _directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def _keep(self) -> Keep:
        return Keep.STATES if self.recompute else Keep.EVERYTHING

    def _weights(self) -> Weights:
        """The five tensors of `specs.WEIGHTS` for each layer and direction."""
        if len(self._all_weights) != self.num_layers * self._directions:
            raise RuntimeError(
                f"expected num_layers={self.num_layers} and bidirectional={self.bidirectional} to be unchanged since "
                f"the layer was made with weights for {len(self._all_weights)} layers and directions"
            )
        found: Weights = []
        kinds = 2 + 2 * bool(self.bias) + (self.proj_size > 0)
        for names in self._all_weights:
            if len(names) != kinds:
                raise RuntimeError(
                    f"expected weights for bias={self.bias} and proj_size={self.proj_size}, got {', '.join(names)}: "
                    "these attributes cannot be changed after a layer was made"
                )
            weights = stack.parameters(self, names)
            biases = weights[2:4] if self.bias else [None, None]
            found.append([*weights[:2], *biases, weights[-1] if self.proj_size > 0 else None])
        return found

    def _run(
        self,
        input: Tensor,
        states: Sequence[Tensor],
        weights: Weights,
        batch_sizes: Tensor | None,
        reset: Tensor | None = None,
        reset_to: Sequence[Tensor] = (),
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        if self.frozen and torch.is_grad_enabled():
            given = [
                input,
                *states,
                *reset_to,
                *(w for of_direction in weights for w in of_direction),
            ]
            if any(tensor is not None and tensor.requires_grad for tensor in given):
                raise RuntimeError(
                    "expected input, hx and parameters of a frozen layer to need no gradient, got one that does: "
                    "call it under torch.no_grad()"
                )
        return stack.run(
            self._cell,
            input,
            states,
            weights,
            batch_sizes,
            directions=self._directions,
            dropout=self.dropout if self.training else 0.0,
            keep=self._keep,
            packed=self._packed_weights(weights),
            # 0 for no limit: an AOTInductor package cannot hold infinity.
            grad_clip=0.0 if self.grad_clip in (None, math.inf) else self.grad_clip,
            grad_cut=0 if self.grad_cut is None else self.grad_cut,
            reset=reset,
            reset_to=reset_to,
        )

    def _check_projected(self, weights: Weights) -> None:
        """Checks the weights against hidden_size and proj_size; torch.nn's own check covers input_size."""
        expected, w_hh = self.proj_size or self.hidden_size, weights[0][1]
        if w_hh is not None and w_hh.size(-1) != expected:
            raise RuntimeError(
                f"expected {self._all_weights[0][1]} to have {expected} columns, got shape {tuple(w_hh.shape)}"
            )

    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:
        """torch.nn's check, against the current weights: functional_call and parametrizations replace them."""
        weight = stack.parameters(self, self._all_weights[0][:1])[0]
        held = self._flat_weights[0]
        if weight is not None and held is not None and weight.dtype != held.dtype:
            self._update_flat_weights()
        super().check_input(input, batch_sizes)

    def _check_states(
        self, input: Tensor, states: Sequence[Tensor], batch_sizes: Tensor | None
    ) -> None:
        """torch.nn's checks of the input and, if states are given, of the states."""
        self.check_input(input, batch_sizes)
        if batch_sizes is not None and torch.compiler.is_exporting():
            self._check_exported_states(states, batch_sizes)
        elif states:
            hx = states if len(states) > 1 else states[0]
            self.check_forward_args(input, hx, batch_sizes)  # type: ignore[arg-type]

    @staticmethod
    def _check_exported_states(states: Sequence[Tensor], batch_sizes: Tensor) -> None:
        """Adds a check to the exported program, which knows the batch only at run time; ONNX has no operator for it."""
        if states and not torch.onnx.is_in_onnx_export():
            batch = batch_sizes[0].item()
            for state in states:
                torch._check(state.size(1) == batch)

    def _check_rank(self, states: Sequence[Tensor], batched: bool) -> None:
        expected = 3 if batched else 2
        if all(state.dim() == expected for state in states):
            return
        given = f"{'' if batched else 'un'}batched {expected}-D input"
        if len(states) == 1:
            message = (
                f"For {given}, hx should also be {expected}-D but got {states[0].dim()}-D tensor"
            )
        else:
            ranks = ", ".join(f"{state.dim()}-D" for state in states)
            message = (
                f"For {given}, hx and cx should also be {expected}-D but got ({ranks}) tensors"
            )
        raise RuntimeError(message)

    def _forward(
        self,
        input: Tensor | PackedSequence,
        hx: Any,
        lengths: Any = None,
        reset: Any = None,
        reset_to: Any = None,
    ) -> Any:
        weights = self._weights()
        if self.grad_clip is not None or self.grad_cut is not None:
            _check_gradient_rule(self.grad_clip, self.grad_cut)  # they may have been assigned to
        if reset_to is not None and reset is None:
            raise ValueError("expected reset to be given with reset_to, got None")
        plain = lengths is None and reset is None
        direct = backends.fast_path("direct_layers") if plain else None
        drops = self.training and self.dropout > 0
        if direct is not None and not drops and self._has_torchs_checks():
            found = direct(
                self._cell,
                input,
                hx,
                weights,
                self._packed_weights(weights),
                self._directions,
                self.input_size,
                self.proj_size or self.hidden_size,
                self.batch_first,
                self._keep,
                self.grad_clip,
                self.grad_cut,
            )
            if found is not None:
                return found
        options = {"lengths": lengths, "reset": reset, "reset_to": reset_to}
        if interop.is_traced(input, hx, **options):
            return interop.traced(self, input, hx, **options)
        if interop.runs_as_torchs([w for of_direction in weights for w in of_direction]):
            return interop.run_as_torchs(self, input, hx, **options)
        stack.check_plain("input", input.data if isinstance(input, PackedSequence) else input)
        self._check_projected(weights)
        if lengths is not None:
            return self._forward_lengths(input, hx, lengths, reset, reset_to)
        as_states = stack.as_state_pair if self._cell == "lstm" else stack.as_states
        states, put_back = as_states(hx), as_states(reset_to, "reset_to")
        if reset is not None:
            reset = resets.as_rows(reset, input, self.batch_first)
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, states, weights, reset, put_back)
        if input.dim() not in (2, 3):
            noun = " tensor" if self.mode.startswith("RNN") else ""
            raise ValueError(
                f"{self._kind}: Expected input to be 2D or 3D, got {input.dim()}D{noun} instead"
            )
        batched = input.dim() == 3
        batch_dim = 0 if self.batch_first else 1
        self._check_rank(states, batched)
        if not batched:
            input = input.unsqueeze(batch_dim)
            states = tuple(state.unsqueeze(1) for state in states)
            put_back = tuple(state.unsqueeze(1) for state in put_back)
        self._check_states(input, states, None)
        if self.batch_first:
            input = input.transpose(0, 1)
        self._check_put_back(put_back, input.size(1))
        output, finals = self._run(input, states, weights, None, reset, put_back)
        if self.batch_first:
            output = stack.reshaped(output, "transpose", 0, 1)
        if not batched:
            output = output.squeeze(batch_dim)
            finals = tuple(state.squeeze(1) for state in finals)
        return output, self._returned(finals)

    def _has_torchs_checks(self) -> bool:
        """Whether the checks are torch.nn's: the fast path would skip checks that a subclass put in their place."""
        cls, own = type(self), self.__dict__
        return all(
            name not in own and getattr(cls, name, None) in torchs
            for name, torchs in _CHECKS.items()
        )

    def _forward_lengths(self, input: Any, hx: Any, lengths: Any, reset: Any, reset_to: Any) -> Any:
        """A call with padded sequences, in any order, of these lengths: packs them, and pads the output with zeros."""
        if isinstance(input, PackedSequence):
            raise TypeError(
                "expected a padded input with lengths, got a PackedSequence, which has its own"
            )
        if input.dim() != 3:
            raise ValueError(f"expected a batched input, 3D, with lengths, got {input.dim()}D")
        batch = input.size(0 if self.batch_first else 1)
        steps = input.size(1 if self.batch_first else 0)
        given = packing.as_lengths(lengths, batch, steps)
        if reset is not None:
            rows = resets.as_rows(reset, input, self.batch_first).unsqueeze(-1)
            reset = packing.pack_padded_sequence(rows, given, enforce_sorted=False).data
        packed = packing.pack_padded_sequence(input, given, self.batch_first, enforce_sorted=False)
        output, finals = self._forward(packed, hx, None, reset, reset_to)
        return packing.pad_packed_sequence(output, self.batch_first, total_length=steps)[0], finals

    def _check_put_back(self, put_back: Sequence[Tensor], batch: Any) -> None:
        """Checks the shapes of `reset_to`."""
        if put_back:
            widths = [self.proj_size or self.hidden_size, self.hidden_size]
            layers = self.num_layers * self._directions
            resets.check_states(put_back, layers, batch, widths[: len(put_back)])

    def _forward_packed(
        self,
        input: PackedSequence,
        states: Sequence[Tensor],
        weights: Weights,
        reset: Tensor | None,
        put_back: Sequence[Tensor],
    ) -> Any:
        data, batch_sizes, sorted_indices, unsorted_indices = input
        self._check_states(data, states, batch_sizes)
        # A graph knows the batch of a packed sequence only at run time.
        if put_back and not torch.compiler.is_compiling():
            self._check_put_back(put_back, int(batch_sizes[0]))
        if sorted_indices is not None:
            states = tuple(state.index_select(1, sorted_indices) for state in states)
            put_back = tuple(state.index_select(1, sorted_indices) for state in put_back)
        output, finals = self._run(data, states, weights, batch_sizes, reset, put_back)
        if unsorted_indices is not None:
            finals = tuple(state.index_select(1, unsorted_indices) for state in finals)
        packed = PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices)
        return packed, self._returned(finals)

    def _returned(self, finals: tuple[Tensor, ...]) -> Any:
        return finals[0]

    @property
    def _kind(self) -> str:
        """The layer's name in torch.nn's error messages, also for subclasses of another name."""
        return self.mode.split("_")[0]


_CHECKS["check_input"].add(_Layers.check_input)


class _LayersOfOneState(_Layers):
    """The base of RNN and GRU, whose only state is h."""

    @overload
    def forward(
        self,
        input: Tensor,
        hx: Tensor | None = None,
        *,
        lengths: Lengths | None = None,
        reset: Tensor | None = None,
        reset_to: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def forward(
        self,
        input: PackedSequence,
        hx: Tensor | None = None,
        *,
        reset: Rows | None = None,
        reset_to: Tensor | None = None,
    ) -> tuple[PackedSequence, Tensor]: ...
    def forward(
        self,
        input: Any,
        hx: Tensor | None = None,
        *,
        lengths: Lengths | None = None,
        reset: Rows | None = None,
        reset_to: Tensor | None = None,
    ) -> Any:
        """Run the layer; see the class."""
        return self._forward(input, hx, lengths, reset, reset_to)

    if TYPE_CHECKING:  # nn.Module.__call__ is typed as returning Any
        __call__ = forward


class RNN(_LayersOfOneState):
    r"""Elman RNN, `torch.nn.RNN` on rnnkit's kernels.

    .. math:: h_t = \tanh(W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh})

    with ReLU in place of tanh if `nonlinearity` is `"relu"`.

    Args:
        input_size: I, features of the input.
        hidden_size: H, features of the hidden state.
        num_layers: L, number of stacked layers. Default 1.
        nonlinearity: `"tanh"` or `"relu"`. Default `"tanh"`.
        bias: whether the layer has `b_ih` and `b_hh`. Default True.
        batch_first: whether input and output are [N, T, ·] instead of [T, N, ·]. Default False.
        dropout: in training, probability of zeroing an element of the output of every layer except the last.
        bidirectional: whether a second direction runs from the end (D = 2). Default False.
        recompute: has no effect, since an RNN keeps only its output in any case. Default False.
        grad_clip: x to clip, in the backward pass, what each step passes back, the gradients of the states before it,
            elementwise to [-x, x]; Graves 2013 did so with the gradients of the gates' arguments. None for no limit.
            Default None.
        grad_cut: k to pass no gradients back across the boundaries between times k*j - 1 and k*j, in both directions:
            backpropagation through time truncated to windows of k steps, with the states as they are. None for no
            cuts. Default None.
        init: what initializes the parameters after torch.nn's own initialization, also in `reset_parameters()`: an
            initializer of `rnnkit.init` by its name (`"orthogonal"`, `"xavier"`, `"keras"` or `"identity"`), or a
            callable that takes the module. Default None.
        device, dtype: device and dtype of the parameters.

    Shape:
        input [T, N, I], [T, I] or a PackedSequence; `hx` [L*D, N, H] or [L*D, H], zeros if None.
        Returns the output [T, N, D*H] (or [T, D*H], or a PackedSequence) and `h_n`, shaped like `hx`.
        `lengths`, an int Tensor on any device or a list, [N]: of each sequence of a padded input, in any order. The
        output is zero behind a sequence's end, where its final states are and the reverse direction begins.
        `reset`, bool or 0/1, [T, N] ([N, T] if `batch_first`), [T] or the rows of a PackedSequence: where it is not 0,
        the sequence's states are put back before that step, h_0 included, to `reset_to`, shaped like `hx`, or zeros.
        The reverse direction is cut at the same places. No gradient crosses them, but `reset_to` gets its own.

    Raises:
        ValueError: the input's rank or dtype does not fit; in the constructor, an option has no such value or is not
            for this cell.
        RuntimeError: a size does not fit, or there is no time step.

    Source: Elman 1990, "Finding structure in time"; parameters and messages as in `torch.nn.RNN`.
    """

    _torchs = nn.RNN

    @property
    def _cell(self) -> str:  # type: ignore[override]
        return self.mode.lower()

    def _init(self, *args: Any, device: Device = None, **kwargs: Any) -> None:
        if "proj_size" in kwargs:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        if len(args) > 3:
            nonlinearity = args[3]
            args = args[:3] + args[4:]
        else:
            nonlinearity = kwargs.pop("nonlinearity", "tanh")
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(
                f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'."
            )
        self.nonlinearity = nonlinearity
        super().__init__(f"RNN_{nonlinearity.upper()}", *args, device=device, **kwargs)

    @_implemented_by(_init)
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        device: Device = None,
        dtype: torch.dtype | None = None,
        recompute: bool = False,
        grad_clip: float | None = None,
        grad_cut: int | None = None,
        init: Initializer | None = None,
    ) -> None: ...


class LSTM(_Layers):
    r"""Long short-term memory, `torch.nn.LSTM` on rnnkit's kernels.

    .. math::
        i, f, o &= \sigma(W_i x_t + b_i + W_{hi} h_{t-1} + b_{hi}), \ldots \\
        g &= \tanh(W_g x_t + b_g + W_{hg} h_{t-1} + b_{hg}) \\
        c_t &= f \odot c_{t-1} + i \odot g \\
        h_t &= o \odot \tanh(c_t) \quad (\text{then } W_{hr} h_t \text{ if } P > 0)

    Args:
        input_size: I, features of the input.
        hidden_size: H, features of the hidden and the cell state.
        num_layers: L, number of stacked layers. Default 1.
        bias: whether the layer has `b_ih` and `b_hh`. Default True.
        batch_first: whether input and output are [N, T, ·] instead of [T, N, ·]. Default False.
        dropout: in training, probability of zeroing an element of the output of every layer except the last.
        bidirectional: whether a second direction runs from the end (D = 2). Default False.
        proj_size: P < H, features of the projected hidden state; 0 for none. Default 0.
        recompute: whether the backward pass recomputes the gates instead of keeping them. This takes a fraction of
            the memory and about a third more time; the gradients are equal up to rounding. Default False.
        grad_clip: x to clip, in the backward pass, what each step passes back, the gradients of the states before it,
            elementwise to [-x, x]; Graves 2013 did so with the gradients of the gates' arguments. None for no limit.
            Default None.
        grad_cut: k to pass no gradients back across the boundaries between times k*j - 1 and k*j, in both directions:
            backpropagation through time truncated to windows of k steps, with the states as they are. None for no
            cuts. Default None.
        init: what initializes the parameters after torch.nn's own initialization, also in `reset_parameters()`: an
            initializer of `rnnkit.init` by its name (`"orthogonal"`, `"xavier"`, `"keras"` or `"forget_bias"`), or a
            callable that takes the module. Default None.
        device, dtype: device and dtype of the parameters.

    Shape:
        input [T, N, I], [T, I] or a PackedSequence; `hx` a pair h_0 [L*D, N, P or H], c_0 [L*D, N, H]
        (without N for an unbatched input), zeros if None. Returns the output [T, N, D*(P or H)] (or
        [T, ·], or a PackedSequence) and `(h_n, c_n)`, shaped like `hx`. Gate order i, f, g, o.
        `lengths`, an int Tensor on any device or a list, [N]: of each sequence of a padded input, in any order. The
        output is zero behind a sequence's end, where its final states are and the reverse direction begins.
        `reset`, bool or 0/1, [T, N] ([N, T] if `batch_first`), [T] or the rows of a PackedSequence: where it is not 0,
        the sequence's states are put back before that step, h_0 included, to `reset_to`, shaped like `hx`, or zeros.
        The reverse direction is cut at the same places. No gradient crosses them, but `reset_to` gets its own.

    Raises:
        ValueError: the input's rank or dtype does not fit; in the constructor, an option has no such value or is not
            for this cell.
        RuntimeError: a size does not fit, or there is no time step.

    Source: Hochreiter & Schmidhuber 1997, with forget gates (Gers et al. 2000); projection: Sak et al.
    2014; parameters and messages as in `torch.nn.LSTM`.
    """

    _torchs = nn.LSTM
    _cell = "lstm"
    get_expected_cell_size = nn.LSTM.get_expected_cell_size
    check_forward_args = nn.LSTM.check_forward_args  # type: ignore[assignment]
    permute_hidden = nn.LSTM.permute_hidden  # type: ignore[assignment]

    def _init(self, *args: Any, device: Device = None, **kwargs: Any) -> None:
        super().__init__("LSTM", *args, device=device, **kwargs)

    @_implemented_by(_init)
    def __init__(
        self,
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
        init: Initializer | None = None,
    ) -> None: ...

    def _returned(self, finals: tuple[Tensor, ...]) -> Any:
        return finals

    @overload
    def forward(
        self,
        input: Tensor,
        hx: States | None = None,
        *,
        lengths: Lengths | None = None,
        reset: Tensor | None = None,
        reset_to: States | None = None,
    ) -> tuple[Tensor, States]: ...
    @overload
    def forward(
        self,
        input: PackedSequence,
        hx: States | None = None,
        *,
        reset: Rows | None = None,
        reset_to: States | None = None,
    ) -> tuple[PackedSequence, States]: ...
    def forward(
        self,
        input: Any,
        hx: States | None = None,
        *,
        lengths: Lengths | None = None,
        reset: Rows | None = None,
        reset_to: States | None = None,
    ) -> Any:
        """Run the layer; see the class."""
        return self._forward(input, hx, lengths, reset, reset_to)

    if TYPE_CHECKING:  # nn.Module.__call__ is typed as returning Any
        __call__ = forward


class GRU(UpdateGate, _LayersOfOneState):
    r"""Gated recurrent unit, `torch.nn.GRU` on rnnkit's kernels.

    .. math::
        r, z &= \sigma(W_r x_t + b_r + W_{hr} h_{t-1} + b_{hr}), \ldots \\
        n &= \tanh(W_n x_t + b_n + r \odot (W_{hn} h_{t-1} + b_{hn})) \\
        h_t &= (1 - z) \odot n + z \odot h_{t-1}

    or, if the update gate z `"writes"`, :math:`h_t = z \odot n + (1 - z) \odot h_{t-1}`.

    Args:
        input_size: I, features of the input.
        hidden_size: H, features of the hidden state.
        num_layers: L, number of stacked layers. Default 1.
        bias: whether the layer has `b_ih` and `b_hh`. Default True.
        batch_first: whether input and output are [N, T, ·] instead of [T, N, ·]. Default False.
        dropout: in training, probability of zeroing an element of the output of every layer except the last.
        bidirectional: whether a second direction runs from the end (D = 2). Default False.
        recompute: whether the backward pass recomputes the gates instead of keeping them. This takes a fraction of
            the memory and about a third more time; the gradients are equal up to rounding. Default False.
        update_gate: what z = 1 does: `"keeps"` the unit's state, as in torch.nn, or `"writes"` the new value, as in
            Chung et al. 2014 and most textbooks. Default `"keeps"`. `convert_update_gate` turns a trained layer of one
            kind into one of the other.
        grad_clip: x to clip, in the backward pass, what each step passes back, the gradients of the states before it,
            elementwise to [-x, x]; Graves 2013 did so with the gradients of the gates' arguments. None for no limit.
            Default None.
        grad_cut: k to pass no gradients back across the boundaries between times k*j - 1 and k*j, in both directions:
            backpropagation through time truncated to windows of k steps, with the states as they are. None for no
            cuts. Default None.
        init: what initializes the parameters after torch.nn's own initialization, also in `reset_parameters()`: an
            initializer of `rnnkit.init` by its name (`"orthogonal"`, `"xavier"` or `"keras"`), or a
            callable that takes the module. Default None.
        device, dtype: device and dtype of the parameters.

    Shape:
        input [T, N, I], [T, I] or a PackedSequence; `hx` [L*D, N, H] or [L*D, H], zeros if None.
        Returns the output [T, N, D*H] (or [T, D*H], or a PackedSequence) and `h_n`, shaped like `hx`.
        Gate order r, z, n.
        `lengths`, an int Tensor on any device or a list, [N]: of each sequence of a padded input, in any order. The
        output is zero behind a sequence's end, where its final states are and the reverse direction begins.
        `reset`, bool or 0/1, [T, N] ([N, T] if `batch_first`), [T] or the rows of a PackedSequence: where it is not 0,
        the sequence's states are put back before that step, h_0 included, to `reset_to`, shaped like `hx`, or zeros.
        The reverse direction is cut at the same places. No gradient crosses them, but `reset_to` gets its own.

    Raises:
        ValueError: the input's rank or dtype does not fit; in the constructor, an option has no such value or is not
            for this cell.
        RuntimeError: a size does not fit, or there is no time step.

    Source: Cho et al. 2014, with r multiplying the recurrent part after its bias, as in PyTorch; parameters and
    messages as in `torch.nn.GRU`.
    """

    _torchs = nn.GRU

    def _init(
        self, *args: Any, device: Device = None, update_gate: str = "keeps", **kwargs: Any
    ) -> None:
        if "proj_size" in kwargs:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        self._set_update_gate(update_gate)
        super().__init__("GRU", *args, device=device, **kwargs)

    @_implemented_by(_init)
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        device: Device = None,
        dtype: torch.dtype | None = None,
        recompute: bool = False,
        update_gate: str = "keeps",
        grad_clip: float | None = None,
        grad_cut: int | None = None,
        init: Initializer | None = None,
    ) -> None: ...

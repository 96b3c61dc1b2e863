"""RNN, LSTM and GRU: torch.nn's layers, run by `stack.run`.

They subclass `nn.RNNBase`, which provides parameters, initialization, state_dict, checks and error messages. They do
not subclass `nn.RNN`, `nn.LSTM` or `nn.GRU`, because torch.compile breaks the graph at these classes.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, TypeVar, cast, overload

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from rnnkit import backends, interop, options, packing, resets, specs, stack
from rnnkit.call import Keep
from rnnkit.init import Initialized, Initializer
from rnnkit.initial_states import InitialStates
from rnnkit.interop import Interop
from rnnkit.layer_norm import LayerNorms
from rnnkit.update_gate import UpdateGate

Device = torch.device | str | int | None
States = tuple[Tensor, Tensor]
Rows = Tensor | PackedSequence
Lengths = Tensor | Sequence[int]
Zoneout = float | tuple[float, float]
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


class _Asked(NamedTuple):
    """The keyword arguments of a call, which torch.nn's layers do not have."""

    lengths: Any = None
    reset: Any = None
    reset_to: Any = None
    all_states: bool | None = None

    @property
    def given(self) -> dict[str, Any]:
        """Name -> value of each argument that was given."""
        return {name: value for name, value in self._asdict().items() if value is not None}


_NOTHING = _Asked()  # the arguments of an ordinary call, by which `_forward` knows it


def _asked(lengths: Any, reset: Any, reset_to: Any, all_states: Any) -> _Asked:
    """The arguments of a call that has some; raises a TypeError if `all_states` is no bool."""
    if not isinstance(all_states, bool):
        raise TypeError(f"expected all_states to be a bool, got {all_states!r}")
    return _Asked(lengths, reset, reset_to, all_states or None)


#: `weight_dropout`, `recurrent_dropout` and `zoneout` of an ordinary layer.
_NO_NOISE = (0, 0, 0)

#: The options that a constructor takes: all but the one that `rnnkit.freeze` sets.
_CONSTRUCTED = [name for name in options.OPTIONS if name != "frozen"]


def _implemented_by(implementation: Callable[..., None]) -> Callable[[Init], Init]:
    """Replaces an `__init__` by `implementation`, but keeps its signature for readers and type checkers.

    `implementation` takes any arguments, as torch.nn's constructors do: torch's base class checks them, so that the
    errors are torch's.
    """

    def decorate(shown: Init) -> Init:
        return cast(Init, functools.update_wrapper(implementation, shown))

    return decorate


class _Layers(Initialized, Interop, InitialStates, LayerNorms):
    """The base of RNN, LSTM and GRU: turns torch.nn's arguments into a call of `stack.run`, and its results back."""

    # `options.OPTIONS` has their meaning; these are the defaults, also for modules pickled by a version without them.
    recompute = frozen = False
    grad_clip: float | None = None
    grad_cut: int | None = None
    weight_dropout: float = 0.0
    recurrent_dropout: float = 0.0
    zoneout: Zoneout = 0.0
    _packed: tuple[Tensor, ...] = ()
    _heads = 1
    _has_output = False  #: Whether the output is no state, see `stack.run`.
    _torchs: ClassVar[type[nn.RNNBase]]
    _cell: str  #: The cell's name in `specs.CELLS`.

    def __init__(self, *args: Any, device: Device = None, **kwargs: Any) -> None:
        own = {name: kwargs.pop(name) for name in _CONSTRUCTED if name in kwargs}
        options.check(own)
        if device is not None:  # None: `device` may still be one of the positional args
            kwargs["device"] = device
        super().__init__(*args, **kwargs)
        self.recompute = False
        for name, value in own.items():
            if value != getattr(self, name):
                setattr(self, name, tuple(value) if isinstance(value, list) else value)
        self._zoneouts()  # checks it

    def extra_repr(self) -> str:
        """torch.nn's `extra_repr`, followed by rnnkit's own options where they are set."""
        added = [f", {name}={value}" for name, value in options.changed(self).items()]
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
            self._packed = stack.pack(
                self._cell, weights, directions=self._directions, heads=self._heads
            )
        return self._packed

    @property
    def _directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def _keep(self) -> Keep:
        return Keep.STATES if self.recompute else Keep.EVERYTHING

    def _weights(self) -> Weights:
        """The tensors of `specs.WEIGHTS` and, with `layer_norm`, of `specs.NORMS` for each layer and direction."""
        if len(self._all_weights) != self.num_layers * self._directions:
            raise RuntimeError(
                f"expected num_layers={self.num_layers} and bidirectional={self.bidirectional} to be unchanged since "
                f"the layer was made with weights for {len(self._all_weights)} layers and directions"
            )
        found: Weights = []
        kinds = self._kinds()
        for names in self._all_weights:
            if len(names) != kinds:
                raise RuntimeError(
                    f"expected weights for bias={self.bias} and proj_size={self.proj_size}, got {', '.join(names)}: "
                    "these attributes cannot be changed after a layer was made"
                )
            found.append(self._of_direction(stack.parameters(self, names)))
            if self._normalizes:
                found[-1] += self._norms(names)
        return found

    def _kinds(self) -> int:
        """The number of parameters in `_all_weights` of each layer and direction."""
        return 2 + 2 * bool(self.bias) + (self.proj_size > 0)

    def _of_direction(self, given: list[Tensor | None]) -> list[Tensor | None]:
        """The weights of one direction as a call takes them, from the parameters in `_all_weights`."""
        biases = given[2:4] if self.bias else [None, None]
        return [*given[:2], *biases, given[-1] if self.proj_size > 0 else None]

    @property
    def _spec(self) -> specs.CellSpec:
        return specs.of(self._cell)

    def _run(
        self,
        input: Tensor,
        states: Sequence[Tensor],
        weights: Weights,
        batch_sizes: Tensor | None,
        reset: Tensor | None = None,
        reset_to: Sequence[Tensor] = (),
        all_states: bool = False,
    ) -> tuple[list[Tensor], tuple[Tensor, ...]]:
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
        packed: tuple[Tensor, ...] = ()
        if self.training and self.weight_dropout > 0:
            weights = stack.with_dropped_weights(weights, self.weight_dropout)
        else:
            packed = self._packed_weights(weights)
        return stack.run(
            self._cell,
            input,
            states,
            weights,
            batch_sizes,
            directions=self._directions,
            heads=self._heads,
            dropout=self.dropout if self.training else 0.0,
            keep=self._keep,
            packed=packed,
            # 0 for no limit: an AOTInductor package cannot hold infinity.
            grad_clip=0.0 if self.grad_clip in (None, math.inf) else self.grad_clip,
            grad_cut=0 if self.grad_cut is None else self.grad_cut,
            reset=reset,
            reset_to=reset_to,
            all_states=all_states,
            recurrent_dropout=self.recurrent_dropout if self.training else 0.0,
            zoneout=self._zoneouts(),
            draws=self.training,
            has_output=self._has_output,
        )

    def _zoneouts(self) -> tuple[float, ...]:
        """`zoneout` for each state; empty for none."""
        if self.zoneout == 0:
            return ()
        states = len(self._state_names)
        given = self.zoneout
        found = tuple(given) if isinstance(given, tuple | list) else (given,) * states
        if len(found) != states:
            several = ("", "", " or a pair")[states] if states < 3 else f" or {states} of them"
            raise ValueError(f"expected zoneout to be a number{several}, got {given}")
        if self.proj_size > 0 and found[0] > 0:
            pair = ", ".join(["0", *["p"] * (states - 1)])
            raise ValueError(f"expected zoneout to be ({pair}) with proj_size, got {given}")
        return found if any(found) else ()

    def _check_projected(self, weights: Weights) -> None:
        """Checks the weights against hidden_size and proj_size; torch.nn's own check covers input_size."""
        expected, w_hh = (self.proj_size or self.hidden_size) // self._heads, weights[0][1]
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
        if batch_sizes is not None and torch.compiler.is_compiling():
            # A graph knows the batch only at run time.
            packing.check_batch(states, batch_sizes, "hx")
        elif states:
            hx = states if len(states) > 1 else states[0]
            self.check_forward_args(input, hx, batch_sizes)  # type: ignore[arg-type]

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
            names = " and ".join(f"{name}x" for name in self._state_names)
            message = f"For {given}, {names} should also be {expected}-D but got ({ranks}) tensors"
        raise RuntimeError(message)

    def _forward(self, input: Any, hx: Any, asked: _Asked) -> Any:
        weights = self._weights()
        beyond = self._normalizes or self._heads > 1  # the fast path has none of these
        beyond = beyond or (self.training and self.dropout > 0)
        noise = self.weight_dropout, self.recurrent_dropout, self.zoneout
        if self.grad_clip is not None or self.grad_cut is not None or noise != _NO_NOISE:
            options.check(options.changed(self))  # they may have been assigned to
            beyond = beyond or bool(self._zoneouts()) or (self.training and noise[:2] != (0, 0))
        if asked.reset_to is not None and asked.reset is None:
            raise ValueError("expected reset to be given with reset_to, got None")
        if self._learns:
            if (found := self._elsewhere(input, hx, asked, weights)) is not None:
                return found
            hx, asked = self._with_learned(input, hx, asked)
        plain = asked is _NOTHING
        direct = backends.fast_path("direct_layers") if plain else None
        if direct is not None and not beyond and self._has_torchs_checks():
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
        if not self._learns and (found := self._elsewhere(input, hx, asked, weights)) is not None:
            return found
        self._check_projected(weights)
        if asked.lengths is not None:
            return self._forward_lengths(input, hx, asked)
        states, put_back = self._as_states(hx), self._as_states(asked.reset_to, "reset_to")
        reset, all_states = asked.reset, bool(asked.all_states)
        if reset is not None:
            reset = resets.as_rows(reset, input, self.batch_first)
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, states, weights, reset, put_back, all_states)
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
        outputs, finals = self._run(input, states, weights, None, reset, put_back, all_states)
        if self.batch_first:
            outputs = [stack.reshaped(output, "transpose", 0, 1) for output in outputs]
        if not batched:
            outputs = [output.squeeze(batch_dim) for output in outputs]
            finals = tuple(state.squeeze(1) for state in finals)
        return self._returned(outputs, finals, all_states)

    def _elsewhere(self, input: Any, hx: Any, asked: _Asked, weights: Weights) -> Any:
        """The result of a call that is recorded by torch.fx or run by torch.nn's own forward; None for others."""
        if interop.is_traced(input, hx, **asked.given):
            return interop.traced(self, input, hx, **asked.given)
        if interop.runs_as_torchs([w for of_direction in weights for w in of_direction]):
            return interop.run_as_torchs(self, input, hx, **asked.given)
        stack.check_plain("input", input.data if isinstance(input, PackedSequence) else input)
        return None

    def _with_learned(self, input: Any, hx: Any, asked: _Asked) -> tuple[Any, _Asked]:
        """`hx` and the other arguments with the learned states in the place of zeros."""
        if hx is None:
            hx = self._learned(input)
        if asked.reset is not None and asked.reset_to is None:
            asked = asked._replace(reset_to=self._learned(input))
        return hx, asked

    def _has_torchs_checks(self) -> bool:
        """Whether the checks are torch.nn's: the fast path would skip checks that a subclass put in their place."""
        cls, own = type(self), self.__dict__
        return all(
            name not in own and getattr(cls, name, None) in torchs
            for name, torchs in _CHECKS.items()
        )

    def _forward_lengths(self, input: Any, hx: Any, asked: _Asked) -> Any:
        """A call with padded sequences, in any order, of these lengths: packs them, and pads the output with zeros."""
        if isinstance(input, PackedSequence):
            raise TypeError(
                "expected a padded input with lengths, got a PackedSequence, which has its own"
            )
        if input.dim() != 3:
            raise ValueError(f"expected a batched input, 3D, with lengths, got {input.dim()}D")
        batch = input.size(0 if self.batch_first else 1)
        steps = input.size(1 if self.batch_first else 0)
        lengths = packing.as_lengths(asked.lengths, batch, steps)
        if batch == 0 and not torch.compiler.is_compiling():  # nothing to pack
            return self._forward(input, hx, asked._replace(lengths=None))
        pack, pad = packing.ways(lengths, steps, self.batch_first, input.device)
        packed, reset = pack(input), asked.reset
        if reset is not None:
            reset = resets.as_rows(reset, input, self.batch_first)
            reset = pack(reset.t() if self.batch_first else reset).data

        done: dict[int, Tensor] = {}  # h is the output, and among the states

        def padded(output: Any) -> Any:
            if not isinstance(output, PackedSequence):
                return tuple(map(padded, output))
            if id(output) not in done:
                done[id(output)] = pad(output)
            return done[id(output)]

        output, finals, *states = self._forward(
            packed, hx, asked._replace(lengths=None, reset=reset)
        )
        return padded(output), finals, *map(padded, states)

    def _check_put_back(self, put_back: Sequence[Tensor], batch: Any) -> None:
        """Checks the shapes of `reset_to`; `batch`: N, or None where only a graph will know it."""
        if put_back:
            widths = [self.hidden_size] * len(put_back)
            widths[0] = self.proj_size or self.hidden_size
            resets.check_states(put_back, self.num_layers * self._directions, batch, widths)

    def _forward_packed(
        self,
        input: PackedSequence,
        states: Sequence[Tensor],
        weights: Weights,
        reset: Tensor | None,
        put_back: Sequence[Tensor],
        all_states: bool,
    ) -> Any:
        data, batch_sizes, sorted_indices, unsorted_indices = input
        self._check_states(data, states, batch_sizes)
        if torch.compiler.is_compiling():
            self._check_put_back(put_back, None)
            packing.check_batch(put_back, batch_sizes, "reset_to")
        elif put_back:
            self._check_put_back(put_back, int(batch_sizes[0]))
        if sorted_indices is not None:
            states = tuple(state.index_select(1, sorted_indices) for state in states)
            put_back = tuple(state.index_select(1, sorted_indices) for state in put_back)
        outputs, finals = self._run(data, states, weights, batch_sizes, reset, put_back, all_states)
        if unsorted_indices is not None:
            finals = tuple(state.index_select(1, unsorted_indices) for state in finals)
        order = batch_sizes, sorted_indices, unsorted_indices
        packed = [PackedSequence(output, *order) for output in outputs]
        return self._returned(packed, finals, all_states)

    def _returned(self, outputs: Sequence[Any], finals: Sequence[Tensor], all_states: bool) -> Any:
        """What a call returns: the states have the form of `hx`."""
        if not all_states:
            return outputs[0], self._as_hx(finals)
        return outputs[0], self._as_hx(finals), self._as_hx(outputs[self._has_output :])

    def _as_states(self, hx: Any, name: str = "hx") -> tuple[Tensor, ...]:
        """The states from `hx`, or another argument of this form; empty, which stands for zeros, if it is None."""
        if len(self._state_names) == 1:
            return stack.as_states(hx, name)
        return stack.as_several_states(self._state_names, self._kind.lower(), hx, name)

    def _as_hx(self, states: Sequence[Any]) -> Any:
        return states[0] if len(self._state_names) == 1 else tuple(states)

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
        all_states: Literal[False] = False,
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def forward(
        self,
        input: PackedSequence,
        hx: Tensor | None = None,
        *,
        reset: Rows | None = None,
        reset_to: Tensor | None = None,
        all_states: Literal[False] = False,
    ) -> tuple[PackedSequence, Tensor]: ...
    @overload
    def forward(
        self,
        input: Tensor,
        hx: Tensor | None = None,
        *,
        lengths: Lengths | None = None,
        reset: Tensor | None = None,
        reset_to: Tensor | None = None,
        all_states: Literal[True],
    ) -> tuple[Tensor, Tensor, Tensor]: ...
    @overload
    def forward(
        self,
        input: PackedSequence,
        hx: Tensor | None = None,
        *,
        reset: Rows | None = None,
        reset_to: Tensor | None = None,
        all_states: Literal[True],
    ) -> tuple[PackedSequence, Tensor, PackedSequence]: ...
    def forward(
        self,
        input: Any,
        hx: Tensor | None = None,
        *,
        lengths: Lengths | None = None,
        reset: Rows | None = None,
        reset_to: Tensor | None = None,
        all_states: bool = False,
    ) -> Any:
        """Run the layer; see the class."""
        asked = _NOTHING
        if (
            lengths is not None
            or reset is not None
            or reset_to is not None
            or all_states is not False
        ):
            asked = _asked(lengths, reset, reset_to, all_states)
        return self._forward(input, hx, asked)

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
        weight_dropout: in training, probability of zeroing an element of the recurrent matrices `weight_hh` (the others
            are divided by 1 - p): one mask for all steps of a call. DropConnect, Wan et al. 2013. Default 0.
        recurrent_dropout: in training, probability of zeroing an element of h_{t-1} where `weight_hh` multiplies it
            (the others are divided by 1 - p): the same ones at all steps of a sequence, in each layer and direction. h
            itself stays as it is. Gal and Ghahramani 2016. Default 0.
        zoneout: p to keep, in training, each unit's old state at each step with probability p; in evaluation a step
            gives the expectation, p h_{t-1} + (1 - p) h_t. Krueger et al. 2017. Default 0.
        learn_initial_state: whether the states before the first step are parameters, `h_0` [L*D, H], zeros at first. A
            call without `hx` begins with them, and `reset` without `reset_to` puts back to them. Default False.
        layer_norm: whether W_ih x_t and W_hh h_{t-1} are normalized, each over all its values, and multiplied with the
            parameters `norm_ih_l0` and `norm_hh_l0` [H] and so on, before the biases are added. Ba, Kiros and Hinton
            2016, as in haste. Default False.
        init: what initializes the parameters after torch.nn's own initialization, also in `reset_parameters()`: an
            initializer of `rnnkit.init` by its name (`"orthogonal"`, `"xavier"`, `"keras"` or `"identity"`), or a
            callable that takes the module. Default None.
        device, dtype: device and dtype of the parameters.

    Shape:
        input [T, N, I], [T, I] or a PackedSequence; `hx` [L*D, N, H] or [L*D, H], zeros or the learned states if None.
        Returns the output [T, N, D*H] (or [T, D*H], or a PackedSequence) and `h_n`, shaped like `hx`.
        `lengths`, an int Tensor on any device or a list, [N]: of each sequence of a padded input, in any order. The
        output is zero behind a sequence's end, where its final states are and the reverse direction begins.
        `reset`, bool or 0/1, [T, N] ([N, T] if `batch_first`), [T] or the rows of a PackedSequence: where it is not 0,
        the sequence's states are put back before that step, h_0 included, to `reset_to`, shaped like `hx`, or zeros.
        The reverse direction is cut at the same places. No gradient crosses them, but `reset_to` gets its own.
        With `all_states=True` a third result is the last layer's states after each step, in the form of `hx`: here the
        output itself.

    Raises:
        TypeError: an argument is of the wrong type.
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
        weight_dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        zoneout: float = 0.0,
        learn_initial_state: bool = False,
        layer_norm: bool = False,
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
        weight_dropout: in training, probability of zeroing an element of the recurrent matrices `weight_hh` (the others
            are divided by 1 - p): one mask for all steps of a call. DropConnect, Wan et al. 2013. Default 0.
        recurrent_dropout: in training, probability of zeroing an element of h_{t-1} where `weight_hh` multiplies it
            (the others are divided by 1 - p): the same ones at all steps of a sequence, in each layer and direction. h
            itself stays as it is. Gal and Ghahramani 2016. Default 0.
        zoneout: p to keep, in training, each unit's old h and c, apart from each other, at each step with probability
            p; or (p_h, p_c). In evaluation a step gives the expectation, p h_{t-1} + (1 - p) h_t, and so for c. h_t is
            computed of the c_t that zoneout has not touched. Krueger et al. 2017. Default 0.
        learn_initial_state: whether the states before the first step are parameters, `h_0` [L*D, P or H] and
            `c_0` [L*D, H], zeros at first. A call without `hx` begins with them, and `reset` without `reset_to` puts
            back to them. Default False.
        layer_norm: whether W_ih x_t and W_hh h_{t-1} are normalized, each over all its values, and multiplied with the
            parameters `norm_ih_l0` and `norm_hh_l0` [4*H] and so on, before the biases are added; and so is c_t over
            its H values where h_t is made of it, h_t = o ⊙ tanh(norm(c_t) ⊙ norm_c + norm_c_bias), with `norm_c_l0` and
            `norm_c_bias_l0` [H]. Ba, Kiros and Hinton 2016, as in haste. Default False.
        init: what initializes the parameters after torch.nn's own initialization, also in `reset_parameters()`: an
            initializer of `rnnkit.init` by its name (`"orthogonal"`, `"xavier"`, `"keras"` or `"forget_bias"`), or a
            callable that takes the module. Default None.
        device, dtype: device and dtype of the parameters.

    Shape:
        input [T, N, I], [T, I] or a PackedSequence; `hx` a pair h_0 [L*D, N, P or H], c_0 [L*D, N, H]
        (without N for an unbatched input), zeros or the learned states if None. Returns the output [T, N, D*(P or H)]
        (or [T, ·], or a PackedSequence) and `(h_n, c_n)`, shaped like `hx`. Gate order i, f, g, o.
        `lengths`, an int Tensor on any device or a list, [N]: of each sequence of a padded input, in any order. The
        output is zero behind a sequence's end, where its final states are and the reverse direction begins.
        `reset`, bool or 0/1, [T, N] ([N, T] if `batch_first`), [T] or the rows of a PackedSequence: where it is not 0,
        the sequence's states are put back before that step, h_0 included, to `reset_to`, shaped like `hx`, or zeros.
        The reverse direction is cut at the same places. No gradient crosses them, but `reset_to` gets its own.
        With `all_states=True` a third result is the last layer's states after each step, in the form of `hx`: a pair of
        the output and c [T, N, D*H], laid out like it.

    Raises:
        TypeError: an argument is of the wrong type.
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
        weight_dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        zoneout: Zoneout = 0.0,
        learn_initial_state: bool = False,
        layer_norm: bool = False,
        init: Initializer | None = None,
    ) -> None: ...

    @overload
    def forward(
        self,
        input: Tensor,
        hx: States | None = None,
        *,
        lengths: Lengths | None = None,
        reset: Tensor | None = None,
        reset_to: States | None = None,
        all_states: Literal[False] = False,
    ) -> tuple[Tensor, States]: ...
    @overload
    def forward(
        self,
        input: PackedSequence,
        hx: States | None = None,
        *,
        reset: Rows | None = None,
        reset_to: States | None = None,
        all_states: Literal[False] = False,
    ) -> tuple[PackedSequence, States]: ...
    @overload
    def forward(
        self,
        input: Tensor,
        hx: States | None = None,
        *,
        lengths: Lengths | None = None,
        reset: Tensor | None = None,
        reset_to: States | None = None,
        all_states: Literal[True],
    ) -> tuple[Tensor, States, States]: ...
    @overload
    def forward(
        self,
        input: PackedSequence,
        hx: States | None = None,
        *,
        reset: Rows | None = None,
        reset_to: States | None = None,
        all_states: Literal[True],
    ) -> tuple[PackedSequence, States, tuple[PackedSequence, PackedSequence]]: ...
    def forward(
        self,
        input: Any,
        hx: States | None = None,
        *,
        lengths: Lengths | None = None,
        reset: Rows | None = None,
        reset_to: States | None = None,
        all_states: bool = False,
    ) -> Any:
        """Run the layer; see the class."""
        asked = _NOTHING
        if (
            lengths is not None
            or reset is not None
            or reset_to is not None
            or all_states is not False
        ):
            asked = _asked(lengths, reset, reset_to, all_states)
        return self._forward(input, hx, asked)

    if TYPE_CHECKING:  # nn.Module.__call__ is typed as returning Any
        __call__ = forward


class GRU(UpdateGate, _LayersOfOneState):
    r"""Gated recurrent unit, `torch.nn.GRU` on rnnkit's kernels.

    .. math::
        r, z &= \sigma(W_r x_t + b_r + W_{hr} h_{t-1} + b_{hr}), \ldots \\
        n &= \tanh(W_n x_t + b_n + r \odot (W_{hn} h_{t-1} + b_{hn})) \\
        h_t &= (1 - z) \odot n + z \odot h_{t-1}

    or, if the update gate z `"writes"`, :math:`h_t = z \odot n + (1 - z) \odot h_{t-1}`, and if the reset gate r comes
    `"before"` the product, :math:`n = \tanh(W_n x_t + b_n + W_{hn} (r \odot h_{t-1}) + b_{hn})`.

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
        reset: whether the reset gate multiplies `"after"` the recurrent product, as in torch.nn, or `"before"`, as in
            Cho et al. 2014 and in Keras with `reset_after=False`: a second product in each step, which has to wait for
            the first. Weights of one kind are of no use to the other. Default `"after"`.
        grad_clip: x to clip, in the backward pass, what each step passes back, the gradients of the states before it,
            elementwise to [-x, x]; Graves 2013 did so with the gradients of the gates' arguments. None for no limit.
            Default None.
        grad_cut: k to pass no gradients back across the boundaries between times k*j - 1 and k*j, in both directions:
            backpropagation through time truncated to windows of k steps, with the states as they are. None for no
            cuts. Default None.
        weight_dropout: in training, probability of zeroing an element of the recurrent matrices `weight_hh` (the others
            are divided by 1 - p): one mask for all steps of a call. DropConnect, Wan et al. 2013. Default 0.
        recurrent_dropout: in training, probability of zeroing an element of h_{t-1} where `weight_hh` multiplies it
            (the others are divided by 1 - p): the same ones at all steps of a sequence, in each layer and direction. h
            itself stays as it is. Gal and Ghahramani 2016. Default 0.
        zoneout: p to keep, in training, each unit's old state at each step with probability p; in evaluation a step
            gives the expectation, p h_{t-1} + (1 - p) h_t. Krueger et al. 2017. Default 0.
        learn_initial_state: whether the states before the first step are parameters, `h_0` [L*D, H], zeros at first. A
            call without `hx` begins with them, and `reset` without `reset_to` puts back to them. Default False.
        layer_norm: whether W_ih x_t and W_hh h_{t-1} are normalized, each over all its values, and multiplied with the
            parameters `norm_ih_l0` and `norm_hh_l0` [3*H] and so on, before the biases are added. Ba, Kiros and Hinton
            2016, as in haste. Default False.
        init: what initializes the parameters after torch.nn's own initialization, also in `reset_parameters()`: an
            initializer of `rnnkit.init` by its name (`"orthogonal"`, `"xavier"` or `"keras"`), or a
            callable that takes the module. Default None.
        device, dtype: device and dtype of the parameters.

    Shape:
        input [T, N, I], [T, I] or a PackedSequence; `hx` [L*D, N, H] or [L*D, H], zeros or the learned states if None.
        Returns the output [T, N, D*H] (or [T, D*H], or a PackedSequence) and `h_n`, shaped like `hx`.
        Gate order r, z, n.
        `lengths`, an int Tensor on any device or a list, [N]: of each sequence of a padded input, in any order. The
        output is zero behind a sequence's end, where its final states are and the reverse direction begins.
        `reset`, bool or 0/1, [T, N] ([N, T] if `batch_first`), [T] or the rows of a PackedSequence: where it is not 0,
        the sequence's states are put back before that step, h_0 included, to `reset_to`, shaped like `hx`, or zeros.
        The reverse direction is cut at the same places. No gradient crosses them, but `reset_to` gets its own.
        With `all_states=True` a third result is the last layer's states after each step, in the form of `hx`: here the
        output itself.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: the input's rank or dtype does not fit; in the constructor, an option has no such value or is not
            for this cell.
        RuntimeError: a size does not fit, or there is no time step.

    Source: Cho et al. 2014; by default with r multiplying the recurrent part after its bias, as in PyTorch; parameters
    and messages as in `torch.nn.GRU`.
    """

    _torchs = nn.GRU

    def _init(
        self,
        *args: Any,
        device: Device = None,
        update_gate: str = "keeps",
        reset: str = "after",
        **kwargs: Any,
    ) -> None:
        if "proj_size" in kwargs:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        self._set_gates(update_gate, reset)
        if self._resets_before and kwargs.get("layer_norm"):
            raise ValueError("expected layer_norm to be False with reset='before', got True")
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
        reset: str = "after",
        grad_clip: float | None = None,
        grad_cut: int | None = None,
        weight_dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        zoneout: float = 0.0,
        learn_initial_state: bool = False,
        layer_norm: bool = False,
        init: Initializer | None = None,
    ) -> None: ...

"""`LayerCall`: the arguments of one layer's ops by name, their sizes and checks, and the shapes of the results.

`torch.ops.rnnkit.layer_forward` and `layer_backward` take flat arguments that begin with `ARGUMENTS`; all other Python
code takes a `LayerCall`, or a `BackwardCall`, which adds the arguments of the backward pass. The C++ kernels check the
arguments themselves, and call `refuse` to raise the error.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from enum import IntEnum
from itertools import accumulate
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from rnnkit import specs
from rnnkit.specs import NORMS, UNIT, WEIGHTS, CellSpec

#: The first arguments in the ops' schemas: the fields of `LayerCall`.
ARGUMENTS = (
    "str cell, Tensor input, Tensor[] states, Tensor?[] weights, Tensor? batch_sizes, bool all_states, "
    "float grad_clip, int grad_cut, Tensor? reset, Tensor? operand_mask, float[]? zoneout, Tensor? kept, "
    "int heads"
)

#: The arguments of `layer_backward` after `ARGUMENTS`: the fields of `BackwardCall` after `call`.
BACKWARD_ARGUMENTS = (
    "Tensor?[] grads, Tensor output, Tensor reserve, int keep, bool[] needs, bool flow"
)

#: The results of `layer_forward`: the outputs, the final states and the reserve.
Results = tuple[list[Tensor], list[Tensor], Tensor]

Call = TypeVar("Call", bound="LayerCall")


def batch_of(input: Tensor, batch_sizes: Tensor | None) -> Any:
    """N of an input [T, N, I] or [rows, I]."""
    return input.size(1) if batch_sizes is None else batch_sizes[0].item()


class Keep(IntEnum):
    """What the forward pass keeps in the reserve for the backward pass, which computes the rest again."""

    NOTHING = 0  #: there will be no backward pass
    STATES = 1  #: the states other than h before each step
    EVERYTHING = 2  #: the `saved` values of `CellSpec`


class DirectionWeights(NamedTuple):
    """The weights of one direction, see `specs.WEIGHTS`, `specs.NORMS` and `specs.UNIT`."""

    w_ih: Tensor | None
    w_hh: Tensor | None
    b_ih: Tensor | None
    b_hh: Tensor | None
    w_hr: Tensor | None
    norm_ih: Tensor | None = None
    norm_hh: Tensor | None = None
    norm_c: Tensor | None = None
    norm_c_bias: Tensor | None = None
    unit: Tensor | None = None


#: Weights of a direction without and with layer normalization.
_PLAIN, _ALL = len(WEIGHTS), len(WEIGHTS) + len(NORMS)


@dataclass(frozen=True, eq=False)
class LayerCall:
    """One layer over a sequence, in one or both directions, each with one or several heads.

    Heads share the input and nothing else. A head of a direction is a recurrence of its own, just as a direction is:
    below `direction` is one of these, D counts them all, and those that go forward come first.

    Attributes:
        cell: a name in `specs.CELLS` or `specs.REGISTERED`.
        input: [T, N, I], or the data [rows, I] of a PackedSequence with its `batch_sizes`.
        states: the initial states, h [D, N, P] and the others [D, N, H]; empty for zeros. After them may stand as many
            again: the states that `reset` puts back to, in place of zeros.
        weights: for each direction the five of `specs.WEIGHTS`, None for those that the layer does not have; with
            layer normalization followed by the four of `specs.NORMS`, None for those that the cell does not have; of a
            registered cell with parameters followed by `specs.UNIT`. Without `w_ih` the input is the product already:
            [T, N, D*G*H] or [rows, D*G*H], x W_ih^T of each direction.
        batch_sizes: int64 [T] on the CPU, not increasing.
        all_states: whether the outputs are all states after each step, instead of h only.
        grad_clip: the largest absolute value of a gradient that a step passes back: an element of the gradient of a
            state before the step. Larger ones are set to it. 0 for no limit: exported programs cannot hold infinity.
        grad_cut: k to pass no gradients back across the boundaries between times k*j - 1 and k*j; 0 for no cuts.
        reset: bool, [T, N] or [rows]: True puts a sequence's states back at the boundary between time t - 1 and time t:
            before step t in the forward direction, before step t - 1 in the other. Time 0 has no such boundary.
        operand_mask: [D, N, P]: what h is multiplied with where the recurrent product reads it; the state stays as it
            is. None for ones.
        zoneout: for each state, the probability that a unit keeps its state in a step, whatever the cell gives; empty
            for zeros. h has none in a layer with a projection.
        kept: bool, for each state that has zoneout, one after the other, where units keep it: [K, ...], K shaped like
            these states' outputs. None for the expectation: p * old state + (1 - p) * new state.
        heads: how many of the D directions go forward; the others, as many or none, go backward.
    """

    cell: str
    input: Tensor
    states: Sequence[Tensor]
    weights: Sequence[Tensor | None]
    batch_sizes: Tensor | None = None
    all_states: bool = False
    grad_clip: float = 0.0
    grad_cut: int = 0
    reset: Tensor | None = None
    operand_mask: Tensor | None = None
    zoneout: Sequence[float] = ()
    kept: Tensor | None = None
    heads: int = 1

    def __post_init__(self) -> None:
        if self.zoneout is None:  # as the ops have it for none
            object.__setattr__(self, "zoneout", ())

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The call as an op's flat arguments, see `ARGUMENTS`."""
        tensors = self.input, self.states, self.weights, self.batch_sizes
        options = self.all_states, self.grad_clip, self.grad_cut
        # AOTInductor cannot pass an empty list to an op.
        masks = self.reset, self.operand_mask, self.zoneout or None, self.kept
        return self.cell, *tensors, *options, *masks, self.heads

    @property
    def tensors(self) -> list[Tensor | None]:
        """The arguments that can have gradients: the input, each state, each weight."""
        return [self.input, *self.states, *self.weights]

    def with_tensors(self: Call, tensors: Sequence[Tensor | None]) -> Call:
        """This call with its `tensors` replaced."""
        input, *others = tensors
        states, weights = others[: len(self.states)], others[len(self.states) :]
        assert input is not None
        given = [state for state in states if state is not None]
        return replace(self, input=input, states=given, weights=weights)

    @property
    def initial_states(self) -> Sequence[Tensor]:
        """The states before the first step; empty for zeros."""
        return self.states[: self.spec.states]

    @property
    def reset_states(self) -> Sequence[Tensor]:
        """The states that `reset` puts back to; empty for zeros."""
        return self.states[self.spec.states :]

    def kept_of(self, k: int) -> Tensor | None:
        """Where units keep state k, shaped like its output; None if it has no zoneout or takes the expectation."""
        if self.kept is None or self.zoneout[k] == 0:
            return None
        return self.kept[sum(p > 0 for p in self.zoneout[:k])]

    # Sizes

    @property
    def spec(self) -> CellSpec:
        """The cell's `CellSpec`; a RuntimeError if there is no such cell."""
        return specs.of(self.cell)

    @property
    def kinds(self) -> Sequence[str]:
        """The names of a direction's weights."""
        if self.cell not in specs.CELLS:
            return (*WEIGHTS, UNIT) if self.spec.parameters else WEIGHTS
        return (*WEIGHTS, *NORMS) if self.normalizes else WEIGHTS

    @property
    def normalizes(self) -> bool:
        """Whether the layer has layer normalization."""
        of_each = len(self.weights) / self.heads if self.heads > 0 else 0
        return of_each in (_ALL, 2 * _ALL) and self.cell in specs.CELLS

    @property
    def directions(self) -> int:
        """D: the heads of all directions."""
        return len(self.weights) // len(self.kinds)

    def reverses(self, d: int) -> bool:
        """Whether direction d begins at the last time."""
        return d >= self.heads

    @property
    def multiplies_input(self) -> bool:
        """Whether there are `w_ih`."""
        return not self.weights or self.weights[0] is not None

    def direction(self, d: int) -> DirectionWeights:
        """The weights of direction d."""
        kinds = self.kinds
        of_direction = self.weights[d * len(kinds) : (d + 1) * len(kinds)]
        if kinds[-1] == UNIT:
            return DirectionWeights(*of_direction[:-1], unit=of_direction[-1])  # type: ignore[misc]
        return DirectionWeights(*of_direction)

    def of_kind(self, name: str) -> list[Tensor | None]:
        """The weight `name`, one of `kinds`, of each direction."""
        return list(self.weights[self.kinds.index(name) :: len(self.kinds)])

    @property
    def hidden(self) -> int:
        """H."""
        of, spec = self.direction(0), self.spec
        if of.w_hh is not None:
            return of.w_hh.size(0) // spec.recurrent
        if of.w_ih is not None:
            return of.w_ih.size(0) // spec.gates
        return self.input.size(-1) // (self.directions * spec.gates)

    @property
    def projected(self) -> int:
        """P, the width of h; H without a projection."""
        of = self.direction(0)
        if of.w_hh is None:
            return self.hidden if of.w_hr is None else of.w_hr.size(0)
        return of.w_hh.size(1)

    @property
    def projects(self) -> bool:
        """Whether h is projected."""
        return self.direction(0).w_hr is not None

    @property
    def counts(self) -> list[int]:
        """The number of rows of each step."""
        if self.batch_sizes is None:
            return [self.input.size(1)] * self.input.size(0)
        counts: list[int] = self.batch_sizes.tolist()
        return counts

    @property
    def starts(self) -> list[int]:
        """The row where each step begins, then the number of all rows: T + 1 entries."""
        return [0, *accumulate(self.counts)]

    @property
    def steps(self) -> int:
        """T."""
        return self.input.size(0) if self.batch_sizes is None else self.batch_sizes.numel()

    @property
    def batch(self) -> int:
        """N."""
        return self.input.size(1) if self.batch_sizes is None else self.counts[0]

    @property
    def batch_of_graph(self) -> Any:
        """N as a graph knows it, where `batch` would ask for the rows of every step."""
        if self.states:
            return self.states[0].size(1)
        return batch_of(self.input, self.batch_sizes)

    @property
    def rows(self) -> int:
        """The number of rows over all steps: T*N, or fewer in a packed sequence."""
        return math.prod(self.input.shape[:-1])

    @property
    def empty(self) -> bool:
        """Whether there is nothing to compute."""
        return self.rows == 0 or self.hidden == 0

    @property
    def sum_dtype(self) -> torch.dtype:
        """The dtype in which products are summed, and of the reserve."""
        low = self.input.dtype in (torch.bfloat16, torch.float16)
        return torch.float32 if low else self.input.dtype

    # Results

    def state_width(self, index: int) -> int:
        """The width of state `index`: P for h, H for the others."""
        return self.hidden if index else self.projected

    def state_shape(self, index: int) -> tuple[int, int, int]:
        """The shape of the initial and the final state `index`."""
        return self.directions, self.batch, self.state_width(index)

    @property
    def outputs(self) -> int:
        """The number of outputs: of states that are returned after each step."""
        return self.spec.states if self.all_states else 1

    def output_shape(self, index: int) -> tuple[int, ...]:
        """The shape of output `index`: [T, N, D*width] or [rows, D*width]."""
        return *self.input.shape[:-1], self.directions * self.state_width(index)

    def reserve_shape(self, keep: int) -> list[int]:
        """The reserve's shape: [D, rows, V, H], V values for each row and hidden unit, or [0] if nothing is kept.

        After the cell's own values stands the h that it gave, if the reserve `keeps_given`; last, with layer
        normalization and `Keep.EVERYTHING`, the products x W_ih^T and h W_hh^T of all gates.
        """
        if keep == Keep.NOTHING:
            return [0]
        everything = keep == Keep.EVERYTHING
        values = self.spec.saved if everything else self.spec.states - 1
        values += self.keeps_given + 2 * self.spec.gates * (everything and self.normalizes)
        return [self.directions, self.rows, values, self.hidden]

    @property
    def keeps_given(self) -> bool:
        """Whether a reserve has the h that each step's cell gave.

        A cell that `reads_h` reads it in its backward pass, and zoneout's expectation hides it.
        """
        expects = len(self.zoneout) > 0 and self.kept is None
        return self.spec.reads_h and expects and self.zoneout[0] > 0

    def zero_states(self, batch: int) -> list[Tensor]:
        """Initial states of `batch` rows that are zero."""
        widths = [self.state_width(index) for index in range(self.spec.states)]
        return [self.input.new_zeros(self.directions, batch, width) for width in widths]

    def results(self, keep: int) -> Results:
        """Uninitialized tensors for the results of `layer_forward`."""
        batch: int | torch.SymInt
        if self.states:
            batch = self.states[0].size(1)
        elif isinstance(self.batch_sizes, FakeTensor):  # a compiled graph knows N only at run time
            batch = torch.library.get_ctx().new_dynamic_size()
        else:
            batch = self.batch
        new = self.input.new_empty
        widths = [self.state_width(index) for index in range(self.spec.states)]
        return (
            [new(self.output_shape(index)) for index in range(self.outputs)],
            [new(self.directions, batch, width) for width in widths],
            new(self.reserve_shape(keep), dtype=self.sum_dtype),
        )

    # Checks

    def check(self) -> None:
        """Checks that all arguments fit together; raises a RuntimeError that names what was expected and what came."""
        spec = self.spec
        if not self.grad_clip >= 0:
            raise RuntimeError(f"expected grad_clip to be at least 0, got {self.grad_clip}")
        if self.grad_cut < 0:
            raise RuntimeError(f"expected grad_cut to be at least 0, got {self.grad_cut}")
        if self.heads < 1:
            raise RuntimeError(f"expected heads to be at least 1, got {self.heads}")
        count, of_each = len(self.kinds), len(self.weights) / self.heads
        each = (
            "each of 1 or 2 directions"
            if self.heads == 1
            else f"each of {self.heads} heads of 1 or 2 directions"
        )
        if self.cell not in specs.CELLS:
            if of_each not in (count, 2 * count):
                raise RuntimeError(
                    f"expected weights to hold {count} tensors for {each} of {specs.shown(self.cell)}, "
                    f"got {len(self.weights)}"
                )
        elif of_each not in (_PLAIN, 2 * _PLAIN, _ALL, 2 * _ALL):
            raise RuntimeError(
                f"expected weights to hold {_PLAIN} tensors, or {_ALL} with layer normalization, for {each}, "
                f"got {len(self.weights)}"
            )
        input = self.input
        if not input.is_floating_point():
            raise RuntimeError(f"expected input to be floating-point, got {input.dtype}")
        dimensions = 3 if self.batch_sizes is None else 2
        if input.dim() != dimensions:
            raise RuntimeError(f"expected input to have {dimensions} dimensions, got {input.dim()}")
        _check_memory(input, "input")
        self._check_batch_sizes()
        if self.steps == 0:
            raise RuntimeError(
                f"expected input to have at least 1 step, got shape {list(input.shape)}"
            )
        self._check_weights()
        most = spec.states if self.reset is None else 2 * spec.states
        if len(self.states) not in (0, spec.states, most):
            twice = "" if self.reset is None else ", twice as many with those to reset to,"
            raise RuntimeError(
                f"expected hx to hold {spec.states} states{twice} or none, got {len(self.states)}"
            )
        for index, state in enumerate(self.initial_states):
            self.check_like_input(state, f"hx[{index}]", self.state_shape(index))
        for index, state in enumerate(self.reset_states):
            self.check_like_input(state, f"reset_to[{index}]", self.state_shape(index))
        self._check_reset()
        self._check_zoneout()
        if self.operand_mask is not None:
            self.check_like_input(self.operand_mask, "operand_mask", self.state_shape(0))

    def _check_reset(self) -> None:
        reset = self.reset
        if reset is None:
            return
        self.check_mask(reset, "reset", self.input.shape[:-1])

    def _check_zoneout(self) -> None:
        states, zoneout = self.spec.states, self.zoneout
        if len(zoneout) not in (0, states) or not all(0 <= p <= 1 for p in zoneout):
            raise RuntimeError(
                f"expected zoneout to be {states} probabilities or none, got {list(zoneout)}"
            )
        if self.projects and len(zoneout) > 0 and zoneout[0] > 0:
            raise RuntimeError(
                f"expected zoneout of h to be 0 with a projection, got {list(zoneout)}"
            )
        if self.kept is not None and not zoneout:
            raise RuntimeError("expected zoneout to be given with kept, got none")
        if self.kept is not None:
            count = sum(p > 0 for p in zoneout)
            self.check_mask(self.kept, "kept", (count, *self.output_shape(states - 1)))

    def _check_batch_sizes(self) -> None:
        sizes = self.batch_sizes
        if sizes is None:
            return
        if sizes.dim() != 1 or sizes.dtype != torch.int64 or not sizes.is_cpu:
            raise RuntimeError(
                f"expected batch_sizes to be an int64 vector on the CPU, got {sizes.dtype} of shape "
                f"{list(sizes.shape)} on {sizes.device}"
            )
        _check_memory(sizes, "batch_sizes")
        counts = self.counts
        for t, (before, count) in enumerate(zip(counts[:1] + counts, counts, strict=False)):
            if count <= 0 or count > before:
                raise RuntimeError(
                    "expected batch_sizes to be positive and not to increase, got "
                    f"{count} after {before} at step {t}"
                )
        if sum(counts) != self.rows:
            raise RuntimeError(
                f"expected batch_sizes to sum to the input's {self.rows} rows, got {sum(counts)}"
            )

    def _check_weights(self) -> None:
        spec, kinds = self.spec, self.kinds
        for d in range(self.directions):
            of = self.direction(d)
            if (of.w_ih is not None) != self.multiplies_input:
                alone = 0 if self.multiplies_input else d
                raise RuntimeError(
                    f"expected w_ih in all directions or in none, got it in direction {alone} alone"
                )
            for name in WEIGHTS[not self.multiplies_input : 2 if spec.recurrent else 1]:
                weight = getattr(of, name)
                if weight is None:
                    raise RuntimeError(f"expected {name} of direction {d} to be a tensor, got None")
                if weight.dim() != 2:
                    raise RuntimeError(
                        f"expected {name} of direction {d} to have 2 dimensions, got {weight.dim()}"
                    )
            for name in () if spec.recurrent else ("w_hh", "b_hh"):
                if getattr(of, name) is not None:
                    raise RuntimeError(
                        f"expected {name} of direction {d} to be None for {specs.shown(self.cell)}, got a tensor"
                    )
        gates, recurrent = spec.gates * self.hidden, spec.recurrent * self.hidden
        name, factor = ("w_hh", spec.recurrent) if spec.recurrent else ("w_ih", spec.gates)
        given = getattr(self.direction(0), name)
        if given is not None and given.size(0) % factor != 0:
            raise RuntimeError(
                f"expected {name} of direction 0 to have a multiple of {factor} rows, got {given.size(0)}"
            )
        width = self.directions * gates
        if not self.multiplies_input and self.input.size(-1) != width:
            raise RuntimeError(
                f"expected input without w_ih to have the {width} input parts of all gates, got shape "
                f"{list(self.input.shape)}"
            )
        w_hr = self.direction(0).w_hr
        if w_hr is not None and not spec.projects:
            raise RuntimeError(
                f"expected w_hr to be None for {specs.shown(self.cell)}, got shape {list(w_hr.shape)}"
            )
        if w_hr is not None and w_hr.dim() != 2:
            raise RuntimeError(
                f"expected w_hr of direction 0 to have 2 dimensions, got {w_hr.dim()}"
            )
        projected = self.projected if self.projects else self.hidden
        shapes: dict[str, tuple[int, ...]] = {
            **{"w_ih": (gates, self.input.size(-1)), "w_hh": (recurrent, projected)},
            **{"b_ih": (gates,), "b_hh": (recurrent,), "w_hr": (projected, self.hidden)},
            **{"norm_ih": (gates,), "norm_hh": (recurrent,)},
            **dict.fromkeys(NORMS[2:], (self.hidden,)),
            UNIT: (spec.parameters, self.hidden),
        }
        for d in range(self.directions):
            of = self.direction(d)
            if (of.w_hr is not None) != self.projects:
                alone = 0 if self.projects else d
                raise RuntimeError(
                    f"expected w_hr in all directions or in none, got it in direction {alone} alone"
                )
            if UNIT in kinds and of.unit is None:
                raise RuntimeError(f"expected {UNIT} of direction {d} to be a tensor, got None")
            for name in kinds:
                weight = getattr(of, name)
                if weight is not None:
                    self.check_like_input(weight, f"{name} of direction {d}", shapes[name])
            if self.normalizes:
                self._check_norms(d)

    def _check_norms(self, d: int) -> None:
        """Checks that direction d has the weights of layer normalization that its cell needs, and no others."""
        needed = self.spec.norms
        for name in NORMS:
            there = getattr(self.direction(d), name) is not None
            if there != (name in needed):
                expected, got = ("a tensor", "None") if name in needed else ("None", "a tensor")
                raise RuntimeError(
                    f"expected {name} of direction {d} to be {expected} for {specs.shown(self.cell)}, got {got}"
                )

    def check_like_input(self, tensor: Tensor, name: str, shape: tuple[int, ...]) -> None:
        """Checks that a tensor has this shape, and the input's dtype and device."""
        if tensor.shape != shape:  # both are tuples
            raise RuntimeError(f"expected {name} of shape {list(shape)}, got {list(tensor.shape)}")
        if tensor.dtype != self.input.dtype:
            raise RuntimeError(
                f"expected {name} to be {self.input.dtype} like the input, got {tensor.dtype}"
            )
        self.check_device(tensor, name)
        _check_memory(tensor, name)

    def check_mask(self, tensor: Tensor, name: str, shape: Sequence[int]) -> None:
        """Checks that a tensor is bool of this shape, on the input's device."""
        if tensor.dtype != torch.bool or tuple(tensor.shape) != tuple(shape):
            raise RuntimeError(
                f"expected {name} to be bool of shape {list(shape)}, got {tensor.dtype} of shape {list(tensor.shape)}"
            )
        self.check_device(tensor, name)
        _check_memory(tensor, name)

    def check_device(self, tensor: Tensor, name: str) -> None:
        """Checks that a tensor is on the input's device."""
        if tensor.device != self.input.device:
            raise RuntimeError(
                f"expected {name} on {self.input.device} like the input, got {tensor.device}"
            )

    def check_keep(self, keep: int) -> None:
        """Checks that `keep` is a `Keep`."""
        if keep not in tuple(Keep):
            raise RuntimeError(f"expected keep to be 0, 1 or 2, got {keep}")


@dataclass(frozen=True, eq=False)
class BackwardCall:
    """The backward pass of a layer.

    Attributes:
        call: the arguments of the forward pass.
        grads: the gradient of each output, then of each final state; None for zeros.
        output, reserve, keep: h after each step, the reserve and the `Keep` of the forward pass.
        needs: for each of `call.tensors`, whether to compute its gradient.
        flow: whether to return the gradient of each state after each step, too.
    """

    call: LayerCall
    grads: Sequence[Tensor | None]
    output: Tensor
    reserve: Tensor
    keep: int
    needs: Sequence[bool]
    flow: bool = False

    @property
    def arguments(self) -> tuple[object, ...]:
        """The flat arguments of `layer_backward`."""
        others = self.grads, self.output, self.reserve, self.keep, self.needs, self.flow
        return *self.call.arguments, *others

    @property
    def needed(self) -> dict[int, Tensor]:
        """The tensors whose gradients are needed, by their index in `call.tensors`."""
        tensors = enumerate(zip(self.call.tensors, self.needs, strict=True))
        return {index: t for index, (t, need) in tensors if need and t is not None}

    def new_flow(self) -> list[Tensor]:
        """Uninitialized gradients of the states after each step, in the dtype of sums; none if `flow` is False."""
        call = self.call
        states = range(call.spec.states if self.flow else 0)
        return [call.input.new_empty(call.output_shape(k), dtype=call.sum_dtype) for k in states]

    def in_place_of(self, found: Iterable[Tensor]) -> list[Tensor | None]:
        """The gradients of the `needed` tensors as a list like `call.tensors`, with None for the others."""
        by_index = dict(zip(self.needed, found, strict=True))
        return [by_index.get(index) for index in range(len(self.needs))]

    def check(self) -> None:
        """Checks the call and the arguments that the backward pass adds; errors as in `LayerCall.check`."""
        call = self.call
        call.check()
        outputs, states = call.outputs, call.spec.states
        if len(self.grads) != outputs + states:
            raise RuntimeError(
                f"expected grads of {outputs} outputs and of {states} final states, got {len(self.grads)}"
            )
        call.check_like_input(self.output, "output", call.output_shape(0))
        shapes: list[tuple[int, ...]] = [call.output_shape(index) for index in range(outputs)]
        shapes += [call.state_shape(index) for index in range(states)]
        for index, (grad, shape) in enumerate(zip(self.grads, shapes, strict=True)):
            if grad is not None:
                call.check_like_input(grad, f"grads[{index}]", shape)
        if self.keep not in (Keep.STATES, Keep.EVERYTHING):
            raise RuntimeError(f"expected keep to be 1 or 2, got {self.keep}")
        reserve, kept = self.reserve, call.reserve_shape(self.keep)
        if list(reserve.shape) != kept or reserve.dtype != call.sum_dtype:
            raise RuntimeError(
                f"expected reserve to be {call.sum_dtype} of shape {kept}, got {reserve.dtype} of shape "
                f"{list(reserve.shape)}"
            )
        call.check_device(reserve, "reserve")
        _check_memory(reserve, "reserve")
        if len(self.needs) != len(call.tensors):
            raise RuntimeError(
                f"expected needs to have {len(call.tensors)} entries, got {len(self.needs)}"
            )


def _check_memory(tensor: Tensor, name: str) -> None:
    """Checks that the tensor's storage still has memory for it: `resize_` can free or shrink a storage."""
    if tensor.layout != torch.strided:
        raise RuntimeError(
            f"expected {name} to be an ordinary dense Tensor, got layout {tensor.layout}"
        )
    count = tensor.numel()
    if count == 0 or not torch._C._has_storage(tensor):
        return
    if not tensor.is_contiguous():
        strides = zip(tensor.shape, tensor.stride(), strict=True)
        count = 1 + sum((size - 1) * stride for size, stride in strides)
    needed = (tensor.storage_offset() + count) * tensor.element_size()
    there = tensor.untyped_storage().nbytes()
    if there < needed:
        raise RuntimeError(
            f"expected {name} to have {needed} bytes of memory, got {there}: its storage was resized"
        )


def from_arguments(arguments: Sequence[object]) -> tuple[LayerCall, Sequence[object]]:
    """Splits an op's flat arguments into the call and the other arguments."""
    count = len(fields(LayerCall))
    return LayerCall(*arguments[:count]), arguments[count:]  # type: ignore[arg-type]


def refuse(op: str, *arguments: object) -> NoReturn:
    """Raises the RuntimeError that names what is wrong, after a C++ kernel of `op` refused its arguments."""
    call, others = from_arguments(arguments)
    if op == "layer_backward":
        BackwardCall(call, *others).check()  # type: ignore[arg-type]
    call.check()
    raise RuntimeError(f"rnnkit::{op} cannot take these arguments")

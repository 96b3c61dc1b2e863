"""The ops on CUDA tensors: one large product for all inputs, a scan, one large product for each gradient.

`layer_forward` and `layer_backward` are those of `rnnkit.ops`; the products are torch's. The scan is a backend's
(`Scans`): the CUDA extension's (cuda.py) or Triton's (triton/scan.py).
"""

import copy
import importlib
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Protocol, cast

import torch
from torch import Tensor

from rnnkit import backends, ops, plan, reference
from rnnkit.ops import Keep
from rnnkit.reference import CELLS, WEIGHTS


class Design(Protocol):
    """How a scan runs: the kernel's name, and why this one; `str` tells all."""

    @property
    def kernel(self) -> str:
        """Its name."""

    @property
    def reason(self) -> str:
        """Why this one."""


class Scans(Protocol):
    """What a backend brings: a module with the scans of one layer, all that is not a product over all rows."""

    def choose(self, scan: plan.Scan, device: torch.device) -> Design:
        """How a scan would run on a device."""

    def forward(
        self,
        call: "Call",
        gates: Tensor,
        keep: int,
        output: Tensor | None,
        finals: Sequence[Tensor],
        reserve: Tensor,
    ) -> None:
        """Writes output [rows, D*P], final states and reserve; gates [rows, D*G*H] are the inputs' parts.

        A call of one step may want the reserve only: output is None then, and finals are empty. States but h may be of
        the type of sums, as a reserve keeps them.
        """

    def backward(self, back: "Backward", initial_grads: Sequence[Tensor | None]) -> Tensor | None:
        """Writes `back.grad_gates` and those of the initial states, where there are any.

        Returns the gradients of h after its projection, [D, rows, P], with all that reaches it; None without one.
        """


#: Where each backend's scans are; imported at the first use.
_MODULES = {"cpp": "rnnkit.cuda", "triton": "rnnkit.triton.scan"}


def scans(device: torch.device) -> Scans | None:
    """Those of the backend that serves the device now; None: the reference does."""
    name = _MODULES.get(backends.serving(device))
    return None if name is None else cast(Scans, importlib.import_module(name))


def is_precise(dtype: torch.dtype) -> bool:
    """Whether products of `dtype` are not to be in TF32: what torch's switch for its own RNNs says."""
    return dtype == torch.float32 and torch.backends.cudnn.rnn.fp32_precision != "tf32"  # type: ignore[attr-defined]


class _Precision:
    """torch's switch for its own float32 products, set to that of its RNNs while calls need it so.

    There is one switch for the process: calls that need it alike share it, others wait until it is put back.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._users, self._wanted, self._before = 0, "", ""

    @contextmanager
    def __call__(self, dtype: torch.dtype) -> Iterator[None]:
        if dtype != torch.float32:
            yield
            return
        wanted = "ieee" if is_precise(dtype) else "tf32"
        products = torch.backends.cuda.matmul
        with self._changed:
            self._changed.wait_for(lambda: self._users == 0 or self._wanted == wanted)
            if self._users == 0:
                self._wanted, self._before = wanted, products.fp32_precision
                if (self._before == "tf32") != (wanted == "tf32"):
                    products.fp32_precision = wanted
            self._users += 1
        try:
            yield
        finally:
            with self._changed:
                self._users -= 1
                if self._users == 0:
                    if products.fp32_precision != self._before:
                        products.fp32_precision = self._before
                    self._changed.notify_all()


_precision = _Precision()


@contextmanager
def _products_like_scans(input: Tensor) -> Iterator[None]:
    """No autograd, no autocast, and torch's own matrix products as precise as the scan's."""
    kind = input.device.type
    with torch.no_grad(), _precision(input.dtype):
        if torch.is_autocast_enabled(kind):  # as in a backward pass under it
            with torch.autocast(kind, enabled=False):
                yield
        else:
            yield


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on the device that the CPU does not wait for."""
    if device.type != "cuda":
        return tensor.to(device)
    if (
        torch.cuda.is_current_stream_capturing()
    ):  # a replay would read memory that is not the call's any more
        raise RuntimeError("a packed sequence cannot be captured in a CUDA graph")
    return tensor.pin_memory().to(device, non_blocking=True)


def _check(tensor: Tensor, name: str, shape: Sequence[int], input: Tensor) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise RuntimeError(f"expected {name} of shape {list(shape)}, got {list(tensor.shape)}")
    if tensor.dtype != input.dtype:
        raise RuntimeError(
            f"expected {name} to be {input.dtype} like the input, got {tensor.dtype}"
        )
    if tensor.device != input.device:
        raise RuntimeError(f"expected {name} on {input.device} like the input, got {tensor.device}")


def _plain(tensor: Tensor | None) -> Tensor | None:
    """Contiguous, aligned to 16 bytes, with no operation pending: so no layout changes how products are added up."""
    if tensor is None:
        return None
    tensor = tensor.resolve_neg().contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


class Call:
    """An op's arguments, checked, with their sizes."""

    def __init__(
        self,
        cell: str,
        input: Tensor,
        states: Sequence[Tensor],
        weights: Sequence[Tensor | None],
        batch_sizes: Tensor | None,
    ) -> None:
        if cell not in CELLS:
            raise RuntimeError(f"expected cell to be the name of a cell, got '{cell}'")
        self.cell, self.spec = cell, CELLS[cell]
        if len(weights) not in (len(WEIGHTS), 2 * len(WEIGHTS)):
            raise RuntimeError(
                f"expected weights to hold 5 tensors for each of 1 or 2 directions, got {len(weights)}"
            )
        if not input.is_floating_point():
            raise RuntimeError(f"expected input to be floating-point, got {input.dtype}")
        dimensions = 3 if batch_sizes is None else 2
        if input.dim() != dimensions:
            raise RuntimeError(f"expected input to have {dimensions} dimensions, got {input.dim()}")
        self.input = input
        self._matrix: Tensor | None = None
        self._set_rows(batch_sizes)
        self._set_weights(weights)
        if states and len(states) != self.spec.states:
            raise RuntimeError(f"expected {self.spec.states} states or none, got {len(states)}")
        self.states = [s for s in (_plain(state) for state in states) if s is not None]
        for index, state in enumerate(states):
            _check(state, f"hx[{index}]", self.state_shape(index), input)

    def _set_rows(self, batch_sizes: Tensor | None) -> None:
        """The number of rows of each step."""
        input = self.input
        self.ragged = batch_sizes is not None
        if batch_sizes is None:
            self.steps, self.batch = input.size(0), input.size(1)
            self.rows = self.steps * self.batch
        else:
            if batch_sizes.dim() != 1 or batch_sizes.dtype != torch.int64 or not batch_sizes.is_cpu:
                raise RuntimeError(
                    f"expected batch_sizes to be an int64 vector on the CPU, got {batch_sizes.dtype} of shape "
                    f"{list(batch_sizes.shape)} on {batch_sizes.device}"
                )
            sizes = self._sizes = batch_sizes.tolist()
            for t, (before, count) in enumerate(zip(sizes[:1] + sizes, sizes, strict=False)):
                if count <= 0 or count > before:
                    raise RuntimeError(
                        "expected batch_sizes to be positive and not to increase, got "
                        f"{count} after {before} at step {t}"
                    )
            self._starts = [0, *accumulate(sizes)]
            self.steps, self.batch, self.rows = len(sizes), sizes[0] if sizes else 0, sum(sizes)
            if self.rows != input.size(0):
                got = "more" if self.rows > input.size(0) else self.rows
                raise RuntimeError(
                    f"expected batch_sizes to sum to the input's {input.size(0)} rows, got {got}"
                )
        if self.steps == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")

    def _set_weights(self, weights: Sequence[Tensor | None]) -> None:
        size = len(WEIGHTS)
        given = [weights[d : d + size] for d in range(0, len(weights), size)]
        for d, of_direction in enumerate(given):
            for name, weight in zip(WEIGHTS[:2], of_direction, strict=False):
                if weight is None:
                    raise RuntimeError(f"expected {name} of direction {d} to be a tensor, got None")
                if weight.dim() != 2:
                    raise RuntimeError(f"expected {name} to have 2 dimensions, got {weight.dim()}")
        first = given[0][1]
        assert first is not None
        self.directions = len(given)
        self.hidden, self.projected = first.size(0) // self.spec.gates, first.size(1)
        projects = given[0][4] is not None
        width = self.spec.gates * self.hidden
        if projects and self.spec.states != 2:
            raise RuntimeError(f"expected w_hr to be None for {self.cell}")
        if not projects and self.projected != self.hidden:
            raise RuntimeError(
                f"expected w_hh of shape {[width, self.hidden]}, got {list(first.shape)}"
            )
        shapes = (
            (width, self.input.size(-1)),
            (width, self.projected),
            (width,),
            (width,),
            (self.projected, self.hidden),
        )
        for of_direction in given:
            if (of_direction[4] is not None) != projects:
                raise RuntimeError("expected w_hr in all directions or in none")
            for name, weight, shape in zip(WEIGHTS, of_direction, shapes, strict=True):
                if weight is not None:
                    _check(weight, name, shape, self.input)
        self.w_ih, self.w_hh, self.b_ih, self.b_hh, self.w_hr = (
            [_plain(of_direction[k]) for of_direction in given] for k in range(size)
        )

    def state_shape(self, index: int) -> tuple[int, int, int]:
        """Of h, or of c."""
        return self.directions, self.batch, self.hidden if index else self.projected

    @property
    def empty(self) -> bool:
        """Whether there is nothing to compute."""
        return self.rows == 0 or self.hidden == 0

    @property
    def counts(self) -> list[int]:
        """Rows of each step."""
        return self._sizes if self.ragged else [self.batch] * self.steps

    @property
    def sum_dtype(self) -> torch.dtype:
        """Of sums, and of what is kept."""
        return ops.accumulate_dtype(self.input.dtype)

    def reserve_shape(self, keep: int) -> tuple[int, ...]:
        """Of what the forward pass keeps."""
        return self.directions, self.rows, ops.kept_values(self.cell, keep), self.hidden

    def offsets(self) -> Tensor | None:
        """The row where each step begins, on the device; None: every step has as many."""
        if not self.ragged:
            return None
        return _sent(torch.tensor(self._starts), self.input.device)

    @property
    def precise(self) -> bool:
        """Whether float32 is multiplied as such."""
        return is_precise(self.input.dtype)

    @property
    def projects(self) -> bool:
        """Whether h is projected."""
        return self.w_hr[0] is not None

    def scan(self, backward: bool) -> plan.Scan:
        """What decides how this call's scan runs."""
        return plan.Scan(
            self.cell,
            self.input.dtype.itemsize,
            backward,
            self.hidden,
            self.projected,
            self.batch,
            self.directions,
            self.precise,
        )

    def one_step(self, d: int, states: list[Tensor]) -> "Call":
        """A step of direction d whose batch is all rows."""
        step = copy.copy(self)
        step.steps, step.batch, step.directions, step.ragged = 1, self.rows, 1, False
        step.states = states
        for name in ("w_ih", "w_hh", "b_ih", "b_hh", "w_hr"):
            setattr(step, name, [getattr(self, name)[d]])
        return step

    def rows_of(self, d: int, step: int) -> slice:
        """Of the step that direction d processes as number `step`."""
        t = self.steps - 1 - step if d else step
        if not self.ragged:
            return slice(t * self.batch, (t + 1) * self.batch)
        return slice(self._starts[t], self._starts[t + 1])

    def last_rows(self, output: Tensor, out: Tensor) -> None:
        """Copies the h [D, N, P] that each sequence ends with from the output [rows, D*P]."""
        for d in range(self.directions):
            columns = output[:, d * self.projected : (d + 1) * self.projected]
            if d or not self.ragged:
                out[d].copy_(columns[self.rows_of(d, self.steps - 1)])
                continue
            counts = torch.tensor(self._sizes)
            last = (counts[:, None] > torch.arange(self.batch)).sum(0) - 1  # of each sequence
            places = torch.tensor(self._starts)[last] + torch.arange(self.batch)
            out[d].copy_(columns.index_select(0, _sent(places, output.device)))

    def matrix(self) -> Tensor:
        """The input as [rows, I]."""
        if self._matrix is None:
            self._matrix = _plain(self.input)
        assert self._matrix is not None
        return self._matrix.view(self.rows, self.input.size(-1))

    def gates(self) -> Tensor:
        """The input's part of all gates, without biases, [rows, D*G*H]."""
        return self.matrix() @ _joined(self.w_ih).t()


def _joined(weights: Sequence[Tensor | None]) -> Tensor:
    """The weights of both directions, one below the other."""
    found = [w for w in weights if w is not None]
    return found[0] if len(found) == 1 else torch.cat(found)


def stacked(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """[D, ...] of the directions' tensors; None if they have none."""
    found = [t for t in tensors if t is not None]
    if not found:
        return None
    return found[0].unsqueeze(0) if len(found) == 1 else torch.stack(found)


def layer_forward(
    cell: str,
    input: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    batch_sizes: Tensor | None,
    keep: int,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """`rnnkit::layer_forward` on CUDA tensors."""
    if keep not in tuple(Keep):
        raise RuntimeError(f"expected keep to be 0, 1 or 2, got {keep}")
    run = scans(input.device)
    if run is None:
        return ops.forward_composite(cell, input, states, weights, batch_sizes, keep)
    call = Call(cell, input, states, weights, batch_sizes)
    output, finals, reserve = ops.empty_results(cell, input, weights, batch_sizes, states, keep)
    if call.empty:
        return output.zero_(), [state.zero_() for state in finals], reserve
    if not states:  # zeros are multiplied, too: a weight that is NaN or infinite makes NaN of them, as in torch.nn
        call.states = reference.initial_states(cell, input, call.batch, weights)
    with _products_like_scans(input):
        gates = call.gates()
        run.forward(call, gates, keep, output.view(call.rows, -1), finals, reserve)
    return output, finals, reserve


def layer_backward(
    cell: str,
    grads: Sequence[Tensor | None],
    input: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    batch_sizes: Tensor | None,
    output: Tensor,
    reserve: Tensor,
    needs: Sequence[bool],
) -> list[Tensor]:
    """`rnnkit::layer_backward` on CUDA tensors."""
    run = scans(input.device)
    if run is None:
        return ops.backward_composite(
            cell, grads, input, states, weights, batch_sizes, output, reserve, needs
        )
    call = Call(cell, input, states, weights, batch_sizes)
    spec = call.spec
    if len(grads) != 1 + spec.states:
        raise RuntimeError(
            f"expected grads of the output and of {spec.states} states, got {len(grads)}"
        )
    shape = [*input.shape[:-1], call.directions * call.projected]
    _check(output, "output", shape, input)
    for index, grad in enumerate(grads):
        if grad is not None:
            expected = call.state_shape(index - 1) if index else shape
            _check(grad, f"grads[{index}]", expected, input)
    everything, only_states = call.reserve_shape(Keep.EVERYTHING), call.reserve_shape(Keep.STATES)
    if (
        tuple(reserve.shape) not in (everything, only_states)
        or reserve.dtype != call.sum_dtype
        or reserve.device != input.device
    ):
        raise RuntimeError(
            f"expected reserve to be {call.sum_dtype} of shape {list(everything)} or {list(only_states)}, got "
            f"{reserve.dtype} of shape {list(reserve.shape)}"
        )
    wanted = [input, *states, *weights]
    if len(needs) != len(wanted):
        raise RuntimeError(f"expected needs to have {len(wanted)} entries, got {len(needs)}")
    if call.empty:
        return [
            torch.zeros_like(t, memory_format=torch.contiguous_format)
            for t, need in zip(wanted, needs, strict=True)
            if need and t is not None
        ]
    with _products_like_scans(input):
        found = Backward(call, run, [_plain(g) for g in grads], output, reserve, needs).run()
    return [
        found[index]
        for index, (t, need) in enumerate(zip(wanted, needs, strict=True))
        if need and t is not None
    ]


class Backward:
    """The gradients of one call: the scan back through the gates, then products over all rows at once.

    Attributes:
        call: the call.
        grads: of the output and of each final state.
        output: [rows, D*P].
        reserve: [D, rows, V, H].
        values: W, gradients that a unit's gates have: of the recurrent parts, and of input parts that differ.
        grad_gates: they, [rows, D*W*H].
    """

    def __init__(
        self,
        call: Call,
        run: Scans,
        grads: Sequence[Tensor | None],
        output: Tensor,
        reserve: Tensor,
        needs: Sequence[bool],
    ) -> None:
        self.call, self.scans, self.grads, self.needs = call, run, grads, needs
        plain = _plain(output)
        assert plain is not None
        self.output = plain.view(call.rows, -1)
        self.reserve = reserve.contiguous()
        spec = call.spec
        self.values = max(*spec.input_grads, spec.gates - 1) + 1  # gradients of a unit's gates
        self.first_weight = 1 + len(call.states)
        if tuple(reserve.shape) != call.reserve_shape(Keep.EVERYTHING):
            self._gates_again()

    def run(self) -> dict[int, Tensor]:
        """Gradients by their place among [input, *states, *weights]."""
        call = self.call
        width = self.values * call.hidden
        self.grad_gates = call.input.new_empty(call.rows, call.directions * width)
        self.found: dict[int, Tensor] = {}
        initial = [
            call.input.new_empty(call.state_shape(k)) if call.states else None
            for k in range(call.spec.states)
        ]
        grad_projected = self.scans.backward(self, initial)
        for k, grad in enumerate(initial):
            if grad is not None:
                self.found[1 + k] = grad
        if grad_projected is not None:
            for d in range(call.directions):
                if self.needs[self._place(d, 4)]:
                    self.found[self._place(d, 4)] = grad_projected[d].t() @ self._unprojected(d)
        for d in range(call.directions):
            self._weights(d, self.grad_gates[:, d * width : (d + 1) * width])
        if self.needs[0]:
            self.found[0] = self._input()
        return self.found

    def _unprojected(self, d: int) -> Tensor:
        """The LSTM's h before its projection, [rows, H]: o tanh(f c + i g)."""
        i, f, g, o, c = self.reserve[d].unbind(1)
        return (o * torch.tanh(f * c + i * g)).to(self.call.input.dtype)

    def _place(self, d: int, k: int) -> int:
        """Of a weight among [input, *states, *weights]."""
        return self.first_weight + d * len(WEIGHTS) + k

    def _previous(self, d: int) -> list[tuple[slice, Tensor | None]]:
        """h_{t-1}: parts of the rows, and a matrix for each; None for zeros."""
        call = self.call
        width = call.projected
        output = self.output[:, d * width : (d + 1) * width]
        initial = call.states[0][d] if call.states else None
        if not call.ragged:
            edge, rows = call.batch, call.rows
            inner = (slice(0, rows - edge), slice(edge, rows))
            of, before = inner if d else inner[::-1]
            parts: list[tuple[slice, Tensor | None]] = [
                (slice(rows - edge, rows) if d else slice(0, edge), initial)
            ]
            return [(of, output[before]), *parts] if call.steps > 1 else parts
        if initial is None:
            initial = call.input.new_zeros(call.batch, width)
        counts = torch.tensor(call.counts)
        zero, starts = counts.new_zeros(1), counts.cumsum(0) - counts
        alive = torch.cat([counts[1:], zero] if d else [zero, counts[:-1]])
        step = torch.arange(call.steps).repeat_interleave(counts)
        n = torch.arange(call.rows) - starts[step]
        row = (starts + counts if d else starts - alive)[step] + n
        index = _sent(torch.where(n < alive[step], row, call.rows + n), output.device)
        return [(slice(0, call.rows), torch.cat([output, initial]).index_select(0, index))]

    def _runs(self) -> list[tuple[int, int, int]]:
        """Gates whose input parts' gradients lie side by side: (first gate, last gate + 1, first place)."""
        runs: list[tuple[int, int, int]] = []
        for gate, place in enumerate(self.call.spec.input_grads):
            if runs and place == runs[-1][2] + gate - runs[-1][0]:
                runs[-1] = (runs[-1][0], gate + 1, runs[-1][2])
            else:
                runs.append((gate, gate + 1, place))
        return runs

    def _weights(self, d: int, of_gates: Tensor) -> None:
        """of_gates: the direction's gradients, [rows, values * H]."""
        call, H = self.call, self.call.hidden
        recurrent = of_gates[:, : call.spec.gates * H]
        runs = self._runs()
        need = [self.needs[self._place(d, k)] for k in range(4)]
        if need[0]:
            x = call.matrix()
            parts = [
                of_gates[:, at * H : (at + end - first) * H].t() @ x for first, end, at in runs
            ]
            self.found[self._place(d, 0)] = _joined(parts)
        if need[1]:
            grad = None
            for rows, h in self._previous(d):
                if h is None:
                    continue
                part = recurrent[rows].t()
                grad = part @ h if grad is None else torch.addmm(grad, part, h)
            if grad is None:
                grad = call.input.new_zeros(call.spec.gates * H, call.projected)
            self.found[self._place(d, 1)] = grad
        if (need[2] and call.b_ih[d] is not None) or (need[3] and call.b_hh[d] is not None):
            sums = of_gates.sum(0)
            inputs = [sums[at * H : (at + end - first) * H] for first, end, at in runs]
            self.found[self._place(d, 2)] = _joined(inputs)
            self.found[self._place(d, 3)] = sums[: call.spec.gates * H].clone()

    def _input(self) -> Tensor:
        call, H = self.call, self.call.hidden
        grad = None
        if self.values == call.spec.gates:
            grad = self.grad_gates @ _joined(call.w_ih)
        else:
            for d, w_ih in enumerate(call.w_ih):
                assert w_ih is not None
                for first, end, at in self._runs():
                    start = (d * self.values + at) * H
                    part = self.grad_gates[:, start : start + (end - first) * H]
                    weight = w_ih[first * H : end * H]
                    grad = part @ weight if grad is None else torch.addmm(grad, part, weight)
        assert grad is not None
        return grad.view(call.input.shape)

    def _gates_again(self) -> None:
        """Computes what the forward pass did not keep, for all steps at once, since every h is known."""
        call = self.call
        states, gates = self.reserve, call.gates()
        self.reserve = states.new_empty(call.reserve_shape(Keep.EVERYTHING))
        width = call.spec.gates * call.hidden
        for d in range(call.directions):
            if again := getattr(self.scans, "gates_again", None):
                again(call, d, gates, self._previous(d), states[d], self.reserve[d])
                continue
            h = call.input.new_zeros(1, call.rows, call.projected)
            for rows, part in self._previous(d):
                if part is not None:
                    h[0, rows] = part
            others = [state.contiguous().unsqueeze(0) for state in states[d].unbind(1)]
            step = call.one_step(d, [h, *others])
            of_direction = gates[:, d * width : (d + 1) * width]
            self.scans.forward(
                step, of_direction, Keep.EVERYTHING, None, [], self.reserve[d : d + 1]
            )


if not (backends.CUDA_REASON and backends.TRITON_REASON):
    ops.library.impl("layer_forward", layer_forward, "CUDA")
    ops.library.impl("layer_backward", layer_backward, "CUDA")

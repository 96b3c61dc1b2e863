"""The ops on CUDA tensors: one large product for all inputs, a scan, one large product for each gradient.

`layer_forward` and `layer_backward` are those of `rnnkit.ops`; the products are torch's. The scan is a backend's
(`Scans`): the CUDA extension's (cuda.py) or Triton's (triton/scan.py).
"""

import importlib
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol, cast, overload

import torch
from torch import Tensor

from rnnkit import backends, ops, plan
from rnnkit.call import Keep, LayerCall, Results
from rnnkit.specs import WEIGHTS


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
        call: "GpuCall",
        gates: Tensor,
        keep: int,
        output: Tensor | None,
        finals: Sequence[Tensor],
        reserve: Tensor,
        all_states: Sequence[Tensor] = (),
    ) -> None:
        """Runs the scan.

        Args:
            call: the call; its states are given.
            gates: the input's part of the gates, [rows, D*G*H].
            keep: what to write into the reserve.
            output: [rows, D*P], h after each step, on return. None, with no finals, where a call of one step is to
                write the reserve alone; its states other than h may be in the type of sums.
            finals: the final states, on return.
            reserve: [D, rows, values, H], on return; see `LayerCall.reserve_shape`.
            all_states: the states other than h after each step, [rows, D*H], on return; empty if not asked for.
        """

    def backward(
        self,
        back: "Backward",
        initial_grads: Sequence[Tensor | None],
        grad_all_states: Sequence[Tensor | None] = (),
    ) -> Tensor | None:
        """Runs the scan in reverse.

        Args:
            back: the backward pass, whose `grad_gates` are written.
            initial_grads: the gradients of the initial states, on return; None where there are no such states.
            grad_all_states: the gradients of `forward`'s `all_states`; None for zeros.

        Returns:
            The whole gradient of h after its projection, [D, rows, P]; None without a projection.
        """

    def unprojected(self, call: "GpuCall", reserve: Tensor) -> Tensor:
        """h before its projection after each step, [D, rows, H], from a reserve that holds everything."""


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


@overload
def plain(tensor: Tensor) -> Tensor: ...
@overload
def plain(tensor: None) -> None: ...
def plain(tensor: Tensor | None) -> Tensor | None:
    """Contiguous, aligned to 16 bytes, with no operation pending: so no layout changes how products are added up."""
    if tensor is None:
        return None
    tensor = tensor.resolve_neg().contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


@dataclass(frozen=True, eq=False)
class GpuCall(LayerCall):
    """A call whose tensors are contiguous, aligned and on one GPU, as scans and products take them."""

    @classmethod
    def of(cls, call: LayerCall) -> "GpuCall":
        """The call, checked, with `plain` tensors."""
        call.check()
        return cls(*call.arguments).with_tensors([plain(tensor) for tensor in call.tensors])

    @cached_property
    def counts(self) -> list[int]:
        """Rows of each step."""
        return super().counts

    @cached_property
    def starts(self) -> list[int]:
        """The row where each step begins, and the number of rows."""
        return super().starts

    @property
    def ragged(self) -> bool:
        """Whether steps have different numbers of rows."""
        return self.batch_sizes is not None

    def offsets(self) -> Tensor | None:
        """`starts` on the device; None: every step has as many rows."""
        return _sent(torch.tensor(self.starts), self.input.device) if self.ragged else None

    @property
    def precise(self) -> bool:
        """Whether float32 is multiplied as such."""
        return is_precise(self.input.dtype)

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

    def rows_of(self, d: int, step: int) -> slice:
        """Of the step that direction d processes as number `step`."""
        t = self.steps - 1 - step if d else step
        return slice(self.starts[t], self.starts[t + 1])

    def last_rows(self, output: Tensor, out: Tensor) -> None:
        """Copies the h [D, N, P] that each sequence ends with from the output [rows, D*P]."""
        for d in range(self.directions):
            columns = output[:, d * self.projected : (d + 1) * self.projected]
            if d or not self.ragged:
                out[d].copy_(columns[self.rows_of(d, self.steps - 1)])
                continue
            counts = torch.tensor(self.counts)
            last = (counts[:, None] > torch.arange(self.batch)).sum(0) - 1  # of each sequence
            places = torch.tensor(self.starts)[last] + torch.arange(self.batch)
            out[d].copy_(columns.index_select(0, _sent(places, output.device)))

    def matrix(self) -> Tensor:
        """The input as [rows, I]."""
        return self.input.view(self.rows, self.input.size(-1))

    def gates(self) -> Tensor:
        """The input's part of all gates, without biases, [rows, D*G*H]."""
        return self.matrix() @ _joined(self.w_ih).t()

    @property
    def w_ih(self) -> list[Tensor | None]:
        """Of each direction."""
        return self.of_kind("w_ih")

    @property
    def w_hh(self) -> list[Tensor | None]:
        """Of each direction."""
        return self.of_kind("w_hh")

    @property
    def b_ih(self) -> list[Tensor | None]:
        """Of each direction."""
        return self.of_kind("b_ih")

    @property
    def b_hh(self) -> list[Tensor | None]:
        """Of each direction."""
        return self.of_kind("b_hh")

    @property
    def w_hr(self) -> list[Tensor | None]:
        """Of each direction."""
        return self.of_kind("w_hr")


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


def layer_forward(call: LayerCall, packed: Tensor | None, keep: int) -> Results:
    """`rnnkit::layer_forward` on CUDA tensors."""
    run = scans(call.input.device)
    if run is None:
        return ops.forward_composite(call, packed, keep)
    call.check_keep(keep)
    call = GpuCall.of(call)
    outputs, finals, reserve = call.results(keep)
    if call.empty:
        return [o.zero_() for o in outputs], [state.zero_() for state in finals], reserve
    if not call.states:  # zeros are multiplied, too: a weight that is NaN or infinite makes NaN of them, as in torch.nn
        call = replace(call, states=call.zero_states(call.batch))
    with _products_like_scans(call.input):
        output, *all_states = (o.view(call.rows, -1) for o in outputs)
        run.forward(call, call.gates(), keep, output, finals, reserve, all_states)
    return outputs, finals, reserve


def layer_backward(
    call: LayerCall,
    grads: Sequence[Tensor | None],
    output: Tensor,
    reserve: Tensor,
    keep: int,
    needs: Sequence[bool],
) -> list[Tensor]:
    """`rnnkit::layer_backward` on CUDA tensors."""
    run = scans(call.input.device)
    if run is None:
        return ops.backward_composite(call, grads, output, reserve, keep, needs)
    call = GpuCall.of(call)
    call.check_backward(grads, output, reserve, keep, needs)
    wanted = {
        place: tensor
        for place, (tensor, need) in enumerate(zip(call.tensors, needs, strict=True))
        if need and tensor is not None
    }
    if call.empty:
        return [torch.zeros_like(tensor) for tensor in wanted.values()]
    with _products_like_scans(call.input):
        found = Backward(call, run, [plain(g) for g in grads], output, reserve, keep, needs).run()
    return [found[place] for place in wanted]


class Backward:
    """The gradients of one call: the scan back through the gates, then products over all rows at once.

    Attributes:
        call: the call.
        grads: of the output h and of each final state.
        grad_all_states: of the other outputs.
        output: [rows, D*P].
        reserve: [D, rows, saved values, H].
        values: the gradient columns of a hidden unit, see `CellSpec.input_grads`.
        grad_gates: the gates' gradients, [rows, D*values*H].
    """

    def __init__(
        self,
        call: GpuCall,
        run: Scans,
        grads: Sequence[Tensor | None],
        output: Tensor,
        reserve: Tensor,
        keep: int,
        needs: Sequence[bool],
    ) -> None:
        self.call, self.scans, self.needs = call, run, needs
        self.grads = [grads[0], *grads[call.outputs :]]
        self.grad_all_states = [
            None if grad is None else grad.view(call.rows, -1) for grad in grads[1 : call.outputs]
        ]
        self.output = plain(output).view(call.rows, -1)
        self.reserve = reserve.contiguous()
        self.values = call.spec.grad_columns
        self.first_weight = 1 + len(call.states)
        if keep != Keep.EVERYTHING and call.spec.saved > 0:
            self._compute_reserve()

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
        grad_projected = self.scans.backward(self, initial, self.grad_all_states)
        for k, grad in enumerate(initial):
            if grad is not None:
                self.found[1 + k] = grad
        needed = [d for d in range(call.directions) if self.needs[self._place(d, 4)]]
        if grad_projected is not None and needed:
            unprojected = self.scans.unprojected(call, self.reserve)
            for d in needed:
                self.found[self._place(d, 4)] = grad_projected[d].t() @ unprojected[d]
        for d in range(call.directions):
            self._weights(d, self.grad_gates[:, d * width : (d + 1) * width])
        if self.needs[0]:
            self.found[0] = self._input()
        return self.found

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

    def _compute_reserve(self) -> None:
        """Computes what the forward pass did not keep: by one step over all rows, since every h is known."""
        call = self.call
        states, gates = self.reserve, call.gates()
        self.reserve = states.new_empty(call.reserve_shape(Keep.EVERYTHING))
        width = call.spec.gates * call.hidden
        for d in range(call.directions):
            h = call.input.new_zeros(1, call.rows, call.projected)
            for rows, part in self._previous(d):
                if part is not None:
                    h[0, rows] = part
            others = [state.contiguous().unsqueeze(0) for state in states[d].unbind(1)]
            step = GpuCall(call.cell, call.matrix().unsqueeze(0), [h, *others], call.direction(d))
            of_direction = gates[:, d * width : (d + 1) * width]
            reserve = self.reserve[d : d + 1]
            self.scans.forward(step, of_direction, Keep.EVERYTHING, None, [], reserve)


if not (backends.CUDA_REASON and backends.TRITON_REASON):
    ops.library.impl("layer_forward", ops.of_call(layer_forward), "CUDA")
    ops.library.impl("layer_backward", ops.of_call(layer_backward), "CUDA")

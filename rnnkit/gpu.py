"""`layer_forward` and `layer_backward` on CUDA tensors: a product of all inputs, a scan, a product for each gradient.

torch computes the products. The scan is that of a backend (`Scans`): the CUDA extension (cuda.py) or Triton
(triton/scan.py).
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
from torch.nn.functional import layer_norm

from rnnkit import backends, ops, plan
from rnnkit.call import BackwardCall, Keep, LayerCall, Results
from rnnkit.specs import CELLS, NORM_EPSILON, UNIT, WEIGHTS


class Design(Protocol):
    """The plan of a scan; `str` shows all of it."""

    @property
    def kernel(self) -> str:
        """The kernel's name."""

    @property
    def reason(self) -> str:
        """Why this kernel was chosen."""


class Scans(Protocol):
    """The functions of a backend's module: the scans of one layer. The products over all rows are made here."""

    def why_not(self, scan: plan.Scan) -> str:
        """Why these kernels cannot compute a scan; empty if they can."""

    def choose(self, scan: plan.Scan, device: torch.device) -> Design:
        """Plans a scan for a device."""

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
            call: the call; its initial states are never absent.
            gates: [rows, D*G*H], on entry the input parts of the gates, normalized if the call normalizes, without
                biases.
            keep: what to write into the reserve.
            output: [rows, D*P], on return h after each step. None, with empty `finals`, in a call of one step that
                only fills the reserve; the initial states other than h may then have the dtype of sums.
            finals: on return, the final states.
            reserve: [D, rows, V, H], on return what `keep` says; see `LayerCall.reserve_shape`. The products with x
                are there on entry.
            all_states: [rows, D*H] each, on return the states other than h after each step; empty to skip them.
        """

    def backward(
        self,
        back: "Backward",
        initial_grads: Sequence[Tensor | None],
        grad_all_states: Sequence[Tensor | None] = (),
    ) -> Tensor | None:
        """Runs the scan in reverse.

        Args:
            back: the backward pass; on return its `grad_gates` are written.
            initial_grads: on return, the gradients of the call's states; None for each if it has none.
            grad_all_states: the gradients of `forward`'s `all_states`; None for zeros.

        Returns:
            With a projection, the gradient of the projected h after each step, [D, rows, P]; else None.
        """

    def unprojected(self, call: "GpuCall", reserve: Tensor) -> Tensor:
        """h before its projection after each step, [D, rows, H], from a reserve of `Keep.EVERYTHING`."""


#: The module with each backend's scans; imported at the first use.
_MODULES = {"cpp": "rnnkit.cuda", "triton": "rnnkit.triton.scan"}


def _scans_of(backend: str) -> Scans | None:
    """The scans of a backend; None if it has none for GPUs."""
    name = _MODULES.get(backend)
    return None if name is None else cast(Scans, importlib.import_module(name))


def scans(device: torch.device) -> Scans | None:
    """The scans of the backend that serves the device now; None if that is the reference."""
    return _scans_of(backends.serving(device))


def served(scan: plan.Scan, device: torch.device) -> tuple[str, Scans | None, str]:
    """What computes a scan: the kernels of the device's backend, else Triton's beside CUDA's, else the reference.

    Returns:
        The backend, its scans (None for the reference), and why it is not the backend that serves the device; empty if
        it is.
    """
    name, run = backends.serving(device), scans(device)
    if run is None:
        return "reference", None, ""
    reason = run.why_not(scan)
    if reason and name == "cpp" and backends.has_kernels("triton", device):
        name, run = "triton", cast(Scans, _scans_of("triton"))
        if why_not := run.why_not(scan):
            return "reference", None, f"{reason}; in Triton {why_not}"
        return name, run, reason
    return ("reference", None, reason) if reason else (name, run, "")


def is_precise(dtype: torch.dtype) -> bool:
    """Whether float32 is multiplied as float32 and not as TF32, by torch's switch for its own RNNs."""
    return dtype == torch.float32 and torch.backends.cudnn.rnn.fp32_precision != "tf32"  # type: ignore[attr-defined]


class _Precision:
    """Sets torch's switch for float32 products to the precision of RNNs during a call.

    The process has only one such switch. Calls that need the same setting run at once; others wait until it is
    restored.
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
    """Without autograd and autocast, and with torch's matrix products as precise as the scan's."""
    kind = input.device.type
    with torch.no_grad(), _precision(input.dtype):
        if torch.is_autocast_enabled(kind):  # a user may call backward() under autocast
            with torch.autocast(kind, enabled=False):
                yield
        else:
            yield


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies a CPU tensor to the device without waiting for it."""
    if device.type != "cuda":
        return tensor.to(device)
    # A replay would read the pinned memory after it was freed.
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("a packed sequence cannot be captured in a CUDA graph")
    return tensor.pin_memory().to(device, non_blocking=True)


@overload
def plain(tensor: Tensor) -> Tensor: ...
@overload
def plain(tensor: None) -> None: ...
def plain(tensor: Tensor | None) -> Tensor | None:
    """The tensor contiguous, aligned to 16 bytes and without a pending negation.

    Then the layout of an argument does not change the order in which products are summed.
    """
    if tensor is None:
        return None
    tensor = tensor.resolve_neg().contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


@dataclass(frozen=True, eq=False)
class GpuCall(LayerCall):
    """A call whose tensors are contiguous, aligned and on one GPU, as scans and products need them."""

    @classmethod
    def of(cls, call: LayerCall) -> "GpuCall":
        """Checks the call and makes its tensors `plain`."""
        checked = cls(*call.arguments)
        checked.check()
        if checked.reset is not None:
            checked = replace(checked, reset=checked.reset.contiguous())
        if checked.operand_mask is not None or checked.kept is not None:
            kept = None if checked.kept is None else checked.kept.contiguous()
            checked = replace(checked, operand_mask=plain(checked.operand_mask), kept=kept)
        tensors = checked.tensors
        laid_out = [plain(tensor) for tensor in tensors]
        if all(one is other for one, other in zip(tensors, laid_out, strict=True)):
            return checked
        return checked.with_tensors(laid_out)

    # Of a call that does not change, computed once.
    spec = cached_property(LayerCall.spec.fget)  # type: ignore[attr-defined]
    directions = cached_property(LayerCall.directions.fget)  # type: ignore[attr-defined]
    hidden = cached_property(LayerCall.hidden.fget)  # type: ignore[attr-defined]
    projected = cached_property(LayerCall.projected.fget)  # type: ignore[attr-defined]
    projects = cached_property(LayerCall.projects.fget)  # type: ignore[attr-defined]
    counts = cached_property(LayerCall.counts.fget)  # type: ignore[attr-defined]
    starts = cached_property(LayerCall.starts.fget)  # type: ignore[attr-defined]
    batch = cached_property(LayerCall.batch.fget)  # type: ignore[attr-defined]
    rows = cached_property(LayerCall.rows.fget)  # type: ignore[attr-defined]

    # One weight of each direction.
    w_ih = cached_property(lambda self: self.of_kind("w_ih"))
    w_hh = cached_property(lambda self: self.of_kind("w_hh"))
    b_ih = cached_property(lambda self: self.of_kind("b_ih"))
    b_hh = cached_property(lambda self: self.of_kind("b_hh"))
    w_hr = cached_property(lambda self: self.of_kind("w_hr"))

    @property
    def ragged(self) -> bool:
        """Whether steps have different numbers of rows."""
        return self.batch_sizes is not None

    def offsets(self) -> Tensor | None:
        """`starts` on the device; None if all steps have the same number of rows."""
        return sent(torch.tensor(self.starts), self.input.device) if self.ragged else None

    @property
    def precise(self) -> bool:
        """See `is_precise`."""
        return is_precise(self.input.dtype)

    def scan(self, backward: bool) -> plan.Scan:
        """The properties of this call that its plan depends on."""
        return plan.Scan(
            self.cell,
            self.input.dtype.itemsize,
            backward,
            self.hidden,
            self.projected,
            self.batch,
            self.directions,
            self.precise,
            self.normalizes,
            self.heads,
        )

    def norms(self) -> list[Tensor | None]:
        """What scans need of layer normalization: norm_hh, norm_c and norm_c_bias, see `stacked`."""
        if not self.normalizes:
            return [None] * 3
        return [stacked(self.of_kind(name)) for name in ("norm_hh", "norm_c", "norm_c_bias")]

    def unit(self) -> Tensor | None:
        """The parameters of the units, [D, U, H]; None if the cell has none."""
        return stacked(self.of_kind(UNIT)) if self.spec.parameters else None

    def rows_of(self, d: int, step: int) -> slice:
        """The rows of direction d's step number `step`, in the order in which it processes them."""
        t = self.steps - 1 - step if self.reverses(d) else step
        return slice(self.starts[t], self.starts[t + 1])

    def cuts(self, d: int, step: int) -> bool:
        """Whether direction d's step number `step` passes no gradients back to the step before, see `grad_cut`."""
        boundary = self.steps - step if self.reverses(d) else step
        return self.grad_cut > 0 and step > 0 and boundary % self.grad_cut == 0

    def resets(self, d: int, step: int) -> Tensor | None:
        """Which rows are put back between direction d's steps `step` - 1 and `step`: of those that have both steps."""
        if self.reset is None or step == 0 or step == self.steps:
            return None
        rows = [self.rows_of(d, each) for each in (step - 1, step)]
        later = rows[0] if self.reverses(d) else rows[1]  # in time
        return self.reset.view(-1)[later][: min(each.stop - each.start for each in rows)]

    def last_rows(self, output: Tensor, out: Tensor) -> None:
        """Copies each sequence's last h from the output [rows, D*P] to `out` [D, N, P]."""
        for d in range(self.directions):
            columns = output[:, d * self.projected : (d + 1) * self.projected]
            if self.reverses(d) or not self.ragged:
                out[d].copy_(columns[self.rows_of(d, self.steps - 1)])
                continue
            counts = torch.tensor(self.counts)
            # The last step of each sequence.
            last = (counts[:, None] > torch.arange(self.batch)).sum(0) - 1
            places = torch.tensor(self.starts)[last] + torch.arange(self.batch)
            out[d].copy_(columns.index_select(0, sent(places, output.device)))

    def matrix(self) -> Tensor:
        """The input as [rows, I]."""
        return self.input.view(self.rows, self.input.size(-1))

    def gates(self, keep: int, reserve: Tensor) -> Tensor:
        """The input parts of all gates, without biases, [rows, D*G*H]: the input itself where it is the product.

        With layer normalization they are normalized; their products go to `reserve` if it keeps everything.
        """
        found = self.matrix()
        if self.multiplies_input:
            found = found @ _joined(self.w_ih).t()
        if not self.normalizes:
            return found
        of_directions = found.view(self.rows, self.directions, -1)
        if keep == Keep.EVERYTHING:
            products = of_directions.unflatten(-1, (self.spec.gates, -1))
            reserve[:, :, -2 * self.spec.gates : -self.spec.gates] = products.transpose(0, 1)
        factors = [factor for factor in self.of_kind("norm_ih") if factor is not None]
        return torch.cat(
            [
                layer_norm(products, factor.shape, factor, None, NORM_EPSILON)
                for products, factor in zip(of_directions.unbind(1), factors, strict=True)
            ],
            1,
        )


def _joined(weights: Sequence[Tensor | None]) -> Tensor:
    """The tensors that are not None, concatenated along their rows."""
    found = [w for w in weights if w is not None]
    return found[0] if len(found) == 1 else torch.cat(found)


def stacked(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """The directions' tensors as one, [D, ...]; None if they are None."""
    found = [t for t in tensors if t is not None]
    if not found:
        return None
    return found[0].unsqueeze(0) if len(found) == 1 else torch.stack(found)


def serving(call: LayerCall) -> Scans | None:
    """The scans that compute the call; None if the reference does, see `served`."""
    run = scans(call.input.device)
    plain = call.cell in CELLS and call.heads == 1 and not call.normalizes
    if run is None or plain:  # which every backend computes
        return run
    call.check()
    return served(GpuCall(*call.arguments).scan(backward=False), call.input.device)[1]


def layer_forward(call: LayerCall, packed: Tensor | None, keep: int) -> Results:
    """`rnnkit::layer_forward` on CUDA tensors."""
    run = serving(call)
    if run is None:
        return ops.forward_composite(call, packed, keep)
    call.check_keep(keep)
    call = GpuCall.of(call)
    outputs, finals, reserve = call.results(keep)
    if call.empty:
        return [o.zero_() for o in outputs], [state.zero_() for state in finals], reserve
    # Initial states of zero have to be multiplied, too: a NaN or infinite weight makes NaN of them, as in torch.nn.
    if not call.states:
        call = replace(call, states=call.zero_states(call.batch))
    with _products_like_scans(call.input):
        output, *all_states = (o.view(call.rows, -1) for o in outputs)
        gates = call.gates(keep, reserve)
        run.forward(call, gates, keep, output, finals, reserve, all_states)
    return outputs, finals, reserve


def layer_backward(back: BackwardCall) -> list[Tensor]:
    """`rnnkit::layer_backward` on CUDA tensors."""
    run = serving(back.call)
    if run is None:
        return ops.backward_composite(back)
    call = GpuCall.of(back.call)
    back = replace(back, call=call)
    back.check()
    if call.empty:
        zeros = [torch.zeros_like(tensor) for tensor in back.needed.values()]
        return [*zeros, *(new.zero_() for new in back.new_flow())]
    with _products_like_scans(call.input):
        found, flow = Backward(back, call, run).run()
    return [*(cast(Tensor, found[index]) for index in back.needed), *flow]


class Backward:
    """The gradients of one call: a scan in reverse for the gates' gradients, then products over all rows.

    Attributes:
        call: the call.
        grads: the gradients of the output h and of each final state.
        grad_all_states: the gradients of the other outputs.
        output: [rows, D*P], h after each step.
        reserve: [D, rows, V, H], the V values that the cell saves; recomputed if the forward pass kept only states.
        grad_columns: W, the number of gradient columns of a hidden unit.
        gate_column: the first of those of the gates, whose order `CellSpec.input_grads` tells. Those of the cell's
            parameters follow them. With layer normalization those of the products with h stand before them and, for a
            cell whose state is normalized, those of its bias and its factor after them.
        grad_gates: [rows, D*W*H], on return from the scan the gates' gradients.
        flow: on return from the scan the gradient of each state after each step, [rows, D*H] in the dtype of sums; None
            for a projected h, and an empty list if they are not asked for.
    """

    def __init__(self, back: BackwardCall, call: GpuCall, run: Scans) -> None:
        self.call, self.scans, self.needs = call, run, back.needs
        grads = [plain(grad) for grad in back.grads]
        self.grads = [grads[0], *grads[call.outputs :]]
        self.grad_all_states = [
            None if grad is None else grad.view(call.rows, -1) for grad in grads[1 : call.outputs]
        ]
        self.output = plain(back.output).view(call.rows, -1)
        self.reserve = back.reserve.contiguous()
        if back.keep != Keep.EVERYTHING and (call.spec.saved > 0 or call.normalizes):
            self._compute_reserve()
        self.gate_column = call.spec.gates if call.normalizes else 0
        self.grad_columns = self.gate_column + call.spec.grad_columns + call.spec.parameters
        if call.normalizes and call.spec.has_source:
            self.grad_columns += 2
        width = self.grad_columns * call.hidden
        self.grad_gates = call.input.new_empty(call.rows, call.directions * width)
        self._new_flow = back.new_flow()
        self.flow = [
            None if call.projects and k == 0 else new.view(call.rows, -1)
            for k, new in enumerate(self._new_flow)
        ]

    def run(self) -> tuple[list[Tensor | None], list[Tensor]]:
        """The gradients, a list like `call.tensors` with None for some of those that are not needed, and the flow."""
        call = self.call
        states = call.spec.states
        initial: list[Tensor | None] = [
            call.input.new_empty(call.state_shape(k % states)) for k in range(len(call.states))
        ]
        initial = initial or [None] * states
        grad_projected = self.scans.backward(self, initial, self.grad_all_states)
        if grad_projected is not None and self._new_flow:
            of_h = self._new_flow[0].view(call.rows, call.directions, -1)
            of_h.copy_(grad_projected.transpose(0, 1))
        weights = [self._weights(d) for d in range(call.directions)]
        of_w_hr = self._need("w_hr")
        if grad_projected is not None and any(of_w_hr):
            unprojected = self.scans.unprojected(call, self.reserve)
            for d, need in enumerate(of_w_hr):
                if need:
                    weights[d][WEIGHTS.index("w_hr")] = grad_projected[d].t() @ unprojected[d]
        given = initial if call.states else []
        of_input = self._input() if self.needs[0] else None
        of_weights = (grad for of_direction in weights for grad in of_direction)
        return [of_input, *given, *of_weights], self._new_flow

    def _need(self, name: str) -> Sequence[bool]:
        """For each direction, whether the gradient of its weight `name` is needed."""
        kinds = self.call.kinds
        return self.needs[1 + len(self.call.states) + kinds.index(name) :: len(kinds)]

    def _previous(self, d: int) -> list[tuple[slice, Tensor | None]]:
        """h_{t-1} of all rows, as a list of (range of rows, matrix); None instead of a matrix means zeros."""
        call, reverse = self.call, self.call.reverses(d)
        width = call.projected
        output = self.output[:, d * width : (d + 1) * width]
        initial = call.states[0][d] if call.states else None
        if not call.ragged:
            edge, rows = call.batch, call.rows
            inner = (slice(0, rows - edge), slice(edge, rows))
            of, before = inner if reverse else inner[::-1]
            parts: list[tuple[slice, Tensor | None]] = [
                (slice(rows - edge, rows) if reverse else slice(0, edge), initial)
            ]
            if call.steps == 1:
                return parts
            h = output[before]
            if call.reset is not None:
                of_steps = h.unflatten(0, (call.steps - 1, call.batch))
                h = torch.where(call.reset[1:].unsqueeze(-1), self._reset_h(d), of_steps).flatten(
                    0, 1
                )
            return [(of, h), *parts]
        if initial is None:
            initial = call.input.new_zeros(call.batch, width)
        # index: for each row, the place of its previous h in [output, initial]: in the output of the step before, in
        # scan order, or in `initial` if the sequence begins. active: for each step, the active rows of the step before.
        counts = torch.tensor(call.counts)
        zero, starts = counts.new_zeros(1), counts.cumsum(0) - counts
        active = torch.cat([counts[1:], zero] if reverse else [zero, counts[:-1]])
        step = torch.arange(call.steps).repeat_interleave(counts)
        n = torch.arange(call.rows) - starts[step]
        row = (starts + counts if reverse else starts - active)[step] + n
        continues = n < active[step]
        index = sent(torch.where(continues, row, call.rows + n), output.device)
        h = torch.cat([output, initial]).index_select(0, index)
        if call.reset is not None:
            # The boundary has the later row's place: here the row itself or, in the reverse direction, the one before.
            reset = call.reset
            if reverse:
                reset = reset[sent(torch.where(continues, row, 0), output.device)]
            mask = reset & sent(continues, output.device)
            new = self._reset_h(d).index_select(0, sent(n, output.device))
            h = torch.where(mask.unsqueeze(-1), new, h)
        return [(slice(0, call.rows), h)]

    def _reset_h(self, d: int) -> Tensor:
        """The h that resets put direction d's sequences back to, [N, P]."""
        call = self.call
        if call.reset_states:
            return call.reset_states[0][d]
        return call.input.new_zeros(call.batch, call.projected)

    def _masks(self, d: int) -> Tensor | None:
        """`LayerCall.operand_mask` of direction d for all rows, [rows, P]; None if there is none."""
        call = self.call
        if call.operand_mask is None:
            return None
        mask = call.operand_mask[d]
        if not call.ragged:
            return mask.repeat(call.steps, 1)
        counts = torch.tensor(call.counts)
        places = torch.arange(call.rows) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        return mask.index_select(0, sent(places, mask.device))

    def _runs(self) -> list[tuple[int, int, int]]:
        """Runs of gates whose input parts have adjacent gradient columns: (first gate, last gate + 1, first column).

        Columns are counted from `gate_column` on.
        """
        runs: list[tuple[int, int, int]] = []
        for gate, place in enumerate(self.call.spec.input_grads):
            if runs and place == runs[-1][2] + gate - runs[-1][0]:
                runs[-1] = (runs[-1][0], gate + 1, runs[-1][2])
            else:
                runs.append((gate, gate + 1, place))
        return runs

    def _columns(self, d: int, first: int, count: int) -> Tensor:
        """The gradient columns `first` to `first + count` of direction d, [rows, count*H]."""
        begin = (d * self.grad_columns + first) * self.call.hidden
        return self.grad_gates[:, begin : begin + count * self.call.hidden]

    def _of_inputs(self, d: int) -> list[tuple[int, Tensor]]:
        """The gradients of direction d's products with x: (first row of w_ih, gradients of that and further rows)."""
        if self.call.normalizes:
            return [(0, self._through_norm_ih[d][0])]
        H = self.call.hidden
        return [(first * H, self._columns(d, at, end - first)) for first, end, at in self._runs()]

    @cached_property
    def _through_norm_ih(self) -> list[tuple[Tensor, Tensor]]:
        """For each direction the gradients of its products with x, [rows, G*H], and of norm_ih."""
        call, found = self.call, []
        for d, factor in enumerate(call.of_kind("norm_ih")):
            assert factor is not None
            parts = [
                self._columns(d, self.gate_column + at, end - first)
                for first, end, at in self._runs()
            ]
            grads = torch.cat(parts, 1).to(call.sum_dtype)
            products, factor, shape = self._products(d, -2), factor.to(call.sum_dtype), factor.shape
            _, mean, rstd = torch.native_layer_norm(products, shape, factor, None, NORM_EPSILON)
            of_products, of_factor, _ = torch.ops.aten.native_layer_norm_backward(
                grads, products, shape, mean, rstd, factor, None, [True, True, False]
            )
            found.append((of_products.to(call.input.dtype), of_factor.to(call.input.dtype)))
        return found

    def _products(self, d: int, place: int) -> Tensor:
        """What the reserve has of direction d's products with x, place -2, or with h, place -1: [rows, G*H]."""
        gates = self.call.spec.gates
        first = self.reserve.size(2) + place * gates
        return self.reserve[d, :, first : first + gates].flatten(1)

    def _norms(self, d: int) -> list[Tensor | None]:
        """The gradients of direction d's weights of layer normalization, see `specs.NORMS`; none without it."""
        call = self.call
        if not call.normalizes:
            return []
        gates, dtype = call.spec.gates, call.input.dtype
        of_gates = self._columns(d, self.gate_column, gates)
        products = self._products(d, -1)
        normalized = layer_norm(products, products.shape[1:], eps=NORM_EPSILON)
        norm_hh = (of_gates * normalized).sum(0).to(dtype)
        norm_c = norm_c_bias = None
        if call.spec.has_source:
            norm_c_bias = self._columns(d, self.grad_columns - 2, 1).sum(0)
            norm_c = self._columns(d, self.grad_columns - 1, 1).sum(0)
        return [self._through_norm_ih[d][1], norm_hh, norm_c, norm_c_bias]

    def _weights(self, d: int) -> list[Tensor | None]:
        """The gradients of direction d's weights, see `LayerCall.kinds`; None instead of that of w_hr."""
        call, spec, H = self.call, self.call.spec, self.call.hidden
        recurrent = self._columns(d, 0, spec.recurrent)
        w_ih = w_hh = b_ih = b_hh = None
        if self._need("w_ih")[d]:
            x = call.matrix()
            w_ih = _joined([part.t() @ x for _, part in self._of_inputs(d)])
        if self._need("w_hh")[d]:
            masks = self._masks(d)
            for rows, h in self._previous(d):
                if h is None:
                    continue
                if masks is not None:
                    h = h * masks[rows]
                part = recurrent[rows].t()
                w_hh = part @ h if w_hh is None else torch.addmm(w_hh, part, h)
            if w_hh is None:
                w_hh = call.input.new_zeros(spec.recurrent * H, call.projected)
        if self._need("b_ih")[d] or self._need("b_hh")[d]:
            sums = self._columns(d, self.gate_column, spec.grad_columns).sum(0)
            inputs = [sums[at * H : (at + end - first) * H] for first, end, at in self._runs()]
            b_ih, b_hh = _joined(inputs), sums[: spec.recurrent * H].clone()
        of_unit = [self._unit(d)] if spec.parameters else []
        return [w_ih, w_hh, b_ih, b_hh, None, *self._norms(d), *of_unit]

    def _unit(self, d: int) -> Tensor | None:
        """The gradients of direction d's parameters of units, [U, H]; None if they are not needed."""
        spec = self.call.spec
        if not self._need(UNIT)[d]:
            return None
        sums = self._columns(d, self.gate_column + spec.grad_columns, spec.parameters).sum(0)
        return sums.view(spec.parameters, -1)

    def _input(self) -> Tensor:
        call = self.call
        grad = None
        if self._runs() == [(0, self.grad_columns, 0)]:  # there are no other columns
            grad = (
                self.grad_gates @ _joined(call.w_ih) if call.multiplies_input else self.grad_gates
            )
        elif not call.multiplies_input:
            parts = [part for d in range(call.directions) for _, part in self._of_inputs(d)]
            grad = torch.cat(parts, 1)
        else:
            for d, w_ih in enumerate(call.w_ih):
                assert w_ih is not None
                for first, part in self._of_inputs(d):
                    weight = w_ih[first : first + part.size(1)]
                    grad = part @ weight if grad is None else torch.addmm(grad, part, weight)
        assert grad is not None
        return grad.view(call.input.shape)

    def _compute_reserve(self) -> None:
        """Recomputes the reserve in one step over all rows at once, which works because h is known at every step."""
        call = self.call
        states = self.reserve
        self.reserve = states.new_empty(call.reserve_shape(Keep.EVERYTHING))
        gates = call.gates(Keep.EVERYTHING, self.reserve)
        width = call.spec.gates * call.hidden
        for d in range(call.directions):
            h = call.input.new_zeros(1, call.rows, call.projected)
            for rows, part in self._previous(d):
                if part is not None:
                    h[0, rows] = part
            before = states[d].unbind(1)[: call.spec.states - 1]
            others = [state.contiguous().unsqueeze(0) for state in before]
            of_direction = gates[:, d * width : (d + 1) * width]
            weights = call.weights[d * len(call.kinds) : (d + 1) * len(call.kinds)]
            step = GpuCall(call.cell, of_direction.unsqueeze(0), [h, *others], weights)
            if call.keeps_given:
                step = replace(step, zoneout=call.zoneout)
            if (masks := self._masks(d)) is not None:
                step = replace(step, operand_mask=masks.unsqueeze(0))
            reserve = self.reserve[d : d + 1]
            self.scans.forward(step, of_direction, Keep.EVERYTHING, None, [], reserve)


if not (backends.CUDA_REASON and backends.TRITON_REASON):
    ops.library.impl("layer_forward", ops.of_call(layer_forward), "CUDA")
    ops.library.impl("layer_backward", ops.of_backward(layer_backward), "CUDA")

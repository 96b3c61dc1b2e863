"""One layer with gradients: picks the backend and wraps the ops for autograd.

First-order gradients run on the ops. Double backward, forward-mode AD and torch.func transforms run on the
differentiable reference, which makes them correct for every cell without kernels for them.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from rnnkit import backends, exporting, flow, gpu, ops, reference
from rnnkit.call import BackwardCall, Keep, LayerCall


def run(
    call: LayerCall, *, keep: Keep = Keep.EVERYTHING, packed: Tensor | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """The results of `reference.run`, computed by the backend that serves the input's device.

    `keep` is used only if gradients are needed; `packed`, the packed weights of a frozen layer, only if they are not.
    """
    device = call.input.device
    if torch.compiler.is_compiling():
        if torch.onnx.is_in_onnx_export():
            return exporting.run(call)
        # AOTInductor cannot pass an empty list to an op.
        if torch.compiler.is_exporting() and not call.states:
            call = replace(call, states=call.zero_states(call.batch_of_graph))
    tensors = [tensor for tensor in call.tensors if tensor is not None]
    if (_on_reference(device) and not _is_recorded()) or transformed(tensors):
        return reference.run(call)
    if torch.is_grad_enabled() and _need_grad(tensors):
        found = _Layer.apply(
            *(
                call.cell,
                call.batch_sizes,
                call.all_states,
                call.grad_clip,
                call.grad_cut,
                call.reset,
                call.operand_mask,
                tuple(call.zoneout),
                call.kept,
                call.heads,
            ),
            *(len(call.states), keep),
            *call.tensors,
        )
        output, *others = found[: call.outputs]
        # The backward pass needs the output, and a script may write to the one that it gets.
        if torch.compiler.is_compiling():
            output = output.clone()
        return [output, *others], list(found[call.outputs :])
    if _interprets(device):
        packed = None
    outputs, finals, _ = _ops(device).layer_forward(call, packed, Keep.NOTHING)
    return outputs, finals


def _is_recorded() -> bool:
    """Whether the backward pass has to go through `gradients`, which hands the gradients of states to a recorder."""
    return not torch.compiler.is_compiling() and flow.records()


def _interprets(device: torch.device) -> bool:
    """Whether Triton's interpreter runs the GPU ops on these CPU tensors."""
    return device.type == "cpu" and backends.forced_backend() == "triton"


class _Composites:
    """The ops on the reference, where a recorder keeps calls from running as ordinary torch code."""

    layer_forward = staticmethod(ops.forward_composite)
    layer_backward = staticmethod(ops.backward_composite)


def _ops(device: torch.device) -> Any:
    """`ops`, which dispatches by device, or what serves the device in another way."""
    if _interprets(device):  # by Triton, on CPU tensors
        return gpu
    return _Composites if _on_reference(device) else ops


def _on_reference(device: torch.device) -> bool:
    """Whether to run the reference as ordinary torch code, which autograd and compilers trace op by op.

    In a compiled graph the reference stays behind the op, unless a user forced it: one node instead of T steps.
    """
    if backends.serving(device) != "reference":
        return False
    return not torch.compiler.is_compiling() or backends.forced_backend() is not None


def _need_grad(tensors: Sequence[Tensor]) -> bool:
    """Whether any tensor needs a gradient; an inference tensor cannot have one, even if its requires_grad is True."""
    if torch.compiler.is_compiling():  # the compiler cannot trace is_inference
        return any(t.requires_grad for t in tensors)
    return any(t.requires_grad and not t.is_inference() for t in tensors)


def transformed(tensors: Sequence[Tensor]) -> bool:
    """Whether a torch.func transform is active or a tensor has a forward-mode tangent."""
    if torch.compiler.is_compiling():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    # is_grads_batched=True makes such tensors.
    if any(torch._C._functorch.is_legacy_batchedtensor(t) for t in tensors):
        return True
    if forward_ad._current_level < 0:
        return False
    return any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)


class _Watch:
    """Detects writes to a tensor without keeping its memory alive."""

    def __init__(self, tensor: Tensor) -> None:
        self._counter = tensor.detach()
        self._counter.data = tensor.new_empty(0)  # still shares the tensor's version counter
        self._version = tensor._version

    def written(self) -> bool:
        return self._counter._version != self._version


def _as_they_are(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Aliases of the tensors' present data, which stay valid if a user assigns to `.data` later.

    An empty list under hooks of saved tensors, such as `save_on_cpu`, which keep the data themselves.
    """
    if torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
        return []
    return [None if t is None else t.data for t in tensors]


def _are_differentiated(grads: Sequence[Tensor | None]) -> bool:
    """Whether the backward pass from `grads` has to be differentiable itself, or runs under a transform."""
    create_graph = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return create_graph or transformed([g for g in grads if g is not None])


def _with_data(saved: list[Any], count: int, differentiated: bool) -> list[Any]:
    """The first `count` tensors of `saved`, with the data that they had in the forward pass.

    The rest of `saved` is the result of `_as_they_are`. Gradients that are `differentiated` have to refer to the
    tensors themselves, which then need to have their old data still.

    Raises:
        RuntimeError: a tensor has other data now, and the gradients are to be `differentiated`.
    """
    tensors, before = saved[:count], saved[count:]
    if not differentiated:
        return before or tensors
    for now, then in zip(tensors, before, strict=False):
        if now is not None and not torch._C._is_alias_of(now, then):  # type: ignore[attr-defined]
            raise RuntimeError(
                "expected input, hx and weights to keep their data until the backward pass, since its result is to be "
                "differentiated, got one whose .data was assigned to"
            )
    return tensors


_AS_IT_IS = nullcontext()


#: The place of the first tensor among the arguments of `_Layer`.
_TENSORS = 12


class _Layer(torch.autograd.Function):
    """(fields of the call, number of states, keep, *tensors of the call) -> (*outputs, *final states)."""

    @staticmethod
    def forward(
        ctx: Any,
        cell: str,
        batch_sizes: Tensor | None,
        all_states: bool,
        grad_clip: float,
        grad_cut: int,
        reset: Tensor | None,
        operand_mask: Tensor | None,
        zoneout: Sequence[float],
        kept: Tensor | None,
        heads: int,
        n_states: int,
        keep: Keep,
        input: Tensor,
        *others: Tensor | None,
    ) -> tuple[Tensor, ...]:
        states: Any = others[:n_states]
        weights = others[n_states:]
        options = all_states, grad_clip, grad_cut, reset, operand_mask, zoneout
        call = LayerCall(cell, input, states, weights, batch_sizes, *options, kept, heads)
        outputs, finals, reserve = _ops(input.device).layer_forward(call, None, keep)
        output = outputs[0]
        ctx.cell, ctx.rule, ctx.zoneout, ctx.heads = cell, options[:3], zoneout, heads
        ctx.n_states, ctx.keep = n_states, keep
        ctx.backend = None if torch.compiler.is_compiling() else backends.forced_backend()
        ctx.set_materialize_grads(False)
        # Users may write to torch.nn's output before the backward pass, and to this one. The output is therefore saved
        # without autograd's check of its version, and computed again if it was written to.
        compiling = torch.compiler.is_compiling()
        ctx.watch = None if compiling else _Watch(output)
        ctx.save_for_backward(
            *(batch_sizes, reset, operand_mask, kept),
            *(output if compiling else output.data, reserve),
            *(input, *others),
            *(() if compiling else _as_they_are((input, *others))),
        )
        return *outputs, *finals

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        batch_sizes, reset, operand_mask, kept, output, reserve, *saved = ctx.saved_tensors
        needs = ctx.needs_input_grad[_TENSORS:]
        input, *others = _with_data(saved, len(needs), _are_differentiated(grads))
        states, weights = others[: ctx.n_states], others[ctx.n_states :]
        all_states, clip, cut = ctx.rule
        call = LayerCall(
            ctx.cell,
            input,
            states,
            weights,
            *(batch_sizes, all_states, clip, cut, reset, operand_mask, ctx.zoneout, kept),
            ctx.heads,
        )
        back = BackwardCall(call, grads, output, reserve, ctx.keep, list(needs))
        written = ctx.watch is not None and ctx.watch.written()
        # Autograd runs backward passes of a GPU in another thread, where no backend is forced.
        with backends.forcing(ctx.backend) if ctx.backend else _AS_IT_IS:
            found = gradients(back, written, saved[1 + ctx.n_states + 1])
        return *[None] * _TENSORS, *found


def gradients(back: BackwardCall, written: bool, w_hh: Tensor | None) -> list[Tensor | None]:
    """`layer_backward`, or the reference's gradients if they have to be differentiable or are transformed.

    If `written`, the output was written to since the forward pass and is computed again. `w_hh` is the tensor that the
    call had as its first direction's. Returns a list like `back.call.tensors`, None where `back.needs` is False.
    """
    found_place = None
    if _is_recorded() and not transformed([g for g in back.grads if g is not None]):
        found_place = flow.find(w_hh)
        back = replace(back, flow=found_place is not None)
    if _are_differentiated(back.grads):
        found, of_states = ops.differentiable_backward(back, torch.is_grad_enabled())
    else:
        backend = _ops(back.call.input.device)
        if written:
            of_h = replace(back.call, all_states=False)
            back = replace(back, output=backend.layer_forward(of_h, None, Keep.NOTHING)[0][0])
        results = backend.layer_backward(back)
        count = len(back.needed)
        found, of_states = back.in_place_of(results[:count]), results[count:]
    if found_place is not None:
        recorder, place = found_place
        recorder.add(place, back, of_states, has_reserve=_has_reserve(back.call))
    return found


def _has_reserve(call: LayerCall) -> bool:
    """Whether kernels computed the call: the reference leaves the reserve empty."""
    backend = backends.serving(call.input.device)
    if backend == "reference":
        return False
    return (backend == "cpp" and call.input.device.type == "cpu") or gpu.serving(call) is not None

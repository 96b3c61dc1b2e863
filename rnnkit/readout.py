"""The output layer of an RNN, y_t = softmax(W_hy h_t + b_hy), and its cross-entropy without all logits in memory.

`Readout` checks and flattens its arguments to rows; `_Loss` is the loss of rows for autograd; `_loss_of_rows` computes
it a chunk of rows at a time. In graphs of torch.compile and torch.export it is the op `rnnkit::readout_loss`.

torch 2.13's `F.linear_cross_entropy` with `options` also computes chunks. It is not used: it has no gradients of
gradients, its backward pass runs only once, all rows ignored give gradients of NaN, and autocast does not reach it.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast, overload

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Proxy
from torch.nn.functional import cross_entropy, linear, log_softmax, softmax
from torch.nn.utils.rnn import PackedSequence

from rnnkit import sharding
from rnnkit.autograd import transformed
from rnnkit.ops import library
from rnnkit.stack import check_plain

#: A chunk has as many rows as have logits of this many bytes, but not fewer than `_FEWEST_ROWS`: the gradient of the
#: weight is read and written once a chunk, which costs more than the products of a few rows.
_CHUNK_BYTES = 2**26
_FEWEST_ROWS = 64


class Readout(nn.Linear):
    r"""Output layer of an RNN: the probability of each class at each step.

    .. math:: y_t = \mathrm{softmax}(W_{hy} h_t + b_{hy})

    Its parameters are those of `torch.nn.Linear(hidden_size, num_classes)`, so that either loads the other's
    state_dict. A call returns log-probabilities; `predict` returns probabilities, `loss` the cross-entropy.

    Args:
        hidden_size: H, features of the hidden state.
        num_classes: C, number of classes.
        bias: whether the layer has `b_hy`. Default True.
        device, dtype: device and dtype of the parameters.

    Shape:
        h [..., H] or a PackedSequence of [rows, H]. Returns [..., C] or a PackedSequence of [rows, C].

    Raises:
        AttributeError: `h` is neither a Tensor nor a PackedSequence.
        RuntimeError: the last size, dtype or device of `h` is not the weight's.

    Source: Bridle 1990, "Probabilistic interpretation of feedforward classification network outputs, with relationships
    to statistical pattern recognition", for the softmax; Mikolov, Karafiát, Burget, Černocký & Khudanpur 2010,
    "Recurrent neural network based language model", for an RNN with this output; parameters and initialization as in
    `torch.nn.Linear`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_classes: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden_size, num_classes, bias, device, dtype)

    @overload
    def forward(self, h: Tensor) -> Tensor: ...
    @overload
    def forward(self, h: PackedSequence) -> PackedSequence: ...
    def forward(self, h: Any) -> Any:
        """Log-probabilities log y_t; see the class."""
        return self._normalized(log_softmax, h)

    if TYPE_CHECKING:  # nn.Module.__call__ is typed as returning Any
        __call__ = forward

    @overload
    def predict(self, h: Tensor) -> Tensor: ...
    @overload
    def predict(self, h: PackedSequence) -> PackedSequence: ...
    def predict(self, h: Any) -> Any:
        """Probabilities y_t, shaped as in a call; see the class."""
        return self._normalized(softmax, h)

    def _normalized(self, function: Callable[[Tensor, int], Tensor], h: Any) -> Any:
        """`function`, of the logits and the dimension of classes, over the rows of a Tensor or a PackedSequence."""
        if isinstance(h, PackedSequence):
            return PackedSequence(function(self._logits(h.data), -1), h[1], h[2], h[3])
        return function(self._logits(h), -1)

    def loss(
        self,
        h: Tensor | PackedSequence,
        targets: Tensor | PackedSequence,
        *,
        ignore_index: int = -100,
        lengths: Tensor | Sequence[int] | None = None,
        batch_first: bool = False,
        reduction: str = "mean",
        chunk: int | None = None,
    ) -> Tensor:
        r"""Cross-entropy of the classes at each step, without ever holding the logits of all rows.

        .. math:: -\frac{1}{|R|} \sum_{r \in R} \log y_{r, \mathrm{target}_r}

        R are the rows (steps of sequences) that are not ignored. The result and its gradients are those of
        `F.cross_entropy(F.linear(h, weight, bias), targets)`. If gradients are needed, they are computed with the
        loss, a chunk of rows at a time, and kept until the backward pass, which multiplies them by the gradient of
        the result. Gradients of gradients and `torch.func` transforms do compute the logits of all rows. A mean of no
        rows is NaN.

        Args:
            h: hidden states [..., H], or a PackedSequence of [rows, H].
            targets: classes from 0 to C - 1, int64, shaped like `h` without H: [...], or a PackedSequence of [rows]
                that was packed with the same lengths.
            ignore_index: the target of rows to leave out.
            lengths: of padded sequences, integers [N] from 0 to T: rows of steps t >= lengths[n] are left out.
                `h` is then [T, N, H] and `targets` [T, N].
            batch_first: whether `h` is [N, T, H] and `targets` [N, T]; used only with `lengths`.
            reduction: `"mean"` or `"sum"` over R.
            chunk: number of rows whose logits are held at once. By default their logits take 64 MiB in float32.

        Returns:
            A scalar of the dtype of `h`; float32 under autocast. It is summed in float32 or better.

        Raises:
            AttributeError: `h` or `targets` is no Tensor, or only one of them is a PackedSequence.
            IndexError: a target is out of range (on a GPU an assertion of the device).
            RuntimeError: the last size, dtype or device of `h`, the dtype or device of `targets`, or `lengths` do not
                fit.
            ValueError: the shapes or lengths of `h` and `targets` differ; `reduction` or `chunk` is none of
                the above.

        Source: the chunks with gradients in the forward pass are those of Hsu et al. 2024, "Liger Kernel: Efficient
        Triton Kernels for LLM Training".
        """
        if reduction not in ("mean", "sum"):
            raise ValueError(f"expected reduction to be 'mean' or 'sum', got {reduction!r}")
        if chunk is not None and chunk < 1:
            raise ValueError(f"expected chunk to be 1 or more, got {chunk}")
        if isinstance(h, PackedSequence) or isinstance(targets, PackedSequence):
            if lengths is not None:
                raise ValueError("expected lengths to be None for a PackedSequence, got lengths")
            h, targets = _unpacked(h, targets)
        self._check(h)
        check_plain("h", h)
        _check_targets(h, targets)
        if lengths is not None:
            targets = _without_padding(targets, lengths, batch_first, ignore_index)
        rows, dtype = h.reshape(targets.numel(), h.size(-1)), h.dtype  # [R, H]
        tensors: Any = [rows, self.weight, self.bias]
        if _is_autocast(h) and dtype != torch.float64:
            low, dtype = torch.get_autocast_dtype(h.device.type), torch.float32
            tensors = [None if t is None else t.to(low) for t in tensors]
        rest: Any = (targets.reshape(-1), ignore_index, reduction == "mean")
        if transformed([t for t in tensors if t is not None]):
            return _loss_of_all(*tensors, *rest).to(dtype)
        # Not `ctx.needs_input_grad`, which is also True under no_grad.
        needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in tensors]
        return cast(Tensor, _Loss.apply(*tensors, *rest, chunk or 0, needs)).to(dtype)

    def _check(self, h: Tensor) -> None:
        """Checks h against the weight, which functional_call or a parametrization may have replaced."""
        if not isinstance(h, Tensor):
            raise AttributeError(
                f"expected h to be a Tensor or PackedSequence, got {type(h).__name__}"
            )
        weight = self.weight
        width = weight.shape[1]  # ExpandedWeights have no `size`
        if h.dim() == 0 or h.size(-1) != width:
            raise RuntimeError(f"expected h of shape [..., {width}], got {tuple(h.shape)}")
        if sharding.is_sharded(weight) and not sharding.is_sharded(h):
            raise RuntimeError(
                "expected the whole weight, got a shard: after fully_shard(readout), pass readout and each method to "
                "call, 'loss' or 'predict', to torch.distributed.fsdp.register_fsdp_forward_method"
            )
        if h.device != weight.device:
            raise RuntimeError(f"expected h on {weight.device} like weight, got {h.device}")
        if h.dtype != weight.dtype and not _is_autocast(h):
            raise RuntimeError(f"expected h in {weight.dtype} like weight, got {h.dtype}")

    def _logits(self, h: Tensor) -> Tensor:
        if not isinstance(h, Proxy) and not torch.jit.is_tracing():  # type: ignore[attr-defined]
            self._check(h)
        return linear(h, self.weight, self.bias)


def _unpacked(h: Any, targets: Any) -> tuple[Tensor, Tensor]:
    """The data of two PackedSequences, of which row by row is of the same sequence and step."""
    for name, given in (("h", h), ("targets", targets)):
        if not isinstance(given, PackedSequence):
            raise AttributeError(
                f"expected h and targets to be PackedSequences, got {name} of type {type(given).__name__}"
            )
    if not torch.compiler.is_compiling():
        for name in ("batch_sizes", "sorted_indices"):
            ours, theirs = getattr(h, name), getattr(targets, name)
            if ours is not theirs and (
                ours is None or theirs is None or not torch.equal(ours, theirs)
            ):
                raise ValueError(
                    f"expected targets to be packed with the lengths of h, got another {name}"
                )
    return h.data, targets.data


def _check_targets(h: Tensor, targets: Tensor) -> None:
    check_plain("targets", targets)
    if targets.shape != h.shape[:-1]:
        raise ValueError(
            f"expected targets of shape {tuple(h.shape[:-1])}, got {tuple(targets.shape)}"
        )
    if targets.dtype != torch.int64:
        raise RuntimeError(f"expected targets to be classes in torch.int64, got {targets.dtype}")
    if targets.device != h.device:
        raise RuntimeError(f"expected targets on {h.device} like h, got {targets.device}")


def _without_padding(
    targets: Tensor, lengths: Tensor | Sequence[int], batch_first: bool, ignore_index: int
) -> Tensor:
    """Targets, [N, T] if `batch_first` else [T, N], with `ignore_index` in the steps after each sequence's end."""
    if targets.dim() != 2:
        raise ValueError(f"expected h to be 3-D if there are lengths, got {targets.dim() + 1}-D")
    lengths = torch.as_tensor(lengths)
    batch, steps = targets.shape if batch_first else reversed(targets.shape)
    if lengths.shape != (batch,) or lengths.is_floating_point():
        raise RuntimeError(
            f"expected lengths to be integers of shape ({batch},), N of h with batch_first={batch_first}, got "
            f"{lengths.dtype} of {tuple(lengths.shape)}"
        )
    outside = (lengths < 0) | (lengths > steps)
    if _values_are_at_hand(lengths) and outside.any():
        raise RuntimeError(f"expected lengths from 0 to T = {steps}, got {lengths.tolist()}")
    step, lengths = torch.arange(steps, device=targets.device), lengths.to(targets.device)
    over = step >= lengths.unsqueeze(1) if batch_first else step.unsqueeze(1) >= lengths
    return targets.masked_fill(over, ignore_index)


def _is_autocast(tensor: Tensor) -> bool:
    """Whether autocast is on for the tensor's device."""
    kind = tensor.device.type
    return kind != "meta" and torch.is_autocast_enabled(kind)


def _in_graph(tensor: Tensor) -> bool:
    """Whether the call is recorded, or its tensors have no values."""
    return torch.compiler.is_compiling() or isinstance(tensor, FakeTensor) or tensor.is_meta


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the softmax is computed and gradients are summed."""
    return torch.promote_types(dtype, torch.float32)


def _loss_of_all(
    h: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, ignore_index: int, mean: bool
) -> Tensor:
    """The loss of rows h [R, H], from the logits of all rows, which autograd can differentiate any number of times."""
    logits = linear(h, weight, bias).to(_wide(h.dtype))
    reduction = "mean" if mean else "sum"
    return cross_entropy(logits, targets, ignore_index=ignore_index, reduction=reduction)


class _Loss(torch.autograd.Function):
    """The arguments of `_loss_of_all`, rows in a chunk and which gradients are needed -> the loss."""

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        ignore_index: int,
        mean: bool,
        chunk: int,
        needs: list[bool],
    ) -> Tensor:
        compute = torch.ops.rnnkit.readout_loss if _in_graph(h) else _loss_of_rows
        loss, *grads = compute(h, weight, bias, targets, ignore_index, chunk, needs)
        count = (targets != ignore_index).sum() if mean else None
        ctx.save_for_backward(h, weight, bias, targets, count, *grads)
        ctx.ignore_index = ignore_index
        return cast(Tensor, loss if count is None else loss / count)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        h, weight, bias, targets, count, *found = ctx.saved_tensors
        needs, given = ctx.needs_input_grad[:3], (h, weight, bias)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            rest = (targets, ctx.ignore_index, count is not None)
            return *_differentiable_gradients(given, needs, rest, grad), *[None] * 5
        # The loss of no rows is NaN, its gradients are 0.
        factor = grad if count is None else grad / count.clamp(min=1)
        grads = [
            (saved * factor).to(tensor.dtype) if need else None
            for saved, tensor, need in zip(found, given, needs, strict=True)
        ]
        return *grads, *[None] * 5


def _differentiable_gradients(
    given: Sequence[Tensor | None], needs: Sequence[bool], rest: Any, grad: Tensor
) -> list[Tensor | None]:
    """The gradients of `_loss_of_all` w.r.t. `given` (h, weight, bias), which can be differentiated again."""
    # Aliases, since h may itself depend on the weight.
    tensors = [None if t is None else t.view_as(t) for t in given]
    loss = _loss_of_all(*tensors, *rest)  # type: ignore[arg-type]
    wanted = [t for t, need in zip(tensors, needs, strict=True) if need and t is not None]
    found = iter(torch.autograd.grad(loss, wanted, grad, create_graph=True))
    return [next(found) if need else None for need in needs]


def _loss_of_rows(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int,
    chunk: int,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The sum of the rows' losses and its gradients, a chunk of rows at a time.

    Args:
        h: hidden states [R, H].
        weight: W_hy [C, H].
        bias: b_hy [C].
        targets: classes [R].
        ignore_index: the target of rows to leave out.
        chunk: number of rows in a chunk; 0 for the default.
        needs: which gradients are needed: of h, weight and bias.

    Returns:
        The loss and the gradients of h, weight and bias, empty where not needed, as `_results` makes them.

    Raises:
        IndexError: a target is out of range (only on the CPU).
    """
    classes, wide = weight.size(0), _wide(h.dtype)
    with torch.no_grad():
        targets, places, mask = _rows_that_count(targets, ignore_index, classes)
        loss, of_h, of_weight, of_bias = results = _results(h, weight, needs)
        chunk = chunk or max(_CHUNK_BYTES // (wide.itemsize * max(classes, 1)), _FEWEST_ROWS)
        chunk_logits = h.new_empty(min(chunk, targets.size(0)), classes)
        chunk_logs = torch.empty_like(chunk_logits, dtype=wide)
        for start in range(0, targets.size(0), chunk):
            here = slice(start, start + chunk)
            place = here if places is None else places[here]
            rows, target = h[place], targets[here]  # [rows, H], [rows, 1]
            logits, logs = chunk_logits[: len(target)], chunk_logs[: len(target)]  # [rows, C]
            _linear_out(rows, weight, bias, logits)
            torch.log_softmax(logits, 1, dtype=wide, out=logs)
            of_target = logs.gather(1, target)
            loss -= (of_target if mask is None else of_target.where(mask[here], 0)).sum()
            if not any(needs):
                continue
            # The gradient of the logits is their softmax less 1 at the target.
            grad = logs.exp_().scatter_(1, target, of_target.expm1_())
            if mask is not None:
                grad.mul_(mask[here])
            if needs[2]:
                of_bias += grad.sum(0)
            if wide != h.dtype:
                grad = logits.copy_(grad)
            if needs[0]:
                of_h[place] = grad @ weight
            if needs[1] and wide == h.dtype:
                torch.addmm(of_weight, grad.t(), rows, out=of_weight)
            elif needs[1]:
                of_weight += grad.t() @ rows
    return results


def _rows_that_count(
    targets: Tensor, ignore_index: int, classes: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The targets [rows, 1] of the rows to compute, the places [rows] of these rows in h, and a mask [rows, 1] of them.

    On the CPU these are the rows that are not ignored; places are None if this is every row, the mask is None. To find
    them on another device would wait for it. There, every row is computed: places are None, the mask is False at
    ignored rows, and the target there is 0.
    """
    kept = (targets != ignore_index).unsqueeze(1)
    targets = targets.unsqueeze(1)
    if not _values_are_at_hand(targets):
        return targets.where(kept, 0), None, kept
    places = None
    if not kept.all():
        places = kept.squeeze(1).nonzero().squeeze(1)
        targets = targets[places]
    wrong = targets[(targets < 0) | (targets >= classes)]
    if wrong.numel() > 0:
        raise IndexError(
            f"expected targets from 0 to {classes - 1} or ignore_index = {ignore_index}, got {int(wrong[0])}"
        )
    return targets, places, None


def _values_are_at_hand(tensor: Tensor) -> bool:
    """Whether a tensor's values can be looked at without waiting for its device."""
    return tensor.device.type == "cpu" and not _in_graph(tensor)


def _linear_out(rows: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(rows, weight.t(), out=out)
    else:
        torch.addmm(bias, rows, weight.t(), out=out)


def _results(h: Tensor, weight: Tensor, needs: Sequence[bool]) -> list[Tensor]:
    """Zeros for the loss [] and the gradients of h [R, H], weight [C, H] and bias [C], empty where not needed.

    All but the gradient of h are sums over rows, and of the wide dtype.
    """
    wide = _wide(h.dtype)
    return [
        h.new_zeros((), dtype=wide),
        h.new_zeros(h.shape if needs[0] else (0, 0)),
        h.new_zeros(weight.shape if needs[1] else (0, 0), dtype=wide),
        h.new_zeros(weight.shape[:1] if needs[2] else (0,), dtype=wide),
    ]


# The arguments and results of `_loss_of_rows`.
library.define(
    "readout_loss(Tensor h, Tensor weight, Tensor? bias, Tensor targets, int ignore_index, int chunk, bool[] needs) "
    "-> Tensor[]"
)
library.impl("readout_loss", _loss_of_rows, "CompositeExplicitAutograd")


@torch.library.register_fake("rnnkit::readout_loss", lib=library)
def _loss_of_rows_fake(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int,
    chunk: int,
    needs: Sequence[bool],
) -> list[Tensor]:
    return _results(h, weight, needs)

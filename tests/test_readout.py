"""Readout: the numbers of linear and cross_entropy, in every layout and tool, without the logits of all rows."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tolerances import assert_close_to_truth, relative_error
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import rnn
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads
from torch.nn.utils.rnn import PackedSequence
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import rnnkit
from rnnkit import readout

H, C = 7, 13
LENGTHS = [2, 5, 0, 3]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def head(**options: Any) -> rnnkit.Readout:
    torch.manual_seed(0)
    return rnnkit.Readout(H, C, **options)


def batch(*shape: int, **options: Any) -> tuple[Tensor, Tensor]:
    """Hidden states that need a gradient, and targets; [5, 4, ·] unless `shape` is given."""
    torch.manual_seed(1)
    h = (3 * torch.randn(*(shape or (5, 4)), H)).to(**options)
    targets = torch.randint(C, h.shape[:-1], device=h.device)
    return h.requires_grad_(), targets


def torchs_loss(layer: nn.Linear, h: Tensor, targets: Tensor, **options: Any) -> Tensor:
    """What `Readout.loss` computes."""
    logits = functional.linear(h, layer.weight, layer.bias).reshape(-1, layer.out_features)
    return functional.cross_entropy(logits, targets.reshape(-1), **options)


def gradients(loss: Tensor, layer: nn.Linear, h: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [h, *layer.parameters()]))


def assert_same(
    layer: nn.Linear, h: Tensor, loss: Tensor, expected: Tensor, **tolerance: float
) -> None:
    """A loss and its gradients, in float64 unless there is a tolerance."""
    tolerance = tolerance or {"rtol": 1e-12, "atol": 1e-14}
    assert_close(loss, expected, **tolerance)
    found = (gradients(each, layer, h) for each in (loss, expected))
    assert_close(*found, **tolerance)


# Numbers


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (3,), (5, 4), (2, 3, 2)], ids=str)
def test_probabilities(device: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    layer = head(dtype=dtype, device=device)
    h = torch.randn(*shape, H, dtype=dtype, device=device)
    logits = functional.linear(h, layer.weight, layer.bias)
    assert_close(layer(h), functional.log_softmax(logits, -1), rtol=0, atol=0)
    assert_close(layer.predict(h), functional.softmax(logits, -1), rtol=0, atol=0)


def test_probabilities_of_a_packed_sequence() -> None:
    layer = head()
    packed = rnn.pack_sequence([torch.randn(n, H) for n in (2, 5, 3)], enforce_sorted=False)
    for call in (layer, layer.predict):
        found = call(packed)
        assert isinstance(found, PackedSequence)
        assert_close(found.data, call(packed.data), rtol=0, atol=0)
        assert found[1:] == packed[1:]


@pytest.mark.parametrize("bias", [True, False])
def test_state_dict_is_that_of_a_linear(bias: bool) -> None:
    linear, layer = nn.Linear(H, C, bias=bias), head(bias=bias)
    assert isinstance(layer, nn.Linear)
    layer.load_state_dict(linear.state_dict())
    linear.load_state_dict(layer.state_dict())
    assert list(layer.state_dict()) == ["weight", "bias"][: 1 + bias]
    assert_close(layer.weight, linear.weight)


def test_initial_parameters_are_those_of_a_linear() -> None:
    torch.manual_seed(0)
    assert_close(dict(nn.Linear(H, C).state_dict()), dict(head().state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (37, 19, 23), (64, 16, 32), (5, 33, 301)], ids=str)
@pytest.mark.parametrize("chunk", [None, 1, 8])
def test_loss_against_float64(
    device: str, sizes: tuple[int, int, int], dtype: torch.dtype, chunk: int | None
) -> None:
    torch.manual_seed(0)
    rows, hidden, classes = sizes
    layer = rnnkit.Readout(hidden, classes, dtype=dtype, device=device)
    h = (2 * torch.randn(rows, hidden)).to(device, dtype).requires_grad_()
    targets = torch.randint(classes, (rows,), device=device)
    truth, exact = copy.deepcopy(layer).double(), h.detach().double().requires_grad_()
    losses = (
        layer.loss(h, targets, chunk=chunk),
        torchs_loss(layer, h, targets),
        torchs_loss(truth, exact, targets),
    )
    assert_close_to_truth(*losses, name="loss")
    grads = [
        gradients(loss, module, given)
        for loss, module, given in zip(losses, (layer, layer, truth), (h, h, exact), strict=True)
    ]
    for name, *three in zip(("h", "weight", "bias"), *grads, strict=True):
        if classes > 1:  # else all gradients are 0
            assert_close_to_truth(*three, gradient=True, name=name)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(), (3,), (5, 4), (2, 3, 2), (0, 4), (5, 0)], ids=str)
def test_loss_of_every_shape(shape: tuple[int, ...], bias: bool, reduction: str) -> None:
    layer = head(bias=bias, dtype=torch.float64)
    h = torch.randn(*shape, H, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(C, shape)
    loss = layer.loss(h, targets, reduction=reduction, chunk=3)
    expected = torchs_loss(layer, h, targets, reduction=reduction)
    assert_close(loss, expected, equal_nan=True)
    assert_close(gradients(loss, layer, h), gradients(expected, layer, h))


@pytest.fixture(params=["rows that count", "a mask"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ignored rows are left out, as on the CPU, or masked, as on other devices."""
    if request.param == "a mask":
        monkeypatch.setattr(readout, "_values_are_at_hand", lambda _: False)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("ignore_index", [-100, -1, 4, C - 1, C, 1000])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("chunk", [None, 3])
def test_ignored_rows(device: str, ignore_index: int, reduction: str, chunk: int | None) -> None:
    layer = head(dtype=torch.float64, device=device)
    h, targets = batch(dtype=torch.float64, device=device)
    targets[1, 2] = targets[3, :3] = targets[4, 3] = ignore_index
    options = {"ignore_index": ignore_index, "reduction": reduction}
    loss = layer.loss(h, targets, chunk=chunk, **options)
    expected = torchs_loss(layer, h, targets, **options)
    graph = torch.autograd.grad(3 * loss, [h, *layer.parameters()], create_graph=True)
    assert_close(list(graph), gradients(3 * torchs_loss(layer, h, targets, **options), layer, h))
    assert_same(layer, h, loss, expected)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_all_rows_ignored(device: str, reduction: str) -> None:
    layer = head(device=device)
    h, targets = batch(device=device)
    targets.fill_(-100)
    loss = layer.loss(h, targets, reduction=reduction)
    assert_close(loss, torchs_loss(layer, h, targets, reduction=reduction), equal_nan=True)
    assert not any(grad.any() for grad in gradients(loss, layer, h))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", [list, torch.tensor, lambda n: torch.tensor(n, dtype=torch.int32)])
def test_lengths(device: str, batch_first: bool, kind: Any) -> None:
    layer = head(dtype=torch.float64, device=device)
    h, targets = batch(*((4, 5) if batch_first else (5, 4)), dtype=torch.float64, device=device)
    before = targets.clone()
    loss = layer.loss(h, targets, lengths=kind(LENGTHS), batch_first=batch_first, chunk=4)
    assert torch.equal(targets, before)
    for n, length in enumerate(LENGTHS):
        (before[n] if batch_first else before[:, n])[length:] = -100
    assert_same(layer, h, loss, torchs_loss(layer, h, before))


def test_padded_targets_need_not_be_classes() -> None:
    layer = head(dtype=torch.float64)
    h, targets = batch(dtype=torch.float64)
    expected = layer.loss(h, targets, lengths=LENGTHS)
    for n, length in enumerate(LENGTHS):
        targets[length:, n] = 10**6
    assert_close(layer.loss(h, targets, lengths=LENGTHS), expected, rtol=0, atol=0)


@pytest.mark.parametrize("sorted", [True, False])
def test_packed_sequences(sorted: bool) -> None:
    layer = head(dtype=torch.float64)
    h, targets = batch(dtype=torch.float64)
    lengths = [5, 3, 3, 1] if sorted else [2, 5, 1, 3]
    packed, packed_targets = (
        rnn.pack_padded_sequence(given, torch.tensor(lengths), enforce_sorted=sorted)
        for given in (h, targets)
    )
    loss = layer.loss(packed, packed_targets, chunk=4)
    assert_same(layer, h, loss, layer.loss(h, targets, lengths=lengths))


def test_of_a_layer() -> None:
    """As in the guide: packed, through a recurrent layer, to the gradients of all parameters."""
    gru, layer = rnnkit.GRU(3, H), head()
    x = rnn.pack_sequence([torch.randn(n, 3) for n in (2, 5, 3)], enforce_sorted=False)
    tags = rnn.pack_sequence([torch.randint(C, (n,)) for n in (2, 5, 3)], enforce_sorted=False)
    parameters = [*gru.parameters(), *layer.parameters()]
    found = torch.autograd.grad(layer.loss(gru(x)[0], tags), parameters)
    expected = torchs_loss(layer, gru(x)[0].data, tags.data)
    assert_close(found, torch.autograd.grad(expected, parameters))


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, None])
def test_autocast(low: torch.dtype, dtype: torch.dtype | None) -> None:
    """Of float32, of float64, which stays, and of h in the low dtype before weights in float32."""
    layer = head(dtype=dtype)
    h, targets = batch(dtype=dtype or low)
    with torch.autocast("cpu", low):
        logits = functional.linear(h, layer.weight, layer.bias)
        assert_close(layer(h), functional.log_softmax(logits, -1))
        assert_close(layer.predict(h), functional.softmax(logits, -1))
        loss, expected = layer.loss(h, targets, chunk=3), torchs_loss(layer, h, targets)
        inside = gradients(layer.loss(h, targets, chunk=3), layer, h)
    tolerance = {} if dtype == torch.float64 else {"rtol": 2e-2, "atol": 2e-2}
    assert_close(inside, gradients(expected, layer, h), **tolerance)
    with torch.autocast("cpu", low):
        # Of the same logits in the low dtype: what follows is in float32.
        assert_close(layer.loss(h, targets), expected, rtol=1e-6, atol=0)
    with torch.autocast("cpu", low):
        expected = torchs_loss(layer, h, targets)
    assert_same(layer, h, loss, expected, **tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_over_many_chunks_keep_their_digits(device: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = rnnkit.Readout(2, 3, dtype=dtype, device=device)
    h = (1 + torch.randn(4096, 2)).to(device, dtype).requires_grad_()
    targets = torch.zeros(4096, dtype=torch.int64, device=device)
    truth, exact = copy.deepcopy(layer).double(), h.detach().double().requires_grad_()
    losses = layer.loss(h, targets, chunk=16), torchs_loss(truth, exact, targets)
    (_, *found), (_, *expected) = (
        gradients(loss, *given)
        for loss, given in zip(losses, ((layer, h), (truth, exact)), strict=True)
    )
    for grad, of_truth in zip(found, expected, strict=True):
        assert relative_error(grad, of_truth) < torch.finfo(dtype).eps


# Memory and work


class Largest(TorchDispatchMode):
    """The largest number of elements of a tensor that any operator returns."""

    elements = 0

    def __torch_dispatch__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.elements = max(self.elements, storage)
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chunk", [None, 100])
@pytest.mark.parametrize("ignored", [False, True])
def test_no_tensor_of_all_logits(dtype: torch.dtype, chunk: int | None, ignored: bool) -> None:
    rows, classes = 2000, 20_000
    layer = rnnkit.Readout(2, classes, dtype=dtype)
    h = torch.randn(rows, 2, dtype=dtype, requires_grad=True)
    targets = torch.randint(classes, (rows,))
    if ignored:
        targets[::10] = -100
    with Largest() as of_loss:
        layer.loss(h, targets, chunk=chunk).backward()
    assert of_loss.elements <= (chunk * classes if chunk else 2**26 // 4)
    with Largest() as of_all, torch.no_grad():
        torchs_loss(layer, h[:1000], targets[:1000])
    assert of_all.elements == 1000 * classes


def flops(call: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_only_what_is_needed_is_computed() -> None:
    layer, product = head(), 2 * 20 * H * C
    h, targets = batch()

    def loss() -> Tensor:
        return layer.loss(h, targets, chunk=6)

    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert flops(loss) == product
            assert not loss().requires_grad
    assert flops(lambda: loss().backward()) == 3 * product
    layer.requires_grad_(False)
    assert flops(lambda: loss().backward()) == 2 * product
    h.requires_grad_(False)
    assert flops(loss) == product
    layer.bias.requires_grad_()
    assert flops(lambda: loss().backward()) == product
    assert flops(lambda: layer.loss(h, targets, lengths=LENGTHS)) == product * sum(LENGTHS) // 20


def test_no_write_to_users_tensors() -> None:
    layer = head()
    h, targets = batch()
    targets[0] = -100
    given = [h, targets, *layer.parameters()]
    before = [(tensor._version, tensor.detach().clone()) for tensor in given]
    layer.loss(h, targets, lengths=LENGTHS, chunk=3).backward()
    for tensor, (version, values) in zip(given, before, strict=True):
        assert tensor._version == version
        assert torch.equal(tensor, values)


# Autograd and tools


def test_gradcheck() -> None:
    layer = head(dtype=torch.float64)
    h, targets = batch(3, 2, dtype=torch.float64)
    targets[1, 1] = -100

    def loss(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        parameters = {"weight": weight, "bias": bias}
        return torch.func.functional_call(Loss(layer), nested(parameters), (h, targets))

    given = (h, *layer.parameters())
    assert torch.autograd.gradcheck(loss, given)
    assert torch.autograd.gradgradcheck(loss, given)


class Loss(nn.Module):
    """Calls `loss`, for functions that take a module."""

    def __init__(self, layer: rnnkit.Readout, **options: Any) -> None:
        super().__init__()
        self.layer, self.options = layer, {"chunk": 2, **options}

    def forward(self, h: Any, targets: Any, lengths: Tensor | None = None) -> Tensor:
        return self.layer.loss(h, targets, lengths=lengths, **self.options)


def nested(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"layer.{name}": weight for name, weight in parameters.items()}


def test_other_weights_by_functional_call() -> None:
    layer, other = head(), rnnkit.Readout(H, C)
    h, targets = batch()
    found = torch.func.functional_call(
        Loss(layer), nested(dict(other.named_parameters())), (h, targets)
    )
    assert_same(other, h, found, torchs_loss(other, h, targets), rtol=1e-5, atol=1e-6)


def test_gradients_of_gradients_where_h_depends_on_the_weight() -> None:
    layer = head(dtype=torch.float64)
    tokens, targets = torch.tensor([1, 5, 2, 2]), torch.tensor([5, 2, 0, 7])

    def penalty(loss: Any) -> Tensor:
        h = layer.weight[tokens].tanh()  # as an embedding that is tied to the output layer
        grads = torch.autograd.grad(loss(h), layer.parameters(), create_graph=True)
        return sum(grad.square().sum() for grad in grads)

    found, expected = (
        torch.autograd.grad(penalty(loss), layer.parameters())
        for loss in (
            lambda h: layer.loss(h, targets, chunk=2),
            lambda h: torchs_loss(layer, h, targets),
        )
    )
    assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(use_reentrant: bool) -> None:
    layer = head()
    h, targets = batch()
    expected = gradients(layer.loss(h, targets), layer, h)
    checkpoint(layer.loss, h, targets, use_reentrant=use_reentrant).backward()
    assert_close([tensor.grad for tensor in (h, *layer.parameters())], expected)


def test_per_sample_gradients_of_expanded_weights() -> None:
    """They are those of a torch.nn.Linear."""
    layer, linear = head(), nn.Linear(H, C)
    linear.load_state_dict(layer.state_dict())
    h = batch()[0].detach()
    for module in (layer, linear):
        results = call_for_per_sample_grads(module, loss_reduction="sum")(h)
        (results if module is layer else results.log_softmax(-1))[..., 0].sum().backward()
    for name in ("weight", "bias"):
        grads = [getattr(module, name).grad_sample for module in (layer, linear)]
        assert grads[0].shape[0] == 5
        assert_close(*grads)


def test_traced_by_torchscript() -> None:
    layer = head()
    traced = torch.jit.trace(layer, torch.randn(5, 4, H))
    assert_close(traced(h := torch.randn(3, 2, H)), layer(h))


def test_backward_twice() -> None:
    layer = head()
    h, targets = batch()
    loss = layer.loss(h, targets)
    loss.backward(retain_graph=True)
    first = [tensor.grad.clone() for tensor in (h, *layer.parameters())]
    (2 * loss).backward()
    for tensor, grad in zip((h, *layer.parameters()), first, strict=True):
        assert_close(tensor.grad, 3 * grad)


def test_func_transforms() -> None:
    layer = head(dtype=torch.float64)
    h, targets = batch(dtype=torch.float64)
    h = h.detach()
    parameters = {name: weight.detach() for name, weight in layer.named_parameters()}

    def ours(parameters: dict[str, Tensor], h: Tensor, targets: Tensor) -> Tensor:
        return torch.func.functional_call(Loss(layer), nested(parameters), (h, targets))

    def theirs(parameters: dict[str, Tensor], h: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(functional.linear(h, **parameters), targets)

    found, expected = (
        torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, h, targets)
        for loss in (ours, theirs)
    )
    assert_close(found, expected)
    tangents = [
        torch.func.jvp(lambda h, loss=loss: loss(parameters, h, targets[0]), (h[0],), (h[1],))
        for loss in (ours, theirs)
    ]
    assert_close(*tangents)


class Words(nn.Module):
    """Log-probabilities and probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = head()

    def forward(self, h: Any) -> Any:
        return self.layer(h), self.layer.predict(h)


@pytest.mark.parametrize("packed", [False, True])
def test_compiled_probabilities(packed: bool) -> None:
    torch.compiler.reset()
    model, h = Words(), torch.randn(5, 4, H)
    given = rnn.pack_padded_sequence(h, torch.tensor([5, 3, 3, 1])) if packed else h
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(compiled(given), model(given))


@pytest.mark.parametrize("strict", [False, True])
def test_exported_probabilities(strict: bool) -> None:
    steps, sequences = (torch.export.Dim(name, min=2, max=64) for name in ("steps", "batch"))
    model = Words()
    program = torch.export.export(
        model, (torch.randn(5, 4, H),), dynamic_shapes=({0: steps, 1: sequences},), strict=strict
    ).module()
    for shape in ((5, 4), (9, 2)):
        h = torch.randn(*shape, H)
        assert_close(program(h), model(h))


@pytest.mark.parametrize("strict", [False, True])
def test_exported_loss(strict: bool, tmp_path: Path) -> None:
    steps, sequences = (torch.export.Dim(name, min=2, max=64) for name in ("steps", "batch"))
    model, both = Loss(head(), ignore_index=3), {0: steps, 1: sequences}
    program = torch.export.export(
        model,
        (*batch(), torch.tensor(LENGTHS)),
        dynamic_shapes=(both, both, {0: sequences}),
        strict=strict,
    )
    torch.export.save(program, tmp_path / "loss.pt2")
    loaded = torch.export.load(tmp_path / "loss.pt2").module()
    for lengths in ([5, 2, 3, 1], [7, 6]):
        given = *batch(max(lengths), len(lengths)), torch.tensor(lengths)
        assert_close(loaded(*given), model(*given))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("kind", ["padded", "lengths", "packed", "autocast"])
def test_compiled_loss(kind: str, backend: str) -> None:
    torch.compiler.reset()
    model = Loss(head(), ignore_index=3)
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=True)
    for steps, *lengths in ((5, 5, 3, 3, 1), (7, 7, 2), (6, 6, 6, 6)):
        h, targets = batch(steps, len(lengths))
        losses = []
        for call in (compiled, model):
            given = [h, targets]
            if kind == "lengths":
                given.append(torch.tensor(lengths))
            elif kind == "packed":
                given = [rnn.pack_padded_sequence(t, torch.tensor(lengths)) for t in given]
            with torch.autocast("cpu") if kind == "autocast" else nullcontext():
                losses.append(call(*given))
        low = {"rtol": 2e-2, "atol": 2e-2}
        tolerance = low if kind == "autocast" else {"rtol": 1e-5, "atol": 1e-6}
        assert_same(model.layer, h, *losses, **tolerance)
        with torch.no_grad():
            assert_close(compiled(*given), model(*given))


def test_a_compiled_loss_tells_targets_out_of_range() -> None:
    torch.compiler.reset()
    h, targets = batch()
    with pytest.raises(IndexError, match="expected targets from 0 to 12"):
        torch.compile(Loss(head()), fullgraph=True, backend="aot_eager")(h, targets + C)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_op(device: str, dtype: torch.dtype) -> None:
    pytest.importorskip("expecttest")
    layer = head(dtype=dtype, device=device)
    h, targets = batch(20, dtype=dtype, device=device)
    op = torch.ops.rnnkit.readout_loss.default
    for needs in ([True] * 3, [False, True, False], [False] * 3):
        for bias in (layer.bias.detach(), None):
            arguments = (h.detach(), layer.weight.detach(), bias, targets, -100, 6, needs)
            torch.library.opcheck(op, arguments)


def test_fake_tensors() -> None:
    with FakeTensorMode():
        layer = head(dtype=torch.bfloat16)
        h, targets = batch(dtype=torch.bfloat16)
        loss = layer.loss(h, targets, lengths=LENGTHS)
        loss.backward()
    assert (loss.shape, loss.dtype) == ((), torch.bfloat16)
    for tensor in (h, *layer.parameters()):
        assert (tensor.grad.shape, tensor.grad.dtype) == (tensor.shape, torch.bfloat16)


def test_traced_by_fx() -> None:
    layer = head()
    h = torch.randn(3, H)
    assert_close(torch.fx.symbolic_trace(layer)(h), layer(h))


@contextmanager
def process_group(place: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo")
def test_ddp(tmp_path: Path) -> None:
    layer = head()
    h, targets = batch()
    expected = torch.autograd.grad(layer.loss(h, targets), layer.parameters())
    with process_group(tmp_path / "store"):
        DistributedDataParallel(Loss(layer))(h, targets).backward()
    assert_close([weight.grad for weight in layer.parameters()], list(expected))


# Errors

PACKED = rnn.pack_sequence([torch.randn(n, H) for n in (3, 2)])
TAGS = rnn.pack_sequence([torch.randint(C, (n,)) for n in (3, 2)])
X, T = batch()

# fmt: off
BAD_CALLS: list[tuple[str, tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    ("size", (X[..., :3], T), {}, RuntimeError, r"expected h of shape \[..., 7\], got \(5, 4, 3\)"),
    ("rank", (X[0, 0, 0], T), {}, RuntimeError, r"expected h of shape \[..., 7\], got \(\)"),
    ("dtype", (X.double(), T), {}, RuntimeError, "expected h in torch.float32 like weight, got torch.float64"),
    ("device", (X.to("meta"), T), {}, RuntimeError, "expected h on cpu like weight, got meta"),
    ("h a list", (X.tolist(), T), {}, AttributeError, "expected h to be a Tensor or PackedSequence, got list"),
    ("sparse", (X.to_sparse(), T), {}, RuntimeError, "expected h to be a dense Tensor"),
    ("targets a list", (X, T.tolist()), {}, AttributeError, "expected targets to be a Tensor, got list"),
    ("shape", (X, T[:4]), {}, ValueError, r"expected targets of shape \(5, 4\), got \(4, 4\)"),
    ("probabilities", (X, X), {}, ValueError, r"expected targets of shape \(5, 4\), got \(5, 4, 7\)"),
    ("floats", (X, X[..., 0]), {}, RuntimeError, "expected targets to be classes in torch.int64, got torch.float32"),
    ("int32", (X, T.int()), {}, RuntimeError, "expected targets to be classes in torch.int64, got torch.int32"),
    ("targets on meta", (X, T.to("meta")), {}, RuntimeError, "expected targets on cpu like h, got meta"),
    ("too large", (X, T.clamp(min=C)), {}, IndexError, "expected targets from 0 to 12 or ignore_index = -100, got 13"),
    ("negative", (X, T - 99), {}, IndexError, "expected targets from 0 to 12 or ignore_index = -100, got -"),
    ("ignored twice", (X, T * 0 - 100), {"ignore_index": -1}, IndexError, "or ignore_index = -1, got -100"),
    ("reduction", (X, T), {"reduction": "none"}, ValueError, "expected reduction to be 'mean' or 'sum', got 'none'"),
    ("chunk", (X, T), {"chunk": 0}, ValueError, "expected chunk to be 1 or more, got 0"),
    ("one packed", (PACKED, TAGS.data), {}, AttributeError, "PackedSequences, got targets of type Tensor"),
    ("other packed", (PACKED.data, TAGS), {}, AttributeError, "PackedSequences, got h of type Tensor"),
    ("packed lengths", (PACKED, TAGS), {"lengths": [3, 2]}, ValueError, "expected lengths to be None"),
    ("too many", (X, T), {"lengths": [1] * 5}, RuntimeError, r"batch_first=False, got torch.int64 of \(5,\)"),
    ("of floats", (X, T), {"lengths": [1.0] * 4}, RuntimeError, r"batch_first=False, got torch.float32"),
    ("too long", (X, T), {"lengths": [6, 1, 1, 1]}, RuntimeError, r"from 0 to T = 5, got \[6, 1, 1, 1\]"),
    ("less than none", (X, T), {"lengths": [-1, 1, 1, 1]}, RuntimeError, "expected lengths from 0 to T = 5"),
    ("no steps", (X[0], T[0]), {"lengths": [1] * 4}, ValueError, "expected h to be 3-D if there are lengths, got 2-D"),
]
# fmt: on


@pytest.mark.parametrize(
    ("args", "options", "error", "text"),
    [row[1:] for row in BAD_CALLS],
    ids=[row[0] for row in BAD_CALLS],
)
def test_errors(
    args: tuple[Any, ...], options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        head().loss(*args, **options)


@pytest.mark.parametrize(
    "args",
    [(X[..., :3], T), (X.double(), T), (X, T[:4]), (X, T.int()), (X, T + C)],
    ids=["size", "dtype", "shape", "int32", "range"],
)
def test_exceptions_are_of_torchs_types(args: tuple[Tensor, Tensor]) -> None:
    raised = []
    for loss in (head().loss, lambda h, targets: torchs_loss(head(), h, targets)):
        with pytest.raises(Exception) as caught:
            loss(*args)
        raised.append(caught.type)
    assert raised[0] == raised[1]


def test_sequences_of_other_lengths() -> None:
    """As many rows, of other steps or in another order."""
    h = rnn.pack_sequence([torch.randn(n, H) for n in (2, 3)], enforce_sorted=False)
    steps = rnn.pack_sequence([torch.randint(C, (n,)) for n in (1, 4)], enforce_sorted=False)
    order = rnn.pack_sequence([torch.randint(C, (n,)) for n in (3, 2)], enforce_sorted=False)
    with pytest.raises(ValueError, match="packed with the lengths of h, got another batch_sizes"):
        head().loss(h, steps)
    with pytest.raises(ValueError, match="got another sorted_indices"):
        head().loss(h, order)

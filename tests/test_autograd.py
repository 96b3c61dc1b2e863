"""Gradients of every order and every kind, on each backend, and that none is computed that nobody needs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from devices import on_each_device, on_gpu
from kernel_cases import Call, Case, assert_same_bits, call, variants
from torch import Tensor, nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import rnnkit
from rnnkit import autograd, backends
from rnnkit.call import Keep
from rnnkit.specs import CELLS

each_cell = pytest.mark.parametrize("cell", CELLS)
each_layer = pytest.mark.parametrize(
    "cell", [cell for cell in CELLS if hasattr(rnnkit, cell.split("_")[0].upper())]
)

#: Tiny, since a numerical derivative calls the layer twice for every number.
GRADCHECK_CASES = [
    case
    for cell in CELLS
    for case in (
        Case(cell, (2, 2, 1, 3), dtype=torch.float64),
        Case(cell, (2, 2, 1, 2), 2, (2, 1), dtype=torch.float64),
        Case(cell, (3, 1, 1, 2), bias=False, states=False, dtype=torch.float64),
        *[Case(cell, (2, 2, 1, 3), 1, (2, 1), projected=2, dtype=torch.float64)]
        * CELLS[cell].projects,
        *[Case(cell, (2, 2, 1, 3), 2, (2, 1), dtype=torch.float64, all_states=True)]
        * CELLS[cell].projects,
    )
]
on_gradcheck_cases = pytest.mark.parametrize("case", on_each_device(GRADCHECK_CASES), ids=str)


def leaves(it: Call) -> list[Tensor]:
    """Input, states and weights, requiring grad."""
    return [t.detach().clone().requires_grad_() for t in it.tensors if t is not None]


def results(it: Call, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Output and final states of the call with these tensors for its own."""
    remaining = iter(tensors)
    given = [None if t is None else next(remaining) for t in it.tensors]
    outputs, finals = autograd.run(it.with_tensors(given))
    return *outputs, *finals


def on_call(it: Call) -> Callable[..., tuple[Tensor, ...]]:
    return lambda *tensors: results(it, *tensors)


def loss(it: Call, *tensors: Tensor) -> Tensor:
    """A number that depends on every result, differently on each."""
    return sum((r * g).sum() for r, g in zip(results(it, *tensors), it.grads, strict=True))


def gradients(it: Call, tensors: list[Tensor] | None = None, **options: Any) -> tuple[Tensor, ...]:
    tensors = leaves(it) if tensors is None else tensors
    return torch.autograd.grad(loss(it, *tensors), tensors, **options)


def double(cell: str, **options: Any) -> Call:
    return call(Case(cell, dtype=torch.float64, **options))


def module(cell: str, **options: Any) -> nn.RNNBase:
    """A small layer in float64 with input size 5 and hidden size 4."""
    if cell.startswith("rnn"):
        options["nonlinearity"] = cell.removeprefix("rnn_")
    return getattr(rnnkit, cell.split("_")[0].upper())(5, 4, dtype=torch.float64, **options)


@on_gradcheck_cases
def test_gradcheck(case: Case, backend: str) -> None:
    it = call(case)
    assert gradcheck(on_call(it), leaves(it))


@pytest.mark.parametrize("case", [*GRADCHECK_CASES, *on_gpu(GRADCHECK_CASES[2::3])], ids=str)
def test_gradgradcheck(case: Case, backend: str) -> None:
    it = call(case)
    assert gradgradcheck(on_call(it), leaves(it), check_fwd_over_rev=case.directions == 1)


@each_cell
def test_gradcheck_of_forward_mode(cell: str, backend: str) -> None:
    it = call(Case(cell, (2, 2, 2, 2), 2, (2, 1), dtype=torch.float64))
    assert gradcheck(on_call(it), leaves(it), check_forward_ad=True, check_backward_ad=False)


@each_cell
def test_gradcheck_of_batched_gradients(cell: str, backend: str) -> None:
    it = call(Case(cell, (2, 2, 2, 2), dtype=torch.float64))
    assert gradcheck(
        on_call(it),
        leaves(it),
        check_batched_grad=True,
        check_batched_forward_grad=True,
        check_forward_ad=True,
    )


@each_cell
def test_only_some_tangents(cell: str, backend: str, device: str) -> None:
    """Forward mode with a tangent on one tensor alone is the product of the Jacobian with it."""
    it = double(cell, device=device)
    tensors = [t.detach() for t in leaves(it)]
    for place, tensor in enumerate(tensors):
        tangent = torch.randn_like(tensor)
        with forward_ad.dual_level():
            duals = list(tensors)
            duals[place] = forward_ad.make_dual(tensor, tangent)
            found = [forward_ad.unpack_dual(r).tangent for r in results(it, *duals)]
        step = 1e-6 * tangent
        above, below = list(tensors), list(tensors)
        above[place], below[place] = tensor + step, tensor - step
        for tangent_found, a, b in zip(
            found, results(it, *above), results(it, *below), strict=True
        ):
            torch.testing.assert_close(tangent_found, (a - b) / 2e-6, rtol=1e-6, atol=1e-7)


@each_cell
def test_tangent_of_an_incoming_gradient(cell: str, backend: str, device: str) -> None:
    """The backward pass is linear in the incoming gradient, so a tangent of it comes out as a gradient would."""
    it = double(cell, device=device)
    tensors = leaves(it)
    output = results(it, *tensors)[0]
    tangent = torch.randn_like(output)
    expected = torch.autograd.grad(output, tensors, tangent, retain_graph=True)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.randn_like(output), tangent)
        found = torch.autograd.grad(output, tensors, dual)
        tangents = [forward_ad.unpack_dual(grad).tangent for grad in found]
    torch.testing.assert_close(tangents, list(expected))


@each_cell
def test_jvp_and_vjp_agree(cell: str, backend: str, device: str) -> None:
    it = double(cell, directions=2, device=device)
    tensors = tuple(t.detach() for t in leaves(it))
    tangents = tuple(torch.randn_like(t) for t in tensors)
    _, forward = torch.func.jvp(on_call(it), tensors, tangents)
    _, pullback = torch.func.vjp(on_call(it), *tensors)
    backward = pullback(tuple(it.grads))
    one = sum((f * g).sum() for f, g in zip(forward, it.grads, strict=True))
    other = sum((b * t).sum() for b, t in zip(backward, tangents, strict=True))
    torch.testing.assert_close(one, other)


@each_cell
def test_func_grad(cell: str, backend: str, device: str) -> None:
    it = double(cell, device=device)
    tensors = leaves(it)
    places = tuple(range(len(tensors)))
    found = torch.func.grad(lambda *t: loss(it, *t), argnums=places)(*(t.detach() for t in tensors))
    torch.testing.assert_close(found, gradients(it, tensors))


@each_cell
def test_jacobian(cell: str, backend: str) -> None:
    """By reverse, by forward mode and by one backward pass a row."""
    it = double(cell)
    x, *others = leaves(it)

    def output(x: Tensor) -> Tensor:
        return results(it, x, *others)[0]

    def row(cotangent: Tensor) -> Tensor:
        return torch.autograd.grad(y, x, cotangent, retain_graph=True)[0]

    y = output(x)
    rows = torch.eye(y.numel(), dtype=y.dtype).view(*y.shape, *y.shape)
    by_rows = torch.autograd.functional.jacobian(output, x)
    for found in (
        torch.func.vmap(torch.func.vmap(torch.func.vmap(row)))(rows),
        torch.func.jacrev(output)(x.detach()),
        torch.func.jacfwd(output)(x.detach()),
        torch.autograd.functional.jacobian(output, x, vectorize=True),
    ):
        torch.testing.assert_close(found, by_rows)


@each_cell
def test_hessian(cell: str, backend: str) -> None:
    it = double(cell, sizes=(2, 1, 2, 2))
    tensors = leaves(it)

    def of_input(x: Tensor) -> Tensor:
        return loss(it, x, *tensors[1:])

    expected = torch.autograd.functional.hessian(of_input, it.input)
    torch.testing.assert_close(torch.func.hessian(of_input)(it.input), expected)


@each_layer
def test_vmap(cell: str, backend: str) -> None:
    """Over inputs, over weights as in an ensemble, and over gradients as for one gradient a sample."""
    layer = module(cell, bidirectional=True)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    inputs = torch.randn(3, 6, 2, 5, dtype=torch.float64)
    several = {name: torch.stack([p, 2 * p, -p]) for name, p in parameters.items()}

    def output(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(layer, parameters, (x,))[0]

    def gradient(parameters: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
        return torch.func.grad(lambda p, x: output(p, x).square().sum())(parameters, x)

    for function in (output, gradient):
        for of_each, dims in ((parameters, (None, 0)), (several, (0, 0))):
            found = torch.func.vmap(function, dims)(of_each, inputs)
            for index, x in enumerate(inputs):
                own = {n: p[index] for n, p in several.items()} if dims[0] == 0 else parameters
                expected = function(own, x)
                if isinstance(found, Tensor):
                    torch.testing.assert_close(found[index], expected)
                else:
                    torch.testing.assert_close({n: g[index] for n, g in found.items()}, expected)


@each_layer
def test_functional_call(cell: str, backend: str, device: str) -> None:
    """Other weights for one call, and gradients for these."""
    layer = module(cell, device=device)
    x = torch.randn(3, 2, 5, dtype=torch.float64, device=device)
    other = {name: (2 * p).detach().requires_grad_() for name, p in layer.named_parameters()}
    functional_call(layer, other, (x,))[0].square().sum().backward()
    assert all(parameter.grad is None for parameter in layer.parameters())
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(2)
    layer(x)[0].square().sum().backward()
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad, other[name].grad)


@each_layer
def test_gradient_penalty(cell: str, backend: str, device: str) -> None:
    """A loss on the norm of the gradient, as in WGAN-GP, gives the parameters the gradients torch.nn gives."""
    ours = module(cell, num_layers=2, bidirectional=True, device=device)
    theirs = getattr(nn, type(ours).__name__)(
        5,
        4,
        2,
        bidirectional=True,
        dtype=torch.float64,
        device=device,
        **({"nonlinearity": ours.nonlinearity} if cell.startswith("rnn") else {}),
    )
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 2, 5, dtype=torch.float64, device=device)
    for layer in (ours, theirs):
        leaf = x.clone().requires_grad_()
        with torch.backends.cudnn.flags(enabled=False):  # it has no second derivatives
            output = layer(leaf)[0].square().sum()
        (gradient,) = torch.autograd.grad(output, leaf, create_graph=True)
        (output + (gradient.norm() - 1).square()).backward()
    found, expected = (
        {name: parameter.grad for name, parameter in layer.named_parameters()}
        for layer in (ours, theirs)
    )
    torch.testing.assert_close(found, expected)


@each_cell
def test_create_graph_changes_no_first_gradient(cell: str, backend: str, device: str) -> None:
    it = double(cell, directions=2, device=device)
    torch.testing.assert_close(gradients(it, create_graph=True), gradients(it))


@each_cell
def test_backward_twice(cell: str, backend: str, device: str) -> None:
    it = call(Case(cell, directions=2, device=device))
    tensors = leaves(it)
    number = loss(it, *tensors)
    first = torch.autograd.grad(number, tensors, retain_graph=True)
    assert_same_bits(list(torch.autograd.grad(number, tensors)), list(first))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(number, tensors)


@each_cell
def test_gradients_accumulate(cell: str, backend: str, device: str) -> None:
    it = double(cell, device=device)
    tensors = leaves(it)
    loss(it, *tensors).backward()
    once = [t.grad.clone() for t in tensors if t.grad is not None]
    loss(it, *tensors).backward()
    torch.testing.assert_close([t.grad for t in tensors], [2 * grad for grad in once])


@each_cell
def test_one_result_alone(cell: str, backend: str, device: str) -> None:
    """A loss on the output alone, or on one final state alone, has the gradients it has in the sum."""
    it = double(cell, directions=2, device=device)
    tensors = leaves(it)
    total = None
    for place, grad in enumerate(it.grads):
        found = torch.autograd.grad(results(it, *tensors)[place], tensors, grad)
        total = found if total is None else [a + b for a, b in zip(total, found, strict=True)]
    torch.testing.assert_close(list(total), list(gradients(it, tensors)))


class _Recorder(TorchDispatchMode):
    """Keeps the arguments of every rnnkit op that is called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if op.namespace == "rnnkit":
            self.calls.append((op._opname, args))
        return op(*args, **(kwargs or {}))

    def needs(self) -> list[list[bool]]:
        """What each backward call was asked for."""
        return [args[-2] for name, args in self.calls if name == "layer_backward"]

    def kept(self) -> list[Keep]:
        """What each forward call was asked to keep."""
        return [args[-1] for name, args in self.calls if name == "layer_forward"]


@contextmanager
def recorded() -> Iterator[_Recorder]:
    if backends.unavailable("cpp"):
        pytest.skip(f"no C++ kernels: {backends.unavailable('cpp')}")
    with rnnkit.backend("cpp"), _Recorder() as recorder:
        yield recorder


@pytest.mark.parametrize(
    "case", on_each_device(variants(Case("lstm", directions=2), few=True)), ids=str
)
def test_only_needed_gradients_are_computed(case: Case) -> None:
    it = call(case)
    places = [place for place, need in enumerate(it.all_needs) if need]
    full = gradients(it)
    subsets = [{place} for place in range(len(places))]
    subsets += [set(range(len(places))) - subset for subset in subsets]
    for subset in subsets:
        tensors = [t.requires_grad_(place in subset) for place, t in enumerate(leaves(it))]
        wanted = [t for t in tensors if t.requires_grad]
        with recorded() as recorder:
            found = torch.autograd.grad(loss(it, *tensors), wanted)
        needed = {places[index] for index in subset}
        assert recorder.needs() == [[place in needed for place in range(len(it.all_needs))]]
        assert_same_bits(list(found), [full[index] for index in sorted(subset)])


@each_layer
def test_frozen_layers_compute_no_weight_gradients(cell: str, device: str) -> None:
    """A frozen first layer needs nothing; a frozen last layer passes gradients to its input alone."""
    layer = module(cell, num_layers=3, device=device)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_("_l1" in name)
    x = torch.randn(3, 2, 5, dtype=torch.float64, device=device)
    with recorded() as recorder:
        layer(x)[0].sum().backward()
    assert recorder.kept() == [Keep.NOTHING, Keep.EVERYTHING, Keep.EVERYTHING]
    last, middle = recorder.needs()
    assert (last[0], any(last[1:])) == (True, False)
    assert (middle[0], sum(middle)) == (False, 4)


@each_layer
def test_nothing_is_saved_where_nothing_needs_grad(cell: str, device: str) -> None:
    layer = module(cell, device=device)
    x = torch.randn(3, 2, 5, dtype=torch.float64, device=device)
    with recorded() as recorder:
        with torch.no_grad():
            layer(x)
        with torch.inference_mode():
            layer(x)
        layer.requires_grad_(False)(x)
    assert recorder.kept() == [Keep.NOTHING] * 3
    assert recorder.needs() == []


@each_cell
def test_tied_weights(cell: str, backend: str, device: str) -> None:
    """One tensor in two places gets the sum of the two gradients."""
    it = double(cell, sizes=(3, 2, 4, 4), directions=2, device=device)
    first = 1 + len(it.states)
    places = (first, first + 1, first + 4, first + 5)  # w_ih and w_hh of both directions
    tensors = leaves(it)
    for place in places:
        tensors[place] = tensors[first].detach().clone().requires_grad_()
    apart = gradients(it, tensors)
    tied = [tensors[first] if place in places else t for place, t in enumerate(tensors)]
    (found,) = torch.autograd.grad(loss(it, *tied), tensors[first])
    torch.testing.assert_close(found, sum(apart[place] for place in places))


@each_cell
def test_one_tensor_as_input_and_state(cell: str, backend: str, device: str) -> None:
    it = double(cell, sizes=(1, 2, 4, 4), device=device)
    tensors = leaves(it)
    apart = gradients(it, [tensors[0], tensors[0].detach().clone().requires_grad_(), *tensors[2:]])
    (found,) = torch.autograd.grad(loss(it, tensors[0], tensors[0], *tensors[2:]), tensors[0])
    torch.testing.assert_close(found, apart[0] + apart[1])


@each_cell
def test_changing_what_was_saved_raises(cell: str, backend: str, device: str) -> None:
    it = double(cell, projected=3 if cell == "lstm" else 0, device=device)
    for place in range(1 + len(it.states) + 2):  # input, states, w_ih, w_hh
        tensors = leaves(it)
        number = loss(it, *tensors)
        with torch.no_grad():
            tensors[place].add_(1)
        with pytest.raises(RuntimeError, match=r"modified (by an )?inplace"):
            number.backward()


@each_cell
def test_saved_tensors_hooks(cell: str, backend: str, device: str) -> None:
    """What is kept for the backward pass goes through the hooks: packed, moved and brought back."""
    it = call(Case(cell, directions=2, device=device))
    tensors = leaves(it)
    expected = gradients(it, tensors)
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        number = loss(it, *tensors)
    assert packed
    assert_same_bits(list(torch.autograd.grad(number, tensors)), list(expected))
    with torch.autograd.graph.save_on_cpu():
        number = loss(it, *tensors)
    assert_same_bits(list(torch.autograd.grad(number, tensors)), list(expected))


@pytest.mark.parametrize("use_reentrant", (True, False))
@each_cell
def test_checkpoint(cell: str, use_reentrant: bool, backend: str, device: str) -> None:
    it = call(Case(cell, directions=2, device=device))
    tensors = leaves(it)
    expected = gradients(it, tensors)
    number = checkpoint(lambda *t: loss(it, *t), *tensors, use_reentrant=use_reentrant)
    number.backward()
    assert_same_bits([t.grad for t in tensors], list(expected))


@each_cell
def test_hooks_on_gradients(cell: str, backend: str, device: str) -> None:
    it = double(cell, device=device)
    tensors = leaves(it)
    expected = gradients(it, tensors)
    handles = [t.register_hook(lambda grad: 2 * grad) for t in tensors]
    torch.testing.assert_close(gradients(it, tensors), tuple(2 * g for g in expected))
    for handle in handles:
        handle.remove()


@each_cell
def test_anomaly_mode(cell: str, backend: str, device: str) -> None:
    it = double(cell, device=device)
    expected = gradients(it)
    with torch.autograd.set_detect_anomaly(True):
        torch.testing.assert_close(gradients(it), expected)

"""`grad_clip` and `grad_cut`: what a step passes back, against plain loops that do it by hand.

tests/kernel_cases.py has cases of both, in which every kernel is held to the reference.
"""

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from configurations import LAYERS
from kernel_cases import Case, call
from tolerances import assert_close_to_truth
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

import rnnkit
from rnnkit import autograd, reference
from rnnkit.call import LayerCall
from rnnkit.specs import CELLS

T, N, LIMIT = 7, 4, 0.05


def passed_back(state: Tensor, limit: float, cut: Tensor) -> Tensor:
    """The state, whose gradient is clipped, and zero in the rows of `cut`."""
    state = state * 1
    if state.requires_grad:
        state.register_hook(lambda grad: torch.where(cut[:, None], 0.0, grad.clamp(-limit, limit)))
    return state


def by_hand(it: LayerCall) -> tuple[Tensor, list[Tensor]]:
    """Output and final states of a call, one sequence and direction at a time."""
    lengths = [sum(count > n for count in it.counts) for n in range(it.batch)]
    starts = it.starts
    output = [[None] * it.rows for _ in range(it.directions)]
    finals = [[[None] * it.batch for _ in range(it.directions)] for _ in range(it.spec.states)]
    x = it.input.reshape(it.rows, -1)
    for d in range(it.directions):
        w = it.direction(d)
        for n, length in enumerate(lengths):
            states = [state[d, n : n + 1] for state in it.states or it.zero_states(it.batch)]
            times = range(length)
            for step, t in enumerate(reversed(times) if d else times):
                boundary = t + 1 if d else t
                cut = step > 0 and it.grad_cut > 0 and boundary % it.grad_cut == 0
                states = [
                    passed_back(s, it.grad_clip or math.inf, torch.tensor([cut])) for s in states
                ]
                row = starts[t] + n
                gates = it.spec.gates
                x_parts = nn.functional.linear(x[row : row + 1], w.w_ih, w.b_ih).chunk(gates, -1)
                h_parts = nn.functional.linear(states[0], w.w_hh, w.b_hh).chunk(gates, -1)
                states = list(it.spec.step(x_parts, h_parts, states))
                if w.w_hr is not None:
                    states[0] = states[0] @ w.w_hr.t()
                output[d][row] = states[0][0]
            for k, state in enumerate(states):
                finals[k][d][n] = state[0]
    rows = torch.cat([torch.stack(of_direction) for of_direction in output], -1)
    stacked = [torch.stack([torch.stack(of_d) for of_d in of_state]) for of_state in finals]
    return rows.view(it.output_shape(0)), stacked


def gradients(outputs: list[Tensor], grads: list[Tensor], tensors: list[Tensor]) -> tuple:
    return torch.autograd.grad(outputs, tensors, grads)


@pytest.mark.parametrize("lengths", [(), (7, 6, 4, 1)], ids=["dense", "packed"])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("rule", [(LIMIT, 0), (0.0, 3), (LIMIT, 2), (1e3, 100)], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_reference_is_the_loop(cell: str, rule: tuple, directions: int, lengths: tuple) -> None:
    case = Case(
        cell,
        (T, N, 3, 5),
        directions,
        lengths,
        dtype=torch.float64,
        grad_clip=rule[0],
        grad_cut=rule[1],
    )
    it = call(case)
    tensors = [t.requires_grad_() for t in it.tensors if t is not None]
    output, finals = by_hand(it)
    expected = gradients([output, *finals], it.grads, tensors)
    (found,), last = reference.run(it)
    torch.testing.assert_close(found, output)
    for actual, wanted in zip(gradients([found, *last], it.grads, tensors), expected, strict=True):
        torch.testing.assert_close(actual, wanted)
    free = call(Case(cell, (T, N, 3, 5), directions, lengths, dtype=torch.float64))
    free_tensors = [t.requires_grad_() for t in free.tensors if t is not None]
    outputs, last = reference.run(free)
    without = gradients([*outputs, *last], free.grads, free_tensors)
    same = all(torch.allclose(a, b) for a, b in zip(expected, without, strict=True))
    assert same == (rule[0] == 1e3), "the rule has to matter in this test"


def layer_pair(name: str, **options: Any) -> tuple[nn.Module, nn.Module]:
    """A layer with the rule, and one without, of the same weights."""
    cls, own = LAYERS[name]
    torch.manual_seed(0)
    plain = getattr(rnnkit, cls)(3, 5, 2, bidirectional=True, **own).double()
    ruled = getattr(rnnkit, cls)(3, 5, 2, bidirectional=True, **own, **options).double()
    ruled.load_state_dict(plain.state_dict())
    return ruled, plain


def run(layer: nn.Module, x: Any, call: Callable[[nn.Module, Any], Any] | None = None) -> list:
    """The output, by default of calling the layer, and all gradients."""
    output = layer(x)[0] if call is None else call(layer, x)
    output = output if isinstance(output, Tensor) else output.data
    loss = (output * torch.arange(output.numel()).view_as(output).sin()).sum()
    return [output, *torch.autograd.grad(loss, list(layer.parameters()))]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_on_every_way(name: str, packed: bool) -> None:
    """The fast path, the way through Python, the reference and a compiled graph give the same."""
    ruled, plain = layer_pair(name, grad_clip=LIMIT, grad_cut=3)
    x: Any = torch.randn(T, N, 3, dtype=torch.float64)
    if packed:
        x = pack_padded_sequence(x, [7, 6, 4, 1])
    with rnnkit.backend("reference"):
        expected = run(ruled, x)
    torch.testing.assert_close(run(ruled, x), expected)
    torch.testing.assert_close(run(torch.compile(ruled, backend="aot_eager"), x), expected)
    without = run(plain, x)
    torch.testing.assert_close(without[0], expected[0])
    assert not all(torch.allclose(a, b) for a, b in zip(without, expected, strict=True))
    ruled.grad_clip, ruled.grad_cut = None, None
    for found, wanted in zip(run(ruled, x), without, strict=True):
        assert torch.equal(found, wanted)


def with_batch_first(layer: nn.Module, x: Tensor) -> Tensor:
    layer.batch_first = True
    return layer(x.transpose(0, 1))[0].transpose(0, 1)


def recomputed(layer: nn.Module, x: Tensor) -> Tensor:
    layer.recompute = True
    return layer(x)[0]


def saved_on_the_cpu(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        return layer(x)[0]


#: Other ways to make the call `layer(x)[0]`.
WAYS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "batch_first": with_batch_first,
    "recompute": recomputed,
    "unbatched": lambda layer, x: torch.stack([layer(x[:, n])[0] for n in range(N)], 1),
    "checkpoint": lambda layer, x: checkpoint(layer, x, use_reentrant=False)[0],
    "save_on_cpu": saved_on_the_cpu,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", LAYERS)
def test_other_ways_of_a_call(name: str, way: str) -> None:
    ruled, _ = layer_pair(name, grad_clip=LIMIT, grad_cut=3)
    x = torch.randn(T, N, 3, dtype=torch.float64)
    torch.testing.assert_close(run(copy.deepcopy(ruled), x, WAYS[way]), run(ruled, x))


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["rnn_tanh", "lstm", "gru"])
def test_autocast(name: str, low: torch.dtype) -> None:
    """The rule holds in the low precision; gradients of float32 weights are in float32."""
    ruled, plain = (layer.to(low).float() for layer in layer_pair(name, grad_clip=0.1, grad_cut=3))
    x = torch.randn(T, N, 3).to(low).float()
    truth, without = run(copy.deepcopy(ruled).double(), x.double()), run(plain, x)
    with torch.autocast("cpu", low):
        found = run(ruled, x)
        with rnnkit.backend("reference"):
            expected = run(ruled, x)
    for k, (value, like, exact) in enumerate(zip(found, expected, truth, strict=True)):
        assert value.dtype == like.dtype and (k == 0 or value.dtype == torch.float32)
        assert_close_to_truth(value.to(low), like.to(low), exact, gradient=k > 0, name=str(k))
    assert not all(torch.allclose(a.float(), b, 0.1) for a, b in zip(found, without, strict=True))


def test_exported() -> None:
    """Programs for inference, saved and loaded, and of ATen's operators."""
    layer, x = rnnkit.LSTM(3, 5, grad_clip=0.1, grad_cut=2).eval(), torch.randn(T, N, 3)
    program, file = torch.export.export(layer, (x,)), io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    table = {**torch.export.default_decompositions(), **rnnkit.decompositions()}
    for each in (torch.export.load(file), program.run_decompositions(table)):
        torch.testing.assert_close(each.module()(x), layer(x))


def test_no_program_holds_infinity() -> None:
    """AOTInductor could not write it."""
    layer, x = rnnkit.LSTM(3, 5, grad_clip=math.inf), torch.randn(T, N, 3)
    program = torch.export.export(layer.eval(), (x,))
    assert not any(math.inf in node.args for node in program.graph.nodes)
    found = run(layer, x)
    layer.grad_clip = None
    torch.testing.assert_close(found, run(layer, x))


def test_what_is_torchs_alone_is_refused() -> None:
    """torch.nn's class would have other gradients."""
    for name, value in (("grad_clip", 0.1), ("grad_cut", 2)):
        layer = rnnkit.GRU(3, 5, **{name: value})
        with pytest.raises(RuntimeError, match=f"got one that has {name}, which torch"):
            torch.jit.trace(layer, (torch.randn(T, N, 3),))
        with pytest.raises(RuntimeError, match=f"got one that has {name}, which torch"):
            torch.jit.script(layer)


@pytest.mark.parametrize("name", LAYERS)
def test_windows_are_detached_states(name: str) -> None:
    """`grad_cut=k` gives the gradients of a loop over windows of k steps with detached states, in one direction."""
    cls, own = LAYERS[name]
    torch.manual_seed(0)
    layer = getattr(rnnkit, cls)(3, 5, **own, grad_cut=3).double()
    x = torch.randn(T, N, 3, dtype=torch.float64)
    weight = torch.randn(T, N, 5, dtype=torch.float64)
    (layer(x)[0] * weight).sum().backward()
    found = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    layer.grad_cut, hx = None, None
    for start in range(0, T, 3):
        output, hx = layer(x[start : start + 3], hx)
        (output * weight[start : start + 3]).sum().backward()
        hx = tuple(s.detach() for s in hx) if isinstance(hx, tuple) else hx.detach()
    for grad, parameter in zip(found, layer.parameters(), strict=True):
        torch.testing.assert_close(grad, parameter.grad)


def test_clipped_windows_compose() -> None:
    """Two calls, the second from the first's final state, give the gradients of one: the rule holds at hx, too."""
    torch.manual_seed(0)
    layer = rnnkit.LSTM(3, 5, grad_clip=LIMIT).double()
    x = torch.randn(T, N, 3, dtype=torch.float64)
    weight = torch.randn(T, N, 5, dtype=torch.float64)
    parameters = list(layer.parameters())
    at_once = torch.autograd.grad((layer(x)[0] * weight).sum(), parameters)
    first, hx = layer(x[:4])
    second, _ = layer(x[4:], hx)
    in_two = torch.autograd.grad((torch.cat([first, second]) * weight).sum(), parameters)
    torch.testing.assert_close(in_two, at_once)


def test_exploding_gradients_stay_finite(backend: str) -> None:
    """Where the gradient overflows, the clipped one is finite; NaN stays NaN."""
    layer = rnnkit.RNN(2, 4, nonlinearity="relu")
    with torch.no_grad():
        for name, weight in layer.named_parameters():
            weight.fill_(40.0 if name == "weight_hh_l0" else 1e-30)
    x = torch.zeros(20, 1, 2)
    (free,) = torch.autograd.grad(layer(x)[0][:20].sum(), [layer.bias_ih_l0])
    assert not free.isfinite().all()
    layer.grad_clip = 1.0
    (clipped,) = torch.autograd.grad(layer(x)[0][:20].sum(), [layer.bias_ih_l0])
    assert clipped.isfinite().all()
    hx = torch.zeros(1, 1, 4, requires_grad=True)
    output = layer(x, hx)[0]
    (of_nan,) = torch.autograd.grad(output, [hx], torch.full_like(output, math.nan))
    assert of_nan.isnan().all()


def test_double_backward_and_transforms() -> None:
    it = call(Case("lstm", (4, 2, 3, 3), 2, dtype=torch.float64, grad_clip=0.1, grad_cut=3))
    ruled, _ = layer_pair("lstm", grad_clip=0.1, grad_cut=3)
    x = it.input.requires_grad_()
    (grad,) = torch.autograd.grad(ruled(x)[0].square().sum(), [x], create_graph=True)
    again = torch.autograd.grad(grad.square().sum(), [x])[0]
    assert again.isfinite().all() and again.abs().max() > 0
    parameters = dict(ruled.named_parameters())

    def loss(x: Tensor) -> Tensor:
        return torch.func.functional_call(ruled, parameters, (x,))[0].square().sum()

    torch.testing.assert_close(torch.func.grad(loss)(x), grad)
    each = torch.func.vmap(torch.func.grad(loss))(torch.stack([x, x]))
    torch.testing.assert_close(each, torch.stack([grad, grad]))
    output = ruled(x)[0]
    several = torch.randn(3, *output.shape, dtype=torch.float64)
    one_by_one = [torch.autograd.grad(output, x, g, retain_graph=True)[0] for g in several]
    (batched,) = torch.autograd.grad(output, x, several, is_grads_batched=True)
    torch.testing.assert_close(batched, torch.stack(one_by_one))


@pytest.mark.parametrize("lengths", [(), (4, 3, 1)], ids=["dense", "packed"])
@pytest.mark.parametrize("cell", CELLS)
def test_gradients_of_gradients_are_the_loops(cell: str, lengths: tuple) -> None:
    case = Case(cell, (4, 3, 3, 3), 2, lengths, dtype=torch.float64, grad_clip=0.2, grad_cut=3)
    it = call(case)
    tensors = [t.requires_grad_() for t in it.tensors if t is not None]
    (found,), last = autograd.run(it)
    output, finals = by_hand(it)
    seconds = []
    for results in ([found, *last], [output, *finals]):
        first = torch.autograd.grad(results, tensors, it.grads, create_graph=True)
        size = sum(grad.square().sum() for grad in first)
        seconds.append(torch.autograd.grad(size, tensors, allow_unused=True))
    for actual, wanted in zip(*seconds, strict=True):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("way", ["eager", "reference", "functional"])
def test_nonsense_that_is_assigned_later(way: str) -> None:
    layer, x = rnnkit.GRU(3, 5), torch.randn(4, 2, 3)
    parameters = dict(layer.named_parameters())

    def run() -> Any:
        if way == "functional":
            return torch.func.grad(lambda p: torch.func.functional_call(layer, p, (x,))[0].sum())(
                parameters
            )
        with rnnkit.backend("reference" if way == "reference" else "cpp"):
            return layer(x)

    for option, wrong, error in (
        ("grad_clip", 0, ValueError),
        ("grad_clip", -1.0, ValueError),
        ("grad_clip", math.nan, ValueError),
        ("grad_clip", "x", TypeError),
        ("grad_cut", -3, ValueError),
        ("grad_cut", 2.5, TypeError),
    ):
        setattr(layer, option, wrong)
        with pytest.raises(error, match=f"expected {option} to be .*, got"):
            run()
        setattr(layer, option, None)
    run()


def test_limits_beyond_a_dtype_are_none() -> None:
    for backend in ("cpp", "reference"):
        with rnnkit.backend(backend):
            for dtype, limit in ((torch.float32, 1e39), (torch.float16, 1e5)):
                layer = rnnkit.GRU(3, 5, dtype=dtype)
                x = torch.randn(4, 2, 3, dtype=dtype)
                free = torch.autograd.grad(layer(x)[0].sum(), list(layer.parameters()))
                layer.grad_clip = limit
                found = torch.autograd.grad(layer(x)[0].sum(), list(layer.parameters()))
                assert all(torch.equal(a, b) for a, b in zip(found, free, strict=True))


def test_forward_mode_knows_no_rule() -> None:
    """The rule is one for gradients: a tangent is that of the function."""
    ruled, plain = layer_pair("gru", grad_clip=1e-3, grad_cut=2)
    x = torch.randn(T, N, 3, dtype=torch.float64)
    tangent = torch.randn_like(x)
    found = [torch.func.jvp(lambda x, m=m: m(x)[0], (x,), (tangent,))[1] for m in (ruled, plain)]
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("name", LAYERS)
def test_options(name: str) -> None:
    cls, own = LAYERS[name]
    make = getattr(rnnkit, cls)
    layer = make(3, 5, **own, grad_clip=2, grad_cut=4)
    assert "grad_clip=2, grad_cut=4" in repr(layer) and "grad_c" not in repr(make(3, 5, **own))
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert (other.grad_clip, other.grad_cut) == (2, 4)
    for option, wrong, error in (
        ("grad_clip", 0, ValueError),
        ("grad_clip", -1.0, ValueError),
        ("grad_clip", math.nan, ValueError),
        ("grad_clip", "1", TypeError),
        ("grad_clip", True, TypeError),
        ("grad_cut", 0, ValueError),
        ("grad_cut", 2.0, TypeError),
        ("grad_cut", False, TypeError),
    ):
        with pytest.raises(error, match=f"expected {option} to be .*, got"):
            make(3, 5, **own, **{option: wrong})
    for option in ("grad_clip", "grad_cut"):
        assert option in rnnkit.revert(layer).left[""]
        setattr(layer, option, None)
    assert not rnnkit.revert(layer).left

"""`reset=`: layers that put sequences back between steps, against loops over torch's cells that do it by hand.

tests/kernel_cases.py has cases with resets, in which every kernel is held to the reference.
"""

import copy
from typing import Any

import pytest
import torch
from loops import BACKENDS, LAYERS, H, I, Loop, N, T, as_hx, assert_same, made, random_states
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import rnnkit


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("given", ["zeros", "hx", "reset_to", "both"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one", "two"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_the_loop(
    name: str, bidirectional: bool, given: str, packed: bool, backend: str
) -> None:
    layer = made(name, bidirectional=bidirectional)
    x = torch.randn(T, N, I, dtype=torch.float64)
    reset = torch.rand(T, N) < 0.3
    lengths = [7, 5, 5, 2, 1] if packed else [T] * N
    zeros = [torch.zeros_like(state) for state in random_states(layer)]
    hx = random_states(layer) if given in ("hx", "both") else zeros
    put_back = random_states(layer) if given in ("reset_to", "both") else zeros
    for tensor in (x, *hx, *put_back):
        tensor.requires_grad_()
    every, finals = Loop(reset, put_back, lengths)(layer, x, hx)
    options: dict[str, Any] = {}
    if given in ("hx", "both"):
        options["hx"] = as_hx(layer, hx)
    if given in ("reset_to", "both"):
        options["reset_to"] = as_hx(layer, put_back)
    with rnnkit.backend(backend):
        if packed:
            rows = pack_padded_sequence(reset.unsqueeze(-1), lengths)
            output, states = layer(pack_padded_sequence(x, lengths), reset=rows, **options)
            found = pad_packed_sequence(output)[0]
        else:
            found, states = layer(x, reset=reset, **options)
        states = list(states) if isinstance(states, tuple) else [states]
        used = [x] + (hx if "hx" in options else []) + (put_back if "reset_to" in options else [])
        assert_same([found, *states], [every[0], *finals], [*used, *layer.parameters()])


def test_the_ways_to_give_a_mask() -> None:
    layer = made("lstm", bidirectional=True)
    x, reset = torch.randn(T, N, I).double(), torch.rand(T, N) < 0.3
    expected = layer(x, reset=reset)[0]
    first = copy.deepcopy(layer)
    first.batch_first = True
    for mask in (
        reset,
        reset.int(),
        -reset.float(),
        reset.unsqueeze(-1),
        reset.double().unsqueeze(-1),
    ):
        torch.testing.assert_close(layer(x, reset=mask)[0], expected, rtol=0, atol=0)
        of_first = first(x.transpose(0, 1), reset=mask.transpose(0, 1))[0]
        torch.testing.assert_close(of_first.transpose(0, 1), expected, rtol=0, atol=0)
    alone = layer(x[:, 2], reset=reset[:, 2])[0]
    torch.testing.assert_close(alone, expected[:, 2], rtol=1e-12, atol=1e-12)
    put_back = random_states(layer)
    given = layer(x, reset=reset, reset_to=tuple(put_back))[0]
    of_one = tuple(state[:, 2] for state in put_back)
    alone = layer(x[:, 2], reset=reset[:, 2], reset_to=of_one)[0]
    torch.testing.assert_close(alone, given[:, 2], rtol=1e-12, atol=1e-12)
    lengths = [2, 7, 5, 1, 3]
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    rows = pack_padded_sequence(reset.unsqueeze(-1), lengths, enforce_sorted=False)
    for mask in (rows, rows.data, rows.data.squeeze(-1)):
        result = layer(packed, reset=mask, reset_to=tuple(put_back))[0]
        output, _ = pad_packed_sequence(result)
        for n, length in enumerate(lengths):
            of_one = tuple(state[:, n] for state in put_back)
            own = layer(x[:length, n], reset=reset[:length, n], reset_to=of_one)[0]
            torch.testing.assert_close(output[:length, n], own, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LAYERS)
def test_an_episode_that_ended_in_nan_does_not_leak(name: str, backend: str) -> None:
    layer = made(name)
    x = torch.randn(T, N, I).double()
    reset = torch.zeros(T, N, dtype=torch.bool)
    reset[3] = True
    broken = x.clone()
    broken[:3] = torch.nan
    hx = as_hx(layer, [torch.full_like(state, torch.inf) for state in random_states(layer)])
    with rnnkit.backend(backend):
        expected, states = layer(x[3:])
        found, of_broken = layer(broken, hx, reset=reset)
    torch.testing.assert_close(found[3:], expected)
    torch.testing.assert_close(of_broken, states)


@pytest.mark.parametrize("num_layers", [1, 3])
def test_other_numbers_of_layers(num_layers: int) -> None:
    layer = made("lstm", bidirectional=True, num_layers=num_layers)
    x, reset = torch.randn(T, N, I).double(), torch.rand(T, N) < 0.3
    hx, put_back = random_states(layer), random_states(layer)
    every, finals = Loop(reset, put_back)(layer, x, hx)
    found, last = layer(x, as_hx(layer, hx), reset=reset, reset_to=as_hx(layer, put_back))
    torch.testing.assert_close([found, *last], [every[0], *finals], rtol=1e-12, atol=1e-12)


def test_no_gradient_crosses_a_reset() -> None:
    layer = made("gru")
    x = torch.randn(T, N, I, dtype=torch.float64, requires_grad=True)
    h = torch.randn(2, N, H, dtype=torch.float64, requires_grad=True)
    reset = torch.zeros(T, N, dtype=torch.bool)
    reset[3, 1] = reset[0, 2] = True
    layer(x, h, reset=reset)[0][-1].sum().backward()
    assert not x.grad[:3, 1].any() and x.grad[3:, 1].all() and x.grad[:, 0].all()
    assert not h.grad[:, :3].any(-1)[:, 1:].any() and h.grad[:, 0].all()


def test_without_a_reset_the_bits_are_the_same() -> None:
    layer = made("lstm", bidirectional=True).float()
    x = torch.randn(T, N, I)
    never = torch.zeros(T, N, dtype=torch.bool)
    for mine, right in zip(layer(x, reset=never)[1], layer(x)[1], strict=True):
        assert torch.equal(mine, right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    layer = made("lstm", bidirectional=True).to(dtype)
    x, reset = torch.randn(T, N, I, dtype=dtype), torch.rand(T, N) < 0.3
    put_back = as_hx(layer, [state.to(dtype) for state in random_states(layer)])
    with rnnkit.backend("reference"):
        expected = layer.double()(
            x.double(), reset=reset, reset_to=tuple(s.double() for s in put_back)
        )[0]
    layer.to(dtype)
    found = layer(x, reset=reset, reset_to=put_back)[0]
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 3e-3}[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    with torch.autocast("cpu", torch.bfloat16):
        low = layer.float()(x.float(), reset=reset, reset_to=tuple(s.float() for s in put_back))[0]
    torch.testing.assert_close(low.double(), expected, rtol=6e-2, atol=6e-2)


def test_recompute_dropout_and_freeze() -> None:
    x, reset = torch.randn(T, N, I).double(), torch.rand(T, N) < 0.3
    layer = made("lstm")
    expected = torch.autograd.grad(layer(x, reset=reset)[0].sum(), [*layer.parameters()])
    again = copy.deepcopy(layer)
    again.recompute = True
    found = torch.autograd.grad(again(x, reset=reset)[0].sum(), [*again.parameters()])
    torch.testing.assert_close(found, expected)
    output = layer(x, reset=reset)[0]
    again.dropout = 0.5
    assert not torch.allclose(again(x, reset=reset)[0], output)
    frozen = rnnkit.freeze(copy.deepcopy(layer))
    with torch.no_grad():
        torch.testing.assert_close(frozen(x, reset=reset)[0], output)
    put_back = tuple(state.requires_grad_() for state in random_states(frozen))
    with pytest.raises(RuntimeError, match="frozen layer to need no gradient, got one that does"):
        frozen(x, reset=reset, reset_to=put_back)


def test_transforms_and_double_backward() -> None:
    layer = made("gru", num_layers=1)
    x, reset = torch.randn(3, 2, I).double(), torch.tensor([[0, 1], [1, 0], [0, 1]]).bool()
    assert torch.autograd.gradgradcheck(
        lambda x, h: layer(x, reset=reset, reset_to=h)[0],
        (x.requires_grad_(), torch.randn(1, 2, H).double().requires_grad_()),
    )
    each = torch.func.vmap(lambda x, r: layer(x, reset=r)[0], in_dims=1, out_dims=1)
    torch.testing.assert_close(each(x, reset), layer(x, reset=reset)[0])


def test_gradient_flow_stops_at_resets() -> None:
    layer = made("gru", num_layers=1)
    x, reset = torch.randn(T, N, I).double(), torch.zeros(T, N, dtype=torch.bool)
    reset[4] = True
    with rnnkit.gradient_flow(layer) as flow:
        layer(x, reset=reset)[0][-1].sum().backward()
    assert not flow[""].h[0, 0, :4].any() and flow[""].h[0, 0, 4:].all()
    assert "a reset, or units that pass nothing, cut it off 3 steps before it" in flow.summary()


def test_compile_export_and_fx() -> None:
    layer = made("lstm", bidirectional=True).float()
    put_back = as_hx(layer, [state.float() for state in random_states(layer)])

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor, reset: Tensor) -> Tensor:
            return self.layer(x, reset=reset, reset_to=put_back)[0]

    model, x, reset = Model(), torch.randn(T, N, I), torch.rand(T, N) < 0.3
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, reset), model(x, reset))
    compiled(x, reset).sum().backward()
    times = torch.export.Dim("T", min=2)
    program = torch.export.export(
        model, (x, reset), dynamic_shapes={"x": {0: times}, "reset": {0: times}}
    )
    for other in (T, 3):
        torch.testing.assert_close(
            program.module()(x[:other], reset[:other]), model(x[:other], reset[:other])
        )
    graph = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(graph(x, reset), model(x, reset))


def test_fx_of_a_mask_alone() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = made("gru").float()
            self.register_buffer("x", torch.randn(T, N, I))

        def forward(self, reset: Tensor) -> Tensor:
            return self.layer(self.x, reset=reset)[0]

    model, reset = Model(), torch.rand(T, N) < 0.3
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(reset), model(reset))


def test_errors() -> None:
    layer = made("lstm").float()
    x, reset = torch.randn(T, N, I), torch.zeros(T, N, dtype=torch.bool)
    h = torch.zeros(2, N, H)
    with pytest.raises(TypeError, match="expected reset to be a Tensor, got list"):
        layer(x, reset=[0])
    with pytest.raises(RuntimeError, match=r"expected reset of shape \(7, 5\), got \(5, 7\)"):
        layer(x, reset=reset.t())
    with pytest.raises(RuntimeError, match="expected reset on cpu like the input, got meta"):
        layer(x, reset=reset.to("meta"))
    with pytest.raises(ValueError, match="expected reset to be given with reset_to, got None"):
        layer(x, reset_to=(h, h))
    with pytest.raises(
        RuntimeError, match=r"expected reset_to\[1\] of shape \(2, 5, 4\), got \(2, 1, 4\)"
    ):
        layer(x, reset=reset, reset_to=(h, h[:, :1]))
    packed, rows = (pack_padded_sequence(t, [7, 5, 5, 2, 1]) for t in (x, reset.unsqueeze(-1)))
    with pytest.raises(
        RuntimeError, match=r"expected reset_to\[1\] of shape \(2, 5, 4\), got \(2, 1, 4\)"
    ):
        layer(packed, reset=rows, reset_to=(h, h[:, :1]))
    with pytest.raises(TypeError, match="expected reset_to to be a pair of Tensors"):
        layer(x, reset=reset, reset_to=h)
    with pytest.raises(RuntimeError, match="not the same dtype"):
        layer(x, reset=reset, reset_to=(h.double(), h))
    with pytest.raises(RuntimeError, match="is called with reset"):
        torch.jit.trace(lambda x: layer(x, reset=reset)[0], x)

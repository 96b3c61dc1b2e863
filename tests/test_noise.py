"""`weight_dropout`, `recurrent_dropout` and `zoneout`, against loops with masks drawn in the same order.

tests/kernel_cases.py has cases with masks, in which every kernel is held to the reference.
"""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from loops import (
    BACKENDS,
    LAYERS,
    H,
    I,
    Loop,
    N,
    T,
    as_hx,
    assert_same,
    made,
    random_states,
)
from torch import Tensor, nn
from torch.nn.functional import dropout
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import rnnkit
from rnnkit import noise

SEED = 7
LENGTHS = [5, 7, 1, 5, 2]
NOISES: dict[str, dict[str, Any]] = {
    "weight": {"weight_dropout": 0.3},
    "operand": {"recurrent_dropout": 0.3},
    "zoneout": {"zoneout": 0.3},
    "all": {"weight_dropout": 0.2, "recurrent_dropout": 0.4, "zoneout": 0.25, "dropout": 0.1},
}


def noise_of(name: str, noise: str) -> dict[str, Any]:
    """The options, with zoneout as the layer can have it."""
    options = dict(NOISES[noise])
    if name == "lstm_projected" and "zoneout" in options:
        options["zoneout"] = (0, options["zoneout"])
    return options


class Dropped:
    """A layer with other weights in the place of some."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)


def drawn(layer: Any, lengths: list[int], reset: Tensor | None = None) -> tuple[Loop, Any]:
    """The masks that a call draws after `torch.manual_seed(SEED)`, as a loop, and the layer with dropped weights.

    Without dropout between layers, which the caller has to draw between the layers' masks. The masks of a ragged batch
    are those of its sequences in the order of their lengths, the longest first.
    """
    torch.manual_seed(SEED)
    directions, rows = 2 if layer.bidirectional else 1, sum(lengths)
    states = 2 if layer.mode == "LSTM" else 1
    given = layer.zoneout if isinstance(layer.zoneout, tuple) else (layer.zoneout,) * states
    widths = [layer.proj_size or H, H][:states]
    dropped = Dropped(layer)
    if layer.training and layer.weight_dropout > 0:
        for k in range(layer.num_layers):
            for d in range(directions):
                name = f"weight_hh_l{k}" + "_reverse" * d
                weight = dropout(getattr(layer, name), layer.weight_dropout)
                setattr(dropped, name, weight)
    operand: list[Tensor] = []
    kept: list[list[Tensor | None]] = []
    in_order, order = torch.sort(torch.tensor(lengths), descending=True)
    place = torch.argsort(order)  # of each sequence among the sorted ones
    there = torch.arange(T).unsqueeze(1) < in_order  # [T, N]
    for _ in range(layer.num_layers if layer.training else 0):
        if layer.recurrent_dropout > 0:
            ones = torch.ones(directions, len(lengths), widths[0], dtype=torch.float64)
            operand += dropout(ones, layer.recurrent_dropout)[:, place].unbind(0)
        of_states: list[Tensor | None] = []
        for p, width in zip(given, widths, strict=True):
            if p == 0:
                of_states.append(None)
                continue
            mask = torch.zeros(T, len(lengths), directions * width, dtype=torch.bool)
            mask[there] = noise.coins(p, rows, directions * width, mask.device)
            of_states.append(mask[:, place])
        if layer.zoneout != 0:
            for d in range(directions):
                kept.append([None if m is None else m.chunk(directions, -1)[d] for m in of_states])
    zoneout = given if layer.zoneout != 0 else ()
    return Loop(reset, (), lengths, operand, zoneout, kept), dropped


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("way", ["train", "eval", "packed", "lengths", "batch_first", "reset"])
@pytest.mark.parametrize("noise", ["weight", "operand", "zoneout", "all"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one", "two"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_the_loop(
    name: str, bidirectional: bool, noise: str, way: str, backend: str
) -> None:
    layer = made(name, bidirectional=bidirectional, **noise_of(name, noise) | {"dropout": 0.0})
    layer.train(way != "eval")
    x = torch.randn(T, N, I, dtype=torch.float64, requires_grad=True)
    hx = [state.requires_grad_() for state in random_states(layer)]
    ragged = way in ("packed", "lengths")
    reset = torch.rand(T, N) < 0.3 if way == "reset" else None
    loop, dropped = drawn(layer, LENGTHS if ragged else [T] * N, reset)
    loop.put_back = [torch.zeros_like(state) for state in hx]
    every, finals = loop(dropped, x, hx)
    torch.manual_seed(SEED)
    with rnnkit.backend(backend):
        if way == "packed":
            packed = pack_padded_sequence(x, LENGTHS, enforce_sorted=False)
            output, last = layer(packed, as_hx(layer, hx))
            found = pad_packed_sequence(output)[0]
        elif way == "batch_first":
            layer.batch_first = True
            found, last = layer(x.transpose(0, 1), as_hx(layer, hx))
            found = found.transpose(0, 1)
        else:
            options = {"lengths": LENGTHS} if ragged else {"reset": reset}
            found, last = layer(x, as_hx(layer, hx), **options)
        last = list(last) if isinstance(last, tuple) else [last]
        assert_same([found, *last], [every[0], *finals], [x, *hx, *layer.parameters()])


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_dropout_between_layers_is_drawn_first(name: str) -> None:
    """The order is part of what a seed means: a layer's input, then its operand, then h, then c."""
    layer = made(name, **noise_of(name, "all") | {"weight_dropout": 0.0})
    below, above = (made(name, num_layers=1, **noise_of(name, "operand")) for _ in range(2))
    for k, alone in enumerate((below, above)):
        alone.zoneout = layer.zoneout
        alone.recurrent_dropout = layer.recurrent_dropout
        for own in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            setattr(alone, own + "_l0", getattr(layer, f"{own}_l{k}"))
    above.input_size = H
    x = torch.randn(T, N, I).double()
    torch.manual_seed(SEED)
    between = dropout(below(x)[0], layer.dropout)
    expected = above(between)[0]
    torch.manual_seed(SEED)
    torch.testing.assert_close(layer(x)[0], expected)


@pytest.mark.parametrize("name", ["lstm", "gru", "rnn_tanh"])
def test_backends_draw_the_same(name: str) -> None:
    layer = made(name, bidirectional=True, **noise_of(name, "all")).float()
    x, found = torch.randn(T, N, I), []
    for backend in BACKENDS:
        torch.manual_seed(SEED)
        with rnnkit.backend(backend):
            found.append(layer(x)[0])
    torch.testing.assert_close(*found)


def test_what_is_dropped() -> None:
    x = torch.randn(T, N, I).double()
    layer = made("lstm", num_layers=1, weight_dropout=1.0)
    without = made("lstm", num_layers=1)
    with torch.no_grad():
        without.weight_hh_l0.zero_()
    torch.testing.assert_close(layer(x)[0], without(x)[0])
    for option in ({"weight_dropout": 0.5}, {"recurrent_dropout": 0.5}):
        layer = made("lstm", **option)
        assert not torch.equal(layer(x)[0], layer(x)[0])
        layer.eval()
        torch.testing.assert_close(layer(x)[0], made("lstm")(x)[0], rtol=0, atol=0)
    layer = made("gru", zoneout=1.0)
    h = random_states(layer)[0]
    for mode in (True, False):
        output, last = layer.train(mode)(x, h)
        torch.testing.assert_close(last, h, rtol=0, atol=0)
        torch.testing.assert_close(output, h[1].expand(T, -1, -1), rtol=0, atol=0)
    x.requires_grad_()
    assert not torch.autograd.grad(layer(x, h)[0].sum(), x)[
        0
    ].any()  # nor NaN of the RNN's 1 / (1 - p)
    layer = made("rnn_tanh", zoneout=1.0).eval()
    assert not torch.autograd.grad(layer(x, h)[0].sum(), x)[0].any()


#: With limits of bytes that are whole (0.5, 0.25), almost (0.1, 0.7), and 0 or 1 (1 / 512 and its complement).
PROBABILITIES = [0.5, 0.25, 0.1, 0.7, 1 / 512, 511 / 512]


def many_coins(p: float) -> Tensor:
    """[4000, 504] after a seed: 2e6 coins. Those of a column that are 125 rows apart share a limit."""
    torch.manual_seed(SEED)
    return noise.coins(p, 4000, 504, torch.device("cpu"))


def assert_within(found: Tensor, p: float, count: int) -> None:
    """Frequencies in `count` coins each are p, up to five standard deviations."""
    assert ((found - p).abs() < 5 * (p * (1 - p) / count) ** 0.5).all()


@pytest.mark.parametrize("p", PROBABILITIES)
def test_frequency_of_coins(p: float) -> None:
    """Of all, which is told to a few percent of the rarer side, of each byte of a word, and of each row of a limit."""
    found = many_coins(p)
    assert found.dtype == torch.bool and found.shape == (4000, 504)
    found = found.double()
    assert_within(found.mean(), p, found.numel())
    assert_within(found.view(-1, 8).mean(0), p, found.numel() // 8)
    assert_within(found.view(32, -1).mean(1), p, found.numel() // 32)
    assert 5 * (p * (1 - p) / found.numel()) ** 0.5 < 0.1 * min(p, 1 - p)


@pytest.mark.parametrize("p", PROBABILITIES)
def test_coins_are_independent(p: float) -> None:
    """Of the other bytes of a word, of the next words, of other rows, and almost of those with the same limit."""
    found = many_coins(p).double() - p
    columns_apart, rows_apart = [*range(1, 17), 256], (1, 2, 32, 125)
    for across in [(0, k) for k in columns_apart] + [(k, 0) for k in rows_apart] + [(1, 1)]:
        rows, columns = across
        one = found[: len(found) - rows, : found.size(1) - columns]
        correlation = (one * found[rows:, columns:]).mean() / (p * (1 - p))
        shared = 2**-18 / (p * (1 - p)) if rows == 125 else 0
        assert abs(correlation) < 5 / one.numel() ** 0.5 + shared, across


@pytest.mark.parametrize("shape", [(1, 1), (31, 7), (32, 8), (33, 9), (70, 100)])
def test_coins_of_any_number(shape: tuple[int, int]) -> None:
    device = torch.device("cpu")
    assert not noise.coins(0.0, *shape, device).any()
    assert noise.coins(1.0, *shape, device).all()
    assert not noise.coins(1e-9, *shape, device).any()
    assert noise.coins(1 - 1e-9, *shape, device).all()
    many = torch.stack([noise.coins(0.5, *shape, device) for _ in range(64)])
    assert many.any(0).all() and not many.all(0).any()


def test_masks_of_states_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    kept = noise._kept

    def recorded(*args: Any) -> Tensor:
        drawn.append(kept(*args))
        return drawn[-1]

    monkeypatch.setattr(noise, "_kept", recorded)
    layer = made("lstm", zoneout=(0.5, 0.5))
    layer(torch.randn(T, N, I).double())
    masks = [mask for of_layer in drawn for mask in of_layer]
    assert len(masks) == 4
    for index, mask in enumerate(masks):
        for other in masks[:index]:
            assert 0.2 < (mask == other).double().mean() < 0.8


def test_packed_sequences_without_states() -> None:
    layer = made("gru", **NOISES["operand"])
    x = torch.randn(T, N, I).double()
    packed = pack_padded_sequence(x, LENGTHS, enforce_sorted=False)
    found = []
    for hx in (None, random_states(layer)[0] * 0):
        torch.manual_seed(SEED)
        found.append(layer(packed, hx)[0].data)
    torch.testing.assert_close(*found)


def test_recompute_and_checkpoint() -> None:
    from torch.utils.checkpoint import checkpoint

    layer = made("lstm", bidirectional=True, **NOISES["all"])
    x = torch.randn(T, N, I, dtype=torch.float64, requires_grad=True)
    again = copy.deepcopy(layer)
    again.recompute = True
    found = []
    for run in (layer, again, lambda x: checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(SEED)
        found.append(torch.autograd.grad(run(x)[0].sum(), x)[0])
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["rnn_tanh", "lstm", "gru"])
def test_an_output_that_was_written_to_is_computed_again(name: str) -> None:
    """With the masks of the call, and its resets."""
    layer = made(name, recurrent_dropout=0.3, zoneout=0.3)
    x, reset = torch.randn(T, N, I).double(), torch.rand(T, N) < 0.3
    hx, put_back = as_hx(layer, random_states(layer)), as_hx(layer, random_states(layer))
    output = layer(x, hx, reset=reset, reset_to=put_back)[0]
    total = output.sum()
    expected = torch.autograd.grad(total, [*layer.parameters()], retain_graph=True)
    with torch.no_grad():
        output.zero_()
    torch.testing.assert_close(torch.autograd.grad(total, [*layer.parameters()]), expected)


def test_frozen_layers_in_training_mode() -> None:
    layer = rnnkit.freeze(made("lstm", **NOISES["all"])).train()
    x = torch.randn(T, N, I).double()
    with torch.no_grad():
        assert not torch.equal(layer(x)[0], layer(x)[0])
        layer.eval()
        usual = made("lstm", **NOISES["all"]).eval()
        torch.testing.assert_close(layer(x)[0], usual(x)[0])
        dropping = rnnkit.freeze(made("lstm", weight_dropout=0.5)).train()
        assert not torch.equal(dropping(x)[0], dropping(x)[0])


@pytest.mark.parametrize("name", ["lstm", "gru", "rnn_tanh"])
def test_double_backward(name: str) -> None:
    layer = made(name, num_layers=1, bidirectional=True, recurrent_dropout=0.4, zoneout=0.3)

    def run(x: Tensor) -> Tensor:
        torch.manual_seed(SEED)
        return layer(x)[0]

    x = torch.randn(3, 2, I, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x,))
    assert torch.autograd.gradgradcheck(run, (x,))


def test_gradient_flow_is_that_of_the_states() -> None:
    for zoneout in ((0.3, 0.4), (0.3, 0.0), (0.0, 0.4)):
        layer = made("lstm", num_layers=1, recurrent_dropout=0.3, zoneout=zoneout)
        x, found = torch.randn(T, N, I).double(), []
        for backend in BACKENDS:
            torch.manual_seed(SEED)
            with rnnkit.backend(backend), rnnkit.gradient_flow(layer) as flow:
                layer(x)[0][-1].sum().backward()
            found.append((flow[""].h, flow[""].c))
        torch.testing.assert_close(*found)


def test_vmap_and_jvp() -> None:
    layer = made("gru", recurrent_dropout=0.4, zoneout=0.3)
    x = torch.randn(T, N, I).double()
    torch.manual_seed(SEED)
    expected = layer(x)[0]

    def seeded(x: Tensor) -> Tensor:
        torch.manual_seed(SEED)
        return layer(x)[0]

    torch.manual_seed(SEED)
    found, tangent = torch.func.jvp(lambda x: layer(x)[0], (x,), (x,))
    torch.testing.assert_close(found, expected)
    numeric = (seeded(x * (1 + 1e-6)) - seeded(x * (1 - 1e-6))) / 2e-6
    torch.testing.assert_close(tangent, numeric, rtol=1e-6, atol=1e-8)
    for randomness in ("same", "different"):
        each = torch.func.vmap(lambda x: layer(x)[0], randomness=randomness)
        one, other = each(torch.stack([x, x]))
        assert torch.allclose(one, other) == (randomness == "same")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    layer = made("lstm", bidirectional=True, recurrent_dropout=0.5, zoneout=0.3).to(dtype)
    x = torch.randn(T, N, I, dtype=dtype)
    torch.manual_seed(SEED)
    found = layer(x)[0]
    torch.manual_seed(SEED)
    with rnnkit.backend("reference"):
        expected = layer.double()(x.double())[0]
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 4e-3}[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    torch.manual_seed(SEED)
    with torch.autocast("cpu", torch.bfloat16):
        low = layer.float()(x.float())[0]
    torch.testing.assert_close(low.double(), expected, rtol=6e-2, atol=6e-2)


class Model(nn.Module):
    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


def test_compile_and_export() -> None:
    model = Model(made("lstm", bidirectional=True, **NOISES["all"]).float())
    x = torch.randn(T, N, I)
    torch.manual_seed(SEED)
    expected = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.manual_seed(SEED)
    torch.testing.assert_close(compiled(x), expected)
    torch.compile(model, fullgraph=True, backend="aot_eager")(x).sum().backward()
    model.eval()
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x))
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x))


def test_onnx_unrolls_zoneout() -> None:
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    model, x = Model(made("lstm", **NOISES["all"]).float()).eval(), torch.randn(T, N, I)
    program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), model(x), rtol=1e-4, atol=1e-5)


def test_repr_conversion_and_trace() -> None:
    layer = made("lstm", **NOISES["all"] | {"zoneout": (0.1, 0.2)})
    assert "recurrent_dropout=0.4, zoneout=(0.1, 0.2)" in repr(layer)
    assert "weight_dropout=0.2" in repr(layer)
    for name, value in NOISES["all"].items():
        if name == "dropout":  # which torch.nn's have
            continue
        layer = made("lstm", **{name: value})
        why = f"has {name}, which torch.nn's have not: set it to 0.0 first"
        assert rnnkit.revert(nn.Sequential(layer)).left == {"0": why}
        with pytest.raises(RuntimeError, match=f"has {name}"):
            torch.jit.trace(lambda x, layer=layer: layer(x)[0], torch.randn(T, N, I).double())


def test_an_option_of_a_subclass_or_of_an_old_pickle() -> None:
    class Zoned(rnnkit.LSTM):
        zoneout = 0.5

    x = torch.randn(T, N, I)
    layer = Zoned(I, H).eval()
    found = layer(x)[0]
    layer.zoneout = 0.5
    torch.testing.assert_close(found, layer(x)[0], rtol=0, atol=0)
    old = rnnkit.LSTM(I, H).eval()
    old.load_state_dict(layer.state_dict())
    vars(old)["zoneout"] = 0.5
    torch.testing.assert_close(old(x)[0], found, rtol=0, atol=0)


def test_zoneout_of_zeros_is_none() -> None:
    layer, given = rnnkit.LSTM(I, H, zoneout=(0, 0.0)), [0.1, 0.2]
    assert "zoneout" not in repr(layer) and not rnnkit.revert(nn.Sequential(layer)).left
    layer = rnnkit.LSTM(I, H, zoneout=given)
    given[0] = 2
    assert layer.zoneout == (0.1, 0.2)
    assert rnnkit.LSTM(I, H, weight_dropout=np.float32(0.25)).weight_dropout == 0.25


def test_a_trace_of_what_drops_nothing() -> None:
    layer = made("lstm", weight_dropout=0.3, recurrent_dropout=0.2).eval().requires_grad_(False)
    x = torch.randn(T, N, I).double()
    traced = torch.jit.trace(lambda x: layer(x)[0], x)
    torch.testing.assert_close(traced(x), layer(x)[0])
    layer.train()
    with pytest.raises(RuntimeError, match="has weight_dropout"):
        torch.jit.trace(lambda x: layer(x)[0], x)


def test_errors() -> None:
    for name in ("weight_dropout", "recurrent_dropout", "zoneout"):
        pairs = [(0.1, 0.2)] * (name != "zoneout")
        for value in (-0.1, 1.5, "a", True, None, *pairs):
            with pytest.raises(ValueError, match=f"expected {name} to be a number from 0 to 1"):
                rnnkit.LSTM(I, H, **{name: value})
        layer = rnnkit.GRU(I, H)
        setattr(layer, name, 2)
        with pytest.raises(ValueError, match=f"expected {name} to be a number from 0 to 1, got 2"):
            layer(torch.randn(T, N, I))
    with pytest.raises(ValueError, match=r"expected zoneout to be a number, got \(0.1, 0.2\)"):
        rnnkit.GRU(I, H, zoneout=(0.1, 0.2))
    with pytest.raises(
        ValueError, match=r"expected zoneout to be a number or a pair, got \(0.1,\)"
    ):
        rnnkit.LSTM(I, H, zoneout=(0.1,))
    with pytest.raises(
        ValueError, match=r"expected zoneout to be \(0, p\) with proj_size, got 0.1"
    ):
        rnnkit.LSTM(I, H, proj_size=2, zoneout=0.1)
    with pytest.raises(ValueError, match=r"expected zoneout to be a number from 0 to 1, got 1\.5"):
        rnnkit.LSTM(I, H, zoneout=(0.1, 1.5))


def test_coins_do_not_depend_on_the_default_dtype() -> None:
    found = []
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            torch.manual_seed(SEED)
            found.append(noise.coins(0.001, 2000, 8, torch.device("cpu")))
        finally:
            torch.set_default_dtype(torch.float32)
    assert found[0].equal(found[1]) and found[0].equal(found[2])

"""`lengths=`: padded batches in any order, against each sequence alone."""

from typing import Any

import pytest
import torch
from configurations import LAYERS
from torch import Tensor, nn

import rnnkit

T, N, I, H = 7, 5, 3, 4  # noqa: E741
LENGTHS = [2, 7, 5, 1, 3]


def made(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    cls, own = LAYERS[name]
    return getattr(rnnkit, cls)(I, H, 2, **own, **options).double()


def alone(layer: Any, x: Tensor, hx: Any, reset: Tensor | None = None) -> tuple[Tensor, list]:
    """Output [T, N, D*H], zeros behind the ends, and final states, from one call for each sequence."""
    outputs, finals = [], []
    for n, length in enumerate(LENGTHS):
        own = tuple(s[:, n] for s in hx) if isinstance(hx, tuple) else hx[:, n]
        options = {} if reset is None else {"reset": reset[:length, n]}
        y, states = layer(x[:length, n], own, **options)
        outputs.append(nn.functional.pad(y, (0, 0, 0, T - length)))
        finals.append(states if isinstance(states, tuple) else (states,))
    return torch.stack(outputs, 1), [torch.stack(of, 1) for of in zip(*finals, strict=True)]


@pytest.mark.parametrize("with_reset", [False, True], ids=["", "reset"])
@pytest.mark.parametrize("batch_first", [False, True], ids=["", "batch_first"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one", "two"])
@pytest.mark.parametrize("name", LAYERS)
def test_each_sequence_alone(
    name: str, bidirectional: bool, batch_first: bool, with_reset: bool
) -> None:
    layer = made(name, bidirectional=bidirectional)
    x = torch.randn(T, N, I, dtype=torch.float64, requires_grad=True)
    rows = 4 if bidirectional else 2
    states = [torch.randn(rows, N, H, dtype=torch.float64) for _ in range(1 + (name == "lstm"))]
    hx = tuple(states) if len(states) > 1 else states[0]
    reset = torch.rand(T, N) < 0.3 if with_reset else None
    expected, finals = alone(layer, x, hx, reset)
    layer.batch_first = batch_first
    given = x.transpose(0, 1) if batch_first else x
    options: dict[str, Any] = {}
    if reset is not None:
        options["reset"] = reset.t() if batch_first else reset
    found, new = layer(given, hx, lengths=LENGTHS, **options)
    found = found.transpose(0, 1) if batch_first else found
    new = list(new) if isinstance(new, tuple) else [new]
    torch.testing.assert_close([found, *new], [expected, *finals], rtol=1e-12, atol=1e-12)
    grads = [torch.randn_like(t) for t in (expected, *finals)]
    wanted = [x, *layer.parameters()]
    mine = torch.autograd.grad([found, *new], wanted, grads)
    right = torch.autograd.grad([expected, *finals], wanted, grads)
    torch.testing.assert_close(mine, right, rtol=1e-10, atol=1e-11)
    for n, length in enumerate(LENGTHS):
        assert not mine[0][length:, n].any()


def test_padding_may_be_anything() -> None:
    layer = made("gru", bidirectional=True)
    x = torch.randn(T, N, I).double()
    expected = layer(x, lengths=LENGTHS)[0]
    for n, length in enumerate(LENGTHS):
        x[length:, n] = torch.nan
    torch.testing.assert_close(layer(x, lengths=LENGTHS)[0], expected)


def test_the_ways_to_give_lengths() -> None:
    layer, x = made("lstm"), torch.randn(T, N, I).double()
    expected = layer(x, lengths=LENGTHS)[0]
    for dtype in (torch.int64, torch.int32, torch.uint8):
        assert torch.equal(layer(x, lengths=torch.tensor(LENGTHS, dtype=dtype))[0], expected)
    short = [2, 4, 3, 1, 1]  # shorter than T, all of them
    output = layer(x, lengths=short)[0]
    assert output.shape == expected.shape and not output[4:].any()


def test_compile_and_export() -> None:
    layer = made("gru", bidirectional=True).float()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            return self.layer(x, lengths=lengths)[0]

    model, x, lengths = Model(), torch.randn(T, N, I), torch.tensor(LENGTHS)
    expected = model(x, lengths)
    program = torch.export.export(model, (x, lengths))
    torch.testing.assert_close(program.module()(x, lengths), expected)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, lengths), expected)
    graph = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(graph(x, lengths), expected)


def test_errors() -> None:
    layer, x = made("gru").float(), torch.randn(T, N, I)
    for dtype in (torch.float32, torch.bool, torch.complex64):
        with pytest.raises(TypeError, match=f"expected lengths to be integers, got {dtype}"):
            layer(x, lengths=torch.ones(N, dtype=dtype))
    with pytest.raises(RuntimeError, match=r"N of the input, got \(5, 1\)"):
        layer(x, lengths=torch.ones(N, 1, dtype=torch.int64))
    with pytest.raises(
        RuntimeError, match=r"expected lengths of shape \(5,\), N of the input, got \(4,\)"
    ):
        layer(x, lengths=[1, 2, 3, 4])
    for wrong in (0, -1, T + 1):
        with pytest.raises(
            RuntimeError, match=r"expected lengths from 1 to T = 7, got \[1, 2, 3, 4"
        ):
            layer(x, lengths=[1, 2, 3, 4, wrong])
    with pytest.raises(ValueError, match="expected a batched input, 3D, with lengths, got 2D"):
        layer(x[:, 0], lengths=[1])
    packed = nn.utils.rnn.pack_padded_sequence(x, LENGTHS, enforce_sorted=False)
    with pytest.raises(TypeError, match="got a PackedSequence, which has its own"):
        layer(packed, lengths=LENGTHS)

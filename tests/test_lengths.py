"""`lengths=`: padded batches in any order, against each sequence alone."""

from typing import Any

import pytest
import torch
from configurations import LAYERS
from torch import Tensor, nn

import rnnkit
from rnnkit.packing import Packing

T, N, I, H = 7, 5, 3, 4  # noqa: E741
LENGTHS = [2, 7, 5, 1, 3]
#: Of each kind: in any order, sorted, equal, and shorter than T, some of them equal.
KINDS = {"any": LENGTHS, "sorted": [7, 6, 3, 3, 1], "all": [T] * N, "short": [2, 4, 4, 1, 1]}


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


@pytest.mark.parametrize("batch_first", [False, True], ids=["", "batch_first"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_the_bits_of_torchs_packing(name: str, kind: str, batch_first: bool) -> None:
    """Outputs, all states, final states and gradients."""
    layer = made(name, batch_first=batch_first).float()
    x = torch.randn(*((N, T) if batch_first else (T, N)), I, requires_grad=True)
    states = [torch.randn(2, N, H, requires_grad=True) for _ in range(1 + (name == "lstm"))]
    hx = tuple(states) if len(states) > 1 else states[0]
    found = layer(x, hx, lengths=KINDS[kind], all_states=True)
    packed = nn.utils.rnn.pack_padded_sequence(x, KINDS[kind], batch_first, enforce_sorted=False)
    output, finals, every = layer(packed, hx, all_states=True)

    def padded(rows: Any) -> Tensor:
        return nn.utils.rnn.pad_packed_sequence(rows, batch_first, total_length=T)[0]

    def listed(given: Any) -> list:
        return list(given) if isinstance(given, tuple) and not hasattr(given, "data") else [given]

    mine = [found[0], *listed(found[1]), *listed(found[2])]
    right = [padded(output), *listed(finals), *map(padded, listed(every))]
    torch.testing.assert_close(mine, right, rtol=0, atol=0)
    grads = [torch.randn_like(result) for result in right]
    wanted = [x, *states, *layer.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(mine, wanted, grads),
        torch.autograd.grad(right, wanted, grads),
        rtol=0,
        atol=0,
    )


@pytest.mark.parametrize("batch_first", [False, True], ids=["", "batch_first"])
@pytest.mark.parametrize("kind", KINDS)
def test_packing_and_its_derivatives(kind: str, batch_first: bool) -> None:
    lengths = torch.tensor(KINDS[kind])
    packing = Packing.of(lengths, T, batch_first, lengths.device)
    shape = (N, T) if batch_first else (T, N)
    places = torch.arange(T * N).view(shape)
    expected = nn.utils.rnn.pack_padded_sequence(places, lengths, batch_first, enforce_sorted=False)
    packed = packing.packed(places)
    assert torch.equal(packed.data, expected.data)
    assert torch.equal(packed.batch_sizes, expected.batch_sizes)
    assert (packed.sorted_indices is None) == (kind in ("sorted", "all"))
    if packed.sorted_indices is not None:
        assert torch.equal(packed.sorted_indices, expected.sorted_indices)
        assert torch.equal(packed.unsorted_indices, expected.unsorted_indices)

    def pack(x: Tensor) -> Tensor:
        return packing.packed(x).data

    def pad(rows: Tensor) -> Tensor:
        return packing.padded(nn.utils.rnn.PackedSequence(rows, packed.batch_sizes))

    padded = torch.randn(*shape, 2, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(len(packed.data), 2, dtype=torch.float64, requires_grad=True)
    ended = torch.arange(T) >= lengths.unsqueeze(1)  # [N, T]
    ended = ended if batch_first else ended.t()
    assert torch.equal(pad(pack(padded)), padded.masked_fill(ended.unsqueeze(-1), 0))
    assert torch.equal(pack(pad(rows)), rows)
    for run, given in ((pack, padded), (pad, rows)):
        assert torch.autograd.gradcheck(
            run, (given,), check_forward_ad=True, check_batched_grad=True
        )
        assert torch.autograd.gradgradcheck(run, (given,), check_fwd_over_rev=True)
        two = torch.stack([given, -given])
        assert torch.equal(torch.func.vmap(run)(two), torch.stack([run(given), run(-given)]))


def test_transforms() -> None:
    """Double backward, forward mode and vmap of a whole call."""
    layer = made("gru", bidirectional=True)
    x = torch.randn(T, N, I, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        return layer(x, lengths=LENGTHS)[0]

    direction = torch.randn_like(x)
    found, tangent = torch.func.jvp(run, (x,), (direction,))
    torch.testing.assert_close(found, run(x))
    step = 1e-6 * direction
    torch.testing.assert_close(
        tangent, (run(x + step) - run(x - step)) / 2e-6, rtol=1e-5, atol=1e-8
    )
    two = torch.stack([x, -x])
    torch.testing.assert_close(torch.func.vmap(run)(two), torch.stack([run(x), run(-x)]))
    slope = torch.autograd.grad(run(x).square().sum(), x, create_graph=True)[0]
    curved = torch.autograd.grad((slope * direction).sum(), x)[0]
    expected = torch.func.jvp(torch.func.grad(lambda x: run(x).square().sum()), (x,), (direction,))[
        1
    ]
    torch.testing.assert_close(curved, expected)


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


def test_no_sequences() -> None:
    layer = made("lstm", bidirectional=True)
    lengths = torch.tensor([], dtype=torch.int64)
    output, (h_n, c_n) = layer(torch.randn(T, 0, I).double(), lengths=lengths)
    assert output.shape == (T, 0, 2 * H) and h_n.shape == c_n.shape == (4, 0, H)

"""pack_padded_sequence and pad_packed_sequence: torch's own, and in graphs what torch's cannot be."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import rnn
from torch.testing import assert_close

import rnnkit

Inputs = tuple[Tensor, Tensor]


@pytest.fixture(autouse=True)
def dynamic_output_shapes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch.compiler.reset()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        yield


class Encoder(nn.Module):
    """From padded sequences to padded outputs, with the functions of `package`."""

    def __init__(self, package: Any, layer: nn.Module, **options: Any) -> None:
        super().__init__()
        self.package, self.layer = package, layer
        self.batch_first: bool = options.pop("batch_first", False)
        self.sorted: bool = options.pop("sorted", False)
        self.options = options

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
        packed = self.package.pack_padded_sequence(x, lengths, self.batch_first, self.sorted)
        output, state = self.layer(packed)
        padded = self.package.pad_packed_sequence(output, self.batch_first, **self.options)
        return (*padded, *(state if isinstance(state, tuple) else (state,)))


def one_graph(model: nn.Module, inputs: Inputs) -> Callable[..., Any]:
    return torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)


def exported(strict: bool) -> Callable[[nn.Module, Inputs], Callable[..., Any]]:
    def export(model: nn.Module, inputs: Inputs) -> Callable[..., Any]:
        steps, batch = (torch.export.Dim(name, min=2, max=64) for name in ("steps", "batch"))
        sizes = {model.batch_first: steps, not model.batch_first: batch}
        shapes = ({int(dim): size for dim, size in sizes.items()}, {0: batch})
        return torch.export.export(model, inputs, dynamic_shapes=shapes, strict=strict).module()

    return export


GRAPHS = {"compile": one_graph, "export": exported(strict=False), "strict": exported(strict=True)}


def inputs_of(lengths: list[int], steps: int, batch_first: bool = False) -> Inputs:
    x = torch.randn(steps, len(lengths), 11)
    return x.transpose(0, 1) if batch_first else x, torch.tensor(lengths)


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize(
    ("layer", "options"),
    [
        ("LSTM", {}),
        ("GRU", {"batch_first": True, "padding_value": -1.5}),
        ("RNN", {"sorted": True, "total_length": 9}),
    ],
    ids=str,
)
def test_one_graph_for_all_lengths(layer: str, options: dict[str, Any], graph: str) -> None:
    torch.manual_seed(0)
    own = getattr(rnnkit, layer)(11, 4, bidirectional=True).eval()
    model, expected = (Encoder(package, own, **options) for package in (rnnkit, rnn))
    first = options.get("batch_first", False)
    in_graph = GRAPHS[graph](model, inputs_of([5, 3, 1], 5, first))
    for lengths, steps in (([5, 3, 1], 5), ([4, 4, 2, 1], 6), ([7, 6], 9)):
        given = inputs_of(lengths, steps, first)
        with torch.compiler.set_stance("fail_on_recompile" if steps > 5 else "default"):
            assert_close(in_graph(*given), expected(*given))
        assert_close(model(*given), expected(*given), rtol=0, atol=0)


def test_sequences_in_any_order() -> None:
    model, expected = (Encoder(package, rnnkit.GRU(11, 4)) for package in (rnnkit, rnn))
    expected.layer = model.layer
    for lengths in ([1, 5, 3], [2, 2, 2], [4, 5, 5]):
        given = inputs_of(lengths, 5)
        assert_close(one_graph(model, given)(*given), expected(*given))


def test_gradients_in_one_graph() -> None:
    model = Encoder(rnnkit, rnnkit.LSTM(11, 4))
    found = []
    for call in (one_graph(model, inputs_of([2], 2)), model):
        torch.manual_seed(0)
        x, lengths = inputs_of([2, 5, 3], 5)
        x.requires_grad_()
        call(x, lengths)[0].square().sum().backward()
        found.append([x.grad, *(weight.grad.clone() for weight in model.parameters())])
        model.zero_grad()
    assert_close(*found)


@pytest.mark.parametrize(
    ("options", "lengths", "message"),
    [
        ({"sorted": True}, [2, 5, 3], "expected lengths to be sorted in decreasing order"),
        ({}, [0, 5, 3], "expected lengths to be from 1 to T"),
        ({}, [6, 5, 3], "expected lengths to be from 1 to T"),
        ({"total_length": 4}, [5, 3], "<= 4"),
    ],
)
def test_what_does_not_fit_is_told_by_the_graph(
    options: dict[str, Any], lengths: list[int], message: str
) -> None:
    model = Encoder(rnnkit, rnnkit.GRU(11, 4), **options)
    given = inputs_of(lengths, 5)
    with pytest.raises(RuntimeError, match=message):
        one_graph(model, given)(*given)


def test_lengths_as_a_list() -> None:
    x, lengths = inputs_of([2, 5, 3], 5)
    ours, theirs = (
        package.pack_padded_sequence(x, lengths.tolist(), enforce_sorted=False)
        for package in (rnnkit, rnn)
    )
    for own, other in zip(ours, theirs, strict=True):
        assert torch.equal(own, other)


def test_whole_numbers_stay_whole_numbers() -> None:
    def there_and_back(x: Tensor, lengths: Tensor) -> Tensor:
        packed = rnnkit.pack_padded_sequence(x, lengths, enforce_sorted=False)
        return rnnkit.pad_packed_sequence(packed, padding_value=-1)[0]

    tokens, lengths = torch.arange(10).view(5, 2), torch.tensor([3, 5])
    found = torch.compile(there_and_back, fullgraph=True, backend="aot_eager")(tokens, lengths)
    assert_close(found, there_and_back(tokens, lengths))


@pytest.mark.parametrize(
    ("lengths", "message"),
    [([[3, 5]], r"expected lengths of shape \[N\]"), ([5, 3, 1], "Expected cond to be True")],
)
def test_lengths_of_another_shape(lengths: Any, message: str) -> None:
    pack = torch.compile(rnnkit.pack_padded_sequence, fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match=message):
        pack(torch.ones(5, 2, 3), torch.tensor(lengths))


def test_states_of_another_batch_are_told_by_an_exported_program() -> None:
    class WithStates(Encoder):
        def forward(self, x: Tensor, lengths: Tensor, hx: Tensor) -> Tensor:
            packed = rnnkit.pack_padded_sequence(x, lengths, enforce_sorted=False)
            return rnnkit.pad_packed_sequence(self.layer(packed, hx)[0])[0]

    model = WithStates(rnnkit, rnnkit.GRU(11, 4, bidirectional=True)).eval()
    steps, batch, other = (torch.export.Dim(n, min=2, max=64) for n in ("steps", "batch", "other"))
    given = (*inputs_of([2, 5, 3], 5), torch.randn(2, 3, 4))
    program = torch.export.export(
        model, given, dynamic_shapes=({0: steps, 1: batch}, {0: batch}, {1: other}), strict=False
    ).module()
    assert_close(program(*given), model(*given))
    for wrong in (2, 6):
        with pytest.raises(RuntimeError, match="expected hx to have the batch of the input"):
            program(*given[:2], torch.randn(2, wrong, 4))

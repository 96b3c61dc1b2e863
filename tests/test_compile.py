"""torch.compile and torch.export: the whole graph, and the numbers of the eager call."""

from typing import Any

import pytest
import torch
from kernel_cases import assert_same_bits
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnnkit

LAYERS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "rnn_tanh": (rnnkit.RNN, {}),
    "rnn_relu": (rnnkit.RNN, {"nonlinearity": "relu"}),
    "lstm": (rnnkit.LSTM, {}),
    "gru": (rnnkit.GRU, {}),
    "lstm-deep": (rnnkit.LSTM, {"num_layers": 2, "bidirectional": True, "proj_size": 3}),
    "gru-batch_first": (rnnkit.GRU, {"batch_first": True, "bias": False}),
}
CELLS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "rnn_cell": (rnnkit.RNNCell, {}),
    "lstm_cell": (rnnkit.LSTMCell, {}),
    "gru_cell": (rnnkit.GRUCell, {}),
}

each_layer = pytest.mark.parametrize("name", LAYERS)
each_module = pytest.mark.parametrize("name", LAYERS | CELLS)


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch.compiler.reset()


def module(name: str) -> nn.Module:
    """Input size 5, hidden size 4."""
    kind, options = (LAYERS | CELLS)[name]
    return kind(5, 4, **options)


def input_of(name: str, steps: int = 3) -> Tensor:
    return torch.randn((2, 5) if name in CELLS else (steps, 2, 5), requires_grad=True)


def flat(results: Any) -> list[Tensor]:
    if isinstance(results, Tensor):
        return [results]
    return [tensor for result in results for tensor in flat(result)]


def run(call: Any, own: nn.Module, x: Tensor) -> list[Tensor]:
    """Results and gradients."""
    results = flat(call(x))
    wanted = [x, *own.parameters()]
    total = sum((index + 1) * result.square().sum() for index, result in enumerate(results))
    return [*results, *torch.autograd.grad(total, wanted)]


@pytest.mark.parametrize("compiler", ("eager", "aot_eager"))
@each_module
def test_training(name: str, compiler: str, backend: str) -> None:
    own = module(name)
    x = input_of(name)
    compiled = torch.compile(own, fullgraph=True, backend=compiler)
    torch.testing.assert_close(run(compiled, own, x), run(own, own, x))


@each_module
def test_inference(name: str, backend: str) -> None:
    own = module(name).eval()
    x = input_of(name).detach()
    with torch.no_grad():
        compiled = torch.compile(own, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(flat(compiled(x)), flat(own(x)))


@each_layer
def test_initial_states(name: str, backend: str) -> None:
    own = module(name)
    x = input_of(name)
    states = flat(own(x))[1:]
    hx = tuple(states) if len(states) > 1 else states[0]
    compiled = torch.compile(own, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(flat(compiled(x, hx)), flat(own(x, hx)))


@each_layer
def test_other_lengths(name: str, backend: str) -> None:
    """Sequences of other lengths give their own results, not those of the length that was traced."""
    own = module(name)
    compiled = torch.compile(own, fullgraph=True, backend="aot_eager")
    for steps in (3, 4, 7, 1):
        x = input_of(name, steps)
        torch.testing.assert_close(run(compiled, own, x), run(own, own, x))


def test_the_op_is_one_node_for_any_length() -> None:
    """The scan is not unrolled, and a third length compiles nothing anew."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    with rnnkit.backend("cpp"):
        compiled = torch.compile(module("gru"), fullgraph=True, backend=keep)
        with torch.no_grad():
            for steps in (3, 4, 5, 6, 7):
                compiled(input_of("gru", steps).detach())
    assert len(graphs) <= 2
    assert [str(node.target) for node in graphs[-1].graph.nodes].count("rnnkit.layer_forward") == 1


@each_layer
def test_packed_sequence(name: str, backend: str) -> None:
    own = module(name)
    x = torch.randn(4, 3, 5)
    packed = pack_padded_sequence(x, torch.tensor([4, 2, 1]))

    def output(packed: PackedSequence) -> Tensor:
        return own(packed)[0].data

    compiled = torch.compile(output, backend="aot_eager")
    torch.testing.assert_close(compiled(packed), output(packed))


@each_module
def test_export(name: str, backend: str) -> None:
    own = module(name).eval()
    x = input_of(name).detach()
    program = torch.export.export(own, (x,), strict=False)
    torch.testing.assert_close(flat(program.module()(x)), flat(own(x)))


def test_exported_op_takes_any_length() -> None:
    own = module("lstm").eval()
    length = torch.export.Dim("length", min=2, max=100)
    with rnnkit.backend("cpp"):
        program = torch.export.export(
            own, (input_of("lstm").detach(),), dynamic_shapes=({0: length},), strict=False
        )
        for steps in (2, 9):
            x = input_of("lstm", steps).detach()
            assert_same_bits(flat(program.module()(x)), flat(own(x)))


def test_autocast(backend: str) -> None:
    own = module("gru")
    x = input_of("gru").detach()
    compiled = torch.compile(own, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = flat(compiled(x)), flat(own(x))
    assert [result.dtype for result in found] == [result.dtype for result in expected]
    torch.testing.assert_close(found, expected)


def test_changed_weight_is_used_by_the_next_call(backend: str) -> None:
    own = module("lstm")
    x = input_of("lstm").detach()
    compiled = torch.compile(own, fullgraph=True, backend="aot_eager")
    before = compiled(x)[0]
    for parameter in own.parameters():
        parameter.data.mul_(2)
    assert not torch.equal(compiled(x)[0], before)
    torch.testing.assert_close(compiled(x)[0], own(x)[0])

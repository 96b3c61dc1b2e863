"""torch.compile and torch.export: the whole graph, and the numbers of the eager call."""

from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from kernel_cases import assert_same_bits
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

import rnnkit
from rnnkit import stack

LAYERS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "rnn_tanh": (rnnkit.RNN, {}),
    "rnn_relu": (rnnkit.RNN, {"nonlinearity": "relu"}),
    "lstm": (rnnkit.LSTM, {}),
    "gru": (rnnkit.GRU, {}),
    "lstm-deep": (rnnkit.LSTM, {"num_layers": 2, "bidirectional": True, "proj_size": 3}),
    "gru-batch_first": (rnnkit.GRU, {"batch_first": True, "bias": False}),
    "gru-writes": (rnnkit.GRU, {"update_gate": "writes", "bidirectional": True}),
    "lstm-ruled": (rnnkit.LSTM, {"grad_clip": 0.01, "grad_cut": 2}),
}
CELLS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "rnn_cell": (rnnkit.RNNCell, {}),
    "lstm_cell": (rnnkit.LSTMCell, {}),
    "gru_cell": (rnnkit.GRUCell, {}),
    "gru_cell-writes": (rnnkit.GRUCell, {"update_gate": "writes"}),
}

each_module = pytest.mark.parametrize("name", LAYERS | CELLS)


def compiled(own: nn.Module, compiler: Any = "aot_eager") -> Any:
    return torch.compile(own, fullgraph=True, backend=compiler)


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


@each_module
def test_training(device: str, name: str) -> None:
    own = module(name).to(device)
    x = input_of(name).detach().to(device).requires_grad_()
    torch.testing.assert_close(run(compiled(own), own, x), run(own, own, x))


@each_module
def test_inference(device: str, name: str) -> None:
    own = module(name).eval().to(device)
    x = input_of(name).detach().to(device)
    with torch.no_grad():
        torch.testing.assert_close(flat(compiled(own)(x)), flat(own(x)))


@pytest.mark.parametrize("name", ("gru", "lstm_cell"))
def test_on_each_backend(name: str, backend: str) -> None:
    own = module(name)
    x = input_of(name)
    for compiler in ("eager", "aot_eager"):
        torch.testing.assert_close(run(compiled(own, compiler), own, x), run(own, own, x))


@pytest.mark.parametrize("name", ("lstm", "gru-batch_first"))
def test_initial_states(name: str) -> None:
    own = module(name)
    x = input_of(name)
    states = flat(own(x))[1:]
    hx = tuple(states) if len(states) > 1 else states[0]
    torch.testing.assert_close(flat(compiled(own)(x, hx)), flat(own(x, hx)))


def test_a_new_rule_for_gradients_holds_from_the_next_call() -> None:
    """A graph has `grad_clip` and `grad_cut` as constants, and is compiled again if they change."""
    own = module("lstm")
    x = input_of("lstm", 5)
    faster = compiled(own)
    seen: list[list[Tensor]] = []
    for rule in ((None, None), (0.01, None), (0.05, None), (None, 2), (None, 3), (0.01, 3)):
        own.grad_clip, own.grad_cut = rule
        found = run(faster, own, x)
        torch.testing.assert_close(found, run(own, own, x))
        assert not any(torch.allclose(found[3], before[3]) for before in seen), rule
        seen.append(found)
    own.grad_clip = own.grad_cut = None
    with torch.compiler.set_stance("fail_on_recompile"):
        torch.testing.assert_close(run(faster, own, x), seen[0])
    own.grad_clip = -1.0
    with pytest.raises(ValueError, match=r"expected grad_clip to be positive, got -1\.0"):
        torch.compile(own, backend="aot_eager")(x)


@pytest.mark.parametrize("training", (False, True))
@pytest.mark.parametrize("name", ("rnn_tanh", "lstm-deep", "lstm-ruled"))
def test_any_length_in_one_graph(name: str, training: bool) -> None:
    """The scan is not unrolled, and sequences of further lengths compile nothing anew."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    own = module(name).train(training)
    faster = compiled(own, aot_autograd(fw_compiler=keep, bw_compiler=keep))
    for steps in (3, 4, 5, 6, 7):
        x = input_of(name, steps)
        with torch.set_grad_enabled(training):
            if training:
                torch.testing.assert_close(run(faster, own, x), run(own, own, x))
            else:
                torch.testing.assert_close(flat(faster(x)), flat(own(x)))
    assert len(graphs) <= (4 if training else 2)  # for the first length and for any other
    last = [str(node.target) for node in graphs[-1].graph.nodes]
    op = "rnnkit.layer_backward" if training else "rnnkit.layer_forward"
    assert sum(target.startswith(op) for target in last) == own.num_layers


@pytest.mark.parametrize("name", ("lstm", "gru"))
def test_packed_sequence(name: str) -> None:
    own = module(name)
    packed = pack_padded_sequence(torch.randn(4, 3, 5), torch.tensor([4, 2, 1]))

    def output(packed: PackedSequence) -> Tensor:
        return own(packed)[0].data

    found = torch.compile(output, backend="aot_eager")(packed)
    torch.testing.assert_close(found, output(packed))


@each_module
def test_export(name: str) -> None:
    own = module(name).eval()
    x = input_of(name).detach()
    program = torch.export.export(own, (x,), strict=False)
    torch.testing.assert_close(flat(program.module()(x)), flat(own(x)))


def test_exported_layer_takes_any_length() -> None:
    own = module("lstm").eval()
    length = torch.export.Dim("length", min=2, max=100)
    program = torch.export.export(
        own, (input_of("lstm").detach(),), dynamic_shapes=({0: length},), strict=False
    )
    for steps in (2, 9):
        x = input_of("lstm", steps).detach()
        assert_same_bits(flat(program.module()(x)), flat(own(x)))


class UnderAutocast(nn.Module):
    """A layer that a program calls under autocast."""

    def __init__(self, layer: nn.Module, low: torch.dtype) -> None:
        super().__init__()
        self.layer, self.low = layer, low

    def forward(self, x: Tensor, hx: Any) -> Any:
        with torch.autocast("cpu", self.low):
            return self.layer(x, hx)


@pytest.mark.parametrize("gradients", (False, True))
@pytest.mark.parametrize("low", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("name", ("lstm", "gru"))
def test_autocast(name: str, low: torch.dtype, gradients: bool) -> None:
    """Results are of the eager call's dtypes, which what the CPU has of oneDNN may decide."""
    own = UnderAutocast(module(name), low)
    state = torch.randn(1, 2, 4)
    hx = (state, state) if name == "lstm" else state
    for x in (input_of(name).detach(), input_of(name).detach().to(low)):
        with torch.set_grad_enabled(gradients):
            stack._onednn_dtypes.cache_clear()  # the export is to ask
            programs = [
                torch.export.export(own, (x, hx), strict=strict) for strict in (False, True)
            ]
            expected = flat(own(x, hx))
            for call in (compiled(own), *(program.module() for program in programs)):
                found = flat(call(x, hx))
                assert [result.dtype for result in found] == [result.dtype for result in expected]
                torch.testing.assert_close(found, expected)
        assert not any("mkldnn" in str(program) for program in programs)


def test_changed_weight_is_used_by_the_next_call() -> None:
    own = module("lstm")
    x = input_of("lstm").detach()
    faster = compiled(own)
    before = faster(x)[0]
    for parameter in own.parameters():
        parameter.data.mul_(2)
    assert not torch.equal(faster(x)[0], before)
    torch.testing.assert_close(faster(x)[0], own(x)[0])


@pytest.mark.parametrize("training", (False, True))
@pytest.mark.parametrize("name", ("RNN", "LSTM", "GRU", "GRU with options"))
def test_packed_sequences_in_one_graph(name: str, training: bool) -> None:
    """The batch is known only as the graph runs; other lengths and batches compile nothing anew."""
    torch.manual_seed(0)
    cls, _, options = name.partition(" with ")
    given = {"update_gate": "writes", "grad_clip": 0.05, "grad_cut": 2} if options else {}
    own = getattr(rnnkit, cls)(3, 4, num_layers=2, bidirectional=True, **given)
    one_graph = torch.compile(own, fullgraph=True, backend="aot_eager", dynamic=True)

    def results(call: Any, packed: PackedSequence) -> list[Tensor]:
        with torch.set_grad_enabled(training):
            output, *states = call(packed)
            found = [output.data, *flat(states)]
            if training:
                own.zero_grad()
                sum(result.square().sum() for result in found).backward()
                found += [weight.grad.clone() for weight in own.parameters()]
        return found

    for index, lengths in enumerate(((4, 2, 1), (2, 5, 3, 1), (6, 1))):
        sequences = [torch.randn(length, 3) for length in lengths]
        packed = pack_sequence(sequences, enforce_sorted=False)
        stance = "fail_on_recompile" if index == 2 else "default"
        with torch.compiler.set_stance(stance):
            found = results(one_graph, packed)
        torch.testing.assert_close(found, results(own, packed))

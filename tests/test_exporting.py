"""torch.onnx.export of layers and cells: the standard operators of ONNX, as onnxruntime computes them."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rnnkit
from rnnkit import exporting
from rnnkit.specs import CELLS

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "lstm": ("LSTM", {}),
    "lstm bidirectional, two layers": ("LSTM", {"bidirectional": True, "num_layers": 2}),
    "lstm batch_first, no bias": ("LSTM", {"batch_first": True, "bias": False}),
    "gru": ("GRU", {}),
    "gru bidirectional, batch_first": ("GRU", {"bidirectional": True, "batch_first": True}),
    "gru writes, two layers": ("GRU", {"update_gate": "writes", "num_layers": 2}),
    "gru before": ("GRU", {"reset": "before", "bidirectional": True}),
    "gru before writes": ("GRU", {"reset": "before", "update_gate": "writes", "num_layers": 2}),
    "lstm with a rule for gradients": ("LSTM", {"grad_clip": 0.1, "grad_cut": 2}),
    "rnn": ("RNN", {"bias": False}),
    "rnn_relu bidirectional": ("RNN", {"bidirectional": True, "nonlinearity": "relu"}),
}
CELL_MODULES = {"lstm": "LSTMCell", "gru": "GRUCell", "rnn": "RNNCell"}


def exported(model: nn.Module, arguments: tuple, path: Path, **options: Any) -> list[str]:
    """Writes the model; the operators in it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, arguments, path, dynamo=True, verbose=False, **options)
    model_proto = onnx.load(path)
    onnx.checker.check_model(model_proto)
    return [node.op_type for node in model_proto.graph.node]


def flat(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    return [tensor for value in values for tensor in flat(value)]


def assert_computes(path: Path, model: nn.Module, *arguments: Any) -> None:
    """onnxruntime's results are the model's."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    given = zip(session.get_inputs(), flat(arguments), strict=True)
    found = session.run(None, {wanted.name: tensor.numpy() for wanted, tensor in given})
    expected = [tensor.detach() for tensor in flat(model(*arguments))]
    actual = [torch.from_numpy(array) for array in found]
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def layer_of(what: str) -> nn.Module:
    torch.manual_seed(0)
    cls, options = LAYERS[what]
    return getattr(rnnkit, cls)(3, 5, **options).eval()


@pytest.mark.parametrize("what", LAYERS)
def test_standard_operator_of_any_length_and_batch(what: str, tmp_path: Path) -> None:
    layer, path = layer_of(what), tmp_path / "layer.onnx"
    sizes = {0: torch.export.Dim("first", min=2, max=64), 1: torch.export.Dim("second", min=2)}
    operators = exported(layer, (torch.randn(4, 2, 3),), path, dynamic_shapes=(sizes,))
    name = exporting.OPERATORS[layer.mode.lower()][0]
    assert operators.count(name) == layer.num_layers
    for shape in ((4, 2), (7, 6), (2, 9)):
        assert_computes(path, layer, torch.randn(*shape, 3))


@pytest.mark.parametrize("what", LAYERS)
def test_initial_states(what: str, tmp_path: Path) -> None:
    layer, path = layer_of(what), tmp_path / "layer.onnx"
    x = torch.randn(4, 2, 3)
    batch = x.size(0 if layer.batch_first else 1)
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    h = torch.randn(count, batch, 5)
    hx = (h, torch.randn(count, batch, 5)) if layer.mode == "LSTM" else h
    exported(layer, (x, hx), path)
    assert_computes(path, layer, x, hx)


class Encoder(nn.Module):
    """Padded sequences and their lengths -> padded outputs and final states."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, lengths: Tensor, hx: Any = None) -> tuple[Tensor, Any]:
        first = self.layer.batch_first
        packed = rnnkit.pack_padded_sequence(x, lengths, first, enforce_sorted=False)
        output, final = self.layer(packed, hx)
        return rnnkit.pad_packed_sequence(output, first)[0], final


@pytest.mark.parametrize(
    ("what", "states"),
    [
        ("lstm", False),
        ("lstm bidirectional, two layers", True),
        ("gru bidirectional, batch_first", True),
        ("gru writes, two layers", True),
        ("gru before", True),
        ("rnn_relu bidirectional", False),
    ],
)
def test_lengths(what: str, states: bool, tmp_path: Path) -> None:
    """They become the operator's `sequence_lens`, for any lengths, T and N."""
    model, path = Encoder(layer_of(what)).eval(), tmp_path / "encoder.onnx"
    layer = model.layer
    count = layer.num_layers * (2 if layer.bidirectional else 1)

    def arguments(steps: int, lengths: list[int]) -> tuple[Any, ...]:
        x = torch.randn(steps, len(lengths), 3)
        given = (x.transpose(0, 1) if layer.batch_first else x, torch.tensor(lengths))
        h, c = torch.randn(2, count, len(lengths), 5)
        return (*given, (h, c) if layer.mode == "LSTM" else h) if states else given

    steps, batch = (torch.export.Dim(name, min=2, max=64) for name in ("steps", "batch"))
    of_x = {0: batch, 1: steps} if layer.batch_first else {0: steps, 1: batch}
    of_states = ({1: batch}, {1: batch}) if layer.mode == "LSTM" else {1: batch}
    shapes = (of_x, {0: batch}, *([of_states] if states else []))
    operators = exported(model, arguments(5, [5, 2, 4]), path, dynamic_shapes=shapes)
    assert operators.count(exporting.OPERATORS[layer.mode.lower()][0]) == layer.num_layers
    for given in (arguments(5, [5, 2, 4]), arguments(7, [3, 6, 1, 2]), arguments(4, [4, 4])):
        assert_computes(path, model, *given)


@pytest.mark.parametrize("cell", [*CELL_MODULES, "gru_writes"])
def test_cells(cell: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    options = {"update_gate": "writes"} if cell == "gru_writes" else {}
    cls = getattr(rnnkit, CELL_MODULES[cell.partition("_")[0]])
    module, path = cls(3, 5, **options).eval(), tmp_path / "cell.onnx"
    x, h = torch.randn(2, 3), torch.randn(2, 5)
    hx = (h, torch.randn(2, 5)) if cell == "lstm" else h
    exported(module, (x, hx), path)
    assert_computes(path, module, x, hx)


@pytest.mark.parametrize("head", [nn.Linear, rnnkit.Readout])
def test_a_whole_model(head: type[nn.Module], tmp_path: Path) -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(11, 3)
            self.layer = rnnkit.LSTM(3, 5, bidirectional=True, batch_first=True)
            self.head = head(10, 7)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.layer(self.embedding(tokens))[0])

    model, path = Tagger().eval(), tmp_path / "model.onnx"
    tokens = torch.arange(8).view(2, 4)
    exported(model, (tokens,), path)
    assert_computes(path, model, tokens)


def test_what_onnx_has_no_operator_for(tmp_path: Path) -> None:
    """A projection: step by step, for the length of the export."""
    layer, path = rnnkit.LSTM(3, 5, proj_size=2, bidirectional=True).eval(), tmp_path / "layer.onnx"
    operators = exported(layer, (torch.randn(4, 2, 3),), path)
    assert "LSTM" not in operators
    assert_computes(path, layer, torch.randn(4, 2, 3))


class WithReset(nn.Module):
    """(x, reset) -> every state of an LSTM after each step."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = rnnkit.LSTM(3, 5, bidirectional=True, learn_initial_state=True)

    def forward(self, x: Tensor, reset: Tensor | None = None) -> Any:
        if reset is None:
            return self.layer(x, all_states=True)[2]
        return self.layer(x, reset=reset)[0]


@pytest.mark.parametrize("resets", [False, True], ids=["all_states", "reset"])
def test_calls_that_onnx_has_no_operator_for(resets: bool, tmp_path: Path) -> None:
    model, path = WithReset().eval(), tmp_path / "layer.onnx"
    nn.init.normal_(model.layer.h_0)
    arguments = (torch.randn(4, 2, 3), *[torch.rand(4, 2) < 0.5] * resets)
    assert "LSTM" not in exported(model, arguments, path)
    assert_computes(path, model, *arguments)


def test_after_an_export_kernels_run_again(tmp_path: Path) -> None:
    layer, x = layer_of("gru"), torch.randn(4, 2, 3)
    before = layer(x)[0]
    exported(layer, (x,), tmp_path / "layer.onnx")
    torch.testing.assert_close(layer(x)[0], before, rtol=0, atol=0)


def test_operators_are_of_cells_there_are() -> None:
    assert exporting.OPERATORS.keys() <= CELLS.keys()

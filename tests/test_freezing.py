"""rnnkit.freeze: packed once, the same results, and what may and may not be done afterwards."""

import copy
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from configurations import LAYERS, Case, named_results
from devices import on_each_device
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import rnnkit
from rnnkit import backends, ops
from rnnkit.call import Keep, LayerCall

CASES = [
    Case(name, hx=hx, **options)
    for name in LAYERS
    for hx in (True, False)
    for options in (
        {},
        {"num_layers": 2, "bidirectional": True, "batch_first": True},
        {"lengths": (2, 5, 4)},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float64, "bias": False},
    )
] + [Case("lstm", hx=True, proj_size=2), Case("lstm", hx=True, proj_size=2, lengths=(2, 5, 4))]


class _Packings(TorchDispatchMode):
    """Counts calls that pack weights."""

    count = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        self.count += op._opname == "pack_weights"
        return op(*args, **(kwargs or {}))


def frozen(**options: Any) -> rnnkit.GRU:
    return rnnkit.freeze(rnnkit.GRU(5, 20, **options))


@pytest.mark.parametrize("case", on_each_device(CASES), ids=str)
def test_results_are_those_of_the_layer(backend: str, case: Case) -> None:
    layer, _ = case.twins()
    with torch.no_grad():
        arguments = case.arguments(case.leaves())
        expected = named_results(case, layer.eval()(*arguments))
        actual = named_results(case, rnnkit.freeze(layer)(*arguments))
    for name, result in expected.items():
        torch.testing.assert_close(actual[name], result)


@pytest.mark.parametrize("steps", (1, 40))
def test_any_number_of_steps_and_rows(steps: int) -> None:
    layer = rnnkit.LSTM(33, 50)
    again = rnnkit.freeze(copy.deepcopy(layer))
    for rows in (1, 2, 5, 40):
        x = torch.randn(steps, rows, 33)
        with torch.no_grad():
            torch.testing.assert_close(again(x), layer(x))


def test_weights_are_packed_once() -> None:
    with _Packings() as packings:
        layer = frozen(num_layers=2)
        assert packings.count == 2
        with torch.inference_mode():
            for _ in range(3):
                layer(torch.randn(4, 3, 5))
    assert packings.count == 2


def test_repr_and_state_dict() -> None:
    layer = rnnkit.GRU(5, 20)
    names = layer.state_dict().keys()
    assert "frozen" not in repr(layer)
    assert "frozen=True" in repr(rnnkit.freeze(layer))
    assert layer.state_dict().keys() == names


def test_needs_no_gradient_and_no_training() -> None:
    layer = frozen(num_layers=2, dropout=0.5)
    assert not layer.training
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    layer(torch.randn(4, 3, 5))
    with pytest.raises(RuntimeError, match=r"frozen layer to need no gradient"):
        layer(torch.randn(4, 3, 5, requires_grad=True))


def test_loading_and_converting_pack_again() -> None:
    layer, other, x = frozen(), rnnkit.GRU(5, 20), torch.randn(4, 3, 5)
    layer.load_state_dict(other.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(layer(x), other(x))
        layer.double(), other.double()
        torch.testing.assert_close(layer(x.double()), other(x.double()))


@pytest.mark.gpu
def test_moving_packs_again() -> None:
    layer, other, x = frozen(), rnnkit.GRU(5, 20), torch.randn(4, 3, 5)
    with torch.no_grad():
        expected = layer(x)[0]
        torch.testing.assert_close(layer.cuda()(x.cuda())[0].cpu(), expected)
        layer.load_state_dict(other.state_dict())
        torch.testing.assert_close(layer(x.cuda())[0].cpu(), other(x)[0])
        torch.testing.assert_close(layer.cpu()(x), other(x))


def test_copies_are_frozen_and_their_own() -> None:
    layer, x = frozen(), torch.randn(4, 3, 5)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    with torch.no_grad():
        expected = layer(x)
        for copied in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
            assert copied.frozen
            torch.testing.assert_close(copied(x), expected)
        changed = copy.deepcopy(layer)
        changed.load_state_dict(rnnkit.GRU(5, 20).state_dict())
        assert not torch.equal(changed(x)[0], expected[0])
        torch.testing.assert_close(layer(x), expected)


def test_thawed_it_trains() -> None:
    layer = frozen()
    layer.frozen = False
    layer.requires_grad_(True)
    layer(torch.randn(4, 3, 5))[0].sum().backward()
    assert layer.weight_hh_l0.grad is not None


def test_frozen_anew_it_sees_new_weights() -> None:
    layer, x = frozen(), torch.randn(4, 3, 5)
    layer.frozen = False
    layer(x)
    assert not layer._packed
    with torch.no_grad():
        layer.weight_hh_l0.mul_(2)
    expected = layer(x)
    layer.frozen = True
    torch.testing.assert_close(layer(x), expected)


def test_gradients_are_refused_on_every_way(backend: str) -> None:
    layer, x = frozen(), torch.randn(4, 3, 5, requires_grad=True)
    for autocast in (False, True):
        with (
            torch.autocast("cpu", enabled=autocast),
            pytest.raises(RuntimeError, match=r"frozen layer to need no gradient"),
        ):
            layer(x)


def test_ops() -> None:
    layer = rnnkit.GRU(5, 20)
    weights = layer._weights()[0]
    packed = torch.ops.rnnkit.pack_weights("gru", weights)
    call = LayerCall("gru", torch.randn(4, 3, 5), [torch.randn(1, 3, 20)], weights)
    with torch.no_grad():
        arguments = (*call.arguments, packed, Keep.NOTHING)
        torch.library.opcheck(torch.ops.rnnkit.layer_forward.default, arguments)


@pytest.mark.parametrize("copied", (False, True))
def test_compiled_and_exported(copied: bool) -> None:
    layer, x = frozen(), torch.randn(4, 3, 5)
    layer = copy.deepcopy(layer) if copied else layer
    with torch.no_grad():
        expected = layer(x)
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected)
        torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), expected)


def test_the_layers_of_a_model() -> None:
    model = nn.Sequential(nn.Linear(5, 5), rnnkit.GRU(5, 20))
    assert rnnkit.freeze(model) is model
    assert model[1].frozen
    assert model[0].weight.requires_grad


@pytest.mark.parametrize("module", (nn.Linear(2, 2), nn.LSTM(2, 2), rnnkit.LSTMCell(2, 2)), ids=str)
def test_nothing_to_freeze(module: nn.Module) -> None:
    with pytest.raises(
        ValueError, match=r"expected module to hold an RNN, LSTM or GRU of rnnkit, got"
    ):
        rnnkit.freeze(module)


needs_cpp = pytest.mark.skipif(
    bool(backends.unavailable("cpp")), reason=f"no C++ kernels: {backends.EXTENSION_REASON}"
)


def refuses(layer: rnnkit.GRU | rnnkit.RNN, packed: Tensor) -> None:
    """What was packed for something else is refused, even where it has as many bytes."""
    x = torch.randn(4, 3, layer.input_size)
    call = LayerCall(layer._cell, x, [], layer._weights()[0])
    with pytest.raises(RuntimeError, match=r"expected packed to be \d+ bytes from pack_weights"):
        ops.layer_forward(call, packed, Keep.NOTHING)


@needs_cpp
def test_foreign_packed_weights_are_refused() -> None:
    layer = rnnkit.GRU(5, 20)
    packed = torch.ops.rnnkit.pack_weights("gru", layer._weights()[0])
    assert packed.data_ptr() % 64 == 0
    beyond = torch.cat([packed, packed.new_zeros(64)])
    for wrong in (packed[:-1], packed[64:], beyond, packed.float(), torch.zeros_like(packed)):
        refuses(layer, wrong)


@needs_cpp
def test_weights_packed_for_other_sizes_are_refused() -> None:
    layer = rnnkit.GRU(5, 20)
    packed = torch.ops.rnnkit.pack_weights("gru", rnnkit.GRU(7, 18)._weights()[0])
    assert packed.numel() == torch.ops.rnnkit.pack_weights("gru", layer._weights()[0]).numel()
    refuses(layer, packed)


@needs_cpp
def test_weights_packed_for_another_cell_are_refused() -> None:
    layer = rnnkit.RNN(5, 20)
    refuses(layer, torch.ops.rnnkit.pack_weights("rnn_relu", layer._weights()[0]))


@needs_cpp
def test_weights_packed_for_another_instruction_set_are_refused(tmp_path: Path) -> None:
    if backends.EXTENSION.capability() == "baseline":
        pytest.skip("no kernels for a lesser CPU")
    file = tmp_path / "packed"
    program = f"""
import torch, rnnkit
torch.save(torch.ops.rnnkit.pack_weights("gru", rnnkit.GRU(5, 20)._weights()[0]), {str(file)!r})
"""
    environment = {"ATEN_CPU_CAPABILITY": "default", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", program], env={**os.environ, **environment}, check=True)
    refuses(rnnkit.GRU(5, 20), torch.load(file))

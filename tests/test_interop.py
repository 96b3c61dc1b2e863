"""PyTorch's other tools on layers and cells: torch.fx, TorchScript, quantization, FLOPs, per-sample gradients, ATen."""

import copy
import functools
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from configurations import LAYERS, MODULES
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import rnnkit
from rnnkit import gpu

CELLS = [name for name in MODULES if name not in LAYERS]
STACKS: list[dict[str, Any]] = [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}]
KINDS = [(name, stack) for name in LAYERS for stack in STACKS] + [(name, {}) for name in CELLS]


def make(package: Any, name: str, **options: Any) -> nn.Module:
    """A module of `MODULES`, with the same parameters for either package."""
    torch.manual_seed(0)
    cls, own = MODULES[name]
    return getattr(package, cls)(3, 4, **own, **options)


class Model(nn.Module):
    """A layer or a cell inside of a model that returns a tensor."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        result = self.layer(x)
        return result[0] if isinstance(result, tuple) else result


def x_for(name: str, T: int = 5, N: int = 2) -> Tensor:
    torch.manual_seed(T * N)
    return torch.randn(N, 3) if name in CELLS else torch.randn(T, N, 3)


# torch.fx


@pytest.mark.parametrize("name", MODULES)
def test_fx_refuses_a_subclass_s_own_forward(name: str) -> None:
    """Its node would run what stands before `super().forward` once more."""
    base = type(make(rnnkit, name))

    class Doubled(base):  # type: ignore[misc, valid-type]
        def forward(self, input: Tensor, hx: Any = None) -> Any:
            return super().forward(2 * input, hx)

    model = nn.Sequential(Doubled(3, 4, **MODULES[name][1]))
    with pytest.raises(torch.fx.proxy.TraceError, match="Doubled"):
        torch.fx.symbolic_trace(model)

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module: nn.Module, name: str) -> bool:
            return isinstance(module, Doubled)

    traced = torch.fx.GraphModule(model, Tracer().trace(model))
    assert_close(traced(x_for(name)), model(x_for(name)), rtol=0, atol=0)


@pytest.mark.parametrize("name", MODULES)
def test_fx_makes_a_node_of_a_subclass_without_a_forward(name: str) -> None:
    class Named(type(make(rnnkit, name))):  # type: ignore[misc]
        pass

    model = nn.Sequential(Named(3, 4, **MODULES[name][1]))
    traced = torch.fx.symbolic_trace(model)
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_module", "output"]
    assert_close(traced(x_for(name)), model(x_for(name)), rtol=0, atol=0)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("kind", ["pre", "after"])
def test_fx_refuses_hooks(name: str, kind: str) -> None:
    """The node runs them, too."""
    module = make(rnnkit, name)
    if kind == "pre":
        module.register_forward_pre_hook(lambda module, given: (2 * given[0], *given[1:]))
    else:
        module.register_forward_hook(lambda module, given, result: result)
    with pytest.raises(torch.fx.proxy.TraceError, match="hooks"):
        torch.fx.symbolic_trace(nn.Sequential(module))


@pytest.mark.parametrize("name", MODULES)
def test_fx_takes_pruned_modules(name: str) -> None:
    weight = "weight_hh_l0" if name in LAYERS else "weight_hh"
    model = nn.Sequential(prune.l1_unstructured(make(rnnkit, name), weight, 0.5))
    x = x_for(name)
    assert_close(torch.fx.symbolic_trace(model)(x), model(x), rtol=0, atol=0)


def test_fx_is_not_fooled_by_wraps() -> None:
    class Doubled(rnnkit.GRU):
        @functools.wraps(rnnkit.GRU.forward)
        def forward(self, input: Tensor, hx: Any = None) -> Any:
            return super().forward(2 * input, hx)

    with pytest.raises(torch.fx.proxy.TraceError, match="Doubled"):
        torch.fx.symbolic_trace(nn.Sequential(Doubled(3, 4)))


@pytest.mark.parametrize("name", MODULES)
def test_fx_finds_a_proxy_wherever_it_is(name: str) -> None:
    class Holds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = make(rnnkit, name)
            self.register_buffer("x", x_for(name))

        def forward(self, h: Tensor) -> Any:
            return self.layer(self.x, (h, h) if name.startswith("lstm") else h)

    model, h = Holds(), torch.randn(1, 2, 4) if name in LAYERS else torch.randn(2, 4)
    assert_close(torch.fx.symbolic_trace(model)(h), model(h), rtol=0, atol=0)


@pytest.mark.parametrize("name", LAYERS)
def test_fx_takes_a_packed_sequence(name: str) -> None:
    class Packs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = make(rnnkit, name)

        def forward(self, data: Tensor) -> Any:
            return self.layer(PackedSequence(data, torch.tensor([2, 2, 1])))[0].data

    model, data = Packs(), torch.randn(5, 3)
    assert_close(torch.fx.symbolic_trace(model)(data), model(data), rtol=0, atol=0)


# TorchScript


@pytest.mark.parametrize(("name", "stack"), KINDS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_script_and_trace_hold_torch_s_own_operator(name: str, stack: dict[str, Any]) -> None:
    model, x = Model(make(rnnkit, name, **stack)).eval(), x_for(name)
    other = x_for(name, 9, 6)
    expected = model(other)
    traced = torch.jit.trace(model, x)
    kinds = {node.kind() for node in traced.inlined_graph.nodes()}
    assert not any("rnnkit" in kind for kind in kinds)
    assert_close(traced(other), expected)
    with pytest.warns(UserWarning, match=r"rnnkit\.convert\(model\) afterwards"):
        assert_close(torch.jit.script(copy.deepcopy(model))(other), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_script_tells_what_it_cannot_compile() -> None:
    class Own(rnnkit.GRU):
        pass

    with pytest.raises(RuntimeError, match=r"torch\.jit\.script can compile, got one that .*Own"):
        torch.jit.script(nn.Sequential(Own(3, 4)))


@pytest.mark.parametrize(("name", "stack"), KINDS)
@pytest.mark.filterwarnings("ignore")
def test_the_exporter_of_traces_to_onnx(name: str, stack: dict[str, Any], tmp_path: Any) -> None:
    pytest.importorskip("onnx")
    model, path = Model(make(rnnkit, name, **stack)).eval(), tmp_path / "model.onnx"
    torch.onnx.export(model, (x_for(name),), str(path), dynamo=False)
    assert path.stat().st_size > 0


# Per-sample gradients


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "lstm"])
def test_expanded_weights(name: str) -> None:
    """torch.nn's LSTM has none on the CPU, whose oneDNN kernel ExpandedWeights do not know."""
    found = []
    for package in (nn, rnnkit):
        layer = make(package, name, batch_first=True)
        call = call_for_per_sample_grads(layer, batch_size=5, loss_reduction="sum")
        call(x_for(name))[0].square().sum().backward()
        found.append([weight.grad_sample for weight in layer.parameters()])
    assert_close(*found)


# Quantization


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.filterwarnings("ignore")
def test_quantization_that_would_leave_a_module_as_it_is_warns(name: str) -> None:
    module = make(rnnkit, name)
    model = nn.Sequential(module)
    with pytest.warns(UserWarning, match=r"as it is.*rnnkit\.revert\(model\)"):
        quantized = torch.ao.quantization.quantize_dynamic(model, {nn.LSTM, nn.GRU, nn.RNNCell})
    assert type(quantized[0]) is type(module)
    assert not hasattr(quantized[0], "qconfig")
    with pytest.raises(AttributeError):
        del module.qconfig


@pytest.mark.filterwarnings("ignore")
def test_quantization_after_revert() -> None:
    model = nn.Sequential(make(rnnkit, "lstm"))
    rnnkit.revert(model)
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.LSTM})
    assert "quantized" in type(quantized[0]).__module__
    assert_close(quantized(x_for("lstm"))[0], model(x_for("lstm"))[0], rtol=0, atol=0.05)


# FLOPs


@pytest.mark.parametrize(("name", "stack"), KINDS)
@pytest.mark.parametrize("input_grad", [False, True])
def test_flops_are_those_that_torch_nn_has(
    name: str, stack: dict[str, Any], input_grad: bool
) -> None:
    """torch.nn's LSTM is one opaque operator, counted as 0: its products are four thirds of the GRU's."""
    found = []
    for package in (nn, rnnkit):
        counted = "gru" if package is nn and name == "lstm" else name
        module, x = make(package, counted, **stack), x_for(name).requires_grad_(input_grad)
        with FlopCounterMode(display=False) as forward:
            result = Model(module)(x)
        with FlopCounterMode(display=False) as backward:
            result.sum().backward()
        gates = {"gru": 3, "lstm": 4}.get(counted, 1)
        found.append([n.get_total_flops() / gates for n in (forward, backward)])
    assert found[0] == found[1]
    assert min(found[1]) > 0


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "lstm"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_flops_of_a_packed_sequence(name: str, bidirectional: bool) -> None:
    found = []
    for package in (nn, rnnkit):
        layer, x = make(package, name, bidirectional=bidirectional), torch.randn(9, 3, 3)
        with FlopCounterMode(display=False) as counter:
            output, _ = layer(pack_padded_sequence(x.requires_grad_(), [9, 6, 4]))
            output.data.sum().backward()
        found.append(counter.get_total_flops())
    assert found[0] == found[1]


def test_importing_rnnkit_imports_no_flop_counter() -> None:
    """It imports Triton, where that is installed; the formulas are there once it is imported."""
    code = (
        "import importlib.util, sys, rnnkit; assert 'torch.utils.flop_counter' not in sys.modules; "
        "assert importlib.util.find_spec('torch.utils.flop_counter'); "
        "from torch.utils.flop_counter import flop_registry as known; import torch; "
        "ours = torch.ops.rnnkit; assert ours.layer_forward in known and ours.layer_backward in known"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ATen graphs


@pytest.mark.parametrize(
    ("name", "stack"),
    [(name, stack) for name in LAYERS for stack in [*STACKS, {"bias": False}]]
    + [("lstm", {"proj_size": 2})],
)
@pytest.mark.parametrize("grad", [False, True])
def test_exported_programs_decompose(name: str, stack: dict[str, Any], grad: bool) -> None:
    model, x = Model(make(rnnkit, name, **stack)).eval(), x_for(name)
    with torch.set_grad_enabled(grad):
        program = torch.export.export(model, (x,))
    default = torch.export.default_decompositions()
    steps = {**default, **rnnkit.decompositions()}
    aten = getattr(torch.ops.aten, name)
    whole = {op: how for op, how in steps.items() if op is not aten.input}
    for table, expects in ((steps, False), (whole, True)):
        decomposed = program.run_decompositions(table)
        ops = {node.target for node in decomposed.graph.nodes if node.op == "call_function"}
        assert not any("rnnkit" in str(op) for op in ops)
        assert (aten.input in ops) == expects
        assert_close(decomposed.module()(x), model(x))


@pytest.mark.parametrize(
    ("options", "call", "text"),
    [
        ({}, {"all_states": True}, "for h alone"),
        ({}, {"reset": torch.ones(3, 2)}, "without reset"),
        ({"zoneout": 0.1}, {}, "without recurrent dropout and zoneout"),
    ],
    ids=["all_states", "reset", "zoneout"],
)
def test_calls_that_aten_does_not_have(
    options: dict[str, Any], call: dict[str, Any], text: str
) -> None:
    class Caller(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = rnnkit.LSTM(4, 6, **options)

        def forward(self, x: Tensor) -> Any:
            return self.layer(x, **call)

    program = torch.export.export(Caller().eval(), (torch.randn(3, 2, 4),))
    table = {**torch.export.default_decompositions(), **rnnkit.decompositions()}
    with pytest.raises(RuntimeError, match=f"expected a call {text}"):
        program.run_decompositions(table)


def test_decompositions_are_for_inference() -> None:
    backward = rnnkit.decompositions()[torch.ops.rnnkit.layer_backward.default]
    with pytest.raises(RuntimeError, match="program for inference"):
        backward("gru", [])


# Names of classes


@pytest.mark.parametrize("name", MODULES)
def test_explain_asks_the_module_and_not_its_class_s_name(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A subclass and a parametrized layer go by other names."""
    asked: list[str] = []

    class Scans:
        @staticmethod
        def why_not(scan: Any) -> str:
            return ""

        @staticmethod
        def choose(scan: Any, device: torch.device) -> Any:
            asked.append(scan.cell)
            return type("Design", (), {"kernel": "stepwise"})()

    monkeypatch.setattr(gpu, "scans", lambda device: Scans)
    monkeypatch.setattr(rnnkit.backends, "serving", lambda device: "cpp")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

    class Renamed(type(make(rnnkit, name))):  # type: ignore[misc]
        pass

    class OnGPU:  # a tensor's shape, dtype and device
        device, dtype = torch.device("cuda"), torch.float64

        def dim(self) -> int:
            return 2 if name in CELLS else 3

        def size(self, _: int) -> int:
            return 2

    module = make(rnnkit, name)
    module.__class__ = Renamed
    rnnkit.explain(module, OnGPU())  # type: ignore[arg-type]
    assert asked == [name.removesuffix("_cell")] * 2


def test_warnings_point_to_the_user_s_line() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make(rnnkit, "gru").qconfig = None
        rnnkit.backends.warn("here")
    assert [warning.filename for warning in caught] == [__file__] * 2

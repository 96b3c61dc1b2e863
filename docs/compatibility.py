"""Tries what PyTorch does with torch.nn's layers and with rnnkit's, and writes docs/compatibility.md.

    python docs/compatibility.py            tries everything and writes the page
    python docs/compatibility.py --show     prints the page instead

A probe gets the package, torch.nn or rnnkit, and a device. If it raises, the table says "no" and shows the error.
"""

import argparse
import copy
import importlib.util
import io
import logging
import pickle
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from types import ModuleType

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    stack_module_state,
    vjp,
    vmap,
)
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, prune, rnn
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads
from torch.nn.utils.rnn import pack_sequence
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import rnnkit

PAGE = Path(__file__).with_suffix(".md")

Probe = Callable[[ModuleType, str], None]

#: (section, feature) -> the function that tries it.
PROBES: dict[tuple[str, str], Probe] = {}

#: What the page says of GPUs if the machine has none.
UNKNOWN = "not yet run on a GPU"


def probe(section: str, feature: str) -> Callable[[Probe], Probe]:
    def put(run: Probe) -> Probe:
        PROBES[section, feature] = run
        return run

    return put


def lstm(package: ModuleType, device: str) -> nn.Module:
    torch.manual_seed(0)
    return package.LSTM(3, 4, device=device)


class Encoder(nn.Module):
    """A model that packs padded sequences, runs a layer and pads the output."""

    def __init__(self, package: ModuleType) -> None:
        super().__init__()
        self.packing = rnnkit if package is rnnkit else rnn
        self.layer = lstm(package, "cpu")

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = self.packing.pack_padded_sequence(x, lengths, enforce_sorted=False)
        return self.packing.pad_packed_sequence(self.layer(packed)[0])[0]


def x(device: str, T: int = 5, N: int = 2) -> Tensor:
    torch.manual_seed(T * N)
    return torch.randn(T, N, 3, device=device, requires_grad=True)


def one_graph(layer: nn.Module, **options: bool) -> Callable:
    return torch.compile(layer, fullgraph=True, backend="aot_eager", **options)


# torch.compile


@probe("torch.compile", "one graph (`fullgraph=True`), forward and training")
def _(package: ModuleType, device: str) -> None:
    layer, i = lstm(package, device), x(device)
    output = one_graph(layer)(i)[0]
    assert_close(output, layer(i)[0])
    output.sum().backward()
    assert layer.weight_hh_l0.grad is not None


@probe("torch.compile", "new T and N without recompilation (`dynamic=True`)")
def _(package: ModuleType, device: str) -> None:
    compiled = one_graph(lstm(package, device), dynamic=True)
    compiled(x(device))
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled(x(device, 7, 6))
        compiled(x(device, 9, 4))


@probe("torch.compile", "one graph with a PackedSequence")
def _(package: ModuleType, device: str) -> None:
    layer = lstm(package, device)
    packed = pack_sequence([torch.randn(n, 3, device=device) for n in (4, 2, 1)])
    assert_close(one_graph(layer)(packed)[0].data, layer(packed)[0].data)


@probe("torch.compile", "one graph that packs sequences of any lengths")
def _(package: ModuleType, device: str) -> None:
    model = Encoder(package).to(device)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = one_graph(model, dynamic=True)
        for lengths in ([4, 2, 1], [1, 3], [5, 5, 3, 2]):
            i = torch.randn(max(lengths), len(lengths), 3, device=device)
            assert_close(compiled(i, torch.tensor(lengths)), model(i, torch.tensor(lengths)))


@probe("torch.compile", "cells in one graph")
def _(package: ModuleType, device: str) -> None:
    for name in ("RNNCell", "LSTMCell", "GRUCell"):
        cell, i = getattr(package, name)(3, 4, device=device), x(device)[0]
        assert_close(one_graph(cell)(i), cell(i))


@probe(
    "torch.compile", "a model in one graph on inductor, from embedding to loss, and its training"
)
def _(package: ModuleType, device: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.layer = nn.Embedding(9, 3), lstm(package, "cpu")
            self.head = nn.Linear(4, 9)

        def forward(self, tokens: Tensor) -> Tensor:
            scores = self.head(self.layer(self.embedding(tokens))[0])
            return nn.functional.cross_entropy(scores.flatten(0, 1), tokens.flatten())

    model, tokens = Model().to(device), torch.arange(8, device=device).view(4, 2)
    found = []
    for call in (model, torch.compile(model, fullgraph=True)):
        loss = call(tokens)
        found.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    assert_close(*found)


@probe("torch.compile", "one graph with a parametrized weight")
def _(package: ModuleType, device: str) -> None:
    layer, i = parametrizations.weight_norm(lstm(package, device), "weight_hh_l0"), x(device)
    assert_close(one_graph(layer)(i)[0], layer(i)[0])


# Export


@probe("export", "`torch.export`, dynamic T and N")
def _(package: ModuleType, device: str) -> None:
    layer = lstm(package, device)
    T, N = (torch.export.Dim(name, min=2, max=4096) for name in "TN")
    shapes = ({0: T, 1: N},)
    program = torch.export.export(layer, (x(device),), dynamic_shapes=shapes, strict=False)
    assert_close(program.module()(i := x(device, 9, 6))[0], layer(i)[0])


@probe("export", "`torch.export`, strict; saved and loaded")
def _(package: ModuleType, device: str) -> None:
    layer, file = lstm(package, device), io.BytesIO()
    torch.export.save(torch.export.export(layer, (x(device),), strict=True), file)
    file.seek(0)
    assert_close(torch.export.load(file).module()(i := x(device))[0], layer(i)[0])


@probe("export", "`torch.export` of a model that packs sequences, for any lengths")
def _(package: ModuleType, device: str) -> None:
    model = Encoder(package).to(device)
    T, N = (torch.export.Dim(name, min=2, max=4096) for name in "TN")
    given = x(device).detach(), torch.tensor([3, 5])
    shapes = {"x": {0: T, 1: N}, "lengths": {0: N}}
    call = torch.export.export(model, given, dynamic_shapes=shapes, strict=False).module()
    other = x(device, 7, 4), torch.tensor([1, 7, 4, 2])
    assert_close(call(*other), model(*other))


@probe("export", "an AOTInductor package, for any T and N")
def _(package: ModuleType, device: str) -> None:
    layer = lstm(package, device).eval()
    T, N = (torch.export.Dim(name, min=2, max=4096) for name in "TN")
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        program = torch.export.export(layer, (x(device),), dynamic_shapes=({0: T, 1: N},))
        path = torch._inductor.aoti_compile_and_package(program, package_path=f"{folder}/model.pt2")
        run = torch._inductor.aoti_load_package(path)
        assert_close(run(i := x(device, 9, 6))[0], layer(i)[0])


@probe("export", "`torch.onnx.export(dynamo=True)`")
def _(package: ModuleType, device: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/model.onnx"
        torch.onnx.export(lstm(package, device), (x(device),), path, dynamo=True, verbose=False)


@probe("export", "`torch.onnx.export(dynamo=True)` of a model that packs sequences")
def _(package: ModuleType, device: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model, path = Encoder(package).to(device), f"{folder}/model.onnx"
        given = x(device).detach(), torch.tensor([3, 5])
        torch.onnx.export(model, given, path, dynamo=True, verbose=False)


@probe("export", "`run_decompositions` to ATen operators alone")
def _(package: ModuleType, device: str) -> None:
    layer, i = lstm(package, device).eval(), x(device)
    table = torch.export.default_decompositions()
    if package is rnnkit:
        table = {**table, **rnnkit.decompositions()}
    program = torch.export.export(layer, (i,)).run_decompositions(table)
    ops = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert all("aten" in str(op) or "getitem" in str(op) for op in ops)
    assert_close(program.module()(i)[0], layer(i)[0])


@probe("export", "`torch.fx.symbolic_trace` records the layer as one node")
def _(package: ModuleType, device: str) -> None:
    model, i = nn.Sequential(lstm(package, device)), x(device)
    assert_close(torch.fx.symbolic_trace(model)(i)[0], model(i)[0])


@probe("export", "`torch.fx.symbolic_trace` traces through a subclass's own forward")
def _(package: ModuleType, device: str) -> None:
    class Doubled(package.LSTM):
        def forward(self, x: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple:
            return super().forward(2 * x, hx)

    model, i = nn.Sequential(Doubled(3, 4, device=device)), x(device)
    assert_close(torch.fx.symbolic_trace(model)(i)[0], model(i)[0])


class Output(nn.Module):
    """A model for TorchScript."""

    def __init__(self, package: ModuleType, device: str) -> None:
        super().__init__()
        self.layer = lstm(package, device)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


@probe("export", "`torch.jit.script`")
def _(package: ModuleType, device: str) -> None:
    model, i = Output(package, device), x(device)
    assert_close(torch.jit.script(copy.deepcopy(model))(i), model(i))


@probe("export", "`torch.jit.trace`, and so TensorBoard's `add_graph`")
def _(package: ModuleType, device: str) -> None:
    model = Output(package, device).eval()
    assert_close(torch.jit.trace(model, x(device))(i := x(device, 9, 6)), model(i))


@probe("export", "`torch.onnx.export(dynamo=False)`")
def _(package: ModuleType, device: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/model.onnx"
        torch.onnx.export(Output(package, device).eval(), (x(device),), path, dynamo=False)


@probe("export", "dynamic quantization")
def _(package: ModuleType, device: str) -> None:
    model = nn.Sequential(lstm(package, device))
    quantized = torch.ao.quantization.quantize_dynamic(model, {type(model[0])})
    assert "quantized" in type(quantized[0]).__module__, "left as it was"


# Autocast, functional transforms, higher order


@probe("autocast", "bfloat16; float32 weights get float32 gradients")
def _(package: ModuleType, device: str) -> None:
    layer = lstm(package, device)
    with torch.autocast(device, torch.bfloat16):
        output = layer(x(device))[0]
    output.float().sum().backward()
    assert layer.weight_hh_l0.grad.dtype == torch.float32


@probe("autocast", "float16 with `GradScaler`")
def _(package: ModuleType, device: str) -> None:
    layer = lstm(package, device)
    before = layer.weight_hh_l0.detach().clone()
    optimizer, scaler = torch.optim.SGD(layer.parameters(), 0.1), torch.amp.GradScaler(device)
    with torch.autocast(device, torch.float16):
        loss = layer(x(device))[0].float().square().sum()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    assert layer.weight_hh_l0.grad.dtype == torch.float32
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(layer.weight_hh_l0, before)


@probe("autocast", "without autocast, an input of another dtype than the weights' is an error")
def _(package: ModuleType, device: str) -> None:
    for dtype in (torch.float64, torch.bfloat16):
        try:
            lstm(package, device)(x(device).to(dtype))
        except (RuntimeError, ValueError):
            continue
        raise AssertionError("none was raised")


def loss_of(layer: nn.Module) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    return lambda weights, i: functional_call(layer, weights, (i,))[0].square().sum()


def weights_of(layer: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach() for name, weight in layer.named_parameters()}


@probe("functional", "`functional_call`, `grad`")
def _(package: ModuleType, device: str) -> None:
    layer, i = lstm(package, device), x(device).detach()
    found = grad(loss_of(layer))(weights_of(layer), i)
    layer(i)[0].square().sum().backward()
    assert_close(found["weight_hh_l0"], layer.weight_hh_l0.grad)


@probe("functional", "`vjp`")
def _(package: ModuleType, device: str) -> None:
    layer, i = lstm(package, device), x(device)
    output, pull = vjp(lambda i: layer(i)[0], i.detach())
    expected = torch.autograd.grad(layer(i)[0], i, torch.ones_like(output))
    assert_close(pull(torch.ones_like(output)), expected)


@probe("functional", "`jvp`, forward-mode AD")
def _(package: ModuleType, device: str) -> None:
    layer, i = lstm(package, device), x(device).detach()
    jvp(lambda i: layer(i)[0], (i,), (i,))
    with forward_ad.dual_level():
        output = layer(forward_ad.make_dual(i, torch.ones_like(i)))[0]
        assert forward_ad.unpack_dual(output).tangent is not None


@probe("functional", "`jacrev`")
def _(package: ModuleType, device: str) -> None:
    layer = lstm(package, device)
    jacrev(lambda i: layer(i)[0])(x(device).detach())


@probe("functional", "`jacfwd`, `hessian`")
def _(package: ModuleType, device: str) -> None:
    layer, i = lstm(package, device), x(device).detach()
    jacfwd(lambda i: layer(i)[0])(i)
    hessian(lambda i: layer(i)[0].square().sum())(i)


@probe("functional", "`vmap` over inputs")
def _(package: ModuleType, device: str) -> None:
    layer, i = lstm(package, device), torch.randn(6, 5, 2, 3, device=device)
    assert_close(vmap(lambda i: layer(i)[0])(i), torch.stack([layer(part)[0] for part in i]))


@probe("functional", "`vmap` over stacked parameters: an ensemble")
def _(package: ModuleType, device: str) -> None:
    layers = [package.LSTM(3, 4, device=device) for _ in range(3)]
    weights, _ = stack_module_state(layers)
    i = x(device).detach()
    found = vmap(lambda weights: functional_call(layers[0], weights, (i,))[0])(weights)
    assert_close(found, torch.stack([layer(i)[0] for layer in layers]))


@probe("functional", "per-sample gradients: `vmap` of `grad`")
def _(package: ModuleType, device: str) -> None:
    layer = lstm(package, device)
    samples = x(device).detach().transpose(0, 1).unsqueeze(2)
    vmap(grad(loss_of(layer)), in_dims=(None, 0))(weights_of(layer), samples)


@probe("functional", "`functional_call` with weights of another dtype")
def _(package: ModuleType, device: str) -> None:
    layer, i = lstm(package, device), x(device).double()
    weights = {name: weight.double() for name, weight in weights_of(layer).items()}
    assert functional_call(layer, weights, (i,))[0].dtype == torch.float64


@probe("functional", "`call_for_per_sample_grads` (ExpandedWeights), of a GRU")
def _(package: ModuleType, device: str) -> None:
    layer = package.GRU(3, 4, batch_first=True, device=device)
    call_for_per_sample_grads(layer, batch_size=5, loss_reduction="sum")(x(device))[
        0
    ].sum().backward()
    assert layer.weight_hh_l0.grad_sample.shape == (5, 12, 4)


@probe("functional", "gradients of gradients: a gradient penalty")
def _(package: ModuleType, device: str) -> None:
    layer, i = lstm(package, device), x(device)
    (found,) = torch.autograd.grad(layer(i)[0].sum(), i, create_graph=True)
    found.square().sum().backward()
    assert layer.weight_hh_l0.grad is not None


@probe("functional", "`torch.autograd.functional`: jacobian, hessian, jvp, vjp, hvp")
def _(package: ModuleType, device: str) -> None:
    layer, i = lstm(package, device), x(device).detach()
    functional = torch.autograd.functional

    def loss(i: Tensor) -> Tensor:
        return layer(i)[0].square().sum()

    of_loss = functional.jacobian(loss, i)
    assert_close(functional.vjp(loss, i, torch.ones((), device=device))[1], of_loss)
    assert_close(functional.jvp(loss, i, i)[1], (of_loss * i).sum())
    second = functional.hessian(loss, i).flatten(3).flatten(0, 2)
    assert_close(functional.hvp(loss, i, i)[1].flatten(), second @ i.flatten())


@probe("functional", "MAML: gradients through a step of SGD")
def _(package: ModuleType, device: str) -> None:
    layer, i = lstm(package, device).double(), x(device).double().detach()
    weights = {name: weight.detach().requires_grad_() for name, weight in layer.named_parameters()}

    def after_a_step(weights: dict[str, Tensor]) -> Tensor:
        inner = loss_of(layer)(weights, i)
        grads = torch.autograd.grad(inner, list(weights.values()), create_graph=True)
        moved = [w - 0.1 * g for w, g in zip(weights.values(), grads, strict=True)]
        return loss_of(layer)(dict(zip(weights, moved, strict=True)), i + 1)

    found = torch.autograd.grad(after_a_step(weights), list(weights.values()))
    ways = [torch.randn_like(w) for w in found]
    near = [
        after_a_step({n: (w + sign * d).detach().requires_grad_() for (n, w), d in pairs})
        for sign in (1e-6, -1e-6)
        for pairs in [list(zip(weights.items(), ways, strict=True))]
    ]
    along = sum((g * d).sum() for g, d in zip(found, ways, strict=True))
    assert_close(along, (near[0] - near[1]).detach() / 2e-6, rtol=1e-5, atol=1e-6)


@probe("functional", "hooks of saved tensors: `save_on_cpu`")
def _(package: ModuleType, device: str) -> None:
    layer, i = lstm(package, device), x(device)
    with torch.autograd.graph.save_on_cpu():
        output = layer(i)[0]
    (found,) = torch.autograd.grad(output.sum(), i)
    assert_close(found, torch.autograd.grad(layer(i)[0].sum(), i)[0])


@probe("functional", "`detect_anomaly`")
def _(package: ModuleType, device: str) -> None:
    with torch.autograd.detect_anomaly(check_nan=True):
        lstm(package, device)(x(device))[0].sum().backward()


@probe("functional", "a graph used twice: `retain_graph`")
def _(package: ModuleType, device: str) -> None:
    layer, i = lstm(package, device), x(device)
    output = layer(i)[0].sum()
    first = torch.autograd.grad(output, i, retain_graph=True)
    assert_close(torch.autograd.grad(output, i), first)


@probe("functional", "some parameters without gradients")
def _(package: ModuleType, device: str) -> None:
    for name in ("weight_ih_l0", "weight_hh_l0", "bias_hh_l0"):
        layer = lstm(package, device)
        getattr(layer, name).requires_grad_(False)
        layer(x(device).detach())[0].sum().backward()
        assert [n for n, w in layer.named_parameters() if w.grad is None] == [name]


@probe("functional", "the backward pass in evaluation mode")
def _(package: ModuleType, device: str) -> None:
    lstm(package, device).eval()(x(device))[0].sum().backward()


@probe("functional", "`torch.autograd.grad(is_grads_batched=True)`")
def _(package: ModuleType, device: str) -> None:
    output = lstm(package, device)(i := x(device))[0]
    several = torch.randn(3, *output.shape, device=device)
    torch.autograd.grad(output, i, several, is_grads_batched=True)


@probe("functional", "`torch.utils.checkpoint`, both modes")
def _(package: ModuleType, device: str) -> None:
    for reentrant in (False, True):
        layer = lstm(package, device)
        checkpoint(layer, x(device), use_reentrant=reentrant)[0].sum().backward()
        assert layer.weight_hh_l0.grad is not None


# Training at scale. The group has one process here; tests/test_distributed.py uses two.


@contextmanager
def group(device: str) -> Iterator[None]:
    store = dist.HashStore()
    kind = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(kind, store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def gradient(model: nn.Module, i: Tensor) -> Tensor:
    model(i)[0].square().sum().backward()
    found = next(weight.grad for name, weight in model.named_parameters() if "weight_hh" in name)
    return found.full_tensor() if isinstance(found, DTensor) else found


@probe("scale", "`DistributedDataParallel`")
def _(package: ModuleType, device: str) -> None:
    with group(device):
        expected = gradient(lstm(package, device), x(device))
        found = DistributedDataParallel(lstm(package, device))
        assert_close(gradient(found, x(device)), expected)


@probe("scale", "FSDP2: `fully_shard`, and `torch.distributed.checkpoint`")
def _(package: ModuleType, device: str) -> None:
    with group(device), tempfile.TemporaryDirectory() as folder:
        layer, i = lstm(package, device), x(device)
        expected = layer(i)[0]
        assert_close(fully_shard(layer)(i)[0], expected)
        dcp.save(get_model_state_dict(layer), checkpoint_id=folder)
        other = fully_shard(package.LSTM(3, 4, device=device))
        state = get_model_state_dict(other)
        dcp.load(state, checkpoint_id=folder)
        set_model_state_dict(other, state)
        assert_close(other(i)[0], expected)


# Modules


@probe(
    "modules", "`isinstance(layer, torch.nn.LSTM)`, by which Opacus, thop and `apply(init)` may go"
)
def _(package: ModuleType, device: str) -> None:
    assert isinstance(lstm(package, device), nn.LSTM), "no subclass"


@probe("modules", "`FlopCounterMode` counts a GRU")
def _(package: ModuleType, device: str) -> None:
    layer = package.GRU(3, 4, device=device)
    with FlopCounterMode(display=False) as counter:
        layer(x(device))
    assert counter.get_total_flops() == 2 * 5 * 2 * 12 * (3 + 4)


@probe("modules", "`detach_()` on the outputs of a `batch_first` GRU and of a GRU cell")
def _(package: ModuleType, device: str) -> None:
    package.GRU(3, 4, batch_first=True, device=device)(x(device))[0].detach_()
    package.GRUCell(3, 4, device=device)(x(device)[0]).detach_()


@probe("modules", "deepcopy and pickle")
def _(package: ModuleType, device: str) -> None:
    layer, i = lstm(package, device), x(device)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_close(other(i)[0], layer(i)[0])


@probe("modules", "`torch.save` of the model, and of its `state_dict` with `weights_only=True`")
def _(package: ModuleType, device: str) -> None:
    layer, i = lstm(package, device), x(device)
    for saved, only in ((layer, False), (layer.state_dict(), True)):
        file = io.BytesIO()
        torch.save(saved, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=only)
        if only:
            state, loaded = loaded, package.LSTM(3, 4, device=device)
            loaded.load_state_dict(state, strict=True)
        assert_close(loaded(i)[0], layer(i)[0])


@probe("modules", "safetensors")
def _(package: ModuleType, device: str) -> None:
    from safetensors.torch import load_model, save_model

    with tempfile.TemporaryDirectory() as folder:
        layer, other, i = lstm(package, device), package.LSTM(3, 4, device=device), x(device)
        save_model(layer, f"{folder}/model.safetensors")
        load_model(other, f"{folder}/model.safetensors", strict=True)
        assert_close(other(i)[0], layer(i)[0])


@probe("modules", "`share_memory`: another process's write takes effect")
def _(package: ModuleType, device: str) -> None:
    layer, i = lstm(package, device).share_memory(), x(device)
    before = layer(i)[0]
    child = torch.multiprocessing.get_context("spawn").Process(
        target=nn.init.zeros_, args=(layer.weight_hh_l0,)
    )
    child.start()
    child.join()
    assert not torch.allclose(layer(i)[0], before)


@probe("modules", "forward and backward hooks")
def _(package: ModuleType, device: str) -> None:
    layer, called = lstm(package, device), []
    layer.register_forward_pre_hook(lambda *_: called.append("before"))
    layer.register_forward_hook(lambda *_: called.append("after"))
    layer.register_full_backward_hook(lambda *_: called.append("backward"))
    layer(x(device))[0].sum().backward()
    assert called == ["before", "after", "backward"]


@probe("modules", "`skip_init`")
def _(package: ModuleType, device: str) -> None:
    layer = nn.utils.skip_init(package.LSTM, 3, 4, device=device)
    assert layer.weight_hh_l0.device.type == device


@probe("modules", "`to_empty` from meta")
def _(package: ModuleType, device: str) -> None:
    layer = lstm(package, "meta").to_empty(device=device)
    layer.reset_parameters()
    layer(x(device))


@probe("modules", "weight_norm and spectral_norm")
def _(package: ModuleType, device: str) -> None:
    for norm in (parametrizations.weight_norm, parametrizations.spectral_norm):
        layer = norm(lstm(package, device), "weight_hh_l0")
        for _ in range(2):
            layer(x(device))[0].sum().backward()
        assert all(weight.grad is not None for weight in layer.parameters())


@probe("modules", "a change of a parametrized weight takes effect")
def _(package: ModuleType, device: str) -> None:
    layer, i = parametrizations.weight_norm(lstm(package, device), "weight_hh_l0"), x(device)
    before = layer(i)[0]
    with torch.no_grad():
        layer.parametrizations.weight_hh_l0.original0.mul_(3)
    assert not torch.allclose(layer(i)[0], before)


@probe("modules", "`nn.utils.prune` on recurrent weights")
def _(package: ModuleType, device: str) -> None:
    layer = prune.l1_unstructured(lstm(package, device), "weight_hh_l0", 0.5)
    for _ in range(2):
        layer(x(device))[0].sum().backward()


@probe("modules", "checkpoints of torch.nn's layers, `strict=True`")
def _(package: ModuleType, device: str) -> None:
    lstm(package, device).load_state_dict(lstm(nn, device).state_dict(), strict=True)


# What rnnkit has and torch.nn has not

BEYOND = "beyond torch.nn"


class Textbook(nn.Module):
    """The page's textbook model."""

    def __init__(self, package: ModuleType, device: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        clipping = {"grad_clip": 0.01, "grad_cut": 3, "init": "keras"}
        self.lstm = package.LSTM(3, 4, device=device, **clipping)
        self.gru = package.GRU(4, 4, bidirectional=True, update_gate="writes", device=device)
        self.readout = package.Readout(8, 5, device=device)

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        """Log-probabilities, or the loss."""
        h = self.gru(self.lstm(x)[0])[0]
        return self.readout(h) if targets is None else self.readout.loss(h, targets)


def classes(i: Tensor) -> Tensor:
    """Targets [T, N]."""
    return torch.arange(i[..., 0].numel(), device=i.device).remainder(5).view(i.shape[:2])


def loss_and_gradients(model: nn.Module, call: Callable, i: Tensor) -> list[Tensor]:
    loss = call(i, classes(i))
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def ragged(device: str) -> rnn.PackedSequence:
    return pack_sequence([torch.randn(n, 3, device=device) for n in (4, 2, 1)])


@probe(BEYOND, "`GRU(update_gate=\"writes\")`, the textbooks' gate, converted to torch.nn's")
def _(package: ModuleType, device: str) -> None:
    options = {"num_layers": 2, "bidirectional": True, "device": device}
    layer, packed = package.GRU(3, 4, update_gate="writes", **options), ragged(device)
    expected, theirs = layer(packed)[0].data, nn.GRU(3, 4, **options)
    theirs.load_state_dict(layer.convert_update_gate("keeps").state_dict())
    assert_close(theirs(packed)[0].data, expected)


@probe(BEYOND, '`GRU(reset="before")`, the reset gate before the product, trained in one graph')
def _(package: ModuleType, device: str) -> None:
    layer = package.GRU(3, 4, reset="before", bidirectional=True, device=device)
    i = x(device)
    expected = layer(i)[0]
    found = one_graph(layer)(i)[0]
    assert_close(found, expected)
    found.sum().backward()


@probe(BEYOND, "`grad_clip` and `grad_cut`: gradients clipped and truncated inside the scan")
def _(package: ModuleType, device: str) -> None:
    clipped = package.LSTM(3, 4, bidirectional=True, grad_clip=0.01, device=device)
    hx = torch.zeros(2, 2, 3, 4, device=device, requires_grad=True)
    clipped(ragged(device), tuple(hx))[0].data.mul(1e3).sum().backward()
    assert_close(hx.grad.abs().max().item(), 0.01)
    cut, i = package.LSTM(3, 4, grad_cut=2, device=device), x(device)
    (found,) = torch.autograd.grad(cut(i)[0][3].sum(), i)  # of times 2 and 3
    assert found.abs().sum((1, 2)).gt(0).tolist() == [False, False, True, True, False]


@probe(BEYOND, "`reset` and `reset_to`: sequences put back to other states inside a call")
def _(package: ModuleType, device: str) -> None:
    layer, i = package.LSTM(3, 4, bidirectional=True, device=device), x(device)
    put_back = torch.randn(2, 2, 2, 4, device=device, requires_grad=True)
    reset = torch.zeros(5, 2, dtype=torch.bool, device=device)
    reset[3] = True
    found = layer(i, reset=reset, reset_to=tuple(put_back))[0]
    later = layer(i[3:], tuple(put_back * torch.tensor([1.0, 0.0], device=device).view(2, 1, 1)))[0]
    assert_close(found[3:], later)
    (of_input, of_states) = torch.autograd.grad(found[3:].sum(), (i, put_back))
    assert of_input[3:].any() and not of_input[:3].any() and of_states[:, 0].any()


@probe(BEYOND, "`reset`: trained in one graph, any T and N; exported, also to ONNX for one T")
def _(package: ModuleType, device: str) -> None:
    layer = package.GRU(3, 4, device=device)
    compiled, parameters = one_graph(layer, dynamic=True), list(layer.parameters())
    for T, N in ((5, 2), (7, 6), (9, 4)):
        i, reset = x(device, T, N), torch.rand(T, N, device=device) < 0.3
        outputs = [call(i, reset=reset)[0] for call in (compiled, layer)]
        assert_close(*outputs)
        assert_close(*(torch.autograd.grad(y.square().sum(), parameters) for y in outputs))
    T, N = (torch.export.Dim(name, min=2, max=4096) for name in "TN")
    given, shapes = {"reset": reset}, {"input": {0: T, 1: N}, "reset": {0: T, 1: N}}
    program = torch.export.export(layer, (i,), given, dynamic_shapes=shapes)
    i, reset = x(device, 6, 3), torch.rand(6, 3, device=device) < 0.3
    assert_close(program.module()(i, reset=reset)[0], layer(i, reset=reset)[0])
    torch.onnx.export(layer, (i,), kwargs={"reset": reset}, dynamo=True, verbose=False)


LENGTHS = ([2, 5, 3], [5, 1, 4])


@probe(BEYOND, "`lengths`: padded sequences in any order, also with `reset`")
def _(package: ModuleType, device: str) -> None:
    layer, i = package.GRU(3, 4, bidirectional=True, device=device), x(device, 5, 3)
    reset = torch.rand(5, 3, device=device) < 0.3
    for lengths in LENGTHS:
        found = layer(i, lengths=torch.tensor(lengths), reset=reset)[0]
        for n, length in enumerate(lengths):
            alone = layer(i[:length, n], reset=reset[:length, n])[0]
            assert_close(found[:length, n], alone)
            assert not found[length:, n].any()


def lengths_in_one_graph(package: ModuleType, device: str, **options: Tensor) -> None:
    layer, i = package.GRU(3, 4, bidirectional=True, device=device), x(device, 5, 3)
    compiled = one_graph(layer, dynamic=True)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        for lengths in map(torch.tensor, LENGTHS):
            found = compiled(i, lengths=lengths, **options)[0]
            assert_close(found, layer(i, lengths=lengths, **options)[0])


@probe(BEYOND, "`all_states=True`: every state after each step, with gradients")
def _(package: ModuleType, device: str) -> None:
    layer, i = package.LSTM(3, 4, device=device), x(device)
    output, (_, c_n), (h, c) = layer(i, all_states=True)
    assert_close((h, c[-1]), (output, c_n[0]))
    assert torch.autograd.grad(c[2].sum(), i)[0][:3].any()


@probe(BEYOND, "`learn_initial_state`: `h_0` and `c_0` as parameters")
def _(package: ModuleType, device: str) -> None:
    layer, i = (
        package.LSTM(3, 4, bidirectional=True, learn_initial_state=True, device=device),
        x(device),
    )
    compiled = one_graph(layer)
    gradients = [
        torch.autograd.grad(call(i)[0].sum(), (layer.h_0, layer.c_0)) for call in (compiled, layer)
    ]
    assert_close(*gradients)
    assert gradients[0][0].any()


def noisy_in_one_graph(package: ModuleType, device: str, **options: object) -> None:
    layer, i = package.LSTM(3, 4, 2, device=device, **options), x(device)
    found = []
    for call in (layer, one_graph(layer)):
        torch.manual_seed(1)
        found.append(call(i)[0])
    assert_close(*found)
    assert not torch.equal(layer(i)[0], layer(i)[0])
    layer.eval()
    assert_close(layer(i)[0], torch.export.export(layer, (i,)).module()(i)[0])


@probe(BEYOND, "`weight_dropout` (DropConnect) and `recurrent_dropout`, also in one graph")
def _(package: ModuleType, device: str) -> None:
    noisy_in_one_graph(package, device, weight_dropout=0.5, recurrent_dropout=0.5)


@probe(BEYOND, "`zoneout` of h and c, also in one graph")
def _(package: ModuleType, device: str) -> None:
    noisy_in_one_graph(package, device, zoneout=(0.5, 0.3))


@probe(BEYOND, "`layer_norm`: trained in one graph, exported, also to ONNX for one T")
def _(package: ModuleType, device: str) -> None:
    layer, i = package.LSTM(3, 4, bidirectional=True, layer_norm=True, device=device), x(device)
    gradients = [
        torch.autograd.grad(call(i)[0].sum(), (layer.norm_hh_l0, layer.norm_c_l0))
        for call in (one_graph(layer), layer)
    ]
    assert_close(*gradients)
    assert_close(torch.export.export(layer, (i,)).module()(i)[0], layer(i)[0])
    torch.onnx.export(layer, (i,), dynamo=True, verbose=False)


@probe(BEYOND, "`lengths` in one graph")
def _(package: ModuleType, device: str) -> None:
    lengths_in_one_graph(package, device)


@probe(BEYOND, "`lengths` and `reset` in one graph")
def _(package: ModuleType, device: str) -> None:
    lengths_in_one_graph(package, device, reset=torch.rand(5, 3, device=device) < 0.3)


@probe(BEYOND, '`init="keras"` and others, drawn again by `reset_parameters`, also from meta')
def _(package: ModuleType, device: str) -> None:
    layer = package.LSTM(3, 4, init="keras", device="meta").to_empty(device=device)
    layer.reset_parameters()
    assert_close(layer.bias_ih_l0.tolist(), [0.0] * 4 + [1.0] * 4 + [0.0] * 8)


@probe(BEYOND, "`rnnkit.init`: initializers by gate, for a model")
def _(package: ModuleType, device: str) -> None:
    model = nn.Sequential(lstm(package, device))
    rnnkit.init.chrono_(rnnkit.init.orthogonal_(rnnkit.init.xavier_(model)), 100)
    for gate in model[0].weight_hh_l0.chunk(4):
        assert_close(gate.T @ gate, torch.eye(4, device=device))


@probe(BEYOND, "weights from and to Keras and haste")
def _(package: ModuleType, device: str) -> None:
    layer, i = lstm(package, device), x(device)
    for write, load in (
        (rnnkit.to_keras, rnnkit.from_keras),
        (rnnkit.to_haste, rnnkit.from_haste),
    ):
        other = load(package.LSTM(3, 4, device=device), write(layer))
        assert_close(other(i)[0], layer(i)[0])


@probe(BEYOND, "`Readout`: softmax output; its loss, of packed sequences, in chunks of rows")
def _(package: ModuleType, device: str) -> None:
    layer, readout = lstm(package, device), package.Readout(4, 5, device=device)
    h, tags = layer(ragged(device))[0], torch.arange(7, device=device) % 5
    scores = nn.functional.linear(h.data, readout.weight, readout.bias)
    assert_close(readout.predict(h).data, scores.softmax(-1))
    loss = readout.loss(h, rnn.PackedSequence(tags, h.batch_sizes), chunk=2)
    assert_close(loss, nn.functional.cross_entropy(scores, tags))


@probe(BEYOND, "`gradient_flow`: packed, in both directions, in DistributedDataParallel")
def _(package: ModuleType, device: str) -> None:
    torch.manual_seed(0)
    layer, found = package.GRU(3, 4, 2, bidirectional=True, device=device), []
    with group(device):
        for model in (layer, DistributedDataParallel(layer)):
            torch.manual_seed(0)
            with package.gradient_flow(model) as flow:
                model(ragged(device))[0].data.square().sum().backward()
            found += [flow[name].h for name in flow]
    assert found[0].shape == (2, 2, 4)
    assert_close(*found)


def flow_of(package: ModuleType, model: nn.Module, call: Callable, i: Tensor) -> Tensor:
    with package.gradient_flow(model) as flow:
        call(i)[0].square().sum().backward()
    return flow[""].h


@probe(BEYOND, "`gradient_flow` under `torch.compile`")
def _(package: ModuleType, device: str) -> None:
    flow_of(package, layer := lstm(package, device), one_graph(layer), x(device))


@probe(BEYOND, '`gradient_flow` under `torch.compile` in `set_stance("force_eager")`')
def _(package: ModuleType, device: str) -> None:
    layer, i = lstm(package, device), x(device)
    with torch.compiler.set_stance("force_eager"):
        found = flow_of(package, layer, torch.compile(layer), i)
    assert_close(found, flow_of(package, layer, layer, i))


@probe(BEYOND, "`gradient_flow` under FSDP2: `fully_shard`")
def _(package: ModuleType, device: str) -> None:
    with group(device):
        layer = fully_shard(lstm(package, device))
        flow_of(package, layer, layer, x(device))


@probe(
    BEYOND, "the textbook model: trained in one graph, any T and N; a new `grad_clip` compiles anew"
)
def _(package: ModuleType, device: str) -> None:
    model = Textbook(package, device)
    compiled = one_graph(model, dynamic=True)
    assert_close(*(loss_and_gradients(model, call, x(device)) for call in (compiled, model)))
    with torch.compiler.set_stance("fail_on_recompile"):
        found = loss_and_gradients(model, compiled, x(device, 7, 6))
    assert_close(found, loss_and_gradients(model, model, x(device, 7, 6)))
    model.lstm.grad_clip = 1e-4
    assert not torch.allclose(loss_and_gradients(model, compiled, x(device, 7, 6))[1], found[1])
    assert_close(*(loss_and_gradients(model, call, x(device)) for call in (compiled, model)))


@probe(BEYOND, "the textbook model: `torch.export`, saved and loaded; AOTInductor; any T and N")
def _(package: ModuleType, device: str) -> None:
    model, i = Textbook(package, device).eval(), x(device, 9, 6).detach()
    T, N = (torch.export.Dim(name, min=2, max=4096) for name in "TN")
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        path, shapes = f"{folder}/model.pt2", ({0: T, 1: N},)
        program = torch.export.export(model, (x(device),), dynamic_shapes=shapes)
        torch.export.save(program, path)
        assert_close(torch.export.load(path).module()(i), model(i))
        torch._inductor.aoti_compile_and_package(program, package_path=path)
        assert_close(torch._inductor.aoti_load_package(path)(i), model(i))


@probe(BEYOND, "the textbook model: `torch.onnx.export(dynamo=True)`")
def _(package: ModuleType, device: str) -> None:
    program = torch.onnx.export(Textbook(package, device), (x(device),), dynamo=True, verbose=False)
    operators = [node.op_type for node in program.model.graph]
    assert operators.count("LSTM") == operators.count("GRU") == 1


@probe(BEYOND, "the textbook model: `torch.jit.trace`")
def _(package: ModuleType, device: str) -> None:
    torch.jit.trace(Textbook(package, device), x(device))


@probe(BEYOND, "the textbook model: autocast, per-sample gradients, gradients of gradients")
def _(package: ModuleType, device: str) -> None:
    model, i = Textbook(package, device), x(device)
    expected = loss_and_gradients(model, model, i)
    for low in (torch.bfloat16, torch.float16):
        with torch.autocast(device, low):
            found = loss_and_gradients(model, model, i)
        assert all(grad.dtype == torch.float32 for grad in found)
        assert_close(found, expected, rtol=0.1, atol=0.01)

    def loss(weights: dict[str, Tensor], i: Tensor) -> Tensor:
        return functional_call(model, weights, (i, classes(i)))

    of_each = vmap(grad(loss), in_dims=(None, 0))(weights_of(model), torch.stack([i, 2 * i]))
    assert_close([each[0] for each in of_each.values()], expected[1:])
    (first,) = torch.autograd.grad(model(i, classes(i)), i, create_graph=True)
    first.square().sum().backward()
    assert model.lstm.weight_hh_l0.grad is not None


@probe(BEYOND, "the textbook model: DistributedDataParallel and FSDP2")
def _(package: ModuleType, device: str) -> None:
    with group(device):
        for wrap in (DistributedDataParallel, fully_shard):
            alone, wrapped = Textbook(package, device), wrap(Textbook(package, device))
            alone(x(device), classes(x(device))).backward()
            wrapped(x(device), classes(x(device))).backward()
            for own, other in zip(alone.parameters(), wrapped.parameters(), strict=True):
                found = other.grad
                assert_close(found.full_tensor() if isinstance(found, DTensor) else found, own.grad)


@probe(BEYOND, "the textbook model: deepcopy, pickle and `torch.save` keep its options")
def _(package: ModuleType, device: str) -> None:
    model, i = Textbook(package, device), x(device)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert repr(other) == repr(model)
        assert_close(loss_and_gradients(other, other, i), loss_and_gradients(model, model, i))


def tried(run: Probe, package: ModuleType, device: str) -> str:
    """Runs a probe. Returns "yes", or "no" and the error."""
    torch._dynamo.reset()
    try:
        run(package, device)
    except Exception as error:
        text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines() or [""]  # no colours
        first = re.sub(r"\s+", " ", text[0]).replace("|", "/")
        return f"no: {type(error).__name__}: {first[:90]}"
    return "yes"


def page() -> str:
    gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if gpu else "none"
    lines = [
        "# What works with rnnkit's layers, and with torch.nn's",
        "",
        "Tried on an LSTM unless a row names another. `python docs/compatibility.py` repeats it and writes this page.",
        "The textbook model: an LSTM with `grad_clip`, `grad_cut` and `init`, a GRU with `update_gate`, a Readout.",
        f"torch {torch.__version__}, Python {sys.version.split()[0]}, rnnkit {rnnkit.__version__}, GPU: {device};"
        f" {date.today()}. On the CPU, torch.nn's GRU and RNN run on other code than its LSTM, and may support more.",
        "",
        "| | torch.nn, CPU | rnnkit, CPU | torch.nn, cuDNN | rnnkit, GPU |",
        "|---|---|---|---|---|",
    ]
    section = ""
    for (of_section, feature), run in PROBES.items():
        if of_section != section:
            section = of_section
            lines.append(f"| **{section}** | | | | |")
        cells = [tried(run, package, "cpu") for package in (nn, rnnkit)]
        cells += [tried(run, package, "cuda") if gpu else UNKNOWN for package in (nn, rnnkit)]
        lines.append(f"| {feature} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description="tries everything and writes docs/compatibility.md"
    )
    parser.add_argument("--show", action="store_true", help="print the page, write nothing")
    options = parser.parse_args()
    for needed in ("onnxscript", "safetensors"):
        if importlib.util.find_spec(needed) is None:
            parser.error(f"needs {needed}: pip install onnx onnxscript safetensors")
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    text = page()
    if options.show:
        print(text, end="")
    else:
        PAGE.write_text(text)


if __name__ == "__main__":
    main()

"""Writes docs/compatibility.md: what PyTorch does with torch.nn's layers and with rnnkit's, found by trying it.

    python docs/compatibility.py            tries everything and writes the page
    python docs/compatibility.py --show     prints it instead

A probe gets the package, torch.nn or rnnkit, and a device; what it raises is the table's "no".
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
from collections.abc import Callable
from datetime import date
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    stack_module_state,
    vmap,
)
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.rnn import pack_sequence
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import rnnkit

PAGE = Path(__file__).with_suffix(".md")

Probe = Callable[[ModuleType, str], None]

#: By section and feature.
PROBES: dict[tuple[str, str], Probe] = {}

#: What a GPU has not been asked yet.
UNKNOWN = "not yet run on a GPU"


def probe(section: str, feature: str) -> Callable[[Probe], Probe]:
    def put(run: Probe) -> Probe:
        PROBES[section, feature] = run
        return run

    return put


def lstm(package: ModuleType, device: str) -> nn.Module:
    torch.manual_seed(0)
    return package.LSTM(3, 4, device=device)


def x(device: str, T: int = 5, N: int = 2) -> Tensor:
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


@probe("torch.compile", "another T and N without another compilation (`dynamic=True`)")
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


@probe("export", "`torch.onnx.export(dynamo=True)`")
def _(package: ModuleType, device: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/model.onnx"
        torch.onnx.export(lstm(package, device), (x(device),), path, dynamo=True, verbose=False)


@probe("export", "`torch.fx.symbolic_trace` makes a node of the layer")
def _(package: ModuleType, device: str) -> None:
    model, i = nn.Sequential(lstm(package, device)), x(device)
    assert_close(torch.fx.symbolic_trace(model)(i)[0], model(i)[0])


@probe("export", "`torch.jit.script`")
def _(package: ModuleType, device: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = lstm(package, device)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)[0]

    torch.jit.script(Model())(x(device))


# Autocast, functional transforms, higher order


@probe("autocast", "bfloat16; float32 weights get float32 gradients")
def _(package: ModuleType, device: str) -> None:
    layer = lstm(package, device)
    with torch.autocast(device, torch.bfloat16):
        output = layer(x(device))[0]
    output.float().sum().backward()
    assert layer.weight_hh_l0.grad.dtype == torch.float32


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


@probe("functional", "gradients of each sample: `vmap` of `grad`")
def _(package: ModuleType, device: str) -> None:
    layer = lstm(package, device)
    samples = x(device).detach().transpose(0, 1).unsqueeze(2)
    vmap(grad(loss_of(layer)), in_dims=(None, 0))(weights_of(layer), samples)


@probe("functional", "gradients of gradients: a gradient penalty")
def _(package: ModuleType, device: str) -> None:
    layer, i = lstm(package, device), x(device)
    (found,) = torch.autograd.grad(layer(i)[0].sum(), i, create_graph=True)
    found.square().sum().backward()
    assert layer.weight_hh_l0.grad is not None


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


# Modules


@probe("modules", "deepcopy and pickle")
def _(package: ModuleType, device: str) -> None:
    layer, i = lstm(package, device), x(device)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_close(other(i)[0], layer(i)[0])


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


@probe("modules", "a parametrized weight that changes is seen")
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


def tried(run: Probe, package: ModuleType, device: str) -> str:
    """`yes`, or `no` and the error."""
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
        "Found by trying each on an LSTM; `python docs/compatibility.py` tries it again and writes this page.",
        f"torch {torch.__version__}, Python {sys.version.split()[0]}, rnnkit {rnnkit.__version__}, GPU: {device};"
        f" {date.today()}. The GRU and the RNN of torch.nn run on other code on the CPU, and may do more there.",
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
    parser = argparse.ArgumentParser(description="tries what docs/compatibility.md tells")
    parser.add_argument("--show", action="store_true", help="print the page, write nothing")
    options = parser.parse_args()
    if importlib.util.find_spec("onnxscript") is None:
        parser.error("needs onnxscript: pip install onnxscript onnx")
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    text = page()
    if options.show:
        print(text, end="")
    else:
        PAGE.write_text(text)


if __name__ == "__main__":
    main()

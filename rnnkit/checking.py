"""`python -m rnnkit info --check`: small layers on each backend, beside the reference in float64."""

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import rnnkit
from rnnkit import backends

#: The largest error of float32, relative to the largest value; GPUs multiply it as TF32.
LIMITS = {"cpu": 1e-4, "cuda": 1e-2}


class Check(NamedTuple):
    """What was tried, whether it is right (None: it is not there), and the errors, or what to do."""

    what: str
    passed: bool | None
    told: str

    def __str__(self) -> str:
        verdict = {True: "ok", False: "FAILED", None: "absent"}[self.passed]
        return f"{verdict}: {self.told}"


def checks() -> Iterator[Check]:
    """Every backend that is here, with the layers of torch.nn and cells of one's own, and every one that is not."""
    yield from _on_cpu()
    yield from _on_gpu()


def _on_cpu() -> Iterator[Check]:
    if backends.EXTENSION is None:
        told = f"{backends.EXTENSION_REASON}: install g++ 11 or clang 19 or later and rnnkit again"
        yield Check("C++ on the CPU", None, f"{told}; until then the slow reference serves")
        return
    yield _layers("C++ on the CPU", "cpp", "cpu")
    from rnnkit.graph import compiled, kernels

    library = rnnkit.library
    kind = kernels.register(library.mgu.op_name)
    if kind == "compiled":
        yield _of("compiled cells", "cpp", "cpu", [library.mgu])
    else:
        told = f"{compiled.compiler_told()}; until then cells are interpreted, which takes longer"
        yield Check("compiled cells", None, told)
    with _not_compiled():
        kernels.register(library.nbr.op_name)
    yield _of("interpreted cells", "cpp", "cpu", [library.nbr])


def _on_gpu() -> Iterator[Check]:
    reasons = {"CUDA": backends.CUDA_REASON, "Triton": backends.TRITON_REASON}
    there = torch.cuda.is_available()
    for name, backend in (("CUDA", "cpp"), ("Triton", "triton")):
        if not there:
            told = "torch sees no GPU"
            if torch.version.cuda is None and torch.version.hip is None:
                told = "this torch is for the CPU: for a GPU install one that is built for it"
            yield Check(name, None, told)
        elif reasons[name]:
            how = "see docs/cuda.md" if name == "CUDA" else "pip install triton"
            yield Check(name, None, f"{reasons[name]}: {how}")
        else:
            yield _layers(name, backend, "cuda")
    if there and not backends.TRITON_REASON:
        yield _of("cells in Triton", "triton", "cuda", [rnnkit.library.light_gru])


@contextmanager
def _not_compiled() -> Iterator[None]:
    before = os.environ.get("RNNKIT_COMPILE")
    os.environ["RNNKIT_COMPILE"] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ["RNNKIT_COMPILE"]
        else:
            os.environ["RNNKIT_COMPILE"] = before


def _layers(what: str, backend: str, device: str) -> Check:
    return _of(what, backend, device, [rnnkit.LSTM, rnnkit.GRU, rnnkit.RNN])


def _of(what: str, backend: str, device: str, kinds: list[Any]) -> Check:
    """Outputs, states and gradients of two bidirectional layers of each kind, on ragged sequences."""
    worst = 0.0
    torch_state = torch.get_rng_state()
    try:
        for kind in kinds:
            make: Callable[..., nn.Module] = kind
            if isinstance(kind, rnnkit.Cell):
                make = lambda *sizes, cell=kind, **options: rnnkit.Recurrent(  # noqa: E731
                    cell, *sizes, **options
                )
            torch.manual_seed(0)
            layer = make(13, 37, num_layers=2, bidirectional=True)
            x = torch.randn(9, 5, 13)
            with rnnkit.backend("reference"):
                expected = _results(copy.deepcopy(layer).double(), x.double())
            with rnnkit.backend(backend):
                found = _results(layer.to(device), x.to(device))
            for one, other in zip(found, expected, strict=True):
                error = (one.double().cpu() - other).abs().max() / other.abs().max()
                worst = max(worst, float(error.nan_to_num(torch.inf)))
    except Exception as error:  # whatever it is, the other checks follow
        return Check(what, False, f"{type(error).__name__}: {error}")
    finally:
        torch.set_rng_state(torch_state)
    names = ", ".join(getattr(kind, "__name__", "") for kind in kinds)
    limit = LIMITS[device]
    told = f"{names}: relative error {worst:.1e}, at most {limit:g}"
    return Check(what, worst <= limit, told)


def _results(layer: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    lengths = [9, 8, 4, 4, 1]
    with torch.enable_grad():
        output, states = layer(pack_padded_sequence(x, lengths))
        states = states if isinstance(states, tuple) else (states,)
        loss = sum((t * t).sum() for t in (output.data, *states))
        grads = torch.autograd.grad(loss, [x, *layer.parameters()])
    return [t.detach() for t in (output.data, *states, *grads)]

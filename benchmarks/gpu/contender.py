"""A provider, ready to compute a case on the device, and what all are given."""

import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

import rnnkit
from benchmarks import truth
from benchmarks.cases import Case
from benchmarks.gpu import kernels
from benchmarks.gpu.clock import Protocol, seconds
from benchmarks.gpu.grid import T_SHORT, name
from benchmarks.gpu.layers import Layers
from benchmarks.providers import Computation
from benchmarks.providers.torch_layers import Tensors, dtype_of, input_of

WARM_CALLS = 2


def inputs(case: Case, device: torch.device) -> Tensors:
    """Weights as torch.nn initialises them, a normal input and gradient of the output, drawn on the device."""
    generator = torch.Generator(device).manual_seed(zlib.crc32(name(case).encode()))
    bound = case.H**-0.5
    tensors = {
        weight: torch.empty(shape, device=device).uniform_(-bound, bound, generator=generator)
        for weight, shape in truth.shapes(case).items()
    }
    outer = (case.rows,) if case.ragged else (case.T, case.N)
    shapes = {"x": case.I}
    if case.mode == "training":
        shapes["grad_output"] = case.directions * case.output_size
    for tensor, size in shapes.items():
        tensors[tensor] = torch.randn((*outer, size), device=device, generator=generator)
    tensors = {key: tensor.to(dtype_of(case)) for key, tensor in tensors.items()}
    if case.ragged:
        tensors["batch_sizes"] = torch.tensor(case.batch_sizes)
    return tensors


def beginning(case: Case, tensors: Tensors) -> Tensors:
    """Of `tensors`, what a shorter case takes."""
    found = {key: tensor.detach() for key, tensor in tensors.items()}
    for key in found.keys() & {"x", "grad_output"}:
        found[key] = found[key][: case.rows if case.ragged else case.T]
    if case.ragged:
        found["batch_sizes"] = torch.tensor(case.batch_sizes)
    return found


class Contender:
    """A provider on one case, at every T that is timed."""

    def __init__(self, provider: Layers, case: Case, tensors: Tensors) -> None:
        self.device, self.case = provider.device, case
        self.module = provider.module(case, tensors)
        self.tensors = {T: beginning(replace(case, T=T), tensors) for T in (T_SHORT, case.T)}
        self.computations: dict[int, Computation] = {
            T: provider.computation(case, self.module, given) for T, given in self.tensors.items()
        }
        self.repetitions: dict[int, int] = {}
        self.leads: dict[int, bool] = {}

    def capture(self) -> None:
        """Each call becomes a CUDA graph's replay."""
        for T, (call, results, around) in self.computations.items():
            with around():
                self.computations[T] = Computation(captured(call, self.device), results, around)

    def results(self, T: int) -> list[Tensor]:
        call, _, around = self.computations[T]
        with around():
            return list(leaves(call()))

    def launched(self, T: int) -> kernels.Launched:
        call, _, around = self.computations[T]
        with around():
            return kernels.launched(call, self.device)

    def kernel(self) -> str:
        """What rnnkit says that it runs."""
        explain = getattr(rnnkit, "explain", None)
        if explain is None:
            return ""
        try:
            with self.computations[self.case.T].around():
                return str(explain(self.module, input_of(self.tensors[self.case.T])))
        except Exception as error:  # no reason to go without the times
            return f"explain: {reason(error)}"

    def calibrate(self, protocol: Protocol) -> float:
        """Warms up, finds how many calls fill a sample; returns the seconds of a round."""
        spent = 0.0
        for T in self.computations:
            each = self.sample(T, 1)
            if each < protocol.lead_seconds:
                each = self.sample(T, WARM_CALLS)
            self.repetitions[T] = max(1, math.ceil(protocol.sample_seconds / each))
            self.leads[T] = each < protocol.lead_seconds
            spent += (self.repetitions[T] + self.leads[T]) * each
        return spent

    def sample(self, T: int, repetitions: int = 0) -> float:
        call, _, around = self.computations[T]
        with around():
            given = repetitions or self.repetitions[T], self.device, self.leads.get(T, False)
            return seconds(call, *given)


def captured(call: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """Replays a graph of what `call` queues; after a few calls of it, so that all that it needs is there."""
    current, stream = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        for _ in range(WARM_CALLS):
            call()
    current.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()

    def replay() -> Any:
        graph.replay()
        return results

    return replay


def leaves(results: Any) -> Iterator[Tensor]:
    """The tensors in what a call returned."""
    if isinstance(results, Tensor):
        yield results
    elif isinstance(results, PackedSequence):
        yield results.data
    else:
        for part in results:
            yield from leaves(part)


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]

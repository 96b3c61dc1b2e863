"""The process that measures: makes a row of each task it is sent, with rnnkit, torch.nn and others in turns."""

import gc
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from benchmarks import truth
from benchmarks.cases import Case
from benchmarks.figures import Figure, significant
from benchmarks.gpu import kernels
from benchmarks.gpu.clock import Protocol, precision, seconds
from benchmarks.gpu.contender import Contender, inputs, reason
from benchmarks.gpu.grid import PROVIDERS, T_LONG, T_SHORT, TRITON, Task
from benchmarks.gpu.layers import Layers, without_triton
from benchmarks.providers.torch_layers import dtype_of
from benchmarks.surroundings import surroundings
from rnnkit import plan

Row = dict[str, Any]
Times = dict[str, list[float]]

COMPARED = ("output", "grad_x", "grad_weight_hh_l0")
WARM_SECONDS = 0.5  # of matrix products, until the clocks are up


class Bench:
    """Makes rows; says before each thing that may hang or crash what it is.

    broken: the device answers no more; only a new process has another.
    """

    def __init__(
        self, device: str, protocol: Protocol, doing: Callable[[str], None] = lambda what: None
    ) -> None:
        self.device, self.protocol, self.doing = torch.device(device), protocol, doing
        threads = torch.get_num_threads()
        names = dict.fromkeys(key for keys in PROVIDERS.values() for key in keys)
        self.providers = {key: Layers(key, threads, device) for key in names}
        self.broken = False

    def row(self, task: Task) -> Row:
        row: Row = {"part": task.part, "kind": task.kind, "case": task.case.document()}
        if TRITON in task.providers and (why := without_triton(self.device)):
            return row | {"ratios": {}, "entries": {TRITON: {"unsupported": why}}}
        entries: Row = {}
        with precision(task.case.dtype):
            try:
                kinds = {"error": self.errors, "kernels": self.profiled, "graph": self.replayed}
                row["ratios"] = kinds.get(task.kind, self.timed)(task, entries)
            except Exception as error:  # whatever is raised is this row's result
                row["ratios"] = {}
                for key in task.providers:
                    entries[key] = self.refused(error)
        self.free()
        return row | {"entries": {key: entries[key] for key in task.providers}}

    def timed(self, task: Task, entries: Row) -> Row:
        """Times go into `entries`; returns torch.nn's over rnnkit's, for `triton` each one's over the last's."""
        tensors = inputs(task.case, self.device)
        ready: dict[str, Contender] = {}
        theirs: list[Tensor] = []
        spent = 0.0
        for key in task.providers:
            with self.recorded(key, entries):
                self.doing(key)
                entries[key] = {}
                contender = Contender(self.providers[key], task.case, tensors)
                if key == "torch":
                    theirs += contender.results(T_SHORT)
                elif theirs:
                    entries[key] |= compared(task.case, theirs, contender.results(T_SHORT))
                entries[key] |= self.peak(contender)
                spent += contender.calibrate(self.protocol)
                if key.startswith("rnnkit"):
                    entries[key] |= {"kernel": contender.kernel()}
                ready[key] = contender
        theirs.clear()
        times = self.alternate(ready, spent, entries)
        *peers, own = task.providers
        ratios = {key: over(times[key], times[own]) for key in peers if times.keys() >= {key, own}}
        return ratios if task.kind == "triton" else ratios.get("torch", {})

    def replayed(self, task: Task, entries: Row) -> Row:
        """Times of CUDA graphs of the stepwise design go into `entries`.

        A backward pass is stepwise since H is too large for another design: what is forced does not reach it.
        """
        (key,) = task.providers
        tensors = inputs(task.case, self.device)
        with plan.forced("stepwise"), self.recorded(key, entries):
            self.doing(key)
            theirs = Contender(self.providers["torch"], task.case, tensors).results(T_SHORT)
            contender = Contender(self.providers[key], task.case, tensors)
            contender.capture()
            entries[key] = compared(task.case, theirs, contender.results(T_SHORT))
            spent = contender.calibrate(self.protocol)
            entries[key] |= {"kernel": contender.kernel()}
            self.alternate({key: contender}, spent, entries)
        return {}

    def alternate(
        self, ready: dict[str, Contender], spent: float, entries: Row
    ) -> dict[str, Times]:
        """Seconds of a call at each T and of a step, by provider, a sample a round; all take turns.

        Their figures go into `entries`. spent: seconds of a round.
        """
        rounds = max(1, min(self.protocol.rounds, int(self.protocol.case_seconds / (spent or 1))))
        times: dict[str, dict[int, list[float]]] = {key: {} for key in ready}
        for number in range(rounds):
            for key in list(times)[:: -1 if number % 2 else 1]:
                self.doing(key)
                with self.recorded(key, entries):
                    for T in ready[key].computations:
                        times[key].setdefault(T, []).append(ready[key].sample(T))
                if refused(entries[key]):
                    del times[key]
        found = {key: with_step(of_provider) for key, of_provider in times.items()}
        for key, of_provider in found.items():
            entries[key]["us"] = {
                what: Figure.of([1e6 * value for value in values]).document()
                for what, values in of_provider.items()
            }
        return found

    def peak(self, contender: Contender) -> Row:
        """MiB that a call takes, its results included."""
        if self.device.type != "cuda":
            contender.results(contender.case.T)
            return {}
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        contender.results(contender.case.T)
        taken = torch.cuda.max_memory_allocated(self.device) - before
        return {"peak_mib": significant(taken / 2**20)}

    def errors(self, task: Task, entries: Row) -> Row:
        """Norm-relative errors against torch.nn in float64 go into `entries`; returns rnnkit's over torch.nn's."""
        case = task.case
        relative_error = truth.tolerance_table().relative_error
        tensors = inputs(case, self.device)
        exact = {key: tensor.double() for key, tensor in tensors.items()}
        in_double = replace(case, dtype="float64")
        peer = self.providers["torch"]
        right = peer.computation(in_double, peer.module(in_double, exact), exact).once()
        for key in task.providers:
            with self.recorded(key, entries):
                self.doing(key)
                provider = self.providers[key]
                found = provider.computation(case, provider.module(case, tensors), tensors).once()
                errors = {
                    what: relative_error(
                        torch.from_numpy(found[what]), torch.from_numpy(right[what])
                    )
                    for what in COMPARED
                }
                entries[key] = {what: significant(error, 3) for what, error in errors.items()}
        if any(refused(entries[key]) for key in task.providers):
            return {}
        pairs = {what: [entries[key][what] for key in ("rnnkit", "torch")] for what in COMPARED}
        return {what: significant(own / peer, 3) for what, (own, peer) in pairs.items() if peer}

    def profiled(self, task: Task, entries: Row) -> Row:
        """Kernels go into `entries`; returns torch.nn's recurrent step over rnnkit's."""
        tensors = inputs(task.case, self.device)
        for key in task.providers:
            with self.recorded(key, entries):
                self.doing(key)
                contender = Contender(self.providers[key], task.case, tensors)
                contender.calibrate(self.protocol)
                found = {T: contender.launched(T) for T in contender.computations}
                entries[key] = kernels.told(found)
        steps = [entries[key].get("recurrent_us", 0) for key in task.providers]
        return {"recurrent": significant(steps[0] / steps[1])} if min(steps) > 0 else {}

    @contextmanager
    def recorded(self, key: str, entries: Row) -> Iterator[None]:
        """What is raised becomes the entry of `key`."""
        try:
            yield
        except Exception as error:
            entries[key] = self.refused(error)

    def refused(self, error: Exception) -> Row:
        if isinstance(error, torch.OutOfMemoryError):
            return {"memory": f"more than {self.protocol.memory_bytes / 2**30:.0f} GiB"}
        if self.device.type == "cuda":
            try:
                torch.cuda.synchronize(self.device)
            except Exception:
                self.broken = True
        return {"failed": reason(error)}

    def free(self) -> None:
        gc.collect()
        if self.device.type == "cuda" and not self.broken:
            torch.cuda.empty_cache()


def refused(entry: Row) -> bool:
    """Whether it has no times."""
    return "failed" in entry or "memory" in entry


def over(theirs: Times, own: Times) -> Row:
    """A peer's times over one's own."""
    return {
        what: Figure.ratio(theirs[what], values).document()
        for what, values in own.items()
        if min(values) > 0
    }


def with_step(times: dict[int, list[float]]) -> Times:
    """Seconds by T, as text, and of one step: what the steps from the shorter T to the longer took, each."""
    found = {str(T): values for T, values in times.items()}
    pairs = zip(times[T_LONG], times[T_SHORT], strict=True)
    return found | {"step": [(long - short) / (T_LONG - T_SHORT) for long, short in pairs]}


def compared(case: Case, theirs: list[Tensor], own: list[Tensor]) -> Row:
    """How far one's own results are from torch.nn's, and "wrong" where that is beyond what both may err."""
    tolerances = truth.tolerance_table()
    table = tolerances.GRADIENT if case.mode == "training" else tolerances.FORWARD
    allowed = 2 * table[torch.float16 if case.dtype == "tf32" else dtype_of(case)]
    found = [tolerances.relative_error(*pair) for pair in zip(own, theirs, strict=True)]
    difference = next((d for d in found if math.isnan(d)), max(found))
    told: Row = {"difference": significant(difference, 2)}
    if not difference <= allowed:  # a NaN must not pass
        told["wrong"] = f"{difference:.1e} from torch.nn's results, allowed {allowed:.0e}"
    return told


def warm(device: torch.device) -> None:
    """Brings the clocks up."""
    size = 4096 if device.type == "cuda" else 64
    a = torch.randn(size, size, device=device)
    spent = 0.0
    while spent < (WARM_SECONDS if device.type == "cuda" else 0.0):
        spent += 10 * seconds(lambda: a @ a, 10, device)


def serve(connection: Connection, device: str, protocol: Protocol) -> None:
    """Answers tasks with rows until the other end is closed; the first message is unasked: the surroundings."""
    if device == "cuda":
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, protocol.memory_bytes / total))
    bench = Bench(device, protocol, lambda what: connection.send({"doing": what}))
    warm(bench.device)
    gc.disable()
    connection.send({"surroundings": surroundings(device)})
    while not bench.broken:
        try:
            task = connection.recv()
        except EOFError:
            return
        connection.send({"row": bench.row(task), "broken": bench.broken})
    sys.exit(1)

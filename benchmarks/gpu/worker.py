"""The process that measures: makes a row of each task it is sent, with rnnkit and torch.nn in turns."""

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
from benchmarks.gpu.grid import T_LONG, T_SHORT, Task
from benchmarks.providers.torch_layers import TorchLayers, computation, dtype_of
from benchmarks.surroundings import surroundings

Row = dict[str, Any]

PROVIDERS = ("torch", "rnnkit")  # torch.nn first: its results are compared with
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
        self.providers = {key: TorchLayers(key, threads, device) for key in PROVIDERS}
        self.broken = False

    def row(self, task: Task) -> Row:
        entries: Row = {}
        row: Row = {"part": task.part, "kind": task.kind, "case": task.case.document()}
        with precision(task.case.dtype):
            try:
                kinds = {"time": self.timed, "error": self.errors, "kernels": self.profiled}
                row["ratios"] = kinds[task.kind](task.case, entries)
            except Exception as error:  # whatever is raised is this row's result
                row["ratios"] = {}
                for key in PROVIDERS:
                    entries[key] = self.refused(error)
        self.free()
        return row | {"entries": {key: entries[key] for key in PROVIDERS}}

    def timed(self, case: Case, entries: Row) -> Row:
        """Times go into `entries`; returns torch.nn's over rnnkit's."""
        tensors = inputs(case, self.device)
        ready: dict[str, Contender] = {}
        firsts: dict[str, list[Tensor]] = {}
        spent = 0.0
        for key, provider in self.providers.items():
            with self.recorded(key, entries):
                self.doing(key)
                entries[key] = {}
                contender = Contender(provider, case, tensors)
                firsts[key] = contender.results(T_SHORT)
                if len(firsts) == len(PROVIDERS):
                    entries[key] |= compared(case, *(firsts.pop(key) for key in PROVIDERS))
                entries[key] |= self.peak(contender)
                spent += contender.calibrate(self.protocol)
                entries[key] |= {"kernel": contender.kernel()} if key == "rnnkit" else {}
                ready[key] = contender
        firsts.clear()
        rounds = max(1, min(self.protocol.rounds, int(self.protocol.case_seconds / (spent or 1))))
        times = self.alternate(ready, rounds, entries)
        for key, of_provider in times.items():
            for what, values in of_provider.items():
                microseconds = Figure.of([1e6 * value for value in values])
                entries[key].setdefault("us", {})[what] = microseconds.document()
        if len(times) < len(PROVIDERS):
            return {}
        return {
            what: Figure.ratio(times["torch"][what], own).document()
            for what, own in times["rnnkit"].items()
            if min(own) > 0
        }

    def alternate(
        self, ready: dict[str, Contender], rounds: int, entries: Row
    ) -> dict[str, dict[str, list[float]]]:
        """Seconds of a call at each T and of a step, by provider, a sample a round; all take turns."""
        times: dict[str, dict[int, list[float]]] = {key: {} for key in ready}
        for number in range(rounds):
            for key in list(times)[:: -1 if number % 2 else 1]:
                self.doing(key)
                with self.recorded(key, entries):
                    for T in ready[key].computations:
                        times[key].setdefault(T, []).append(ready[key].sample(T))
                if refused(entries[key]):
                    del times[key]
        return {key: with_step(of_provider) for key, of_provider in times.items()}

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

    def errors(self, case: Case, entries: Row) -> Row:
        """Norm-relative errors against torch.nn in float64 go into `entries`; returns rnnkit's over torch.nn's."""
        relative_error = truth.tolerance_table().relative_error
        tensors = inputs(case, self.device)
        exact = {key: tensor.double() for key, tensor in tensors.items()}
        in_double = replace(case, dtype="float64")
        module = self.providers["torch"].module(in_double, exact)
        right = computation(in_double, module, exact).once()
        for key, provider in self.providers.items():
            with self.recorded(key, entries):
                self.doing(key)
                found = computation(case, provider.module(case, tensors), tensors).once()
                errors = {
                    what: relative_error(
                        torch.from_numpy(found[what]), torch.from_numpy(right[what])
                    )
                    for what in COMPARED
                }
                entries[key] = {what: significant(error, 3) for what, error in errors.items()}
        if any(refused(entries[key]) for key in PROVIDERS):
            return {}
        pairs = {what: [entries[key][what] for key in ("rnnkit", "torch")] for what in COMPARED}
        return {what: significant(own / peer, 3) for what, (own, peer) in pairs.items() if peer}

    def profiled(self, case: Case, entries: Row) -> Row:
        """Kernels go into `entries`; returns torch.nn's recurrent step over rnnkit's."""
        tensors = inputs(case, self.device)
        for key, provider in self.providers.items():
            with self.recorded(key, entries):
                self.doing(key)
                contender = Contender(provider, case, tensors)
                contender.calibrate(self.protocol)
                found = {T: contender.launched(T) for T in contender.computations}
                entries[key] = kernels.told(found)
        steps = [entries[key].get("recurrent_us", 0) for key in PROVIDERS]
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


def with_step(times: dict[int, list[float]]) -> dict[str, list[float]]:
    """Seconds by T, as text, and of one step: what the steps from the shorter T to the longer took, each."""
    found = {str(T): values for T, values in times.items()}
    pairs = zip(times[T_LONG], times[T_SHORT], strict=True)
    return found | {"step": [(long - short) / (T_LONG - T_SHORT) for long, short in pairs]}


def compared(case: Case, theirs: list[Tensor], own: list[Tensor]) -> Row:
    """How far rnnkit's results are from torch.nn's, and "wrong" where that is beyond what both may err."""
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

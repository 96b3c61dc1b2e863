"""One line: its entries are checked against the truth, then timed in turns."""

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import roofline
from benchmarks.cases import FROZEN, PACKING, WITH_MEMORY, Case, Entry, Line
from benchmarks.figures import TRUSTED_ROUNDS, Figure, significant
from benchmarks.pool import Pool

Row = dict[str, Any]
Times = dict[str, list[float]]

REFUSALS = ("unsupported", "wrong", "failed")
BASELINE = "rnnkit"
TRUTH = "truth"  # the worker that computes it and compares with it
MEMORY = ("torch", "rnnkit")  # these have a worker "memory ..." too


@dataclass(frozen=True)
class Protocol:
    """How long is measured.

    sample_seconds: of one entry in one round, at least one call.
    line_seconds: of a line's rounds, of which there are `least_rounds` to `most_rounds`.
    again_seconds: for all lines together that are timed once more since they were noisy.
    rest_seconds: the threads of one must have slept as long before the next has its turn.
    peak_seconds: of the machine's peak in each round.
    bandwidth_seconds: of reading from each cache, once a run.
    memory_calls: of each entry, for its peak memory.
    """

    sample_seconds: float = 0.03
    line_seconds: float = 1.2
    least_rounds: int = TRUSTED_ROUNDS
    most_rounds: int = 15
    again_seconds: float = 40.0
    rest_seconds: float = 0.008  # two ticks of the kernel, which counts CPU time by them
    peak_seconds: float = 0.02
    bandwidth_seconds: float = 0.5
    memory_calls: int = TRUSTED_ROUNDS


QUICK = Protocol(sample_seconds=0.01, line_seconds=0.25, again_seconds=0.0)


def refusal(answer: Row) -> Row | None:
    """Why there is no answer."""
    return next(({kind: answer[kind]} for kind in REFUSALS if kind in answer), None)


class NoTruth(Exception):
    """The results in float64 could not be had; the message says why."""


class Meter:
    """Measures lines with the workers in `pool`; `folder` is for their files."""

    def __init__(self, pool: Pool, protocol: Protocol, folder: Path) -> None:
        self.pool, self.protocol, self.folder = pool, protocol, folder
        self.again_seconds = protocol.again_seconds
        self.bandwidth: roofline.Bandwidth | None = None

    def measure_bandwidth(self) -> None:
        """Of this machine's caches, which rooflines need; None where rnnkit has no extension to measure it."""
        if self.pool.has(BASELINE):
            seconds = self.protocol.bandwidth_seconds
            answer = self._turn(BASELINE, "bandwidth", seconds=seconds)
            self.bandwidth = answer.get("bandwidth")

    def row(self, line: Line) -> Row:
        """A line of the results file."""
        entries = {n: entry for n, entry in line.entries.items() if self.pool.has(entry.worker)}
        row: Row = {"group": line.group, "case": line.case.document()}
        try:
            row |= self._measured(line, entries, dict(self._truths(entries)))
        except NoTruth as error:
            row["entries"] = {name: {"failed": str(error)} for name in entries}
        self.pool.forget()
        shutil.rmtree(self.folder, ignore_errors=True)
        return row

    def _measured(self, line: Line, entries: dict[str, Entry], folders: dict[Case, Path]) -> Row:
        row: Row = {"entries": {}}
        seconds: dict[str, float] = {}
        for name, entry in entries.items():
            answer = self._ready(name, entry, folders[entry.case.plain])
            if refused := refusal(answer):
                row["entries"][name] = refused
            else:
                seconds[name] = answer["seconds"]
                row["entries"][name] = {"error": significant(answer["error"], 2)}
        if seconds:
            ready = {name: entries[name] for name in seconds}
            row |= self._timed(line, ready, sum(seconds.values()), row["entries"])
        if line.group in WITH_MEMORY:
            row["memory"] = self._memory(line, folders)
        return row

    def _truths(self, entries: dict[str, Entry]) -> Iterator[tuple[Case, Path]]:
        for case in dict.fromkeys(entry.case.plain for entry in entries.values()):
            folder = self.folder / str(case)
            folder.mkdir(parents=True)
            answer = self.pool.ask(TRUTH, "truth", case=case.document(), folder=str(folder))
            if refused := refusal(answer):
                raise NoTruth(f"{case} by torch.nn in float64: {refused}")
            yield case, folder

    def _ready(self, name: str, entry: Entry, folder: Path) -> Row:
        """Seconds of a sample and the error of the results, or the reason why not."""
        given = {"case": entry.case.document(), "folder": str(folder)}
        results = str(folder / f"{name.replace('/', '-')}.npz")
        answer = self.pool.ask(entry.worker, "prepare", entry=name, results=results, **given)
        if refusal(answer):
            return answer
        verified = self.pool.ask(TRUTH, "verify", results=results, **given)
        if refusal(verified):
            return verified
        seconds = self.protocol.sample_seconds
        return verified | self._turn(entry.worker, "calibrate", entry=name, seconds=seconds)

    def _turn(self, worker: str, command: str, **arguments: Any) -> Row:
        return self.pool.ask_in_turn(worker, command, self.protocol.rest_seconds, **arguments)

    def _timed(
        self, line: Line, ready: dict[str, Entry], round_seconds: float, entries: Row
    ) -> Row:
        """Ratios, share of the peak, rounds; times go into `entries`."""
        protocol = self.protocol
        round_seconds += 2 * len(ready) * protocol.rest_seconds + protocol.peak_seconds
        rounds = int(protocol.line_seconds / round_seconds)
        rounds = max(protocol.least_rounds, min(rounds, protocol.most_rounds))
        attempts = 0
        while True:
            start = time.perf_counter()
            times, peaks = self._alternate(line, ready, rounds)
            compared = Comparison.of(line.case, times, peaks)
            attempts += 1
            spent = time.perf_counter() - start
            if not compared.noisy or rounds < TRUSTED_ROUNDS or spent > self.again_seconds:
                break
            self.again_seconds -= spent
        for name, values in times.items():
            figure = Figure.of([1e3 * value for value in values])
            entries[name]["ms"] = figure.document()
            gflops = ready[name].case.flops / figure.median / 1e6
            entries[name]["gflops"] = significant(gflops)
        for name in ready.keys() - times.keys():
            entries[name] = {"failed": "its process ended while it was timed"}
        return {"attempts": attempts, **compared.document(), **self._roofline(line, compared)}

    def _roofline(self, line: Line, compared: "Comparison") -> Row:
        if not (compared.peak and self.bandwidth):
            return {}
        threads = self.pool.jobs[BASELINE].threads
        peak = compared.peak.median
        return {"roofline": roofline.bounds(line.case, threads, peak, self.bandwidth)}

    def _alternate(
        self, line: Line, ready: dict[str, Entry], rounds: int
    ) -> tuple[Times, list[float]]:
        """Seconds of one call by each entry, and the machine's GFLOP/s, a sample a round; all take turns."""
        times: Times = {name: [] for name in ready}
        peaks: list[float] = []
        for number in range(rounds):
            for name in list(times)[:: -1 if number % 2 else 1]:
                answer = self._turn(ready[name].worker, "sample", entry=name)
                if refusal(answer):
                    del times[name]
                else:
                    times[name].append(answer["seconds"])
            if line.group == "cases" and BASELINE in times:
                peaks += self._peak(line.case.dtype)
        return times, peaks if len(peaks) == rounds else []

    def _peak(self, dtype: str) -> list[float]:
        seconds = self.protocol.peak_seconds
        answer = self._turn(BASELINE, "peak", dtype=dtype, seconds=seconds)
        return [answer["gflops"]] if "gflops" in answer else []

    def _memory(self, line: Line, folders: dict[Case, Path]) -> Row:
        """Peak bytes beside inputs, outputs and parameters, in processes of their own."""
        found: Row = {}
        # torch.nn's layers have no layer normalization: the loop that stands for them is among the entries.
        asked = [] if line.case.norm else [("torch", "torch", line.case)]
        asked += [(name, entry.worker, entry.case) for name, entry in line.entries.items()]
        for name, worker, case in asked:
            if worker not in MEMORY or not self.pool.has(f"memory {worker}"):
                continue
            given = {"folder": str(folders[case.plain]), "calls": self.protocol.memory_calls}
            answer = self.pool.ask(f"memory {worker}", "memory", case=case.document(), **given)
            refused = refusal(answer)
            found[name] = refused or {"bytes": Figure.of(answer["bytes"]).document()}
        return found


class Comparison(NamedTuple):
    """What a line is for.

    ratios: every entry's time over rnnkit's; frozen: of those that pack weights ahead over rnnkit's that does so, too.
    seconds, peak, share: rnnkit's own time, the machine's GFLOP/s, and what share of them rnnkit reaches.
    """

    ratios: dict[str, Figure]
    frozen: dict[str, Figure]
    seconds: Figure | None = None
    peak: Figure | None = None
    share: Figure | None = None

    @classmethod
    def of(cls, case: Case, times: Times, peaks: list[float]) -> "Comparison":
        own = times.get(BASELINE)
        if own is None:
            return cls({}, {})
        others = {name: values for name, values in times.items() if name != BASELINE}
        ratios = {name: Figure.ratio(values, own) for name, values in others.items()}
        frozen = {}
        if FROZEN in times:
            packing = [name for name in PACKING if name in times]
            frozen = {name: Figure.ratio(times[name], times[FROZEN]) for name in packing}
        if not peaks:
            return cls(ratios, frozen, Figure.of(own))
        gflops = [case.flops / value / 1e9 for value in own]
        return cls(ratios, frozen, Figure.of(own), Figure.of(peaks), Figure.ratio(gflops, peaks))

    @property
    def noisy(self) -> bool:
        ratios = (*self.ratios.values(), *self.frozen.values())
        return any(f.noisy for f in (*ratios, self.seconds, self.peak, self.share) if f)

    def document(self) -> Row:
        row: Row = {"ratios": {name: figure.document() for name, figure in self.ratios.items()}}
        if self.frozen:
            row["frozen"] = {name: figure.document() for name, figure in self.frozen.items()}
        return row | {
            name: figure.document()
            for name, figure in (("peak", self.peak), ("share", self.share))
            if figure
        }

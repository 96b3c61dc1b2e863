"""A provider's process: answers one request after the other, so that it sleeps while others are timed.

A request is a line of JSON on stdin, {"command": ..., arguments}; the answer a line on what was stdout. It
has "unsupported", "wrong" or "failed" with the reason where there is none. The first line is unasked: the
provider's versions, or why it is unavailable.
"""

import argparse
import gc
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import memory, roofline, truth
from benchmarks.cases import Case
from benchmarks.providers import Computation, Provider, Unsupported, load

Answer = dict[str, Any]

PARTS = 5  # of a sample; their median is not moved by one interruption


class Server:
    """Prepared computations by their entry's name, and the commands on them."""

    def __init__(self, provider: Provider, threads: int) -> None:
        self.provider, self.threads = provider, threads
        self.computations: dict[str, Computation] = {}
        self.repetitions: dict[str, int] = {}

    def seconds(self, entry: str, repetitions: int) -> float:
        """Of one call, by the mean of `repetitions`."""
        call, _, around = self.computations[entry]
        with around():
            start = time.perf_counter()
            for _ in range(repetitions):
                call()
            self.provider.synchronize()
            return (time.perf_counter() - start) / repetitions

    def truth(self, case: Answer, folder: str) -> Answer:
        truth.write(Case(**case), Path(folder), self.threads)
        return {}

    def verify(self, case: Answer, folder: str, results: str) -> Answer:
        return {"error": truth.largest_error(Case(**case), Path(folder), Path(results))}

    def prepare(self, entry: str, case: Answer, folder: str, results: str) -> Answer:
        """Computes once and writes what comes out."""
        with np.load(Path(folder) / "inputs.npz") as arrays:
            computation = self.provider.prepare(Case(**case), dict(arrays))
        np.savez(results, **computation.once())
        self.computations[entry] = computation
        return {}

    def calibrate(self, entry: str, seconds: float) -> Answer:
        """Warms up and finds how many calls fill `seconds`."""
        repetitions = 1
        each = self.seconds(entry, 1)
        while each * repetitions < seconds / 4:
            repetitions *= 2
            each = self.seconds(entry, repetitions)
        self.repetitions[entry] = math.ceil(seconds / each)
        return {"seconds": self.repetitions[entry] * each}

    def sample(self, entry: str) -> Answer:
        """Seconds of one call; short ones are called once before, since others ran in between."""
        repetitions = self.repetitions[entry]
        if repetitions > 1:
            self.seconds(entry, 1)
        parts = min(PARTS, repetitions)
        each = math.ceil(repetitions / parts)
        return {"seconds": statistics.median(self.seconds(entry, each) for _ in range(parts))}

    def peak(self, dtype: str, seconds: float) -> Answer:
        """GFLOP/s of multiplying and adding in registers, the most that matrix products can reach here."""
        import torch

        measure = self.extension("peak_gflops").peak_gflops
        return {"gflops": measure(getattr(torch, dtype), self.threads, seconds)}

    def bandwidth(self, seconds: float) -> Answer:
        """Bytes a second from each cache, measured for `seconds` each."""
        extension = self.extension("read_bandwidth")
        return {"bandwidth": roofline.measure(extension, self.threads, seconds)}

    @staticmethod
    def extension(needed: str) -> Any:
        """rnnkit's compiled extension, which has `needed`."""
        from rnnkit import backends

        if not hasattr(backends.EXTENSION, needed):
            raise Unsupported(f"rnnkit was built without {needed}")
        return backends.EXTENSION

    def memory(self, case: Answer, folder: str, calls: int) -> Answer:
        with np.load(Path(folder) / "inputs.npz") as arrays:
            computation = self.provider.prepare(Case(**case), dict(arrays))
        return {"bytes": memory.peaks(computation, calls)}

    def forget(self) -> Answer:
        self.computations.clear()
        self.repetitions.clear()
        gc.collect()
        return {}


def answer(server: Server, request: Answer) -> Answer:
    command: Callable[..., Answer] = getattr(server, request.pop("command"))
    try:
        return command(**request)
    except Unsupported as error:
        return {"unsupported": str(error)}
    except truth.WrongResult as error:
        return {"wrong": str(error)}
    except Exception as error:  # whatever a library raises is this line's result
        return {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("provider")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--package", required=True, help="folder from which rnnkit is imported")
    options = parser.parse_args()
    sys.path.insert(0, options.package)
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer

    def reply(message: Answer) -> None:
        replies.write(json.dumps(message) + "\n")

    try:
        provider = load(options.provider, options.threads, options.device)
    except Exception as error:  # whatever a library raises where it does not load
        reply({"unavailable": f"{type(error).__name__}: {error}".splitlines()[0]})
        return
    reply({"versions": provider.versions()})
    server = Server(provider, options.threads)
    gc.disable()
    for line in sys.stdin:
        reply(answer(server, json.loads(line)))


if __name__ == "__main__":
    main()

"""Which kernels a call launches and how long each runs, by torch's profiler.

Of the recurrent kernels alone, that is without the products of the whole sequence, no clock outside tells.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.figures import significant
from benchmarks.gpu.grid import T_LONG, T_SHORT

CALLS = 3
TOLD = 6  # kernels that take the longest
NAME_LENGTH = 100
OWN = "rnnkit::"  # in the names of its kernels

#: Launches a call and microseconds a call, by the kernel's name.
Launched = dict[str, tuple[float, float]]


def launched(call: Callable[[], Any], device: torch.device) -> Launched:
    """By the mean of a few calls."""
    on_cuda = device.type == "cuda"
    activity = ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU
    kind = DeviceType.CUDA if on_cuda else DeviceType.CPU
    with profile(activities=[activity]) as profiler:
        for _ in range(CALLS):
            call()
        if on_cuda:
            torch.cuda.synchronize(device)
    found: Launched = {}
    for event in profiler.events() or ():
        if event.device_type == kind:
            count, spent = found.get(event.name, (0.0, 0.0))
            each = event.time_range.elapsed_us() / CALLS
            found[event.name] = count + 1 / CALLS, spent + each
    return found


def recurrent(found: Launched, T: int) -> float:
    """Microseconds of rnnkit's kernels and of those that are launched in every step."""
    return sum(spent for name, (count, spent) in found.items() if OWN in name or count >= T)


def told(by_T: dict[int, Launched]) -> dict[str, Any]:
    """The part of a row: launches of a call, microseconds of a recurrent step, the longest kernels."""
    steps = [recurrent(by_T[T], T) for T in (T_SHORT, T_LONG)]
    longest = sorted(by_T[T_LONG].items(), key=lambda item: -item[1][1])[:TOLD]
    return {
        "launches": {str(T): round(sum(n for n, _ in found.values())) for T, found in by_T.items()},
        "recurrent_us": significant((steps[1] - steps[0]) / (T_LONG - T_SHORT)),
        "longest": [
            {"kernel": name[:NAME_LENGTH], "launches": round(count), "us": significant(spent)}
            for name, (count, spent) in longest
        ],
    }

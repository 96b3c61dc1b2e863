"""How calls are timed on a device, by CUDA's events or, in tests, on the CPU; and with which precision."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.figures import TRUSTED_ROUNDS


@dataclass(frozen=True)
class Protocol:
    """How long is measured.

    sample_seconds: of one provider at one T in one round, at least one call.
    lead_seconds: a call that takes no longer is made once before the first event, so that launches of what
        is timed are queued behind it, as in a user's loop.
    case_seconds: all samples of a case take no longer, if need be in fewer rounds.
    memory_bytes: what the process may take of the device.
    """

    sample_seconds: float = 0.003
    lead_seconds: float = 0.02
    rounds: int = TRUSTED_ROUNDS
    case_seconds: float = 2.0
    memory_bytes: int = 24 * 2**30


def seconds(
    call: Callable[[], Any], repetitions: int, device: torch.device, lead: bool = False
) -> float:
    """Of one call, by the mean of `repetitions`."""
    if lead:
        call()
    if device.type != "cuda":
        begin = time.perf_counter()
        for _ in range(repetitions):
            call()
        return (time.perf_counter() - begin) / repetitions
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repetitions):
        call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / repetitions


@contextmanager
def precision(dtype: str) -> Iterator[None]:
    """torch's TF32 switches: both on for `tf32`, both off for all else, and off afterwards.

    They are not read, since torch refuses that where its newer switches were set beside these.
    """
    try:
        _allow_tf32(dtype == "tf32")
        yield
    finally:
        _allow_tf32(False)


def _allow_tf32(allowed: bool) -> None:
    torch.backends.cudnn.allow_tf32 = allowed
    torch.backends.cuda.matmul.allow_tf32 = allowed

"""`rnnkit.Readout.loss` beside F.cross_entropy(F.linear(...)): time and memory of the loss and its gradients.

    python -m benchmarks.readout [--steps 512 --batch 32 --hidden 256 --classes 50000 --rounds 5]

Prints the ratios of both. The ways to compute it take turns in one process; times are medians. Memory is what a call
needs at its worst moment beside its arguments and the gradients, in a process whose allocator gives freed memory back.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

import rnnkit
from benchmarks import memory

ALL = "all logits"
SIZES = {"steps": 512, "batch": 32, "hidden": 256, "classes": 50_000, "rounds": 5, "threads": 2}
Runs = dict[str, Callable[[], tuple[Tensor, ...]]]


def all_logits(head: rnnkit.Readout, h: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(functional.linear(h, head.weight, head.bias), targets)


def torchs_chunks(head: rnnkit.Readout, h: Tensor, targets: Tensor, chunk: int | None) -> Tensor:
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=chunk)
    return functional.linear_cross_entropy(
        h, head.weight, targets, linear_bias=head.bias, options=options
    )


def gradients(
    loss: Callable[..., Tensor], head: rnnkit.Readout, *rows: Tensor
) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss(head, *rows), [rows[0], *head.parameters()])


def runs(given: argparse.Namespace) -> Runs:
    """A function for each way, which computes the loss and returns its gradients."""
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, given.dtype)
    head = rnnkit.Readout(given.hidden, given.classes, dtype=dtype)
    h = torch.randn(given.steps * given.batch, given.hidden, dtype=dtype, requires_grad=True)
    targets = torch.randint(given.classes, h.shape[:1])
    losses = {ALL: all_logits, "Readout.loss": partial(rnnkit.Readout.loss, chunk=given.chunk)}
    if given.torchs_chunks:
        losses["torch's chunks"] = partial(torchs_chunks, chunk=given.chunk)
    return {name: partial(gradients, loss, head, h, targets) for name, loss in losses.items()}


def peak(run: Callable[[], tuple[Tensor, ...]]) -> int:
    """Bytes at the worst moment, less those of the gradients."""
    memory.give_back()
    memory.CLEAR.write_text(memory.RESET_PEAK)
    before = memory.resident("VmRSS")
    returned = sum(grad.nbytes for grad in run())
    return memory.resident("VmHWM") - before - returned


def measure_memory(all_runs: Runs) -> None:
    peaks = {name: peak(run) for name, run in all_runs.items()}
    for name, size in peaks.items():
        print(f"{name:16} {size / 2**20:8.0f} MiB  {size / peaks[ALL]:6.3f}")


def measure_time(all_runs: Runs, rounds: int) -> None:
    times: dict[str, list[float]] = {name: [] for name in all_runs}
    for _ in range(1 + rounds):
        for name, run in all_runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(seconds[1:]) for name, seconds in times.items()}
    for name, median in medians.items():
        each = " ".join(f"{seconds:.3f}" for seconds in times[name][1:])
        print(f"{name:16} {median:8.3f} s    {median / medians[ALL]:6.3f}   each: {each}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, size in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--chunk", type=int, help="rows in a chunk; each way's default if absent")
    dtypes = ["float32", "float64", "bfloat16", "float16"]
    parser.add_argument("--dtype", default="float32", choices=dtypes)
    parser.add_argument(
        "--torchs-chunks", action="store_true", help="F.linear_cross_entropy as well (torch 2.13)"
    )
    parser.add_argument("--memory", action="store_true", help="measures only memory, here")
    given = parser.parse_args()
    if given.memory:
        measure_memory(runs(given))
        return
    print(
        f"{given.steps * given.batch} rows, H {given.hidden}, C {given.classes}, {given.dtype}, "
        f"{given.threads} threads",
        flush=True,
    )
    measure_time(runs(given), given.rounds)
    sys.stdout.flush()
    command = [sys.executable, "-m", "benchmarks.readout", *sys.argv[1:], "--memory"]
    subprocess.run(command, env={**os.environ, **memory.ENVIRONMENT}, check=True)


if __name__ == "__main__":
    main()

"""`rnnkit.Readout.loss` beside F.cross_entropy(F.linear(...)): time and memory of the loss and its gradients.

    python -m benchmarks.readout [--steps 512 --batch 32 --hidden 256 --classes 50000 --rounds 5]

Prints the ratios of both; `python -m benchmarks` has them in its results file. The ways to compute it take turns in one
process; times are medians. Memory is what a call needs at its worst moment beside its arguments and the gradients, in a
process whose allocator gives freed memory back.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import rnnkit
from benchmarks import memory
from benchmarks.figures import Figure
from benchmarks.pool import ROOT

ALL, OWN = "all logits", "Readout.loss"
KINDS = {"ms": "{:.0f} ms", "MiB": "{:.0f} MiB"}
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
    losses = {ALL: all_logits, OWN: partial(rnnkit.Readout.loss, chunk=given.chunk)}
    if given.torchs_chunks:
        losses["torch's chunks"] = partial(torchs_chunks, chunk=given.chunk)
    return {name: partial(gradients, loss, head, h, targets) for name, loss in losses.items()}


def peak(run: Callable[[], tuple[Tensor, ...]]) -> float:
    """MiB at the worst moment, less those of the gradients."""
    most, grads = memory.peak(run)
    return (most - sum(grad.nbytes for grad in grads)) / 2**20


def duration(run: Callable[[], tuple[Tensor, ...]]) -> float:
    """Milliseconds."""
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def samples(given: argparse.Namespace) -> dict[str, list[float]]:
    """What `given.only` asks for of each way, a sample a round; all take turns."""
    measure = duration if given.only == "ms" else peak
    all_runs = runs(given)
    found: dict[str, list[float]] = {name: [] for name in all_runs}
    for _ in range(1 + given.rounds):
        for name, run in all_runs.items():
            found[name].append(measure(run))
    return {name: values[1:] for name, values in found.items()}


def measured(arguments: Sequence[str]) -> dict[str, Any]:
    """Milliseconds and MiB of each way, and the ratios to `ALL`; each kind from a process of its own."""
    told: dict[str, Any] = {}
    package = Path(rnnkit.__file__).resolve().parents[1]
    importable = {"PYTHONPATH": os.pathsep.join(map(str, [package, ROOT]))}
    for kind in KINDS:
        environment = importable | (memory.ENVIRONMENT if kind == "MiB" else {})
        command = [sys.executable, "-m", "benchmarks.readout", *arguments, "--only", kind]
        done = subprocess.run(
            command, env={**os.environ, **environment}, check=True, stdout=subprocess.PIPE
        )
        found = json.loads(done.stdout)
        told[kind] = {
            name: {
                "figure": Figure.of(values).document(),
                "ratio": Figure.ratio(values, found[ALL]).document(),
            }
            for name, values in found.items()
        }
    return told


def document(threads: int) -> dict[str, Any]:
    """What a results file says of the ordinary sizes."""
    arguments = ["--threads", str(threads)]
    case = described(parse(arguments))
    try:
        return {"case": case, **measured(arguments)}
    except subprocess.CalledProcessError as error:  # all logits need 7 GiB
        return {"case": case, "failed": f"exit status {error.returncode}"}


def text(sizes: str, told: dict[str, Any]) -> str:
    lines = [sizes]
    for kind, form in KINDS.items():
        for name, of_way in told[kind].items():
            ratio = Figure.read(of_way["ratio"]).text("{:.3f}×")
            lines.append(f"{name:16} {Figure.read(of_way['figure']).text(form):>12}  {ratio}")
    return "\n".join(lines)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, size in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--chunk", type=int, help="rows in a chunk; each way's default if absent")
    dtypes = ["float32", "float64", "bfloat16", "float16"]
    parser.add_argument("--dtype", default="float32", choices=dtypes)
    parser.add_argument(
        "--torchs-chunks", action="store_true", help="F.linear_cross_entropy as well (torch 2.13)"
    )
    parser.add_argument("--only", choices=KINDS, help="measures this here, and prints samples")
    return parser.parse_args(arguments)


def described(given: argparse.Namespace) -> str:
    return f"T{given.steps} N{given.batch} H{given.hidden} C{given.classes}, {given.dtype}"


def main() -> None:
    given = parse(sys.argv[1:])
    if given.only:
        print(json.dumps(samples(given)))
        return
    sizes = f"{described(given)}, {given.threads} threads"
    print(text(sizes, measured(sys.argv[1:])))


if __name__ == "__main__":
    main()

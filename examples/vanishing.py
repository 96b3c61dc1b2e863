"""Vanishing and exploding gradients, and their cures, on two tasks that need a long memory.

    python examples/vanishing.py                      under two minutes; writes vanishing.png
    python examples/vanishing.py --steps 300 --seconds 1200 --plot long.png

- Adding (Hochreiter & Schmidhuber 1997): of a sequence of random numbers two are marked; the target is their sum. A
  network that ignores the input has a mean square error of 0.167.
- Copying: ten symbols, then blanks; at the end the symbols are to be repeated. A network without memory has a cross
  entropy of log 8 = 2.08 nats a symbol.

A tanh RNN, an IRNN (Le et al. 2015), a GRU, an LSTM and an LSTM with chrono initialization (Tallec & Ollivier 2018) are
trained on each, for the same time; the IRNN also without clipping its gradients. The picture has the losses and, by
`rnnkit.gradient_flow`, the norms of gradients on their way back through time: those of the last step's output before
the training, and of the IRNN that is not clipped those of the loss at the update with the largest gradient. What to
look for (how far a network gets in the time depends on the machine, too: see `--seconds`):

- The tanh RNN's gradients vanish within tens of steps, and it does not learn to add.
- The IRNN's keep their size, and it learns slowly. If they are not clipped, some explode during the training: they grow
  on their way back, and the loss jumps.
- The GRU's and the LSTM's gradients vanish at first, too, but training can open their gates. The GRU learns to add
  first; the LSTM takes longest.
- Chrono initialization opens the LSTM's gates from the start, so that gradients reach as far back as the task is long.
  This LSTM learns to add long before the other one, and is the first to learn to copy.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import rnnkit

SYMBOLS, COPIED = 8, 10


@dataclass
class Network:
    """One way to build and train a network.

    Attributes:
        name: what the picture says.
        layer: builds the layer, of input size and hidden size, for sequences of a length.
        rate: Adam's learning rate.
        clip: whether the norm of the gradient is clipped to 1.
        losses: (seconds of training, loss), smoothed.
        flow: the norm of dL/dh at each time step: of the last step's output before the training or, if gradients are
            not clipped, of the loss at the update with the largest gradient.
        largest: the norm of all parameters' gradients at that update.
    """

    name: str
    layer: Callable[[int, int, int], nn.Module]
    rate: float = 1e-2
    clip: bool = True
    losses: list[tuple[float, float]] = field(default_factory=list)
    flow: list[float] = field(default_factory=list)
    largest: float = 0.0


def networks() -> list[Network]:
    """A tanh RNN, an IRNN with and without clipping, and the gated ones."""

    def rnn(inputs: int, hidden: int, steps: int) -> nn.Module:
        return rnnkit.RNN(inputs, hidden)

    def irnn(inputs: int, hidden: int, steps: int) -> nn.Module:
        return rnnkit.RNN(inputs, hidden, nonlinearity="relu", init="identity")

    def gru(inputs: int, hidden: int, steps: int) -> nn.Module:
        return rnnkit.GRU(inputs, hidden)

    def lstm(inputs: int, hidden: int, steps: int) -> nn.Module:
        return rnnkit.LSTM(inputs, hidden)

    def chrono(inputs: int, hidden: int, steps: int) -> nn.Module:
        return rnnkit.LSTM(inputs, hidden, init=partial(rnnkit.init.chrono_, t_max=steps))

    return [
        Network("RNN, tanh", rnn),
        Network("IRNN", irnn, rate=1e-3),
        Network("IRNN, not clipped", irnn, rate=1e-3, clip=False),
        Network("GRU", gru),
        Network("LSTM", lstm),
        Network("LSTM, chrono", chrono),
    ]


@dataclass(frozen=True)
class Task:
    """A task: batches, the sizes of input and output, the loss, and the loss of a network without memory."""

    name: str
    unit: str
    inputs: int
    outputs: int
    batch: Callable[[int, int], tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]
    without_memory: float
    scale: str  #: of the loss's axis


def adding(steps: int, batch: int) -> tuple[Tensor, Tensor]:
    """Input [T, N, 2], numbers and marks; target [N], the sum of the marked numbers."""
    numbers = torch.rand(steps, batch)
    marks = torch.zeros(steps, batch)
    half = steps // 2
    for low, high in ((0, half), (half, steps)):
        marks.scatter_(0, torch.randint(low, high, (1, batch)), 1.0)
    return torch.stack([numbers, marks], -1), (numbers * marks).sum(0)


def copying(steps: int, batch: int) -> tuple[Tensor, Tensor]:
    """Input [T, N, 10] one-hot: symbols, blanks, a signal and blanks; target [10, N], the symbols."""
    symbols = torch.randint(SYMBOLS, (COPIED, batch))
    codes = torch.full((steps, batch), SYMBOLS)
    codes[:COPIED] = symbols
    codes[-COPIED - 1] = SYMBOLS + 1
    return functional.one_hot(codes, SYMBOLS + 2).float(), symbols


def adding_loss(output: Tensor, target: Tensor) -> Tensor:
    return functional.mse_loss(output[-1, :, 0], target)


def copying_loss(output: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(output[-COPIED:].flatten(0, 1), target.flatten())


TASKS = (
    Task("adding", "mean square error", 2, 1, adding, adding_loss, 1 / 6, "log"),
    Task(
        "copying",
        "cross entropy [nats]",
        SYMBOLS + 2,
        SYMBOLS,
        copying,
        copying_loss,
        math.log(SYMBOLS),
        "linear",
    ),
)


class Model(nn.Module):
    """A recurrent layer and a linear one."""

    def __init__(self, layer: nn.Module, hidden: int, outputs: int) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """[T, N, inputs] -> [T, N, outputs]."""
        return self.head(self.layer(x)[0])


def train(
    network: Network, task: Task, options: argparse.Namespace, seconds: float
) -> Iterator[float]:
    """Trains for so many seconds; yields the seconds that have passed."""
    torch.manual_seed(options.seed)
    model = Model(
        network.layer(task.inputs, options.hidden, options.steps), options.hidden, task.outputs
    )
    x, target = task.batch(options.steps, options.batch)
    with rnnkit.gradient_flow(model) as flow:
        model(x)[-1].sum().backward()
    network.flow = flow["layer"].h[0, 0].tolist()
    optimizer = torch.optim.Adam(model.parameters(), options.rate or network.rate, fused=True)
    smoothed, start = None, time.perf_counter()
    while (passed := time.perf_counter() - start) < seconds:
        x, target = task.batch(options.steps, options.batch)
        loss = task.loss(model(x), target)
        optimizer.zero_grad()
        with nullcontext() if network.clip else flow:
            loss.backward()
        if network.clip:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        else:
            norm = float(nn.utils.get_total_norm([p.grad for p in model.parameters()]))
            if norm > network.largest:
                network.largest, network.flow = norm, flow["layer"].h[0, 0].tolist()
        optimizer.step()
        value = float(loss.detach())
        smoothed = value if smoothed is None else 0.95 * smoothed + 0.05 * value
        network.losses.append((passed, smoothed))
        yield passed


def draw(results: dict[str, list[Network]], options: argparse.Namespace) -> Any:
    """The losses of each task above, the norms of the gradients below."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        2, len(TASKS), figsize=(12, 8), layout="constrained", squeeze=False
    )
    colors = {network.name: f"C{index}" for index, network in enumerate(networks())}
    for column, task in enumerate(TASKS):
        losses, norms = axes[0][column], axes[1][column]
        for network in results[task.name]:
            style = {"color": colors[network.name], "linestyle": "-" if network.clip else ":"}
            losses.plot(*zip(*network.losses, strict=True), label=network.name, **style)
            name = network.name if network.clip else f"{network.name}: largest update"
            norms.plot(range(len(network.flow)), network.flow[::-1], label=name, **style)
        losses.axhline(task.without_memory, color="gray", linewidth=1)
        losses.annotate(
            "without memory",
            (1, task.without_memory),
            xycoords=("axes fraction", "data"),
            color="gray",
            ha="right",
            va="bottom",
            fontsize=8,
        )
        losses.set(
            title=f"{task.name}, {options.steps} steps", xlabel="training [s]", ylabel=task.unit
        )
        losses.set_yscale(task.scale)
        norms.set(
            title="gradients on their way back through time",
            xlabel="distance from the last step [steps]",
            ylabel="norm of dL/dh",
        )
        norms.set_yscale("log")
        for each in (losses, norms):
            each.grid(alpha=0.3)
            each.legend(fontsize=8)
    return figure


def main(arguments: list[str] | None = None) -> int:
    """Trains all networks on both tasks, prints what came out, and draws it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--steps", type=int, default=100, help="T, at least 30 (default: %(default)s)"
    )
    parser.add_argument("--batch", type=int, default=32, help="N (default: %(default)s)")
    parser.add_argument("--hidden", type=int, default=64, help="H (default: %(default)s)")
    parser.add_argument(
        "--rate", type=float, help="learning rate of Adam (default: 0.01, of an IRNN 0.001)"
    )
    parser.add_argument(
        "--seconds", type=float, default=108, help="of training, altogether (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--plot", default="vanishing.png", help="where the picture goes (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    if options.steps < 3 * COPIED:
        parser.error(f"argument --steps: expected at least {3 * COPIED}, got {options.steps}")
    if not options.seconds > 0:
        parser.error(f"argument --seconds: expected more than 0, got {options.seconds}")
    if importlib.util.find_spec("matplotlib") is None:
        parser.error("the picture needs matplotlib: pip install matplotlib")
    results = {task.name: networks() for task in TASKS}
    runs = [(task, network) for task in TASKS for network in results[task.name]]
    each = options.seconds / len(runs)
    shown = sys.stderr.isatty()
    for number, (task, network) in enumerate(runs):
        for passed in train(network, task, options, each):
            if shown:
                share = (number + min(1.0, passed / each)) / len(runs)
                bar = "#" * round(40 * share)
                print(
                    f"\r[{bar:<40}] {share:4.0%}  {task.name}: {network.name:<24}",
                    end="",
                    file=sys.stderr,
                )
    if shown:
        print(file=sys.stderr)
    for task in TASKS:
        print(
            f"{task.name}, {options.steps} steps; {task.unit}, {task.without_memory:.3f} without memory"
        )
        for network in results[task.name]:
            far, near = network.flow[0], network.flow[-1]
            print(
                f"  {network.name:<24} {network.losses[-1][1]:10.4f} after {len(network.losses)} updates; dL/dh "
                f"{near:.1e} at the last step, {far:.1e} at the first{'' if network.clip else ', largest update'}"
            )
    draw(results, options).savefig(options.plot, dpi=120)
    print(f"{options.plot}: the losses, and the gradients' way back through time")
    return 0


if __name__ == "__main__":
    sys.exit(main())

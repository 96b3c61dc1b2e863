"""Times rnnkit's layers against torch.nn's on the CPU in float32: inference, and a training step.

    python benchmarks/speed.py                                  every case, in a minute or two
    python benchmarks/speed.py --cells gru --case 50,4,256      one cell, at sizes of your own

Both run in this one process on equally many threads and take turns, round by round, so that both meet
the same machine. Nothing is timed before its results, on the very inputs, agree with torch.nn's in
float64. Writes a file under benchmarks/results/, of which benchmarks/report.py makes the README's table.
The exit status is 1 if a result is wrong; a missed target is told in the table.
"""

import argparse
import copy
import gc
import json
import math
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import rnnkit
from rnnkit import __main__ as command

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

import tolerances

ROOT = Path(__file__).resolve().parents[1]
FORMAT = "rnnkit speed 1"
SOURCES = ("rnnkit", "csrc", "setup.py", "benchmarks/speed.py")  # what the figures depend on


class Case(NamedTuple):
    """Sizes of a layer and its input, which has as many features as the layer has hidden units."""

    T: int
    N: int
    H: int


CASES = (Case(100, 16, 512), Case(100, 32, 128), Case(200, 8, 64))
TARGETS = {"RNN": 2.5, "LSTM": 1.0, "GRU": 2.5}  # least speed-up of each cell, on CASES
PROVIDERS = {"torch": nn, "rnnkit": rnnkit}  # the modules that have the layers
BASELINE = "torch"  # what the others are compared with

ROUNDS, QUICK_ROUNDS = 21, 5
TRUSTED_ROUNDS = 5  # the quartiles of fewer say little
SAMPLE_SECONDS = 0.05  # of one provider in one round
NOISE_LIMIT = 0.15  # quartiles that lie further apart, as a share of the median, are not trusted


class WrongResult(Exception):
    """A provider's result is too far from the truth to be timed."""


Tensors = dict[str, Tensor]


def forward(layer: nn.Module, x: Tensor) -> Tensors:
    output, states = layer(x)
    states = states if isinstance(states, tuple) else (states,)
    return {"output": output, **dict(zip(("h_n", "c_n"), states, strict=False))}


def inference(layer: nn.Module, x: Tensor, grad_output: Tensor) -> Tensors:
    with torch.no_grad():
        return forward(layer, x)


def training_step(layer: nn.Module, x: Tensor, grad_output: Tensor) -> Tensors:
    """Forward, and backward to the input and every weight."""
    results = forward(layer, x)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    gradients = torch.autograd.grad(results["output"], (x, *parameters), grad_output)
    return results | {f"grad_{n}": g for n, g in zip(("x", *names), gradients, strict=True)}


MODES = {"inference": inference, "training": training_step}


def significant(value: float, digits: int = 4) -> float:
    return float(f"{value:.{digits}g}")


class Figure(NamedTuple):
    """A median and its quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Figure":
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    @property
    def spread(self) -> float:
        return (self.high - self.low) / self.median

    def document(self) -> dict[str, Any]:
        low, median, high = map(significant, (self.low, self.median, self.high))
        return {"median": median, "quartiles": [low, high]}


@dataclass
class Contest:
    """What is timed in one line of the table, checked and ready to run.

    calls: one computation by each provider, on the same weights and inputs.
    repetitions: calls of each provider that make a sample of `SAMPLE_SECONDS` or longer.
    round_seconds: how long a round of everyone's samples takes.
    errors: the largest relative error of each provider's results against float64.
    flops: of the matrix products, by everyone's count the same.
    """

    cell: str
    mode: str
    case: Case
    calls: Mapping[str, Callable[[], Tensors]]
    repetitions: dict[str, int]
    round_seconds: float
    errors: dict[str, float]
    flops: int

    def __str__(self) -> str:
        return f"{self.cell} {self.mode} T{self.case.T} N{self.case.N} H{self.case.H}"


def largest_error(results: Tensors, truth: Tensors, held: str = "") -> float:
    """The largest relative error; that of each of `held`'s results must be within the tolerance table."""
    errors = {name: tolerances.relative_error(results[name], truth[name]) for name in truth}
    for name, error in errors.items():
        table = tolerances.GRADIENT if name.startswith("grad_") else tolerances.FORWARD
        limit = table[results[name].dtype]
        if held and not error <= limit:  # a NaN must not pass
            raise WrongResult(f"{held}: relative error of {name} {error:.1e}, allowed {limit:.0e}")
    return float(max(errors.values()))


def sample(call: Callable[[], object], repetitions: int) -> float:
    """Seconds of one call, by the mean of `repetitions`."""
    start = time.perf_counter()
    for _ in range(repetitions):
        call()
    return (time.perf_counter() - start) / repetitions


def calibrate(call: Callable[[], object]) -> tuple[int, float]:
    """Warm up; the repetitions that fill `SAMPLE_SECONDS`, and how long they take."""
    sample(call, 2)
    repetitions = 1
    while (each := sample(call, repetitions)) * repetitions < SAMPLE_SECONDS / 4:
        repetitions *= 2
    repetitions = math.ceil(SAMPLE_SECONDS / each)
    return repetitions, repetitions * each


def prepare(cell: str, mode: str, case: Case) -> Contest:
    """Builds the layers with the same weights, checks their results and finds the repetitions.

    Raises:
        WrongResult: a provider other than torch.nn leaves the tolerance table.
    """
    torch.manual_seed(0)
    layer = getattr(nn, cell)(case.H, case.H)
    x = torch.randn(case.T, case.N, case.H, requires_grad=mode == "training")
    grad_output = torch.randn(case.T, case.N, case.H)
    calls = {}
    for name, provider in PROVIDERS.items():
        own = getattr(provider, cell)(case.H, case.H).train(mode == "training")
        own.load_state_dict(layer.state_dict())
        calls[name] = partial(MODES[mode], own, x, grad_output)
    flops = 2 * case.T * case.N * (layer.weight_ih_l0.numel() + layer.weight_hh_l0.numel())
    exact_x = x.detach().double().requires_grad_(x.requires_grad)
    truth = MODES[mode](copy.deepcopy(layer).double(), exact_x, grad_output.double())
    contest = Contest(
        cell, mode, case, calls, {}, 0.0, {}, flops * (3 if mode == "training" else 1)
    )
    for name, call in calls.items():
        held = "" if name == BASELINE else f"{contest}: {name}"
        contest.errors[name] = largest_error(call(), truth, held)
    for name, call in calls.items():
        contest.repetitions[name], seconds = calibrate(call)
        contest.round_seconds += seconds
    return contest


def alternate(contest: Contest, rounds: int) -> dict[str, list[float]]:
    """Seconds of one call by each provider, a sample a round; providers take turns."""
    times: dict[str, list[float]] = {name: [] for name in contest.calls}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for name, call in contest.calls.items():
            sample(call, contest.repetitions[name])  # warms up: others ran since it was prepared
        for _ in range(rounds):
            for name, call in contest.calls.items():
                times[name].append(sample(call, contest.repetitions[name]))
    finally:
        if collecting:
            gc.enable()
    return times


def result(contest: Contest, times: dict[str, list[float]]) -> dict[str, Any]:
    """A line of the results file. The speed-up is of the samples of the same round."""
    T, N, H = contest.case
    ms = {name: Figure.of([1e3 * value for value in values]) for name, values in times.items()}
    speedup = Figure.of([a / b for a, b in zip(times[BASELINE], times["rnnkit"], strict=True)])
    target = TARGETS[contest.cell] if contest.case in CASES else None
    spreads = [figure.spread for figure in (*ms.values(), speedup)]
    return {
        "cell": contest.cell,
        "mode": contest.mode,
        "case": {"T": T, "N": N, "I": H, "H": H},
        "dtype": "float32",
        "ms": {name: figure.document() for name, figure in ms.items()},
        "gflops": {name: significant(contest.flops / f.median / 1e6) for name, f in ms.items()},
        "error": {name: significant(error, 2) for name, error in contest.errors.items()},
        "speedup": speedup.document(),
        "spread": significant(max(spreads), 3),
        "noisy": max(spreads) > NOISE_LIMIT or len(times[BASELINE]) < TRUSTED_ROUNDS,
        "target": target,
        "met": None if target is None else speedup.median >= target,
    }


def revision() -> dict[str, Any] | None:
    """The commit of the rnnkit that is timed and whether sources differ from it, if it is this checkout's."""

    def git(*arguments: str) -> str:
        run = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip()

    if Path(rnnkit.__file__).resolve().parents[1] != ROOT:
        return None
    try:
        changed = git("status", "--porcelain", "--", *SOURCES)
        return {"revision": git("rev-parse", "HEAD"), "dirty": bool(changed)}
    except (OSError, subprocess.CalledProcessError):
        return None


def surroundings() -> dict[str, Any]:
    """Device, threads, versions and date, as the results file has them."""
    about = command.info()
    backend = str(about["serving"]["cpu"])
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": {
            "kind": "cpu",
            "name": about["cpu"]["name"],
            "capability": about["cpu"]["capability in torch"],
            "cores": about["cpu"]["logical cores"],
        },
        "threads": torch.get_num_threads(),
        "backend": f"{backend}, {about['backends'][backend]}".replace("loaded: ", ""),
        "versions": {
            "python": about["versions"]["Python"],
            "torch": about["versions"]["torch"],
            "rnnkit": about["versions"]["rnnkit"],
            "git": revision(),
        },
        "environment": about["environment"],
    }


def tell(text: str, last: bool = False) -> None:
    """Progress on stderr: one line that changes on a terminal, else a line each."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="\n" if last else "", file=sys.stderr, flush=True)
    else:
        print(text, file=sys.stderr, flush=True)


def measure(wanted: Iterable[tuple[str, str, Case]], rounds: int) -> list[dict[str, Any]]:
    """Checks everything that is wanted, then times it; tells how long that will take."""
    wanted, contests, results = list(wanted), [], []
    for index, (cell, mode, case) in enumerate(wanted, 1):
        tell(f"checking {index}/{len(wanted)}")
        contests.append(prepare(cell, mode, case))
    left = [(rounds + 1) * contest.round_seconds for contest in contests]
    start = time.perf_counter()
    for index, contest in enumerate(contests):
        tell(f"timing {index + 1}/{len(contests)}: {contest}, {sum(left[index:]):.0f} s left")
        results.append(result(contest, alternate(contest, rounds)))
    tell(f"timed {len(results)} in {time.perf_counter() - start:.0f} s", last=True)
    return results


def verdict(row: dict[str, Any]) -> str:
    met = {None: "-", True: "met", False: "missed"}[row["met"]]
    return met + (", noisy" if row["noisy"] else "")


def table(document: dict[str, Any]) -> str:
    """The results as text: medians, their spread in brackets, whether the targets are met."""
    lines = [["T,N,H", "cell", "mode", *(f"{name} ms (spread)" for name in PROVIDERS)]]
    lines[0] += ["speed-up (quartiles)", *(f"{name} GFLOP/s" for name in PROVIDERS)]
    lines[0] += ["target", "verdict"]
    for row in document["results"]:
        times = []
        for name in PROVIDERS:
            figure = row["ms"][name]
            low, high = figure["quartiles"]
            times.append(f"{figure['median']:.4g} ({(high - low) / figure['median']:.0%})")
        low, high = row["speedup"]["quartiles"]
        lines.append(
            [
                ",".join(str(row["case"][size]) for size in "TNH"),
                *(row["cell"], row["mode"], *times),
                f"{row['speedup']['median']:.2f} ({low:.2f}-{high:.2f})",
                *(f"{row['gflops'][name]:.1f}" for name in PROVIDERS),
                "-" if row["target"] is None else str(row["target"]),
                verdict(row),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
    return "\n".join([texts[0], "-" * len(texts[0]), *texts[1:]])


def summary(document: dict[str, Any]) -> str:
    aimed = [row for row in document["results"] if row["met"] is not None]
    noisy = sum(row["noisy"] for row in document["results"])
    text = (
        f"{sum(row['met'] for row in aimed)} of {len(aimed)} targets met"
        if aimed
        else "no targets here"
    )
    if noisy:
        text += (
            f"; {noisy} noisy, not to be trusted: quartiles over {NOISE_LIMIT:.0%} of the median apart, "
            f"or fewer than {TRUSTED_ROUNDS} rounds"
        )
    return text


def default_output(document: dict[str, Any]) -> Path:
    """Named for device, threads and date; a part of the cases does not take the place of the whole."""
    device = re.sub(r"\((r|tm)\)|@.*", "", document["device"]["name"].lower())
    slug = re.sub(r"[^a-z0-9]+", "-", device).strip("-")
    part = "" if document["complete"] else "-part"
    threads, day = document["threads"], document["date"][:10]
    name = f"{document['device']['kind']}-{slug}-{threads}-threads-{day}{part}.json"
    return ROOT / "benchmarks" / "results" / name


def positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise ValueError
    return value


def sizes(text: str) -> Case:
    """Case from "T,N,H"."""
    T, N, H = map(positive, text.split(","))
    return Case(T, N, H)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    cells, modes = list(TARGETS), list(MODES)
    add(
        "--cells",
        nargs="+",
        type=str.upper,
        choices=cells,
        default=cells,
        metavar="CELL",
        help=", ".join(cells),
    )
    add("--modes", nargs="+", choices=modes, default=modes, metavar="MODE", help=", ".join(modes))
    add("--case", type=sizes, action="append", metavar="T,N,H", help="repeat it for several")
    add("--threads", type=positive, default=torch.get_num_threads(), help="default: %(default)s")
    add("--rounds", type=positive, help=f"default: {ROUNDS}")
    add(
        "--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds unless --rounds says otherwise"
    )
    add("--output", type=Path, help="results file; default: by device, threads and date")
    options = parser.parse_args(arguments)
    options.rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    cases = options.case or CASES
    every = [(cell, mode, case) for case in CASES for cell in TARGETS for mode in MODES]
    wanted = [(c, m, case) for case in cases for c in options.cells for m in options.modes]
    document = {
        "format": FORMAT,
        **surroundings(),
        "complete": set(every) <= set(wanted) and options.rounds >= ROUNDS,
        "protocol": {
            "rounds": options.rounds,
            "sample_seconds": SAMPLE_SECONDS,
            "noise_limit": NOISE_LIMIT,
        },
        "targets": TARGETS,
    }
    output = options.output or default_output(document)
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        document["results"] = measure(wanted, options.rounds)
    except WrongResult as error:
        tell(f"not timed, for it is wrong: {error}", last=True)
        return 1
    except KeyboardInterrupt:
        tell("interrupted: nothing is written", last=True)
        return 130
    output.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    print(table(document), summary(document), f"written to {output}", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

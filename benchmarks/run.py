"""Measures rnnkit beside torch.nn, JAX, ONNX Runtime and OpenVINO, each in a process of its own.

    python -m benchmarks                                  everything: 25 minutes on two cores
    python -m benchmarks --quick                          a part, in under 2
    python -m benchmarks --isa avx2                       every provider held to an older CPU's instructions
    python -m benchmarks --cells gru --mode train         some lines
    python -m benchmarks --case 50,4,256 --base HEAD~1    sizes of one's own, beside another revision

Nothing is timed before its results, on the very inputs, agree with torch.nn's in float64. Providers take
turns, round by round, on equally many threads. Writes a file under benchmarks/results/, of which
benchmarks/report.py makes the README's table. The exit status is 1 if a result of rnnkit is wrong or not
there; a missed goal is told in the table.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

import rnnkit
from benchmarks import goals, isa, readout, results
from benchmarks.base import built
from benchmarks.cases import (
    GATES,
    GROUPS,
    MODES,
    ONE_THREAD,
    PEERS,
    WITH_MEMORY,
    Entry,
    Line,
    lines,
    of_sizes,
)
from benchmarks.figures import Figure
from benchmarks.measure import BASELINE, MEMORY, QUICK, REFUSALS, TRUTH, Meter, Protocol, Row
from benchmarks.memory import ENVIRONMENT
from benchmarks.pool import Job, Pool
from benchmarks.progress import Progress
from benchmarks.surroundings import capability, surroundings

ASSUMED_GFLOPS = 50  # for the estimate of time alone


def jobs(todo: Sequence[Line], threads: int, device: str, base: str | None) -> dict[str, Job]:
    """How every worker that `todo` needs is started, by name; the peers', too, that turn out to be absent."""
    package = Path(rnnkit.__file__).resolve().parents[1]
    found = {name: Job(name, threads, device, package) for name in (BASELINE, *PEERS)}
    found[ONE_THREAD] = Job(BASELINE, 1, device, package)
    if base:
        found[f"{BASELINE}@{base}"] = Job(BASELINE, threads, device, built(base))
    needed = {entry.worker for line in todo for entry in line.entries.values()}
    if device != "cpu" or threads == 1:
        needed.discard(ONE_THREAD)
    found = {name: job for name, job in found.items() if name in needed}
    if device == "cpu" and any(line.group in WITH_MEMORY for line in todo):
        found |= {f"memory {n}": Job(n, threads, device, package, ENVIRONMENT) for n in MEMORY}
    return found | {TRUTH: Job("torch", threads, "cpu", package)}


def positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise ValueError
    return value


def shape(text: str) -> tuple[int, int, int, int]:
    """T, N, I, H from "T,N,H" or "T,N,I,H"."""
    sizes = [positive(part) for part in text.split(",")]
    if len(sizes) not in (3, 4):
        raise ValueError
    return sizes[0], sizes[1], sizes[-2] if len(sizes) == 4 else sizes[-1], sizes[-1]


def cell(text: str) -> str:
    if (name := text.upper()) not in GATES:
        raise ValueError
    return name


def mode(text: str) -> str:
    """From its beginning, as in "train"."""
    found = [name for name in MODES if text and name.startswith(text)]
    if not found:
        raise ValueError
    return found[0]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="a part of the cases, fewer rounds")
    add("--cells", nargs="+", type=cell, metavar="CELL", help=", ".join(GATES))
    add("--modes", nargs="+", type=mode, metavar="MODE", help=", ".join(MODES))
    add("--groups", nargs="+", choices=GROUPS, metavar="GROUP", help=", ".join(GROUPS))
    add("--only", metavar="TEXT", help="lines whose name has this, as in 'T100 N16 H512'")
    add("--case", type=shape, action="append", metavar="T,N[,I],H", help="repeat it for several")
    add("--providers", nargs="+", metavar="NAME", help=f"of {', '.join(PEERS)}, beside rnnkit")
    add("--base", metavar="REV", help="also time rnnkit at this revision")
    add("--threads", type=positive, default=torch.get_num_threads(), help="default: %(default)s")
    add("--isa", choices=isa.ISAS, help="default: the CPU's best, and nothing is held")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: rnnkit and torch.nn only")
    add("--rounds", type=positive, help="as many, whatever time they take")
    add("--output", type=Path, help="results file; default: by device, threads and date")
    return parser.parse_args(arguments)


def wanted(options: argparse.Namespace) -> Iterator[Line]:
    """The lines that the options leave, with their providers."""
    lower = options.device == "cpu" and capability() != isa.best()
    for line in of_sizes(options.case) if options.case else lines(options.quick, lower):
        case = line.case
        if options.cells and case.cell not in options.cells:
            continue
        if options.modes and case.mode not in options.modes:
            continue
        if options.groups and line.group not in options.groups:
            continue
        if options.only and options.only not in str(case):
            continue
        absent = set(PEERS) - set(options.providers or PEERS)
        entries = {n: entry for n, entry in line.entries.items() if entry.worker not in absent}
        if options.base:
            entries[f"{BASELINE}@{options.base}"] = Entry(f"{BASELINE}@{options.base}", case)
        yield line._replace(entries=entries)


def cost(line: Line, protocol: Protocol) -> float:
    """Seconds, roughly; only their proportions matter."""
    each = [entry.case.flops / ASSUMED_GFLOPS / 1e9 for entry in line.entries.values()]
    return 1 + max(protocol.line_seconds, protocol.least_rounds * sum(each)) + 3 * sum(each)


def entry_text(name: str, row: Row) -> str:
    told = row["entries"][name]
    for refused in REFUSALS[1:]:
        if refused in told:
            return f"{name} {refused} ({told[refused]})"
    if "ms" not in told:
        return f"{name} –"
    if name == BASELINE:
        return f"{name} {Figure.read(told['ms']).text('{:.3g} ms')}"
    if name in row.get("ratios", {}):
        over = f"{name} {Figure.read(row['ratios'][name]).text('{:.2f}×')}"
        frozen = row.get("frozen", {}).get(name)
        return over + (f" (frozen {Figure.read(frozen).text('{:.2f}×')})" if frozen else "")
    return f"{name} {Figure.read(told['ms']).text('{:.3g} ms')}"


def bound(row: Row) -> str:
    """What the roofline of the case allows."""
    roofline = row["roofline"]
    return f"{100 * roofline[roofline['level']]:.0f} %"


def text(line: Line, row: Row) -> str:
    """A line on the terminal: rnnkit's time, the others' over it, memory, the share of the peak."""
    parts = [entry_text(name, row) for name in row["entries"]]
    for name, told in row.get("memory", {}).items():
        if "bytes" in told:
            parts.append(f"{name} {Figure.read(told['bytes']).scaled(2**-20).text('{:.1f} MiB')}")
    if "share" in row:
        share = Figure.read(row["share"]).scaled(100).text("{:.0f} % of peak")
        parts.append(share + (f", {bound(row)} allowed" if "roofline" in row else ""))
    return f"{line.case!s:42}  {', '.join(parts)}"


def goal_table(rows: Iterable[Row]) -> str:
    table = [[row["verdict"], row["what"], row["goal"], row["figure"]] for row in rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in table)


def measure(todo: Sequence[Line], started: dict[str, Job], protocol: Protocol) -> dict[str, Any]:
    """What is said of the providers, and the rows of all lines; prints each as it is done."""
    rows = []
    with (
        tempfile.TemporaryDirectory() as folder,
        open(Path(folder) / "log", "w") as log,
        Pool(started, log) as pool,
    ):
        for name, told in pool.providers.items():
            if not pool.has(name):
                print(f"{name} is not there: {told}", file=sys.stderr)
        meter = Meter(pool, protocol, Path(folder) / "line")
        meter.measure_bandwidth()
        progress = Progress([cost(line, protocol) for line in todo])
        for line in todo:
            progress.step(str(line.case))
            rows.append(meter.row(line))
            progress.clear()
            print(text(line, rows[-1]), flush=True)
        return {"providers": pool.providers, "bandwidth": meter.bandwidth, "lines": rows}


def instructions(options: argparse.Namespace) -> dict[str, Any]:
    """What the results file says of the ISA; raises isa.IsaError if the run is not held to the one asked for."""
    if options.device != "cpu":
        return {}
    if options.isa is None:
        return {"isa": capability(), "held": None}
    isa.require_held(options.isa)
    if capability() != options.isa:
        raise isa.IsaError(f"--isa {options.isa}: rnnkit was built without kernels for it")
    return {"isa": options.isa, "held": isa.document(options.isa)}


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    protocol = QUICK if options.quick else Protocol()
    if options.rounds:
        protocol = replace(protocol, least_rounds=options.rounds, most_rounds=options.rounds)
    filters = (options.cells, options.modes, options.groups, options.only, options.case)
    filters += (options.providers,)
    try:
        document: dict[str, Any] = {"format": results.FORMAT, **instructions(options)}
    except isa.IsaError as error:
        print(error, file=sys.stderr)
        return 2
    document |= surroundings(options.device)
    document |= {
        "complete": not any((*filters, options.quick, options.rounds)),
        "threads": options.threads,
        "protocol": asdict(protocol),
    }
    todo = list(wanted(options))
    if not todo:
        print("no line is left by these options", file=sys.stderr)
        return 2
    try:
        started = jobs(todo, options.threads, options.device, options.base)
        document |= measure(todo, started, protocol)
        if options.device == "cpu" and (
            document["complete"] or "features" in (options.groups or ())
        ):
            document["readout"] = readout.document(options.threads)
    except KeyboardInterrupt:
        print("\ninterrupted: nothing is written", file=sys.stderr)
        return 130
    except subprocess.CalledProcessError as error:
        print(f"{options.base}: {error}\n{error.stderr or ''}", file=sys.stderr)
        return 2
    document["goals"] = goals.judge_all(document)
    output = options.output or results.default_path(document)
    results.write(document, output)
    told = [row for row in document["goals"] if row["cases"] or document["complete"]]
    print(
        goal_table(told) if told else "no goal is of these lines", f"written to {output}", sep="\n"
    )
    own = [row["entries"].get(BASELINE, {}) for row in document["lines"]]
    return 0 if all("ms" in told or "unsupported" in told for told in own) else 1

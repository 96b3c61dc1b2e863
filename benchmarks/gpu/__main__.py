"""Measures rnnkit beside torch.nn (cuDNN) on a GPU: both in one process, in turns, equally precise.

    python -m benchmarks.gpu                            everything, the most important first
    python -m benchmarks.gpu --quick                    the first cases, in about a minute
    python -m benchmarks.gpu --part main --part extra --seconds 500
    python -m benchmarks.gpu --part triton              rnnkit's Triton kernels, beside all others
    python -m benchmarks.gpu --only 'LSTM bf16 H512'    some cases
    python -m benchmarks.gpu --list                     which there are; needs no GPU
    python -m benchmarks.gpu --merge A.json B.json      parts together, and measure what is left of --part
    python -m benchmarks.gpu --show A.json              its table and goals

The results file is written as rows come. The exit status is 1 if a result of rnnkit is wrong or not there; where
Triton does not run, its rows say why and are none.
"""

import argparse
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.base import ROOT
from benchmarks.gpu import goals, grid, tables
from benchmarks.gpu.clock import Protocol
from benchmarks.gpu.grid import Task
from benchmarks.gpu.supervisor import StartError, Supervisor
from benchmarks.run import goal_table

CASE_SECONDS = 45  # longer, a kernel hangs
GRACE_SECONDS = 5  # beyond the limit, for the case that has begun
QUICK_SECONDS = 60.0
WRITE_SECONDS = 3  # between writings of the file

Document = dict[str, Any]
Row = dict[str, Any]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--list", action="store_true", help="print the cases in their order")
    add("--part", action="append", choices=grid.PARTS, help="repeat it for several; default: all")
    add("--only", type=re.compile, metavar="REGEX", help="cases in whose names it is found")
    add("--quick", action="store_true", help=f"the first {grid.QUICK} cases")
    add("--seconds", type=float, metavar="LIMIT", help="stop after so many; what is done is kept")
    add(
        "--output", type=Path, metavar="FILE", help="default: in $OUT or build/gpu, by device, date"
    )
    add("--merge", type=Path, nargs="+", metavar="FILE", help="keep their rows, measure the others")
    add("--show", type=Path, metavar="FILE", help="print its table; measure nothing")
    add("--revision", metavar="REV", help="of rnnkit, where git does not know; may end in -dirty")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try the benchmark out")
    return parser.parse_args(arguments)


def wanted(options: argparse.Namespace) -> list[Task]:
    found = [
        task
        for task in grid.tasks()
        if (not options.part or task.part in options.part)
        and (not options.only or options.only.search(str(task)))
    ]
    return found[: grid.QUICK] if options.quick else found


def identity(row: Row) -> str:
    return f"{row['kind']} {sorted(row['case'].items())}"


def merged(paths: Sequence[Path]) -> list[Row]:
    """The rows of all files, later ones in place of earlier.

    Raises:
        results.ResultsError: one is no results file, or of another device than the first.
    """
    found: dict[str, Row] = {}
    devices = set()
    for path in paths:
        document, _ = results.load(path, results.GPU_FORMAT)
        devices.add(document["device"]["name"])
        if len(devices) > 1:
            raise results.ResultsError(f"{path}: of another device: {', '.join(sorted(devices))}")
        found |= {identity(row): row for row in document["rows"]}
    return list(found.values())


def started(surroundings: Row, options: argparse.Namespace, rows: list[Row]) -> Document:
    document: Document = {
        "format": results.GPU_FORMAT,
        **surroundings,
        "protocol": asdict(Protocol()),
    }
    if options.revision:
        revision = options.revision.removesuffix("-dirty")
        git = {"revision": revision, "dirty": revision != options.revision}
        document["versions"] = document["versions"] | {"git": git}
    return document | {"complete": False, "rows": rows}


def default_path(document: Document) -> Path:
    folder = Path(os.environ.get("OUT") or ROOT / "build" / "gpu")
    return folder / f"gpu-{results.slug(document['device']['name'])}-{document['date'][:10]}.json"


def finished(document: Document) -> Document:
    """With the verdicts, and whether nothing is left."""
    done = {identity(row) for row in document["rows"]}
    tasks = grid.tasks()
    every = {identity({"kind": task.kind, "case": task.case.document()}) for task in tasks}
    return document | {"complete": every <= done, "goals": goals.judge_all(document)}


def ending(document: Document) -> str:
    return "\n".join(["", tables.summary(document), "", goal_table(document["goals"])])


def measure(
    todo: Sequence[Task],
    ask: Callable[[Task, float], Row],
    limit: float,
    done: Callable[[Row], None],
) -> int:
    """Rows of `todo` until `limit`, a time of time.monotonic(); how many were left out."""
    for number, task in enumerate(todo):
        if (left := limit - time.monotonic()) <= 0:
            return len(todo) - number
        row = ask(task, min(CASE_SECONDS, left + GRACE_SECONDS))
        if time.monotonic() > limit + GRACE_SECONDS and not row["ratios"]:
            return len(todo) - number  # cut short, not failed
        done(row)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    todo = wanted(options)
    if options.list:
        print(*(f"{task.part:9} {task}" for task in todo), sep="\n")
        return 0
    try:
        if options.show:
            document, _ = results.load(options.show, results.GPU_FORMAT)
            print(tables.show(document), ending(finished(document)), sep="\n")
            return 0
        rows = merged(options.merge or [])
    except results.ResultsError as error:
        print(error, file=sys.stderr)
        return 2
    kept = {identity(row) for row in rows}
    todo = [t for t in todo if identity({"kind": t.kind, "case": t.case.document()}) not in kept]
    limit = options.seconds or (QUICK_SECONDS if options.quick else float("inf"))
    try:
        return run(options, todo, rows, time.monotonic() + limit)
    except StartError as error:
        print(error, file=sys.stderr)
        return 2


def run(options: argparse.Namespace, todo: list[Task], rows: list[Row], limit: float) -> int:
    with Supervisor(options.device, Protocol()) as supervisor:
        document = started(supervisor.surroundings, options, rows)
        output = options.output or default_path(document)
        written = 0.0

        def done(row: Row) -> None:
            nonlocal written
            rows.append(row)
            print(tables.line(row), flush=True)
            if time.monotonic() - written > WRITE_SECONDS:
                results.write(document, output)
                written = time.monotonic()

        print(tables.where(document), tables.HEAD, sep="\n", flush=True)
        try:
            left = measure(todo, supervisor.row, limit, done)
        finally:
            document = finished(document)
            results.write(document, output)
    print(ending(document), f"{left} cases left out", f"written to {output}", sep="\n")
    own = ((row, key) for row in rows for key in row["entries"] if key.startswith("rnnkit"))
    return 0 if all(goals.right(row, key) for row, key in own) else 1


if __name__ == "__main__":
    sys.exit(main())

"""A GPU's results as text: a line for each case on the terminal, a table of steps for the README."""

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.cases import Case
from benchmarks.figures import Figure
from benchmarks.gpu.goals import REGIME, low, persistent, plain, right, rows, step
from benchmarks.gpu.grid import T_LONG, T_SHORT, TRITON, name
from benchmarks.results import own_version

Document = dict[str, Any]
Row = dict[str, Any]

HEAD = f"{'':33} {'rnnkit':>7} {'torch':>7}  µs/step   ratio   T{T_SHORT}  T{T_LONG}  ~: noisy"
KERNEL_WIDTH = 48
WHAT = ("step", str(T_SHORT), str(T_LONG))  # has a ratio
REFUSED = ("wrong", "failed", "memory", "lost", "unsupported")


def ratio(ratios: Row, what: str) -> str:
    if what not in ratios:
        return "–"
    figure = Figure.read(ratios[what])
    return f"{'~' if figure.noisy else ''}{figure.median:.2f}"


def microseconds(row: Row, provider: str) -> str:
    figure = step(row, provider)
    return f"{figure.median:.2f}" if figure else "–"


def kernel(row: Row, provider: str) -> str:
    return " ".join(row["entries"][provider].get("kernel", "").split())[:KERNEL_WIDTH]


def line(row: Row) -> str:
    """What happened to a task, in a line."""
    case, entries = Case(**row["case"]), row["entries"]
    if row["kind"] == "error":
        told = [f"{what} {times:.2f}" for what, times in row["ratios"].items()]
        parts = [f"{'error ' + name(case):33} over cuDNN's: {', '.join(told) or '–'}"]
    elif row["kind"] == "kernels":
        parts = [f"{'kernels ' + name(case):33}"]
        for provider, told in entries.items():
            if "longest" in told:
                first = next((k["kernel"] for k in told["longest"]), "")[:KERNEL_WIDTH]
                count = told["launches"][str(T_LONG)]
                parts.append(f"{provider} {told['recurrent_us']:.2f} µs, {count} launches, {first}")
    elif row["kind"] in ("triton", "graph"):
        parts = [f"{row['kind'] + ' ' + name(case):33} {microseconds(row, TRITON):>7} µs/step"]
        for peer, ratios in row["ratios"].items():
            parts.append(f"{peer} {' '.join(f'{ratio(ratios, what)}×' for what in WHAT)}")
        parts += [told for told in [kernel(row, TRITON)] if told]
    else:
        times = [f"{microseconds(row, provider):>7}" for provider in ("rnnkit", "torch")]
        ratios = [f"{ratio(row['ratios'], what):>6}" for what in WHAT]
        parts = [
            " ".join([f"{name(case):33}", *times, *ratios, "", kernel(row, "rnnkit")]).rstrip()
        ]
    for provider, told in entries.items():
        parts += [f"{provider} {told[why]}" for why in REFUSED if why in told]
    return "; ".join(parts)


def show(document: Document) -> str:
    return "\n".join([where(document), HEAD, *map(line, document["rows"])])


def summary(document: Document) -> str:
    """Geometric means of the ratios, of a step and at each T, by part, cell and dtype; on Triton by the peer, too."""
    groups: dict[str, dict[str, list[Row]]] = {}
    for case, row in rows(document, "time"):
        key = f"{row['part']:6} {case.cell:4} {case.dtype}"
        groups.setdefault(key, {}).setdefault(case.mode, []).append(row["ratios"])
    head = f"Geometric means of torch.nn's time over rnnkit's: a step, T {T_SHORT}, T {T_LONG}"
    lines = [head, *mean_lines(groups)]
    groups = {}
    for case, row in rows(document, "triton"):
        for peer, ratios in row["ratios"].items():
            key = f"{peer:11} {case.cell:4} {case.dtype}"
            groups.setdefault(key, {}).setdefault(case.mode, []).append(ratios)
    return "\n".join(
        [*lines, *([f"Of these over {TRITON}'s:"] if groups else []), *mean_lines(groups)]
    )


def mean_lines(groups: dict[str, dict[str, list[Row]]]) -> Iterator[str]:
    """By group, and in it by mode, of the ratios of its rows."""
    for key, modes in groups.items():
        told = [f"{mode} {' '.join(map(mean, means(of_mode)))}" for mode, of_mode in modes.items()]
        yield f"{key:21} {'  '.join(told)}"


def means(of_mode: Sequence[Row]) -> Iterator[list[float]]:
    for what in WHAT:
        told = [ratios[what]["median"] for ratios in of_mode if what in ratios]
        yield [value for value in told if value > 0]


def mean(values: Sequence[float]) -> str:
    return f"{statistics.geometric_mean(values):5.2f}" if values else f"{'–':>5}"


def cell(row: Row | None) -> str:
    """A long call's milliseconds, and how much longer torch.nn's short and long ones take."""
    if row is None or not right(row):
        return "wrong or failed" if row else "–"
    long = row["entries"]["rnnkit"]["us"].get(str(T_LONG))
    milliseconds = f"{long['median'] / 1000:.2f}" if long else "–"
    return f"{milliseconds} ({ratio(row['ratios'], str(T_SHORT))}, {ratio(row['ratios'], str(T_LONG))})"


def call_table(document: Document) -> list[Sequence[str]]:
    """By H and N, in columns by cell, dtype and mode: of the regime in which rnnkit is to win."""
    table: dict[tuple[int, int], dict[str, Row]] = {}
    columns: dict[str, None] = {}
    for case, row in rows(document, "time"):
        if low(case) and persistent(case) and plain(case) and case.cell != "RNN":
            column = name(case).replace(f" H{case.H} N{case.N}", "")
            columns[column] = None
            table.setdefault((case.H, case.N), {})[column] = row
    head = ["H, N", *sorted(columns)]
    body = [[f"{H}, {N}", *(cell(told.get(c)) for c in head[1:])] for (H, N), told in table.items()]
    return [head, *sorted(body, key=lambda cells: [int(size) for size in cells[0].split(", ")])]


def where(document: Document) -> str:
    """Device and versions in a line."""
    device, versions = document["device"], document["versions"]
    about = [f"{device['multiprocessors']} SMs"] if "multiprocessors" in device else []
    about += [f"{what} {device[what]}" for what in ("driver", "CUDA", "cuDNN") if what in device]
    own = f"{own_version(document)} ({document['backend']})"
    return (
        f"{device['name']} ({', '.join(about)}); {own}, torch {versions['torch']}; "
        f"{document['date'][:10]}"
    )


def about(document: Document) -> str:
    """What the README's table shows."""
    return (
        f"Milliseconds of a call at T {T_LONG}, and torch.nn's (cuDNN's) time over rnnkit's at T {T_SHORT} and "
        f"T {T_LONG}, of one layer in one direction: {REGIME}. {len(document['rows'])} cases are in the file."
    )

"""Writes the README's tables of speed and goals, and the pictures in docs/, from a results file.

    python -m benchmarks.report              from the newest complete file under benchmarks/results/
    python -m benchmarks.report FILE         from this one
    python -m benchmarks.report --check      writes nothing; is all as it would be written?

The newest run on a GPU among the files beside that one is told after it. The tables go between
`<!-- speed:begin -->` and `<!-- speed:end -->`; the README shows the pictures where it likes. The exit status is 1
if --check finds a difference, 2 if there is nothing to write from or no place to write to.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.base import ROOT
from benchmarks.cases import Case
from benchmarks.figures import NOISE_LIMIT, Figure
from benchmarks.gpu import tables
from benchmarks.gpu.goals import judge_all
from benchmarks.plots import draw, pictures
from benchmarks.results import FOLDER, GPU_FORMAT, ResultsError, load, newest, own_version

BEGIN, END = "<!-- speed:begin -->", "<!-- speed:end -->"
ENGINES = ("onnxruntime", "openvino")
TITLES = {"torch": "torch.nn", "jax": "JAX", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}

Document = dict[str, Any]
Row = dict[str, Any]


class ReportError(Exception):
    """There is no place to write to; the message says which."""


def where(document: Document) -> str:
    """Device, threads and versions in a line."""
    device, versions = document["device"], document["versions"]
    count = device.get("cores")
    cores = f"{count} core{'s' if count != 1 else ''}, " if count else ""
    threads = "1 thread" if document["threads"] == 1 else f"{document['threads']} threads"
    own = own_version(document)
    peers = [
        f"{TITLES[name]} {told['versions'][name].split('-')[0]}"
        for name, told in document["providers"].items()
        if name in TITLES and name != "torch" and "versions" in told
    ]
    return (
        f"{device['name']} ({cores}{device['capability']}), {threads}; {own} ({document['backend']}), "
        f"torch {versions['torch']}, {', '.join([*peers, 'Python ' + versions['python']])}"
    )


def ratio(row: Row | None, name: str) -> str:
    """A peer's time over rnnkit's, or the word that stands for why there is none."""
    told = (row or {}).get("entries", {}).get(name, {})
    for refused in ("wrong", "failed"):
        if refused in told:
            return refused
    found = (row or {}).get("ratios", {}).get(name)
    return Figure.read(found).text("{:.2f}×") if found else "–"


def engine(row: Row | None) -> str:
    """The same of the faster engine, with its name."""
    ratios = (row or {}).get("ratios", {})
    present = [name for name in ENGINES if name in ratios]
    if not present:
        return "–"
    best = min(present, key=lambda name: ratios[name]["median"])
    return f"{ratio(row, best)} {TITLES[best]}"


def milliseconds(row: Row | None) -> str:
    told = (row or {}).get("entries", {}).get("rnnkit", {})
    if "ms" not in told:
        return "wrong" if "wrong" in told else "–"
    figure = Figure.read(told["ms"])
    return figure.text("{:.3g}" if figure.median < 100 else "{:.0f}")


def markdown_table(lines: Sequence[Sequence[str]], left: int) -> list[str]:
    """`lines` with the head first; so many columns are aligned to the left."""
    rule = ["---"] * left + ["---:"] * (len(lines[0]) - left)
    return [f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:])]


def speed_table(document: Document) -> list[str]:
    """A row for each case and cell: inference and training side by side."""
    groups: dict[tuple[str, str], dict[str, Row]] = {}
    for row in document["lines"]:
        if row["group"] == "cases":
            case = Case(**row["case"])
            label = case.sizes("{}, {}, {}{}").replace(", I", ", ")
            groups.setdefault((label, case.cell), {})[case.mode] = row
    head = ["T, N, H", "cell", "inference, ms", "torch.nn", "JAX", "best engine"]
    head += ["training step, ms", "torch.nn", "JAX"]
    lines = [head]
    for (label, cell), modes in sorted(groups.items(), key=lambda item: item[0][0].count(",")):
        forward, step = modes.get("inference"), modes.get("training")
        line = [label, cell, milliseconds(forward), ratio(forward, "torch"), ratio(forward, "jax")]
        line += [engine(forward), milliseconds(step), ratio(step, "torch"), ratio(step, "jax")]
        lines.append(line)
    return markdown_table(lines, left=2)


def goal_table(document: Document) -> list[str]:
    lines = [["goal", "bound", "measured", "verdict"]]
    lines += [
        [row["what"], row["goal"], row["figure"], row["verdict"]] for row in document["goals"]
    ]
    return markdown_table(lines, left=4)


def gpu(folder: Path, readme: Path) -> list[str]:
    """The lines on the newest run on a GPU, complete or not, of those in `folder`."""
    try:
        source = newest(folder, GPU_FORMAT, parts=True)
    except ResultsError:
        return ["GPU: not yet run on one (`python -m benchmarks.gpu`)."]
    document, _ = load(source, GPU_FORMAT)
    link = Path(os.path.relpath(source.resolve(), readme.parent)).as_posix()
    about = f"{tables.where(document)}, [{source.name}]({link}). {tables.about(document)}"
    calls = markdown_table(tables.call_table(document), left=1)
    judged = goal_table({"goals": judge_all(document)})
    details = ["<details><summary>Every call</summary>", "", *calls, "", "</details>"]
    return [about, "", *judged, "", *details]


def markdown(document: Document, source: str, beside: Sequence[str] = ()) -> str:
    """What stands between the markers; `source` is the results file's path from the README's folder.

    beside: lines on other results, at the end.
    """
    about = (
        f"{where(document)}; {document['date'][:10]}, [{Path(source).name}]({source}). Medians of rounds in which "
        "all take turns. Under a name stands its time over rnnkit's: above 1 rnnkit is faster. float32 where nothing "
        f"else is said. A figure whose quartiles lie over {NOISE_LIMIT:.0%} of the median apart is called noisy."
    )
    every = ["<details><summary>Every case</summary>", "", *speed_table(document), "", "</details>"]
    return "\n".join(
        [about, "", *goal_table(document), "", *every, *(["", *beside] if beside else [])]
    )


def insert(readme: str, block: str) -> str:
    """The text `readme` with `block` between the markers."""
    counts = readme.count(BEGIN), readme.count(END)
    if counts != (1, 1) or readme.index(BEGIN) > readme.index(END):
        raise ReportError(f"expected one {BEGIN} and one {END} after it in the README")
    before, after = readme.split(BEGIN)[0], readme.split(END)[1]
    return f"{before}{BEGIN}\n{block}\n{END}{after}"


def differences(
    readme: Path, expected: str, document: Document, digest: str, folder: Path
) -> list[str]:
    """What --check finds."""
    found = []
    if readme.read_text("utf-8") != expected:
        found.append(f"{readme}: the tables are not those of the results")
    for name in pictures(document):
        path = folder / name
        if not path.exists() or digest.encode() not in path.read_bytes():
            found.append(f"{path}: not drawn from the results")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="?", help="default: the newest complete file")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--pictures", type=Path, default=ROOT / "docs", metavar="FOLDER")
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    options = parser.parse_args(arguments)
    readme, folder = options.readme.resolve(), options.pictures.resolve()
    try:
        source = options.results or newest(FOLDER)
        document, digest = load(source)
        link = Path(os.path.relpath(source.resolve(), readme.parent)).as_posix()
        text = readme.read_text("utf-8") if readme.exists() else ""
        expected = insert(text, markdown(document, link, gpu(source.resolve().parent, readme)))
    except (ReportError, ResultsError) as error:
        print(error, file=sys.stderr)
        return 2
    if options.check:
        found = differences(readme, expected, document, digest, folder)
        print(*found or [f"{readme} and the pictures are those of {source}"], sep="\n")
        return 1 if found else 0
    drawn = draw(document, digest, folder, where(document))
    readme.write_text(expected, "utf-8")
    print(f"wrote {readme} and {', '.join(map(str, drawn))} from {source}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Writes the README's table of speed and its picture from a results file of benchmarks/speed.py.

    python benchmarks/report.py              from the newest complete file under benchmarks/results/
    python benchmarks/report.py FILE         from this one
    python benchmarks/report.py --check      writes nothing; is all as it would be written?

The table goes between `<!-- speed:begin -->` and `<!-- speed:end -->`, the picture to docs/speed.png,
which the README shows where it likes. The exit status is 1 if --check finds a difference, 2 if there is
nothing to write from or no place to write to.
"""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- speed:begin -->", "<!-- speed:end -->"
FORMAT = "rnnkit speed 1"
TITLES = {"inference": "inference", "training": "training step"}
COLORS = {"inference": "#7fb2d9", "training": "#1f5a8c"}

Document = dict[str, Any]
Row = dict[str, Any]


class ReportError(Exception):
    """Nothing to write from, or no place to write to; the message says which."""


def newest(folder: Path) -> Path:
    """The complete results file with the latest date in it."""
    dates: dict[Path, str] = {}
    for path in sorted(folder.glob("*.json")):
        document = json.loads(path.read_text("utf-8"))
        if document.get("format") == FORMAT and document["complete"]:
            dates[path] = document["date"]
    if not dates:
        raise ReportError(f"no complete results in {folder}: run benchmarks/speed.py")
    return max(dates, key=dates.__getitem__)


def load(path: Path) -> tuple[Document, str]:
    """The results in `path`, and the digest that tells them from all others."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ReportError(f"{path}: {error.strerror}") from error
    document: Document = json.loads(content)
    if document.get("format") != FORMAT:
        raise ReportError(f"{path}: expected format {FORMAT!r}, got {document.get('format')!r}")
    return document, hashlib.sha256(content).hexdigest()


def where(document: Document) -> str:
    """Device, threads and versions in a line."""
    device, versions = document["device"], document["versions"]
    cores = "1 core" if device["cores"] == 1 else f"{device['cores']} cores"
    threads = "1 thread" if document["threads"] == 1 else f"{document['threads']} threads"
    dtypes = ", ".join(sorted({row["dtype"] for row in document["results"]}))
    own = f"rnnkit {versions['rnnkit']}"
    if git := versions["git"]:
        own += f" at {git['revision'][:7]}{' with changes' if git['dirty'] else ''}"
    return (
        f"{device['name']} ({cores}, {device['capability']}), {threads}, {dtypes}, "
        f"Python {versions['python']}, torch {versions['torch']}, {own} ({document['backend']})"
    )


def grouped(document: Document) -> dict[tuple[str, str], dict[str, Row]]:
    """Rows by mode, under sizes and cell."""
    groups: dict[tuple[str, str], dict[str, Row]] = {}
    for row in document["results"]:
        groups.setdefault((sizes(row), row["cell"]), {})[row["mode"]] = row
    return groups


def sizes(row: Row) -> str:
    return ", ".join(str(row["case"][name]) for name in "TNH")


def modes(document: Document) -> list[str]:
    present = {row["mode"] for row in document["results"]}
    return [mode for mode in TITLES if mode in present]


def speedup(row: Row) -> str:
    low, high = row["speedup"]["quartiles"]
    noisy = " noisy" if row["noisy"] else ""
    return f"**{row['speedup']['median']:.2f}×** ({low:.2f}–{high:.2f}){noisy}"


def milliseconds(row: Row, name: str) -> str:
    median: float = row["ms"][name]["median"]
    return f"{median:.3g}" if median < 100 else f"{median:.0f}"


def cells_of(row: Row | None) -> list[str]:
    """Three cells of the table: both times, and the speed-up."""
    if row is None:
        return ["–", "–", "–"]
    return [*(milliseconds(row, name) for name in ("torch", "rnnkit")), speedup(row)]


def markdown(document: Document, source: str) -> str:
    """What stands between the markers.

    Args:
        document: the results.
        source: path of the results file, from the README's folder.
    """
    shown = modes(document)
    head = ["T, N, H", "cell"]
    for mode in shown:
        head += [f"{TITLES[mode]}: torch.nn, ms", "rnnkit, ms", "speed-up"]
    lines = [head, ["---"] * 2 + ["---:"] * (len(head) - 2)]
    for (size, cell), rows in grouped(document).items():
        lines.append([size, cell, *(text for mode in shown for text in cells_of(rows.get(mode)))])
    protocol = document["protocol"]
    about = (
        f"{where(document)}; {document['date'][:10]}, [{Path(source).name}]({source}). "
        f"Medians of {protocol['rounds']} rounds; in brackets the quartiles of the speed-up."
    )
    if any(row["noisy"] for row in document["results"]):
        limit = protocol["noise_limit"]
        about += (
            f" Noisy: the quartiles lie over {limit:.0%} of the median apart, or are of too few rounds;"
            " such a figure is not to be trusted."
        )
    table = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([about, "", *table])


def insert(readme: str, block: str) -> str:
    """The text `readme` with `block` between the markers."""
    if (
        readme.count(BEGIN) != 1
        or readme.count(END) != 1
        or readme.index(BEGIN) > readme.index(END)
    ):
        raise ReportError(f"expected one {BEGIN} and one {END} after it in the README")
    before, after = readme.split(BEGIN)[0], readme.split(END)[1]
    return f"{before}{BEGIN}\n{block}\n{END}{after}"


def draw(document: Document, digest: str, path: Path) -> None:
    """Bars of speed-up, a panel for each case; `digest` goes into the file, for --check."""
    from matplotlib.figure import Figure

    groups, shown = grouped(document), modes(document)
    cases = list(dict.fromkeys(size for size, _ in groups))
    figure = Figure(figsize=(max(6.0, 3.4 * len(cases)), 4.6), dpi=144, layout="constrained")
    panels = figure.subplots(1, len(cases), sharey=True, squeeze=False)[0]
    for panel, case in zip(panels, cases, strict=True):
        cells = [cell for size, cell in groups if size == case]
        bars(panel, {cell: groups[case, cell] for cell in cells}, shown)
        panel.set_title("T {}, N {}, H {}".format(*case.split(", ")), fontsize=11)
    panels[0].set_ylabel("speed of rnnkit, times that of torch.nn")
    panels[0].set_ylim(0, 1.12 * max(r["speedup"]["quartiles"][1] for r in document["results"]))
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    figure.supxlabel(where(document).replace(", Python", "\nPython"), fontsize=8, color="#555555")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Source": digest})


def bars(panel: Any, rows: dict[str, dict[str, Row]], shown: list[str]) -> None:
    """One case: for each cell a bar a mode, with its quartiles and its value."""
    width = 0.8 / len(shown)
    for index, mode in enumerate(shown):
        present = [(at, rows[cell][mode]) for at, cell in enumerate(rows) if mode in rows[cell]]
        x = [at + (index - (len(shown) - 1) / 2) * width for at, _ in present]
        medians = [row["speedup"]["median"] for _, row in present]
        panel.bar(x, medians, 0.94 * width, color=COLORS[mode], label=TITLES[mode])
        for at, (_, row) in zip(x, present, strict=True):
            low, high = row["speedup"]["quartiles"]
            panel.plot([at, at], [low, high], color="#222222", linewidth=1.2)
            text = f"{row['speedup']['median']:.1f}" + ("\nnoisy" if row["noisy"] else "")
            place = {"xytext": (0, 3), "textcoords": "offset points", "ha": "center"}
            panel.annotate(text, (at, high), fontsize=8, **place)
    panel.axhline(1, color="#b03030", linewidth=1.2, linestyle="--", label="as fast as torch.nn")
    panel.set_xticks(range(len(rows)), list(rows))
    panel.spines[["top", "right"]].set_visible(False)


def differences(readme: Path, expected: str, picture: Path, digest: str) -> list[str]:
    """What --check finds."""
    found = []
    if readme.read_text("utf-8") != expected:
        found.append(f"{readme}: the table is not that of the results")
    if not picture.exists() or digest.encode() not in picture.read_bytes():
        found.append(f"{picture}: not drawn from the results")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="?", help="default: the newest complete file")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "speed.png")
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    options = parser.parse_args(arguments)
    readme, picture = options.readme.resolve(), options.picture.resolve()
    try:
        source = options.results or newest(ROOT / "benchmarks" / "results")
        document, digest = load(source)
        link = Path(os.path.relpath(source.resolve(), readme.parent)).as_posix()
        text = readme.read_text("utf-8") if readme.exists() else ""
        expected = insert(text, markdown(document, link))
    except ReportError as error:
        print(error, file=sys.stderr)
        return 2
    if options.check:
        found = differences(readme, expected, picture, digest)
        print(*found or [f"{readme} and {picture} are those of {source}"], sep="\n")
        return 1 if found else 0
    draw(document, digest, picture)
    readme.write_text(expected, "utf-8")
    print(f"wrote {readme} and {picture} from {source}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

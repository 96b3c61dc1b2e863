"""What README.md's and docs/performance.md's parts on speed have in common: names, cells of tables, Markdown."""

from collections.abc import Sequence
from typing import Any

from benchmarks.figures import Figure
from benchmarks.isa import ISAS
from benchmarks.results import isa_of, own_version

TITLES = {"torch": "torch.nn", "jax": "JAX", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}

Document = dict[str, Any]
Row = dict[str, Any]


def markdown(lines: Sequence[Sequence[str]], left: int) -> list[str]:
    """A table of `lines`, the head first; so many columns are aligned to the left."""
    rule = ["---"] * left + ["---:"] * (len(lines[0]) - left)
    return [f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:])]


def folded(title: str, lines: Sequence[str]) -> list[str]:
    """`lines` that are shown at a click on `title`."""
    return [f"<details><summary>{title}</summary>", "", *lines, "", "</details>"]


def refusal(told: Row) -> str:
    """The word that stands for why there is no time."""
    return next((word for word in ("wrong", "failed") if word in told), "–")


def milliseconds(row: Row, entry: str = "rnnkit") -> str:
    told = row["entries"].get(entry, {})
    if "ms" not in told:
        return refusal(told)
    figure = Figure.read(told["ms"])
    return figure.text("{:.3g}" if figure.median < 100 else "{:.0f}")


def ratio(row: Row, entry: str, kind: str = "ratios") -> str:
    """The time of `entry` over rnnkit's."""
    found = row.get(kind, {}).get(entry)
    if found:
        return Figure.read(found).text("{:.2f}×")
    return refusal(row["entries"].get(entry, {}))


def isa_title(document: Document) -> str:
    return ISAS[isa_of(document)].title


def machine(document: Document) -> str:
    """CPU, cores and threads."""
    device = document["device"]
    count = device.get("cores")
    cores = f" ({count} core{'s' if count != 1 else ''})" if count else ""
    threads = "1 thread" if document["threads"] == 1 else f"{document['threads']} threads"
    return f"{device['name']}{cores}, {threads}"


def where(document: Document) -> str:
    """Machine, ISA, versions and date in a line."""
    versions = document["versions"]
    peers = [
        f"{TITLES[name]} {told['versions'][name].split('-')[0]}"
        for name, told in document["providers"].items()
        if name in TITLES and name != "torch" and "versions" in told
    ]
    about = ", ".join([f"torch {versions['torch']}", *peers, f"Python {versions['python']}"])
    own = f"{own_version(document)} ({document['backend']})"
    return f"{machine(document)}, {isa_title(document)}; {own}, {about}; {document['date'][:10]}"

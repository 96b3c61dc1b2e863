"""Results files: one a run under benchmarks/results/, named for device, threads, ISA and date."""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.base import ROOT
from benchmarks.isa import ISAS, of_torch

FORMAT = "rnnkit benchmarks 1"
GPU_FORMAT = "rnnkit gpu benchmarks 1"  # of `python -m benchmarks.gpu`
OWN_CELLS_FORMAT = "rnnkit own cells 1"
FOLDER = ROOT / "benchmarks" / "results"

Document = dict[str, Any]


class ResultsError(Exception):
    """There are no results to read; the message says why."""


def slug(device: str) -> str:
    """A device's name for a file's."""
    name = re.sub(r"\((r|tm)\)|@.*", "", device.lower())
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def default_path(document: Document) -> Path:
    """A part of the lines does not take the place of the whole."""
    part = "" if document["complete"] else "-part"
    threads, day = document["threads"], document["date"][:10]
    kind, name = document["device"]["kind"], slug(document["device"]["name"])
    isa = f"-{document['isa']}" if kind == "cpu" else ""
    return FOLDER / f"{kind}-{name}-{threads}-threads{isa}-{day}{part}.json"


def isa_of(document: Document) -> str:
    """The ISA that the run used; files that do not say it tell what torch saw."""
    told: str = document.get("isa") or of_torch(document["device"]["capability"])
    return told


def own_version(document: Document) -> str:
    """rnnkit's, with the revision where it is known."""
    text = f"rnnkit {document['versions']['rnnkit']}"
    if git := document["versions"]["git"]:
        text += f" at {git['revision'][:7]}{' with changes' if git['dirty'] else ''}"
    return text


def write(document: Document, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")  # whoever ends this process leaves the old file or the new one
    new.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", "utf-8")
    new.replace(path)


def newest(folder: Path, expected: str = FORMAT, parts: bool = False) -> Path:
    """The results file with the latest date in it; only a complete one unless `parts` will do."""
    dates: dict[Path, str] = {}
    for path in sorted(folder.glob("*.json")):
        document = json.loads(path.read_text("utf-8"))
        if document.get("format") == expected and (parts or document["complete"]):
            dates[path] = document["date"]
    if not dates:
        raise ResultsError(
            f"no {'' if parts else 'complete '}results in {folder}: run `make bench`"
        )
    return max(dates, key=dates.__getitem__)


def newest_of_each(folder: Path) -> list[Path]:
    """The latest complete results of each CPU, number of threads and ISA; the CPU measured last comes first."""
    if found := _latest(folder, lambda document: document["complete"]):
        return found
    raise ResultsError(f"no complete results in {folder}: run `make bench`")


def newest_with_features(folder: Path) -> list[Path]:
    """The latest results, complete or not, that tell what rnnkit's features cost, in the same order; maybe none."""
    return _latest(folder, lambda document: "readout" in document)


def _latest(folder: Path, wanted: Callable[[Document], bool]) -> list[Path]:
    found: dict[tuple[str, int, str], tuple[str, Path]] = {}
    for path in sorted(folder.glob("*.json")):
        document = json.loads(path.read_text("utf-8"))
        if document.get("format") != FORMAT or document["device"]["kind"] != "cpu":
            continue
        if wanted(document):
            key = (document["device"]["name"], document["threads"], isa_of(document))
            found[key] = max(found.get(key, ("", path)), (document["date"], path))
    order = list(ISAS)
    dates: dict[tuple[str, int], str] = {}
    for (name, threads, _), (date, _) in found.items():
        dates[name, threads] = max(dates.get((name, threads), ""), date)

    def place(key: tuple[str, int, str]) -> tuple[str, str, int, int]:
        name, threads, isa = key
        return dates[name, threads], name, threads, order.index(isa)

    return [found[key][1] for key in sorted(found, key=place, reverse=True)]


def load(path: Path, expected: str = FORMAT) -> tuple[Document, str]:
    """The results in `path`, and the digest that tells them from all others."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ResultsError(f"{path}: {error.strerror}") from error
    document: Document = json.loads(content)
    if document.get("format") != expected:
        raise ResultsError(f"{path}: expected format {expected!r}, got {document.get('format')!r}")
    return document, hashlib.sha256(content).hexdigest()

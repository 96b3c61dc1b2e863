"""Results files: one a run under benchmarks/results/, named for device, threads and date."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from benchmarks.base import ROOT

FORMAT = "rnnkit benchmarks 1"
GPU_FORMAT = "rnnkit gpu benchmarks 1"  # of `python -m benchmarks.gpu`
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
    return FOLDER / f"{kind}-{name}-{threads}-threads-{day}{part}.json"


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

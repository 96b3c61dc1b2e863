"""Results files: one a run under benchmarks/results/, named for device, threads and date."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from benchmarks.base import ROOT

FORMAT = "rnnkit benchmarks 1"
FOLDER = ROOT / "benchmarks" / "results"

Document = dict[str, Any]


class ResultsError(Exception):
    """There are no results to read; the message says why."""


def default_path(document: Document) -> Path:
    """A part of the lines does not take the place of the whole."""
    name = re.sub(r"\((r|tm)\)|@.*", "", document["device"]["name"].lower())
    slug = re.sub(r"[^a-z0-9]+", "-", name).strip("-")
    part = "" if document["complete"] else "-part"
    threads, day = document["threads"], document["date"][:10]
    return FOLDER / f"{document['device']['kind']}-{slug}-{threads}-threads-{day}{part}.json"


def write(document: Document, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", "utf-8")


def newest(folder: Path) -> Path:
    """The complete results file with the latest date in it."""
    dates: dict[Path, str] = {}
    for path in sorted(folder.glob("*.json")):
        document = json.loads(path.read_text("utf-8"))
        if document.get("format") == FORMAT and document["complete"]:
            dates[path] = document["date"]
    if not dates:
        raise ResultsError(f"no complete results in {folder}: run `make bench`")
    return max(dates, key=dates.__getitem__)


def load(path: Path) -> tuple[Document, str]:
    """The results in `path`, and the digest that tells them from all others."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ResultsError(f"{path}: {error.strerror}") from error
    document: Document = json.loads(content)
    if document.get("format") != FORMAT:
        raise ResultsError(f"{path}: expected format {FORMAT!r}, got {document.get('format')!r}")
    return document, hashlib.sha256(content).hexdigest()

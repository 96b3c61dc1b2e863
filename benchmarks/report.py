"""Writes README.md's and docs/performance.md's parts on speed, and the pictures in docs/, from results files.

    python -m benchmarks.report              from the newest complete file of each CPU and ISA in benchmarks/results/
    python -m benchmarks.report FILE ...     from these
    python -m benchmarks.report --check      writes nothing; is all as it would be written?

Both texts have their part between `<!-- speed:begin -->` and `<!-- speed:end -->`. The README has the CPU that was
measured last; docs/performance.md has everything. Both tell of the newest run on a GPU in the folder of the first
file. The exit status is 1 if --check finds a difference, 2 if there is nothing to write from or no place to write to.
"""

import argparse
import hashlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks import own_cells, page, summary
from benchmarks.base import ROOT
from benchmarks.plots import draw, pictures
from benchmarks.results import (
    FOLDER,
    GPU_FORMAT,
    OWN_CELLS_FORMAT,
    ResultsError,
    load,
    newest,
    newest_of_each,
    newest_with_features,
)
from benchmarks.tables import Document

BEGIN, END = "<!-- speed:begin -->", "<!-- speed:end -->"


class ReportError(Exception):
    """There is no place to write to; the message says which."""


class Results(NamedTuple):
    """What is told of, by the files' paths, the CPU measured last first; `digest` tells it from all others."""

    cpu: dict[Path, Document]
    gpu: tuple[Path, Document] | None
    features: dict[Path, Document]
    own_cells: tuple[Path, Document] | None
    digest: str

    @classmethod
    def read(cls, paths: Sequence[Path]) -> "Results":
        loaded = {path.resolve(): load(path) for path in paths}
        digests = "".join(digest for _, digest in loaded.values())
        folder = next(iter(loaded)).parent
        gpu, own = (_newest(folder, form) for form in (GPU_FORMAT, OWN_CELLS_FORMAT))
        told = newest_with_features(folder)
        features = {path: load(path)[0] for path in told}
        documents = {path: document for path, (document, _) in loaded.items()}
        return cls(documents, gpu, features, own, hashlib.sha256(digests.encode()).hexdigest())


def _newest(folder: Path, form: str) -> tuple[Path, Document] | None:
    """The newest file of another format; None if there was no such run."""
    try:
        source = newest(folder, form, parts=True)
    except ResultsError:
        return None
    return source, load(source, form)[0]


def insert(text: str, block: str, path: Path) -> str:
    """The text of file `path` with `block` between the markers."""
    counts = text.count(BEGIN), text.count(END)
    if counts != (1, 1) or text.index(BEGIN) > text.index(END):
        raise ReportError(f"expected one {BEGIN} and one {END} after it in {path}")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    return f"{before}{BEGIN}\n{block}\n{END}{after}"


def link(target: Path, origin: Path) -> str:
    """From the file `origin` to `target`."""
    return Path(os.path.relpath(target, origin.parent)).as_posix()


def expected(found: Results, readme: Path, performance: Path, folder: Path) -> dict[Path, str]:
    """The texts of both files as they should be."""
    path, gpu = found.gpu or (performance, None)
    sections = {link(source, performance): document for source, document in found.cpu.items()}
    features = {link(source, performance): document for source, document in found.features.items()}
    blocks = {
        readme: summary.text(
            list(found.cpu.values()),
            gpu,
            link(folder / "speed.png", readme),
            link(performance, readme),
        ),
        performance: page.text(sections, gpu, link(path, performance), features),
    }
    if found.own_cells is not None:
        source, document = found.own_cells
        section = own_cells.section(document, link(source, performance))
        blocks[performance] += "\n".join(["", "", *section])
    texts = {}
    for file, block in blocks.items():
        texts[file] = insert(file.read_text("utf-8") if file.exists() else "", block, file)
    return texts


def differences(found: Results, texts: dict[Path, str], folder: Path) -> list[str]:
    """What --check finds."""
    told = [
        f"{path}: the part on speed is not that of the results"
        for path, text in texts.items()
        if path.read_text("utf-8") != text
    ]
    for name in pictures(list(found.cpu.values())):
        path = folder / name
        if not path.exists() or found.digest.encode() not in path.read_bytes():
            told.append(f"{path}: not drawn from the results")
    return told


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "results",
        type=Path,
        nargs="*",
        help="default: the newest complete file of each CPU and ISA",
    )
    add("--readme", type=Path, default=ROOT / "README.md")
    add("--page", type=Path, default=ROOT / "docs" / "performance.md")
    add("--pictures", type=Path, default=ROOT / "docs", metavar="FOLDER")
    add("--check", action="store_true", help="write nothing, compare")
    options = parser.parse_args(arguments)
    readme, performance = options.readme.resolve(), options.page.resolve()
    folder = options.pictures.resolve()
    try:
        found = Results.read(options.results or newest_of_each(FOLDER))
        texts = expected(found, readme, performance, folder)
    except (ReportError, ResultsError) as error:
        print(error, file=sys.stderr)
        return 2
    names = ", ".join(path.name for path in found.cpu)
    if options.check:
        told = differences(found, texts, folder)
        print(*told or [f"texts and pictures are those of {names}"], sep="\n")
        return 1 if told else 0
    drawn = draw(list(found.cpu.values()), found.digest, folder)
    for path, text in texts.items():
        path.write_text(text, "utf-8")
    print(f"wrote {', '.join(map(str, [*texts, *drawn]))} from {names}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

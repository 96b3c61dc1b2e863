"""README.md and pages of docs/: their code runs as it stands, and what they link to is there."""

import linecache
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    "README.md",
    "docs/guide.md",
    "docs/recipes.md",
    "docs/chapter.md",
    "docs/cells.md",
    "docs/graphs.md",
]
DOCS = sorted({f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")} - set(PAGES))


@pytest.mark.parametrize("page", PAGES)
def test_code_runs(page: str) -> None:
    text = (ROOT / page).read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    for block in blocks:
        # Of this name, errors show lines.
        linecache.cache[page] = (len(block), None, block.splitlines(True), page)
        exec(compile(block, page, "exec"), names)
    assert blocks


@pytest.mark.parametrize("page", [*PAGES, *DOCS, "CONTRIBUTING.md"])
def test_links_lead_somewhere(page: str) -> None:
    path = ROOT / page
    for target, anchor in re.findall(r"\]\(([^)#:]*)(#[^)]*)?\)", path.read_text("utf-8")):
        file = path.parent / target if target else path
        assert file.exists(), f"{target} of {page}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text("utf-8"), re.MULTILINE)
            assert anchor[1:] in {heading.lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_files_that_are_named_are_there(page: str) -> None:
    """By the whole path, or by its end."""
    text = (ROOT / page).read_text("utf-8")
    names = set(re.findall(r"`([\w./]+(?:\.py|\.h|\.cpp|\.cu|\.md|\w/))`", text)) - {
        "csrc/cells/NAME.h"
    }
    tops = ("rnnkit", "csrc", "tests", "docs", "benchmarks", "examples")
    paths = [path for top in tops for path in (ROOT / top).rglob("*")]
    there = [f"/{path.relative_to(ROOT).as_posix()}" for path in [*paths, *ROOT.iterdir()]]
    assert len(names) > 5
    for name in names:
        assert any(path.endswith(f"/{name.rstrip('/')}") for path in there), name

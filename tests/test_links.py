"""What README.md, the other Markdown files and the guides point at exists: files, headings, and
the paths that they name in code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GITHUB = ROOT / ".github"
PAGES = sorted(
    {
        ROOT / "README.md",
        ROOT / "tests" / "data" / "README.md",
        *GITHUB.glob("*.md"),
        *(GITHUB / "docs").glob("*.rst"),
    }
)
LINKS = {
    ".md": re.compile(r"\]\(([^)\s]+)\)|src(?:set)?=\"([^\"]+)\""),
    ".rst": re.compile(r"`[^`]+<([^>]+)>`_"),
}
HEADINGS = {
    ".md": re.compile(r"^#+ (.+)$", re.M),
    ".rst": re.compile(r"^(\S.*)\n([=-])\2+$", re.M),
}
# A path of the repository in code font; pipeline/ is refine_fast's, and <level> any name.
PATHS = re.compile(
    r"`((?:refine_fast|pipeline|csrc|tests|benchmarks|\.ci|\.github)/[\w./<>-]*)(?= |`)"
)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = HEADINGS[page.suffix].finditer(page.read_text())
    return {re.sub(r"[^\w -]", "", h[1].lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    dead = []
    for match in LINKS[page.suffix].finditer(page.read_text()):
        link = next(filter(None, match.groups()))
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not link.startswith(("http://", "https://")) and not (
            target.exists() and (not anchor or anchor in anchors(target))
        ):
            dead.append(link)
    assert dead == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_paths_named_exist(page: Path) -> None:
    paths = [re.sub("<.*?>", "*", path) for path in PATHS.findall(page.read_text())]
    bases = (ROOT, ROOT / "refine_fast")
    assert [path for path in paths if not any(any(b.glob(path)) for b in bases)] == []

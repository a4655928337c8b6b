"""PDF: the text of the pages, without what typesetting adds to it."""

from __future__ import annotations

import io
import logging
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

from ..text import whole_characters
from .content import Content, Unreadable, missing, title_of_name

# Ligatures and positional forms of letters. Nothing else is normalized: "x²" stays.
_PRESENTATION_FORMS = re.compile("[\ufb00-\ufb4f\ufb50-\ufdcf\ufe70-\ufefc]+")
_HYPHENATED = re.compile(r"(\w+)(-|\u00ad|\u2010)[ \t]*\n\s*(\w+)")
_EDGE_LINES = 3
"""Lines at the top and at the bottom of a page where running heads are looked for."""
_MIN_PAGES = 3
"""Pages on which a line must be repeated to be a running head."""
_MAX_GAP = 2
"""Pages from one repetition to the next: left and right pages may have heads of their own."""
_NUMBER = re.compile(r"\d+|\b[ivxl]+\b")
_PAGE_NUMBER = re.compile(
    r"\W*(?:(?:page|p|seite|página|pág|стр|第)\W*)?#(?:\W*(?:of|/|von|de|из)?\W*#)?\W*[页頁ページ]*"
)


def read_pdf(path: Path, data: bytes) -> Content:
    """The title is the one in the document's properties, else the file's name."""
    try:
        import pypdf
    except ImportError:
        raise missing("pypdf", ".pdf") from None

    # pypdf reports what it repairs; what it cannot read, it raises.
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)
    try:
        reader = pypdf.PdfReader(io.BytesIO(data))
        text = join_pages([whole_characters(page.extract_text()) for page in reader.pages])
        title = (reader.metadata.title if reader.metadata else None) or title_of_name(path)
        title = whole_characters(title)
    except Exception as error:  # a broken file raises KeyError, RecursionError, ...
        raise Unreadable(
            f"it is not a PDF that pypdf can read ({type(error).__name__}: {error})"
        ) from None
    return Content(title, text, "text")


def join_pages(pages: Sequence[str]) -> str:
    """The text of all pages, a blank line between them.

    Ligatures become their letters, words that are hyphenated at a line's end become whole, and
    lines at the top or bottom that repeat from page to page are removed: running heads and page
    numbers.
    """
    pages = [_PRESENTATION_FORMS.sub(_letters, page) for page in pages]
    return _without_hyphenation("\n\n".join(_without_running_heads(pages)))


def _letters(match: re.Match[str]) -> str:
    return unicodedata.normalize("NFKC", match[0])


def _without_hyphenation(text: str) -> str:
    """Joins "exam-" and "ple". The hyphen stays where the text has the compound within a line, or
    where what follows is not in small letters."""
    compounds = set(re.findall(r"\w+-\w+", text.casefold()))

    def join(match: re.Match[str]) -> str:
        first, hyphen, rest = match.groups()
        compound = hyphen != "\u00ad" and f"{first}-{rest}".casefold() in compounds
        broken = first[-1].islower() and rest[0].islower() and not compound
        return first + rest if broken or hyphen == "\u00ad" else f"{first}{hyphen}{rest}"

    return _HYPHENATED.sub(join, text).replace("\u00ad", "")


def _without_running_heads(pages: Sequence[str]) -> list[str]:
    lines = [page.split("\n") for page in pages]
    where: dict[str, list[tuple[int, list[int]]]] = defaultdict(list)
    for page, own in enumerate(lines):
        for at in {*_edge(own, 1), *_edge(own, -1)}:
            where[_pattern(own[at])].append((page, [int(n) for n in re.findall(r"\d+", own[at])]))
    repeated = {
        (page, pattern) for pattern, found in where.items() for page in _repetitions(pattern, found)
    }
    for page, own in enumerate(lines):
        for step in (1, -1):
            for at in _edge(own, step):
                if (page, _pattern(own[at])) not in repeated:
                    break
                own[at] = ""
    # A page without heads keeps its very text.
    return [
        "\n".join(own).strip("\n") if "\n".join(own) != page else page
        for page, own in zip(pages, lines, strict=True)
    ]


def _edge(lines: Sequence[str], step: int) -> list[int]:
    """Where the first (step 1) or last (step -1) lines are that are not blank."""
    order = range(len(lines)) if step == 1 else range(len(lines) - 1, -1, -1)
    found: list[int] = []
    for at in order:
        if lines[at].strip():
            found.append(at)
        if len(found) == _EDGE_LINES:
            break
    return found


def _pattern(line: str) -> str:
    """The line with its numbers set aside."""
    return _NUMBER.sub("#", " ".join(line.casefold().split()))


def _repetitions(pattern: str, found: Sequence[tuple[int, list[int]]]) -> Iterator[int]:
    """The pages on which a line of this pattern is a running head.

    It repeats on neighbouring pages; if it holds a number that differs, that number counts the
    pages, and words stand beside it or nothing does ("Exercise 3" is text).
    """
    least = _MIN_PAGES
    if _PAGE_NUMBER.fullmatch(pattern):
        least = 2
    group: list[tuple[int, list[int]]] = []
    for entry in [*found, (found[-1][0] + _MAX_GAP + 1, [])]:
        if group and entry[0] - group[-1][0] > _MAX_GAP:
            if len({page for page, _ in group}) >= least and _counts_pages(pattern, group):
                yield from (page for page, _ in group)
            group = []
        group.append(entry)


def _counts_pages(pattern: str, group: Sequence[tuple[int, list[int]]]) -> bool:
    if not _PAGE_NUMBER.fullmatch(pattern):
        if "#" not in pattern or len({tuple(numbers) for _, numbers in group}) == 1:
            return True
        if len(re.findall(r"[^\W\d_]+", pattern)) < 2 or "#" not in (pattern[0], pattern[-1]):
            return False
    shifts = [{n - page for n in numbers} for page, numbers in group if numbers]
    return all(a & b for a, b in pairwise(shifts))

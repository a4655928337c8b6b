"""Word and PowerPoint: the text in reading order, with headings as Markdown's."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..text import whole_characters
from .content import Content, Unreadable, missing, title_of_name

_ORNAMENTS = frozenset({"DATE", "FOOTER", "HEADER", "SLIDE_NUMBER"})
"""Placeholders of a slide that repeat on every slide."""


def read_docx(path: Path, data: bytes) -> Content:
    """Paragraphs, headings and tables. Headers and footers of pages are left out."""
    try:
        import docx
    except ImportError:
        raise missing("python-docx", ".docx") from None
    return _read(path, data, docx.Document, _word_blocks, "a Word document")


def read_pptx(path: Path, data: bytes) -> Content:
    """Each slide under its title, with its tables and notes."""
    try:
        import pptx
    except ImportError:
        raise missing("python-pptx", ".pptx") from None
    return _read(path, data, pptx.Presentation, _slide_blocks, "a PowerPoint presentation")


def _read(
    path: Path,
    data: bytes,
    load: Callable[[Any], Any],
    blocks: Callable[[Any], Iterator[str]],
    kind: str,
) -> Content:
    try:
        document = load(io.BytesIO(data))
        text = "\n\n".join(block for block in blocks(document) if block.strip())
        title = " ".join((document.core_properties.title or "").split())
    except Exception as error:  # a broken archive raises BadZipFile, KeyError, XMLSyntaxError, ...
        raise Unreadable(f"it is not {kind} ({type(error).__name__}: {error})") from None
    if title in ("", "PowerPoint Presentation"):  # what PowerPoint writes by itself
        heading = re.search(r"^#+ (.+)", text, re.MULTILINE)
        title = heading[1] if heading else title_of_name(path)
    return Content(whole_characters(title), whole_characters(text), "markdown")


# Paths in a Word document. python-docx's own lists leave out what lies in content controls (w:sdt)
# and tracked insertions (w:ins).
_BLOCKS = ".//w:p[not(ancestor::w:p or ancestor::w:tbl)] | .//w:tbl[not(ancestor::w:tbl)]"
_RUNS = (
    ".//w:r[not(ancestor::w:del or ancestor::w:moveFrom or ancestor::w:txbxContent "
    "or ancestor::w:rt)]"  # w:rt: how a character is pronounced
)
_ROWS = ".//w:tr[count(ancestor::w:tbl) = 1]"
_CELLS = (  # a cell that spans several rows has its text in the first
    ".//w:tc[count(ancestor::w:tbl) = 1][not(w:tcPr/w:vMerge[not(@w:val = 'restart')])]"
)
_CELL_PARAGRAPHS = ".//w:p[not(ancestor::w:txbxContent)]"


def _word_blocks(document: Any) -> Iterator[str]:
    from docx.oxml.table import CT_Tbl
    from docx.text.paragraph import Paragraph

    for block in document.element.body.xpath(_BLOCKS):
        if isinstance(block, CT_Tbl):
            yield "\n".join(_word_rows(block))
            continue
        text = _word_text(block).replace("\u00ad", "").strip()
        paragraph_style = Paragraph(block, document).style
        style = (paragraph_style.name or "") if paragraph_style is not None else ""
        level = re.fullmatch(r"heading ([1-6])|(title)", style, re.IGNORECASE)
        if level and text:
            yield "#" * int(level[1] or 1) + " " + " ".join(text.split())
        else:
            yield text


def _word_rows(table: Any) -> Iterator[str]:
    """A line for each row; a cell that spans several columns or rows counts once."""
    for row in table.xpath(_ROWS):
        cells = (
            " ".join(" ".join(map(_word_text, cell.xpath(_CELL_PARAGRAPHS))).split())
            for cell in row.xpath(_CELLS)
        )
        yield " | ".join(filter(None, cells))


def _word_text(paragraph: Any) -> str:
    return "".join(run.text for run in paragraph.xpath(_RUNS))


def _slide_blocks(presentation: Any) -> Iterator[str]:
    for slide in presentation.slides:
        title = slide.shapes.title
        if title is not None and title.text_frame.text.strip():
            yield "# " + " ".join(title.text_frame.text.split())
        for shape in _shapes(slide.shapes):
            if title is None or shape.shape_id != title.shape_id:
                yield from _shape_blocks(shape)
        if slide.has_notes_slide and slide.notes_slide.notes_text_frame is not None:
            yield slide.notes_slide.notes_text_frame.text.strip()


def _shapes(shapes: Any) -> Iterator[Any]:
    """All shapes, those inside groups among them."""
    for shape in shapes:
        if hasattr(shape, "shapes"):
            yield from _shapes(shape.shapes)
        else:
            yield shape


def _shape_blocks(shape: Any) -> Iterator[str]:
    kind = shape.placeholder_format.type if shape.is_placeholder else None
    if kind is not None and kind.name in _ORNAMENTS:
        return
    if shape.has_text_frame:
        lines = (paragraph.text.strip() for paragraph in shape.text_frame.paragraphs)
        yield "\n".join(filter(None, lines)).replace("\v", "\n")
    elif getattr(shape, "has_table", False) and shape.has_table:
        rows = ([" ".join(cell.text.split()) for cell in row.cells] for row in shape.table.rows)
        yield "\n".join(" | ".join(filter(None, cells)) for cells in rows)

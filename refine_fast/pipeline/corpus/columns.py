"""Which columns of a table are the text, the title and the id of a document."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from typing import Any, NamedTuple

from ...errors import RefineFastError
from .jsonl import text_field

TEXT_NAMES = (
    *("text", "content", "contents", "body", "page_content", "passage", "document", "article"),
    *("abstract", "description", "chunk", "paragraph", "context", "summary", "answer", "message"),
)
TITLE_NAMES = ("title", "heading", "headline", "subject", "name")
ID_NAMES = ("_id", "id", "doc_id", "docid", "document_id", "uid", "uuid", "pid", "key")
"""Column names that are recognized, whatever their case; the earlier name is preferred."""

STANDARD_IDS = ("_id", "id", "doc_id")
"""The id columns of this project's own formats; a row may use any of them."""

MIN_MEAN_LENGTH = 20
"""Characters of a column, on average, that may be the text without a name that says so."""

SAMPLE_ROWS = 1000
"""Rows of a table by which its columns are recognized."""


@dataclass(frozen=True)
class Columns:
    """The columns that the user names; None: they are recognized."""

    text: str | None = None
    title: str | None = None
    id: str | None = None


class Fields(NamedTuple):
    """The text, title and id of one row; an id of "" if it has none."""

    text: str
    title: str
    id: str


class RowReader:
    """Takes the text, the title and the id out of each row of one table.

    Args:
        rows: the first SAMPLE_ROWS rows of the table.
        given: the columns that the user names.
        where: "<file>:<row>" of the first row, for messages.
        say: told which columns were guessed, in one line.

    Raises:
        RefineFastError: if a named column does not exist, or no column can be the text.
    """

    def __init__(
        self,
        rows: Sequence[dict[str, Any]],
        given: Columns,
        where: str,
        say: Callable[[str], None] | None = None,
    ) -> None:
        names = list(dict.fromkeys(str(name) for row in rows for name in row))
        table = where.rpartition(":")[0]
        for role in ("text", "title", "id"):
            name = getattr(given, role)
            if name is not None and name not in names:
                raise RefineFastError(
                    f"{role}_column: {table} has no column {name!r} but only "
                    f"{sorted(names)!r:.200}; name one of them."
                )
        free = [name for name in names if name not in (given.title, given.id)]
        text = given.text or named(free, TEXT_NAMES) or _longest(free, rows)
        if text is None:
            raise RefineFastError(
                f'{where} has no field "text" but only {sorted(names)!r:.200}; '
                "name the column of the text with --text-column."
            )
        others = [name for name in free if name != text]
        title = given.title or named(others, TITLE_NAMES)
        self._ids: tuple[str, ...] = STANDARD_IDS
        if given.id is not None:
            self._ids = (given.id,)
        elif not {"_id", "id"} & set(names):
            # "doc_id" too may be that of the document that several rows are parts of
            id = named([name for name in others if name != title], ID_NAMES)
            own = id is not None and _distinct(rows, id, [text, title or text])
            self._ids = (id,) if id is not None and own else ()
        self._text = text
        self._title = title
        guessed = {
            "text": text if given.text is None and text != "text" else None,
            "title": title if given.title is None and title != "title" else None,
            "id": next((id for id in self._ids if id not in (given.id, *STANDARD_IDS)), None),
        }
        found = [f"the {role} from column {name!r}" for role, name in guessed.items() if name]
        if found and say is not None:
            say(
                f"{table}: reads {', '.join(found)}; --text-column, --title-column and "
                "--id-column choose others"
            )

    def read(self, row: dict[str, Any], where: str) -> Fields:
        """The fields of a row. A text that is null is "".

        Raises:
            RefineFastError: if the row lacks the text column, or a field is not a string.
        """
        row = {name: plain(value) for name, value in row.items()}
        is_null = self._text in row and row[self._text] is None
        return Fields(
            text_field(row, (self._text,), where, default="" if is_null else None),
            "" if self._title is None else text_field(row, (self._title,), where, default=""),
            text_field(row, self._ids, where, default="") if self._ids else "",
        )


def named(names: Sequence[str], known: Sequence[str]) -> str | None:
    """The column whose name is the first in ``known``, letters' case and blanks aside."""
    plain = {name.strip().lower().replace(" ", "_"): name for name in reversed(names)}
    return next((plain[name] for name in known if name in plain), None)


def _distinct(rows: Sequence[dict[str, Any]], id: str, others: Sequence[str]) -> bool:
    """Whether each row has an id, its own or that of a row with the same ``others``."""
    values = [row.get(id) for row in rows]
    different = {tuple(str(row.get(name)) for name in (id, *others)) for row in rows}
    return None not in values and len(set(map(str, values))) == len(different)


def _longest(names: Sequence[str], rows: Sequence[dict[str, Any]]) -> str | None:
    """The column with the longest texts, if they are long enough for one."""
    lengths = {
        name: sum(len(value) for row in rows if isinstance(value := plain(row.get(name)), str))
        / len(rows)
        for name in names
    }
    best = max(lengths, key=lengths.__getitem__, default=None)
    return best if best is not None and lengths[best] >= MIN_MEAN_LENGTH else None


def plain(value: Any) -> Any:
    """A cell's value, with dates, decimal numbers and bytes in UTF-8 as strings; None for NaN."""
    if isinstance(value, Decimal):
        return format(value, "f")  # never 1E+3
    if isinstance(value, bytes):
        with suppress(UnicodeDecodeError):
            return value.decode("utf-8")
    if isinstance(value, float):
        if value != value:  # NaN, which pandas writes for an empty cell
            return None
        return str(int(value)) if value.is_integer() else str(value)
    return str(value) if isinstance(value, date) else value

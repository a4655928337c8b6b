"""Tables and records: one row in, one mapping of columns to values out."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

from ....errors import RefineFastError, RefineFastWarning
from ..columns import TEXT_NAMES, named
from ..jsonl import read_jsonl
from .content import Unreadable, missing
from .encoding import decode, marked_encoding
from .files import read_bytes

Row = dict[str, Any]
Rows = Iterator[tuple[int | str, Row]]
"""(place, row): the place is the row's number or line from 1, or its key."""

Item = TypeVar("Item")

_NAMED_DELIMITER = re.compile(r'"?sep=([,;\t|])"?\r?\n', re.IGNORECASE)
"""The first line by which Excel is told the delimiter of a CSV file."""
MAX_TABLE_BYTES = 1 << 30

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".xlsx", ".parquet")
"""Suffixes of the files that hold one document a row; all but the last two may end in .gz too."""


def table_suffix(path: Path) -> str | None:
    """The suffix in SUFFIXES that says how to read this file; None: it is not a table."""
    name = path.name.lower()
    packed = name.endswith(".gz")
    name = name.removesuffix(".gz")
    suffix = next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)
    return None if packed and suffix in (".xlsx", ".parquet") else suffix


def read_table(path: Path, encoding: str | None = None) -> Rows:
    """Every row that is not blank, with its place; in a workbook of several sheets, the sheet's
    title is before it.

    A row maps column names to values. In JSON it is an object: in a list, alone in its file, or
    under its id in an object of objects.

    Raises:
        RefineFastError: for a malformed row; the message names file, line and remedy.
        Unreadable: if the file as a whole cannot be read.
    """
    for title, rows in _tables(path, encoding):
        for place, row in rows:
            yield (f"{title}:{place}" if title else place), row


def read_each(
    path: Path, encoding: str | None, read: Callable[[str, Rows], list[Item]]
) -> list[tuple[str, list[Item]]]:
    """(title, what ``read`` makes of the title and the rows) of every table in a file: of the
    sheets of a workbook, each of which may have columns of its own. The title is "" where there is
    one table.

    A sheet that ``read`` refuses is named in a RefineFastWarning, unless there is no other.

    Raises:
        RefineFastError: as ``read_table``, or of ``read``.
        Unreadable: as ``read_table``.
    """
    found: list[tuple[str, list[Item]]] = []
    refused: list[tuple[str, RefineFastError]] = []
    for title, rows in _tables(path, encoding):
        try:
            found.append((title, read(title, rows)))
        except RefineFastError as error:
            refused.append((title, error))
    if refused and not any(items for _, items in found):
        raise refused[0][1]
    for title, reason in refused:
        message = f"the sheet {title!r} of {path} is skipped: {reason}"
        warnings.warn(message, RefineFastWarning, stacklevel=3)
    return found


def _tables(path: Path, encoding: str | None) -> Iterator[tuple[str, Rows]]:
    suffix = table_suffix(path)
    if suffix == ".xlsx":
        yield from _sheets(path)
    elif suffix in (".jsonl", ".ndjson"):
        yield "", _json_lines(path, encoding)
    elif suffix == ".json":
        yield "", rows_of_json(path, read_json(path, encoding))
    elif suffix in (".csv", ".tsv"):
        yield "", _delimited(path, encoding)
    else:
        yield "", _parquet(path)


def is_utf8(path: Path) -> bool:
    """Whether a file, packed or not, is text in UTF-8. False for UTF-16 and UTF-32.

    Raises:
        Unreadable: if the file cannot be read.
    """
    data = _unpacked(path)
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return b"\0" not in data


def _unpacked(path: Path) -> bytes:
    data = read_bytes(path, MAX_TABLE_BYTES)
    if path.suffix.lower() == ".gz":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise Unreadable(f"it is not a complete gzip file ({error})") from None
    return data


def _text(path: Path, encoding: str | None) -> str:
    return decode(path, _unpacked(path), encoding)


def _json_lines(path: Path, encoding: str | None) -> Rows:
    if encoding is None:
        opener = gzip.open if path.suffix.lower() == ".gz" else open
        with suppress(OSError, EOFError, zlib.error), opener(path, "rb") as file:
            encoding = marked_encoding(file.read(4))
    return read_jsonl(path, encoding or "utf-8-sig", remedy="name its encoding with --encoding")


def read_json(path: Path, encoding: str | None = None) -> Any:
    """The value in a JSON file; of JSON lines under that name, the list of their objects.

    Raises:
        RefineFastError: for a malformed line of JSON lines.
        Unreadable: if the file is not JSON.
    """
    text = _text(path, encoding).strip()
    try:
        value, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"it is not JSON ({error}); one object a line is .jsonl") from None
    return value if end == len(text) else [row for _, row in _json_lines(path, encoding)]


def rows_of_json(path: Path, value: Any) -> Rows:
    """The rows of ``read_table`` in the value of a JSON file."""
    if isinstance(value, dict):
        value = _wrapped(value) or value
    if isinstance(value, dict) and value and all(isinstance(v, dict) for v in value.values()):
        yield from ((key, {"id": key} | row) for key, row in value.items())
    elif isinstance(value, dict):
        yield 1, value
    elif isinstance(value, list):
        for number, row in enumerate(value, 1):
            if isinstance(row, str):
                row = {"text": row}
            if not isinstance(row, dict):
                raise RefineFastError(
                    f"{path}:{number} holds a JSON {type(row).__name__}; each item of the list "
                    "must be an object {...} or a string."
                )
            yield number, row
    else:
        raise Unreadable(f"it holds a JSON {type(value).__name__}, not a list of objects")


def _wrapped(value: Row) -> list[Row] | None:
    """The rows in {"data": [{...}, ...]} and the like; None if the object is a document itself,
    such as an article with its comments: its text is no shorter than theirs on average."""
    lists = [item for item in value.values() if isinstance(item, list)]
    if len(lists) != 1 or not lists[0] or not all(isinstance(row, dict) for row in lists[0]):
        return None
    text = value.get(named(list(value), TEXT_NAMES) or "")
    theirs = fmean(max(_lengths(row), default=0) for row in lists[0])
    return None if isinstance(text, str) and len(text) >= theirs else lists[0]


def _lengths(row: Row) -> list[int]:
    return [len(value) for value in row.values() if isinstance(value, str)]


def read_cells(path: Path, encoding: str | None = None) -> Iterator[tuple[int, list[str]]]:
    """(line from 1, cells) of every row of a CSV or TSV file that is not blank, the header's too.

    Raises:
        RefineFastError: for malformed quotes.
        Unreadable: if the file cannot be read.
    """
    text = _text(path, encoding)
    yield from _cells(path, text, _delimiter(path, text))


def _cells(path: Path, text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(min(MAX_TABLE_BYTES, 2**31 - 1))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    before = 0
    try:
        for cells in reader:
            number, before = before + 1, reader.line_num  # a cell may hold line breaks
            if any(cell.strip() for cell in cells):
                yield number, cells
    except csv.Error as error:
        raise RefineFastError(
            f"{path}:{before + 1} is not CSV ({error}); close the double quotes, and write a quote "
            'inside a cell as "".'
        ) from None


def _delimited(path: Path, encoding: str | None) -> Rows:
    text = _text(path, encoding)
    named = _NAMED_DELIMITER.match(text)
    delimiter = named[1] if named else _delimiter(path, text)
    names: list[str] = []
    for number, cells in _cells(path, text, delimiter):
        if named and number == 1:
            continue
        if not names:
            names = _header(str(path), cells)
            continue
        if len(cells) > len(names) and any(cells[len(names) :]):
            raise RefineFastError(
                f"{path}:{number} has {len(cells)} cells and the header {len(names)}; put "
                f"cells that hold {delimiter!r} in double quotes."
            )
        # Programs leave out empty cells at the end of a row.
        yield number, dict(zip_longest(names, cells[: len(names)], fillvalue=""))


def _delimiter(path: Path, text: str) -> str:
    """The tab in TSV; in CSV the one of , ; tab and | that is the most frequent in the header,
    outside quotes."""
    if table_suffix(path) == ".tsv":
        return "\t"
    header = next((line for line in text.splitlines() if line.strip()), "")
    outside = "".join(header.split('"')[::2])
    return max(",;\t|", key=outside.count)


def _header(table: str, cells: list[Any]) -> list[str]:
    names = [" ".join(str(cell).split()) for cell in cells]
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice:
        raise RefineFastError(f"{table}: two columns are named {twice[0]!r}; rename one.")
    return names


def _sheets(path: Path) -> Iterator[tuple[str, Rows]]:
    try:
        import openpyxl
    except ImportError:
        raise missing("openpyxl", ".xlsx") from None
    data = read_bytes(path, MAX_TABLE_BYTES)
    try:
        book = openpyxl.load_workbook(io.BytesIO(data), read_only=True, data_only=True)
        sheets = [
            (sheet.title, list(sheet.iter_rows(values_only=True))) for sheet in book.worksheets
        ]
    except Exception as error:  # BadZipFile, KeyError, XML errors, ...
        raise Unreadable(f"it is not an Excel workbook ({type(error).__name__}: {error})") from None
    for title, rows in sheets:
        alone = len(sheets) == 1
        yield "" if alone else title, _sheet(str(path) if alone else f"{path}:{title}", rows)


def _sheet(table: str, rows: Sequence[Sequence[Any]]) -> Rows:
    """The rows of a sheet, the first that is not blank as its header."""
    names: list[str] = []
    for number, cells in enumerate(rows, 1):
        if all(cell is None or not str(cell).strip() for cell in cells):
            continue
        if not names:
            names = _header(table, ["" if cell is None else cell for cell in cells])
            continue
        yield number, {n: cell for n, cell in zip(names, cells, strict=False) if n}


def _parquet(path: Path) -> Rows:
    try:
        import pyarrow.parquet
    except ImportError:
        raise missing("pyarrow", ".parquet", "pipeline") from None
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except pyarrow.ArrowException as error:
        raise Unreadable(f"it is not a Parquet file that pyarrow can read ({error})") from None
    except OSError as error:
        raise Unreadable(f"{error.strerror or error}; check the file") from None

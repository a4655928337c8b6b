"""JSON lines, plain or gzipped: every error names the line, and no reader sees half a file."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

from ...errors import RefineFastError
from ...files import atomic
from .text import whole_characters

Record = TypeVar("Record")


def read_jsonl(
    path: Path,
    encoding: str = "utf-8-sig",
    *,
    remedy: str = "convert it with `iconv -f ENCODING -t UTF-8`",
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of every line that is not blank.

    Args:
        path: the file.
        encoding: of its text; a byte that is not valid in it is an error.
        remedy: what the message about such a byte advises.

    Raises:
        RefineFastError: for a malformed line; the message names file, line and remedy.
    """
    opener = gzip.open if path.suffix.lower() == ".gz" else open
    number = 0
    try:
        with opener(path, "rt", encoding=encoding) as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise RefineFastError(
                        f"{path}:{number} holds a JSON {type(row).__name__}; "
                        "each line must be an object {...}."
                    )
                yield number, row
    except UnicodeDecodeError as error:
        name = encoding.removesuffix("-sig").upper()
        raise RefineFastError(
            f"{path}:{_invalid_line(path, encoding, number + 1)} is not {name} ({error.reason}); "
            f"{remedy}."
        ) from None
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits
        raise RefineFastError(
            f"{path}:{number} is not JSON ({error}); write one JSON object a line."
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        raise RefineFastError(
            f"{path} cannot be read after line {number} ({error}); "
            "check that it exists and is complete."
        ) from None


def _invalid_line(path: Path, encoding: str, first: int) -> int:
    """The first line from ``first`` on that is not valid in ``encoding``: text is decoded block by
    block, so the error comes before the lines ahead of it are read."""
    opener = gzip.open if path.suffix.lower() == ".gz" else open
    with opener(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                line.decode(encoding)
            except UnicodeDecodeError:
                if number >= first:
                    return number
    return first


def text_field(
    row: dict[str, Any], names: tuple[str, ...], where: str, *, default: str | None = None
) -> str:
    """The first of the fields ``names`` that the row has, as a string.

    An integer is taken as its digits. JSON may carry half a surrogate pair: see
    ``whole_characters``.

    Args:
        row: a JSON object.
        names: the fields, the preferred one first.
        where: "<file>:<line>", for messages.
        default: returned if the row has none of the fields.

    Raises:
        RefineFastError: if the field is not a string, or is missing and ``default`` is None.
    """
    for name in names:
        value = row.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise RefineFastError(
                f'{where}: the field "{name}" is {value!r:.80}; it must be a string.'
            )
        return whole_characters(str(value))
    if default is None:
        if empty := [name for name in names if name in row]:
            raise RefineFastError(f'{where}: the field "{empty[0]}" is null; it must be a string.')
        raise RefineFastError(
            f'{where} has no field "{names[0]}" but only {sorted(row)!r:.200}; add it.'
        )
    return default


def read_records(path: Path, kind: type[Record]) -> list[Record]:
    """The dataclass instances that ``write_records`` wrote.

    Raises:
        RefineFastError: if the fields of a line are not those of ``kind``.
    """
    return list(each_record(path, kind))


def each_record(path: Path, kind: type[Record]) -> Iterator[Record]:
    """``read_records``, one at a time."""
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    for number, row in read_jsonl(path):
        if row.keys() != names:
            raise RefineFastError(
                f"{path}:{number} has the fields {sorted(row)}, not {sorted(names)}; "
                "delete it and run again."
            )
        yield kind(**row)


def write_records(path: Path, records: Iterable[Any]) -> None:
    """Writes one dataclass instance a line; the file appears once it is whole and on disk."""
    with atomic(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(asdict(record), ensure_ascii=False) + "\n")

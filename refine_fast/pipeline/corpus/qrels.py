"""Relevance judgements: BEIR's three columns and TREC's four."""

from __future__ import annotations

import csv
import math
from collections.abc import Collection
from pathlib import Path

from ...errors import RefineFastError

Qrels = dict[str, dict[str, float]]
"""Query id -> passage id -> grade. Above 0 is relevant."""


def read_qrels(path: Path, queries: Collection[str]) -> Qrels:
    """Reads ``query-id, corpus-id, score``, separated by tabs, or TREC's ``query-id, 0, corpus-id,
    score``, separated by any blanks.

    The first line is a header if its score is not a number and its query is unknown. The last
    judgement of a pair wins, as in BEIR.

    Args:
        path: The file.
        queries: The known query ids.

    Raises:
        RefineFastError: A file that cannot be read, a malformed line, or an unknown query.
    """
    if not path.is_file():
        splits = sorted(p.stem for p in path.parent.glob("*.tsv"))
        raise RefineFastError(
            f"{path} does not exist; the splits of this set are: {', '.join(splits) or 'none'}."
        )
    qrels: Qrels = {}
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                place = f"{path}:{number}"
                query, passage, score = _fields(line.rstrip("\n"), place)
                grade = _number(score)
                if grade is None and number == 1 and query not in queries:
                    continue  # a header
                if grade is None:
                    raise RefineFastError(f"{place}: the score must be a number (got {score!r}).")
                if query not in queries:
                    raise RefineFastError(
                        f"{place}: the query id {query!r} is not in the queries of this set; add it"
                        " there or remove the line."
                    )
                qrels.setdefault(query, {})[passage] = grade
    except (OSError, UnicodeDecodeError) as error:
        raise RefineFastError(
            f"{path} cannot be read as UTF-8 ({error}); fetch the set again."
        ) from None
    return qrels


def _fields(line: str, place: str) -> tuple[str, str, str]:
    """Query id, passage id and score of a line."""
    fields = next(csv.reader([line], delimiter="\t"), [])  # BEIR quotes as CSV does
    if len(fields) == 3:
        return fields[0], fields[1], fields[2].strip()
    fields = line.split("\t")
    if len(fields) != 4:
        fields = line.split()
    if len(fields) != 4:
        raise RefineFastError(
            f"{place} is {line!r:.80}; it must be query-id, corpus-id and score, separated by tabs,"
            " or TREC's query-id, 0, corpus-id and score."
        )
    query, _, passage, score = (field.strip() for field in fields)
    return query, passage, score


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None

"""The user's queries in their own words: files of this project and of other tools.

Read are the tables that documents may be in too (``corpus.formats.tables``: JSON lines, JSON, CSV,
TSV, Excel and Parquet), with one row per query:

    this project              {"text", "doc_id"}
    FlagEmbedding             {"query", "pos", "neg"}: texts
    tevatron                  {"query", "positive_passages": [{"docid", "title", "text"}]}, or
                              {"query_text", "positive_document_ids"}
    sentence-transformers     {"anchor", "positive", "negative"}: texts or ids
    ``refine-fast export``    each of its formats
    llama_index               EmbeddingQAFinetuneDataset: {"queries", "corpus", "relevant_docs"}
    GPL                       hard-negatives.jsonl beside qgen-queries.jsonl: {"qid", "pos", "neg"}
    BEIR, and GPL's output    a folder with queries.jsonl and qrels/, or with the prefix "qgen-"

Negatives in a file are not read: a run mines its own.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from ...errors import RefineFastError
from ..corpus.beir import dev_split, judged_queries, load_beir
from ..corpus.columns import plain
from ..corpus.formats.content import Unreadable
from ..corpus.formats.tables import (
    SUFFIXES,
    Row,
    Rows,
    is_utf8,
    read_cells,
    read_each,
    read_json,
    read_table,
    rows_of_json,
    table_suffix,
)
from ..corpus.jsonl import text_field
from ..corpus.text import passage_text

QUERY_FIELDS = ("query", "anchor", "question", "query_text", "sentence1", "text")
"""Names of the query's field; the first that a row has counts."""

POSITIVE_FIELDS = (
    "doc_id",
    "doc_ids",
    "corpus_id",
    "corpus-id",
    "docid",
    "passage_id",
    "document_id",
    "chunk_id",
    "positive_document_ids",
    "positive_passages",
    "positive",
    "positives",
    "pos",
    "positive_id",
    "positive_ids",
    "passage",
    "context",
    "document",
    "sentence2",
    "answer",
    "text",
)
"""Names of the field with the ids or texts that answer the query; likewise."""

ID_FIELDS = {"positive": "positive_id", "positives": "positive_ids", "pos": "pos_ids"}
"""Field with texts -> the field with their ids, where a row has both."""

QUERY_FILES = ("qgen-queries.jsonl", "queries.jsonl")
"""Where files that name their queries by id find them; the first that exists counts."""


_QRELS = ("qrels", "qgen-qrels")


@dataclass(frozen=True)
class Judgement:
    """A query, and a document or passage that answers it."""

    query: str
    where: str
    """File and line, for messages."""
    doc_id: str | None = None
    passage: str | None = None
    """The text of the passage; where both are given, the id is looked up first."""


def read_judgements(path: Path, encoding: str | None = None) -> Iterator[Judgement]:
    """Every judgement in a file, or of the split ``train`` in a folder.

    Args:
        path: the file, which ends in one of ``tables.SUFFIXES``, or the folder.
        encoding: of a file that is not UTF-8. None: JSON lines must be UTF-8, and the encoding of
            other files is detected.

    Raises:
        RefineFastError: if the format is unknown or a row is malformed: file, line, field, remedy.
    """
    if path.is_dir():
        yield from _folder(path)
        return
    if table_suffix(path) is None:
        raise RefineFastError(
            f"{path}: queries must be a BEIR folder or a file that ends in "
            f"{', '.join(SUFFIXES)}; convert it to JSON lines of {{text, doc_id}}."
        )
    try:
        yield from _file(path, None if encoding is None or is_utf8(path) else encoding)
    except Unreadable as reason:
        raise RefineFastError(f"{path} cannot be read: {reason}.") from None


def query_texts(path: Path) -> Path | None:
    """The file beside ``path`` that holds the texts of its queries; None if it holds them itself,
    or cannot be read."""
    if not path.is_file() or table_suffix(path) in (None, ".json"):
        return None
    with warnings.catch_warnings(), contextlib.suppress(RefineFastError, Unreadable, ValueError):
        warnings.simplefilter("ignore")  # reading the queries gives them
        if _names_by_id(path, next(read_table(path), None)):
            return _text_file(path.parent)
    return None


def query_files(path: Path) -> list[Path]:
    """What ``read_judgements`` reads of a file or folder besides passages; some may not exist."""
    if path.is_dir():
        texts = [f"{name}{packed}" for name in QUERY_FILES for packed in ("", ".gz")]
        return [path / name for name in (*texts, *_QRELS)]
    texts_beside = query_texts(path)
    return [path] if texts_beside is None else [path, texts_beside]


def _names_by_id(path: Path, first: tuple[int | str, Row] | None) -> bool:
    """Whether a table, with its first row, names its queries by id."""
    if table_suffix(path) == ".tsv" and (path.parent / QUERY_FILES[0]).is_file():
        return True
    return first is not None and "qid" in first[1] and "pos" in first[1]


def _text_file(folder: Path) -> Path | None:
    """The file of the queries' texts."""
    return next((folder / name for name in QUERY_FILES if (folder / name).is_file()), None)


def read_dev_judgements(path: Path) -> list[Judgement]:
    """The relevant passages of the split ``dev`` in a BEIR folder, or as ``dev_split`` finds it,
    which may hide its grades; none elsewhere.

    Raises:
        RefineFastError: if a file is malformed.
    """
    split = dev_split(path)
    if split is None:
        return []
    return [
        Judgement(_not_empty(text, f"{path}: query {id}"), f"query {id} of {split}", doc)
        for id, text, grades in judged_queries(path, [split])
        for doc, grade in grades.items()
        if grade > 0
    ]


def _not_empty(query: str, where: str) -> str:
    """The text of a query.

    Raises:
        RefineFastError: if it is blank, from which nothing can be learned.
    """
    if not query.strip():
        raise RefineFastError(f"{where} is empty; write the query or delete what judges it.")
    return query


def _folder(folder: Path) -> Iterator[Judgement]:
    own, gpl = _QRELS
    if (folder / gpl).is_dir() and not (folder / own).is_dir():
        yield from _gpl(folder / gpl / "train.tsv", folder)
        return
    judged = load_beir(folder, "train")
    row_of = {doc: row for row, doc in enumerate(judged.doc_ids)}
    for id, text, grades in zip(judged.query_ids, judged.queries, judged.qrels, strict=True):
        relevant = [doc for doc, grade in grades.items() if grade > 0]
        for doc in sorted(relevant, key=lambda doc: row_of.get(doc, len(row_of))):
            where = f"query {id} of train"
            yield Judgement(_not_empty(text, f"{folder}: query {id}"), where, doc)


def _file(path: Path, encoding: str | None) -> Iterator[Judgement]:
    if _names_by_id(path, None):
        yield from _gpl(path, path.parent, encoding)
        return

    def judgements(title: str, rows: Rows) -> list[Judgement]:
        first = next(rows, None)
        if first is None:
            return []
        if _names_by_id(path, first):
            return list(_gpl(path, path.parent, encoding))
        table = f"{path}:{title}" if title else path
        return [
            judgement
            for place, row in chain([first], rows)
            for judgement in _row(_filled(path, row), f"{table}:{place}")
        ]

    if table_suffix(path) == ".json":
        value = read_json(path, encoding)
        if isinstance(value, dict) and {"queries", "relevant_docs"} <= value.keys():
            yield from _llama_index(path, value)
        else:
            yield from judgements("", rows_of_json(path, value))
        return
    for _, found in read_each(path, encoding, judgements):
        yield from found


def _filled(path: Path, row: Row) -> Row:
    """The row of a table with plain values; in CSV, an empty cell is a missing one."""
    suffix = table_suffix(path)
    if suffix not in (".jsonl", ".ndjson", ".json"):
        row = {name: plain(value) for name, value in row.items()}
    if suffix in (".csv", ".tsv"):
        row = {name: value for name, value in row.items() if value}
    return row


def _gpl(path: Path, folder: Path, encoding: str | None = None) -> Iterator[Judgement]:
    """Files that name their queries by id: GPL's, and an exported BEIR folder's negatives.

    ``path``: hard-negatives.jsonl, gpl-training-data.tsv (no header) or qgen-qrels/<split>.tsv.
    """
    source = _text_file(folder)
    if source is None:
        raise RefineFastError(
            f"{path} names its queries by id; put {' or '.join(QUERY_FILES)} beside it."
        )
    queries = {}
    for number, row in read_table(source, encoding):
        where = f"{source}:{number}"
        queries[text_field(row, ("_id",), where)] = text_field(row, ("text",), where)
    seen = set()
    for place, id, doc_id in _gpl_pairs(path, encoding):
        if id not in queries:
            if place == 1 and table_suffix(path) == ".tsv":
                continue  # a header
            raise RefineFastError(f"{path}:{place}: query {id!r} is not in {source}; add it.")
        if (id, doc_id) not in seen:  # one line for each negative
            seen.add((id, doc_id))
            text = _not_empty(queries[id], f"{source}: query {id}")
            yield Judgement(text, f"{path}:{place}", doc_id)


def _gpl_pairs(path: Path, encoding: str | None) -> Iterator[tuple[int | str, str, str]]:
    """(place, query id, document id) of each positive in one of GPL's files."""
    if table_suffix(path) == ".tsv":
        for line, cells in read_cells(path, encoding):
            if len(cells) < 2:
                raise RefineFastError(
                    f"{path}:{line} has one column; it must name a query and a document, "
                    "separated by a tab."
                )
            yield line, cells[0], cells[1]
        return
    for place, row in read_table(path, encoding):
        id = text_field(row, ("qid",), f"{path}:{place}")
        for positive in _listed(row.get("pos", [])):
            yield place, id, str(positive)


def _llama_index(path: Path, value: Row) -> Iterator[Judgement]:
    """The judgements of an EmbeddingQAFinetuneDataset."""
    for field in ("queries", "relevant_docs", "corpus"):
        if not isinstance(value.get(field, {}), dict):
            raise RefineFastError(f'{path}: the field "{field}" must be an object {{id: ...}}.')
    corpus = value.get("corpus", {})
    for id, doc_ids in value["relevant_docs"].items():
        where = f"{path}: query {id}"
        if not isinstance(value["queries"].get(id), str):
            raise RefineFastError(f'{where} has no text in "queries"; add it.')
        query = _not_empty(value["queries"][id], where)
        for doc_id in _listed(doc_ids):
            yield Judgement(query, where, str(doc_id), corpus.get(str(doc_id)))


def _row(row: Row, where: str) -> Iterator[Judgement]:
    """The judgements of one row: one for each positive."""
    name = next((name for name in QUERY_FIELDS if row.get(name) is not None), None)
    if name is None:
        raise RefineFastError(
            f'{where} has no field "text" with the query but only {sorted(row)!r:.200}; add it.'
        )
    query = text_field(row, (name,), where)
    if not query.strip():
        raise RefineFastError(
            f'{where}: the field "{name}" is empty; write the query or delete the row.'
        )
    given = {key for key, value in row.items() if value is not None} - {name}
    field = next((field for field in POSITIVE_FIELDS if field in given), None)
    if field is None:
        raise RefineFastError(
            f'{where} has no field "doc_id" but only {sorted(row)!r:.200}; add it, or "positive" '
            "with the text."
        )
    ids = _listed(row.get(ID_FIELDS.get(field, ""), []))
    positives = _listed(row[field])
    if len(ids) != len(positives):
        ids = [None] * len(positives)
    for positive, id in zip(positives, ids, strict=True):
        if isinstance(positive, dict):
            names = (positive.get(key) for key in ("docid", "doc_id", "_id", "id"))
            id = next((str(name) for name in names if name is not None), None)
            text = passage_text(str(positive.get("title") or ""), str(positive.get("text") or ""))
            yield Judgement(query, where, id, text or None)
            continue
        value = text_field({field: positive}, (field,), where)
        if field.endswith(("id", "ids")):
            yield Judgement(query, where, value)
        else:
            yield Judgement(query, where, value if id is None else str(id), value)


def _listed(value: Any) -> list[Any]:
    """The items of a list, also of one that is written as JSON in a table's field."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with contextlib.suppress(ValueError):
            value = json.loads(value)
    return value if isinstance(value, list) else [value]

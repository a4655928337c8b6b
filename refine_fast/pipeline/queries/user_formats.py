"""The user's queries in their own words: files of this project and of other tools.

Read are JSON lines, JSON, CSV, TSV and parquet, with one row per query:

    this project              {"text", "doc_id"}
    FlagEmbedding             {"query", "pos", "neg"}: texts
    tevatron                  {"query", "positive_passages": [{"docid", "title", "text"}]}, or
                              {"query_text", "positive_document_ids"}
    sentence-transformers     {"anchor", "positive", "negative"}: texts or ids
    llama_index               EmbeddingQAFinetuneDataset: {"queries", "corpus", "relevant_docs"}
    GPL                       hard-negatives.jsonl beside qgen-queries.jsonl: {"qid", "pos", "neg"}
    BEIR, and GPL's output    a folder with queries.jsonl and qrels/, or with the prefix "qgen-"

Negatives in a file are not read: a run mines its own.
"""

from __future__ import annotations

import contextlib
import csv
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import RefineFastError
from ..corpus.beir import load_beir
from ..corpus.jsonl import read_jsonl, text_field
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
    "positive_document_ids",
    "positive_passages",
    "positive_id",
    "positive_ids",
    "positive",
    "positives",
    "pos",
    "passage",
    "context",
    "document",
    "sentence2",
    "answer",
    "text",
)
"""Names of the field with the ids or texts that answer the query; likewise."""


@dataclass(frozen=True)
class Judgement:
    """A query, and a document or passage that answers it."""

    query: str
    where: str
    """File and line, for messages."""
    doc_id: str | None = None
    passage: str | None = None
    """The text of the passage; where both are given, the id is looked up first."""


def read_judgements(path: Path, split: str = "train") -> Iterator[Judgement]:
    """Every judgement in a file or folder.

    Args:
        path: the file, by its ending .jsonl, .ndjson, .json (each also with .gz), .csv, .tsv or
            .parquet, or the folder.
        split: the file of ``qrels/`` to read in a BEIR folder.

    Raises:
        RefineFastError: if the format is unknown or a row is malformed: file, line, field, remedy.
    """
    if path.is_dir():
        yield from _folder(path, split)
        return
    endings = [ending.lower() for ending in path.suffixes if ending.lower() != ".gz"]
    reader = _READERS.get(endings[-1] if endings else "")
    if reader is None:
        raise RefineFastError(
            f"{path}: queries must be a BEIR folder or a file that ends in "
            f"{', '.join(_READERS)}; convert it to JSON lines of {{text, doc_id}}."
        )
    yield from reader(path)


def _folder(folder: Path, split: str) -> Iterator[Judgement]:
    if (folder / "qgen-qrels").is_dir() and not (folder / "qrels").is_dir():
        yield from _gpl(folder / "qgen-qrels" / f"{split}.tsv", folder)
        return
    judged = load_beir(folder, split)
    row_of = {doc: row for row, doc in enumerate(judged.doc_ids)}
    for id, text, grades in zip(judged.query_ids, judged.queries, judged.qrels, strict=True):
        relevant = [doc for doc, grade in grades.items() if grade > 0]
        for doc in sorted(relevant, key=lambda doc: row_of.get(doc, len(row_of))):
            yield Judgement(text, f"query {id} of {split}", doc)


def _json_lines(path: Path) -> Iterator[Judgement]:
    rows = read_jsonl(path)
    first = next(rows, None)
    if first is None:
        return
    if "qid" in first[1] and "pos" in first[1]:
        yield from _gpl(path, path.parent)
        return
    yield from _row(first[1], f"{path}:{first[0]}")
    for number, row in rows:
        yield from _row(row, f"{path}:{number}")


def _gpl(path: Path, folder: Path) -> Iterator[Judgement]:
    """GPL's files, which name their queries by id.

    ``path``: hard-negatives.jsonl, gpl-training-data.tsv (no header) or qgen-qrels/<split>.tsv.
    """
    source = folder / "qgen-queries.jsonl"
    if not source.is_file():
        raise RefineFastError(f"{path} names its queries by id; put qgen-queries.jsonl beside it.")
    queries = {}
    for number, row in read_jsonl(source):
        where = f"{source}:{number}"
        queries[text_field(row, ("_id",), where)] = text_field(row, ("text",), where)
    if path.suffix == ".tsv":
        table = (
            (line, fields[0], fields[1])
            for line, fields in _lines(path, "\t")
            if not (line == 1 and fields[0] not in queries)  # a header
        )
    else:
        table = (
            (number, text_field(row, ("qid",), f"{path}:{number}"), str(positive))
            for number, row in read_jsonl(path)
            for positive in _listed(row.get("pos", []))
        )
    seen = set()
    for number, id, doc_id in table:
        if id not in queries:
            raise RefineFastError(f"{path}:{number}: query {id!r} is not in {source}; add it.")
        if (id, doc_id) not in seen:  # one line for each negative
            seen.add((id, doc_id))
            yield Judgement(queries[id], f"{path}:{number}", doc_id)


def _json(path: Path) -> Iterator[Judgement]:
    """llama_index's dataset, or a list of rows."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError:
        yield from _json_lines(path)  # JSON lines under the name of JSON
        return
    except (OSError, UnicodeDecodeError) as error:
        raise RefineFastError(f"{path} cannot be read ({error}); give UTF-8 JSON.") from None
    if isinstance(value, dict) and {"queries", "relevant_docs"} <= value.keys():
        corpus = value.get("corpus", {})
        for id, doc_ids in value["relevant_docs"].items():
            where = f"{path}: query {id}"
            if not isinstance(value["queries"].get(id), str):
                raise RefineFastError(f'{where} has no text in "queries"; add it.')
            for doc_id in _listed(doc_ids):
                yield Judgement(value["queries"][id], where, str(doc_id), corpus.get(doc_id))
        return
    rows = [value] if isinstance(value, dict) else value
    if not isinstance(rows, list):
        raise RefineFastError(f"{path} must hold a JSON list of rows {{text, doc_id}}.")
    for number, row in enumerate(rows, 1):
        where = f"{path}: row {number}"
        if not isinstance(row, dict):
            raise RefineFastError(f"{where} is a {type(row).__name__}; it must be an object.")
        yield from _row(row, where)


def _table(path: Path) -> Iterator[Judgement]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    lines = _lines(path, delimiter)
    _, names = next(lines, (0, []))
    if delimiter == "\t" and (path.parent / "qgen-queries.jsonl").is_file():
        yield from _gpl(path, path.parent)
        return
    for number, fields in lines:
        row = {name: value for name, value in zip(names, fields, strict=False) if value}
        if row:
            yield from _row(row, f"{path}:{number}")


def _lines(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """(line number, fields) of a table in text form."""
    csv.field_size_limit(2**31 - 1)  # a field may hold a long document
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=delimiter)
            for fields in reader:
                if fields:
                    yield reader.line_num, fields
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise RefineFastError(
            f"{path} cannot be read as a table ({error}); give UTF-8 with column names in the "
            "first line."
        ) from None


def _parquet(path: Path) -> Iterator[Judgement]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield from _row(row, f"{path}: row {number}")
    except (OSError, pyarrow.ArrowException) as error:
        raise RefineFastError(f"{path} cannot be read as parquet ({error}).") from None


_READERS: Mapping[str, Callable[[Path], Iterator[Judgement]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _table,
    ".tsv": _table,
    ".parquet": _parquet,
}


def _row(row: dict[str, Any], where: str) -> Iterator[Judgement]:
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
    for positive in _listed(row[field]):
        if isinstance(positive, dict):
            ids = (positive.get(key) for key in ("docid", "doc_id", "_id", "id"))
            id = next((str(id) for id in ids if id is not None), None)
            text = passage_text(str(positive.get("title") or ""), str(positive.get("text") or ""))
            yield Judgement(query, where, id, text or None)
            continue
        value = text_field({field: positive}, (field,), where)
        is_id = field.endswith(("id", "ids"))
        yield Judgement(query, where, value, None if is_id else value)


def _listed(value: Any) -> list[Any]:
    """The items of a list, also of one that is written as JSON in a table's field."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with contextlib.suppress(ValueError):
            value = json.loads(value)
    return value if isinstance(value, list) else [value]

"""The user's own queries."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ...errors import RefineFastError, RefineFastWarning
from ..corpus.beir import load_beir
from ..corpus.chunk import Chunk
from ..corpus.jsonl import read_jsonl, text_field
from .query import Query
from .splits import without


def load_queries(path: Path, chunks: Sequence[Chunk], split: str = "train") -> list[Query]:
    """The user's queries: JSON lines of {"text", "doc_id"}, or a BEIR folder, of which ``qrels/<split>.tsv`` is used.

    One Query for each judgement above 0. ``doc_id`` names a chunk or a document; of a document cut in several chunks it takes the one with
    the highest tf-idf similarity to the query. A BEIR question that another split asks too, word for word, is left out: it would be
    trained on and tested with. A doc_id that is no chunk (removed as a duplicate, say) is counted in a RefineFastWarning; RefineFastError
    if none is one, and for a malformed row: file, line, field.
    """
    if not path.exists():
        raise RefineFastError(
            f'{path} does not exist; give JSON lines of {{"text", "doc_id"}} or a BEIR folder.'
        )
    judgements = list(_beir_judgements(path, split) if path.is_dir() else _jsonl_judgements(path))
    find = _finder(chunks)
    queries, missing = [], []
    for text, doc_id, where in judgements:
        if chunk := find(doc_id, text):
            queries.append(Query(text, chunk.id, "user"))
        else:
            missing.append(f'"{doc_id}" at {where}')
    if not queries:
        found = (
            f"none of its {len(missing)} doc_ids is a document, the first being {missing[0]}"
            if missing
            else "it holds no queries"
        )
        raise RefineFastError(
            f"{path}: {found}; its doc_id must be ids of the documents, such as {chunks[0].id!r}."
        )
    if missing:
        warnings.warn(
            f"{path}: {len(missing)} of {len(judgements)} queries are skipped because their doc_id is no document, the first {missing[0]}.",
            RefineFastWarning,
            stacklevel=2,
        )
    if path.is_dir():
        others = sorted(other.stem for other in path.glob("qrels/*.tsv") if other.stem != split)
        queries = without(
            queries, [text for other in others for text in load_beir(path, other).queries]
        )
    return list(dict.fromkeys(queries))


def _jsonl_judgements(path: Path) -> Iterator[tuple[str, str, str]]:
    """(query text, document id, where it stands) of every line."""
    for number, row in read_jsonl(path):
        where = f"{path}:{number}"
        text = text_field(row, ("text",), where)
        if not text.strip():
            raise RefineFastError(
                f'{where}: the field "text" is empty; write the query or delete the line.'
            )
        yield text, text_field(row, ("doc_id",), where), where


def _beir_judgements(folder: Path, split: str) -> Iterator[tuple[str, str, str]]:
    judged = load_beir(folder, split)
    row_of = {doc: row for row, doc in enumerate(judged.doc_ids)}
    for id, text, grades in zip(judged.query_ids, judged.queries, judged.qrels, strict=True):
        relevant = [doc for doc, grade in grades.items() if grade > 0]
        for doc in sorted(relevant, key=lambda doc: row_of.get(doc, len(row_of))):
            yield text, doc, f"query {id} of {split}"


def _finder(chunks: Sequence[Chunk]) -> Callable[[str, str], Chunk | None]:
    """(doc_id, query text) -> the chunk that is meant."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    by_id = {chunk.id: chunk for chunk in chunks}
    parts = defaultdict(list)
    for chunk in chunks:
        document, mark, number = chunk.id.rpartition("#")
        if mark and number.isdigit():
            parts[document].append(chunk)

    def find(doc_id: str, text: str) -> Chunk | None:
        if doc_id in by_id or doc_id not in parts:
            return by_id.get(doc_id)
        candidates = parts[doc_id]
        table = TfidfVectorizer(sublinear_tf=True).fit_transform(
            [text, *(chunk.passage for chunk in candidates)]
        )
        return candidates[int((table[1:] @ table[0].T).toarray().argmax())]

    return find

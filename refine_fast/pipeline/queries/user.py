"""The user's own queries, each assigned to the chunk that answers it."""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from ...errors import RefineFastError, RefineFastWarning
from ..corpus.beir import dev_split, judged_queries
from ..corpus.chunk import Chunk, document_id
from ..corpus.dedup import shingles
from ..corpus.text import normalize, words
from .query import Query
from .splits import without
from .user_formats import Judgement, read_dev_judgements, read_judgements

MIN_CONTAINMENT = 0.8
"""Share of the shorter text's shingles that the other must have for the two to be the same."""


Say = Callable[[str], None]
"""Is told a line for the user."""


def _ignore(_: str) -> None:
    pass


def load_queries(
    path: Path, chunks: Sequence[Chunk], encoding: str | None = None, *, say: Say = _ignore
) -> list[Query]:
    """The user's queries, from any file that ``user_formats`` reads; of a BEIR folder, its split
    ``train``, without what another split asks too: it would be trained on and tested with.

    A judgement names a chunk or a document by its id, or gives the text. Of a document that was cut
    into several chunks, the chunk with the highest tf-idf similarity to the query counts.

    Args:
        path: file or folder.
        chunks: all chunks.
        encoding: of a file that is not UTF-8; None: see ``read_judgements``.
        say: is told how many queries other splits ask.

    Returns:
        One query of kind "user" for each judgement that names a chunk.

    Raises:
        RefineFastError: if a row is malformed, no judgement names a chunk, or other splits ask
            every query. The number of judgements that name no chunk (removed as a duplicate, say)
            is a RefineFastWarning.
    """
    if not path.exists():
        raise RefineFastError(
            f'{path} does not exist; give JSON lines of {{"text", "doc_id"}} or a BEIR folder.'
        )
    judgements = list(read_judgements(path, encoding))
    found = _Finder(chunks).find(judgements)
    missing = [item for item, chunk in zip(judgements, found, strict=True) if chunk is None]
    if not judgements:
        raise RefineFastError(f"{path} holds no queries; add some.")
    if len(missing) == len(judgements):
        raise RefineFastError(
            f"{path}: none of its {len(missing)} queries names a document, the first "
            f"{_named(missing[0])}; give ids of the documents, such as {chunks[0].id!r}, or their "
            "texts."
        )
    queries = _unlike(_queries(path, judgements, found), path, ["train"], say)
    if not queries:
        raise RefineFastError(
            f"{path}: the other splits in qrels/ ask every query of train.tsv too, which leaves "
            "none to train on; take them out of those, or give other queries."
        )
    return queries


def load_dev_queries(path: Path, chunks: Sequence[Chunk], *, say: Say = _ignore) -> list[Query]:
    """The split ``dev`` of a BEIR folder, or as ``dev_split`` finds it, without what a split asks
    that is neither this one nor train. ``say``: as of ``load_queries``.

    Returns:
        As of ``load_queries``; none if ``path`` has no such split, or it names no chunk.
    """
    split = dev_split(path)
    if split is None:
        return []
    judgements = read_dev_judgements(path)
    found = _Finder(chunks).find(judgements)
    return _unlike(_queries(path, judgements, found), path, [split, "train"], say)


def _queries(
    path: Path, judgements: Sequence[Judgement], found: Sequence[Chunk | None]
) -> list[Query]:
    missing = [item for item, chunk in zip(judgements, found, strict=True) if chunk is None]
    if missing:
        warnings.warn(
            f"{path}: {len(missing)} of {len(judgements)} queries are skipped because they name no "
            f"document, the first {_named(missing[0])}.",
            RefineFastWarning,
            stacklevel=3,
        )
    return [
        Query(item.query, chunk.id, "user")
        for item, chunk in zip(judgements, found, strict=True)
        if chunk is not None
    ]


def _unlike(queries: Sequence[Query], path: Path, splits: Sequence[str], say: Say) -> list[Query]:
    """The queries, each once, that no split of a BEIR folder but ``splits`` asks; the first of
    those is that of the queries."""
    kept = without(queries, texts_of_other_splits(path, splits))
    say_left_out(queries, kept, f"of the split {splits[0]} ", "other splits ask", say)
    return list(dict.fromkeys(kept))


def texts_of_other_splits(path: Path, splits: Sequence[str]) -> list[str]:
    """What the splits of a BEIR folder ask that are not among ``splits``; nothing elsewhere."""
    files = sorted(path.glob("qrels/*.tsv")) if path.is_dir() else []
    others = [each.stem for each in files if each.stem not in splits]
    return [text for _, text, _ in judged_queries(path, others)]


def say_left_out(
    queries: Sequence[Query], kept: Sequence[Query], which: str, who: str, say: Say
) -> None:
    """Says how many of the queries, each text once, are not kept, if any."""
    before, after = (len({query.text for query in each}) for each in (queries, kept))
    if after < before:
        say(f"  {before - after:,} of {before:,} queries {which}are left out, since {who} them too")


def _named(judgement: Judgement) -> str:
    return f'"{(judgement.doc_id or judgement.passage or "")[:60]}" at {judgement.where}'


class _Finder:
    """Finds the chunk of a judgement: by id, by the same text, by most of the text."""

    def __init__(self, chunks: Sequence[Chunk]) -> None:
        self._chunks = chunks
        self._by_id = {chunk.id: chunk for chunk in chunks}
        self._parts = defaultdict(list)
        for chunk in chunks:
            if (document := document_id(chunk.id)) != chunk.id:
                self._parts[document].append(chunk)

    def find(self, judgements: Sequence[Judgement]) -> list[Chunk | None]:
        """The chunk of each judgement; None where there is none."""
        candidates = [self._of_id(item.doc_id or "") for item in judgements]
        texts = {
            item.passage
            for item, named in zip(judgements, candidates, strict=True)
            if not named and item.passage
        }
        by_text = self._find_texts(sorted(texts)) if texts else {}
        alike: dict[int, list[int]] = defaultdict(list)  # rows with the same candidates
        for row, item in enumerate(judgements):
            candidates[row] = candidates[row] or by_text.get(item.passage or "", [])
            alike[id(candidates[row])].append(row)
        found: list[Chunk | None] = [None] * len(judgements)
        for rows in alike.values():
            queries = [judgements[row].query for row in rows]
            for row, chunk in zip(rows, _most_similar(queries, candidates[rows[0]]), strict=True):
                found[row] = chunk
        return found

    def _of_id(self, id: str) -> list[Chunk]:
        """The chunk with this id, or the chunks of the document."""
        return [self._by_id[id]] if id in self._by_id else self._parts.get(id, [])

    def _find_texts(self, texts: Sequence[str]) -> dict[str, list[Chunk]]:
        """For each text, the chunks with the same text, or else those that it shares most with."""
        same: dict[str, Chunk] = {}
        for chunk in self._chunks:
            for text in (chunk.text, chunk.passage):
                same.setdefault(normalize(text), chunk)
        found = {text: [same[key]] for text in texts if (key := normalize(text)) in same}
        # The index holds the texts, not the corpus, which may be much larger.
        wanted = {text: shingles(text) for text in texts if text not in found}
        index = defaultdict(list)
        for text, own in wanted.items():
            for shingle in own:
                index[shingle].append(text)
        for chunk in self._chunks if index else ():
            own = shingles(chunk.text)
            shared = Counter(text for shingle in own for text in index.get(shingle, ()))
            for text, count in shared.items():
                if count >= MIN_CONTAINMENT * min(len(own), len(wanted[text])):
                    found.setdefault(text, []).append(chunk)
        return found


def _most_similar(queries: Sequence[str], candidates: Sequence[Chunk]) -> list[Chunk | None]:
    """For each query, the candidate with the highest tf-idf similarity; None without candidates."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    if len(candidates) < 2 or not any(words(chunk.passage) for chunk in candidates):
        return [next(iter(candidates), None)] * len(queries)
    vectorizer = TfidfVectorizer(sublinear_tf=True, tokenizer=words, token_pattern=None)
    table = vectorizer.fit_transform([chunk.passage for chunk in candidates])
    asked = vectorizer.transform(queries)
    # One query at a time: the similarities of all might not fit into memory.
    best = ((table @ asked[[row]].T).toarray().argmax() for row in range(len(queries)))
    return [candidates[int(row)] for row in best]

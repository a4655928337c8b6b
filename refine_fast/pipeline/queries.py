"""Queries to train with: made from the chunks without an LLM, or the user's own."""

from __future__ import annotations

import random
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

from ..errors import RefineFastError, RefineFastWarning
from .chunks import Chunk, words
from .jsonl import read_jsonl, text_field
from .retrieval_set import load_beir


@dataclass(frozen=True)
class Query:
    """A query that the chunk ``chunk_id`` answers. kind: "cloze", "title" or "span" (``synthesize_queries``), "user", or "llm:<kind>"."""

    text: str
    chunk_id: str
    kind: str


# The kinds are dealt in turn, each chunk from a place of its own drawing.
TURNS = ("cloze", "span", "cloze", "title")


def synthesize_queries(chunks: Sequence[Chunk], *, seed: int, per_chunk: int = 2) -> list[Query]:
    """At most ``per_chunk`` queries of each chunk without an LLM, of the kinds of TURNS, fewer where the chunk has not enough to offer:

    - "cloze": a sentence of the chunk (the inverse cloze task of Lee et al. 2019, arXiv 1906.00300; the chunk stays whole, since finding
      the words of a question in the passage is part of the task);
    - "title": the title, and where several chunks share it, their own best term with it;
    - "span": a few of the chunk's terms with the highest tf-idf, in the order of the text, as one types into a search box.

    Seeded per chunk, so that a chunk's queries do not depend on the other chunks' draws. An LLM writes better ones: these teach the
    collection's words, not how people ask.
    """
    terms = _salient_terms(chunks)
    sharing = Counter(chunk.title for chunk in chunks)
    queries = []
    for chunk, best in zip(chunks, terms, strict=True):
        rng = random.Random(f"{seed}:{chunk.id}")
        first = rng.randrange(len(TURNS))
        count = Counter(islice(cycle(TURNS), first, first + per_chunk))
        made = {
            "cloze": _cloze(chunk, count["cloze"], rng),
            "title": _title(chunk, best, sharing[chunk.title] > 1, count["title"], rng),
            "span": _span(chunk, best, count["span"], rng),
        }
        queries += [Query(text, chunk.id, kind) for kind, texts in made.items() for text in dict.fromkeys(texts)]
    return queries


def _cloze(chunk: Chunk, count: int, rng: random.Random) -> list[str]:
    sentences = _sentences(chunk.text)
    return rng.sample(sentences, min(count, len(sentences)))


def _title(chunk: Chunk, best: list[str], shared: bool, count: int, rng: random.Random) -> list[str]:
    if not chunk.title:
        return []
    if not shared:
        return [chunk.title][:count]
    return [f"{chunk.title} {term}" for term in rng.sample(best, min(count, len(best)))]


def _span(chunk: Chunk, best: list[str], count: int, rng: random.Random) -> list[str]:
    if len(best) < 3:
        return []
    text = chunk.text.casefold()
    return [" ".join(sorted(rng.sample(best, rng.randint(2, min(4, len(best)))), key=text.find)) for _ in range(count)]


def _sentences(text: str) -> list[str]:
    """The sentences of 6 to 60 words, line breaks taken out."""
    from sentencex import segment

    sentences = (" ".join(sentence.split()) for sentence in segment("en", text))
    return [sentence for sentence in sentences if 6 <= len(words(sentence)) <= 60]


def _salient_terms(chunks: Sequence[Chunk], most: int = 8) -> list[list[str]]:
    """Of each chunk the words and pairs of words with the highest tf-idf, best first, no word twice."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(ngram_range=(1, 2), stop_words="english", token_pattern=r"(?u)\b[^\W_]\w+\b", sublinear_tf=True)
    try:
        table = vectorizer.fit_transform(chunk.text for chunk in chunks)
    except ValueError:  # no text has a word that is no stop word
        return [[] for _ in chunks]
    names = vectorizer.get_feature_names_out()
    best = []
    for row in table:
        terms: list[str] = []
        for at in row.data.argsort(kind="stable")[::-1]:
            term = names[row.indices[at]]
            if not set(term.split()) & set(" ".join(terms).split()):
                terms.append(term)
            if len(terms) == most:
                break
        best.append(terms)
    return best


def load_queries(path: Path, chunks: Sequence[Chunk], split: str = "train") -> list[Query]:
    """The user's queries: JSON lines of {"text", "doc_id"}, or a BEIR folder, of which ``qrels/<split>.tsv`` is used.

    One Query for each judgement above 0. ``doc_id`` names a chunk or a document; of a document cut in several chunks it takes the one with
    the highest tf-idf similarity to the query. A BEIR question that another split asks too, word for word, is left out: it would be
    trained on and tested with. A doc_id that is no chunk (removed as a duplicate, say) is counted in a RefineFastWarning; RefineFastError
    if none is one, and for a malformed row: file, line, field.
    """
    if not path.exists():
        raise RefineFastError(f'{path} does not exist; give JSON lines of {{"text", "doc_id"}} or a BEIR folder.')
    judgements = list(_beir_judgements(path, split) if path.is_dir() else _jsonl_judgements(path))
    find = _finder(chunks)
    queries, missing = [], []
    for text, doc_id, where in judgements:
        if chunk := find(doc_id, text):
            queries.append(Query(text, chunk.id, "user"))
        else:
            missing.append(f'"{doc_id}" at {where}')
    if not queries:
        found = f"none of its {len(missing)} doc_ids is a document, the first being {missing[0]}" if missing else "it holds no queries"
        raise RefineFastError(f"{path}: {found}; its doc_id must be ids of the documents, such as {chunks[0].id!r}.")
    if missing:
        warnings.warn(
            f"{path}: {len(missing)} of {len(judgements)} queries are skipped because their doc_id is no document, the first {missing[0]}.",
            RefineFastWarning,
            stacklevel=2,
        )
    if path.is_dir():
        others = sorted(other.stem for other in path.glob("qrels/*.tsv") if other.stem != split)
        queries = without(queries, [text for other in others for text in load_beir(path, other).queries])
    return list(dict.fromkeys(queries))


def _jsonl_judgements(path: Path) -> Iterator[tuple[str, str, str]]:
    """(query text, document id, where it stands) of every line."""
    for number, row in read_jsonl(path):
        where = f"{path}:{number}"
        text = text_field(row, ("text",), where)
        if not text.strip():
            raise RefineFastError(f'{where}: the field "text" is empty; write the query or delete the line.')
        yield text, text_field(row, ("doc_id",), where), where


def _beir_judgements(folder: Path, split: str) -> Iterator[tuple[str, str, str]]:
    judged = load_beir(folder, split)
    for id, text, relevant in zip(judged.query_ids, judged.queries, judged.relevant, strict=True):
        for row in sorted(relevant):
            yield text, judged.doc_ids[row], f"query {id} of {split}"


def without(queries: Sequence[Query], texts: Sequence[str]) -> list[Query]:
    """The queries whose words, case and spacing aside, are not among ``texts``: what may be trained on when those are the test queries."""

    def plain(text: str) -> str:
        return " ".join(text.casefold().split())

    taken = {plain(text) for text in texts}
    return [query for query in queries if plain(query.text) not in taken]


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
        table = TfidfVectorizer(sublinear_tf=True).fit_transform([text, *(chunk.passage for chunk in candidates)])
        return candidates[int((table[1:] @ table[0].T).toarray().argmax())]

    return find

"""Which candidates become queries. Every filter names its reason, and every drop is counted."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import regex

from ....ops.band_topk import band_topk
from ...corpus.near_duplicates import near_duplicate_mask
from ...corpus.text import normalized_words, word_count, words
from ...encoder.encode import mean_product_of_lengths
from ..prose import not_prose
from .languages import is_question, other_language
from .passage_reference import refers_to_passage
from .reply_parser import Candidate, Parsed, no_query

MIN_WORDS, MAX_WORDS, MAX_CHARACTERS = 2, 48, 300
"""Length of a query; words as ``word_count`` estimates them, so that every script counts alike."""

_UNSPACED_MIN_WORDS = 1
"""The same where blanks do not separate words, and the count is an estimate."""

MIN_LEAD = 0.02
"""A query is vague if its own chunk leads its neighbours by less. Of 250 questions that people
asked about 253 passages of SQuAD, 5% do under MiniLM; of questions such as "What is the purpose of
the text?", 70%."""

NEIGHBOURS = 10
"""Chunks that resemble a query's own, with which it is compared."""

_EVERY = (-np.inf, np.inf)
"""The band that holds every similarity, a dot product's too."""

_OF_ITSELF = re.compile(
    r"\b(?:quer(?:y|ies)|questions?|keywords?|claims?|passage|text|assist|help|provide)\b", re.I
)
"""What a preamble or a refusal speaks of."""

_LOOP = regex.compile(r"\b(\w+)(?:\W+\1\b){3}", regex.IGNORECASE)

_PLACEHOLDER = re.compile(
    r"^[.…\-_\s<\[{(]*"
    r"(?:(?:your |the )?(?:query|question|text|keywords?|string|placeholder)"
    r"(?: ?\d+| here| text)?)?"
    r"[.…\-_\s>\]})]*$",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Accepted:
    """What of a reply becomes queries."""

    queries: list[tuple[str, str]]
    """(kind, text)"""
    dropped: Counter[str]
    """Reason -> number of candidates."""
    how: str
    """See :class:`Parsed`."""


def accept(
    parsed: Parsed, passage: str, mix: Iterable[str], limit: int, prompt: str = ""
) -> Accepted:
    """The candidates that become queries for the passage: those that pass ``check``.

    Args:
        parsed: the reply's candidates.
        passage: the passage that the model was given.
        mix: the kinds that were asked for.
        limit: the number of queries that was asked for.
        prompt: the request without its passage; weak models answer with its examples.
    """
    queries: list[tuple[str, str]] = []
    dropped = parsed.dropped.copy()
    if parsed.how == "nothing":
        dropped["no query in the reply"] += 1
    for candidate in parsed.candidates:
        kind = kind_of(candidate, mix, passage)
        reason = check(candidate.text, passage, kind, prompt) or (
            None if len(queries) < limit else "more than asked for"
        )
        if reason:
            dropped[reason] += 1
        else:
            queries.append((kind, candidate.text))
    return Accepted(queries, dropped, parsed.how)


def kind_of(candidate: Candidate, mix: Iterable[str], passage: str) -> str:
    """The kind that the reply names, if it was asked for.

    Where it names none: the only kind that was asked for, or what the text looks like.
    """
    kinds = list(mix)
    named = re.sub(r"[_ ]", "-", (candidate.kind or "").strip().lower())
    if same := [kind for kind in kinds if kind.rstrip("s") == named.rstrip("s")]:
        return same[0]
    if len(kinds) == 1:
        return kinds[0]
    return "question" if "question" in kinds and is_question(candidate.text, passage) else "query"


def check(text: str, passage: str, kind: str, prompt: str = "") -> str | None:
    """Why the text is not a query of this kind for the passage; None when it is one."""
    if not any(c.isalpha() for c in text) or _PLACEHOLDER.match(text):
        return "empty"
    length = word_count(text)
    if length < (MIN_WORDS if length == len(words(text)) else _UNSPACED_MIN_WORDS):
        return "too short"
    if length > MAX_WORDS or len(text) > MAX_CHARACTERS:
        return "too long"
    of_named_kind = kind not in ("question", "query")  # the reply says what it is
    if (reason := no_query(text)) and not (of_named_kind and not _OF_ITSELF.search(text)):
        return reason
    if reason := not_prose(text, may_name_code=of_named_kind):
        return reason
    if _LOOP.search(text):
        return "repeats itself"
    if refers_to_passage(text):
        return 'refers to "the passage"'
    if is_copy(text, passage):
        return "copy of the passage"
    if length > 3 and f" {normalized_words(text)} " in f" {normalized_words(prompt)} ":
        return "copy of the prompt"
    if kind == "question" and is_question(text, passage) is False:
        return "not a question"
    if kind == "question" and re.search(r"[?？؟][^?？؟]*\w[^?？؟]*$", text):
        return "carries its answer"
    if other_language(text, passage):
        return "wrong language"
    return None


def is_copy(text: str, passage: str) -> bool:
    """Whether a text of six words or more is copied from the passage.

    It is if four fifths of its runs of five words occur in the passage; all of them for a question,
    since people also ask in the passage's words. Where blanks do not separate words, runs are as
    many characters as five words have.
    """
    found = normalized_words(text).split()
    count = word_count(text)
    if count < 6:
        return False
    run = round(5 * len(found) / count)
    inside = f" {normalized_words(passage)} "
    runs = [f" {' '.join(found[at : at + run])} " for at in range(len(found) - run + 1)]
    needed = 0.8 if is_question(text, passage) is False else 1.0
    return sum(run in inside for run in runs) >= needed * len(runs)


def exact_duplicates(texts: Iterable[str]) -> list[str | None]:
    """Per text, in order: "exact duplicate" if an earlier one has the same words, otherwise None.

    Case, punctuation and blanks do not count.
    """
    seen: set[str] = set()
    verdicts: list[str | None] = []
    for plain in map(normalized_words, texts):
        verdicts.append("exact duplicate" if plain in seen else None)
        seen.add(plain)
    return verdicts


def near_duplicates(texts: Iterable[str], *, threshold: float = 0.9) -> list[str | None]:
    """Per text, in order: "near duplicate" of an earlier one that was kept, otherwise None.

    Compared by their sets of words and word pairs, whose Jaccard similarity is at least
    ``threshold``. Texts with different numbers are never near duplicates.
    """
    repeats = near_duplicate_mask(list(texts), _words_and_pairs, threshold)
    return ["near duplicate" if repeat else None for repeat in repeats]


def _words_and_pairs(text: str) -> set[str]:
    """Marked with the text's numbers, so that texts with different numbers share none."""
    found = normalized_words(text).split()
    numbers = [word for word in found if any(c.isdigit() for c in word)]
    shingles = [*found, *(" ".join(pair) for pair in itertools.pairwise(found))]
    return {" ".join([*numbers, "#", shingle]) for shingle in shingles}


def found_by_retriever(
    query_embeddings: np.ndarray, chunk_embeddings: np.ndarray, source: np.ndarray, top_n: int
) -> np.ndarray:
    """Round-trip consistency (Alberti et al. 2019, arXiv 1906.05416), exactly.

    Args:
        query_embeddings: (n, d) float32, rows of any length.
        chunk_embeddings: (m, d) float32.
        source: (n,) integers, the row of each query's chunk.
        top_n: ranks that count as found.

    Returns:
        (n,) bool: whether the query's chunk is among its ``top_n`` most similar ones.
    """
    nearest = band_topk(
        query_embeddings,
        chunk_embeddings,
        min(top_n, len(chunk_embeddings)),
        band=_EVERY,
        skip=0,
    )
    return (np.asarray(nearest.ids) == source[:, None]).any(axis=1)


def lead_over_neighbours(
    query_embeddings: np.ndarray, chunk_embeddings: np.ndarray, source: np.ndarray
) -> np.ndarray:
    """How much more similar a query is to its own chunk than to the chunks that resemble that one.

    A vague query ("What is the purpose of it?") fits them as well.

    Args:
        query_embeddings: (n, d) float32, rows of any length.
        chunk_embeddings: (m, d) float32.
        source: (n,) integers, the row of each query's chunk.

    Returns:
        (n,) float32: the similarity to the own chunk, less the mean of those to its
        ``NEIGHBOURS`` most similar chunks, in units of the mean ``|q| * |d|``, which is 1 under a
        cosine; infinite where there is no other chunk.
    """
    unit = max(mean_product_of_lengths(query_embeddings, chunk_embeddings), 1e-12)
    chunks, row_of = np.unique(source, return_inverse=True)
    count = min(NEIGHBOURS + 1, len(chunk_embeddings))
    nearest = np.asarray(
        band_topk(chunk_embeddings[chunks], chunk_embeddings, count, band=_EVERY, skip=0).ids
    )
    leads = np.full(len(source), np.inf, dtype=np.float32)
    for i, (own, ids) in enumerate(zip(source, nearest[row_of], strict=True)):
        others = [id for id in ids if id != own][:NEIGHBOURS]
        if others:
            similar = chunk_embeddings[[own, *others]] @ query_embeddings[i]
            leads[i] = (similar[0] - similar[1:].mean()) / unit
    return leads

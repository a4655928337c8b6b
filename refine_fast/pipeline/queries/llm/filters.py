"""Which candidates become queries. Every filter says why it drops what it drops; nothing disappears without being counted."""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np

from ....ops.band_topk import band_topk
from .reply_parser import Candidate, Parsed, no_query

SHORTEST_WORDS, LONGEST_WORDS, LONGEST_CHARACTERS = 2, 48, 300


SURE, HARDLY = 0.8, 0.005
"""A passage's language is known from the first probability on; a query is in another where py3langid gives that language less than the
second. Of 6,472 human questions (SQuAD, COVID-QA) none gets less than 0.006 for English; most of three words in a sister language do."""


_ASKS = re.compile(
    r"(?:who|whom|whose|what|when|where|which|why|how|is|are|was|were|do|does|did|can|could|should|would|will|has|have|had|may|might|must|"
    r"in what|in which|on what|on which|at what|at which|to what|to which|for what|from what|by what|of what|under what|during what|"
    r"name|list|give|tell me|explain|describe|"
    r"wer|was|wann|wo|warum|wie|welche[rsmn]?|qui|que|quoi|quand|où|pourquoi|comment|quel(?:le)?s?|combien|qué|quién|cuándo|dónde|cómo|cuál)\b",
    re.IGNORECASE,
)


_META = re.compile(
    r"\b(?:according to|in|from|by|of|does) (?:the|this) (?:(?:above|given|provided) )?(?:passage|text|excerpt|document|author|snippet)\b|"
    r"\b(?:the|this) (?:passage|excerpt|snippet)\b|\bas (?:mentioned|described|stated) (?:above|in the)\b|"
    r"\b(?:this|(?:the|this) (?:above|given|provided|following)) (?:article|paragraph|section|context)\b|"
    r"\b(?:is|are|was|were) mentioned(?: about|\W*$)|\binformation (?:is|was) (?:provided|given)\b|"
    r"\b(?:laut|gemäß|in) (?:dem|der|diesem|dieser) (?:text|passage|abschnitt)\b|\bim (?:text|abschnitt)\b|"
    r"\b(?:selon|d'après|dans) (?:le|ce) (?:texte|passage)\b|\b(?:según|en) (?:el|este) (?:texto|pasaje)\b",
    re.IGNORECASE,
)


_LOOP = re.compile(r"\b(\w+)(?:\W+\1\b){3}", re.IGNORECASE)


_PLACEHOLDER = re.compile(
    r"^[.…\-_\s<\[{(]*(?:(?:your |the )?(?:query|question|text|keywords?|string|placeholder)(?: ?\d+| here| text)?)?[.…\-_\s>\]})]*$",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Accepted:
    queries: list[tuple[str, str]]
    """(kind, text)"""
    dropped: Counter[str]
    how: str
    """See :class:`Parsed`."""


def accept(
    parsed: Parsed, passage: str, mix: Iterable[str], most: int, prompt: str = ""
) -> Accepted:
    """What of a reply becomes queries for the passage: those that pass :func:`check`, ``most`` at the most. ``prompt``: what the request
    said besides the passage; weak models answer with its examples."""
    queries: list[tuple[str, str]] = []
    dropped = parsed.dropped.copy()
    if parsed.how == "nothing":
        dropped["no query in the reply"] += 1
    for candidate in parsed.candidates:
        kind = kind_of(candidate, mix)
        reason = check(candidate.text, passage, kind, prompt) or (
            None if len(queries) < most else "more than asked for"
        )
        if reason:
            dropped[reason] += 1
        else:
            queries.append((kind, candidate.text))
    return Accepted(queries, dropped, parsed.how)


def kind_of(candidate: Candidate, mix: Iterable[str]) -> str:
    """The kind that the reply names, if it was asked for; where it names none, the only one that was, or what the text looks like."""
    kinds = list(mix)
    named = re.sub(r"[_ ]", "-", (candidate.kind or "").strip().lower())
    if same := [kind for kind in kinds if kind.rstrip("s") == named.rstrip("s")]:
        return same[0]
    if len(kinds) == 1:
        return kinds[0]
    return "question" if "question" in kinds and is_question(candidate.text) else "query"


def check(text: str, passage: str, kind: str, prompt: str = "") -> str | None:
    """Why the text is no query of this kind for the passage; None when it is one."""
    words = text.split()
    if not any(c.isalpha() for c in text) or _PLACEHOLDER.match(text):
        return "empty"
    length = sum(2 for c in text if _is_ideograph(c)) // 3 + len(
        words
    )  # an ideograph counts as two thirds of a word
    if length < SHORTEST_WORDS:
        return "too short"
    if length > LONGEST_WORDS or len(text) > LONGEST_CHARACTERS:
        return "too long"
    if reason := no_query(text):
        return reason
    if re.search(r"</?[a-zA-Z]+>|^\|", text):
        return "markup"
    if _LOOP.search(text):
        return "repeats itself"
    if _META.search(text):
        return "speaks of the passage"
    if is_copy(text, passage):
        return "copy of the passage"
    if length > 3 and f" {normalize(text)} " in f" {normalize(prompt)} ":
        return "copy of the prompt"
    if kind == "question" and not is_question(text):
        return "not a question"
    if kind == "question" and re.search(r"[?？][^?？]*\w[^?？]*$", text):
        return "carries its answer"
    if other_language(text, passage):
        return "wrong language"
    return None


def is_question(text: str) -> bool:
    """Ends as one in any script, whatever quotes or stops follow, or begins as one."""
    return (
        text.rstrip(" .!\"'”’»)").endswith(("?", "？", "؟", "՞", "፧", ";"))
        or _ASKS.match(text) is not None
    )


def is_copy(text: str, passage: str) -> bool:
    """Six words or more, four fifths of whose runs of five stand in the passage; all of them where it is a question, for people ask in the
    passage's words too."""
    words = normalize(text).split()
    if len(words) < 6:
        return False
    inside = f" {normalize(passage)} "
    runs = [f" {' '.join(words[i : i + 5])} " for i in range(len(words) - 4)]
    return sum(run in inside for run in runs) >= (1.0 if is_question(text) else 0.8) * len(runs)


def other_language(text: str, passage: str) -> bool:
    """Whether the passage's language is certain and the text hardly in it. Names tell nothing: a text is not judged if it is very short
    or takes half of its words from the passage."""
    if len(text) < 12 and text.isascii():
        return False
    words, own = set(normalize(text).split()), set(normalize(passage).split())
    if 2 * len(words & own) >= len(words):
        return False
    language, certainty = _languages(passage)[0]
    return certainty >= SURE and dict(_languages(text))[language] < HARDLY


@cache
def _identifier() -> Callable[[str], list[tuple[str, float]]]:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True).rank


@lru_cache(maxsize=64)  # the candidates of a passage come one after the other
def _languages(text: str) -> list[tuple[str, float]]:
    """(language, probability), the most probable first."""
    return _identifier()(text[:1000])


def _is_ideograph(c: str) -> bool:
    return "\u3040" <= c <= "\u9fff" or "\uac00" <= c <= "\ud7af"


def normalize(text: str) -> str:
    """Case, accents' encoding, punctuation and spaces set aside."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))


def exact_duplicates(texts: Iterable[str]) -> list[str | None]:
    """Per text, in order: "exact duplicate" of an earlier one after :func:`normalize`, otherwise None."""
    seen: set[str] = set()
    verdicts: list[str | None] = []
    for plain in map(normalize, texts):
        verdicts.append("exact duplicate" if plain in seen else None)
        seen.add(plain)
    return verdicts


def near_duplicates(texts: Iterable[str], *, threshold: float = 0.9) -> list[str | None]:
    """Per text, in order: "near duplicate" of an earlier one that was kept, when the Jaccard similarity of their sets of words and word
    pairs is at least ``threshold``, otherwise None. MinHash proposes, the sets decide: questions that differ by one year are two."""
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(threshold=threshold, num_perm=128)
    kept: dict[int, set[str]] = {}
    verdicts: list[str | None] = []
    for number, text in enumerate(texts):
        words = normalize(text).split()
        shingles = {*words, *(" ".join(pair) for pair in itertools.pairwise(words))}
        sketch = MinHash(num_perm=128)
        sketch.update_batch([shingle.encode() for shingle in sorted(shingles)])
        if any(
            len(shingles & kept[i]) >= threshold * len(shingles | kept[i])
            for i in index.query(sketch)
        ):
            verdicts.append("near duplicate")
            continue
        index.insert(number, sketch, check_duplication=False)
        kept[number] = shingles
        verdicts.append(None)
    return verdicts


def found_by_retriever(
    query_embeddings: np.ndarray, chunk_embeddings: np.ndarray, source: np.ndarray, top_n: int
) -> np.ndarray:
    """Round-trip consistency (Alberti et al., 2019): per query whether its chunk ``source`` (row of ``chunk_embeddings``) is among its
    ``top_n`` most similar, exactly. Unit rows; float32 (n, d)."""
    nearest = band_topk(
        query_embeddings,
        chunk_embeddings,
        min(top_n, len(chunk_embeddings)),
        band=(-2.0, 2.0),
        skip=0,
    )
    return (np.asarray(nearest.ids) == source[:, None]).any(axis=1)

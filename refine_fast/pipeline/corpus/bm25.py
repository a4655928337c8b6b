"""BM25 over ``search_terms``: its parameters, and bm25s's index for a corpus that does not change.

The index that is served, to which documents are added, has the same scores (``serving.lexical``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .terms import search_terms

if TYPE_CHECKING:
    import bm25s

K1, B = 0.6, 0.3
"""How soon a repeated term counts no more, and how much a long passage is marked down.

No passage is longer than the encoder reads, so one that is longer than others says more rather than
the same at greater length, and a term that it repeats is rarely more to the point. With the usual
1.5 and 0.75, recall@3 on travel's train questions (DSTC11, reviews beside questions with one-line
answers) is .08 instead of .35; on those of SQuAD it is .91 instead of .90, and on those of COVID-QA
and SciFact it is the same. In the blend that is served all four sets gain.
"""


def bm25_index(passages: Sequence[str]) -> bm25s.BM25 | None:
    """bm25s's index (Lucene's variant); None where no passage has a term."""
    import bm25s

    terms = search_terms(passages)
    if not any(terms):  # bm25s rejects an empty vocabulary
        return None
    index = bm25s.BM25(k1=K1, b=B)
    index.index(terms, show_progress=False)
    return index

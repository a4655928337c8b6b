"""Short passages on which ``doctor`` and a run try a language model."""

from __future__ import annotations

from ...corpus.chunk import Chunk

_PASSAGES = (
    "The harbour's old crane lifts 12 tonnes. It was built in 1908 and is inspected every spring; "
    "during inspections, ships are unloaded at the northern quay.",
    "A sourdough starter is fed once a day with equal weights of flour and water. Kept in a "
    "refrigerator, it needs to be fed only once a week.",
    "The library lends up to eight books for four weeks. Loans are renewed online unless another "
    "reader has reserved the book.",
)


def sample_chunks() -> list[Chunk]:
    """Three chunks: a model that writes queries may fail for one by chance, but hardly for all."""
    return [
        Chunk(f"trial-{i}", text, "", "trial", 0, len(text)) for i, text in enumerate(_PASSAGES)
    ]

"""What ``mine_hard_negatives`` returns and prints: sentence-transformers' output formats."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

FORMATS = ("triplet", "n-tuple", "labeled-pair", "labeled-list")
"""The output formats of sentence-transformers."""


def columns_of(
    queries: list[str],
    texts: list[str],
    positives: list[list[int]],
    positive_scores: list[Tensor],
    negatives: list[list[tuple[int, float]]],
    num_negatives: int,
    output_format: str,
    output_scores: bool,
    pairs: int,
) -> tuple[dict[str, list[Any]], int]:
    """Makes the columns of a dataset in one of FORMATS.

    Args:
        queries: the unique anchors.
        texts: the unique texts of the corpus, positives included.
        positives: per query, the rows of texts that answer it.
        positive_scores: their scores.
        negatives: per query, (row of texts, score), best first.
        num_negatives: how many were asked for.
        output_format: one of FORMATS.
        output_scores: with a column of scores.
        pairs: the number of (anchor, positive) pairs that were given.

    Returns:
        The columns by name, and how many rows there could have been.
    """
    per_tuple = [f"negative_{i}" for i in range(1, num_negatives + 1)]
    names = {
        "triplet": ["anchor", "positive", "negative"],
        "n-tuple": ["anchor", "positive", *per_tuple],
        "labeled-pair": ["anchor", "positive"],
        "labeled-list": ["anchor", "positive"],
    }[output_format]
    label = {"labeled-pair": ("label", "score"), "labeled-list": ("labels", "scores")}.get(
        output_format, (None, "scores")
    )[output_scores]
    table: dict[str, list[Any]] = {name: [] for name in (*names, label) if name is not None}

    def add(values: list[Any], labels: Any, scores: Any) -> None:
        for name, value in zip(names, values, strict=True):
            table[name].append(value)
        if label is not None:
            table[label].append(scores if output_scores else labels)

    for query, own, own_scores, found in zip(
        queries, positives, positive_scores, negatives, strict=True
    ):
        found_texts, found_scores = [texts[i] for i, _ in found], [s for _, s in found]
        for row, score in zip(own, own_scores.tolist(), strict=True):
            if output_format == "triplet":
                for text, s in zip(found_texts, found_scores, strict=True):
                    add([query, texts[row], text], None, [score, s])
            elif output_format == "n-tuple" and len(found) == num_negatives:
                add([query, texts[row], *found_texts], None, [score, *found_scores])
            elif output_format == "labeled-pair":
                add([query, texts[row]], 1, score)
            elif output_format == "labeled-list" and found:
                add(
                    [query, [texts[row], *found_texts]],
                    [1] + [0] * len(found),
                    [score, *found_scores],
                )
        if output_format == "labeled-pair":
            for text, s in zip(found_texts, found_scores, strict=True):
                add([query, text], 0, s)
    total = sum(len(own) for own in positives)
    possible = {
        "triplet": total * num_negatives,
        "labeled-pair": len(queries) * num_negatives + pairs,
    }
    return table, possible.get(output_format, total)


def print_report(
    positive_scores: list[Tensor],
    negatives: list[list[tuple[int, float]]],
    missing: int,
    possible: int,
) -> None:
    """Prints the scores' distributions and how many rows are missing.

    Args:
        positive_scores: per query, of its positives.
        negatives: per query, (row of texts, score).
        missing: rows without enough negatives.
        possible: rows in all.
    """
    groups = [
        ("Positive", torch.cat(positive_scores)),
        ("Negative", torch.tensor([s for row in negatives for _, s in row])),
    ]
    print(
        f"{'':10}{'count':>10}{'mean':>10}{'min':>10}{'25%':>10}{'50%':>10}{'75%':>10}{'max':>10}"
    )
    for name, scores in groups:
        if len(scores):
            quartiles = np.quantile(scores.numpy(force=True), [0, 0.25, 0.5, 0.75, 1])
            figures = [scores.mean(), *quartiles]
            print(f"{name:10}{len(scores):>10,}" + "".join(f"{float(x):>10.4f}" for x in figures))
    if missing > 0:
        print(
            f"Could not find enough negatives for {missing} samples ({missing / possible:.2%}). "
            "Raise max_score or range_max, or lower min_score, range_min or the margins, to find"
            " more."
        )

"""Per-query scores of one system on one retrieval set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


def mean(values: np.ndarray) -> float:
    """Of one value per query; 0 if there are none: JSON has no NaN."""
    return float(values.mean()) if len(values) else 0.0


@dataclass(frozen=True)
class Scores:
    """The value of each metric for every query, in the order of the set."""

    per_query: dict[str, np.ndarray]
    """Metric -> (Q,) float64."""

    def __len__(self) -> int:
        return len(next(iter(self.per_query.values())))

    @property
    def metrics(self) -> dict[str, float]:
        """Metric -> mean over the queries; 0 if there are none."""
        return {name: mean(values) for name, values in self.per_query.items()}

    @classmethod
    def pooled(cls, parts: Sequence[Scores]) -> Scores:
        """The queries of several sets as one set, in which each query counts the same."""
        return cls(
            {
                name: np.concatenate([part.per_query[name] for part in parts])
                for name in parts[0].per_query
            }
        )

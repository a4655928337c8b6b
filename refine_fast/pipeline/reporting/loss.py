"""What smaller numbers cost: the scores before and after quantization, on the same queries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..evaluation.scores import Scores
from ..evaluation.significance import Gain, gain
from .format import points

LOSS_METRICS = ("recall@3", "ndcg@10")
"""What a loss is stated in."""


@dataclass(frozen=True)
class Loss:
    """The scores before and after, of the same queries among the same passages."""

    passages: int
    queries: int
    before: Scores
    after: Scores

    def facts(self) -> dict[str, Any]:
        """As JSON: of each metric both means and the change with its 95% interval."""
        metrics = {
            name: {
                "before": self.before.metrics[name],
                "after": self.after.metrics[name],
                "change": vars(self._change(name)),
            }
            for name in LOSS_METRICS
        }
        return {"passages": self.passages, "queries": self.queries, "metrics": metrics}

    def rows(self) -> dict[str, tuple[str, str, str]]:
        """Metric -> both means and the change, in words."""
        return {
            name: (
                f"{self.before.metrics[name]:.3f}",
                f"{self.after.metrics[name]:.3f}",
                points(self._change(name)),
            )
            for name in LOSS_METRICS
        }

    def __str__(self) -> str:
        """One sentence."""
        rows = self.rows().items()
        return (
            f"on {self.queries:,} held-out queries among {self.passages:,} passages: "
            + "; ".join(f"{name} {a} -> {b}, {change}" for name, (a, b, change) in rows)
        )

    def _change(self, name: str) -> Gain:
        return gain(self.before.per_query[name], self.after.per_query[name])

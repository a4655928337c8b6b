"""How metrics are shown: the report, the model card and the terminal write them alike."""

from __future__ import annotations

from collections.abc import Sequence

from ..evaluation.significance import Gain

HEADLINE = "recall@3"
"""The metric of the paper (arXiv 2410.12890): the verdict, the weights and the summaries use it."""

TABLE_METRICS = ("recall@1", "recall@3", "recall@5", "recall@10", "ndcg@10", "mrr@10")
"""Columns of the report's tables; report.json holds every metric."""


def points(change: Gain) -> str:
    """A gain in percentage points with its 95% interval: "+3.2 points [+1.9, +4.5]"."""
    return f"{100 * change.mean:+.1f} points [{100 * change.low:+.1f}, {100 * change.high:+.1f}]"


def loss_in_words(distill: float, teachers: Sequence[str], named: str | None) -> str:
    """The loss of training: InfoNCE, distillation, or the shares of both.

    Args:
        distill: the share of the teachers.
        teachers: as ``Teachers.names``.
        named: the name of the one that the user named.
    """
    known = {
        "frozen": "the frozen encoder",
        "hybrid": "the frozen encoder with BM25",
        "cross-encoder": f"the cross-encoder {named}",
        "llm": f"the grades of {named}",
    }
    distillation = f"distillation from {' and '.join(known[name] for name in teachers)}"
    if not distill:
        return "InfoNCE"
    if distill == 1:
        return distillation
    return f"{1 - distill:g} InfoNCE + {distill:g} {distillation}"

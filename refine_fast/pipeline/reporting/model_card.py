"""The model card: what the fused model is, how it was made, what it gained and what it forgot."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from ..evaluation.scores import Scores
from ..evaluation.significance import gain
from .format import HEADLINE, points
from .templating import markdown_template

CARD_METRICS = ("recall@1", "recall@3", "recall@10", "ndcg@10", "mrr@10")
"""Columns of the card's tables."""

LICENCE_FIELDS = ("license", "license_name", "license_link")


def model_card(
    base: Path,
    base_name: str,
    weight: float,
    recipe: Mapping[str, str],
    systems: Mapping[str, Mapping[str, Scores]],
    *,
    chosen: bool,
    twin: bool,
) -> str:
    """The README.md of the fused model.

    Args:
        base: Folder of the base encoder, whose card names the licence.
        base_name: The base encoder as a reader knows it.
        weight: The fusion weight.
        recipe: Step -> how it was done.
        systems: System name -> set name -> scores; "base" and "fused" are required.
        chosen: Whether the weight was chosen by scores, not given.
        twin: Whether embeddings were fused, not weights.
    """
    head = {
        "library_name": "sentence-transformers",
        "pipeline_tag": "sentence-similarity",
        "tags": ["sentence-transformers", "feature-extraction", "refine", "model-fusion"],
        "base_model": base_name,
        **_licence(base),
    }
    sets = []
    for name, before in systems["base"].items():
        after = systems["fused"][name]
        change = gain(before.per_query[HEADLINE], after.per_query[HEADLINE])
        sets.append(
            {
                "name": None if name == "in_domain" else name.removeprefix("ood:"),
                "queries": len(before),
                "metrics": {system: scores[name].metrics for system, scores in systems.items()},
                "change": Markup(points(change)),
                "verdict": change.verdict,
            }
        )
    return markdown_template("model_card.md.jinja").render(
        head=Markup(yaml.safe_dump(head, sort_keys=False, allow_unicode=True)),
        base_name=base_name,
        weight=weight,
        recipe=recipe,
        sets=sets,
        metrics=CARD_METRICS,
        headline=HEADLINE,
        chosen=chosen,
        twin=twin,
        version=version("refine-fast"),
    )


def _licence(base: Path) -> dict[str, Any]:
    """The licence fields of the base's own card; none if it has no card or no licence."""
    card = base / "README.md"
    if not card.is_file():
        return {}
    parts = card.read_text(encoding="utf-8", errors="replace").split("---", 2)
    try:
        head = yaml.safe_load(parts[1]) if len(parts) == 3 else None
    except (yaml.YAMLError, ValueError):  # a date such as 2024-02-30 is a ValueError
        head = None
    if not isinstance(head, dict):
        return {}
    return {name: head[name] for name in LICENCE_FIELDS if head.get(name)}

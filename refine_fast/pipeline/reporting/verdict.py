"""The report's first sentences: what improved, what got worse, what to do about it."""

from __future__ import annotations

from ..evaluation.significance import Gain
from .data import Judged, ReportData
from .format import points

HEADLINE = "recall@3"
"""The metric of the paper and of the verdict."""


# ── what it says ──


def verdict(data: ReportData) -> list[str]:
    """One sentence on the user's documents and one out of domain, each improved, got worse or no measurable change: 0 lies outside or
    inside the 95% interval of the gain in recall@3. Where it got worse, what to do about it."""
    own = data.in_domain.gain(data.weight, HEADLINE)
    sentences = [_sentence("On your documents", data.in_domain, data.weight, own)]
    if own.low <= 0:
        sentences.append(
            "**Keep the base model, or tune it otherwise**: this fused model is not shown to retrieve your documents better. Contrastive"
            " tuning can make a strong retriever worse (arXiv 2502.19712); better queries (`--llm`, `--queries`), fewer steps or a lower"
            " learning rate may help."
        )
    elsewhere = data.pooled
    if elsewhere is None:
        return [
            *sentences,
            "**Out of domain: not measured.** What the model has forgotten is not known; name a BEIR folder with `--ood`.",
        ]
    lost = elsewhere.gain(data.weight, HEADLINE)
    sentences.append(_sentence(f"Out of domain ({elsewhere.name})", elsewhere, data.weight, lost))
    if lost.high < 0:
        safe = [
            weight
            for weight in elsewhere.at_weight
            if 0 < weight < data.weight
            and elsewhere.gain(weight, HEADLINE).high >= 0
            and data.in_domain.gain(weight, HEADLINE).low > 0
        ]
        remedy = (
            "`weight` in `model/twin_config.json` sets it"
            if data.fusion == "embeddings"
            else f"`--weight {max(safe, default=0):g}`"
        )
        sentences.append(
            f"Of the weights that were tried, {max(safe):g} is the largest that improved your documents without a measurable loss out of"
            f" domain (seen on these very queries, so optimistic): {remedy}."
            if safe
            else "No smaller weight that was tried improves your documents without a measurable loss out of domain."
        )
    return sentences


def _sentence(where: str, judged: Judged, weight: float, change: Gain) -> str:
    before, after = (judged.at_weight[w].metrics[HEADLINE] for w in (0, weight))
    numbers = f"{HEADLINE} {before:.3f} -> {after:.3f}: {points(change)}, 95% interval over {judged.queries:,} queries."
    return f"**{where}: {change.verdict}.** {numbers}"

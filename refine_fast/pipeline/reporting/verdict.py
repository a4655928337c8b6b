"""The report's conclusions: what improved, what got worse, what to do about it, what to doubt."""

from __future__ import annotations

from dataclasses import dataclass

from ..evaluation.significance import Gain
from .data import ReportData, SetScores
from .format import HEADLINE, points


@dataclass(frozen=True)
class Statement:
    """One conclusion. ``text`` is Markdown and holds no text of the user's."""

    lead: str
    """What is set in bold; may hold the name of a user's set."""
    text: str

    def __str__(self) -> str:
        return f"{self.lead} {self.text}"


def verdict(data: ReportData) -> list[Statement]:
    """What the run achieved, in at most four statements.

    One on the user's documents and one out of domain: improved, got worse, or no measurable
    change, as 0 lies below, above or inside the 95% interval of the gain in ``HEADLINE``. Where a
    result is not welcome, a remedy follows.
    """
    own = data.in_domain.gain(data.weight, HEADLINE)
    statements = [_statement("On your documents", data.in_domain, data.weight, own)]
    if own.low <= 0:
        statements.append(
            Statement(
                "Keep the base model, or tune it differently:",
                "this fused model is not shown to retrieve your documents better. Contrastive"
                " tuning can make a strong retriever worse (arXiv 2502.19712). Better queries"
                " (`--llm`, `--queries`), fewer steps or a lower learning rate may help.",
            )
        )
    pooled = data.pooled
    if pooled is None:
        return [
            *statements,
            Statement(
                "Out of domain: not measured.",
                "What the model has forgotten is unknown; name a BEIR folder with `--ood`.",
            ),
        ]
    lost = pooled.gain(data.weight, HEADLINE)
    statements.append(_statement(f"Out of domain ({pooled.name})", pooled, data.weight, lost))
    if lost.high < 0:
        statements.append(_remedy_for_forgetting(data, pooled))
    return statements


def _statement(where: str, scores: SetScores, weight: float, change: Gain) -> Statement:
    before, after = (scores.at_weight[w].metrics[HEADLINE] for w in (0, weight))
    return Statement(
        f"{where}: {change.verdict}.",
        f"{HEADLINE} {before:.3f} -> {after:.3f}: {points(change)}, 95% interval over"
        f" {scores.queries:,} queries.",
    )


def _remedy_for_forgetting(data: ReportData, pooled: SetScores) -> Statement:
    """The largest smaller weight that still improves the user's documents without a loss."""
    lossless = [
        weight
        for weight in pooled.at_weight
        if 0 < weight < data.weight
        and pooled.gain(weight, HEADLINE).high >= 0
        and data.in_domain.gain(weight, HEADLINE).low > 0
    ]
    if not lossless:
        return Statement(
            "No smaller weight helps:",
            "none that was tried improves your documents without a measurable loss out of domain.",
        )
    weight = max(lossless)
    option = (
        "set `weight` in `model/twin_config.json`"
        if data.fusion == "embeddings"
        else f"use `--weight {weight:g}`"
    )
    return Statement(
        f"A smaller weight, {weight:g}, loses nothing measurable:",
        "of the weights that were tried, it is the largest that improved your documents without a"
        " measurable loss out of domain. It was selected on these very queries, so expect a little"
        f" less. To take it, {option}.",
    )


def caveats(data: ReportData) -> list[str]:
    """What limits the conclusions, as Markdown without any text of the user's."""
    found = []
    if data.queries.without_llm:
        found.append(
            "The queries were made from the documents without an LLM. An LLM writes queries that"
            " are closer to what people ask (`--llm URL --llm-model NAME`); real questions of your"
            " users (`--queries FILE`) are closer still. Both train better models."
        )
    if data.queries.held_out_by_document:
        found.append(
            "The test queries come from the same source as the training queries, and ask about"
            " documents that training never saw. The gain on your users' own questions may differ."
        )
    else:
        found.append(
            "The test queries are the collection's own. Training may have seen other queries about"
            " the same passages."
        )
    mining = data.mining
    if mining.per_query and mining.empty > mining.queries / 2:
        remedy = "" if mining.calibrated else "; `--band auto` fits the band to this encoder"
        found.append(
            f"The band was empty for {mining.empty:,} of {mining.queries:,} queries"
            f" ({mining.empty / mining.queries:.0%}), which trained on in-batch negatives"
            f" alone{remedy}."
        )
    if data.fusion == "embeddings":
        found.append(
            f"The encoder was tuned for weight {data.weight:g} beside its frozen twin. The other"
            " weights mix the same two encoders without training for it, and the fine-tuned encoder"
            " was not trained to serve alone. Serving takes two encoders."
        )
    found.append(
        "Intervals are 95%, from a paired bootstrap over the queries. They cover the choice of"
        " queries, not the choice of the training seed."
    )
    return found

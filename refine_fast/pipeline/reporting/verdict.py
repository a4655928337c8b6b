"""The report's conclusions: what improved, what got worse, what to do about it, what to doubt."""

from __future__ import annotations

from dataclasses import dataclass

from ..evaluation.choice import FORGETS, METRIC, NOT_BETTER, TOO_FEW, Choice
from ..evaluation.significance import FEWEST, Gain
from .data import ReportData, Served, SetScores
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
    """What the run achieved, in at most five statements.

    Where the base was kept, the reason alone. Else one on the user's documents, one on them in the
    system that is served, and one out of domain: improved, got worse, or no measurable change, as 0
    lies below, above or inside the 95% interval of the gain in ``HEADLINE``. Where a result is not
    welcome, a remedy follows.
    """
    if data.choice is not None and data.choice.refused is not None:
        return [refusal(data.choice, data.curves[0].queries)]
    own = data.in_domain.gain(data.weight, HEADLINE)
    how = ""
    if data.queries.made != "none" and data.queries.held_out_by_document:
        which = "They" if data.queries.made == "all" else "Some of them"
        how = (
            f" {which} were made without an LLM, like those of training: people's questions may"
            " gain less, or lose."
        )
    statements = [_statement("On your documents", data.in_domain, data.weight, own, how)]
    if data.served is not None and "fused" in data.served.systems:
        statements.append(_served(data.served))
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
                "`--ood none` was given; without it, general knowledge is the measure.",
            ),
        ]
    lost = pooled.gain(data.weight, HEADLINE)
    statements.append(_statement(f"Out of domain ({pooled.name})", pooled, data.weight, lost))
    if lost.high < 0:
        statements.append(_remedy_for_forgetting(data))
    return statements


def refusal(choice: Choice, queries: int) -> Statement:
    """Why the base model is delivered, and what to try; ``queries`` were there to choose on."""
    changes = (
        f"At the best weight, {choice.best:g}, {METRIC} changes by {points(choice.gain)} on"
        f" held-out queries and by {points(choice.guard)} on general knowledge."
    )
    why, remedy = {
        NOT_BETTER: (
            f"no fusion weight is shown to retrieve your documents better. {changes}",
            "Better queries (`--llm`, `--queries`), more documents or a lower `--lr` may help.",
        ),
        FORGETS: (
            f"every fusion weight that is better forgets more than is tolerated. {changes}",
            "A lower `--lr`, fewer `--epochs` or a smaller weight in `--curve` may help;"
            " `--tolerance` allows more.",
        ),
        TOO_FEW: (
            "too few queries are left to compare fusion weights on"
            f" ({queries}; fewer than {FEWEST} can show nothing).",
            "Give more documents or `--queries`.",
        ),
    }[choice.refused or TOO_FEW]
    return Statement(
        "The base model is kept:",
        f"{why} {remedy} A number for `--weight` delivers that weight whatever it does.",
    )


def _statement(
    where: str, scores: SetScores, weight: float, change: Gain, remark: str = ""
) -> Statement:
    before, after = (scores.at_weight[w].metrics[HEADLINE] for w in (0, weight))
    return Statement(
        f"{where}: {change.verdict}.",
        f"{HEADLINE} {before:.3f} -> {after:.3f}: {points(change)}, 95% interval over"
        f" {scores.queries:,} queries.{remark}",
    )


def _served(served: Served) -> Statement:
    """The gain inside the system that is served, which may have it already by other means."""
    before, after = (
        served.systems[side][served.name].metrics[HEADLINE] for side in ("base", "fused")
    )
    change = served.gain(HEADLINE)
    return Statement(
        f"Served, with sentences and BM25: {change.verdict}.",
        f"{HEADLINE} {before:.3f} -> {after:.3f}: {points(change)}, 95% interval over"
        f" {served.queries:,} queries against {served.passages:,} passages.",
    )


def _remedy_for_forgetting(data: ReportData) -> Statement:
    """The largest smaller weight that improves the user's documents and forgets nothing
    measurable."""
    documents, general = data.curves
    lossless = [
        weight
        for weight in general.at_weight
        if 0 < weight < data.weight
        and general.gain(weight, HEADLINE).high >= 0
        and documents.gain(weight, HEADLINE).low > 0
    ]
    if not lossless:
        return Statement(
            "No smaller weight helps:",
            "none that was tried improves your documents without a measurable loss on general"
            " knowledge.",
        )
    weight = max(lossless)
    option = (
        "set `weight` in `model/twin_config.json`"
        if data.fusion == "embeddings"
        else f"use `--weight {weight:g}`"
    )
    return Statement(
        f"A smaller weight, {weight:g}, loses nothing measurable on general knowledge:",
        "of the weights that were tried, it is the largest that improves your documents without"
        f" such a loss. To take it, {option}.",
    )


def caveats(data: ReportData) -> list[str]:
    """What limits the conclusions, as Markdown without any text of the user's."""
    found = []
    if data.queries.made == "some":
        found.append(
            "Some of the queries were made from the documents without an LLM. Real questions of"
            " your users (`--queries FILE`) are closer to what people ask, and train better models."
        )
    if data.queries.made == "all":
        found.append(
            "The queries were made from the documents without an LLM. An LLM writes queries that"
            " are closer to what people ask (`--llm URL --llm-model NAME`); real questions of your"
            " users (`--queries FILE`) are closer still. Both train better models."
        )
    if data.queries.held_out_by_document:
        found.append(
            "The test queries come from the same source as the training queries, and ask about"
            " passages that training never saw. The gain on your users' own questions may differ."
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

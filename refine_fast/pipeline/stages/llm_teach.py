"""teach, with ``--teacher llm``: a language model grades each training query's positives and mined
negatives."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ...files import read_json, write_json
from ..artifacts import REPLIES, TEACHING_FACTS, to_judge, write_taught
from ..corpus.chunk import Chunk
from ..queries.llm import Candidates, GradingAccount, grade_passages
from .llm_calls import calls_shown, show_missing, spent_in_words, to_ask_again

if TYPE_CHECKING:
    from ..context import RunContext

LOGITS_PER_GRADE = 2.0
"""A passage with one grade more has e^2, or 7.4, times the probability in the teacher's target. Not
measured; ``--teacher-temperature`` changes it."""


def run(context: RunContext, folder: Path) -> None:
    """Writes the grades as logits, which negatives are left out, and the account of the calls."""
    settings = context.config.llm_settings()
    assert settings is not None
    chunks, judged = to_judge(context.out)
    asked = to_grade(chunks, judged)
    with calls_shown(context.console, settings, "grading passages") as watch:
        grades, account = grade_passages(asked, settings, context.path(REPLIES), watch=watch)
    found = {each.query: known for each, known in zip(asked, grades, strict=True)}
    by_query = (
        None if (known := found.get(query)) is None else [LOGITS_PER_GRADE * g for g in known]
        for query in judged
    )
    facts = write_taught(context.out, folder, by_query)
    write_json(folder / TEACHING_FACTS, {**facts, "grading": account.to_dict()})
    context.console.say(
        f"  {facts['pairs']:,} pairs graded; {facts['relabelled']:,} of {facts['negatives']:,} "
        "negatives have a higher grade than a positive and are left out; "
        f"{spent_in_words(account.to_dict())}"
    )
    _say_what_is_missing(context, account)


def unanswered(context: RunContext) -> list[str]:
    """Why the stage must run again although its inputs are unchanged: queries without a reply."""
    facts = read_json(context.path(TEACHING_FACTS)) or {}
    failed = to_ask_again(facts.get("grading", {}))
    return [f"{failed} queries without a reply"] if failed else []


def to_grade(chunks: list[Chunk], judged: dict[str, list[int]]) -> list[Candidates]:
    """What the model is asked about ``to_judge``'s queries: those with passages to tell apart."""
    return [
        Candidates(query, tuple(chunks[row] for row in rows))
        for query, rows in judged.items()
        if len(rows) > 1
    ]


def _say_what_is_missing(context: RunContext, account: GradingAccount) -> None:
    if account.unusable:
        context.console.say(
            f"  {account.unusable:,} of {account.queries:,} replies do not grade each passage; the "
            "frozen encoder alone teaches these queries"
        )
    show_missing(
        context.console,
        account,
        asked="queries",
        done=f"{account.graded:,} of {account.queries:,}",
        lack="grades",
    )
    if account.stopped:
        context.console.say("  the frozen encoder alone teaches the queries that a limit left out")

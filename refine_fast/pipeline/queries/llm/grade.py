"""A language model as a judge: it grades from 0 to 3 how well passages answer a query.

All passages of a query are in one prompt, numbered, and the reply is a line with a grade for each.
Sources: the four grades, UMBRELA (arXiv 2406.06519); a numbered list of passages in one prompt,
RankGPT (arXiv 2304.09542).
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ....errors import RefineFastError
from ...corpus.chunk import Chunk
from .dispatch import CallProgress, Watch
from .estimate import Calls
from .event_loop import run
from .prompt import Template
from .reply_log import ReplyStore
from .reply_parser import parse_grades
from .request import Request
from .send import send
from .settings import LLMSettings

HIGHEST = 3
"""The grade of a passage that holds the full answer; 0 has nothing to do with the query."""

TOKENS_PER_GRADE = 4
"""Of a line such as "12: 3"."""


@dataclass(frozen=True)
class Candidates:
    """A query, and the passages that are graded for it."""

    query: str
    passages: tuple[Chunk, ...]


@dataclass
class GradingAccount:
    """What the report says about the grades.

    Calls, tokens and cost are those of the run folder, over all its starts, those for queries that
    the model wrote included.
    """

    models: tuple[str, ...]
    queries: int
    graded: int = 0
    unusable: int = 0
    """Queries with a reply that does not grade each passage."""
    failed: int = 0
    """Queries without a reply; those that a limit left out do not count."""
    rejected: int = 0
    """Of those failed, the ones whose request cannot succeed: no reason to run the stage again."""
    reused: int = 0
    stopped: str | None = None
    calls: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float | None = None
    """None without prices."""
    failures: dict[str, int] = field(default_factory=dict)

    @property
    def ungraded(self) -> int:
        """The queries without grades, for whatever reason."""
        return self.queries - self.graded

    def to_dict(self) -> dict[str, Any]:
        """The account as JSON values."""
        return dataclasses.asdict(self) | {"ungraded": self.ungraded}


def grade_requests(asked: Sequence[Candidates], settings: LLMSettings) -> Iterator[Request]:
    """One request for each query, in order.

    The temperature is 0 unless the settings give one. The same query, passages, model and
    parameters make the same request.
    """
    template = Template(name="grade")
    for each in asked:
        shown = [each.passages[i] for i in _order(each, settings.seed)]
        texts = [{"title": chunk.title, "text": chunk.text} for chunk in shown]
        system, user = template.render(query=each.query, passages=texts)
        digest = hashlib.sha256(each.query.encode()).hexdigest()
        yield Request(
            each.passages[0].id,
            settings.models[int(digest[:8], 16) % len(settings.models)],
            system,
            user,
            {},
            settings.max_reply_tokens,
            0.0 if settings.temperature is None else settings.temperature,
            settings.extra,
            seed=settings.seed if settings.in_process else None,
        )


def calls_to_grade(asked: Sequence[Candidates], settings: LLMSettings, store: Path) -> Calls:
    """The calls for the queries without a reply in the store."""
    missing = list(zip(asked, grade_requests(asked, settings), strict=True))
    if store.exists():
        with ReplyStore(store, settings.prices, settings.share) as replies:
            missing = [item for item in missing if item[1].key not in replies]
    return Calls(
        len(missing),
        sum(request.tokens_in for _, request in missing),
        sum(TOKENS_PER_GRADE * len(each.passages) for each, _ in missing),
        len(missing) * settings.max_reply_tokens,
    )


def grade_passages(
    asked: Sequence[Candidates],
    settings: LLMSettings,
    store: Path,
    *,
    watch: Watch | None = None,
) -> tuple[list[list[int] | None], GradingAccount]:
    """Asks the model about every query.

    Args:
        asked: Q distinct queries with the passages to grade, at least one each.
        settings: endpoint, models, request and limits.
        store: the JSONL file of replies; a request that has a reply there is not sent again.
        watch: called with the progress after every reply.

    Returns:
        Of each query, the grade of each passage, 0 to ``HIGHEST``, or None if no reply grades them
        all; and the account.

    Raises:
        RefineFastError: if the endpoint is declared dead, its replies are useless, or no query has
            grades although no limit was reached. Replies so far stay in the store.
    """
    keys = [request.key for request in grade_requests(asked, settings)]
    with ReplyStore(store, settings.prices, settings.share) as replies:
        reused = sum(key in replies for key in keys)
        # in a random order, so that what a limit leaves ungraded is of all documents
        order = sorted(range(len(keys)), key=keys.__getitem__)
        requests = grade_requests([asked[i] for i in order], settings)
        missing = (request for request in requests if replies.lacks(request.key))
        progress = CallProgress(len(keys), reused, reused)
        run(send(missing, progress, settings, replies, holds_grades, watch))
        texts = {record["key"]: record["text"] for record in replies.replies(keys)}
        spent, failures = replies.spent, replies.failures
    grades = [
        _grades_of(texts[key], each, settings.seed) if key in texts else None
        for key, each in zip(keys, asked, strict=True)
    ]
    account = GradingAccount(
        settings.models,
        len(asked),
        graded=sum(found is not None for found in grades),
        failed=progress.failed,
        rejected=progress.rejected,
        reused=reused,
        stopped=progress.stopped,
        calls=spent.calls,
        tokens_in=spent.tokens_in,
        tokens_out=spent.tokens_out,
        cost=spent.cost if settings.has_prices else None,
        failures=dict(Counter(failures[key] for key in keys if key in failures).most_common(5)),
    )
    account.unusable = len(texts) - account.graded
    if not account.graded and not account.stopped:
        why = next(iter(account.failures), "no reply grades each passage")
        raise RefineFastError(
            f"teacher: {settings.url} graded no query ({why}); check the endpoint with "
            "'refine-fast doctor --llm URL', or name another model."
        )
    return grades, account


def holds_grades(text: str) -> bool:
    """Whether a reply holds grades, of however many passages."""
    return bool(parse_grades(text, HIGHEST))


def _grades_of(text: str, each: Candidates, seed: int) -> list[int] | None:
    """The grades in the order of the candidates; None if one is missing."""
    found = parse_grades(text, HIGHEST)
    shown = _order(each, seed)
    if found.keys() != set(range(1, len(shown) + 1)):
        return None
    by_row = {row: found[number] for number, row in enumerate(shown, 1)}
    return [by_row[row] for row in range(len(shown))]


def _order(each: Candidates, seed: int) -> list[int]:
    """The rows of the passages as the prompt lists them: shuffled, so that the place of a positive
    says nothing."""
    rows = list(range(len(each.passages)))
    random.Random(f"{seed} {each.query}").shuffle(rows)
    return rows

"""A language model as a judge: whether a chunk answers the queries that were written for it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ...corpus.chunk import Chunk
from .prompt import Template, judge_schema
from .reply_parser import parse_numbers
from .request import Request
from .settings import LLMSettings


def judge_requests(
    asked: Iterable[tuple[Chunk, list[str]]], settings: LLMSettings
) -> Iterator[Request]:
    """One request for each chunk and its queries, made as it is drawn, all to the first model."""
    template = Template(settings.judge_prompt, name="judge")
    for chunk, queries in asked:
        system, user = template.render(passage=chunk.text, title=chunk.title, queries=queries)
        yield Request(
            chunk.id,
            settings.models[0],
            system,
            user,
            judge_schema(),
            settings.max_reply_tokens,
            settings.temperature,
            settings.extra,
            seed=settings.seed if settings.in_process else None,
        )


def holds_verdicts(text: str) -> bool:
    """Whether a reply holds the numbers of the queries that pass; it may be none of them."""
    return parse_numbers(text) is not None

"""Queries and grades by a language model: any OpenAI-compatible endpoint, or one in this process.

Public: ``LLMSettings`` says what is asked of whom; ``estimate`` counts the calls that remain;
``generate_queries`` makes them and returns the queries with an ``Account``; ``grade_passages`` asks
which passages answer a query, for a teacher; ``probe`` checks an endpoint; ``default_prompt`` is
the template to start from.

Modules:
    request, http_backend, transformers_backend: one call, and what kind of failure it met.
    throttle, budget: how many calls run at a time, when to stop, what may be spent.
    batch: requests in files, to servers that answer within a day at half the price.
    reply_log: every paid reply, on disk before it counts.
    dispatch, send: requests to replies, through the four above.
    prompt, reply_parser, filters, languages, coverage: what is asked for in which order, and which
        part of a reply becomes a query.
    generate, judge, grade: the stages, which turn replies into queries, into verdicts on these,
        and into grades of passages.
    estimate, trial, probe: what a stage will cost, its first request, and what ``doctor`` reports
        about an endpoint.
    local_speed: how fast a model in this process writes, for ``plan``.
    event_loop: runs them from synchronous code, in notebooks too.
"""

from __future__ import annotations

from .dispatch import CallProgress
from .estimate import Estimate
from .generate import Account, estimate, generate_queries
from .grade import Candidates, GradingAccount, calls_to_grade, grade_passages
from .probe import EndpointReport, probe
from .prompt import default_prompt
from .settings import IN_PROCESS, SMOLLM2, SMOLLM2_MODEL, LLMSettings

__all__ = [
    "IN_PROCESS",
    "SMOLLM2",
    "SMOLLM2_MODEL",
    "Account",
    "CallProgress",
    "Candidates",
    "EndpointReport",
    "Estimate",
    "GradingAccount",
    "LLMSettings",
    "calls_to_grade",
    "default_prompt",
    "estimate",
    "generate_queries",
    "grade_passages",
    "probe",
]

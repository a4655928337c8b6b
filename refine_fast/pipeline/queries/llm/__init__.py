"""Queries written by a language model: any OpenAI-compatible endpoint, or transformers in process.

request -> http_backend | transformers_backend    one call, and what kind of failure it met
throttle, budget      how many calls at a time, when to retry, when to stop, what it may cost
reply_log             every paid reply on disk before it counts
dispatch              requests -> replies, through the four above
prompt, reply_parser, filters, coverage
                      what is asked for, and which part of a reply becomes a query
generate              the stage; probe: what doctor reports about an endpoint
"""

from __future__ import annotations

from .dispatch import Progress
from .generate import Account, Estimate, estimate, generate_queries
from .probe import EndpointReport, probe
from .prompt import default_prompt
from .settings import IN_PROCESS, LLMSettings

__all__ = [
    "IN_PROCESS",
    "Account",
    "EndpointReport",
    "Estimate",
    "LLMSettings",
    "Progress",
    "default_prompt",
    "estimate",
    "generate_queries",
    "probe",
]

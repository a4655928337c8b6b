"""Queries written by a language model: any OpenAI-compatible endpoint, or transformers in this process.

request -> client | local     one call, and what kind of failure it met
policy                        how many at a time, when again, when to stop, what it may cost
store                         every paid reply on disk before it counts
ask                           requests -> replies, through the three above
prompt, parse, filters        what is asked for, and which part of a reply becomes a query
generate                      the stage; probe: what doctor says about an endpoint
"""

from .ask import Progress
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

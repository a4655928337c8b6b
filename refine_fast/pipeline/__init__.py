"""Adapts an encoder to unlabeled documents: REFINE (arXiv 2410.12890) as a pipeline.

    from refine_fast.pipeline import RunConfig, run

    result = run(RunConfig(docs="docs/", out="run"))
    result.model      # folder of the fused encoder, for SentenceTransformer(...)
    result.report     # report.json: what was gained and what was forgotten, with intervals

Subpackages and modules; each imports only those above it:

    corpus        documents, chunks, retrieval sets
    encoder       loading an encoder, texts to vectors
    queries       synthetic queries, the user's own, and queries written by a language model
    training      batches, loss, trainer, memory plan
    evaluation    metrics, BM25, intervals
    reporting     report, figures, model card
    config, console, context, artifacts, engine
    stages        one module for each step of a run, and their order
    preflight     tries what a run will do
    runner        a run
    commands      the other commands of the command line
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .commands.plan import Plan, plan
    from .config import RunConfig
    from .runner import run

__all__ = ["Plan", "RunConfig", "plan", "run"]

_SUBMODULE = {
    "Plan": ".commands.plan",
    "RunConfig": ".config",
    "plan": ".commands.plan",
    "run": ".runner",
}


def __getattr__(name: str) -> Any:
    """Imports on first use, so that ``import refine_fast.pipeline`` stays light."""
    from importlib import import_module

    if name not in _SUBMODULE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_SUBMODULE[name], __name__), name)

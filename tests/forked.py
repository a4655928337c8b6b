"""Processes that run the pipeline and that a test kills, forked from one that has imported it: each
import takes seconds."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess

# The server imports once what they need, and runs nothing: its children may use OpenMP.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["rank_processes", "datasets", "openai", "refine_fast.cli", "refine_fast.pipeline.runner"]
)


def fork(work: Callable[..., None], *arguments: object) -> BaseProcess:
    """Starts a process that calls ``work``, a function that can be pickled."""
    process = PROCESSES.Process(target=_call, args=(dict(os.environ), work, *arguments))
    process.start()
    return process


def fork_script(code: str, *arguments: str) -> BaseProcess:
    """Starts what ``python -c code arguments`` runs."""
    return fork(_execute, code, *arguments)


def _call(environment: dict[str, str], work: Callable[..., None], *arguments: object) -> None:
    os.environ.clear()  # of the test that started the server
    os.environ.update(environment)
    work(*arguments)


def _execute(code: str, *arguments: str) -> None:
    sys.argv = ["-c", *arguments]
    exec(code, {"__name__": "__main__"})

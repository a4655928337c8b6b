"""Starts the ranks of a run as processes of a test, the way torchrun does."""

from __future__ import annotations

import os
import pickle
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from forked import PROCESSES
from torch.distributed import TCPStore

LIMIT = 400.0
"""Seconds after which a test gives up on its ranks."""


def run_ranks(size: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What ``work(*arguments)`` returns in each of ``size`` ranks, run at one thread each.

    A rank that was killed has None. All have ended when this returns.
    """
    # as torchrun's agent does, so that no port is chosen before it is bound
    store = TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=LIMIT))
    pipes, processes = [], []
    for rank in range(size):
        pipe, end = PROCESSES.Pipe(duplex=False)
        process = PROCESSES.Process(
            target=_rank, args=(end, rank, size, store.port, work, arguments), daemon=True
        )
        process.start()
        end.close()
        pipes.append(pipe)
        processes.append(process)
    try:
        return [_outcome(pipe) for pipe in pipes]
    finally:
        for process in processes:
            process.join(LIMIT / 4)
            process.kill()


def _outcome(pipe: Connection) -> Any:
    if not wait([pipe], LIMIT):
        raise TimeoutError(f"a rank has not ended within {LIMIT:g} s")
    try:
        result, error = pickle.loads(pipe.recv_bytes())
    except EOFError:
        return None
    assert error is None, error
    return result


def _rank(
    end: Connection, rank: int, size: int, port: int, work: Callable[..., Any], arguments: Any
) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True",
    )  # fmt: skip
    torch.set_num_threads(1)
    try:
        outcome = work(*arguments), None
    except Exception:
        outcome = None, traceback.format_exc()
    # Connection.send would share the tensors with this process, which ends
    end.send_bytes(pickle.dumps(outcome))

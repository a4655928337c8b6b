"""The processes of one run, started by torchrun or by any launcher that sets its variables.

Rank 0 does the run: it alone locks the run folder, writes, prints and saves. The other ranks wait
until rank 0 reaches training, take part in it and end. Facts travel through the launcher's
key-value store, tensors through NCCL, or gloo where there is no GPU.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import RefineFastError

TIMEOUT = timedelta(minutes=10)
"""Longest wait of one rank for another in training: a rank that hangs ends the run, too."""

POLL = 0.2
"""Seconds between two looks of a waiting rank; it must remain interruptible."""

DISMISSAL = 10.0
"""Longest wait, in seconds, of rank 0 for the others to hear that there is no training."""

_LAUNCHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_LOCAL = ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE")


class RankLostError(RefineFastError):
    """Another rank ended before this one was done. The command line exits with 1."""

    def __init__(self, why: str = "another rank of this run ended, so this rank stopped") -> None:
        super().__init__(f"{why}; run the same command to resume from the last checkpoint.")


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run."""

    rank: int
    size: int
    """Number of processes, at least 2."""
    local_size: int
    """Number of processes on this machine."""
    store: Any
    """torch.distributed.Store."""

    def announce_training(self, folder: Path) -> None:
        """Of rank 0: calls the others to the training that writes to ``folder``."""
        self.store.set("folder", str(folder))

    def dismiss(self) -> None:
        """Of rank 0, at its end: lets the others end that still wait for a training."""
        if self.store.check(["folder"]):
            return
        self.store.set("folder", "")
        give_up = time.monotonic() + DISMISSAL
        while self.store.add("dismissed", 0) < self.size - 1 and time.monotonic() < give_up:
            time.sleep(POLL)  # the store may end with this process

    def wait_for_training(self) -> Path | None:
        """Of the others: the folder of the training that rank 0 has reached; None if there is
        none."""
        with peers_may_end():
            while not self.store.check(["folder"]):
                time.sleep(POLL)
            folder = self.store.get("folder").decode()
            self.store.add("dismissed", not folder)
        return Path(folder) if folder else None

    def join(self, backend: str) -> None:
        """Connects the ranks. Every rank must call it.

        Args:
            backend: "nccl" or "gloo".
        """
        import torch.distributed as dist
        from torch.distributed.distributed_c10d import PrefixStore

        with peers_may_end():
            dist.init_process_group(
                backend,
                store=PrefixStore("group", self.store),
                rank=self.rank,
                world_size=self.size,
                timeout=TIMEOUT,
            )

    def leave(self) -> None:
        """Ends what ``join`` began."""
        import torch.distributed as dist

        dist.destroy_process_group()

    def of_first(self, name: str, value: str) -> str:
        """The value that rank 0 gives. Every rank must call it."""
        if self.rank == 0:
            self.store.set(name, value)
        with peers_may_end():
            return str(self.store.get(name).decode())

    def require_same(self, facts: Mapping[str, Any]) -> None:
        """Every rank must call it.

        Raises:
            RefineFastError: on a rank whose facts differ from those of rank 0.
        """
        first = json.loads(self.of_first("facts", json.dumps(facts)))
        differing = [name for name, value in json.loads(json.dumps(facts)).items()
                     if value != first[name]]  # fmt: skip
        if differing:
            raise RefineFastError(
                f"train: rank {self.rank} and rank 0 differ in {', '.join(differing)}; start every "
                "rank with the same command, version and files, in a run folder that all share."
            )

    def reports_first(self) -> bool:
        """Whether no other rank has reported an error."""
        try:
            return bool(self.store.add("reported", 1) == 1)
        except RuntimeError:  # the store has ended with rank 0
            return True


@cache
def launched() -> Ranks | None:
    """The ranks of this run; None if this process is alone.

    Gives each process of a machine a GPU of its own, and so must run before CUDA is used.

    Raises:
        RefineFastError: if there are fewer GPUs than processes, but some.
    """
    ranks = _connected()
    if ranks is None:
        return None
    import torch

    if gpus := torch.cuda.device_count():
        if gpus < ranks.local_size:
            raise RefineFastError(
                f"train: {ranks.local_size} processes on this machine need {ranks.local_size} GPUs "
                f"({gpus} visible); start fewer with --nproc-per-node."
            )
        _take_gpu(int(os.environ.get("LOCAL_RANK", ranks.rank)))
    return ranks


@cache
def _connected() -> Ranks | None:
    if not all(name in os.environ for name in _LAUNCHER) or int(os.environ["WORLD_SIZE"]) < 2:
        return None
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    signal.signal(signal.SIGTERM, _on_sigterm)
    with peers_may_end():
        store, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    return Ranks(rank, size, local_size, PrefixStore("refine_fast", store))


def may_report() -> bool:
    """Whether this process, which ends with an error, should print it: one sentence ends a run, not
    one a rank."""
    connected = _connected.cache_info().currsize > 0
    ranks = _connected() if connected else None
    if ranks is None:
        return True
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # nothing is left to say
    return ranks.reports_first()


def _take_gpu(number: int) -> None:
    """Makes one GPU the only one that this process sees."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(i) for i in range(number + 1)]
    os.environ["CUDA_VISIBLE_DEVICES"] = names[number]


def _on_sigterm(*_: object) -> None:
    """torchrun ends the ranks with SIGTERM when one has failed, or when it gets one itself."""
    raise RankLostError(
        "this rank was told to stop, since another rank ended or the launcher was stopped"
    )


@contextmanager
def peers_may_end() -> Iterator[None]:
    """Raises RankLostError in place of what a broken connection raises."""
    import torch.distributed as dist

    try:
        yield
    except dist.DistError:
        raise RankLostError from None
    except RuntimeError as error:
        if "gloo" not in str(error) and "Connection" not in str(error):
            raise
        raise RankLostError from None


@contextmanager
def one_process() -> Iterator[None]:
    """Hides the launcher from Accelerate, which would wrap the model in DistributedDataParallel and
    divide the batches once more."""
    hidden = {name: os.environ.pop(name) for name in _LAUNCHER + _LOCAL if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)

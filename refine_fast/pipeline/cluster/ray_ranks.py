"""Training on the workers of a Ray cluster, each a rank in the environment that torchrun would give
it (``ranks.launched``).

The actor of rank 0 holds the key-value store in which the ranks meet. When a rank dies, the others
end too, and training starts again with as many as find room: it resumes from its last checkpoint.
"""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ...errors import RefineFastError
from ..ranks import TIMEOUT, RankLostError
from ..workers import Hear
from .exchange import SharedFolder
from .ray_cluster import line_of, raised_by, room_for

RETRIES = 3
"""How often in a row training starts again without getting further than before."""
STRAGGLERS = 60.0
"""Seconds without another start after which training does with the ranks that have started: other
users of the cluster may hold what the rest would take."""
LINGER = 10.0
"""Seconds that the ranks have to end when one has died or the run is stopped."""
POLL = 0.2
"""Seconds between two looks at the news of rank 0."""
ENVIRONMENT = (
    "LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "TOKENIZERS_PARALLELISM",
    "TRANSFORMERS_VERBOSITY",
)  # fmt: skip
"""What the command line sets in this process, and the ranks need too."""


def train_on_ranks(
    work: Callable[..., Any],
    shared: SharedFolder,
    threads: int,
    most: int,
    hear: Hear,
) -> None:
    """Does a training, in as many ranks as find room, up to ``most``.

    Args:
        work: see ``Workers.train``; picklable.
        shared: the folder to train in.
        threads: of each rank.
        most: how many ranks.
        hear: is told the news.

    Raises:
        RefineFastError: what a rank raises; or if ranks died too often.
    """
    reached = furthest = failures = 0

    def heard(kind: str, *news: Any) -> None:
        nonlocal reached
        if kind == "progress":
            reached = max(reached, news[0])
        hear(kind, *news)

    while lost := _Ranks(work, shared, threads).train(most, heard):
        failures = 1 if reached > furthest else failures + 1
        furthest = reached
        if failures > RETRIES:
            raise RefineFastError(
                f"engine: a training process died {failures} times, at step {reached} at the "
                f"latest ({lost}); give the workers more memory or training less (--memory), then "
                "run the same command to resume from the last checkpoint."
            )
        hear("say", "  a training process died; training resumes from its last checkpoint")


@dataclass(frozen=True)
class _Place:
    """Where a rank is."""

    node: str
    process: int


class RankActor:
    """One rank."""

    def __init__(self, threads: int) -> None:
        """Uses ``threads`` threads."""
        import torch

        torch.set_num_threads(threads)

    def place(self) -> _Place:
        """Where it is, once it has started."""
        import ray

        return _Place(ray.get_runtime_context().get_node_id(), os.getpid())

    def meeting_point(self) -> tuple[str, int]:
        """Of rank 0: the address and port of the store that it holds from now on."""
        from ray.util import get_node_ip_address
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        address = get_node_ip_address()
        # as torchrun's agent does, so that no port is chosen before it is bound
        self._store = TCPStore(address, 0, is_master=True, timeout=TIMEOUT, wait_for_workers=False)
        return address, self._store.port

    def train(
        self, environment: dict[str, str], work: Callable[..., Any], shared: SharedFolder, news: Any
    ) -> bool:
        """Trains.

        Args:
            environment: variables to set.
            work: see ``train_on_ranks``.
            shared: the folder.
            news: the actor to tell of rank 0; None: of another rank.

        Returns:
            Whether training ended; False if another rank was lost, or this one was told to end.
        """
        os.environ.update(environment)
        hear: Hear = _ignore if news is None else partial(_tell, news)
        try:
            with shared.opened() as folder:
                save = partial(shared.save, folder)
                work(folder, hear, save)
                if news is not None:
                    save()
                    _wait_for(news)
        except (RankLostError, SystemExit):  # SystemExit: Ray's answer to SIGTERM
            return False
        return True


def _news_class() -> type:
    """Of an actor. It travels by value: its process imports nothing, torch least of all."""

    class News:
        """The news of rank 0 on their way to the driver."""

        def __init__(self) -> None:
            self._news: list[tuple[Any, ...]] = []

        def tell(self, *news: Any) -> None:
            """Takes one."""
            self._news.append(news)

        def take(self) -> list[tuple[Any, ...]]:
            """Gives those that were not taken yet."""
            taken, self._news = self._news, []
            return taken

    return News


def _tell(news: Any, *about: Any) -> None:
    news.tell.remote(*about)


def _wait_for(news: Any) -> None:
    """Until what this process told has arrived."""
    import ray
    from ray.exceptions import RayError

    with suppress(RayError):
        ray.get(news.__ray_ready__.remote())


def _ignore(*_: Any) -> None:
    pass


@dataclass
class _Ranks:
    """The actors of one start."""

    work: Callable[..., Any]
    shared: SharedFolder
    threads: int
    actors: list[Any] = field(default_factory=list)
    places: dict[Any, _Place] = field(default_factory=dict)
    """Actor -> where it is, of those that have started; in the order of the ranks."""
    running: dict[Any, Any] = field(default_factory=dict)
    """Reference -> actor, of the ranks that have not ended."""

    def train(self, most: int, hear: Hear) -> str | None:
        """Trains to the end, or returns why a rank was lost. No actor remains."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        needs, room = room_for(self.threads)
        news: Any = ray.remote(_news_class()).options(num_cpus=0).remote()
        actor_class = ray.remote(RankActor).options(**needs)
        try:
            self.actors = [actor_class.remote(self.threads) for _ in range(min(most, room))]
            self._start()
            self._begin(news, own_gpus="num_gpus" in needs)
            return self._watch(news, hear)
        except RayTaskError as error:
            raise raised_by(error) from None
        except RayError as error:
            return line_of(error)
        finally:
            try:
                self._ask_to_end()
            finally:
                for actor in [*self.actors, news]:
                    ray.kill(actor)

    def _start(self) -> None:
        """Waits for the actors.

        Raises:
            RayError: if one dies.
        """
        import ray

        starting = {actor.place.remote(): actor for actor in self.actors}
        found: dict[Any, _Place] = {}  # actor -> where it is
        while starting:
            [*started], _ = ray.wait([*starting], timeout=STRAGGLERS if found else None)
            if not started:
                break
            for ref in started:
                found[starting.pop(ref)] = ray.get(ref)
        for actor in starting.values():
            ray.kill(actor)
        self.actors = [*found]
        # the ranks of a node are neighbours
        self.places = dict(sorted(found.items(), key=lambda each: each[1].node))

    def _begin(self, news: Any, *, own_gpus: bool) -> None:
        """Sets the ranks to work. With ``own_gpus`` each sees one GPU alone, as if no other rank
        were on its node."""
        import ray

        first, size = next(iter(self.places)), len(self.places)
        address, port = ray.get(first.meeting_point.remote())
        everywhere = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
        everywhere |= {
            "WORLD_SIZE": str(size), "MASTER_ADDR": address, "MASTER_PORT": str(port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }  # fmt: skip
        on_node = Counter(place.node for place in self.places.values())
        before: Counter[str] = Counter()
        for rank, (actor, place) in enumerate(self.places.items()):
            local = (0, 1) if own_gpus else (before[place.node], on_node[place.node])
            before[place.node] += 1
            environment = {
                **everywhere,
                "RANK": str(rank), "LOCAL_RANK": str(local[0]), "LOCAL_WORLD_SIZE": str(local[1]),
            }  # fmt: skip
            told = news if rank == 0 else None
            self.running[actor.train.remote(environment, self.work, self.shared, told)] = actor

    def _watch(self, news: Any, hear: Hear) -> str | None:
        """Passes on the news until every rank has ended, or one was lost and the others had their
        time to say why."""
        import ray
        from ray.exceptions import RayActorError, RayError, RayTaskError

        died: str | None = None
        ended = failed = None
        give_up = float("inf")
        while self.running and time.monotonic() < give_up:
            for ref in ray.wait([*self.running], timeout=POLL)[0]:
                del self.running[ref]
                try:
                    if ray.get(ref):
                        continue
                    ended = "it was told to end"
                except RayTaskError as error:
                    failed = error
                    if isinstance(error.cause, RefineFastError):
                        raise
                except RayError as error:
                    died = line_of(error)
                give_up = min(give_up, time.monotonic() + LINGER)
            with suppress(RayActorError):
                for each in ray.get(news.take.remote()):
                    hear(*each)
        if failed is not None and died is None:  # else its error may follow from the death
            raise failed
        return died or ended

    def _ask_to_end(self) -> None:
        """Has the ranks that still run end by themselves, as torchrun's agent does: they leave
        nothing on their node."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as OnNode

        def end(process: int) -> None:  # travels by value: it starts soon, without imports
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGTERM)

        asked = []  # keeps the references until the ranks have ended
        for place in (self.places[actor] for actor in self.running.values()):
            on_node = OnNode(place.node, soft=False)
            there = ray.remote(end).options(num_cpus=0, scheduling_strategy=on_node)
            asked.append(there.remote(place.process))
        if asked:
            ray.wait([*self.running], num_returns=len(self.running), timeout=LINGER)
